#!/usr/bin/python3
"""Shows lambda and the learning rate over the iterations of a solver.

Prints them as a table, with the weight 1/(1+lambda) of the margin in the
target logit, and draws them. Look at this before training: lambda should start
large and end below 1, well before the last iteration, or at a lambda_min that
is meant.

Says when the margin has 10, 50 and 90 % of the weight, in iterations and,
where the training data are there (an LMDB, or the list of ImageData), in
epochs of one GPU.

    myexamples/plot_lambda.py A_solver.prototxt --compare B_solver.prototxt \\
        base=1000,gamma=0.12,power=1,lambda_min=5

draws other solvers and candidates for the net of the first one over it.
"""
import argparse
import math
import os

# First: Ctrl-C is quiet from here on.
import caffe_proto

import matplotlib.pyplot as plt

import data_size
import figures
from caffe_proto import (
    UserError, lambda_at, learning_rate, user_errors)

# Above this lambda, the margin has less than half of the weight.
HALF = 1.0
# Samples of a class, as a mean, that should come before lambda is at HALF.
# Tried with m = 4 on MNIST's ten classes: after 800 iterations of 100, a net
# with all of the margin from the start was right on 40 % of the test images,
# one with half of it after 20 iterations on 95 %, after 50, 100 or 200 on
# 99 %. With 800 classes (kanji_verification), half of it after 449 iterations
# left the net at guessing, and after 2250 at 97 % of the trained characters,
# where a lambda_min of 5 comes to 99.7 %. How soon it comes before the first
# drop of the learning rate is no matter.
EARLY = 500
# Where nothing tells the batch: MNIST's in an iteration.
OF_A_CLASS = 10
# The schedules of the paper's authors pass about this lambda at the first
# drop of the learning rate.
LAMBDA_AT_DROP = 15.0
# What the authors used, in the paper's nets and in SphereFace: suggestions
# keep to it.
BASE = 1000.0
GAMMAS = (1e-5, 0.12)
POWERS = (1.0, 45.0)
# Where there is no drop: nearly an exponential, as the paper's.
POWER = 40.0
# Shares of the weight that are marked, in percent.
SHARES = (10, 50, 90)
# Drops by the hundred would bury the rest.
DROPS = 20
# What a candidate may set.
FIELDS = ("margin", "base", "gamma", "power", "lambda_min", "iteration")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("solver", metavar="SOLVER", help="solver prototxt")
    parser.add_argument("-o", "--output", metavar="PNG", help="default: "
                        "beside SOLVER, its name with _lambda.png, or "
                        "_compare_lambda.png")
    parser.add_argument("--compare", metavar="OTHER", nargs="+", default=[],
                        help="draw these over it: solvers, or candidates such "
                        "as base=1000,gamma=0.12,power=1,lambda_min=5 (what "
                        "is not named stays as SOLVER's net has it; also "
                        "margin and iteration)")
    parser.add_argument("--suggest", metavar="LAMBDA", type=float, help="also "
                        "propose gamma and power that reach this lambda at "
                        "max_iter, and a lambda_min for those of the net")
    args = parser.parse_args()
    if args.suggest is not None and not (
            args.suggest > 0 and math.isfinite(args.suggest)):
        parser.error("--suggest %g: the lambda to reach must be above 0"
                     % args.suggest)
    return args


