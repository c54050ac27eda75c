"""What watch_training.py, plot_training.py and caffe_log.py make of a log of
Caffe."""
import csv
import glob
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time

import pytest
from PIL import Image

from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, "myexamples"))
from caffe_log import (  # noqa: E402
    Head, History, duration, is_diverged, read_rows)

LOG = os.path.join(os.path.dirname(__file__), "train.log")


def read_log():
    with open(LOG) as file:
        return file.read().splitlines(True)


MARGIN = (
    "I1123 21:04:07.123456  1234 large_margin_inner_product_layer.cpp:210] "
    "LargeMarginInnerProduct layer '%s': pass %d, lambda = %g, samples = 100, "
    "ignored = 0, zero = 0, not_finite = 0, angle_mean = %g, angle_p95 = 80.5,"
    " feature_norm = 12.5, weight_norm = 1.5, holds = 0.25, segments = "
    "0.6 0.3 0.1 0, angle_deciles = 1 2 3 4 5 6 7 8 9 9 10\n")


def read_margin_log(*layers):
    """The log with what those layers say before each display."""
    lines, passes = [], iter((1, 101, 201))
    for line in read_log():
        if "] Iteration" in line and "loss =" in line:
            count = next(passes)
            lines += [MARGIN % (layer, count, 900 / count, 60 - 10 * i)
                      for i, layer in enumerate(layers)]
        lines.append(line)
    return lines


