"""The part paper: the nets of the paper, several at once, with resuming."""
import os
import re
import signal
import time

import caffe_log
import images
import processes
from checks import say, show_end
from processes import OutOfTime
from results import BEGUN, FAILED, PASSED, SKIPPED, UserError

ITERATIONS = 10000
SNAPSHOT = 500
SEED = 1701
TYPES = {1: "SINGLE", 2: "DOUBLE", 3: "TRIPLE", 4: "QUADRUPLE"}
# Test errors in the paper, in percent, by m.
PAPER = {"mnist": {1: 0.40, 2: 0.32, 3: 0.31, 4: 0.31},
         "cifar10": {2: 7.73, 4: 7.58}}
FILES = {"mnist": ("mnist/mnist_solver.prototxt",
                   "mnist/model/mnist_train_test.prototxt"),
         "cifar10": ("cifar10/cifar_solver.prototxt",
                     "cifar10/model/cifar_train_test.prototxt")}


def names(nets=(), margins=()):
    """The steps [(net, m)]; the paper's where no m is named with a net."""
    steps = []
    for net in ("mnist", "cifar10"):
        if nets and net not in nets:
            continue
        wanted = PAPER[net]
        if margins:
            wanted = margins if nets else [m for m in PAPER[net]
                                           if m in margins]
        steps += [(net, m) for m in sorted(wanted)]
    return steps


def label(net, m):
    """A step's name."""
    return "%s m=%d" % (net, m)


# ---- Prototxts ----

def _replace(text, pattern, new, count=1):
    text, found = re.subn(pattern, lambda match: match.expand(new), text,
                          flags=re.M)
    if found != count:
        raise UserError("%d and not %d places of a prototxt match %s"
                        % (found, count, pattern))
    return text


def net_text(text, net, m, small):
    """The authors' net with margin m, reading the LMDBs of this folder."""
    text = _replace(text, r"type: (DOUBLE|QUADRUPLE)$", "type: " + TYPES[m])
    if net == "mnist":
        text = _replace(text, r'source: "myexamples/mnist/(mnist_\w+_lmdb)"',
                        r'source: "data/\1"', 2)
    else:
        # A Caffe without OpenCV reads no lists of images.
        text = _replace(text, r'type: "ImageData"', 'type: "Data"', 2)
        text = _replace(text, r"image_data_param \{", "data_param {", 2)
        text = _replace(text, r"^ *shuffle: true\n", "")
        for old, new in (("train", "train"), ("val", "test")):
            text = _replace(
                text, r'source: "myexamples/cifar10/data/%s\.txt"' % old,
                'source: "data/cifar10_%s_lmdb"\n    backend: LMDB' % new)
        text = _replace(text, r'mean_file: "[^"]*"',
                        'mean_file: "data/cifar10_mean.binaryproto"', 2)
    if small:
        text = _replace(text, r"batch_size: \d+", "batch_size: 4", 2)
    return text


def solver_text(text, folder, iterations, is_gpu, small):
    """The authors' solver, to the iteration at which ours ends."""
    for field, value in (("net", '"%s/net.prototxt"' % folder),
                         ("max_iter", iterations),
                         ("snapshot", SNAPSHOT),
                         ("snapshot_prefix", '"%s/model"' % folder),
                         ("display", 1 if small else 100),
                         ("solver_mode", "GPU" if is_gpu else "CPU")):
        text = _replace(text, r"^%s: .*$" % field, "%s: %s" % (field, value))
    if small:
        text = _replace(text, r"^test_iter: .*$", "test_iter: 1")
    return text + "random_seed: %d\n" % SEED


# ---- Snapshots ----

def fields(path):
    """The numbers of a protobuf file's fields; None where it is cut short."""
    with open(path, "rb") as file:
        data = file.read()
    found, at = set(), 0

    def varint():
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
    try:
        while at < len(data):
            key = varint()
            if key & 7 == 0:
                varint()
            elif key & 7 == 2:
                size = varint()
                at += size
            else:
                at += {1: 8, 5: 4}[key & 7]
            found.add(key >> 3)
    except (IndexError, KeyError):
        return None
    return found if at == len(data) else None