class Descent:
    """The descent of lambda of one margin layer under a solver.

    layer is the layer's name, name what the whole is called; data is a
    data_size.Data or None. Without labels the layer has no margin.
    """

    def __init__(self, solver, param, layer, name, data=None, labels=True):
        self.solver, self.param, self.data = solver, param, data
        self.layer, self.name, self.labels = layer, name, labels
        self.m = caffe_proto.margin(param)

    def changed(self, name, **fields):
        """The same with other fields of the parameter; None clears one."""
        param = type(self.param)()
        param.CopyFrom(self.param)
        for field, value in fields.items():
            if field == "margin":
                param.ClearField("type")
            if value is None:
                param.ClearField(field)
            else:
                setattr(param, field, value)
        return Descent(self.solver, param, self.layer, name, self.data,
                       self.labels)

    def at(self, iteration):
        """lambda in that iteration."""
        return lambda_at(self.param, iteration, self.solver.iter_size)

    def end(self):
        """lambda in the last iteration."""
        return self.at(self.solver.max_iter - 1)

    def of_a_class(self, iteration):
        """Samples of a class that the net has seen by then, as a mean."""
        batch = self.data and self.data.batch
        return iteration * self.solver.iter_size * (
            batch / self.param.num_output if batch and self.param.num_output
            else OF_A_CLASS)

    def kept_by_minimum(self):
        """Whether lambda_min is what leaves the margin under half."""
        return self.end() == self.param.lambda_min > HALF

    def first_below(self, value):
        """The first iteration with lambda <= value, or None."""
        low, high = 0, self.solver.max_iter
        while low < high:
            middle = (low + high) // 2
            if self.at(middle) <= value:
                high = middle
            else:
                low = middle + 1
        return low if low < self.solver.max_iter else None

    def passes(self):
        """[(share of the weight in percent, lambda, iteration or None)]."""
        found = []
        for percent in SHARES:
            value = 100 / percent - 1
            # A lambda_min of 0.111111 is a float, 1/9 a double.
            found.append((percent, value,
                          self.first_below(value * (1 + 1e-7))))
        return found

    def epochs(self, iteration):
        """The epochs in words, " (8.2 epochs)", or ""."""
        epochs = (self.data.epochs(iteration, self.solver.iter_size)
                  if self.data else None)
        return "" if epochs is None else " (%.3g epochs)" % epochs

    def cells(self):
        """The descent as a row of a table, as words."""
        drop = caffe_proto.first_drop(self.solver)
        return ["%d" % self.m] + [
            "%g" % getattr(self.param, field)
            for field in ("base", "gamma", "power", "lambda_min")] + [
            "-" if drop is None else "%.3g (%d)" % (self.at(drop), drop),
            "%.3g (%d)" % (self.end(), self.solver.max_iter)]


CELLS = ["m", "base", "gamma", "power", "lambda_min", "at the first drop",
         "at the end"]


# ---- What is read ----

def margin_layers(pb, net):
    """The margin layers of the TRAIN phase."""
    return [layer for layer in net.layer
            if layer.type == "LargeMarginInnerProduct"
            and caffe_proto.in_phase(pb, net, layer, pb.TRAIN)]


def read(pb, path):
    """The Descents of the margin layers of a solver."""
    solver, net = caffe_proto.read_solver(pb, path)
    caffe_proto.check_solver(solver, path)
    layers = margin_layers(pb, net)
    if not layers:
        raise UserError("the net of %s has no LargeMarginInnerProduct layer "
                        "in the TRAIN phase" % path)
    data = data_size.training_data(pb, net)
    for layer in layers:
        caffe_proto.check_schedule(layer.name,
                                   layer.largemargin_inner_product_param)
    return [Descent(solver, layer.largemargin_inner_product_param, layer.name,
                    path if len(layers) == 1 else
                    "%s, %s" % (path, layer.name), data,
                    len(layer.bottom) != 1) for layer in layers]


def is_candidate(text):
    """Whether an argument of --compare is none of a file."""
    return "=" in text and not os.path.exists(text)


def candidate(text):
    """The fields that a candidate sets, as a dict."""
    fields = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in FIELDS:
            raise UserError("--compare %s: \"%s\" is none of %s"
                            % (text, name, ", ".join(FIELDS)))
        if name in fields:
            raise UserError("--compare %s: %s is there twice" % (text, name))
        whole = name in ("margin", "iteration")
        try:
            fields[name] = (int if whole else float)(value)
        except ValueError:
            raise UserError("--compare %s: %s is \"%s\": a %snumber is wanted"
                            % (text, name, value, "whole " * whole))
    return fields


def set_fields(descent, fields, name, text):
    """The Descent with the fields of a candidate."""
    try:
        made = descent.changed(name, **fields)
    except ValueError as error:  # what protobuf does not take
        raise UserError("--compare %s: %s" % (text, error))
    try:
        caffe_proto.check_schedule(descent.layer, made.param)
    except UserError as error:
        raise UserError("--compare %s: %s" % (text, error))
    return made


def others(pb, first, arguments):
    """The Descents of the arguments of --compare."""
    found = []
    for text in arguments:
        if not is_candidate(text):
            found += read(pb, text)
            continue
        fields = candidate(text)
        for descent in first:
            found.append(set_fields(
                descent, fields, text if len(first) == 1 else
                "%s, %s" % (text, descent.layer), text))
    return found


# ---- Advice ----

