#!/usr/bin/python3
"""Takes the images of some classes out of files in MNIST's format.

    split_digits.py FROM TO 0-4

writes TO-images-idx3-ubyte and TO-labels-idx1-ubyte with those images of
FROM-images-idx3-ubyte and FROM-labels-idx1-ubyte whose label is in the range.
"""
import argparse
import os
import re
import struct
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))
from caffe_proto import UserError  # noqa: E402

MAGIC = {1: 2049, 3: 2051}


def read_idx(path, axes):
    """The array of bytes in an IDX file with that many axes."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError("cannot read %s: %s" % (path, error.strerror))
    head = struct.Struct(">%di" % (1 + axes))
    if len(data) < head.size:
        raise UserError("%s is cut short" % path)
    magic, *shape = head.unpack_from(data)
    if magic != MAGIC[axes]:
        raise UserError("%s is no MNIST file: it begins with %d instead of %d"
                        % (path, magic, MAGIC[axes]))
    size = head.size + int(np.prod(shape, dtype=np.int64))
    if len(data) != size:
        raise UserError("%s has %d bytes where its header says %d"
                        % (path, len(data), size))
    return np.frombuffer(data, np.uint8, offset=head.size).reshape(shape)


def write_idx(path, array):
    with open(path, "wb") as file:
        file.write(struct.pack(">%di" % (1 + array.ndim), MAGIC[array.ndim],
                               *array.shape))
        file.write(array.tobytes())


def read(prefix, first, last):
    """(images, labels) with the labels first to last."""
    images = read_idx(prefix + "-images-idx3-ubyte", 3)
    labels = read_idx(prefix + "-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise UserError("%s: %d images and %d labels"
                        % (prefix, len(images), len(labels)))
    chosen = (labels >= first) & (labels <= last)
    if not chosen.any():
        raise UserError("%s has no image with a label from %d to %d"
                        % (prefix, first, last))
    return images[chosen], labels[chosen]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="FROM")
    parser.add_argument("target", metavar="TO")
    parser.add_argument("classes", metavar="FIRST-LAST")
    args = parser.parse_args()
    match = re.fullmatch(r"(\d+)-(\d+)", args.classes)
    if not match:
        parser.error("%s is no range like 0-4" % args.classes)
    try:
        images, labels = read(args.source, *map(int, match.groups()))
        write_idx(args.target + "-images-idx3-ubyte", images)
        write_idx(args.target + "-labels-idx1-ubyte", labels)
    except UserError as error:
        sys.exit("error: %s" % error)
    except OSError as error:
        sys.exit("error: cannot write: %s" % error)


if __name__ == "__main__":
    main()
