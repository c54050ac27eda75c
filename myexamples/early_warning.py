"""Tells early from the log of `caffe train` that a training goes wrong."""
import math

from caffe_log import SATURATED_LOSS, is_diverged

# Judged on the logs of trainings that learn: these limits are well beyond
# what those come to (tests/examples/test_early_warning.py).

# Rows in a row that a rising loss, or one near ln(classes), must have.
RISING, SITTING = 3, 4
# What the loss must rise by in those, and the share of ln(classes) that it
# must come to: with a falling lambda it rises a little, as it should.
RISE, HIGH = 1.5, 0.5
# By so many degrees the mean angle falls where features follow the margin.
TURN = 1
# Between these shares of ln(classes) a loss is that of guessing (with all of
# the margin of m = 4 a net of ten classes sits at 0.8), where it has fallen by
# less than FLAT in SITTING rows and in this share of max_iter.
GUESSING, FLAT, SPAN = (0.75, 1.05), 0.03, 0.02
# A loss of this many times ln(classes) and that of the start is no loss of a
# training that learns.
LEAP_OF_LOSS = 2
# What the mean norm of the features grows to, from its least and from one row
# to the next.
GROWTH, LEAP = 20, 4
# From this lambda on the margin has less than a tenth of the weight.
PLAIN = 9


class Alarm:
    """What is wrong, in one line that names the iteration, the likely cause
    and what to change.

    cause is "rate" (the learning rate), "norm" (the features' size) or
    "descent" (of lambda). good is the last iteration that was still as it
    should be, or None.
    """

    def __init__(self, kind, iteration, good, cause, text):
        self.kind, self.iteration, self.good = kind, iteration, good
        self.cause, self.text = cause, text

    def __str__(self):
        return "warning: iteration %d: %s" % (self.iteration, self.text)