def notes(descent):
    """What is worth knowing of a descent."""
    param = descent.param
    if descent.m == 1:
        return ["m is 1: this is plain softmax, lambda changes nothing"]
    if descent.kept_by_minimum():
        return ["lambda_min keeps lambda at %.4g from iteration %d on: the "
                "margin's weight ends at %.2g" % (
                    param.lambda_min, descent.first_below(param.lambda_min),
                    1 / (1 + param.lambda_min))]
    return []


def warnings(descent, asked=0.0):
    """What is likely wrong with a descent.

    asked is the lambda that it is meant to end at.
    """
    param = descent.param
    if descent.m == 1:
        return []
    if not descent.labels:
        return ["layer %s has no labels in the TRAIN phase, so it trains "
                "without the margin, whatever lambda is: give it them as a "
                "second bottom" % descent.layer]
    last = descent.end()
    # Suggestions are rounded.
    if last > max(HALF, 1.05 * asked) and not descent.kept_by_minimum():
        why = ""
        if param.gamma == 0 or param.power == 0:
            why = " (gamma and power must both be above 0 for a descent)"
        if param.lambda_min:
            why += ", above its lambda_min of %.4g" % param.lambda_min
        return ["lambda is still %.4g at the end%s: the margin has a weight "
                "of only %.2g; let it fall faster, or set lambda_min to that "
                "if this is meant" % (last, why, 1 / (1 + last))]
    fell = descent.first_below(HALF)
    # One that goes on by hand has its descent behind it.
    if (fell is not None and descent.of_a_class(fell) < EARLY
            and not param.iteration):
        return ["lambda is %g or less %s: the margin has most of the weight "
                "before the net has learned anything, and training may not "
                "start (the loss stays near ln(classes), or at 87.3365)"
                % (HALF, "from the first iteration on" if fell == 0
                   else "after %d iterations, some %.3g samples of a class"
                   % (fell, descent.of_a_class(fell)))]
    return []


# ---- Suggestions ----

def rounded(value, low, high):
    """value to three digits, within low and high."""
    value = min(max(value, low), high)
    for digits in range(3, 17):
        step = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
        for near in (round(value / step) * step,
                     math.floor(value / step) * step,
                     math.ceil(value / step) * step):
            near = float("%.*g" % (digits, near))
            if low <= near <= high:
                return near
    return value


def suggest(descent, final):
    """The fields of a descent whose lambda is final at max_iter.

    gamma and power are within GAMMAS and POWERS. Of those that end at final,
    the one whose lambda at the first drop of the learning rate is nearest to
    LAMBDA_AT_DROP. In a training so long that all of them are there earlier,
    the slowest, with lambda_min.
    """
    base = descent.param.base
    if not final < base <= BASE:
        base = BASE
    if base <= final:
        raise UserError("--suggest %g: lambda begins at %g and can only fall"
                        % (final, base))
    solver = descent.solver
    end = solver.max_iter * solver.iter_size

    def gamma(power):
        return ((base / final) ** (1 / power) - 1) / end
    # A higher power has a lower gamma.
    low = math.log(base / final) / math.log1p(GAMMAS[1] * end)
    high = math.log(base / final) / math.log1p(GAMMAS[0] * end)
    if low > POWERS[1]:
        raise UserError(
            "--suggest %g: %d iterations are too few for it: with gamma %g "
            "and power %g, the steepest descent that is known to be used, "
            "lambda ends at %.3g" % (
                final, solver.max_iter, GAMMAS[1], POWERS[1],
                base * math.exp(-POWERS[1] * math.log1p(GAMMAS[1] * end))))
    if high < POWERS[0]:
        return {"base": base, "gamma": GAMMAS[0], "power": POWERS[0],
                "lambda_min": final, "iteration": None}
    low, high = max(low, POWERS[0]), min(high, POWERS[1])
    power = min(max(POWER, low), high)
    drop = caffe_proto.first_drop(solver)
    if drop and final < LAMBDA_AT_DROP < base:
        # lambda at the drop grows with the power.
        below, above = low, high
        for _ in range(100):
            power = (below + above) / 2
            if base * (1 + gamma(power) * drop * solver.iter_size
                       ) ** -power < LAMBDA_AT_DROP:
                below = power
            else:
                above = power
    # Round power first: gamma then makes up for it.
    power = rounded(power, low, high)
    return {"base": base, "gamma": min(max(float("%.4g" % gamma(power)),
                                           GAMMAS[0]), GAMMAS[1]),
            "power": power, "lambda_min": None, "iteration": None}


