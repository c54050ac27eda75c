"""Fixtures for the tests of myexamples/."""
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, os.path.join(ROOT, "tests"))

from faults import disk, private_mounts  # noqa: E402,F401
from npm import Npm  # noqa: E402

CAFFE_ROOT = os.path.abspath(
    os.environ.get("CAFFE_ROOT") or os.path.join(ROOT, "build", "caffe"))


_made = shutil.ignore_patterns(
    "data", "data.*", "*_lmdb", "lmdb.new", "quick_snapshot", "comparison",
    "runs", "drawn", "drawn.new", "tutorial", "__pycache__", ".lock")


def _not_in_a_clone(folder, names):
    """Which files of a folder of the examples a fresh clone lacks."""
    if folder.endswith("_snapshot"):
        return set(names) - {".gitignore"}
    return _made(folder, names)


class Tree:
    """The examples as in a fresh clone, in a path with a space.

    Its cmake/build_caffe.sh does nothing: the tests use the built Caffe. npm
    is a stand-in without packages.
    """

    def __init__(self, root):
        self.root = root
        shutil.copytree(os.path.join(ROOT, "myexamples"), root / "myexamples",
                        symlinks=True, ignore=_not_in_a_clone)
        self.npm = Npm(root / "npm")
        build = root / "cmake" / "build_caffe.sh"
        build.parent.mkdir()
        for name in ("shell.sh", "find_cargo.sh"):
            shutil.copy(os.path.join(ROOT, "cmake", name), build.parent)
        build.write_text("#!/bin/sh\n")
        build.chmod(0o755)

    def path(self, *parts):
        """A path below myexamples."""
        return self.root.joinpath("myexamples", *parts)

    def replace(self, file, **fields):
        """Gives fields of a prototxt, each on a line, other values."""
        text = self.path(file).read_text()
        for name, value in fields.items():
            text, count = re.subn(r"(?m)^(\s*%s): .*$" % name,
                                  r"\1: %s" % value, text)
            assert count, "%s has no %s" % (file, name)
        self.path(file).write_text(text)

    def start(self, script, *args, env=None, **options):
        """Starts a script of the tree in another folder; stderr is stdout."""
        full = dict(os.environ, CAFFE_ROOT=CAFFE_ROOT, PATH="%s:%s" % (
            self.npm.folder, os.environ["PATH"]))
        full.update(env or {})
        return subprocess.Popen(
            [str(self.path(script)), *map(str, args)], env=full, cwd="/",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            universal_newlines=True, start_new_session=True, **options)

    def run(self, *args, timeout=300, **options):
        """Runs a script as start does, to its end."""
        process = self.start(*args, **options)
        try:
            out = process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(args, process.returncode, out)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "a tree")


@pytest.fixture
def caffe_root():
    """The built Caffe; skips the test where there is none."""
    if not os.path.exists(os.path.join(CAFFE_ROOT, "build/tools/caffe")):
        pytest.skip("needs a built Caffe: run cmake/build_caffe.sh")
    return CAFFE_ROOT


def small_disk(size):
    """Options for Tree.run: no file can grow over size, as on a full disk."""
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return {"preexec_fn": limit, "restore_signals": False}


@pytest.fixture
def tensorboardx(monkeypatch):
    """The package that tests/run.sh gets, or the system's."""
    folder = os.path.join(ROOT, "build", "tensorboardX")
    if os.path.isdir(folder):
        monkeypatch.setenv("PYTHONPATH", folder)
        monkeypatch.syspath_prepend(folder)
    pytest.importorskip("tensorboardX")


@pytest.fixture(scope="session")
def pb():
    """The built Caffe's protobuf messages."""
    if not os.path.exists(os.path.join(CAFFE_ROOT, "build/tools/caffe")):
        pytest.skip("needs a built Caffe: run cmake/build_caffe.sh")
    sys.path.insert(0, os.path.join(ROOT, "myexamples"))
    os.environ["CAFFE_ROOT"] = CAFFE_ROOT
    import caffe_proto
    return caffe_proto.load()


@pytest.fixture(scope="session")
def caffe(pb):
    """A process with pycaffe."""
    from caffe_net import Caffe
    # The tests' nets are small.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with Caffe() as process:
        yield process