def watch(lines, *args, env=None):
    return subprocess.run(
        [os.path.join(ROOT, "myexamples/watch_training.py"), *map(str, args)],
        input="".join(lines), universal_newlines=True, timeout=60, env=env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_log_with_bytes_that_are_no_utf_8():
    """A name that Caffe cannot open, say. Ended, it would end Caffe."""
    done = subprocess.run(
        [os.path.join(ROOT, "myexamples/watch_training.py")], timeout=60,
        input=b"".join(line.encode() for line in read_log())
        + b"E1123 21:04:09.1 1 io.cpp:80] Could not open file caf\xe9.jpg\n",
        env=dict(os.environ, PYTHONIOENCODING="utf-8:strict"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0
    assert done.stderr.decode().endswith("open file caf\ufffd.jpg\n")


def run(script, *args, env=None):
    return subprocess.run(
        [os.path.join(ROOT, "myexamples", script), *map(str, args)], env=env,
        universal_newlines=True, timeout=60, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)


def plot(*args, env=None):
    return run("plot_training.py", *args, env=env)


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


def test_later_tests_of_an_earlier_run_do_not_count():
    """The second run is cut short before it tests."""
    lines = read_log()
    history = History(lines + lines[:7] + lines[10:14])
    assert history.curve("train", "loss") == ([0], [2.51])
    assert history.accuracies() == ([0], [.1034])


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
    # By the log's own clock: 11 s for a half.
    assert rows[1][5] == "0:00:11"
    assert rows[2] == ["snapshot", "a", "folder/x_iter_200.caffemodel"]
    assert rows[3][:4] == ["200/200", "0.3", "0.34", "0.9034"]
    assert len(rows) == 4


def test_watch_keeps_the_trainings_of_a_log_apart():
    """The last test of the first is no test of the second, and the time
    between them is none of either's."""
    lines = [line for line in read_log() if "] Iteration 0, T" not in line
             and "0.1034" not in line and "2.34" not in line]
    later = [line.replace("I1123 21:", "I1123 23:") for line in lines]
    rows = [line.split() for line in watch(lines + later).stdout.splitlines()]
    assert rows[4][:4] == ["200/200", "0.3", "0.34", "0.9034"]
    assert rows[5] == ["0/200", "2.51", "995"]
    assert rows[6][:5] == ["100/200", "0.71", "1.25e-05", "0.6", "0.8012"]
    assert rows[6][5] == "0:00:11"


def test_watch_shows_an_end_without_a_test():
    """And a test of an iteration before the last is not lost."""
    row = watch(read_log()[:-5]).stdout.splitlines()[-1].split()
    assert row[:2] == ["200/200", "0.3"]
    lines = [line.replace("Iteration 100, T", "Iteration 150, T")
             for line in read_log()]
    lines = lines[:14] + lines[17:21] + lines[14:17] + lines[21:]
    rows = [line.split() for line in watch(lines).stdout.splitlines()]
    assert rows[-2][:4] == ["200/200", "0.3", "0.6", "0.8012"]
    assert rows[-1][:3] == ["200/200", "0.34", "0.9034"]


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


@pytest.mark.parametrize("line", [
    "[libprotobuf ERROR google/protobuf/text_format.cc:337] Error parsing "
    'text-format caffe.NetParameter: 6:67: Unknown enumeration value of "Q".',
    "ERROR: unknown command line flag 'bogus'",
    "caffe: error while loading shared libraries: libfoo.so.1: cannot open",
    "terminate called after throwing an instance of 'std::bad_alloc'",
    "  what():  std::bad_alloc",
    "Killed"])
def test_watch_passes_on_what_is_not_of_the_log(line):
    done = watch(read_log()[:6] + [line + "\n"] + read_log()[6:])
    assert done.stderr == line + "\n"
    assert watch([line + "\n"]).stderr.startswith(line + "\nerror: no train")


def test_watch_passes_no_parameters_on():
    """Even where the lines before them are cut off."""
    for lines in (HEAD, HEAD[1:], HEAD[7:]):
        done = watch(lines + read_log()[6:])
        assert done.returncode == 0 and done.stderr == ""


def test_watch_after_a_crash_shows_the_next_training_alone():
    done = watch(["F1123 21:04:05.123456  1234 b.cpp:2] Check failed\n"]
                 + read_log())
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("lines", [
    [], ["I1123 21:04:05.123456  1234 caffe.cpp:204] Using CPU.\n"]])
def test_watch_says_that_no_training_began(lines):
    done = watch(lines)
    assert done.returncode == 1 and done.stdout == ""
    says = 'error: no training began: there was no line "Iteration N, ' \
        'loss = ..."\n'
    assert done.stderr == says
    # A command's own status stays.
    for status in (0, 127):
        done = watch([], "--", "sh", "-c", "exit %d" % status)
        assert (done.returncode, done.stderr) == (status, says)


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


# ---- The lines of the margin layers ----

def test_a_display_has_what_the_layers_said_before_it():
    rows = History(read_margin_log("ip2", "a, 'b'")).train
    assert [row.margins["ip2"]["pass"] for row in rows] == [1, 101, 201]
    assert list(rows[0].margins) == ["ip2", "a, 'b'"]
    assert rows[0].margins["a, 'b'"]["angle_mean"] == 50
    assert rows[0].margins["ip2"]["segments"] == [0.6, 0.3, 0.1, 0]
    assert rows[0].values["loss"] == 2.51 and rows[0].values["lr"] == 0.05
    assert rows[0].losses == {"loss": (2.5, 1)}


def test_a_layers_line_that_is_cut_short_is_none():
    for cut in (30, 100, 200, 320, len(MARGIN) - 20):
        lines = [line[:cut] + "\n" if "Margin" in line else line
                 for line in read_margin_log("ip2")]
        rows = History(lines).train
        assert [row.margins for row in rows] == [{}, {}, {}], cut
        assert [row.values["loss"] for row in rows] == [2.51, .71, .3]


def test_lines_of_a_killed_training_are_not_of_the_next():
    killed = MARGIN % ("old", 300, 1, 30)
    rows = History([killed] + read_log()).train
    assert rows[0].margins == {}


def test_lambda_of_a_net_without_that_top():
    lines = [line for line in read_margin_log("ip2")
             if "output #0: lambda" not in line]
    history = History(lines)
    assert history.curve("train", "lambda") == ([], [])
    assert history.descent()[0] == [0, 100, 200]
    assert history.descent()[1][0] == 900
    rows = [line.split() for line in watch(lines).stdout.splitlines()]
    assert rows[1][:3] == ["0/200", "2.51", "900"]


def test_watch_shows_the_angles_as_columns():
    done = watch(read_margin_log("ip2"))
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        "iteration", "loss", "lambda", "test", "loss", "test", "acc", "angle",
        "95", "%", "norm", "x", "norm", "w", "holds", "segments,", "%",
        "left"]
    assert lines[1].split() == [
        "0/200", "2.51", "995", "2.34", "0.1034", "60.0", "80.5", "12.5",
        "1.5", "0.250", "60", "30", "10", "0"]
    # Under its head.
    assert lines[1].index("60 30 10 0") == lines[0].index("segments, %")
    assert lines[1].index("80.5") + 4 == lines[0].index("95 %") + 4


def test_watch_adds_the_columns_when_they_come():
    plain, rest = read_log()[:13], read_margin_log("ip2")[14:]
    lines = watch(plain + rest).stdout.splitlines()
    heads = [i for i, line in enumerate(lines) if "iteration" in line]
    assert heads == [0, 2]
    assert "angle" not in lines[0] and "angle" in lines[2]


def test_watch_shows_each_head_of_a_net():
    lines = watch(read_margin_log("ip2", "other")).stdout.splitlines()
    assert lines[2].split()[:3] == ["other", "900", "50.0"]


def test_plot_has_panels_of_what_is_in_the_log():
    from plot_training import draw
    def labels(lines):
        figure = draw(History(lines), "a title")
        return [axis.get_ylabel() for axis in figure.axes], [
            [line.get_label() for line in axis.lines] for axis in figure.axes]
    assert labels(read_log())[0] == ["loss", "test accuracy", "lambda"]
    names, curves = labels(read_margin_log("ip2"))
    assert names == ["loss", "test accuracy", "lambda", "angle (degrees)",
                     "norm", "margin holds", "samples in segment"]
    assert curves[3] == ["95th percentile", "mean"]
    assert curves[6] == ["k = 0", "k = 1", "k = 2", "k = 3"]
    names, curves = labels(read_margin_log("ip2", "b"))
    assert curves[2] == ["ip2", "b"]
    assert curves[5] == ["ip2 margin holds", "b margin holds"]


def test_a_legend_of_many_curves_hides_none():
    from plot_training import draw
    figure = draw(History(read_margin_log("ip2", "b")), "a title")
    figure.canvas.draw()
    for axis in figure.axes:
        if len(axis.lines) > 2:
            legend = axis.get_legend().get_window_extent()
            assert not legend.overlaps(axis.get_window_extent())
            assert figure.bbox.x1 >= legend.x1


# ---- The head ----

HEAD = """\
I1123 21:04:05.1  1 solver.cpp:45] Initializing solver from parameters:
base_lr: 0.05
max_iter: 200
train_state {
  level: 3
}
snapshot_prefix: "a folder/x"
I1123 21:04:05.1  1 net.cpp:53] Initializing net from parameters:
name: "a net"
layer {
  name: "bn"
  type: "BN"
}
layer {
  name: "ip2"
  type: "LargeMarginInnerProduct"
  bottom: "bn"
  bottom: "label"
  top: "ip2"
  param {
    name: "shared"
  }
  largemargin_inner_product_param {
    num_output: 10
    weight_filler {
      type: "msra"
    }
    base: 1000
  }
}
I1123 21:04:05.1  1 net.cpp:53] Initializing net from parameters:
layer {
  name: "of the test net"
  type: "LargeMarginInnerProduct"
}
max_iter: 3
""".splitlines(True)


def test_head_of_the_log():
    head = Head()
    list(read_rows(HEAD, head.take))
    assert head.max_iter == 200
    assert head.solver["snapshot_prefix"] == "a folder/x"
    assert "level" not in head.solver
    layer, = head.margins()
    assert (layer.name, layer.bottoms, layer.tops) == (
        "ip2", ["bn", "label"], ["ip2"])
    assert layer.fields == {"num_output": "10", "base": "1000"}
    assert head.normalises()


def named_otherwise():
    """The log of a net that has other names for what the table shows, and
    names like those for something else."""
    lines = """\
I1123 21:04:05.1  1 solver.cpp:45] Initializing solver from parameters:
max_iter: 200
I1123 21:04:05.1  1 net.cpp:53] Initializing net from parameters:
layer {
  name: "ip2"
  type: "LargeMarginInnerProduct"
  top: "ip2"
  top: "weight"
}
I1123 21:04:05.1  1 net.cpp:53] Initializing net from parameters:
layer {
  name: "right"
  type: "Accuracy"
  top: "acc"
}
""".splitlines(True)
    for line in read_log()[6:]:
        for name, other, decoy in (("accuracy", "acc", "inaccuracy = 7"),
                                   ("lambda", "weight", "lambda2 = 7"),
                                   ("loss", "cost", "loss2 = 7 (* 0.5 = 3.5")):
            if "net output" in line and " %s = " % name in line:
                lines.append(line.split("#")[0] + "#9: %s\n" % decoy)
                line = line.replace(name, other)
        lines.append(line)
    return lines


def test_what_a_value_is_goes_by_its_layer():
    lines = named_otherwise()
    history = History(lines)
    assert history.accuracies() == ([0, 100, 200], [.1034, .8012, .9034])
    assert history.descent() == ([0, 100], [995.01, 1.25e-05])
    assert history.curve("train", "loss") == ([0, 100, 200], [2.51, .71, .3])
    # The sum of both, as the training's is.
    assert history.curve("test", "loss")[1] == pytest.approx(
        [5.84, 4.1, 3.84])
    row = watch(lines).stdout.splitlines()[1].split()
    assert row == ["0/200", "2.51", "995", "5.84", "0.1034"]


def several_heads():
    """The log of a net with accuracies and a margin before those that count.
    """
    def accuracy(name, bottom, k):
        return ('layer {\n  name: "%s"\n  type: "Accuracy"\n  bottom: "%s"\n'
                '  bottom: "label"\n  top: "%s"\n  accuracy_param {\n'
                "    top_k: %d\n  }\n}\n" % (name, bottom, name, k))
    lines = (HEAD[7] + """\
layer {
  name: "other"
  type: "LargeMarginInnerProduct"
  top: "other"
}
layer {
  name: "ip2"
  type: "LargeMarginInnerProduct"
  top: "ip2"
  top: "lambda"
}
""" + accuracy("aux", "pool", 1) + accuracy("top3", "ip2", 3) + accuracy(
    "accuracy", "ip2", 1)).splitlines(True)
    for line in read_margin_log("other", "ip2")[6:]:
        if "accuracy = " in line:
            lines += [line.split("#")[0] + "#8: %s = 0.99\n" % name
                      for name in ("aux", "top3")]
        lines.append(line)
    return lines


def test_the_accuracy_that_counts_is_that_of_the_margin_layer():
    history = History(several_heads())
    assert history.accuracies() == ([0, 100, 200], [.1034, .8012, .9034])


def test_the_accuracy_of_a_net_that_diverged():
    """Caffe counts NaN as right, so that its accuracy is 1."""
    lines = [line.replace("0.34 (* 1 = 0.34", "-nan (* 1 = -nan").replace(
        "0.9034", "1") for line in read_log()]
    assert any("-nan" in line for line in lines)
    values = History(lines).accuracies()[1]
    assert values[:2] == [.1034, .8012] and math.isnan(values[2])
    assert watch(lines).stdout.split()[-3:-1] == ["nan", "nan"]


def test_the_angles_beside_lambda_are_of_its_layer():
    lines = watch(several_heads()).stdout.splitlines()
    # read_margin_log gives "other" 60 degrees, and ip2 50.
    assert lines[1].split()[1:6] == ["2.51", "995", "2.34", "0.1034", "50.0"]
    assert lines[2].split()[:3] == ["other", "900", "60.0"]


@pytest.mark.parametrize("stamp, expected", [
    ("I20261125 08:45:13.274479", (2026, 11, 25, 8, 45, 13)),
    # Without a year: this one, also by a clock that is ahead, or the last.
    ("I0109 21:04:07.123456", (2027, 1, 9, 21, 4, 7)),
    ("I0111 01:04:07.123456", (2027, 1, 11, 1, 4, 7)),
    ("I1123 21:04:07.123456", (2026, 11, 23, 21, 4, 7))])
def test_a_row_knows_when_it_was_logged(monkeypatch, stamp, expected):
    now = time.mktime((2027, 1, 10, 12, 0, 0, 0, 0, -1))
    monkeypatch.setattr(time, "time", lambda: now)
    row, = read_rows([stamp + "  1 solver.cpp:1] Iteration 5, loss = 2\n"])
    assert tuple(time.localtime(row.time)[:6]) == expected


# ---- CSV ----

def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_csv(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("".join(read_margin_log("ip2")))
    table = tmp_path / "a table.csv"
    done = run("caffe_log.py", log, "--csv", table)
    assert done.returncode == 0, done.stdout
    rows = read_csv(table)
    assert done.stdout == "made %s: 3 rows of %d columns\n" % (
        table, len(rows[0]))
    assert [row["iteration"] for row in rows] == ["0", "100", "200"]
    assert [row["train/loss"] for row in rows] == ["2.51", "0.71", "0.3"]
    assert [row["train/lr"] for row in rows] == ["0.05", "0.005", ""]
    assert [row["test/accuracy"] for row in rows] == [
        "0.1034", "0.8012", "0.9034"]
    assert rows[1]["margin/ip2/angle_mean"] == "60"
    assert rows[1]["margin/ip2/segment_1"] == "0.3"
    assert rows[1]["margin/ip2/angle_decile_10"] == "10"
    groups = [name.split("/")[0] for name in rows[0]]
    assert list(dict.fromkeys(groups)) == [
        "iteration", "train", "test", "margin"]
    # Again, with a log that has grown.
    assert run("caffe_log.py", log, "--csv", table).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a table.csv", "train.log"]


@pytest.mark.parametrize("script", ["caffe_log.py", "plot_training.py"])
def test_ctrl_c_is_one_word(tmp_path, script):
    log = tmp_path / "log"
    os.mkfifo(str(log))
    done = subprocess.Popen(
        [os.path.join(ROOT, "myexamples", script), str(log)] + (
            ["--csv", str(tmp_path / "t.csv")] if script[0] == "c" else []),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with open(str(log), "w"):  # opened once the script reads it
        done.send_signal(signal.SIGINT)
        assert done.communicate(timeout=60)[0] == "stopped\n"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_csv_of_two_test_nets(tmp_path):
    lines = read_log()
    second = [line.replace("(#0)", "(#1)").replace("0.8012", "0.7")
              for line in lines[13:16]]
    log = tmp_path / "train.log"
    log.write_text("".join(lines[:16] + second + lines[16:]))
    run("caffe_log.py", log, "--csv", tmp_path / "t.csv")
    rows = read_csv(tmp_path / "t.csv")
    assert rows[1]["test/accuracy"] == "0.8012"
    assert rows[1]["test1/accuracy"] == "0.7" and rows[0]["test1/loss"] == ""


def test_csv_to_a_pipe():
    done = run("caffe_log.py", LOG, "--csv", "/dev/stdout")
    assert done.stdout.startswith("iteration,train/loss")


def test_csv_that_cannot_be(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("".join(read_log()))
    other = tmp_path / "other.csv"
    other.write_text("iterations,loss\n1,2\n")
    for args, words in (
            ((tmp_path / "none.log", "--csv", "x"), "cannot read"),
            ((log, "--csv", log), "is there, and no table of this program"),
            ((log, "--csv", other), "is there, and no table of this program"),
            ((log, "--csv", tmp_path), "cannot write"),
            ((log, "--csv", tmp_path / "no/t.csv"), "cannot write"),
            (("/dev/null", "--csv", tmp_path / "t.csv"), "is no log of")):
        done = run("caffe_log.py", *args)
        assert done.returncode == 1 and words in done.stdout, done.stdout
        assert len(done.stdout.splitlines()) == 1
    assert log.read_text() == "".join(read_log())
    assert other.read_text() == "iterations,loss\n1,2\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "other.csv", "train.log"]


# ---- TensorBoard ----

def read_events(folder):
    """All events of a folder, by TensorFlow's framing of records: a length of
    8 bytes, 4 bytes of checksum, the event, 4 of checksum."""
    from tensorboardX.proto import event_pb2
    found = []
    for path in sorted(glob.glob(os.path.join(str(folder), "events*"))):
        with open(path, "rb") as file:
            data = file.read()
        while data:
            length, = struct.unpack("<Q", data[:8])
            event = event_pb2.Event()
            event.ParseFromString(data[12:12 + length])
            found.append(event)
            data = data[16 + length:]
    return found


def values(events):
    """{tag: {step: value}} of the scalars, and the same of histograms."""
    scalars, histograms = {}, {}
    for event in events:
        for value in event.summary.value:
            kind = scalars if value.HasField("simple_value") else histograms
            kind.setdefault(value.tag, {})[event.step] = (
                value.simple_value if kind is scalars else value.histo)
    return scalars, histograms


@pytest.mark.parametrize("live", [False, True])
def test_event_files(tmp_path, tensorboardx, live):
    log = tmp_path / "train.log"
    log.write_text("".join(read_margin_log("ip2")))
    folder = tmp_path / "new" / "events"
    if live:
        done = watch(read_margin_log("ip2"), "--tensorboard", folder)
    else:
        done = plot(log, "--tensorboard", folder)
    assert done.returncode == 0, done.stdout
    assert "event files: %s" % folder in done.stdout.splitlines()
    events = read_events(folder)
    scalars, histograms = values(events)
    expected = {0: 2.51, 100: 0.71, 200: 0.3}
    assert scalars["train/loss"] == pytest.approx(expected)
    assert scalars["test/accuracy"] == pytest.approx(
        {0: .1034, 100: .8012, 200: .9034})
    assert scalars["margin/ip2/angle_mean"] == {0: 60, 100: 60, 200: 60}
    assert scalars["margin/ip2/segment_2"] == pytest.approx(
        {0: .1, 100: .1, 200: .1})
    assert not [tag for tag in scalars if "decile" in tag]
    assert list(histograms) == ["margin/ip2/angle"]
    angles = histograms["margin/ip2/angle"][100]
    assert (angles.min, angles.max, angles.num) == (1, 10, 100)
    assert list(angles.bucket_limit) == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    # Two deciles are 9.
    assert list(angles.bucket) == [10, 10, 10, 10, 10, 10, 10, 20, 10]
    # When they were logged, not when they were written.
    at = {event.step: event.wall_time for event in events
          if any(v.tag == "train/loss" for v in event.summary.value)}
    assert time.localtime(at[0])[1:6] == (11, 23, 21, 4, 7)
    assert at[100] - at[0] == pytest.approx(11)


def test_event_files_of_a_training_that_went_on(tmp_path, tensorboardx):
    """TensorBoard is told to hide what is done again."""
    for lines in (read_log(), read_log()[14:]):
        assert watch(lines, "--tensorboard", tmp_path).returncode == 0
    assert len(list(tmp_path.iterdir())) == 2
    starts = [event.step for event in read_events(tmp_path)
              if event.session_log.status == 1]
    assert starts == [0, 100]


def test_event_files_of_a_loss_that_is_not_a_number(tmp_path, tensorboardx):
    lines = [line.replace("loss = 0.71", "loss = -nan")
             for line in read_log()]
    done = watch(lines, "--tensorboard", tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    scalars, _ = values(read_events(tmp_path))
    assert math.isnan(scalars["train/loss"][100])


def test_event_files_without_the_package(tmp_path):
    (tmp_path / "tensorboardX.py").write_text(
        "raise ImportError(\"No module named 'tensorboardX'\")\n")
    env = dict(os.environ, PYTHONPATH=str(tmp_path),
               PYTHONDONTWRITEBYTECODE="1")
    log = tmp_path / "train.log"
    log.write_text("".join(read_log()))
    folder = tmp_path / "events"
    for done in (plot(log, "--tensorboard", folder, env=env),
                 watch(read_log(), "--tensorboard", folder, env=env)):
        assert done.returncode == 1
        message = (done.stderr or done.stdout).splitlines()
        assert len(message) == 1
        assert message[0].startswith(
            "error: --tensorboard needs the Python package tensorboardX: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "tensorboardX.py", "train.log"]


def test_event_files_that_cannot_be_written(tmp_path, tensorboardx):
    (tmp_path / "file").write_text("")
    done = watch(read_log(), "--tensorboard", tmp_path / "file" / "events")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot make ")
