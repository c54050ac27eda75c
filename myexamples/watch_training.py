#!/usr/bin/python3
"""Turns the log of `caffe train` into a short table as it comes, and warns
early of a training that goes wrong.

    caffe train --solver=SOLVER 2>&1 | tee -i LOG |
        myexamples/watch_training.py
    myexamples/watch_training.py [--stop] --log LOG --
        caffe train --solver=SOLVER

The first reads a log on stdin. The second starts Caffe itself; Ctrl-C lets it
write a snapshot and stop. With --stop a warning does that, too: the last lines
then name the last good snapshot and the command that goes on from there with a
gentler descent of lambda, and the status is 3. Otherwise it is Caffe's.

With LSOFTMAX_LOG_EVERY=N in Caffe's environment (N: display times iter_size)
there are columns for the angle to the own class in degrees (mean and 95th
percentile), the mean norms of features x and of class weights w, the share of
samples whose margin holds, and the percentages of samples in the segments
k = 0, 1, ... of psi.

Warnings and errors of Caffe pass through, as does all that is neither a line
of its log nor one of the solver's and the nets' parameters.
"""
import argparse
import os
import re
import shlex
import signal
import subprocess
import sys

import caffe_log
import gentler
from caffe_log import Head, duration, read_rows
from caffe_proto import UserError, user_errors
from early_warning import EarlyWarning
from event_files import EventWriter

# A line of glog that tells how things are, one of a message in protobuf's text
# format, or an empty one.
_NEWS = re.compile(r"I\d{4,8} |\s*([a-z]\w*( \{|: (\S+|\".*\"))|\})?\s*$")
_NO_TRAINING = ("no training began: there was no line \"Iteration N, loss = "
                "...\"")
STOPPED = 3


def _number(value):
    return "" if value is None else "%.4g" % value


class Table:
    """Prints one line a train row, with the test before it if there was one.

    on_alarm is called with each alarm that early_warning.py raises.
    """

    def __init__(self, on_alarm=None):
        self.log_head = Head()
        self.on_alarm = on_alarm
        self.early = EarlyWarning(self.log_head)
        self.start = None
        self.began = self.stopped = False
        self.tested = self.last = None
        self.has_head = False
        self.with_margin = False
        self.states = []

    @property
    def max_iter(self):
        return self.log_head.max_iter

    def head(self, margin):
        """Prints the table's head, again where there are more columns."""
        if self.has_head and (self.with_margin or not margin):
            return
        self.has_head, self.with_margin = True, bool(margin)
        print("%13s %10s %10s %10s %10s %s %s" % (
            "iteration", "loss", "lambda", "test loss", "test acc",
            self.margin_cells(("angle", "95 %", "norm x", "norm w", "holds",
                               "segments, %")), "left"), flush=True)

    def margin_cells(self, cells):
        """The columns of the angles, if there are any."""
        if not self.with_margin:
            return ""
        return "%6s %6s %8s %8s %6s  %-15s" % tuple(cells or [""] * 6)

    @staticmethod
    def margin_values(margin):
        """The cells of what a layer has logged."""
        if not margin:
            return None
        if not margin["samples"]:
            return [""] * 5 + ["no usable sample"]
        return ["%.1f" % margin["angle_mean"], "%.1f" % margin["angle_p95"],
                _number(margin["feature_norm"]),
                _number(margin["weight_norm"]), "%.3f" % margin["holds"],
                " ".join("%.0f" % (100 * v) for v in margin["segments"])]

    def line(self, iteration, train):
        """Prints one line; train is None after the last iteration."""
        margins = list(train.margins.items()) if train else []
        # First the layer that the column of lambda is of.
        shown = train and train.lambda_layer()
        margins.sort(key=lambda item: item[0] != shown)
        self.head(margins)
        test = self.tested
        self.tested = None
        first = self.margin_values(margins[0][1] if margins else None)
        at = (train or test).time
        print("%13s %10s %10s %10s %10s %s %s" % (
            "%d/%s" % (iteration, self.max_iter or "?"),
            _number(train and train.find("loss")),
            _number(train and train.descent()),
            _number(test and test.find("loss")),
            "%.4f" % test.find("accuracy")
            if test and test.find("accuracy") is not None else "",
            self.margin_cells(first), self.left(iteration, at)), flush=True)
        # Of a net with several heads, the others.
        for layer, margin in margins[1:]:
            print("%13s %10s %10s %10s %10s %s" % (
                layer[-13:], "", _number(margin["lambda"]), "", "",
                self.margin_cells(self.margin_values(margin))), flush=True)

    def left(self, iteration, at):
        """The time to the end as h:mm:ss, or nothing where it is unknown.

        at is when the log says that the iteration was, in seconds: a log may
        be shown long after its training.
        """
        if self.start is None:
            self.start = at, iteration
        since, first = self.start
        if not self.max_iter or iteration <= first or None in (at, since):
            return ""
        return duration((at - since) / (iteration - first) *
                        (self.max_iter - iteration))

    def add(self, row):
        """Takes the next row of the log."""
        self.began = True
        if row.kind == "test":
            if row.values and row.net == 0:
                self.tested = row
        elif row.iteration == self.max_iter and not self.tested:
            self.last = row  # its test comes after it
        else:
            self.show(row)

    def show(self, row):
        """Prints a train row and what is wrong with it."""
        self.line(row.iteration, row)
        for alarm in self.early.add(row):
            print(alarm, flush=True)
            if self.on_alarm:
                self.on_alarm(alarm)

    def other(self, line):
        """Takes a line that is part of no row."""
        if caffe_log.begins(line):
            self.end()
            self.tested = self.last = self.start = None
            self.began, self.stopped = True, False
        self.stopped |= "] Optimization stopped early" in line
        model, state, restored = (
            read(line) for read in (caffe_log.snapshot, caffe_log.state,
                                    caffe_log.restored))
        if not _NEWS.match(line):
            print(line.rstrip("\n"), file=sys.stderr, flush=True)
        elif model or restored:
            print("%13s %s" % ("snapshot" if model else "continues",
                               model or restored), flush=True)
        if state or restored:
            self.states.append(state or restored)

    def end(self):
        """Prints what came after a training's last iteration."""
        if self.last:
            self.show(self.last)
        elif self.tested:
            self.line(self.tested.iteration, None)


