"""Puts the patched Caffe's Python module on the path."""

import os
import sys

import pytest

# pycaffe logs every net it makes to stderr.
os.environ.setdefault("GLOG_minloglevel", "2")
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from caffe_e2e import CAFFE, CAFFE_ROOT, write_data  # noqa: E402

sys.path.insert(0, str(CAFFE_ROOT / "python"))


def pytest_sessionstart():
    if not CAFFE.exists():
        pytest.exit("%s is missing: run cmake/build_caffe.sh --cpu --tests "
                    "first, or set CAFFE_ROOT" % CAFFE, returncode=3)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with data.txt, two batches of 16 samples in 4 classes, which
    is the working directory of the test."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pytest_terminal_summary(terminalreporter):
    """Counts what test_bad_input.py feeds to Caffe: a test is an input."""
    outcomes = [report.passed
                for kind in ("passed", "failed")
                for report in terminalreporter.stats.get(kind, [])
                if report.when == "call" and "test_bad_input" in report.nodeid]
    if outcomes:
        terminalreporter.write_line(
            "bad and unusual inputs tried: %d, answered as they must be: %d"
            % (len(outcomes), sum(outcomes)))
