#!/usr/bin/python3
"""Classifies images with an exported net in OpenCV, without Caffe.

    myexamples/classify.py FOLDER IMAGE...

FOLDER is one of export_deploy.py's; the net's transform is taken from the
comments in its deploy.prototxt. An IMAGE is a file of a picture, or an image
of a file in MNIST's format, counted from 0: t10k-images-idx3-ubyte:7. For
each a line names the class and its probability (its score where the net does
not end in a Softmax), of each output where there are several, and the label
where MNIST's labels lie beside the images.
"""
import argparse
import contextlib
import os
import re

# First: Ctrl-C is quiet from here on.
from caffe_proto import UserError, user_errors

import numpy as np

import deploy_input
import idx_file
from caffe_model import read_bytes, text


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("images", metavar="IMAGE", nargs="+")
    return parser.parse_args()


def read_transform(prototxt):
    """What the comments at the head of a deploy.prototxt say: arguments for
    blobFromImage, whether the images are gray, and what is done before: the
    (width, height) to resize to and then the crop, each of them or None."""
    said = deploy_input.said(prototxt)

    def sides(key):
        return tuple(int(side) for side in said[key].split(","))
    try:
        transform = {
            "scalefactor": float(said["scalefactor"]),
            "size": sides("size"),
            "mean": tuple(float(mean) for mean in said["mean"].split(",")),
            "swapRB": {"true": True, "false": False}[said["swapRB"]]}
        gray = said["channels"].startswith("gray")
        resize = sides("resize") if "resize" in said else None
        crop = re.search(r"(\d+) x", said["crop"]) if "crop" in said else None
    except (KeyError, ValueError):
        raise UserError("%s does not say how its input is made: was it made "
                        "by export_deploy.py from a net with images?"
                        % prototxt)
    return transform, gray, resize, int(crop[1]) if crop else None


def read_image(cv2, name, gray):
    """(image, label or None) of an IMAGE of the command line."""
    path, _, number = name.rpartition(":")
    if path and number.isdigit() and not os.path.exists(name):
        images = idx_file.read(path, 3)
        number = int(number)
        if number >= len(images):
            raise UserError("%s has %d images" % (path, len(images)))
        image, label = images[number], None
        labels = path.replace("images-idx3", "labels-idx1")
        if labels != path and os.path.exists(labels):
            label = int(idx_file.read(labels, 1)[number])
        return image if gray else cv2.cvtColor(
            image, cv2.COLOR_GRAY2BGR), label
    data = np.frombuffer(read_bytes(name), np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE if gray
                         else cv2.IMREAD_COLOR) if data.size else None
    if image is None:
        raise UserError("cannot read the image %s: %s" % (
            name, "OpenCV does not know its format, or it is broken"
            if data.size else "it is empty"))
    return image, None


def middle(image, crop, name):
    """The middle of an image, as Caffe crops when it tests."""
    height, width = image.shape[:2]
    if min(height, width) < crop:
        raise UserError("%s has %d x %d pixels; the net crops %d x %d"
                        % (name, height, width, crop, crop))
    top, left = (height - crop) // 2, (width - crop) // 2
    return image[top:top + crop, left:left + crop]


def find_outputs(net):
    """The names of the outputs with a value for each class, of which a net
    with several losses has several, and what the values are."""
    names = net.getUnconnectedOutLayersNames()
    softmax = [name for name in names if
               net.getLayer(net.getLayerId(name)).type == "Softmax"]
    return (softmax, "probability") if softmax else (names, "score")


@contextlib.contextmanager
def opencv_errors(cv2, folder):
    """Makes a UserError of OpenCV's."""
    try:
        yield
    except cv2.error as error:
        raise UserError("OpenCV cannot read or run the net in %s: %s" % (
            folder, str(error).strip().splitlines()[0]))


def run(args):
    try:
        # One line for an error, not its own as well.
        os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
        import cv2
    except ImportError:
        raise UserError("OpenCV's Python module is missing: apt-get install "
                        "python3-opencv")
    prototxt = os.path.join(args.folder, "deploy.prototxt")
    transform, gray, resize, crop = read_transform(prototxt)
    with opencv_errors(cv2, args.folder):
        net = cv2.dnn.readNetFromCaffe(
            prototxt, os.path.join(args.folder, "deploy.caffemodel"))
    outputs, word = find_outputs(net)
    for name in args.images:
        image, label = read_image(cv2, name, gray)
        if resize:
            image = cv2.resize(image, resize)
        if crop:
            image = middle(image, crop, name)
        net.setInput(cv2.dnn.blobFromImage(image, **transform))
        # A net without its weights is found out only here.
        with opencv_errors(cv2, args.folder):
            made = net.forward(outputs)
        found = []
        for output, scores in zip(outputs, made):
            if scores.shape[:2] != (1, scores.size):
                raise UserError("'%s' of the net has the shape %s: no score "
                                "for each class" % (output,
                                                    text(scores.shape)))
            found.append("%sclass %d (%s %.3f)" % (
                "%s: " % output if len(outputs) > 1 else "", scores.argmax(),
                word, scores.max()))
        print("OpenCV %s on %s: %s%s" % (
            cv2.__version__, os.path.basename(name), ", ".join(found),
            "" if label is None else ", label %d" % label))


def main():
    with user_errors():
        run(parse_args())


if __name__ == "__main__":
    main()
