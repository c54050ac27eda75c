"""Reads the log of `caffe train`.

Caffe's own tools/extra/parse_log.py needs Python 2 and refuses a log whose
rows differ in their columns.
"""
import math
import re

_NUMBER = r"([-+]?(?:nan|inf|[\d.]+(?:e[-+]?\d+)?))"
_LOSS = re.compile(r"\] Iteration (\d+)(?: \(.*\))?, loss = " + _NUMBER, re.I)
_TESTING = re.compile(r"\] Iteration (\d+), Testing net \(#(\d+)\)")
_RATE = re.compile(r"\] Iteration \d+, lr = " + _NUMBER, re.I)
_OUTPUT = re.compile(
    r"\]     (Train|Test) net output #\d+: (\S+) = " + _NUMBER, re.I)
_MAX_ITER = re.compile(r"^max_iter: (\d+)")

# SoftmaxWithLoss clamps a probability at FLT_MIN: -log(FLT_MIN).
SATURATED_LOSS = 87.3365


def is_diverged(loss):
    """True for the loss of a net that no longer learns."""
    return not math.isfinite(loss) or abs(loss - SATURATED_LOSS) < 1e-3


def duration(seconds):
    """A time as h:mm:ss."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    return "%d:%02d:%02d" % (*divmod(minutes, 60), seconds)


class Row:
    """One report of the log.

    kind is "train" or "test", iteration the solver's iteration. values maps
    "loss" and "lr" (train) and the names of the net's outputs to numbers; the
    loss of a train row is the smoothed one. net is the index of the test net.
    """

    def __init__(self, kind, iteration, net=0):
        self.kind, self.iteration, self.net = kind, iteration, net
        self.values = {}

    def find(self, word):
        """The first value whose name contains word in any case, or None."""
        for name, value in self.values.items():
            if word in name.lower():
                return value
        return None


def read_rows(lines, on_other=None):
    """Yields a Row as soon as the log has all of it.

    on_other, if given, is called with every line that belongs to no row.
    """
    row = None
    for line in lines:
        loss, testing = _LOSS.search(line), _TESTING.search(line)
        if loss or testing:
            if row:
                yield row
            if loss:
                row = Row("train", int(loss[1]))
                row.values["loss"] = float(loss[2])
            else:
                row = Row("test", int(testing[1]), int(testing[2]))
            continue
        output, rate = _OUTPUT.search(line), _RATE.search(line)
        if output and row and output[1].lower() == row.kind:
            # setdefault: the smoothed loss is there before the plain one, and
            # an output of several values keeps its first.
            row.values.setdefault(output[2], float(output[3]))
        elif rate and row and row.kind == "train":
            row.values["lr"] = float(rate[1])
            yield row
            row = None
        elif on_other:
            on_other(line)
    if row:
        yield row


def max_iter(line):
    """The solver's max_iter if line (of the log's head) tells it, or None."""
    match = _MAX_ITER.match(line)
    return int(match[1]) if match else None


class History:
    """All rows of a log; where training went back, the later run counts."""

    def __init__(self, lines):
        self.train, self.test = [], []
        for row in read_rows(lines):
            # A test that a stop cut short has no outputs.
            if row.kind == "test" and (row.net != 0 or not row.values):
                continue
            rows = self.train if row.kind == "train" else self.test
            while rows and rows[-1].iteration >= row.iteration:
                rows.pop()
            rows.append(row)

    def curve(self, kind, word):
        """(iterations, values) of the first value named like word."""
        rows = self.train if kind == "train" else self.test
        points = [(r.iteration, r.find(word)) for r in rows]
        points = [p for p in points if p[1] is not None]
        return [p[0] for p in points], [p[1] for p in points]

    def accuracies(self):
        """(iterations, values) of the test accuracy."""
        return self.curve("test", "accuracy")