def snapshots(folder):
    """[iteration] of the whole snapshots of a training, newest first.

    A kill leaves one cut short. The last field of a solver's state is
    current_step, 4; a model's layers are 100.
    """
    whole = []
    for name in os.listdir(folder):
        match = re.match(r"model_iter_(\d+)\.solverstate$", name)
        if not match:
            continue
        model = os.path.join(folder, "model_iter_%s.caffemodel" % match[1])
        if (4 in (fields(os.path.join(folder, name)) or ())
                and os.path.exists(model)
                and 100 in (fields(model) or ())):
            whole.append(int(match[1]))
    return sorted(whole, reverse=True)


# ---- Trainings ----

class Training:
    """One net with one margin."""

    def __init__(self, run, net, m):
        self.run, self.net, self.m = run, net, m
        self.label = label(net, m)
        self.iterations = 2 if run.rehearsal else ITERATIONS
        self.inside = "paper/%s-m%d" % (net, m)
        self.folder = os.path.join(run.results.folder, self.inside)
        self.log = os.path.join(self.folder, "train.log")
        self.process, self.first, self.begin = None, 0, None
        self.entry = dict(run.results.data["paper"].get(self.label, {}))
        self.entry.update(net=net, m=m, iterations=self.iterations,
                          paper_percent=PAPER[net].get(m))
        self.entry.pop("words", None)
        self.entry.pop("status", None)

    def keep(self, status, **more):
        """Writes down how far it is."""
        self.entry.update(more)
        self.run.results.set("paper", self.label, status, **self.entry)

    def _write(self):
        solver, net = (os.path.join(self.run.bundle_folder, "myexamples", name)
                       for name in FILES[self.net])
        small = self.run.rehearsal
        with open(net) as file:
            texts = {"net.prototxt": net_text(file.read(), self.net, self.m,
                                              small)}
        with open(solver) as file:
            texts["solver.prototxt"] = solver_text(
                file.read(), self.inside, self.iterations,
                self.run.host.is_gpu, small)
        os.makedirs(self.folder, exist_ok=True)
        for name, text in texts.items():
            with open(os.path.join(self.folder, name), "w") as file:
                file.write(text)

    def start(self):
        """Starts or goes on with the training, unless it came to its end."""
        self._write()
        self.first = (snapshots(self.folder) or [0])[0]
        self.begin = time.monotonic()
        self.keep(BEGUN, iteration=self.first)
        if self.first == self.iterations:
            return
        command = self.run.host.command(
            "caffe", "train", "--solver=%s/solver.prototxt" % self.inside)
        if self.first:
            command.append("--snapshot=%s/model_iter_%d.solverstate"
                           % (self.inside, self.first))
        if self.run.host.is_gpu:
            command.append("--gpu=0")
        say("paper %s: %s iteration %d" % (
            self.label, "going on from" if self.first else "from", self.first))
        env = dict(self.run.host.environment(), GLOG_logtostderr="1")
        env.pop("GLOG_minloglevel", None)
        self.process = processes.start(command, self.log, env,
                                       self.run.results.folder)

    def running(self):
        """Whether the training still goes on."""
        return self.process is not None and self.process.poll() is None

    def history(self):
        """What its log says."""
        try:
            with open(self.log, errors="replace") as lines:
                return caffe_log.History(lines)
        except FileNotFoundError:
            return caffe_log.History([])

    def iteration(self):
        """The last iteration that its log tells of."""
        rows = self.history().train
        return max(self.first, rows[-1].iteration if rows else 0)

    def tidy(self):
        """Removes all snapshots but the two newest."""
        for iteration in snapshots(self.folder)[2:]:
            for end in ("caffemodel", "solverstate"):
                os.remove(os.path.join(self.folder, "model_iter_%d.%s"
                                       % (iteration, end)))

    def note(self, words=None):
        """Writes down how far a training is that has stopped or ended."""
        history = self.history()
        # The very last line of a training has a loss and nothing else.
        last = {name: (history.curve("train", name)[1] or [None])[-1]
                for name in ("loss", "lambda")}
        iterations, accuracies = history.accuracies()
        more = {"words": words} if words else {}
        self.keep(BEGUN, iteration=(snapshots(self.folder) or [0])[0],
                  seconds=round(self.entry.get("seconds", 0)
                                + time.monotonic() - self.begin, 1),
                  tests=[[i, a] for i, a in zip(iterations, accuracies)],
                  **last, **more)
        self.begin = time.monotonic()

    def finish(self):
        """After the training's end: the test error of its last model."""
        status = self.process.returncode if self.process else 0
        self.note()
        self.tidy()
        if status != 0 or self.entry["iteration"] != self.iterations:
            words = "caffe train ended with %d at iteration %d; see %s" % (
                status, self.entry["iteration"], self.log)
            self.keep(FAILED, words=words)
            say("paper %s: FAILED, %s" % (self.label, words))
            show_end(self.log)
            return
        # The last test of a training is not of its last model: Caffe ends in
        # a forward pass, which moves BN's statistics on.
        log = self.run.fresh_log("paper test " + self.label)
        command = self.run.host.command(
            "caffe", "test", "--model=%s/net.prototxt" % self.inside,
            "--weights=%s/model_iter_%d.caffemodel" % (self.inside,
                                                       self.iterations),
            "--iterations=%d" % (1 if self.run.rehearsal else 100))
        if self.run.host.is_gpu:
            command.append("--gpu=0")
        status = self.run.run(["env", "GLOG_logtostderr=1",
                               "GLOG_minloglevel=0"] + command, log,
                              self.run.results.folder)
        with open(log, errors="replace") as file:
            text = file.read()
        accuracy = re.findall(r"\] accuracy = (\S+)", text)
        if status != 0 or not accuracy:
            self.keep(FAILED, words="caffe test failed; see " + log)
            say("paper %s: FAILED, caffe test failed" % self.label)
            show_end(log)
            return
        error = 100 * (1 - float(accuracy[-1]))
        # Caffe's Accuracy takes NaN for right.
        is_nan = re.search(r"\] Loss: -?nan", text)
        if is_nan:
            error = 100.0
        words = "test error %.2f %%" % error
        if self.entry["paper_percent"] is not None:
            words += ", the paper's %.2f %%" % self.entry["paper_percent"]
        if is_nan or (self.entry["loss"] is not None
                      and caffe_log.is_diverged(self.entry["loss"])):
            words += "; it DIVERGED"
        self.keep(PASSED, error_percent=round(error, 4), words=words)
        say("paper %s: %s" % (self.label, words))


