"""Every script answers --help, and does nothing else then."""

import os
import pathlib
import shutil
import subprocess

import pytest

from stand_in import snapshot

PROJECT = pathlib.Path(__file__).resolve().parents[2]
# Sourced, or not for users.
NO_PROGRAMS = {"cmake/shell.sh", "cmake/packages.sh", "cmake/caffe_source.sh",
               "myexamples/common.sh", ".ci/run"}


def scripts():
    found = []
    for folder in ("caffe_patch", "cmake", "myexamples", "tests"):
        for path in sorted((PROJECT / folder).rglob("*")):
            name = path.relative_to(PROJECT).as_posix()
            if (path.suffix in (".sh", ".py") and path.is_file() and
                    path.read_bytes()[:2] == b"#!" and
                    name not in NO_PROGRAMS):
                found.append(name)
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project's scripts, without what they have made."""
    folder = tmp_path_factory.mktemp("help") / "a project"
    for name in ("caffe_patch", "cmake", "myexamples", "tests"):
        shutil.copytree(PROJECT / name, folder / name, symlinks=True,
                        ignore=shutil.ignore_patterns(
                            "data", "data.*", "*_lmdb", "*_snapshot", "runs",
                            "comparison", "__pycache__", "golden"))
    return folder


def test_there_are_scripts():
    assert {"caffe_patch/apply.sh", "cmake/build_caffe.sh", "tests/run.sh",
            "myexamples/watch_training.py",
            "myexamples/mnist/train_quick.sh"} <= set(scripts())


@pytest.mark.parametrize("script", scripts())
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(copy, tmp_path, script, option):
    before = snapshot(copy)
    done = subprocess.run(
        [copy / script, option], cwd=tmp_path, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=60,
        env={**os.environ, "CAFFE_ROOT": str(tmp_path / "none"),
             "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) >= 3, done.stdout
    assert (pathlib.Path(script).stem in done.stdout or
            done.stdout.startswith("usage: "))
    assert done.stderr == ""
    assert snapshot(copy) == before
    assert not list(tmp_path.iterdir())
