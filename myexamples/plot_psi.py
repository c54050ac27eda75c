#!/usr/bin/python3
"""Draws psi(theta), what the margin makes of cos(theta) in the target logit.

With lambda: (lambda cos(theta) + psi(theta)) / (1 + lambda), which is what
training sees at that lambda.
"""
import argparse

# First: Ctrl-C is quiet from here on.
from caffe_proto import MAX_MARGIN, user_errors

import matplotlib.pyplot as plt
import numpy as np

import figures


# Of the values of lambda.
STYLES = ("-", "--", ":", "-.")
# More names do not fit beside the plot.
CURVES = 16


def psi(theta, m):
    """psi of the paper, equation 6, for angles in [0, pi]."""
    k = np.minimum(np.floor(m * theta / np.pi), m - 1)
    return (-1.0) ** k * np.cos(m * theta) - 2 * k


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", type=int, nargs="+", default=[1, 2, 3, 4],
                        metavar="M", help="margins (default: 1 2 3 4)")
    parser.add_argument("-l", "--lambda", type=float, nargs="+", default=[0.0],
                        dest="lambdas", metavar="LAMBDA",
                        help="values of lambda (default: 0)")
    parser.add_argument("-o", "--output", default="psi.png", metavar="PNG",
                        help="default: psi.png")
    args = parser.parse_args()
    curves = len(args.m) * len(args.lambdas)
    if len(args.lambdas) > len(STYLES) or curves > CURVES or \
            len(args.m) > len(figures.COLOURS):
        parser.error("-m and --lambda: a plot takes %d margins, %d values of "
                     "lambda and %d curves at most" % (
                         len(figures.COLOURS), len(STYLES), CURVES))
    for m in args.m:
        if not 1 <= m <= MAX_MARGIN:
            parser.error("-m %d: a margin is from 1 to %d" % (m, MAX_MARGIN))
    for value in args.lambdas:
        if not 0 <= value < float("inf"):
            parser.error("--lambda %g: lambda is finite and at least 0"
                         % value)
    return args


def draw(margins, lambdas):
    """A figure with a curve for each margin and lambda, named at its end."""
    theta = np.linspace(0, np.pi, 721)
    figure, axis = plt.subplots(figsize=(6, 4.5), constrained_layout=True)
    ends = []
    for m, colour in zip(margins, figures.COLOURS):
        for value, style in zip(lambdas, STYLES):
            mixture = (value * np.cos(theta) + psi(theta, m)) / (1 + value)
            axis.plot(np.degrees(theta), mixture, style, color=colour)
            name = "m = %d" % m
            if lambdas != [0]:
                name += ", lambda = %g" % value
            ends.append((mixture[-1], name, colour))
    axis.set_xlabel("theta, degrees")
    if lambdas == [0]:
        axis.set_ylabel("psi(theta)")
    else:
        axis.set_ylabel("(lambda cos(theta) + psi(theta)) / (1 + lambda)")
    axis.set_xticks(range(0, 181, 30))
    axis.set_xlim(0, 180)
    axis.grid(alpha=0.3)
    # Names that would lie on each other are moved apart, down: lambda brings
    # the ends together near the top.
    low, high = axis.get_ylim()
    gap = 0.045 * (high - low)
    place = np.inf
    for value, name, colour in sorted(ends, reverse=True):
        place = min(value, place - gap)
        axis.annotate(name, (180, value), (186, place), va="center",
                      fontsize="small", color=colour, annotation_clip=False,
                      arrowprops=dict(arrowstyle="-", color=colour,
                                      linewidth=0.6, relpos=(0, 0.5)))
    return figure


def main():
    args = parse_args()
    with user_errors():
        figures.save(draw(args.m, args.lambdas), args.output)


if __name__ == "__main__":
    main()
