"""What watch_training.py and plot_training.py make of a log of Caffe."""
import math
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, "myexamples"))
from caffe_log import History, duration, is_diverged  # noqa: E402

LOG = os.path.join(os.path.dirname(__file__), "train.log")


def read_log():
    with open(LOG) as file:
        return file.read().splitlines(True)


def watch(lines):
    return subprocess.run(
        [os.path.join(ROOT, "myexamples/watch_training.py")],
        input="".join(lines), universal_newlines=True, timeout=60,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def plot(*args):
    return subprocess.run(
        [os.path.join(ROOT, "myexamples/plot_training.py"), *map(str, args)],
        universal_newlines=True, timeout=60, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)


def test_curves():
    history = History(read_log())
    assert history.curve("train", "loss") == ([0, 100, 200], [2.51, .71, .3])
    assert history.curve("train", "lambda") == ([0, 100], [995.01, 1.25e-05])
    assert history.curve("train", "lr") == ([0, 100], [0.05, 0.005])
    assert history.curve("test", "loss") == ([0, 100, 200], [2.34, .6, .34])
    assert history.accuracies() == ([0, 100, 200], [.1034, .8012, .9034])


def test_resumed_run_replaces_what_it_did_again():
    lines = read_log()
    resumed = [line.replace("0.71", "0.72").replace("0.8012", "0.8100")
               for line in lines[14:]]
    history = History(lines + resumed)
    assert history.curve("train", "loss") == ([0, 100, 200], [2.51, .72, .3])
    assert history.accuracies() == ([0, 100, 200], [.1034, .81, .9034])


def test_test_cut_short_has_no_accuracy():
    history = History(read_log()[:15])
    assert history.accuracies() == ([0], [.1034])


def test_nan_loss():
    lines = [line.replace("loss = 0.71", "loss = -nan")
             for line in read_log()]
    losses = History(lines).curve("train", "loss")[1]
    assert math.isnan(losses[1]) and is_diverged(losses[1])


def test_watch_shows_each_report_once():
    done = watch(read_log())
    assert done.returncode == 0 and done.stderr == ""
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert rows[0] == ["0/200", "2.51", "995", "2.34", "0.1034"]
    assert rows[1][:5] == ["100/200", "0.71", "1.25e-05", "0.6", "0.8012"]
    assert re.match(r"\d+:\d\d:\d\d$", rows[1][5])
    assert rows[2] == ["snapshot", "a", "folder/x_iter_200.caffemodel"]
    assert rows[3][:2] == ["200/200", "0.3"]
    assert rows[4][:3] == ["200/200", "0.34", "0.9034"]
    assert len(rows) == 5


@pytest.mark.parametrize("loss", ["87.3365", "nan", "inf"])
def test_watch_warns_of_divergence_once(loss):
    done = watch([line.replace("loss = 2.51", "loss = " + loss)
                  .replace("loss = 0.71", "loss = " + loss)
                  for line in read_log()])
    assert done.stdout.count("the net has stopped learning") == 1


def test_watch_passes_errors_on():
    done = watch(read_log()[:6] + [
        "W1123 21:04:05.123456  1234 a.cpp:1] a warning\n",
        "F1123 21:04:05.123456  1234 b.cpp:2] Check failed: label\n",
        "*** Check failure stack trace: ***\n"])
    assert done.stderr.splitlines() == [
        "W1123 21:04:05.123456  1234 a.cpp:1] a warning",
        "F1123 21:04:05.123456  1234 b.cpp:2] Check failed: label",
        "*** Check failure stack trace: ***"]


def test_plot(tmp_path):
    png = tmp_path / "a plot.png"
    done = plot(LOG, "-o", png, "-t", "a title")
    assert done.returncode == 0, done.stdout
    assert "test accuracy: 0.9034 after 200 iterations" in done.stdout
    assert str(png) in done.stdout
    with_lambda = Image.open(str(png))
    # Without lambda there is a panel less.
    log = tmp_path / "plain.log"
    log.write_text("".join(l for l in read_log() if "lambda" not in l))
    assert plot(log).returncode == 0
    assert Image.open(str(tmp_path / "plain.png")).height < with_lambda.height


def ticks(lines):
    """The texts at the ticks of a plot: of each panel and of the iterations.
    """
    from plot_training import draw
    figure = draw(History(lines), "a title")
    figure.canvas.draw()
    return ([[t.get_text() for t in axis.get_yticklabels()]
             for axis in figure.axes],
            [t.get_text() for t in figure.axes[-1].get_xticklabels()])


def test_short_log_gets_plain_ticks():
    lines = "".join(read_log())
    for old, new in (("Iteration 200", "Iteration 2"),
                     ("Iteration 100", "Iteration 1"), ("1.25e-05", "994.6"),
                     ("0.8012", "0.1035"), ("0.9034", "0.1035")):
        lines = lines.replace(old, new)
    panels, iterations = ticks(lines.splitlines(True))
    assert {"0", "1", "2"} <= set(iterations)
    for text in sum(panels, iterations):
        assert re.match(r"[-\u2212]?\d+(\.\d+)?$", text), text
    assert "995.0" in panels[2]
    # Where lambda falls by decades, its scale is still logarithmic.
    assert any("10^{-2}" in text for text in ticks(read_log())[0][2])


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00:00"), (59.6, "0:01:00"), (3600 * 57 + 35 * 60 + 41, "57:35:41"),
    (-1, "0:00:00")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("text", ["", "F1123 no training here\n"])
def test_plot_of_no_training(tmp_path, text):
    log = tmp_path / "empty.log"
    log.write_text(text)
    done = plot(log)
    assert done.returncode == 1
    assert "is no log of `caffe train`" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["empty.log"]


def test_plot_without_a_log(tmp_path):
    done = plot(tmp_path / "none.log")
    assert done.returncode == 1
    assert done.stdout.startswith("error: cannot read")


def test_plot_that_cannot_be_written(tmp_path):
    done = plot(LOG, "-o", tmp_path / "no" / "plot.png")
    assert done.returncode == 1
    assert done.stdout.startswith("error: cannot write")
