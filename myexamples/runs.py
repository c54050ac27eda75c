"""Trains variants of a solver, several at once, each in a folder of its own.

A run that came to its end is kept: run again, only the missing ones train.
"""
import argparse
import contextlib
import math
import os
import shutil
import subprocess
import sys
import time

import caffe_log
import caffe_net
import caffe_proto
import snapshots
from caffe_proto import MAX_MARGIN, ROOT, UserError, user_errors

DESCENT = ("base", "gamma", "power", "lambda_min")


def parser(description, solver, output, seeds):
    """A parser of the options that all comparisons have, with defaults."""
    options = argparse.ArgumentParser(
        description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("-m", "--margins", type=int, nargs="+",
                         default=[1, 2, 3, 4], metavar="M",
                         help="default: 1 2 3 4")
    options.add_argument("-s", "--seeds", type=int, default=seeds,
                         metavar="N",
                         help="runs of each margin (default: %(default)s)")
    options.add_argument("--solver", metavar="SOLVER", default=solver,
                         help="default: " + os.path.basename(solver))
    options.add_argument("-o", "--output", metavar="FOLDER", default=output,
                         help="default: " + from_root(output))
    options.add_argument("-j", "--jobs", type=int, metavar="N",
                         default=os.cpu_count(),
                         help="nets trained at once (default: one a core)")
    return options


def parse(options):
    """The arguments of such a parser, checked; margins rise."""
    args = options.parse_args()
    if args.seeds < 1 or args.jobs < 1:
        options.error("seeds and jobs are at least 1")
    for margin in args.margins:
        if not 1 <= margin <= MAX_MARGIN:
            options.error("-m %d: a margin is from 1 to %d"
                          % (margin, MAX_MARGIN))
    args.margins = sorted(set(args.margins))
    return args


def of_each(args, make):
    """make(folder's name, margin, seed) of each net, seed by seed."""
    return [make("m%d_seed%d" % (margin, seed), margin, seed)
            for seed in range(1, args.seeds + 1) for margin in args.margins]


@contextlib.contextmanager
def errors():
    """Ends a comparison that fails or is stopped with one line."""
    with user_errors("stopped; run this again to go on"):
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError("cannot write: %s" % error)


def from_root(path):
    """path as Caffe is given it: from the root, where it is below that.

    A finished run stays one when its project moves.
    """
    path = os.path.abspath(path)
    inside = os.path.relpath(path, ROOT)
    return path if inside.startswith(os.pardir) else inside


def read_or_none(path):
    """The text of a file, or None where there is none."""
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


def start_mortal(command, **options):
    """The process of a command that does not outlive this one.

    Whatever ends this process, the lock on its folder goes with it, and the
    next one would write to the same files. At a SIGHUP Caffe goes on.
    """
    parent = os.getpid()
    return subprocess.Popen(command, **options,
                            preexec_fn=lambda: caffe_net.end_with(parent))


class Run:
    """One variant: margin m and random_seed, in the folder path.

    descent maps fields of DESCENT to the values that the net gets in place of
    its own; m = 1 has no descent. sources maps LMDBs that the net names to
    those that it gets.
    """

    def __init__(self, pb, solver_path, path, margin, seed, descent=None,
                 sources=None):
        self.pb, self.path = pb, path
        self.margin, self.seed = margin, seed
        self.log = os.path.join(path, "train.log")
        self.solver, self.net = caffe_proto.read_solver(pb, solver_path)
        layers = [layer for layer in self.net.layer
                  if layer.type == "LargeMarginInnerProduct"
                  and caffe_proto.in_phase(pb, self.net, layer, pb.TRAIN)]
        if len(layers) != 1:
            raise UserError("the net of %s has %d LargeMarginInnerProduct "
                            "layers in the TRAIN phase; it must have one"
                            % (solver_path, len(layers)))
        param = layers[0].largemargin_inner_product_param
        if margin == 1:
            # Without a descent, so that no other one makes it another net.
            descent = {"base": 0}
        if descent is not None:
            for field in DESCENT:
                param.ClearField(field)
            for field, value in descent.items():
                setattr(param, field, value)
            caffe_proto.check_schedule(layers[0].name, param)
        param.ClearField("type")
        param.margin = margin
        self.replace_sources(sources or {}, solver_path)
        for field in ("net", "train_net", "net_param", "train_net_param",
                      "snapshot"):
            self.solver.ClearField(field)
        inside = from_root(path)
        self.solver.net = os.path.join(inside, "net.prototxt")
        self.solver.snapshot_prefix = os.path.join(inside, "model")
        self.solver.random_seed = seed
        self.solver.solver_mode = pb.SolverParameter.CPU
        self.model = os.path.join(
            path, "model_iter_%d.caffemodel" % self.solver.max_iter)

    def replace_sources(self, sources, solver_path):
        """Gives the data layers other LMDBs."""
        for old, new in sources.items():
            layers = [layer for layer in self.net.layer
                      if layer.data_param.source == old]
            if not layers:
                raise UserError("the net of %s has no data layer that reads "
                                "%s" % (solver_path, old))
            for layer in layers:
                layer.data_param.source = new

    def texts(self):
        """The prototxts of the run, by path."""
        from google.protobuf import text_format
        return {os.path.join(self.path, "net.prototxt"):
                    text_format.MessageToString(self.net),
                os.path.join(self.path, "solver.prototxt"):
                    text_format.MessageToString(self.solver)}

    def dataset(self):
        """The name of the images that it is trained on; "" if unknown."""
        for layer in self.net.layer:
            if layer.data_param.source:
                name = read_or_none(os.path.join(
                    ROOT, layer.data_param.source, "dataset.txt"))
                return (name or "").strip()
        return ""

    def is_done(self):
        """Whether these very prototxts were trained to the end.

        Raises UserError where the folder has another finished run: that is
        not for this one to overwrite.
        """
        images = read_or_none(os.path.join(self.path, "done"))
        if not images:  # a full disk may have left it empty
            return False
        if any(read_or_none(path) != text
               for path, text in self.texts().items()):
            raise UserError("%s has a finished run of another net or solver: "
                            "move it away, or name another folder with -o"
                            % from_root(self.path))
        if images.strip() and images.strip() != self.dataset():
            raise UserError("%s was trained on %s: move it away to train on "
                            "%s" % (from_root(self.path), images.strip(),
                                    self.dataset() or "other images"))
        return self.is_whole()

    def is_whole(self):
        """Whether the model is there and not cut short."""
        try:
            snapshots.check_model(self.pb, self.model)
        except UserError:
            return False
        return True

    def start(self, caffe):
        """The process that trains the net."""
        os.makedirs(self.path, exist_ok=True)
        for path in (os.path.join(self.path, "done"), self.model):
            if os.path.exists(path):
                os.remove(path)
        for path, text in self.texts().items():
            with open(path, "w") as file:
                file.write(text)
        # One thread each: the runs share the cores among themselves.
        env = dict(os.environ, GLOG_logtostderr="1", OPENBLAS_NUM_THREADS="1",
                   OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1")
        with open(self.log, "w") as log:
            return start_mortal(
                [caffe, "train",
                 "--solver=" + os.path.join(self.path, "solver.prototxt")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                cwd=ROOT)

    def finish(self, status):
        """Keeps the run, or says why it failed."""
        history = self.history()
        if (status != 0 or not self.came_to_end() or not history.test
                or not history.train):
            raise UserError("the training in %s failed (status %d); its log "
                            "is %s" % (self.path, status, self.log))
        # Caffe does not notice a full disk at the end of a file.
        if not self.is_whole():
            raise UserError("%s could not be written: make room and run this "
                            "again" % self.model)
        if caffe_log.is_diverged(history.train[-1].values["loss"]):
            print("warning: m = %d, seed %d diverged"
                  % (self.margin, self.seed), flush=True)
        done = os.path.join(self.path, "done")
        with open(done + ".part", "w") as file:
            file.write(self.dataset() + "\n")
        os.replace(done + ".part", done)

    def came_to_end(self):
        """Whether the log says so: Caffe ends a stop with the same words."""
        with open(self.log, errors="replace") as file:
            text = file.read()
        return "Optimization Done" in text and "stopped early" not in text

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
        value = self.history().accuracies()[1][-1]
        # Of NaN the tables could make nothing, and such a net is never right.
        return 0.0 if math.isnan(value) else value


class Left:
    """The time that all runs still take, from what they have done so far."""

    def __init__(self, iterations):
        self.iterations, self.ended = iterations, 0
        self.start = time.monotonic()

    def text(self, running):
        """The time left, after running iterations of unfinished runs."""
        done = self.ended + running
        if not done:
            return ""
        passed = time.monotonic() - self.start
        return "; %s left" % caffe_log.duration(
            passed / done * (self.iterations - done))


class Progress:
    """The state of all runs: one line that stays, or one now and then."""

    def __init__(self, every=30):
        self.every = every if not sys.stdout.isatty() else 2
        self.shown = time.monotonic()

    def show(self, text):
        """Shows what text() returns, if it is time to."""
        if time.monotonic() - self.shown < self.every:
            return
        self.shown = time.monotonic()
        if sys.stdout.isatty():
            # A line that is broken cannot be taken back.
            width = shutil.get_terminal_size().columns - 1
            print("\r\033[K" + text()[:width], end="", flush=True)
        else:
            print(text(), flush=True)

    def clear(self):
        """Takes the line away that stays."""
        if sys.stdout.isatty():
            print("\r\033[K", end="", flush=True)

    def say(self, text):
        """A line of its own."""
        print(("\r\033[K" if sys.stdout.isatty() else "") + text, flush=True)


def need(path, script):
    """Raises UserError where what a script gets is not there."""
    if not os.path.exists(path):
        raise UserError("%s is missing: run %s, which gets what is needed"
                        % (from_root(path), script))


def train_all(runs, jobs, script):
    """Trains the runs that are not done yet, jobs of them at once.

    script is the one that gets their images.
    """
    caffe = os.path.join(caffe_proto.caffe_root(), "build/tools/caffe")
    if not os.path.exists(caffe):
        raise UserError("%s is missing: run cmake/build_caffe.sh first"
                        % caffe)
    waiting = [run for run in runs if not run.is_done()]
    for source in dict.fromkeys(layer.data_param.source for run in waiting
                                for layer in run.net.layer):
        need(os.path.join(ROOT, source), script)
    if len(waiting) < len(runs):
        print("%d of %d runs are done already" % (
            len(runs) - len(waiting), len(runs)), flush=True)
    total, finished, active = len(waiting), 0, {}
    left = Left(sum(run.solver.max_iter for run in waiting))
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
                left.ended += run.solver.max_iter
                progress.say("%d/%d: m = %d, seed %d: test accuracy %.4f" % (
                    finished, total, run.margin, run.seed, run.accuracy()))
            if active:
                progress.show(lambda: "    %s%s" % (", ".join(
                    "m = %d, seed %d: %d/%d" % (
                        run.margin, run.seed, run.iteration(),
                        run.solver.max_iter) for run in active), left.text(
                            sum(run.iteration() for run in active))))
    finally:
        progress.clear()
        for process in active.values():
            process.terminate()
        for process in active.values():
            process.wait()
