#!/usr/bin/python3
"""Compares softmax (m = 1) with margins by verification, with many classes.

Trains the net on 800 characters, each in many typefaces, for each m and seed.
Then takes every pair of drawings of 1000 other characters, which it has never
seen, and asks by the cosine of their features whether both are the same
character: in typefaces that it was trained on, and in new ones. Prints the
equal error rate (EER) and the true accept rate (TAR) at false accept rates
(FAR) of 1 % and 0.1 %, mean and standard deviation over the seeds, as Markdown
tables, and draws the ROC curves. Stopped and run again, it goes on with the
runs that are missing. train_kanji.sh gets what it needs.

Which descent of lambda is the best is for --validation to say, which leaves
the characters of the test alone.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))
# First: Ctrl-C is quiet from here on.
from caffe_proto import UserError  # noqa: E402

import numpy as np  # noqa: E402

import pair_judging  # noqa: E402
import runs  # noqa: E402

SCRIPT = "myexamples/kanji_verification/train_kanji.sh"
DRAWN = os.path.join(HERE, "drawn", "pairs.npz")
# Sets of draw_characters.py, and what is said of them.
TEST = {"known_typefaces": "%d characters, in the training's typefaces",
        "new_typefaces": "%d characters, in new typefaces"}
VALIDATION = {"validation": "%d characters for validation"}


def parse_args():
    options = runs.parser(
        __doc__, os.path.join(HERE, "kanji_solver.prototxt"),
        os.path.join(HERE, "runs"), seeds=3)
    options.add_argument("--validation", action="store_true",
                         help="judge by the characters for validation")
    return runs.parse(options)


def read_parts(path, titles, kind):
    """The Parts of what draw_characters.py made."""
    parts = []
    try:
        with np.load(path) as arrays:
            for part, title in titles.items():
                labels = arrays[part + "_labels"]
                parts.append(pair_judging.Part(
                    title % len(set(labels)), arrays[part + "_images"],
                    labels, kind))
    except (OSError, ValueError, KeyError) as error:
        raise UserError("cannot read %s: %s" % (path, error))
    return parts


def main():
    with runs.errors():
        args = parse_args()
        runs.need(DRAWN, SCRIPT)
        pair_judging.run_all(args, read_parts(
            DRAWN, VALIDATION, "validation") if args.validation
            else read_parts(DRAWN, TEST, "test"), SCRIPT)


if __name__ == "__main__":
    main()