def forget(run, name):
    """Moves a training away, so that it begins anew."""
    folder = os.path.join(run.results.folder, "paper", name.replace(" m=",
                                                                    "-m"))
    if os.path.isdir(folder):
        os.rename(folder, "%s.%d" % (folder, time.time()))


def run_paper(run, steps, named, jobs):
    """Trains the steps, a net after the other, jobs of one net at once.

    A net without its images is left out, unless it is among those named.
    """
    for net in FILES:
        wanted = [Training(run, *step) for step in steps if step[0] == net]
        if not wanted:
            continue
        lacking = images.missing(run, net)
        if lacking:
            words = ("without its images (%s): run.sh data PATH takes them"
                     % ", ".join(lacking))
            if net in named:
                raise UserError("paper %s: %s" % (net, words))
            for training in wanted:
                training.keep(SKIPPED, words=words)
            say("paper %s: skipped, %s" % (net, words))
            continue
        images.make(run, net)
        _train(run, net, wanted, jobs)


def _train(run, net, waiting, jobs):
    # Caffe writes a last snapshot when it is stopped.
    reserve = min(20, 0.2 * run.limit.seconds)
    active, shown = [], time.monotonic()
    try:
        while waiting or active:
            if run.limit.left() <= reserve:
                raise OutOfTime()
            while waiting and len(active) < jobs:
                active.append(waiting.pop(0))
                active[-1].start()
            time.sleep(0.2)
            for training in [t for t in active if not t.running()]:
                active.remove(training)
                training.finish()
            if active and time.monotonic() - shown >= 10:
                shown = time.monotonic()
                say("paper %s: %s" % (net, _progress(active)))
                for training in active:
                    training.tidy()
    finally:
        going = [t for t in active if t.running()]
        processes.end([t.process for t in going], signal.SIGINT, reserve)
        for training in going:
            training.note("stopped; goes on from its last snapshot")
            say("paper %s: stopped at iteration %d of %d" % (
                training.label, training.entry["iteration"],
                training.iterations))


def _progress(active):
    words, left = [], 0
    for training in active:
        iteration = training.iteration()
        words.append("m=%d %d/%d" % (training.m, iteration,
                                     training.iterations))
        rate = (iteration - training.first) / max(
            1e-3, time.monotonic() - training.begin)
        if rate > 0:
            left = max(left, (training.iterations - iteration) / rate)
    text = ", ".join(words)
    return text + ("; about %s left" % caffe_log.duration(left)
                   if left else "")