def old_with_minimum(descent, final):
    """(Descent or None, why): the net's own, kept from falling below final."""
    made = descent.changed(descent.name + ", with lambda_min",
                           lambda_min=final)
    bare = descent.changed("", lambda_min=None)
    # The parameter is a float, final is not.
    first = bare.first_below(made.param.lambda_min)
    if first is None:
        return None, "lambda is still %.3g at the end" % bare.end()
    if first == 0:
        return None, "lambda begins at %.3g" % bare.at(0)
    return made, ""


# ---- What is shown ----

def print_table(descent):
    """Prints about 16 iterations, the drops of the learning rate included."""
    solver = descent.solver
    step = max(1, round(solver.max_iter / 12))
    shown = set(range(0, solver.max_iter, step)) | {solver.max_iter - 1}
    shown |= set(caffe_proto.drops(solver)[:DROPS])
    print("%10s %12s %12s %12s" % (
        "iteration", "lr", "lambda", "1/(1+lambda)"))
    for iteration in sorted(shown):
        value = descent.at(iteration)
        print("%10d %12.4g %12.4g %12.4g" % (
            iteration, learning_rate(solver, iteration), value,
            1 / (1 + value)))
    print_drops(descent)
    if descent.m > 1:
        print("the margin's weight: " + ", ".join(
            "%d %% never" % percent if first is None else
            "%d %% from iteration %d on%s" % (percent, first,
                                              descent.epochs(first))
            for percent, _, first in descent.passes()))


def print_drops(descent):
    """Prints lambda at the drops of the learning rate."""
    drops = caffe_proto.drops(descent.solver)
    if drops:
        print("lambda at the drops of the learning rate: %s%s" % (
            ", ".join("%.3g (iteration %d)" % (descent.at(drop), drop)
                      for drop in drops[:DROPS]),
            ", ..." if len(drops) > DROPS else ""))


def print_data(descent):
    """Prints the size of the training data, if there are any."""
    data = descent.data
    if data is None:
        return
    if data.samples is None:
        print("data: no epochs, as %s" % data.why)
        return
    batch = data.batch * descent.solver.iter_size
    print("data: %s, %d samples, %d an iteration: an epoch is %.4g iterations"
          % (data.source, data.samples, batch, data.samples / batch))


def print_descent(descent, title):
    print("%s: m = %d, base %g, gamma %g, power %g, lambda_min %g" % (
        title, descent.m, descent.param.base, descent.param.gamma,
        descent.param.power, descent.param.lambda_min))
    print_table(descent)
    for note in notes(descent):
        print("note: %s: %s" % (title, note))
    for warning in warnings(descent):
        print("warning: %s: %s" % (title, warning))


def print_fields(descent, fields):
    for field in fields:
        print("    %s: %g" % (field, getattr(descent.param, field)))


def print_suggestions(descent, final):
    """Prints the suggestions, and returns them as Descents."""
    fields = suggest(descent, final)
    best = descent.changed("%s, suggested" % descent.name, **fields)
    print("suggested for %s, to reach lambda = %g at iteration %d:" % (
        descent.layer, final, descent.solver.max_iter))
    if fields["lambda_min"] is not None:
        print("(earlier: this is the slowest descent that is known to be "
              "used)")
    print_fields(best, [field for field in (
        "base", "gamma", "power", "lambda_min") if fields[field] is not None])
    print_table(best)
    for warning in warnings(best, final):
        print("warning: suggestion: %s" % warning)
    old, why = old_with_minimum(descent, final)
    if old is None:
        print("with the net's own base, gamma and power a lambda_min of %g "
              "makes no descent to it: %s" % (final, why))
        return [best]
    first = old.first_below(old.param.lambda_min)
    print("or the net's own base, gamma and power, with a lambda_min: lambda "
          "is %g from iteration %d on%s" % (final, first, old.epochs(first)))
    print_fields(old, ("base", "gamma", "power", "lambda_min"))
    print_drops(old)
    return [best, old]


def print_comparison(descents):
    """Prints a table with a row for each."""
    rows = [CELLS + ["%d %%" % percent for percent in SHARES] + ["of"]]
    for descent in descents:
        rows.append(descent.cells() + [
            "never" if first is None else "%d%s" % (
                first, descent.epochs(first))
            for _, _, first in descent.passes()] + [descent.name])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print("compared: lambda at the first drop of the learning rate and at the "
          "end, and when the\nmargin has 10, 50 and 90 % of the weight "
          "(iterations in parentheses)")
    for row in rows:
        print("  ".join([cell.rjust(width) for cell, width in zip(
            row[:-1], widths)] + row[-1:]))


