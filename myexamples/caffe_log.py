#!/usr/bin/python3
"""Reads the log of `caffe train`; writes it as a table.

    myexamples/caffe_log.py LOG --csv FILE

A row an iteration that the log reports, with the columns train/NAME (outputs
of the training net, its smoothed loss and the learning rate), test/NAME (of
the first test net, test1/NAME of the second) and margin/LAYER/NAME (what a
LargeMarginInnerProduct layer logs with LSOFTMAX_LOG_EVERY). An iteration lacks
the columns that it has no value of.
"""
# Caffe's own tools/extra/parse_log.py refuses a log whose rows differ in their
# columns.
import argparse
import csv
import math
import os
import re
import sys
import time

# First: Ctrl-C is quiet from here on.
from caffe_proto import user_errors

_NUMBER = r"([-+]?(?:nan|inf|[\d.]+(?:e[-+]?\d+)?))"
_LOSS = re.compile(r"\] Iteration (\d+)(?: \(.*\))?, loss = " + _NUMBER, re.I)
_TESTING = re.compile(r"\] Iteration (\d+), Testing net \(#(\d+)\)")
_RATE = re.compile(r"\] Iteration \d+, lr = " + _NUMBER, re.I)
_OUTPUT = re.compile(
    r"\]     (Train|Test) net output #\d+: (\S+) = " + _NUMBER +
    r"(?: \(\* " + _NUMBER + " = )?", re.I)
_MARGIN = re.compile(
    r"\] LargeMarginInnerProduct layer '(.*)': pass (\d+), (\w+ = .*)")
_TIME = re.compile(
    r"[IWEF](\d{4})?(\d\d)(\d\d) (\d\d):(\d\d):(\d\d)(\.\d+)? ")
_SNAPSHOT = re.compile(r"\] Snapshotting to (?:binary proto|HDF5) file (.+)")
_STATE = re.compile(
    r"\] Snapshotting solver state to (?:binary proto|HDF5) file (.+)")
_RESTORED = re.compile(r"\] Restoring previous solver status from (.+)")

# Of a table, the first column.
HEAD = "iteration"

# SoftmaxWithLoss clamps a probability at FLT_MIN: -log(FLT_MIN).
SATURATED_LOSS = 87.3365


def is_diverged(loss):
    """True for the loss of a net that no longer learns."""
    return not math.isfinite(loss) or abs(loss - SATURATED_LOSS) < 1e-3


