#!/usr/bin/python3
"""Compares softmax (m = 1) with margins on the quick net, over several seeds.

Prints the mean and the standard deviation of the error after the last
iteration, and the difference to m = 1 of the same seed with its 95 % interval,
as a Markdown table, and draws them. Stopped and run again, it goes on with the
runs that are missing.

Which descent of lambda is the best is for --validation to say, which leaves
the test images alone: it trains on the first five sixths of the training
images and judges on the rest, whatever their classes.
"""
import importlib.util
import os
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))
# First: Ctrl-C is quiet from here on.
import caffe_proto  # noqa: E402
import runs  # noqa: E402

SCRIPT = "myexamples/mnist/compare_margins.sh"
# lambda is 0.004 after the 6000 iterations of the solver.
DESCENT = {"base": 1000.0, "gamma": 0.01, "power": 3.0, "lambda_min": 0.0}
VALIDATION = {"myexamples/mnist/mnist_train_lmdb":
              "myexamples/mnist/mnist_fit_lmdb",
              "myexamples/mnist/mnist_test_lmdb":
              "myexamples/mnist/mnist_validation_lmdb"}


def parse_args():
    options = runs.parser(
        __doc__, os.path.join(HERE, "compare_solver.prototxt"),
        os.path.join(HERE, "comparison"), seeds=5)
    for field, value in DESCENT.items():
        options.add_argument("--" + field.replace("_", "-"), type=float,
                             default=value, metavar="X",
                             help="%s of the margin layer (default: %g)"
                             % (field, value))
    options.add_argument("--validation", action="store_true",
                         help="judge on a part of the training images")
    args = runs.parse(options)
    args.descent = {field: getattr(args, field) for field in DESCENT}
    return args


def folder(args, name, margin):
    """The folder of a run: its name has the options that are not usual.

    So runs with one descent leave those with another alone.
    """
    if margin > 1:
        name += suffix(args)
    parts = [os.path.abspath(args.output), name]
    if args.validation:
        parts.insert(1, "validation")
    return os.path.join(*parts)


def suffix(args):
    """What a folder's or plot's name says of an unusual descent."""
    return "".join("_%s%g" % (field, value)
                   for field, value in args.descent.items()
                   if value != DESCENT[field])


class Result:
    """The errors of a margin in percent, by seed, and what follows."""

    def __init__(self, margin, errors, softmax=None):
        self.margin, self.errors = margin, errors
        self.mean = statistics.mean(errors)
        self.deviation = (statistics.stdev(errors) if len(errors) > 1
                          else None)
        self.difference = self.interval = self.p = None
        if softmax is not None:
            self.compare(softmax)

    def compare(self, softmax):
        """The paired difference to the errors of m = 1, seed by seed."""
        from scipy import stats
        differences = [a - b for a, b in zip(self.errors, softmax)]
        self.difference = statistics.mean(differences)
        # Without a spread there is no interval.
        if len(differences) > 1 and statistics.stdev(differences) > 1e-9:
            self.interval = stats.t.interval(
                0.95, len(differences) - 1, loc=self.difference,
                scale=stats.sem(differences))
            self.p = stats.ttest_rel(self.errors, softmax).pvalue


def results(all_runs, margins):
    """A Result for each margin."""
    errors = {margin: [100 * (1 - run.accuracy()) for run in all_runs
                       if run.margin == margin] for margin in margins}
    return [Result(margin, errors[margin],
                   errors.get(1) if margin != 1 else None)
            for margin in margins]


def text(form, value):
    return "-" if value is None else form % value


def print_table(found, what):
    print("| m | %s error, mean (%%) | standard deviation | difference to "
          "m = 1, mean | its 95 %% interval | p (paired t) | runs |" % what)
    print("|---|---|---|---|---|---|---|")
    for result in found:
        print("| %d | %.3f | %s | %s | %s | %s | %s |" % (
            result.margin, result.mean, text("%.3f", result.deviation),
            text("%+.3f", result.difference),
            text("%+.3f to %+.3f", result.interval),
            text("%.2g", result.p),
            " ".join("%.2f" % error for error in result.errors)))


def draw(found, what, title):
    """A figure: the errors, and the differences to m = 1."""
    # Here, as --help is to work where matplotlib is not there yet.
    import figures
    paired = [result for result in found if result.difference is not None]
    figure, axes = figures.plt.subplots(
        1, 2 if paired else 1, squeeze=False, constrained_layout=True,
        figsize=(9 if paired else 5, 4))
    axes = axes[0]
    for result in found:
        # Side by side: errors of whole images are often the same.
        count = len(result.errors)
        across = [result.margin + 0.12 + 0.03 * i for i in range(count)]
        axes[0].plot(across, result.errors, ".", color="gray",
                     label="one seed" if result is found[0] else None)
    axes[0].errorbar(
        [result.margin for result in found],
        [result.mean for result in found],
        [result.deviation or 0 for result in found], fmt="o", capsize=5,
        color=figures.COLOURS[0], label="mean, standard deviation")
    axes[0].set_ylabel("%s error, %%" % what)
    axes[0].set_title("all seeds", fontsize="medium")
    axes[0].set_ylim(0, 1.1 * max(max(result.errors) for result in found)
                     or 1)
    axes[0].legend(loc="lower right")
    if paired:
        shown = [result.interval or (result.difference, result.difference)
                 for result in paired]
        axes[1].errorbar(
            [result.margin for result in paired],
            [result.difference for result in paired],
            [[result.difference - low for result, (low, _)
              in zip(paired, shown)],
             [high - result.difference for result, (_, high)
              in zip(paired, shown)]],
            fmt="o", capsize=5, color=figures.COLOURS[0])
        axes[1].axhline(0, color="gray", linewidth=0.8)
        axes[1].set_ylabel("difference to m = 1, percentage points")
        axes[1].set_title("paired by seed, mean and its 95 % interval",
                          fontsize="medium")
    for axis, shown in zip(axes, (found, paired)):
        margins = [result.margin for result in shown]
        axis.set_xticks(margins)
        axis.set_xticklabels(["softmax\n(m = 1)" if m == 1 else "m = %d" % m
                              for m in margins])
        axis.set_xlim(min(margins) - 0.5, max(margins) + 0.5)
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle(title)
    return figure


def report(args, all_runs):
    """Prints the table, draws the plot and names it."""
    what = "validation" if args.validation else "test"
    found = results(all_runs, args.margins)
    print_table(found, what)
    images = all_runs[0].dataset() or "images of your own"
    if args.validation:
        images = "the last sixth of the training images of " + images
    import figures
    figures.save(
        draw(found, what, "Margins on %s, %d seed%s" % (
            images, args.seeds, "" if args.seeds == 1 else "s")),
        os.path.join(os.path.dirname(all_runs[0].path),
                     "comparison%s.png" % suffix(args)))


def run_all(args):
    # Not after an hour of training.
    for module in ("matplotlib", "scipy"):
        if importlib.util.find_spec(module) is None:
            raise caffe_proto.UserError(
                "Python has no %s: install Debian's python3-%s"
                % (module, module))
    pb = caffe_proto.load()
    all_runs = runs.of_each(args, lambda name, margin, seed: runs.Run(
        pb, args.solver, folder(args, name, margin), margin, seed,
        args.descent, VALIDATION if args.validation else None))
    runs.train_all(all_runs, args.jobs, SCRIPT + " --validation"
                   if args.validation else SCRIPT)
    report(args, all_runs)


def main():
    with runs.errors():
        run_all(parse_args())


if __name__ == "__main__":
    main()
