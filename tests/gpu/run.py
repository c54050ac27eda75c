"""Tests, times and trains the layers on a machine with a GPU.

  run.sh                        all that is left of the parts, in this order:
  run.sh tests [WORD...]        the layers' tests in Caffe, GPU against CPU,
                                the same pass 300 times, the same training
                                twice, compute-sanitizer
  run.sh benchmark [WORD...]    times beside Caffe's layers and cuDNN's, and
                                the bandwidth of a copy, with the budgets
  run.sh profile [WORD...]      Nsight Compute (ncu) on the layers' kernels
  run.sh paper [NET] [m=M...]   the nets of the paper, mnist and cifar10, to
                                iteration 10000, those of one net at once
  run.sh data PATH...           takes the files of MNIST and CIFAR-10 (binary
                                version) from folders, plain, gzipped or as the
                                published archive, a few at a time if need be
  run.sh list                   the steps of the parts, and how far they are

WORD picks the steps that have it in their names. A call that its limit, a
signal or kill -9 ends is gone on with by the same call: what has passed is not
done again, what has failed is, and trainings go on from their snapshots.
RESULTS/results.json and results.md have all that was found. Where the first GPU
is in use, the one with most room is taken; CUDA_VISIBLE_DEVICES names another.

The exit status is 0 if all is done and passed, 1 if something failed, 2 if the
call is wrong, 3 if it was ended before all was done.
"""
import argparse
import fcntl
import json
import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
# A bundle has all in one folder; elsewhere there is --help alone.
sys.path[:0] = [HERE, os.path.join(HERE, "..", "..", "myexamples")]

import checks  # noqa: E402
import images  # noqa: E402
import trainings  # noqa: E402
from checks import say  # noqa: E402
from host import Host  # noqa: E402
from processes import Limit, OutOfTime  # noqa: E402
from results import FAILED, PASSED, SKIPPED, Results, UserError  # noqa: E402

PARTS = ["tests", "benchmark", "profile", "paper"]


def parse_args():
    parser = argparse.ArgumentParser(
        prog="run.sh", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="run.sh [OPTION...] [PART [WORD...]]")
    parser.add_argument("--results", metavar="FOLDER",
                        help="(./results, or ./rehearsal)")
    parser.add_argument("--limit", type=float, default=570, metavar="SECONDS",
                        help="end the call in good order after these (570)")
    parser.add_argument("--again", action="store_true",
                        help="do anew what has passed, too")
    parser.add_argument("--jobs", type=int, default=4, metavar="N",
                        help="train N nets at once (4)")
    parser.add_argument("--dry-run", action="store_true",
                        help="a rehearsal: trainings of two iterations, a "
                        "benchmark of small layers without budgets; a bundle "
                        "for the CPU does nothing else")
    # Words may stand before, between and behind the options.
    args, words = parser.parse_known_args()
    for word in words:
        if word.startswith("-"):
            parser.error("unknown option %s" % word)
    args.part, args.words = (words or [None])[0], words[1:]
    if args.part not in [None, "data", "list"] + PARTS:
        parser.error("unknown part %s" % args.part)
    if args.limit <= 0 or args.jobs < 1:
        parser.error("--limit and --jobs are greater than 0")
    return args


def read_bundle():
    try:
        with open(os.path.join(HERE, "bundle.json")) as file:
            return json.load(file)
    except (OSError, ValueError):
        raise UserError("there is no Caffe in %s\n  tests/gpu/bundle.sh makes "
                        "a folder with one, and with this script" % HERE)


# ---- Steps ----

def _with_words(part, names, words):
    found = [name for name in names
             if not words or any(word in name for word in words)]
    if not found:
        raise UserError("no step of %s has %s in its name; they are:\n  %s"
                        % (part, " or ".join(words), "\n  ".join(names)))
    return found


def _paper_steps(words):
    nets, margins = set(), set()
    for word in words:
        match = re.match(r"m=([1-4])$", word)
        if match:
            margins.add(int(match[1]))
        elif word in trainings.PAPER:
            nets.add(word)
        else:
            raise UserError("paper takes mnist, cifar10 and m=1 to m=4, not %s"
                            % word)
    return trainings.names(nets, margins)


def steps_of(part, words, bundle):
    """The names of the chosen steps of a part."""
    if part == "tests":
        return _with_words(part, checks.test_names(bundle), words)
    if part == "benchmark":
        return _with_words(part, checks.benchmark_names(), words)
    if part == "profile":
        return _with_words(part, checks.profile_names(), words)
    return [trainings.label(*step) for step in _paper_steps(words)]


