"""When a training that goes wrong is told from one that learns.

The logs in the folder logs are what real trainings on MNIST wrote, without the
lines that nobody reads here.
"""
import math
import os
import subprocess
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, "myexamples"))
from caffe_log import Head, Layer, Row, read_rows  # noqa: E402
from early_warning import EarlyWarning  # noqa: E402

LOGS = os.path.join(os.path.dirname(__file__), "logs")


def judge(name, leave_out=""):
    """The alarms over a log; without the lines that have some text."""
    head = Head()
    early = EarlyWarning(head)
    with open(os.path.join(LOGS, name + ".log")) as lines:
        kept = [line for line in lines
                if not leave_out or leave_out not in line]
    return [alarm for row in read_rows(kept, head.take)
            for alarm in early.add(row)]


@pytest.mark.parametrize("name, kind, iteration, good, cause, words", [
    ("learning_rate", "exploding", 20, 0, "rate", [
        "explode", "from 11.5 to 3614", "lambda is still 349.2",
        "lower base_lr (it is at 2) to a tenth"]),
    ("gamma", "guessing", 160, None, "descent", [
        "sits at 1.868", "ln(classes) = 2.303",
        "a larger base or a smaller gamma"]),
    ("no_bn", "saturated", 20, 0, "norm", [
        "the loss is nan", "put BN before the margin layer"])])
def test_trainings_that_diverged(name, kind, iteration, good, cause, words):
    first = judge(name)[0]
    assert (first.kind, first.iteration, first.good, first.cause) == (
        kind, iteration, good, cause)
    for word in words:
        assert word in str(first)
    assert str(first).startswith("warning: iteration %d: " % iteration)
    assert "\n" not in str(first)
    # The loss alone tells, too.
    assert judge(name, leave_out=": pass ")


def learned():
    return sorted(name[:-4] for name in os.listdir(LOGS)
                  if name.startswith("learns_"))


def test_there_are_trainings_that_learned():
    assert len(learned()) >= 5


@pytest.mark.parametrize("name", learned())
def test_trainings_that_learned(name):
    assert [str(alarm) for alarm in judge(name)] == []
    # But for the one whose learning rate is a hundredth of what is good: the
    # loss alone cannot tell that the features follow the margin, slowly.
    if name != "learns_slowly":
        assert [str(alarm) for alarm in judge(name, ": pass ")] == []


# ---- Each check by itself ----

def margin_head(classes=10, types=("BN",)):
    head = Head()
    head.solver = {"max_iter": "1000"}
    for kind in (*types, "LargeMarginInnerProduct"):
        layer = Layer()
        layer.name = layer.type = kind
        layer.fields = {"num_output": str(classes)}
        layer.tops = ["logits"]
        head.layers.append(layer)
    return head


def kinds(losses, lambdas=None, norms=None, head=None):
    """(kind, row) of each alarm over displays of 100 iterations."""
    early, found = EarlyWarning(head or margin_head()), []
    for i, loss in enumerate(losses):
        row = Row("train", 100 * i)
        row.values = {"loss": loss, "lr": 0.1}
        row.losses = {"loss": (loss, 1)}
        if lambdas:
            row.values["lambda"] = lambdas[i]
        if norms:
            row.margins["ip2"] = {
                "not_finite": 0, "samples": 100, "zero": 0,
                "feature_norm": norms[i], "lambda": 1}
        found += [(alarm.kind, i) for alarm in early.add(row)]
    return found


FALLING = [100 / 2 ** i for i in range(12)]


@pytest.mark.parametrize("loss", [87.3365, 87.33654, math.nan, math.inf])
def test_a_saturated_loss(loss):
    assert kinds([2.3, 1, loss, loss]) == [("saturated", 2)]


def test_a_loss_of_one_iteration_that_the_mean_hides():
    row = Row("train", 0)
    row.values, row.losses = {"loss": 3}, {"loss": (87.3365, 1)}
    alarm, = EarlyWarning(margin_head()).add(row)
    assert alarm.kind == "saturated" and "87.3365" in str(alarm)


def test_a_loss_that_rises_as_lambda_falls():
    rising = [2.3, 0.2, 0.5, 1.0, 1.6, 1.9]
    assert kinds(rising, FALLING) == [("rising", 4)]
    # With lambda the loss rises a little; that is how it should be.
    assert kinds([2.3, 0.12, 0.14, 0.18, 0.24, 0.29], FALLING) == []
    # One step back is the noise of a batch.
    assert kinds([2.3, 0.2, 0.5, 1.0, 0.9, 1.6], FALLING) == []
    assert kinds(rising, [5] * 6) == []
    assert kinds(rising) == []


def test_a_loss_that_rises_as_the_features_turn():
    for first, last, raised in ((60, 55, 0), (60, 60, 1), (60, 70, 1)):
        early, alarms = EarlyWarning(margin_head()), []
        for i, loss in enumerate([0.2, 0.5, 1.0, 1.6]):
            row = Row("train", 100 * i)
            row.values = {"loss": loss, "lambda": FALLING[i]}
            row.margins["ip2"] = {
                "not_finite": 0, "samples": 9, "zero": 0, "feature_norm": 1,
                "angle_mean": first + (last - first) * i / 3}
            alarms += early.add(row)
        assert len(alarms) == raised