def duration(seconds):
    """A time as h:mm:ss."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    return "%d:%02d:%02d" % (*divmod(minutes, 60), seconds)


def number(value):
    """A value as Caffe shows it, or nothing where there is none."""
    return "" if value is None else "%.6g" % value


def _wall_time(line):
    """When a line was logged, in seconds since 1970, or None."""
    match = _TIME.match(line)
    if not match:
        return None
    year, month, day, hour, minute, second, rest = match.groups()
    # Old versions of glog leave the year out: it is this or the last one.
    now = time.time()
    year = int(year or time.localtime(now).tm_year)
    at = None
    for year in (year, year - 1):
        try:
            at = time.mktime((year, int(month), int(day), int(hour),
                              int(minute), int(second), 0, 0, -1))
        except (OverflowError, ValueError):
            return None
        if match[1] or at < now + 86400:
            break
    return at + float(rest or 0)


class Row:
    """One report of the log.

    kind is "train" or "test", iteration the solver's iteration. values maps
    "loss" and "lr" (train) and the names of the net's outputs to numbers; the
    loss of a train row is the smoothed one. losses has the outputs that are
    losses, of the row's own iteration, and their weights: (value, weight).
    margins maps LargeMarginInnerProduct layers to what they last logged before
    the row: {"angle_mean": 40.1, "segments": [0.5, 0.5], ...}. net is the
    index of the test net, time when the row was logged (seconds since 1970) or
    None. layers are those of all nets, as far as the log has them.
    """

    # Which top of which type of layer has a value.
    _TOPS = {"accuracy": ("Accuracy", 0),
             "lambda": ("LargeMarginInnerProduct", 1)}

    def __init__(self, kind, iteration, net=0, at=None, layers=()):
        self.kind, self.iteration, self.net = kind, iteration, net
        self.time, self.layers = at, layers
        self.values, self.losses, self.margins = {}, {}, {}

    def find(self, word):
        """The loss, accuracy, lambda or lr, or None.

        A test's loss is the sum of its losses, as that of a train row is. The
        accuracy is NaN where that is. Of several accuracies it is that of a
        margin layer's logits, and that of the least top_k. Where the log does
        not tell what a value is, the first one whose name contains the word in
        any case counts.
        """
        if word == "loss" and self.kind == "test" and self.losses:
            return sum(value * weight for value, weight
                       in self.losses.values())
        if word == "accuracy" and math.isnan(self.find("loss") or 0):
            return math.nan  # Caffe's Accuracy takes NaN for right
        kind, at = self._TOPS.get(word, ("", 0))
        layer = self._layer(kind, at)
        if layer:
            return self.values[layer.tops[at]]
        for name, value in self.values.items():
            if word in name.lower():
                return value
        return None

    def _layer(self, kind, at):
        """The layer of that type whose top has a value, or None."""
        logits = {top for layer in self.layers
                  if layer.type == "LargeMarginInnerProduct"
                  for top in layer.tops}

        def rank(layer):
            top_k = layer.fields.get("top_k", "1")
            return (not logits & set(layer.bottoms[:1]),
                    int(top_k) if top_k.isdecimal() else 1)
        return min((layer for layer in self.layers if layer.type == kind and
                    set(layer.tops[at:at + 1]) & set(self.values)),
                   key=rank, default=None)

    def lambda_layer(self):
        """The name of the layer that find("lambda") is of, or None."""
        layer = self._layer(*self._TOPS["lambda"])
        return layer and layer.name

    def descent(self):
        """lambda, by the net's output or else by a layer's line, or None."""
        value = self.find("lambda")
        for margin in self.margins.values():
            value = margin["lambda"] if value is None else value
        return value

    def columns(self):
        """All that the row has, by the names of the table's columns."""
        head = self.kind if not self.net else "%s%d" % (self.kind, self.net)
        found = {"%s/%s" % (head, name): value
                 for name, value in self.values.items()}
        for layer, margin in self.margins.items():
            for name, value in margin.items():
                one = "margin/%s/%s" % (layer, name)
                if isinstance(value, list):
                    # segments: segment_0, segment_1, ...
                    found.update(("%s_%d" % (one[:-1], i), v)
                                 for i, v in enumerate(value))
                else:
                    found[one] = value
        return found


def _margin(text):
    """What a layer's line says as a dict, or None where it is cut short."""
    found = {}
    for item in text.strip().split(", "):
        name, _, values = item.partition(" = ")
        try:
            values = [float(value) for value in values.split(" ")]
        except ValueError:
            return None
        found[name] = values if name.endswith("s") and name in (
            "segments", "angle_deciles") else values[0]
    whole = "not_finite" in found and (
        not found["samples"] or len(found.get("angle_deciles", [])) == 11)
    return found if whole else None


def read_rows(lines, on_other=None, head=None):
    """Yields a Row as soon as the log has all of it.

    on_other, if given, is called with every line that belongs to no row, and
    then a Head takes it: head, if given.
    """
    row, margins, head = None, {}, head or Head()
    for line in lines:
        loss, testing = _LOSS.search(line), _TESTING.search(line)
        if loss or testing:
            if row:
                yield row
            if loss:
                row = Row("train", int(loss[1]), at=_wall_time(line),
                          layers=head.all_layers)
                row.values["loss"] = float(loss[2])
                row.margins, margins = margins, {}
            else:
                row = Row("test", int(testing[1]), int(testing[2]),
                          _wall_time(line), head.all_layers)
            continue
        output, rate = _OUTPUT.search(line), _RATE.search(line)
        margin = _MARGIN.search(line)
        if output and row and output[1].lower() == row.kind:
            # setdefault: the smoothed loss is there before the plain one, and
            # an output of several values keeps its first.
            row.values.setdefault(output[2], float(output[3]))
            if output[4]:
                row.losses.setdefault(output[2],
                                      (float(output[3]), float(output[4])))
        elif rate and row and row.kind == "train":
            row.values["lr"] = float(rate[1])
            yield row
            row = None
        elif margin:
            values = _margin(margin[3])
            if values:
                margins[margin[1]] = {"pass": int(margin[2]), **values}
        else:
            if begins(line):
                if row:
                    yield row
                row, margins = None, {}  # of a training that was cut short
            if on_other:
                on_other(line)
            head.take(line)
    if row:
        yield row


