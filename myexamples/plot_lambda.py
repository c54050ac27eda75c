#!/usr/bin/python3
"""Shows lambda and the learning rate over the iterations of a solver.

Prints them as a table, with the weight 1/(1+lambda) of the margin in the
target logit, and draws them. Look at this before training: lambda should start
large and end below 1, well before the last iteration, or at a lambda_min that
is meant.
"""
import argparse
import math
import os
import sys

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

import caffe_proto  # noqa: E402
from caffe_proto import UserError, lambda_at, learning_rate  # noqa: E402

# Above this lambda, the margin has less than half of the weight.
HALF = 1.0
# A descent should take longer than these iterations to HALF. Tried on MNIST:
# after 800 iterations with m = 4, a net with all of the margin from the start
# was right on 40 % of the test images, one with half of it after 20 iterations
# on 95 %, after 50, 100 or 200 on 99 %. How soon it comes before the first
# drop of the learning rate is no matter.
EARLY = 50
# The schedules of the paper's authors pass about this lambda at the first
# drop of the learning rate.
LAMBDA_AT_DROP = 15.0
# Where there is no drop: the authors' power, nearly an exponential.
POWER = 40.0
# lambda of the suggestion at iteration 0, unless the net has one.
BASE = 1000.0


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("solver", metavar="SOLVER", help="solver prototxt")
    parser.add_argument("-o", "--output", metavar="PNG", help="default: "
                        "beside SOLVER, its name with _lambda.png")
    parser.add_argument("--suggest", metavar="LAMBDA", type=float, help="also "
                        "propose gamma and power that reach this lambda at "
                        "max_iter")
    args = parser.parse_args()
    if args.suggest is not None and not (
            args.suggest > 0 and math.isfinite(args.suggest)):
        parser.error("--suggest %g: the lambda to reach must be above 0"
                     % args.suggest)
    return args


def margin_layers(pb, net):
    """The margin layers of the TRAIN phase: a list of (name, parameter)."""
    return [(layer.name, layer.largemargin_inner_product_param)
            for layer in net.layer
            if layer.type == "LargeMarginInnerProduct"
            and caffe_proto.in_phase(pb, net, layer, pb.TRAIN)]


def end(solver, param):
    """lambda in the last iteration."""
    return lambda_at(param, solver.max_iter - 1, solver.iter_size)


def kept_by_minimum(solver, param):
    """Whether lambda_min is what leaves the margin under half its weight."""
    return end(solver, param) == param.lambda_min > HALF


def notes(solver, param):
    """What is worth knowing of the schedule of a margin layer."""
    if caffe_proto.margin(param) == 1:
        return ["m is 1: this is plain softmax, lambda changes nothing"]
    if kept_by_minimum(solver, param):
        return ["lambda_min keeps lambda at %.4g from iteration %d on: the "
                "margin's weight ends at %.2g" % (
                    param.lambda_min,
                    first_below(solver, param, param.lambda_min),
                    1 / (1 + param.lambda_min))]
    return []


def warnings(solver, param, asked=0.0):
    """What is likely wrong with the schedule of a margin layer.

    asked is the lambda that it is meant to end at.
    """
    if caffe_proto.margin(param) == 1:
        return []
    last = end(solver, param)
    # Suggestions are rounded.
    if (last > max(HALF, 1.05 * asked)
            and not kept_by_minimum(solver, param)):
        why = ""
        if param.gamma == 0 or param.power == 0:
            why = " (gamma and power must both be above 0 for a descent)"
        return ["lambda is still %.4g at the end%s: the margin has a weight "
                "of only %.2g; let it fall faster, or set lambda_min if this "
                "is meant" % (last, why, 1 / (1 + last))]
    fell = first_below(solver, param, HALF)
    # One that goes on by hand has its descent behind it.
    if fell is not None and fell < EARLY and not param.iteration:
        return ["lambda is %g or less %s: the margin has most of the weight "
                "before the net has learned anything, and training may not "
                "start (the loss stays near ln(classes), or at 87.3365)"
                % (HALF, "from the first iteration on" if fell == 0
                   else "after %d iterations" % fell)]
    return []


def first_below(solver, param, value):
    """The first iteration with lambda <= value, or None."""
    low, high = 0, solver.max_iter
    while low < high:
        middle = (low + high) // 2
        if lambda_at(param, middle, solver.iter_size) <= value:
            high = middle
        else:
            low = middle + 1
    return low if low < solver.max_iter else None


def passes(solver, param):
    """When the margin has 10, 50 and 90 % of the weight, in words."""
    words = []
    for percent in (10, 50, 90):
        first = first_below(solver, param, 100 / percent - 1)
        words.append("%d %% %s" % (percent, "never" if first is None
                                   else "from iteration %d on" % first))
    return "the margin's weight: " + ", ".join(words)


