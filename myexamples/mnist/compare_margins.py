#!/usr/bin/python3
"""Compares softmax (m = 1) with margins on the quick net, over several seeds.

Prints the mean and the standard deviation of the test error after the last
iteration as a Markdown table. Stopped and run again, it goes on with the runs
that are missing.
"""
import argparse
import os
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))
import caffe_proto  # noqa: E402
import runs  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--margins", type=int, nargs="+",
                        default=[1, 2, 3, 4], metavar="M",
                        help="default: 1 2 3 4")
    parser.add_argument("-s", "--seeds", type=int, default=3, metavar="N",
                        help="runs of each margin (default: 3)")
    parser.add_argument("--solver", metavar="SOLVER", default=os.path.join(
        HERE, "quick_solver.prototxt"), help="default: the quick net's")
    parser.add_argument("-o", "--output", metavar="FOLDER",
                        default=os.path.join(HERE, "comparison"),
                        help="default: myexamples/mnist/comparison")
    parser.add_argument("-j", "--jobs", type=int, metavar="N",
                        default=os.cpu_count(),
                        help="runs at once (default: one a core)")
    args = parser.parse_args()
    if args.seeds < 1 or args.jobs < 1 or min(args.margins) < 1:
        parser.error("margins, seeds and jobs are at least 1")
    return args


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
            runs.Run(pb, args.solver, os.path.join(
                os.path.abspath(args.output), "m%d_seed%d" % (margin, seed)),
                margin, seed)
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