def begins(line):
    """Whether a line is the first of a training's."""
    return "] Initializing solver from parameters" in line


def snapshot(line):
    """The model that a line says is written, or None."""
    match = _SNAPSHOT.search(line)
    return match and match[1].strip()


def state(line):
    """The solver state that a line says is written, or None."""
    match = _STATE.search(line)
    return match and match[1].strip()


def restored(line):
    """The solver state that a line says the training goes on from, or None."""
    match = _RESTORED.search(line)
    return match and match[1].strip()


class Layer:
    """A layer of a net: its name, type, bottoms, tops, and the
    fields of its parameters, {"num_output": "10"}."""

    def __init__(self):
        self.name, self.type = "", ""
        self.bottoms, self.tops, self.fields = [], [], {}

    def take(self, path, name, value):
        """Takes a field of the layer or of a message in it."""
        lists = {"bottom": self.bottoms, "top": self.tops}
        if not path and name in lists:
            lists[name].append(value)
        elif not path and name in ("name", "type"):
            setattr(self, name, value)
        elif len(path) == 1 and path[0].endswith("_param"):
            self.fields.setdefault(name, value)


class Head:
    """What the log says before the training begins: the solver's fields and
    the layers of the training net (all_layers: of the test nets, too)."""

    _FIELD = re.compile(r"\s*(\w+): (.*)")
    _OPEN = re.compile(r"\s*(\w+) {")

    def __init__(self):
        self.solver, self.layers, self.all_layers = {}, [], []
        self._part, self._path, self._nets = None, [], 0

    def take(self, line):
        """Takes a line that is part of no row."""
        if _TIME.match(line):
            self._path = []
            if begins(line):
                self._part = "solver"
                self.solver, self.layers, self.all_layers = {}, [], []
                self._nets = 0
            elif "] Initializing net from parameters" in line:
                self._part = "net"
                self._nets += 1
            else:
                self._part = None
            return
        if not self._part and not self.solver:
            # The head's first line may be cut off.
            self._part = "solver"
        if not self._part:
            return
        opened, field = self._OPEN.match(line), self._FIELD.match(line)
        if opened:
            self._path.append(opened[1])
            if self._part == "net" and self._path == ["layer"]:
                self.all_layers.append(Layer())
                if self._nets == 1:
                    self.layers.append(self.all_layers[-1])
        elif line.strip() == "}":
            del self._path[-1:]
        elif field:
            value = field[2].strip().strip('"')
            if self._part == "solver" and not self._path:
                self.solver.setdefault(field[1], value)
            elif self._part == "net" and self._path[:1] == ["layer"]:
                self.all_layers[-1].take(self._path[1:], field[1], value)

    @property
    def max_iter(self):
        """The solver's max_iter, or None."""
        return self.integer("max_iter", None)

    def integer(self, field, default):
        """A whole number of the solver's."""
        value = self.solver.get(field, "")
        return int(value) if value.isdecimal() else default

    def margins(self):
        """The LargeMarginInnerProduct layers of the training net."""
        return [layer for layer in self.layers
                if layer.type == "LargeMarginInnerProduct"]

    def normalises(self):
        """Whether a layer of the training net is batch normalisation."""
        return any(layer.type in ("BN", "BatchNorm", "CuDNNBatchNorm")
                   for layer in self.layers)