class Training:
    """A `caffe train` that this program has started."""

    def __init__(self, command, log):
        self.alarm = None
        self._log = log
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, errors="replace", bufsize=1,
                env=dict(os.environ, GLOG_logtostderr="1"))
        except OSError as error:
            raise UserError("cannot start %s: %s"
                            % (command[0], error.strerror))

    def lines(self):
        """Its log."""
        for line in self._process.stdout:
            if self._log:
                self._log.write(line)
                self._log.flush()
            yield line

    def stop(self, alarm):
        """Has it write a snapshot and end, as Ctrl-C does."""
        if self.alarm:
            return
        self.alarm = alarm
        print("stopping the training (--stop)", flush=True)
        self._process.send_signal(signal.SIGINT)

    def status(self):
        """Its exit status, as a shell has it."""
        status = self._process.wait()
        return 128 - status if status < 0 else status


def parse_args():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [-h] [--tensorboard DIR] [[--stop] [--log FILE] "
        "-- caffe train ...]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensorboard", metavar="DIR",
                        help="write event files for TensorBoard into DIR, "
                        "too (needs the Python package tensorboardX)")
    parser.add_argument("--stop", action="store_true",
                        help="end the training at the first warning")
    parser.add_argument("--log", metavar="FILE",
                        help="append Caffe's log to FILE")
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:at])
    args.command = words[at + 1:]
    if at < len(words) and not args.command:
        parser.error("no command after --")
    for option in ("stop", "log"):
        if getattr(args, option) and not args.command:
            parser.error("--%s needs a Caffe to start: -- caffe train "
                         "--solver=SOLVER" % option)
    if args.stop:
        if not gentler.option(args.command, "solver"):
            parser.error("--stop needs the --solver of a caffe train after "
                         "--, not: %s" % shlex.join(args.command))
        effect = gentler.option(args.command, "sigint_effect") or "stop"
        if effect != "stop":
            parser.error("--stop sends SIGINT, and with --sigint_effect=%s "
                         "Caffe does not stop at it" % effect)
    return args


def watch(lines, table, events):
    """Shows a log to its end."""
    try:
        for row in read_rows(lines, table.other, table.log_head):
            table.add(row)
            if events:
                events.add(row)
        table.end()
    finally:
        folder = events and events.close()
    if folder:
        print("event files: %s" % folder, flush=True)


def run(args, events):
    """Starts the command and shows its log; returns the exit status."""
    log = None
    if args.log:
        try:
            log = open(args.log, "a")
        except OSError as error:
            raise UserError("cannot write %s: %s"
                            % (args.log, error.strerror))
    training = Training(args.command, log)
    table = Table(training.stop if args.stop else None)
    watch(training.lines(), table, events)
    status = training.status()
    if not table.began:
        print("error: " + _NO_TRAINING, file=sys.stderr)
    if not training.alarm or status:
        if table.stopped:
            print("stopped before the end; %s" % (
                "go on from there with --snapshot=%s"
                % shlex.quote(table.states[-1]) if table.states else
                "there is no snapshot to go on from"), flush=True)
        return status
    print(gentler.advice(args.command, training.alarm, table.states),
          flush=True)
    return STOPPED


def main():
    args = parse_args()
    with user_errors():
        events = args.tensorboard and EventWriter(args.tensorboard)
        # At Ctrl-C Caffe writes a snapshot and ends: that is to be seen. A
        # handler, not SIG_IGN, which Caffe would inherit.
        if args.command or not sys.stdin.isatty():
            signal.signal(signal.SIGINT, lambda *_: None)
        if args.command:
            sys.exit(run(args, events))
        table = Table()
        # A log names files, whatever their names are made of.
        sys.stdin.reconfigure(errors="replace")
        watch(sys.stdin, table, events)
        if not table.began:
            raise UserError(_NO_TRAINING)


if __name__ == "__main__":
    main()
