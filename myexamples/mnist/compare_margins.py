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
import argparse
import os
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))
import caffe_proto  # noqa: E402
import runs  # noqa: E402

# lambda is 0.004 after the 6000 iterations of the solver.
DESCENT = {"base": 1000.0, "gamma": 0.01, "power": 3.0, "lambda_min": 0.0}
VALIDATION = {"myexamples/mnist/mnist_train_lmdb":
              "myexamples/mnist/mnist_fit_lmdb",
              "myexamples/mnist/mnist_test_lmdb":
              "myexamples/mnist/mnist_validation_lmdb"}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--margins", type=int, nargs="+",
                        default=[1, 2, 3, 4], metavar="M",
                        help="default: 1 2 3 4")
    parser.add_argument("-s", "--seeds", type=int, default=5, metavar="N",
                        help="runs of each margin (default: 5)")
    for field, value in DESCENT.items():
        parser.add_argument("--" + field.replace("_", "-"), type=float,
                            default=value, metavar="X",
                            help="%s of the margin layer (default: %g)"
                            % (field, value))
    parser.add_argument("--validation", action="store_true",
                        help="judge on a part of the training images")
    parser.add_argument("--solver", metavar="SOLVER", default=os.path.join(
        HERE, "compare_solver.prototxt"),
        help="default: compare_solver.prototxt")
    parser.add_argument("-o", "--output", metavar="FOLDER",
                        default=os.path.join(HERE, "comparison"),
                        help="default: myexamples/mnist/comparison")
    parser.add_argument("-j", "--jobs", type=int, metavar="N",
                        default=os.cpu_count(),
                        help="runs at once (default: one a core)")
    args = parser.parse_args()
    if args.seeds < 1 or args.jobs < 1 or min(args.margins) < 1:
        parser.error("margins, seeds and jobs are at least 1")
    args.descent = {field: getattr(args, field) for field in DESCENT}
    return args


def folder(args, margin, seed):
    """The folder of a run: its name has the options that are not usual.

    So runs with one descent leave those with another alone.
    """
    name = "m%d_seed%d" % (margin, seed)
    if margin > 1:
        name += "".join("_%s%g" % (field, value)
                        for field, value in args.descent.items()
                        if value != DESCENT[field])
    parts = [os.path.abspath(args.output), name]
    if args.validation:
        parts.insert(1, "validation")
    return os.path.join(*parts)


def print_table(all_runs, margins):
    print("| m | test error, mean (%) | standard deviation | runs |")
    print("|---|---|---|---|")
    for margin in margins:
        errors = [100 * (1 - run.accuracy()) for run in all_runs
                  if run.margin == margin]
        spread = "%.2f" % statistics.stdev(errors) if len(errors) > 1 else "-"
        print("| %d | %.2f | %s | %s |" % (
            margin, statistics.mean(errors), spread,
            " ".join("%.2f" % error for error in errors)))


def main():
    args = parse_args()
    try:
        pb = caffe_proto.load()
        all_runs = [
            runs.Run(pb, args.solver, folder(args, margin, seed), margin,
                     seed, args.descent,
                     VALIDATION if args.validation else None)
            for seed in range(1, args.seeds + 1) for margin in args.margins]
        runs.train_all(all_runs, args.jobs)
    except caffe_proto.UserError as error:
        sys.exit("error: %s" % error)
    except OSError as error:
        sys.exit("error: cannot write: %s" % error)
    except KeyboardInterrupt:
        sys.exit("stopped; run this again to go on")
    print_table(all_runs, args.margins)


if __name__ == "__main__":
    main()
