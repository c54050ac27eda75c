"""What the margin layer logs with LSOFTMAX_LOG_EVERY, in real trainings."""

import re
import sys

import numpy as np
import pytest

import caffe
from caffe_e2e import (
    CAFFE, IP1, LOSS, ROOT, data_layer, fatal_message, margin_layer,
    run_caffe, write_net, write_solver)

sys.path.insert(0, str(ROOT / "myexamples"))
from caffe_log import History  # noqa: E402

LINE = r"^I.*\] LargeMarginInnerProduct layer 'ip2': pass (\d+), "
NET = data_layer() + IP1 + margin_layer(
    "margin: 3 base: 100 gamma: 0.5 power: 2") + LOSS


def train(folder, net=NET, options=(), **solver):
    write_net(folder, net)
    path = write_solver(folder, **solver)
    return run_caffe("train", "--solver=%s" % path, *options, cwd=folder)


def passes(log):
    return [int(number) for number in re.findall(LINE, log, re.M)]


def by_numpy(x, w, labels, logits, m):
    """What the line must say, by the definitions."""
    x, w, logits = (np.asarray(v, "f8") for v in (x, w, logits))
    labels = labels.astype(int)
    nx = np.linalg.norm(x, axis=1)
    nw = np.linalg.norm(w, axis=1)[labels]
    theta = np.arccos(np.clip((x * w[labels]).sum(1) / nx / nw, -1, 1))
    k = np.minimum(np.floor(m * theta / np.pi), m - 1)
    psi = (-1) ** k * np.cos(m * theta) - 2 * k
    others = logits.copy()
    others[np.arange(len(x)), labels] = -np.inf
    degrees = np.degrees(theta)
    return {
        "samples": len(x), "ignored": 0, "zero": 0, "not_finite": 0,
        "angle_mean": degrees.mean(), "angle_p95": np.percentile(degrees, 95),
        "feature_norm": nx.mean(),
        "weight_norm": np.linalg.norm(w[np.unique(labels)], axis=1).mean(),
        "holds": (nx * nw * psi >= others.max(1)).mean(),
        "segments": [(k == i).mean() for i in range(m)],
        "angle_deciles": np.percentile(degrees, range(0, 101, 10))}


def test_the_line_is_what_numpy_makes_of_the_blobs(data, monkeypatch):
    monkeypatch.setenv("LSOFTMAX_LOG_EVERY", "5")
    log = train(data, display=5, max_iter=12, snapshot=5)
    assert passes(log) == [1, 6, 11]
    history = History(log.splitlines(True))
    rows = {row.iteration: row for row in history.train}
    assert sorted(rows) == [0, 5, 10]
    for iteration in (5, 10):
        found = dict(rows[iteration].margins["ip2"])
        net = caffe.Net("net.prototxt", caffe.TRAIN,
                        weights="snap_iter_%d.caffemodel" % iteration)
        # Two batches in turns.
        for _ in range(iteration % 2 + 1):
            net.forward()
        blobs = {name: net.blobs[name].data for name in (
            "ip1", "label", "ip2")}
        want = by_numpy(blobs["ip1"], net.params["ip2"][0].data,
                        blobs["label"], blobs["ip2"], 3)
        assert found.pop("pass") == iteration + 1
        assert found.pop("lambda") == pytest.approx(
            rows[iteration].values["lambda"], rel=1e-5)
        assert set(found) == set(want)
        for name, value in want.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-3)


def test_off_without_the_variable(data, monkeypatch):
    monkeypatch.delenv("LSOFTMAX_LOG_EVERY", raising=False)
    assert passes(train(data)) == []
    for off in ("", "0"):
        monkeypatch.setenv("LSOFTMAX_LOG_EVERY", off)
        assert passes(train(data)) == []


def test_iter_size_and_resume_keep_to_the_displays(data, monkeypatch):
    monkeypatch.setenv("LSOFTMAX_LOG_EVERY", "8")
    log = train(data, display=4, max_iter=6, iter_size=2, snapshot=6)
    assert passes(log) == [1, 9]
    log = train(data, display=4, max_iter=12, iter_size=2,
                options=["--snapshot=snap_iter_6.solverstate"])
    assert passes(log) == [17, 25]
    rows = History(log.splitlines(True)).train
    assert [(row.iteration, [m["pass"] for m in row.margins.values()])
            for row in rows] == [(8, [17]), (12, [25])]


def test_each_head_names_itself(data, monkeypatch):
    monkeypatch.setenv("LSOFTMAX_LOG_EVERY", "1")
    head = (margin_layer("margin: 2", tops=("ip3",))
            .replace('name: "ip2"', 'name: "a \'quoted\', head"'))
    loss = LOSS.replace('"loss"\n', '"loss3"\n').replace(
        'name: "loss"', 'name: "loss3"').replace('"ip2"', '"ip3"').replace(
        'top: "loss"', 'top: "loss3"')
    log = train(data, NET + head + loss, max_iter=2)
    history = History(log.splitlines(True))
    assert history.margins() == ["ip2", "a 'quoted', head"]
    assert len(history.margin("a 'quoted', head", "segments")[1][0]) == 2


def test_ignored_zero_and_not_finite_samples_are_counted(data, monkeypatch):
    monkeypatch.setenv("LSOFTMAX_LOG_EVERY", "1")
    net = NET.replace("margin: 3", "margin: 3 ignore_label: 2")
    ignored = History(train(data, net, max_iter=1).splitlines(True)).train[0]
    found = ignored.margins["ip2"]
    assert (found["samples"], found["ignored"]) == (12, 4)
    zeros = NET.replace(
        'num_output: 6\n    weight_filler { type: "xavier" }',
        'num_output: 6\n    weight_filler { type: "constant" value: 0 }')
    found = History(train(data, zeros, max_iter=1).splitlines(True)
                    ).train[0].margins["ip2"]
    assert found == {"pass": 1, "lambda": found["lambda"], "samples": 0,
                     "ignored": 0, "zero": 16, "not_finite": 0}
    nan = zeros.replace("value: 0", "value: nan", 1)
    found = History(train(data, nan, max_iter=1).splitlines(True)
                    ).train[0].margins["ip2"]
    assert (found["samples"], found["not_finite"]) == (0, 16)


def test_only_the_training_net_tells(data, monkeypatch):
    monkeypatch.setenv("LSOFTMAX_LOG_EVERY", "1")
    log = train(data, max_iter=2, test_iter=3, test_interval=1)
    # Caffe ends with a pass of the training net for its last display.
    assert passes(log) == [1, 2, 3]


@pytest.mark.parametrize("value", ["-1", "1.5", "often", "1e3", "10 20"])
def test_a_bad_number_is_one_clear_error(data, monkeypatch, value):
    monkeypatch.setenv("LSOFTMAX_LOG_EVERY", value)
    write_net(data, NET)
    write_solver(data)
    message = fatal_message(
        [CAFFE, "train", "--solver=solver.prototxt"], data)
    assert ("LargeMarginInnerProduct layer 'ip2': LSOFTMAX_LOG_EVERY: '%s' is "
            "no number of forward passes" % value) in message
