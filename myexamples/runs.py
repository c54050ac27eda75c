"""Trains variants of a solver, several at once, each in a folder of its own.

A run that came to its end is kept: run again, only the missing ones train.
"""
import os
import subprocess
import sys
import time

import caffe_log
import caffe_proto
from caffe_proto import ROOT, UserError


class Run:
    """One variant: margin m and random_seed in the folder path."""

    def __init__(self, pb, solver_path, path, margin, seed):
        self.path, self.margin, self.seed = path, margin, seed
        self.log = os.path.join(path, "train.log")
        self.solver, self.net = caffe_proto.read_solver(pb, solver_path)
        layers = [layer for layer in self.net.layer
                  if layer.type == "LargeMarginInnerProduct"
                  and caffe_proto.in_phase(pb, self.net, layer, pb.TRAIN)]
        if len(layers) != 1:
            raise UserError("the net of %s has %d LargeMarginInnerProduct "
                            "layers in the TRAIN phase; it must have one"
                            % (solver_path, len(layers)))
        layers[0].largemargin_inner_product_param.margin = margin
        for field in ("net", "train_net", "net_param", "train_net_param",
                      "snapshot"):
            self.solver.ClearField(field)
        self.solver.net = os.path.join(path, "net.prototxt")
        self.solver.snapshot_prefix = os.path.join(path, "model")
        self.solver.random_seed = seed
        self.solver.solver_mode = pb.SolverParameter.CPU
        self.model = "%s_iter_%d.caffemodel" % (
            self.solver.snapshot_prefix, self.solver.max_iter)

    def texts(self):
        """The prototxts of the run, by path."""
        from google.protobuf import text_format
        return {self.solver.net: text_format.MessageToString(self.net),
                os.path.join(self.path, "solver.prototxt"):
                    text_format.MessageToString(self.solver)}

    def is_done(self):
        """Whether these very prototxts were trained to the end."""
        for path, text in self.texts().items():
            try:
                with open(path) as file:
                    if file.read() != text:
                        return False
            except OSError:
                return False
        return (os.path.exists(os.path.join(self.path, "done"))
                and os.path.exists(self.model))

    def start(self, caffe):
        """The process that trains the net."""
        os.makedirs(self.path, exist_ok=True)
        done = os.path.join(self.path, "done")
        if os.path.exists(done):
            os.remove(done)
        for path, text in self.texts().items():
            with open(path, "w") as file:
                file.write(text)
        # One thread each: the runs share the cores among themselves.
        env = dict(os.environ, GLOG_logtostderr="1", OPENBLAS_NUM_THREADS="1",
                   OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1")
        with open(self.log, "w") as log:
            return subprocess.Popen(
                [caffe, "train",
                 "--solver=" + os.path.join(self.path, "solver.prototxt")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                cwd=ROOT)

    def finish(self, status):
        """Keeps the run, or says why it failed."""
        history = self.history()
        if status != 0 or not history.test:
            raise UserError("the training in %s failed (status %d); its log "
                            "is %s" % (self.path, status, self.log))
        if caffe_log.is_diverged(history.train[-1].values["loss"]):
            print("warning: m = %d, seed %d diverged"
                  % (self.margin, self.seed), flush=True)
        open(os.path.join(self.path, "done"), "w").close()

    def history(self):
        """What the log says."""
        with open(self.log, errors="replace") as lines:
            return caffe_log.History(lines)

    def iteration(self):
        """The last iteration that the log tells of."""
        train = self.history().train
        return train[-1].iteration if train else 0

    def accuracy(self):
        """The test accuracy after the last iteration."""
        return self.history().accuracies()[1][-1]


class Progress:
    """The state of all runs: one line that stays, or one now and then."""

    def __init__(self, every=30):
        self.every = every if not sys.stdout.isatty() else 2
        self.shown = time.monotonic()

    def show(self, text):
        if time.monotonic() - self.shown < self.every:
            return
        self.shown = time.monotonic()
        if sys.stdout.isatty():
            print("\r\033[K" + text, end="", flush=True)
        else:
            print(text, flush=True)

    def say(self, text):
        """A line of its own."""
        print(("\r\033[K" if sys.stdout.isatty() else "") + text, flush=True)


def train_all(runs, jobs):
    """Trains the runs that are not done yet, jobs of them at once."""
    caffe_root = os.environ.get("CAFFE_ROOT") or os.path.join(
        ROOT, "build", "caffe")
    caffe = os.path.join(os.path.abspath(caffe_root), "build/tools/caffe")
    if not os.path.exists(caffe):
        raise UserError("%s is missing: run cmake/build_caffe.sh first"
                        % caffe)
    waiting = [run for run in runs if not run.is_done()]
    if len(waiting) < len(runs):
        print("%d of %d runs are done already" % (
            len(runs) - len(waiting), len(runs)), flush=True)
    total, finished, active = len(waiting), 0, {}
    progress = Progress()
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                active[run] = run.start(caffe)
            time.sleep(0.5)
            for run, process in list(active.items()):
                if process.poll() is None:
                    continue
                del active[run]
                run.finish(process.returncode)
                finished += 1
                progress.say("%d/%d: m = %d, seed %d: test accuracy %.4f" % (
                    finished, total, run.margin, run.seed, run.accuracy()))
            if active:
                progress.show("    " + ", ".join(
                    "m = %d, seed %d: %d/%d" % (
                        run.margin, run.seed, run.iteration(),
                        run.solver.max_iter) for run in active))
    finally:
        for process in active.values():
            process.terminate()
        for process in active.values():
            process.wait()
