"""tools/extra of upstream Caffe on the log of a margin net, with Python 3.

margin.log is some rows of a real one.
"""
import csv
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
from PIL import Image

from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, "myexamples"))
from caffe_log import History  # noqa: E402

LOG = os.path.join(os.path.dirname(__file__), "margin.log")


@pytest.fixture(params=["glog 0.6", "an older glog"])
def log(request, tmp_path):
    """The log; glog before 0.6 wrote no year."""
    with open(LOG) as file:
        text = file.read()
    if request.param != "glog 0.6":
        text, count = re.subn(r"(?m)^I2026", "I", text)
        assert count > 50
    path = tmp_path / "margin.log"
    path.write_text(text)
    return path


@pytest.fixture
def history():
    with open(LOG) as file:
        return History(file)


def run(caffe_root, script, *args, cwd):
    """A program of tools/extra, by the system's Python."""
    done = subprocess.run(
        [sys.executable, os.path.join(caffe_root, "tools", "extra", script),
         *map(str, args)], cwd=cwd, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=120,
        env=dict(os.environ, MPLBACKEND="agg"))
    assert done.returncode == 0, done.stdout
    return done.stdout


def rows(path):
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items()}
                for row in csv.DictReader(file)]


def test_parse_log(log, history, tmp_path, caffe_root):
    run(caffe_root, "parse_log.py", "--verbose", log, tmp_path, cwd=tmp_path)
    train, test = rows("%s.train" % log), rows("%s.test" % log)
    iterations, accuracies = history.accuracies()
    assert [row["NumIters"] for row in test] == iterations
    assert [row["accuracy"] for row in test] == accuracies
    iterations, lambdas = history.curve("train", "lambda")
    assert [row["NumIters"] for row in train] == iterations
    assert [row["lambda"] for row in train] == lambdas
    # It drops at 3600 and 5200, and is said after each report.
    assert [row["LearningRate"] for row in train] == [
        .05, .05, .05, .05, .05, .05, .005, .005, .005, .0005]
    # From 08:45:13.08, where it says that it solves, to the last test.
    assert test[-1]["Seconds"] == pytest.approx(956.93, abs=0.01)


@pytest.mark.parametrize("script", [
    "parse_log.py", "plot_training_log.py.example", "extract_seconds.py"])
def test_no_warning_of_python(script, caffe_root):
    with open(os.path.join(caffe_root, "tools", "extra", script)) as file:
        text = file.read()
    assert text.startswith("#!/usr/bin/env python3\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile(text, script, "exec")


def test_plot_training_log(history, tmp_path, caffe_root):
    log = tmp_path / "margin.log"
    log.write_bytes(open(LOG, "rb").read())
    # Upstream's programs hand one another's paths to a shell unquoted.
    own = tmp_path / "caffe"
    shutil.copytree(os.path.join(caffe_root, "tools/extra"),
                    str(own / "tools/extra"))
    caffe_root = str(own)
    said = run(caffe_root, "plot_training_log.py.example", cwd=tmp_path)
    kinds = re.findall(r"^ +\d: (\S+) .* vs\. (\S+)$", said, re.M)
    assert len(kinds) == 8
    for number in range(8):
        png = tmp_path / ("%d.png" % number)
        run(caffe_root, "plot_training_log.py.example", number, png, log,
            cwd=tmp_path)
        assert Image.open(str(png)).size[0] > 100
    tables = {}
    for kind in ("train", "test"):
        lines = (tmp_path / ("margin.log." + kind)).read_text().splitlines()
        tables[kind] = [[float(value) for value in line.split()]
                        for line in lines[1:]]
    # No row for a step of the learning rate.
    iterations, accuracies = history.accuracies()
    assert [row[0] for row in tables["test"]] == iterations
    assert [row[2] for row in tables["test"]] == accuracies
    iterations, losses = history.curve("train", "loss")
    assert [row[0] for row in tables["train"]] == iterations
    assert [row[2] for row in tables["train"]] == losses


@pytest.mark.parametrize("args, says", [
    (["9", "a.png", LOG], "9 is not a valid chart type"),
    (["0", "a.jpg", LOG], "Path must end with png: a.jpg"),
    (["0", "a.png", "none.log"], "Path does not exist: none.log"),
    (["0", "a.png", "margin.txt"], "Log file must end in .log"),
])
def test_mistakes_are_said(args, says, tmp_path, caffe_root):
    (tmp_path / "margin.txt").write_text("")
    assert says in run(caffe_root, "plot_training_log.py.example", *args,
                       cwd=tmp_path)