def run_part(run, part, names, words, jobs):
    """Runs steps of a part, one after the other; trainings at once."""
    if part == "paper":
        trainings.run_paper(run, [step for step in _paper_steps(words)
                                  if trainings.label(*step) in names], words,
                            jobs)
        return
    for name in names:
        if run.limit.left() <= 0:
            raise OutOfTime()
        if part == "tests":
            checks.run_test(run, name)
        elif part == "benchmark":
            checks.run_benchmark(run, name)
        else:
            checks.run_profile(run, name)


def list_steps(results, bundle):
    """Prints all steps with their states."""
    for part in PARTS:
        for name in steps_of(part, [], bundle):
            entry = results.data[part].get(name, {})
            words = entry.get("words", "")
            if "iterations" in entry and not words:
                words = "%d of %d iterations" % (entry.get("iteration", 0),
                                                 entry["iterations"])
            print("%-10s %-55s %-8s %s" % (
                part, name, entry.get("status", "-"), words))


# ---- A call ----

def one_at_a_time(folder):
    """Holds the folder for this process, if its disk can do that."""
    file = open(os.path.join(folder, ".lock"), "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError("another run.sh is at work in %s" % folder)
    except OSError as error:
        say("going on without a lock in %s: %s" % (folder, error.strerror))
    return file


def close(results, chosen, ended):
    """Says how the call came out; returns its exit status."""
    status = {step: results.status(*step) for step in chosen}
    failed = [step for step in chosen if status[step] == FAILED]
    left = [step for step in chosen
            if status[step] not in (PASSED, FAILED, SKIPPED)]
    counts = ", ".join("%d %s" % (n, what) for n, what in (
        (sum(s == PASSED for s in status.values()), "passed"),
        (len(failed), "failed"),
        (sum(s == SKIPPED for s in status.values()), "skipped"),
        (len(left), "left")) if n)
    results.end(ended or "done")
    for part, name in failed:
        say("FAILED: %s %s: %s" % (part, name, results.data[part][name].get(
            "words", "its log is in " + os.path.join(results.folder, "logs"))))
    if left:
        say("ended %s: %s; the same call goes on with %s %s; %s" % (
            ended, counts, *left[0], results.markdown))
    else:
        say("%s: %s; %s" % ("FAILED" if failed else "done", counts,
                            results.markdown))
    return 1 if failed else 3 if left else 0


def call(args):
    """One call of run.sh."""
    limit = Limit(args.limit)
    bundle = read_bundle()
    rehearsal = args.dry_run or bundle["device"] == "cpu"
    parts = [args.part] if args.part in PARTS else PARTS
    # Said before anything is done.
    chosen = [(part, name) for part in parts for name in steps_of(
        part, args.words if args.part in PARTS else [], bundle)]
    if args.words and args.part == "list":
        raise UserError("list takes no words")
    folder = os.path.abspath(args.results or (
        "rehearsal" if rehearsal else "results"))
    if args.part == "list" and not os.path.isdir(folder):
        list_steps(Results(folder, bundle, rehearsal), bundle)
        return 0
    os.makedirs(folder, exist_ok=True)
    with one_at_a_time(folder):
        results = Results(folder, bundle, rehearsal)
        if args.part == "list":
            list_steps(results, bundle)
            return 0
        if args.part == "data":
            images.take(checks.Run(None, results, limit, HERE), args.words)
            return 0
        limit.heed_signals()
        host = Host(bundle, folder)
        results.begin(host.machine, sys.argv[1:])
        say("%s, driver %s; results in %s" % (
            host.machine["card"], host.machine["driver"], folder))
        run = checks.Run(host, results, limit, HERE)
        if args.again:
            for part, name in chosen:
                results.data[part].pop(name, None)
                if part == "paper":
                    trainings.forget(run, name)
        ended = None
        try:
            for part in parts:
                # What fails, and perhaps takes long, comes last.
                names = sorted((name for p, name in chosen if p == part
                                and results.status(part, name) != PASSED),
                               key=lambda name: results.status(
                                   part, name) == FAILED)
                if names:
                    run_part(run, part, names, args.words
                             if args.part else [], args.jobs)
        except OutOfTime:
            ended = limit.why()
        return close(results, chosen, ended)


def main():
    args = parse_args()
    try:
        if args.part == "data" and not args.words:
            raise UserError("data takes the files or folders to look in")
        sys.exit(call(args))
    except UserError as error:
        print("run.sh: error: %s" % error, file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print("run.sh: error: %s" % error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
