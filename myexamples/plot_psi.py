#!/usr/bin/python3
"""Draws psi(theta), what the margin makes of cos(theta) in the target logit.

With lambda: (lambda cos(theta) + psi(theta)) / (1 + lambda), which is what
training sees at that lambda.
"""
import argparse
import sys

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402


def psi(theta, m):
    """psi of the paper, equation 5, for angles in [0, pi]."""
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
    for m in args.m:
        if m < 1:
            parser.error("-m %d: the margin is at least 1" % m)
    for value in args.lambdas:
        if not 0 <= value < float("inf"):
            parser.error("--lambda %g: lambda is at least 0" % value)
    return args


def main():
    args = parse_args()
    theta = np.linspace(0, np.pi, 721)
    figure, axis = plt.subplots(figsize=(6, 4.5), constrained_layout=True)
    for m in args.m:
        for value in args.lambdas:
            axis.plot(np.degrees(theta),
                      (value * np.cos(theta) + psi(theta, m)) / (1 + value),
                      label="m = %d, lambda = %g" % (m, value))
    axis.set_xlabel("theta, degrees")
    axis.set_ylabel("psi(theta)")
    axis.set_xticks(range(0, 181, 30))
    axis.grid(alpha=0.3)
    axis.legend()
    try:
        figure.savefig(args.output, dpi=100)
    except (OSError, ValueError) as error:
        sys.exit("error: cannot write %s: %s" % (args.output, error))
    print("plot: %s" % args.output)


if __name__ == "__main__":
    main()
