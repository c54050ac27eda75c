"""A stand-in Caffe tree, and a copy of the project to patch it with."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from faults import disk, private_mounts  # noqa: E402,F401
from stand_in import make_tree  # noqa: E402

PROJECT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "caffe")


@pytest.fixture(scope="session")
def layer_files():
    """What apply.sh puts into a tree, as paths of the tree."""
    found = [path.relative_to(PROJECT).as_posix()
             for folder in ("include/caffe", "src/caffe", "tests/caffe")
             for path in (PROJECT / folder).rglob("*.?pp")]
    assert "src/caffe/layers/bn_layer.cpp" in found
    return [path.replace("tests/caffe", "src/caffe/test") for path in found]


@pytest.fixture
def project(tmp_path):
    """A copy of the project, at a path with a blank, that a test may change."""
    copy = tmp_path / "my project"
    shutil.copytree(PROJECT / "caffe_patch", copy / "caffe_patch")
    shutil.copytree(PROJECT / "cmake", copy / "cmake")
    for folder in ("include/caffe", "src/caffe", "tests/caffe"):
        shutil.copytree(PROJECT / folder, copy / folder)
    return copy


@pytest.fixture
def apply(project):
    """Runs the copy's apply.sh; returns the finished process."""
    def run(*args, status=0, env=None):
        done = subprocess.run(
            [project / "caffe_patch" / "apply.sh", *map(str, args)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd="/", env={**os.environ, **(env or {})})
        if status is not None:
            assert done.returncode == status, done.stdout
        return done
    return run