def draw(descents, title):
    """A figure of the learning rates and of lambda for each Descent."""
    figure, axis = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    rate = axis.twinx()
    alone = len({id(descent.solver) for descent in descents}) == 1
    positive, drawn = False, set()
    for number, descent in enumerate(descents):
        solver = descent.solver
        count = min(solver.max_iter, 2000)
        iterations = sorted({
            round(i * (solver.max_iter - 1) / max(1, count - 1))
            for i in range(count)})
        line, = axis.plot(iterations, [descent.at(i) for i in iterations],
                          label="lambda of " + figures.shortened(descent.name))
        for percent, value, first in descent.passes():
            if first is None or descent.m == 1:
                continue
            axis.plot([first], [descent.at(first)], "o", markersize=4,
                      color=line.get_color())
            if len(descents) <= 2:
                axis.annotate("%d%s" % (first, descent.epochs(first)),
                              (first, descent.at(first)), (5, 4 + 10 * number),
                              textcoords="offset points", fontsize=8,
                              color=line.get_color())
        if id(solver) in drawn:
            continue
        drawn.add(id(solver))
        rates = [learning_rate(solver, i) for i in iterations]
        positive |= any(0 < value < math.inf for value in rates)
        rate.plot(iterations, rates, linestyle="--", linewidth=1,
                  color=figures.COLOURS[-1] if alone else line.get_color(),
                  label="learning rate" if alone or number == 0 else None)
    axis.set_yscale("log")
    # A curve that stays above lambda = 1 is not squeezed for the lower line.
    lowest = min(descent.end() for descent in descents)
    for percent in SHARES:
        value = 100 / percent - 1
        if value < HALF and lowest > value:
            continue
        axis.axhline(value, color="gray", linewidth=0.8, linestyle=":")
        axis.annotate("margin: %d %% of the weight" % percent, (1, value),
                      (-3, 2), xycoords=axis.get_yaxis_transform(),
                      textcoords="offset points", ha="right", fontsize=7,
                      color="gray")
    axis.set_ylabel("lambda")
    axis.set_xlabel("iteration")
    axis.grid(alpha=0.3)
    if positive:
        rate.set_yscale("log")
    rate.set_ylabel("learning rate (dashed)")
    add_epochs(axis, descents)
    lines = axis.get_lines() + rate.get_lines()
    lines = [line for line in lines if not line.get_label().startswith("_")]
    names = [line.get_label() for line in lines]
    if len(lines) < 4:
        axis.legend(lines, names)
    else:
        # Below: it would lie over the curves, and its names may be long.
        axis.legend(lines, names, fontsize=8, loc="upper center",
                    bbox_to_anchor=(0.5, -0.14), ncol=1 + (len(lines) > 6))
        figure.set_figheight(figure.get_figheight() + 0.2 * len(lines))
    axis.set_title(figures.shortened(title))
    return figure


def add_epochs(axis, descents):
    """Puts epochs above, where they are known and the same for all."""
    lengths = {None if descent.data is None or descent.data.samples is None
               else descent.data.epochs(1, descent.solver.iter_size)
               for descent in descents}
    if len(lengths) != 1 or None in lengths:
        return
    length, = lengths
    above = axis.secondary_xaxis("top", functions=(
        lambda iterations: iterations * length,
        lambda epochs: epochs / length))
    above.set_xlabel("epoch")


def run(args):
    pb = caffe_proto.load()
    first = read(pb, args.solver)
    compared = others(pb, first, args.compare)
    descents = []
    print_data(first[0])
    for descent in first:
        print_descent(descent, descent.layer)
        descents.append(descent)
        if args.suggest is not None:
            descents += print_suggestions(descent, args.suggest)
    seen = first[0].solver
    for descent in compared:
        if descent.solver is not seen:
            seen = descent.solver
            print_data(descent)
        print_descent(descent, descent.name)
    descents += compared
    if compared:
        print_comparison(descents)
        title = "lambda and the learning rate, compared"
    else:
        title = args.solver
        for descent in descents:
            for own in ("%s, %s" % (args.solver, descent.layer), args.solver):
                descent.name = descent.name.replace(own, descent.layer, 1)
    output = args.output or os.path.splitext(args.solver)[0] + (
        "_compare_lambda.png" if compared else "_lambda.png")
    figures.save(draw(descents, title), output)


def main():
    with user_errors():
        run(parse_args())


if __name__ == "__main__":
    main()
