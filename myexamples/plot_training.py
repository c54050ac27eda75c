#!/usr/bin/python3
"""Draws loss, test accuracy and lambda over the iterations of a Caffe log."""
import argparse
import os
import sys

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from caffe_log import History  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", metavar="LOG",
                        help="what `caffe train` wrote to stderr")
    parser.add_argument("-o", "--output", metavar="PNG",
                        help="default: LOG with the ending .png")
    parser.add_argument("-t", "--title", help="default: the name of LOG")
    return parser.parse_args()


def draw(history, title):
    """A figure with one panel for each of the three that the log has."""
    panels = [[("train loss", history.curve("train", "loss")),
               ("test loss", history.curve("test", "loss"))],
              [("test accuracy", history.accuracies())],
              [("lambda", history.curve("train", "lambda"))]]
    panels = [[c for c in panel if c[1][0]] for panel in panels]
    panels = [panel for panel in panels if panel]
    figure, axes = plt.subplots(
        len(panels), 1, sharex=True, squeeze=False,
        figsize=(8, 1 + 2.4 * len(panels)), constrained_layout=True)
    for axis, panel in zip(axes[:, 0], panels):
        for name, (iterations, values) in panel:
            marker = "." if name.startswith("test") else None
            axis.plot(iterations, values, label=name, marker=marker)
        axis.set_ylabel(panel[0][0].split()[-1] if len(panel) > 1
                        else panel[0][0])
        if len(panel) > 1:
            axis.legend()
        values = panel[0][1][1]
        # Over less than a decade, a log scale has no tick or crowded ones.
        if panel[0][0] == "lambda" and 0 < 10 * min(values) < max(values):
            axis.set_yscale("log")
        else:
            axis.ticklabel_format(axis="y", useOffset=False, style="plain")
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("iteration")
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1, 0].ticklabel_format(axis="x", useOffset=False, style="plain")
    figure.suptitle(title)
    return figure


def main():
    args = parse_args()
    output = args.output or os.path.splitext(args.log)[0] + ".png"
    try:
        with open(args.log, errors="replace") as lines:
            history = History(lines)
    except OSError as error:
        sys.exit("error: cannot read %s: %s" % (args.log, error.strerror))
    if not history.train and not history.test:
        sys.exit("error: %s is no log of `caffe train`, or its training never "
                 "began: it has no line \"Iteration N, loss = ...\""
                 % args.log)
    figure = draw(history, args.title or os.path.basename(args.log))
    try:
        figure.savefig(output, dpi=100)
    except (OSError, ValueError) as error:
        sys.exit("error: cannot write %s: %s" % (output, error))
    iterations, accuracies = history.accuracies()
    if accuracies:
        print("test accuracy: %.4f after %d iterations"
              % (accuracies[-1], iterations[-1]))
    print("plot: %s" % output)


if __name__ == "__main__":
    main()
