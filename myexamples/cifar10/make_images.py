#!/usr/bin/python3
"""Makes PNGs, lists and the mean image from the binary version of CIFAR-10."""
import argparse
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)),
                                ".."))
# First: Ctrl-C is quiet from here on.
import caffe_proto  # noqa: E402

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from caffe_proto import UserError, user_errors  # noqa: E402

SIZE = 32
RECORD = 1 + 3 * SIZE * SIZE
BATCHES = {"train": ["data_batch_%d.bin" % i for i in range(1, 6)],
           "val": ["test_batch.bin"]}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batches", metavar="BATCHES",
                        help="the folder with data_batch_1.bin, ...")
    parser.add_argument("output", metavar="FOLDER", help="a new folder")
    parser.add_argument("--listed-as", required=True, metavar="PATH",
                        help="what the lists call FOLDER")
    parser.add_argument("--mean", required=True, metavar="FILE",
                        help="name of the mean image in FOLDER")
    parser.add_argument("--pad", type=int, default=0, metavar="N",
                        help="pixels of zeros on every side")
    return parser.parse_args()


def read_batch(folder, name):
    """The labels of a batch, and its images as N x 3 x 32 x 32."""
    path = os.path.join(folder, name)
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError("cannot read %s: %s" % (path, error.strerror))
    if not data.size or data.size % RECORD:
        raise UserError("%s has %d bytes, which is no whole number of images "
                        "of %d" % (path, data.size, RECORD))
    data = data.reshape(-1, RECORD)
    labels = data[:, 0]
    if labels.max() > 9:
        raise UserError("%s has the label %d, which is not in 0..9"
                        % (path, labels.max()))
    return labels, data[:, 1:].reshape(-1, 3, SIZE, SIZE)


def write_set(name, batches, args):
    """Writes the images and the list of a set; returns the images' mean."""
    folder = os.path.join("images", name)
    os.makedirs(os.path.join(args.output, folder))
    pad = ((0, 0), (0, 0), (args.pad, args.pad), (args.pad, args.pad))
    total, count = 0, 0
    with open(os.path.join(args.output, name + ".txt"), "w") as listing:
        for labels, images in batches:
            images = np.pad(images, pad)
            total = total + images.sum(axis=0, dtype=np.uint64)
            for label, image in zip(labels, images):
                png = os.path.join(folder, "%05d.png" % count)
                Image.fromarray(image.transpose(1, 2, 0)).save(
                    os.path.join(args.output, png))
                listing.write("%s/%s %d\n" % (args.listed_as, png, label))
                count += 1
            print("    %s: %d images" % (name, count), flush=True)
    return total / count


def write_mean(pb, mean, path):
    """Writes the mean image, its channels in Caffe's order (BGR)."""
    mean = mean[::-1]
    blob = pb.BlobProto(num=1, channels=mean.shape[0], height=mean.shape[1],
                        width=mean.shape[2])
    blob.data.extend(mean.ravel())
    with open(path, "wb") as file:
        file.write(blob.SerializeToString())


def main():
    args = parse_args()
    with user_errors():
        try:
            pb = caffe_proto.load()
            sets = {name: [read_batch(args.batches, batch) for batch in names]
                    for name, names in BATCHES.items()}
            means = {name: write_set(name, batches, args)
                     for name, batches in sets.items()}
            write_mean(pb, means["train"],
                       os.path.join(args.output, args.mean))
        except OSError as error:
            raise UserError("cannot write %s: %s" % (args.output, error))


if __name__ == "__main__":
    main()
