"""What a user without root and without sudo is told to ask for."""
import os
import pathlib
import shutil
import subprocess
import tempfile

import pytest

from conftest import ROOT

LIST = "apt-get install --no-install-recommends "
PROGRAMS = ("bash", "sh", "env", "dirname", "realpath", "id", "sed", "grep",
            "awk", "readlink", "tail", "tee", "tr", "cat", "mkdir", "rm",
            "flock", "nproc", "sort", "apt-get")

BUILD_CAFFE = """#!/bin/bash
if [[ $1 == --packages ]]; then cat "${0%/*}/missing"; exit; fi
echo "built with $*"
exit 9
"""


class World:
    """The scripts, a stand-in for the build, and little on the PATH."""

    def __init__(self, folder, user):
        self.folder = folder
        self.user = user
        self.project = folder / "my project"
        for name in ("cmake", "myexamples", "tests"):
            (self.project / name).mkdir(parents=True)
        (self.project / "myexamples/mnist").mkdir()
        for name in ("cmake/shell.sh", "myexamples/common.sh", "myexamples/mnist/train_quick.sh",
                     "myexamples/mnist/quick_solver.prototxt",
                     "tests/run.sh"):
            shutil.copy(os.path.join(ROOT, name), self.project / name)
        build = self.project / "cmake/build_caffe.sh"
        build.write_text(BUILD_CAFFE)
        build.chmod(0o755)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in PROGRAMS:
            (self.bin / name).symlink_to(os.path.realpath(shutil.which(name)))
        self.missing()
        for path in (self.project, self.project / "tests"):
            path.chmod(0o777)

    def missing(self, *packages):
        """Sets what the build lacks."""
        (self.project / "cmake/missing").write_text(
            "".join(package + "\n" for package in packages))

    def program(self, name):
        path = self.bin / name
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)

    def run(self, script):
        """The status and the output of a script, run by the user."""
        command = [str(self.project / script)]
        if self.user is not None:
            command[:0] = [shutil.which("setpriv"), f"--reuid={self.user}",
                           "--clear-groups"]
        done = subprocess.run(
            command, cwd="/", env={"PATH": str(self.bin), "HOME": "/"},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True)
        return done.returncode, done.stdout


@pytest.fixture
def world():
    user = None
    if os.geteuid() == 0:
        user = 65534
        if not shutil.which("setpriv"):
            pytest.skip("setpriv is not installed")
    if not shutil.which("apt-get"):
        pytest.skip("not on a Debian")
    folder = pathlib.Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield World(folder, user)
    shutil.rmtree(folder)


def asked_for(out):
    """The one list of packages that a script ends with."""
    found, = [line.split(LIST)[1].split() for line in out.splitlines()
              if LIST in line]
    assert len(set(found)) == len(found), out
    return set(found)


def test_the_quick_training_asks_for_all_at_once(world):
    world.missing("cmake", "cargo-web")
    before = sorted(world.project.rglob("*"))
    status, out = world.run("myexamples/mnist/train_quick.sh")
    assert status == 1
    assert LIST in out.splitlines()[-1]
    fashion = ([] if os.path.exists("/usr/share/datasets/fashion-mnist")
               else ["dataset-fashion-mnist"])
    assert asked_for(out) == {"cmake", "cargo-web", "curl", "npm", *fashion}
    assert sorted(world.project.rglob("*")) == before


def test_the_quick_training_asks_for_nothing(world):
    """npm and Fashion-MNIST alone are no reason to ask."""
    world.program("curl")
    status, out = world.run("myexamples/mnist/train_quick.sh")
    assert status == 9 and out == "built with --cpu\n"


def test_the_tests_ask_for_all_at_once(world):
    """Also for the tools of a cargo that is still to be installed."""
    world.missing("cmake", "cargo-web", "rustc-web", "python3-pydot")
    status, out = world.run("tests/run.sh")
    assert status == 1
    assert {"cmake", "cargo-web", "rustfmt-web", "rust-web-clippy", "curl",
            "shellcheck", "graphviz"} <= asked_for(out)
    assert "when root has installed these packages" in out.splitlines()[-1]
    assert "built with" not in out


def test_the_tests_ask_for_what_they_alone_need(world):
    world.program("curl")
    status, out = world.run("tests/run.sh")
    assert status == 1
    assert {"shellcheck", "graphviz"} <= asked_for(out)
    assert "built with" not in out