def test_a_loss_that_sits_at_that_of_guessing():
    assert kinds([2.3, 2.3, 2.29, 2.3, 2.3, 2.3]) == [("guessing", 5)]
    assert kinds([2.3, 1.86, 1.87, 1.85, 1.86, 1.85]) == [("guessing", 5)]
    faces = margin_head(10572)
    stuck = [9.6, 9.27, 9.26, 9.27, 9.28, 9.27]
    assert kinds(stuck, head=faces) == [("guessing", 5)]
    # It falls, if slowly; or is no longer near; or was there at the start.
    slow = [9.4, 9.25, 9.1, 9.0, 8.9, 8.7, 8.5, 8.2, 7.9, 7.7, 7.4, 7.1, 6.9]
    assert kinds(slow, head=faces) == []
    assert kinds([2.3, 1.7, 1.7, 1.7, 1.7, 1.7]) == []
    assert kinds([2.3, 2.3, 2.3, 2.3, 1.9, 1.2]) == []
    # Displays that are close together are no time to learn.
    head = margin_head()
    head.solver["max_iter"] = "1000000"
    assert kinds([2.3] * 6, head=head) == []


def test_a_net_that_had_learned_and_forgot():
    early, alarms = EarlyWarning(margin_head()), []
    for i, loss in enumerate([2.3, 0.5, 0.4, 2.3, 2.3, 2.3, 2.3, 2.3]):
        row = Row("train", 100 * i)
        row.values = {"loss": loss}
        alarms += early.add(row)
    assert [(a.kind, a.iteration, a.good) for a in alarms] == [
        ("guessing", 700, 200)]


def test_features_that_explode():
    fine = [2.3, 0.5, 0.4, 0.3, 0.3, 0.3]
    assert kinds([2.3, 0.5, 0.4, 0.6, 0.9, 2],
                 norms=[10, 12, 11, 300, 9e3, 1e6]) == [("exploding", 3)]
    # From next to nothing, and the loss falls.
    assert kinds(fine, norms=[0.1, 12, 60, 70, 80, 90]) == []
    # They grow, by and by.
    assert kinds(fine, norms=[10, 25, 60, 120, 240, 400]) == []
    assert kinds(fine, norms=[1, 12, 11, 13, 12, 12]) == []


def test_a_loss_beyond_that_of_the_start():
    assert kinds([2.7, 17.5, 30]) == [("leaping", 1)]
    # With all of the margin it may be high, at the start and later.
    assert kinds([51, 13, 2.6, 1.2, 0.4]) == []
    assert kinds([2.9, 6.8, 3.4, 1.9, 1.4], [125, 0.1, 0.01, 0, 0]) == []


def test_samples_that_are_not_finite():
    row = Row("train", 40)
    row.values = {"loss": 0.5, "lr": 0.1}
    row.margins["ip2"] = {"not_finite": 7, "samples": 93, "zero": 0,
                          "feature_norm": 3, "lambda": 5}
    alarm, = EarlyWarning(margin_head()).add(row)
    assert "7 of 100 samples of layer 'ip2'" in str(alarm)


def test_the_likely_cause():
    def first(lambdas, types=("BN",)):
        early = EarlyWarning(margin_head(types=types))
        row = Row("train", 0)
        row.values = {"loss": math.nan, "lr": 0.1, "lambda": lambdas}
        return early.add(row)[0]
    assert first(0.01).cause == "descent"
    assert "plot_lambda.py" in str(first(0.01))
    assert first(500).cause == "rate"
    assert "base_lr (it is at 0.1)" in str(first(500))
    assert first(500, types=("PReLU",)).cause == "norm"
    assert first(500, types=("BatchNorm",)).cause == "rate"


def test_the_loss_of_the_margin_where_there_are_several():
    head = margin_head()
    for name, bottom in (("center", "features"), ("softmax", "logits")):
        layer = Layer()
        layer.type, layer.bottoms, layer.tops = (
            "SoftmaxWithLoss" if name == "softmax" else "EuclideanLoss",
            [bottom, "label"], [name])
        head.layers.append(layer)
    early, alarms = EarlyWarning(head), []
    for i in range(6):
        row = Row("train", 100 * i)
        # A sum that happens to be that of guessing, of one that learns.
        row.values = {"loss": 2.3}
        row.losses = {"center": (100.0, 0.02), "softmax": (0.3, 1.0)}
        alarms += early.add(row)
    assert alarms == []


def test_a_loss_without_its_weight():
    early = EarlyWarning(margin_head())
    for i in range(6):
        row = Row("train", 100 * i)
        # A tenth of what the log says: far from that of guessing.
        row.values, row.losses = {"loss": 2.3}, {"loss": (0.23, 10)}
        assert early.add(row) == []


def test_a_log_without_its_head_is_judged_by_what_it_has():
    assert kinds([2.3] * 9, FALLING, head=Head()) == []
    assert kinds([2.3, math.nan], head=Head()) == [("saturated", 1)]


def test_a_training_that_starts_again_is_judged_afresh():
    early = EarlyWarning(margin_head())
    for iteration, norm in ((0, 10), (100, 12), (0, 900), (100, 950)):
        row = Row("train", iteration)
        row.values = {"loss": 1}
        row.margins["ip2"] = {"not_finite": 0, "samples": 9, "zero": 0,
                              "feature_norm": norm, "lambda": 1}
        assert early.add(row) == []


def test_watch_prints_the_warning_below_its_row():
    with open(os.path.join(LOGS, "learning_rate.log")) as log:
        done = subprocess.run(
            [os.path.join(ROOT, "myexamples/watch_training.py")], stdin=log,
            text=True, stdout=subprocess.PIPE, timeout=60)
    lines = done.stdout.splitlines()
    warnings = [i for i, line in enumerate(lines) if "warning: " in line]
    assert done.returncode == 0 and len(warnings) == 2
    assert lines[warnings[0] - 1].split()[0] == "20/400"
    assert "3614" in lines[warnings[0] - 1]
    # NaN rows still have their line.
    assert any(line.split()[:2] == ["60/400", "nan"] for line in lines)