class History:
    """All rows of a log; where training went back, the later run counts."""

    def __init__(self, lines):
        self.train, self.tests = [], {}
        for row in read_rows(lines):
            # A test that a stop cut short has no outputs.
            if row.kind == "test" and not row.values:
                continue
            rows = (self.train if row.kind == "train"
                    else self.tests.setdefault(row.net, []))
            for others in [self.train, *self.tests.values()]:
                while others and others[-1].iteration >= row.iteration + (
                        others is not rows):
                    others.pop()
            rows.append(row)

    @property
    def test(self):
        """The rows of the first test net."""
        return self.tests.get(0, [])

    def curve(self, kind, word):
        """(iterations, values) of what Row.find calls word."""
        rows = self.train if kind == "train" else self.test
        return self._points(rows, lambda row: row.find(word))

    def accuracies(self):
        """(iterations, values) of the test accuracy."""
        return self.curve("test", "accuracy")

    def descent(self):
        """(iterations, values) of lambda."""
        return self._points(self.train, Row.descent)

    def margins(self):
        """The names of the layers that log angles, in their order."""
        return list(dict.fromkeys(
            name for row in self.train for name in row.margins))

    def margin(self, layer, name):
        """(iterations, values) of what a layer logs under a name."""
        return self._points(
            self.train, lambda row: row.margins.get(layer, {}).get(name))

    @staticmethod
    def _points(rows, value):
        points = [(row.iteration, value(row)) for row in rows]
        points = [point for point in points if point[1] is not None]
        return [p[0] for p in points], [p[1] for p in points]

    def rows(self):
        """All rows by iteration, at each the train row first."""
        tests = [row for net in sorted(self.tests) for row in self.tests[net]]
        return sorted(self.train + tests, key=lambda row: row.iteration)

    def table(self):
        """The head and the rows of the table: lists of its cells."""
        cells = {}
        for row in self.rows():
            cells.setdefault(row.iteration, {}).update(row.columns())
        groups = ("train", "test", "margin")
        names = list(dict.fromkeys(
            name for row in cells.values() for name in row))
        # Sorting leaves the order inside a group as it is.
        names.sort(key=lambda name: groups.index(
            re.match(r"[a-z]+", name)[0]))
        return [HEAD] + names, [
            [str(iteration)] + [number(row.get(name)) for name in names]
            for iteration, row in cells.items()]


def read_history(path):
    """The History of the log at path; ends the program where it is none."""
    try:
        with open(path, errors="replace") as lines:
            history = History(lines)
    except OSError as error:
        sys.exit("error: cannot read %s: %s" % (path, error.strerror))
    if not history.train and not history.test:
        sys.exit("error: %s is no log of `caffe train`, or its training never "
                 "began: it has no line \"Iteration N, loss = ...\"" % path)
    return history


def write_csv(history, path):
    """Writes the table; path appears only whole. Returns its size."""
    head, rows = history.table()
    # Beside a pipe or a terminal, no file can be put in its place.
    in_place = os.path.exists(path) and not os.path.isfile(path)
    part = path if in_place else path + ".part"
    try:
        with open(part, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(head)
            writer.writerows(rows)
        if not in_place:
            os.replace(part, path)
    finally:
        if not in_place and os.path.exists(part):
            os.remove(part)
    return len(rows), len(head)


def may_write(path):
    """Whether nothing is lost if a table is written to path."""
    if not os.path.isfile(path) or not os.path.getsize(path):
        return True
    with open(path, "rb") as file:
        return file.read(len(HEAD) + 1) == HEAD.encode() + b","


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", metavar="LOG",
                        help="what `caffe train` wrote to stderr")
    parser.add_argument("--csv", metavar="FILE", required=True,
                        help="where the table goes")
    with user_errors():
        run(parser.parse_args())


def run(args):
    history = read_history(args.log)
    try:
        if not may_write(args.csv):
            sys.exit("error: %s is there, and no table of this program: name "
                     "another FILE" % args.csv)
        rows, columns = write_csv(history, args.csv)
    except OSError as error:
        sys.exit("error: cannot write %s: %s" % (args.csv, error.strerror))
    print("made %s: %d rows of %d columns" % (args.csv, rows, columns))


if __name__ == "__main__":
    main()