class EarlyWarning:
    """Judges the rows of a log as they come; head is what stands before."""

    def __init__(self, head):
        self._head = head
        self._rows = []
        self._raised = set()

    def add(self, row):
        """The Alarms that a row raises: of each kind one a training."""
        if row.kind != "train":
            return []
        if self._rows and row.iteration <= self._rows[-1].iteration:
            self._rows = []  # another training, or this one from before
        self._rows.append(row)
        alarms = []
        for check in (self._saturated, self._not_finite, self._exploding,
                      self._leaping, self._rising, self._guessing):
            alarm = check()
            # One cause has many symptoms: the first tells.
            if alarm:
                if alarm.kind not in self._raised and not alarms:
                    alarms.append(alarm)
                self._raised.add(alarm.kind)
        return alarms

    # ---- What the rows say ----

    def _guess(self):
        """ln(classes): the loss of a net that guesses, or None."""
        counts = {layer.fields.get("num_output", "")
                  for layer in self._head.margins()}
        count = counts.pop() if len(counts) == 1 else ""
        return math.log(int(count)) if count.isdecimal() and int(
            count) > 1 else None

    def _loss(self, row):
        """The smoothed loss without its weight, or where it is a sum that of
        the margin."""
        if len(row.losses) <= 1:
            weights = [weight for _, weight in row.losses.values()]
            return row.values["loss"] / (weights and weights[0] or 1)
        heads = {layer.tops[0] for layer in self._head.margins()
                 if layer.tops}
        for layer in self._head.layers:
            if (layer.type == "SoftmaxWithLoss" and heads & set(layer.bottoms)
                    and layer.tops and layer.tops[0] in row.losses):
                return row.losses[layer.tops[0]][0]
        return row.values["loss"]

    def _losses(self, count):
        """The losses of the last rows, or none where there are fewer."""
        rows = self._rows[-count:]
        return [self._loss(row) for row in rows] if len(rows) == count else []

    # ---- The cause ----

    def _blame(self):
        """The likely cause of a loss that blew up, and its words."""
        row = self._rows[-1]
        descent, rate = row.descent(), row.values.get("lr")
        rate = self._rate(rate)
        if descent is not None and descent < PLAIN:
            return "descent", (
                "lambda has come down to %.4g, likely too fast: let it fall "
                "more slowly (a smaller gamma, a larger base or a lambda_min; "
                "myexamples/plot_lambda.py draws it)" % descent)
        spared = "" if descent is None else (
            "lambda is still %.4g, so it is not the margin; " % descent)
        if self._head.layers and not self._head.normalises():
            return "norm", (
                "%slikely nothing bounds the features: put BN before the "
                "margin layer, or lower base_lr%s" % (spared, rate))
        return "rate", "%slikely the learning rate is too high: lower " \
            "base_lr%s" % (spared, rate)

    @staticmethod
    def _rate(rate):
        return " (it is at %.4g) to a tenth" % rate if rate else ""

    # ---- The checks ----

    def _before(self):
        """The iteration of the row before the last, or None."""
        return self._rows[-2].iteration if len(self._rows) > 1 else None

    def _saturated(self):
        row = self._rows[-1]
        losses = [row.values["loss"]] + [
            value for value, _ in row.losses.values()]
        bad = [loss for loss in losses if is_diverged(loss)]
        if not bad:
            return None
        cause, words = self._blame()
        return Alarm(
            "saturated", row.iteration, self._before(), cause,
            "the loss is %g%s, so the net has stopped learning: %s" % (
                bad[0], " (-log of the smallest float)"
                if abs(bad[0] - SATURATED_LOSS) < 1 else "", words))

    def _not_finite(self):
        row = self._rows[-1]
        for layer, margin in row.margins.items():
            if margin["not_finite"]:
                cause, words = self._blame()
                return Alarm(
                    "saturated", row.iteration, self._before(), cause,
                    "%d of %d samples of layer '%s' have features or weights "
                    "that are infinite or NaN: %s" % (
                        margin["not_finite"],
                        margin["not_finite"] + margin["samples"]
                        + margin["zero"], layer, words))
        return None

    def _exploding(self):
        for layer in self._rows[-1].margins:
            rows = [row for row in self._rows
                    if row.margins.get(layer, {}).get("feature_norm")]
            norms = [row.margins[layer]["feature_norm"] for row in rows]
            if len(norms) < 2:
                continue
            # Features in a plane grow as much, but their loss falls.
            if (norms[-1] > GROWTH * min(norms)
                    and norms[-1] > LEAP * norms[-2]
                    and not self._loss(rows[-1]) < self._loss(rows[-2])):
                cause, words = self._blame()
                return Alarm(
                    "exploding", rows[-1].iteration, rows[-2].iteration,
                    cause, "the features of layer '%s' explode: their mean "
                    "norm went from %.4g to %.4g since iteration %d: %s" % (
                        layer, norms[-2], norms[-1], rows[-2].iteration,
                        words))
        return None

    def _leaping(self):
        """A loss far above that of guessing and of the start."""
        guess, loss = self._guess(), self._loss(self._rows[-1])
        if guess is None or len(self._rows) < 2:
            return None
        descent = self._rows[-1].descent()
        # A margin that has weight puts even a net that learns that high.
        if (not loss > LEAP_OF_LOSS * max(guess, self._loss(self._rows[0]))
                or descent is not None and descent < PLAIN):
            return None
        cause, words = self._blame()
        return Alarm(
            "leaping", self._rows[-1].iteration, self._before(), cause,
            "the loss is %.4g, far above ln(classes) = %.4g, that of guessing:"
            " %s" % (loss, guess, words))

    def _rising(self):
        losses, guess = self._losses(RISING + 1), self._guess()
        if not losses or guess is None:
            return None
        rows = self._rows[-RISING - 1:]
        rises = all(a < b for a, b in zip(losses, losses[1:]))
        descents = [row.descent() for row in rows]
        falls = None not in descents and descents[0] > descents[-1]
        if not (rises and falls and losses[-1] > RISE * losses[0]
                and losses[-1] > HIGH * guess) or self._turning(rows):
            return None
        return Alarm(
            "rising", rows[-1].iteration, rows[0].iteration, "descent",
            "the loss rises from %.4g to %.4g while lambda falls from %.4g to "
            "%.4g: lambda likely falls too fast: let it fall more slowly (a "
            "smaller gamma, a larger base or a lambda_min; "
            "myexamples/plot_lambda.py draws it)" % (
                losses[0], losses[-1], descents[0], descents[-1]))

    @staticmethod
    def _turning(rows):
        """Whether the features turn to the weights of their classes: then
        they follow the margin, however high the loss is."""
        def angles(row):
            return [margin["angle_mean"] for margin in row.margins.values()
                    if "angle_mean" in margin]
        first, last = angles(rows[0]), angles(rows[-1])
        return bool(last) and len(first) == len(last) and all(
            b < a - TURN for a, b in zip(first, last))

    def _guessing(self):
        """A loss that stays where a net that guesses has it. At iteration 0
        it is there rightly; a net of many classes leaves it slowly."""
        guess = self._guess()
        rows = self._rows[-SITTING - 1:]
        if guess is None or len(rows) <= SITTING:
            return None
        losses = [self._loss(row) for row in rows]
        span = rows[-1].iteration - rows[0].iteration
        low, high = (share * guess for share in GUESSING)
        if not (rows[0].iteration > 0
                and span >= SPAN * (self._head.max_iter or 0)
                and all(low <= loss <= high for loss in losses)
                and losses[-1] > (1 - FLAT) * max(losses)):
            return None
        # It may have been lower once.
        learned = [row.iteration for row in self._rows
                   if self._loss(row) < low]
        start = next((row.iteration for row in self._rows if
                      row.descent() is not None and row.descent() < 1), None)
        if start is not None and start <= rows[0].iteration:
            cause, words = "descent", (
                "lambda was under 1 at iteration %d, likely too early: start "
                "again with a larger base or a smaller gamma "
                "(myexamples/plot_lambda.py draws it)" % start)
        else:
            cause, words = self._blame()
        return Alarm(
            "guessing", rows[-1].iteration, learned[-1] if learned else None,
            cause, "the loss sits at %.4g since iteration %d, near ln(classes)"
            " = %.4g, that of guessing: %s" % (
                losses[-1], rows[0].iteration, guess, words))