def print_table(solver, param):
    """Prints about 16 iterations, the drops of the learning rate included."""
    step = max(1, round(solver.max_iter / 12))
    shown = set(range(0, solver.max_iter, step)) | {solver.max_iter - 1}
    # Drops by the hundred would bury the rest.
    shown |= set(caffe_proto.drops(solver)[:20])
    print("%10s %12s %12s %12s" % (
        "iteration", "lr", "lambda", "1/(1+lambda)"))
    for iteration in sorted(shown):
        value = lambda_at(param, iteration, solver.iter_size)
        print("%10d %12.4g %12.4g %12.4g" % (
            iteration, learning_rate(solver, iteration), value,
            1 / (1 + value)))
    if caffe_proto.margin(param) > 1:
        print(passes(solver, param))


def suggest(solver, param, final):
    """(base, gamma, power): lambda is final at max_iter.

    Where the learning rate drops, lambda is LAMBDA_AT_DROP at the first drop
    too, if such a descent exists; else power is POWER.
    """
    base = param.base if param.base > final else BASE
    if base <= final:
        raise UserError("--suggest %g: lambda begins at %g and can only fall"
                        % (final, base))
    end = solver.max_iter * solver.iter_size
    drop = caffe_proto.first_drop(solver)
    power = POWER
    if drop and final < LAMBDA_AT_DROP < base:
        # Solve log(1 + g end) / log(1 + g drop) = ratio for g: the left side
        # falls from end/drop to 1 as g grows.
        drop *= solver.iter_size
        ratio = math.log(base / final) / math.log(base / LAMBDA_AT_DROP)
        low, high = 1e-6 / end, 1e6 / drop

        def excess(gamma):
            return (math.log1p(gamma * end) / math.log1p(gamma * drop)
                    - ratio)
        if excess(low) > 0 > excess(high):
            for _ in range(200):
                middle = math.sqrt(low * high)
                low, high = ((middle, high) if excess(middle) > 0
                             else (low, middle))
            power = math.log(base / final) / math.log1p(low * end)
    # Round power first: gamma then makes up for it.
    power = float("%.3g" % power)
    gamma = ((base / final) ** (1 / power) - 1) / end
    return base, float("%.4g" % gamma), power


def draw(solver, schedules, title):
    """A figure of the learning rate and of lambda for each (name, param)."""
    count = min(solver.max_iter, 2000)
    iterations = sorted({round(i * (solver.max_iter - 1) / max(1, count - 1))
                         for i in range(count)})
    figure, axis = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for name, param in schedules:
        axis.plot(iterations, [lambda_at(param, i, solver.iter_size)
                               for i in iterations],
                  label="lambda of %s" % name)
    axis.axhline(HALF, color="gray", linewidth=0.8, linestyle=":",
                 label="lambda = %g: half of the weight" % HALF)
    axis.set_yscale("log")
    axis.set_ylabel("lambda")
    axis.set_xlabel("iteration")
    axis.grid(alpha=0.3)
    rate = axis.twinx()
    rate.plot(iterations, [learning_rate(solver, i) for i in iterations],
              color="tab:red", linestyle="--", label="learning rate")
    if any(0 < learning_rate(solver, i) < math.inf for i in iterations):
        rate.set_yscale("log")
    rate.set_ylabel("learning rate")
    lines = axis.get_lines() + rate.get_lines()
    axis.legend(lines, [line.get_label() for line in lines])
    axis.set_title(title)
    return figure


def run(args):
    pb = caffe_proto.load()
    solver, net = caffe_proto.read_solver(pb, args.solver)
    caffe_proto.check_solver(solver, args.solver)
    layers = margin_layers(pb, net)
    if not layers:
        raise UserError("the net of %s has no LargeMarginInnerProduct layer "
                        "in the TRAIN phase" % args.solver)
    schedules = []
    for name, param in layers:
        caffe_proto.check_schedule(name, param)
        print("%s: m = %d, base %g, gamma %g, power %g, lambda_min %g" % (
            name, caffe_proto.margin(param), param.base, param.gamma,
            param.power, param.lambda_min))
        print_table(solver, param)
        for note in notes(solver, param):
            print("note: %s: %s" % (name, note))
        for warning in warnings(solver, param):
            print("warning: %s: %s" % (name, warning))
        schedules.append((name, param))
        if args.suggest is not None:
            base, gamma, power = suggest(solver, param, args.suggest)
            print("suggested for %s, to reach lambda = %g at iteration %d:\n"
                  "    base: %g\n    gamma: %g\n    power: %g" % (
                      name, args.suggest, solver.max_iter, base, gamma, power))
            proposal = pb.LargeMarginInnerProductParameter()
            proposal.CopyFrom(param)
            proposal.base, proposal.gamma, proposal.power = base, gamma, power
            proposal.ClearField("iteration")
            proposal.ClearField("lambda_min")
            print_table(solver, proposal)
            for warning in warnings(solver, proposal, args.suggest):
                print("warning: suggestion: %s" % warning)
            schedules.append((name + ", suggested", proposal))
    output = args.output or (
        os.path.splitext(args.solver)[0] + "_lambda.png")
    try:
        draw(solver, schedules, args.solver).savefig(output, dpi=100)
    except (OSError, ValueError) as error:
        raise UserError("cannot write %s: %s" % (output, error))
    print("plot: %s" % output)


def main():
    try:
        run(parse_args())
    except UserError as error:
        sys.exit("error: %s" % error)


if __name__ == "__main__":
    main()
