#!/usr/bin/python3
"""A long training through `caffe train`, and what a kill leaves of it.

Usage: tests/robustness/long_run.py [ITERATIONS]

Trains a small net with both layers for ITERATIONS (default 5000, a multiple of
1000) and checks that

- the process needs no more memory at the end than after a fifth of the way,
- lambda is what its formula says at every iteration, to the last digit that
  the log has,
- a .solverstate or .caffemodel that ends in the middle, as a kill while it is
  written leaves it, is refused with an error (Caffe's own),
- the snapshot before it is usable: training goes on from there to the same
  weights, bit by bit, as without a break.

Takes seconds to a minute, and its files in the system's temporary folder are
removed. Needs a Caffe that cmake/build_caffe.sh built ($CAFFE_ROOT is
honoured).
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from caffe_e2e import (  # noqa: E402
    CAFFE, CAFFE_ROOT, IP1, LOSS, assert_same_weights, data_layer, environment,
    fatal_message, lambda_at, logged_lambdas, margin_layer, write_data,
    write_net, write_solver)

sys.path.insert(0, str(CAFFE_ROOT / "python"))

# lambda_min is reached halfway: both parts of the formula are seen.
SCHEDULE = dict(base=1000, gamma=0.005, power=2, lambda_min=5)
# What the allocator may take for itself, in KiB.
MEMORY_MARGIN = 512

BN = """
layer { name: "bn" type: "BN" bottom: "ip1" top: "ip1" }
"""


def train(folder, options=()):
    """`caffe train`; returns its log and {iteration: resident KiB}."""
    process = subprocess.Popen(
        [str(CAFFE), "train", "--solver=solver.prototxt", *options],
        cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    lines, memory = [], {}
    for line in process.stdout:
        lines.append(line)
        at = re.search(r"\] Iteration (\d+) .*loss = ", line)
        # Halfway between snapshots and tests, which need some for a while.
        if at and int(at.group(1)) % 100 == 50:
            status = Path("/proc/%d/status" % process.pid).read_text()
            rss = re.search(r"VmRSS:\s+(\d+) kB", status)
            if rss:  # it may have ended by now
                memory[int(at.group(1))] = int(rss.group(1))
    if process.wait() != 0:
        raise SystemExit("caffe train failed:\n" + "".join(lines[-40:]))
    return "".join(lines), memory


def check(condition, words):
    print("%-6s %s" % ("ok" if condition else "FAILED", words), flush=True)
    if not condition:
        raise SystemExit(1)


def main(iterations):
    step = iterations // 5
    with tempfile.TemporaryDirectory(prefix="long_run.") as folder:
        folder = Path(folder)
        write_data(folder)
        write_net(folder, data_layer() + IP1 + BN + margin_layer(
            "type: QUADRUPLE " + " ".join(
                "%s: %s" % pair for pair in SCHEDULE.items())) + LOSS)
        # Tests in between, and decimal steps that are whole epochs.
        write_solver(folder, max_iter=iterations, snapshot=step,
                     test_iter=2, test_interval=step // 2, base_lr=0.01)
        print("training %d iterations" % iterations, flush=True)
        log, memory = train(folder)

        early, late = memory[step + 50], memory[max(memory)]
        check(max(memory) == iterations - 50,
              "memory was sampled %d times" % len(memory))
        check(late - early <= MEMORY_MARGIN,
              "resident memory: %d KiB after %d iterations, %d KiB after %d"
              % (early, step + 50, late, max(memory)))

        logged = logged_lambdas(log)
        expected = [(i, "%.6g" % np.float32(lambda_at(i + 1, **SCHEDULE)))
                    for i in range(iterations)]
        wrong = [pair for pair in zip(logged, expected) if pair[0] != pair[1]]
        check(len(logged) == iterations and not wrong,
              "lambda as the formula says in %d of %d iterations, from %s to "
              "%s%s" % (len(logged) - len(wrong), iterations, logged[0][1],
                        logged[-1][1],
                        ", first wrong: %s, not %s" % wrong[0]
                        if wrong else ""))

        broken = "snap_iter_%d" % (4 * step)
        whole = {kind: (folder / (broken + kind)).read_bytes()
                 for kind in (".solverstate", ".caffemodel")}
        refused = []
        for kind, data in whole.items():
            # To protobuf a model of which nothing is left is a net without
            # layers. But Caffe begins the state only when the model is whole.
            cuts = [0] * (kind == ".solverstate") + [
                1, len(data) // 4, len(data) // 2, len(data) - 1]
            for cut in cuts:
                (folder / (broken + kind)).write_bytes(data[:cut])
                message = fatal_message(
                    [CAFFE, "train", "--solver=solver.prototxt",
                     "--snapshot=%s.solverstate" % broken], folder)
                refused.append("%s cut to %d of %d bytes: %s" % (
                    kind, cut, len(data), message))
            (folder / (broken + kind)).write_bytes(data)
        check(len(refused) == 9, "%d snapshots cut short were refused:\n       "
              "%s" % (len(refused), "\n       ".join(refused)))

        final = folder / ("snap_iter_%d.caffemodel" % iterations)
        final.rename(folder / "uninterrupted.caffemodel")
        state = folder / (broken + ".solverstate")
        state.write_bytes(state.read_bytes()[:1000])
        before = "snap_iter_%d.solverstate" % (3 * step)
        print("going on from %s" % before, flush=True)
        log, _ = train(folder, ["--snapshot=" + before])
        check(logged_lambdas(log) == expected[3 * step:],
              "lambda goes on as the formula says")
        assert_same_weights(final, folder / "uninterrupted.caffemodel")
        check(True, "the weights are those of the uninterrupted run, bit by "
              "bit")
        for kind, data in whole.items():
            check((folder / (broken + kind)).read_bytes() == data,
                  "%s%s is whole again" % (broken, kind))


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__.strip())
        raise SystemExit
    count = sys.argv[1] if len(sys.argv) == 2 else "5000"
    if len(sys.argv) > 2 or not count.isdigit() or not int(count) \
            or int(count) % 1000:
        raise SystemExit(__doc__)
    main(int(count))
