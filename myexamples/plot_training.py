#!/usr/bin/python3
"""Draws loss, test accuracy and lambda over the iterations of a Caffe log.

A log with the lines of LSOFTMAX_LOG_EVERY also gets panels of the angles to
the own class, the norms of features and class weights, the share of samples
whose margin holds, and the shares of samples in the segments of psi.
"""
import argparse
import os

# First: Ctrl-C is quiet from here on.
from caffe_proto import user_errors

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

import figures
from caffe_log import read_history
from event_files import EventWriter


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", metavar="LOG",
                        help="what `caffe train` wrote to stderr")
    parser.add_argument("-o", "--output", metavar="PNG",
                        help="default: LOG with the ending .png")
    parser.add_argument("-t", "--title", help="default: the name of LOG")
    parser.add_argument("--tensorboard", metavar="DIR",
                        help="write event files for TensorBoard into DIR, "
                        "too (needs the Python package tensorboardX)")
    return parser.parse_args()


def margin_panels(history):
    """The panels of what the margin layers log: (label, curves)."""
    layers = history.margins()
    panels = {"angle (degrees)": [], "norm": [], "margin holds": [],
              "samples in segment": []}
    for layer in layers:
        head = figures.shortened(layer, 24) + " " if len(layers) > 1 else ""
        for label, name, words in (
                ("angle (degrees)", "angle_p95", "95th percentile"),
                ("angle (degrees)", "angle_mean", "mean"),
                ("norm", "feature_norm", "features"),
                ("norm", "weight_norm", "class weights"),
                ("margin holds", "holds", "margin holds")):
            panels[label].append((head + words, history.margin(layer, name)))
        iterations, shares = history.margin(layer, "segments")
        for k, values in enumerate(zip(*shares)):
            panels["samples in segment"].append(
                ("%sk = %d" % (head, k), (iterations, values)))
    return list(panels.items())


def descents(history):
    """The curves of lambda: of each layer where several log theirs."""
    layers = history.margins()
    if len(layers) > 1:
        return [(layer, history.margin(layer, "lambda")) for layer in layers]
    return [("lambda", history.descent())]


def draw(history, title):
    """A figure with one panel for each of what the log has."""
    panels = [("loss", [("train loss", history.curve("train", "loss")),
                        ("test loss", history.curve("test", "loss"))]),
              ("test accuracy", [("test accuracy", history.accuracies())]),
              ("lambda", descents(history))]
    panels += margin_panels(history)
    panels = [(label, [c for c in curves if c[1][0]])
              for label, curves in panels]
    panels = [panel for panel in panels if panel[1]]
    figure, axes = plt.subplots(
        len(panels), 1, sharex=True, squeeze=False,
        figsize=(8, 1 + 2.4 * len(panels)), constrained_layout=True)
    for axis, (label, curves) in zip(axes[:, 0], panels):
        for name, (iterations, values) in curves:
            marker = "." if name.startswith("test") else None
            axis.plot(iterations, values, label=name, marker=marker)
        if len(curves) > 2:
            # Beside: inside it would hide some of them.
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        elif len(curves) > 1:
            axis.legend()
        else:
            label = curves[0][0] if label == "loss" else label
        axis.set_ylabel(label)
        values = [value for _, points in curves for value in points[1]]
        # Over less than a decade, a log scale has no tick or crowded ones.
        if label in ("lambda", "norm") and 0 < 10 * min(values) < max(values):
            axis.set_yscale("log")
        else:
            axis.ticklabel_format(axis="y", useOffset=False, style="plain")
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("iteration")
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1, 0].ticklabel_format(axis="x", useOffset=False, style="plain")
    figure.suptitle(figures.shortened(title))
    return figure


def run(args):
    output = args.output or os.path.splitext(args.log)[0] + ".png"
    history = read_history(args.log)
    events = args.tensorboard and EventWriter(args.tensorboard)
    figures.save(draw(history, args.title or os.path.basename(args.log)),
                 output)
    if events:
        for row in history.rows():
            events.add(row)
        events.close()
    iterations, accuracies = history.accuracies()
    if accuracies:
        print("test accuracy: %.4f after %d iterations"
              % (accuracies[-1], iterations[-1]))
    if events:
        print("event files: %s" % args.tensorboard)


def main():
    with user_errors():
        run(parse_args())


if __name__ == "__main__":
    main()
