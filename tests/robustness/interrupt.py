#!/usr/bin/python3
"""Kills a real build and a real training at many moments, and finishes them.

Usage: tests/robustness/interrupt.py [--seed N] [build] [train]

In a copy of the project, with the source of the Caffe that is built here
($CAFFE_ROOT, or build/caffe), it starts

  build   cmake/build_caffe.sh --tests
  train   myexamples/mnist/train_quick.sh, with fewer iterations

and ends the whole process group with SIGKILL: while the tree is patched, while
CMake configures, when protoc's or a compiler's file has just appeared, while
cargo compiles, while libcaffe, a tool, pycaffe or the tests are linked; while
images are downloaded, unpacked and converted, while the net trains, while a
snapshot is written, while the plot is drawn. Each run goes on where the one
before was killed; the last one may finish. Then

- no object, library or program of the build is cut short,
- one more run compiles nothing,
- the gtests of both layers pass, a net with both trains, pycaffe knows them,
- the trained net is whole and better than chance by far, and one more run says
  that it is trained.

Takes a quarter of an hour on two cores; train alone needs what build left. The
copy is build/robustness/interrupt and stays, with a log of each run. --seed
gives other moments within the phases.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
SOURCE = Path(os.environ.get("CAFFE_ROOT") or PROJECT / "build/caffe").resolve()
WORK = PROJECT / "build/robustness/interrupt"
COPY = WORK / "project"
CAFFE = COPY / "build/caffe"
BUILD = CAFFE / "build"
MNIST = COPY / "myexamples/mnist"
QUICK = MNIST / "quick_snapshot"

NET = """
name: "both"
layer { name: "data" type: "DummyData" top: "data" top: "label"
  dummy_data_param {
    shape { dim: 8 dim: 16 } shape { dim: 8 }
    data_filler { type: "gaussian" std: 1 }
    data_filler { type: "constant" value: 3 } } }
layer { name: "bn" type: "BN" bottom: "data" top: "bn"
  bn_param { slope_filler { type: "constant" value: 1 } } }
