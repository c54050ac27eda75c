#!/usr/bin/python3
"""Compares softmax (m = 1) with margins by verification.

Trains the net on the digits 0 to 4 for each m and seed, then takes every pair
of test images of the digits 5 to 9, which it has never seen, and asks by the
cosine of their features whether both are the same digit. Beside it, the same
for test images of the digits 0 to 4. Prints the equal error rate (EER) and the
true accept rate (TAR) at false accept rates (FAR) of 1 % and 0.1 %, mean and
standard deviation over the seeds, as Markdown tables, and draws the ROC
curves. Stopped and run again, it goes on with the runs that are missing.
train_verification.sh gets what it needs.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))
# First: Ctrl-C is quiet from here on.
import caffe_proto  # noqa: E402
import pair_judging  # noqa: E402
import runs  # noqa: E402
import split_digits  # noqa: E402

SCRIPT = "myexamples/mnist_verification/train_verification.sh"
# Of the pairs: what is said of their digits, and which these are.
PAIRS = {"never trained on": (5, 9), "trained on": (0, 4)}


def parse_args():
    options = runs.parser(
        __doc__, os.path.join(HERE, "verification_solver.prototxt"),
        os.path.join(HERE, "runs"), seeds=3)
    options.add_argument("--images", metavar="PREFIX", default=os.path.join(
        HERE, "..", "mnist", "data", "t10k"), help="the test images: "
        "PREFIX-images-idx3-ubyte and -labels- (default: MNIST's)")
    return runs.parse(options)


def main():
    with runs.errors():
        args = parse_args()
        for end in split_digits.ENDS:
            runs.need(args.images + end, SCRIPT)
        pair_judging.run_all(args, [
            pair_judging.Part("digits %d to %d, %s" % (digits + (what,)),
                              *split_digits.read(args.images, *digits))
            for what, digits in PAIRS.items()], SCRIPT)


if __name__ == "__main__":
    main()
