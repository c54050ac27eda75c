#!/usr/bin/python3
"""Turns the log of `caffe train` on stdin into a short table as it comes.

    caffe train --solver=SOLVER 2>&1 | tee LOG | myexamples/watch_training.py

Warnings and errors of Caffe pass through.
"""
import argparse
import re
import sys
import time

from caffe_log import duration, is_diverged, max_iter, read_rows

_TROUBLE = re.compile(r"[WEF]\d{4,8} ")
_QUIET = re.compile(r"Snapshotting to binary proto file (.+)|"
                    r"Restoring previous solver status from (.+)")


def _number(value):
    return "" if value is None else "%.4g" % value


class Table:
    """Prints one line a train row, with the test before it if there was one."""

    def __init__(self):
        self.max_iter = None
        self.start = None
        self.fatal = False
        self.tested = None
        self.diverged = False
        self.has_head = False

    def head(self):
        """Prints the table's head, once."""
        if not self.has_head:
            print("%13s %10s %10s %10s %10s  %s" % (
                "iteration", "loss", "lambda", "test loss", "test acc",
                "left"), flush=True)
        self.has_head = True

    def line(self, iteration, train):
        """Prints one line; train is None after the last iteration."""
        self.head()
        test = self.tested
        self.tested = None
        print("%13s %10s %10s %10s %10s  %s" % (
            "%d/%s" % (iteration, self.max_iter or "?"),
            _number(train and train.find("loss")),
            _number(train and train.find("lambda")),
            _number(test and test.find("loss")),
            "%.4f" % test.find("accuracy")
            if test and test.find("accuracy") is not None else "",
            self.left(iteration)), flush=True)

    def left(self, iteration):
        """The time to the end as h:mm:ss, or nothing where it is unknown."""
        now = time.monotonic()
        if self.start is None:
            self.start = now, iteration
        since, first = self.start
        if not self.max_iter or iteration <= first:
            return ""
        return duration((now - since) / (iteration - first) *
                        (self.max_iter - iteration))

    def add(self, row):
        """Takes the next row of the log."""
        if row.kind == "test":
            if row.values and row.net == 0:
                self.tested = row
            return
        self.line(row.iteration, row)
        if is_diverged(row.values["loss"]) and not self.diverged:
            self.diverged = True
            print("warning: the loss is %g, so the net has stopped learning. "
                  "Let lambda fall more slowly (myexamples/plot_lambda.py "
                  "shows it) or lower the learning rate."
                  % row.values["loss"], flush=True)

    def other(self, line):
        """Takes a line that is part of no row."""
        if self.max_iter is None:
            self.max_iter = max_iter(line)
        self.fatal = self.fatal or bool(re.match(r"F\d{4,8} ", line))
        quiet = _QUIET.search(line)
        if self.fatal or _TROUBLE.match(line):
            print(line.rstrip("\n"), file=sys.stderr, flush=True)
        elif quiet:
            print("%13s %s" % ("snapshot" if quiet[1] else "continues",
                               quiet[1] or quiet[2]), flush=True)


def main():
    argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    table = Table()
    for row in read_rows(sys.stdin, table.other):
        table.add(row)
    if table.tested:
        table.line(table.tested.iteration, None)


if __name__ == "__main__":
    main()