layer { name: "ip" type: "LargeMarginInnerProduct" bottom: "bn"
  bottom: "label" top: "ip" top: "lambda"
  largemargin_inner_product_param {
    num_output: 10 type: QUADRUPLE base: 1000 gamma: 0.1 power: 2
    weight_filler { type: "msra" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label"
  top: "loss" }
"""
SOLVER = """
net: "net.prototxt" base_lr: 0.01 lr_policy: "fixed" max_iter: 20 display: 1
solver_mode: CPU snapshot_after_train: false
"""

# What begins the last line of a build that came to its end.
BUILT = "build_caffe.sh: done (cpu)"

rows = []  # of the closing table: moment, seconds, what was left half written


class Failed(Exception):
    pass


def check(condition, words):
    print("%-6s %s" % ("ok" if condition else "FAILED", words), flush=True)
    if not condition:
        raise Failed(words)


def environment():
    env = dict(os.environ)
    env.pop("CAFFE_ROOT", None)
    return env


# ---- Moments: functions that say whether they have come ----

def appears(folder, pattern):
    """A file that was not there when the run began."""
    def begin():
        before = set(folder.glob(pattern))
        return lambda out: any(path not in before
                               for path in folder.glob(pattern))
    return begin


def begins(log, text):
    """A text that was not in the log, or in the output, at the start."""
    def begin():
        return lambda out: re.search(text, log.read_text(errors="replace")
                                     if log and log.exists() else out())
    return begin


BUILD_LOG = BUILD / "build_caffe.log"
OBJECTS = BUILD / "src/caffe/CMakeFiles/caffe.dir"
BUILD_MOMENTS = [
    # What is under way, how it is seen, seconds after that.
    ("patching the tree", appears(CAFFE, ".lsoftmax-stage.*"), 0.2),
    ("committing the patch", appears(CAFFE, ".lsoftmax-commit"), 0),
    ("configuring", begins(BUILD_LOG, "C compiler ident"), 3),
    ("protoc", appears(BUILD / "include/caffe/proto", "*.pb.h"), 0),
    ("cargo", begins(BUILD_LOG, r"(?m)^ *Compiling "), 15),
    ("an object of a layer", appears(OBJECTS, "layers/*.o"), 0),
    ("an object elsewhere", appears(OBJECTS, "util/*.o"), 0),
    ("compiling", begins(BUILD_LOG, r"\[ *4\d%\] Building"), 10),
    ("libcaffe, just begun", appears(BUILD / "lib", "libcaffe.so.*"), 0),
    ("libcaffe, going on", appears(BUILD / "lib", "libcaffe.so.*"), 0.3),
    ("a tool", appears(BUILD / "tools", "caffe*"), 0),
    ("pycaffe, just begun", appears(BUILD / "lib", "_caffe.so"), 0),
    ("pycaffe, just linked", begins(BUILD_LOG, "Creating symlink"), 0.1),
    ("the tests' program", appears(BUILD / "test", "test.testbin"), 0.1),
]
TRAIN_LOG = QUICK / "train.log"
TRAIN_MOMENTS = [
    # Where no mirror answers, that is when it asks for the first.
    ("download", begins(None, "downloading"), 0.3),
    ("unpacking", appears(MNIST, "data.new/*"), 0.2),
    ("conversion", appears(MNIST, "lmdb.new/*"), 0.1),
    ("conversion, going on", appears(MNIST, "lmdb.new/*"), 0.5),
    ("start of the training", appears(QUICK, "train.log"), 0.3),
    ("training", begins(TRAIN_LOG, r"Iteration [1-9]\d+ "), 2),
    ("a model being written",
     appears(QUICK, "quick_iter_200.caffemodel"), 0),
    ("a state being written",
     appears(QUICK, "quick_iter_200.solverstate"), 0),
    ("training after a snapshot",
     appears(QUICK, "quick_iter_300.solverstate"), 2),
    ("the last model", appears(QUICK, "quick_iter_600.caffemodel"), 0),
    ("the plot", begins(None, "done: large-margin"), 0.5),
]


def run(name, command, moment=None):
    """Runs a script, until the moment if there is one; returns its output."""
    log = WORK / ("%s.log" % re.sub(r"\W+", "-", name))
    come = moment[1]() if moment else None
    start = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, env=environment(), cwd="/", stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while process.poll() is None:
            if come and come(log.read_text):
                time.sleep(random.uniform(0, moment[2]))
                break
            time.sleep(0.0005)
    finally:
        killed = process.poll() is None
        if killed:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    seconds = time.monotonic() - start
    if moment and not killed:
        raise Failed("the moment of \"%s\" never came; see %s" % (name, log))
    if not killed and process.returncode:
        print(log.read_text())
        raise Failed("%s failed (status %d); see %s"
                     % (name, process.returncode, log))
    return seconds, log.read_text()


def is_whole(path):
    """Whether binutils can read an object, a library or a program."""
    return not subprocess.run(["size", path], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL).returncode


def half_built():
    """What a kill left cut short in the build folder."""
    found = [*BUILD.glob("**/CMakeFiles/**/*.o"), *BUILD.glob("lib/*.so*"),
             *BUILD.glob("lib/*.a"), *BUILD.glob("tools/*"),
             *BUILD.glob("examples/**/*"), *BUILD.glob("test/test.testbin")]
    products = [path for path in found if path.is_file() and
                not path.is_symlink() and path.suffix in
                ("", ".o", ".bin", ".so", ".a", ".testbin", ".0") and
                path.name not in ("Makefile",) and
                (path.suffix == ".o" or "CMakeFiles" not in path.parts)]
    bad = [path for path in products if not is_whole(path)]
    return len(products), [str(path.relative_to(BUILD)) for path in bad]


def half_trained():
    """What a kill left cut short among the snapshots."""
    sys.path.insert(0, str(CAFFE / "python"))
    from google.protobuf.message import DecodeError
    from caffe.proto import caffe_pb2
    bad, paths = [], [*QUICK.glob("*.caffemodel"), *QUICK.glob("*.solverstate")]
    for path in paths:
        state = path.suffix == ".solverstate"
        message = (caffe_pb2.SolverState if state
                   else caffe_pb2.NetParameter)()
        try:
            message.ParseFromString(path.read_bytes())
        except DecodeError:
            bad.append(path.name)
        else:
            if not (message.HasField("current_step") if state
                    else message.layer):
                bad.append(path.name)
    return len(paths), bad


def kill_at_each(moments, command, half_written):
    for number, moment in enumerate(moments, 1):
        name = "%d %s" % (number, moment[0])
        print("[%d/%d] until: %s" % (number, len(moments), moment[0]),
              flush=True)
        seconds, _ = run(name, command, moment)
        _, bad = half_written()
        rows.append((moment[0], seconds, ", ".join(bad) or "nothing"))
        print("       killed after %.1f s; half written: %s" % rows[-1][1:],
              flush=True)


def copy_project():
    if not (SOURCE / "src/caffe/proto/caffe.proto").exists():
        raise Failed("no Caffe in %s: run cmake/build_caffe.sh first" % SOURCE)
    shutil.rmtree(WORK, ignore_errors=True)
    COPY.mkdir(parents=True)
    for name in ("Cargo.toml", "Cargo.lock", "build.rs", "caffe_patch",
                 "cmake", "include", "myexamples", "src", "tests"):
        source = PROJECT / name
        if source.is_file():
            shutil.copy2(source, COPY)
        else:
            shutil.copytree(source, COPY / name, symlinks=True,
                            ignore=shutil.ignore_patterns(
                                "data", "data.*", "*_lmdb", "lmdb.new",
                                "*_snapshot", "comparison", "runs",
                                "__pycache__", ".lock"))
    shutil.copytree(SOURCE, CAFFE, symlinks=True,
                    ignore=lambda folder, names: {
                        "build", ".git", "_caffe.so", "__pycache__"} |
                    ({"proto"} if folder.endswith("python/caffe") else set()))
    subprocess.run([COPY / "caffe_patch/apply.sh", "--revert", CAFFE],
                   check=True)


def build():
    copy_project()
    command = [COPY / "cmake/build_caffe.sh", "--cpu", "--tests"]
    kill_at_each(BUILD_MOMENTS, command, half_built)
    print("finishing the build", flush=True)
    seconds, out = run("finish the build", command)
    check(out.splitlines()[-1].startswith(BUILT),
          "the build came to its end in another %.0f s" % seconds)
    total, bad = half_built()
    check(total > 100 and not bad, "%d objects, libraries and programs are "
          "whole%s" % (total - len(bad), "".join("; not " + x for x in bad)))
    seconds, _ = run("build again", command)
    again = re.findall(r"Building CXX|Linking CXX|(?m:^ *Compiling )",
                       BUILD_LOG.read_text())
    check(not again, "one more run compiled nothing and took %.0f s" % seconds)
    done = subprocess.run(
        [BUILD / "test/test.testbin", "--gtest_color=no",
         "--gtest_filter=LargeMarginInnerProductLayer*:BNLayer*"], cwd=CAFFE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    passed = re.search(r"\[  PASSED  \] (\d+) tests", done.stdout)
    check(done.returncode == 0 and passed,
          "%s gtests of both layers passed" % (passed and passed[1]))
    (WORK / "net.prototxt").write_text(NET)
    (WORK / "solver.prototxt").write_text(SOLVER)
    done = subprocess.run(
        [BUILD / "tools/caffe", "train", "--solver=solver.prototxt"], cwd=WORK,
        env=dict(environment(), GLOG_logtostderr="1"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    losses = [float(x) for x in re.findall(r", loss = (\S+)", done.stdout)]
    check(done.returncode == 0 and len(losses) > 19 and
          losses[-1] < losses[0],
          "a net with both layers trains: the loss fell from %s to %s"
          % (losses[:1], losses[-1:]))


def train():
    if not (BUILD / "tools/caffe").exists():
        raise Failed("build comes first")
    for folder in (QUICK, MNIST / "mnist_train_lmdb", MNIST / "data",
                   MNIST / "mnist_test_lmdb"):
        shutil.rmtree(folder, ignore_errors=True)
    solver = MNIST / "quick_solver.prototxt"
    text = solver.read_text()
    for name, value in dict(max_iter=600, snapshot=100, display=10,
                            test_interval=200).items():
        text = re.sub(r"(?m)^%s: .*$" % name, "%s: %d" % (name, value), text)
    solver.write_text(text)
    command = [MNIST / "train_quick.sh"]
    kill_at_each(TRAIN_MOMENTS, command, half_trained)
    print("finishing the training", flush=True)
    seconds, out = run("finish the training", command)
    accuracy = re.search(r"test accuracy: (\S+) after 600 iterations", out)
    check(accuracy and float(accuracy[1]) > 0.7, "the training came to its "
          "end: %s" % (accuracy and accuracy[0]))
    check("quick_iter_600.caffemodel" not in half_trained()[1],
          "the net is whole")
    _, out = run("train again", command)
    check("trained already" in out, "one more run has nothing to train")
    left = [path.name for path in MNIST.iterdir()
            if path.name in ("data.new", "data.download", "lmdb.new")]
    check(not left, "nothing is left over %s" % left)


def main():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, add_help=False)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("parts", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    args = parser.parse_args()
    if args.help:
        print(__doc__.strip())
        return
    if set(args.parts) - {"build", "train"}:
        raise SystemExit(__doc__)
    random.seed(args.seed)
    parts = args.parts or ["build", "train"]
    status = 0
    try:
        if "build" in parts:
            build()
        if "train" in parts:
            train()
    except Failed as error:
        print("error: %s" % error, flush=True)
        status = 1
    print("\n%-32s %8s  %s" % ("killed while", "after s", "half written"))
    for row in rows:
        print("%-32s %8.1f  %s" % row)
    print("%d kills; %s" % (len(rows), "FAILED" if status else "all is well"))
    raise SystemExit(status)


if __name__ == "__main__":
    main()
