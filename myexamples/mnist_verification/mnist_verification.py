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
import statistics
import sys

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))
import caffe_proto  # noqa: E402
import features  # noqa: E402
import runs  # noqa: E402
import split_digits  # noqa: E402
import verify  # noqa: E402

BLOB = "bn3"
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


def all_pairs(rows, labels):
    """(cosines, same) of every pair of rows."""
    rows = verify.normalised(rows).astype(np.float32)
    pairs = np.triu(np.ones((len(rows), len(rows)), bool), 1)
    return (rows @ rows.T)[pairs], (labels[:, None] == labels)[pairs]


class Judgement:
    """What the pairs say of a trained run; rates are those of the plot."""

    def __init__(self, extractor, images, labels, rates):
        rows = extractor.features(range(len(images)), lambda i: images[i])
        # Of millions of pairs: the whole curve is too large to keep.
        roc = verify.Roc(*all_pairs(rows, labels))
        self.eer = roc.eer()
        self.tars = roc.tar_at(verify.FARS)
        self.curve = roc.tar_at(rates)


def judge(pb, caffe, all_runs, pairs, rates):
    """What is said of the pairs to margins to Judgements, one a seed."""
    found = {what: {} for what in pairs}
    progress = runs.Progress()
    for done, run in enumerate(all_runs):
        progress.show(lambda: "    %d/%d nets judged" % (done, len(all_runs)))
        extractor = features.Extractor(
            pb, caffe, os.path.join(run.path, "net.prototxt"), run.model,
            BLOB, batch=100)
        for what, (images, labels) in pairs.items():
            found[what].setdefault(run.margin, []).append(
                Judgement(extractor, images, labels, rates))
    progress.clear()
    return found


def name(margin):
    return "softmax (m = 1)" if margin == 1 else "m = %d" % margin


def mean_and_deviation(rates):
    rates = [100 * rate for rate in rates]
    mean = "%.2f" % statistics.mean(rates)
    if len(rates) == 1:
        return mean
    return "%s ± %.2f" % (mean, statistics.stdev(rates))


def print_table(judgements):
    """judgements: margin to its Judgements, one a seed."""
    print("| m | EER (%%) | %s | runs: EER |" % " | ".join(
        "TAR at FAR %s (%%)" % verify.percent(far) for far in verify.FARS))
    print("|---|---|%s---|" % ("---|" * len(verify.FARS)))
    for margin, ones in judgements.items():
        cells = [mean_and_deviation([one.eer for one in ones])]
        cells += [mean_and_deviation(rates)
                  for rates in zip(*(one.tars for one in ones))]
        print("| %d | %s | %s |" % (margin, " | ".join(cells), " ".join(
            "%.2f" % (100 * one.eer) for one in ones)))


def run_all(args):
    pb = caffe_proto.load()
    verify.load_sklearn("metrics")
    pairs = {what: split_digits.read(args.images, *digits)
             for what, digits in PAIRS.items()}
    output = os.path.abspath(args.output)
    all_runs = runs.of_each(args, lambda name, margin, seed: runs.Run(
        pb, args.solver, os.path.join(output, name), margin, seed))
    runs.train_all(all_runs, args.jobs)
    rates = verify.false_rates(1e-4)
    found = judge(pb, features.load_pycaffe(), all_runs, pairs, rates)
    figure, axes = plt.subplots(1, len(pairs), figsize=(11, 5),
                                constrained_layout=True, sharey=True)
    for axis, (what, judgements) in zip(axes, found.items()):
        images = len(pairs[what][0])
        digits = "digits %d to %d, %s" % (PAIRS[what] + (what,))
        print("\n%s: %d pairs of %d test images, mean%s of %d seed%s\n" % (
            digits, images * (images - 1) // 2, images,
            " ± standard deviation" if args.seeds > 1 else "", args.seeds,
            "s"[args.seeds == 1:]))
        print_table(judgements)
        verify.draw_roc(axis, rates, [
            (name(margin), [one.curve for one in ones])
            for margin, ones in judgements.items()])
        axis.set_title("Pairs of the " + digits)
    figure.suptitle("Verification on %s, mean and range of %d seed%s" % (
        all_runs[0].dataset() or "images of your own", args.seeds,
        "s"[args.seeds == 1:]))
    png = os.path.join(output, "roc.png")
    figure.savefig(png, dpi=100)
    print("\nplot: %s" % png)


def main():
    with runs.errors():
        run_all(parse_args())


if __name__ == "__main__":
    main()
