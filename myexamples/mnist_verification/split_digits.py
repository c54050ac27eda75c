#!/usr/bin/python3
"""Takes a part of the images out of files in MNIST's format.

    split_digits.py FROM TO PART

writes TO-images-idx3-ubyte and TO-labels-idx1-ubyte with those images of
FROM-images-idx3-ubyte and FROM-labels-idx1-ubyte that PART names: 0-4 is those
with a label from 0 to 4; validation is the last sixth, whatever the labels,
and fit the others.
"""
import argparse
import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))
# First: Ctrl-C is quiet from here on.
from caffe_proto import UserError, user_errors  # noqa: E402

import idx_file  # noqa: E402

ENDS = ("-images-idx3-ubyte", "-labels-idx1-ubyte")


def read_all(prefix):
    """(images, labels), one label an image."""
    images, labels = (idx_file.read(prefix + end, axes)
                      for end, axes in zip(ENDS, (3, 1)))
    if len(images) != len(labels):
        raise UserError("%s: %d images and %d labels"
                        % (prefix, len(images), len(labels)))
    return images, labels


def read(prefix, first, last):
    """(images, labels) with the labels first to last."""
    images, labels = read_all(prefix)
    chosen = (labels >= first) & (labels <= last)
    if not chosen.any():
        raise UserError("%s has no image with a label from %d to %d"
                        % (prefix, first, last))
    return images[chosen], labels[chosen]


def read_part(prefix, part):
    """(images, labels) of the part "fit" or "validation"."""
    images, labels = read_all(prefix)
    fit = len(labels) - len(labels) // 6
    part = slice(fit) if part == "fit" else slice(fit, None)
    return images[part], labels[part]


def check_apart(source, target):
    """Raises UserError where files of target are files of source."""
    for end in ENDS:
        if os.path.exists(target + end) and os.path.exists(source + end) and \
                os.path.samefile(source + end, target + end):
            raise UserError("TO is FROM, %s: write to another file"
                            % (target + end))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="FROM")
    parser.add_argument("target", metavar="TO")
    parser.add_argument("part", metavar="PART")
    args = parser.parse_args()
    classes = re.fullmatch(r"(\d+)-(\d+)", args.part)
    if not classes and args.part not in ("fit", "validation"):
        parser.error("%s is no range like 0-4, nor fit or validation"
                     % args.part)
    with user_errors():
        check_apart(args.source, args.target)
        if classes:
            images, labels = read(args.source, *map(int, classes.groups()))
        else:
            images, labels = read_part(args.source, args.part)
        try:
            for end, array in zip(ENDS, (images, labels)):
                idx_file.write(args.target + end, array)
        except OSError as error:
            raise UserError("cannot write: %s" % error)


if __name__ == "__main__":
    main()
