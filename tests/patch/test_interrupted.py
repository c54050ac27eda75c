"""Scripts that are killed at any program that they call, and run again.

By default at some of their calls; with EVERY_KILL=1 in the environment at each.
"""

import os
import pathlib
import shutil
import signal
import sys

import pytest

from faults import Killer, every, which
from stand_in import make_tree, snapshot
from test_build_caffe import PROGRAMS, STAND_INS, world  # noqa: F401

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]
                       / "robustness"))

import interrupt  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def result(root):
    """Every file but those of Python, and the folders."""
    return ({name: what for name, what in snapshot(root).items()
             if "__pycache__" not in name},
            sorted(str(path.relative_to(root)) for path in root.rglob("*")
                   if path.is_dir() and path.name != "__pycache__"))


def killed_and_run_again(killer, command, env, begin, folder, number):
    """At each of the calls: the next run ends as one without a kill does.

    Returns the last line of such a run.
    """
    begin()
    status, out, calls = killer.run(command, env)
    assert status == 0, out
    last, whole = out.splitlines()[-1], result(folder)
    for turn, at in enumerate(every(calls, number)):
        kill = SIGNALS[turn % len(SIGNALS)]
        where = "%s at call %d of %d" % (kill.name, at, calls)
        begin()
        status, out, _ = killer.run(command, env, at, kill)
        # apply.sh holds signals off while it moves files into the tree.
        assert status or (kill != signal.SIGKILL and
                          result(folder) == whole), where + "\n" + out
        status, again, _ = killer.run(command, env)
        assert status == 0, "%s:\n%s\nthen:\n%s" % (where, out, again)
        assert result(folder) == whole, where
        # A tree that was finished may say that nothing is left to do.
        assert again.splitlines()[-1] == last or "Nothing to do" in again, (
            where + "\n" + again)
    return last


@pytest.mark.parametrize("mode", ["apply", "renew", "revert"])
def test_apply(apply, project, tmp_path, mode):
    native = make_tree(tmp_path / "native")
    caffe = tmp_path / "caffe"
    script = project / "caffe_patch/apply.sh"
    killer = Killer(tmp_path / "calls", which("git", *PROGRAMS))

    def begin():
        shutil.rmtree(caffe, ignore_errors=True)
        shutil.copytree(before, caffe, symlinks=True)

    before = native
    if mode != "apply":
        before = tmp_path / "before"
        shutil.copytree(native, before)
        apply(before)
    if mode == "renew":
        with open(project / "src/caffe/layers/bn_layer.cpp", "a") as file:
            file.write("// new\n")
    command = [script, *(["--revert"] if mode == "revert" else []), caffe]
    killed_and_run_again(killer, command, os.environ, begin, caffe, 5)
    if mode == "revert":
        assert result(caffe) == result(native)


def test_build_caffe(world):  # noqa: F811
    """From no package and no source to the end."""
    clone = make_tree(world.state / "clone")
    (clone / "python/caffe/__init__.py").write_text(
        "layer_type_list = lambda: ['BN', 'LargeMarginInnerProduct']\n")
    programs = {path.name: path for path in world.bin.iterdir()}
    assert set(STAND_INS) < set(programs)
    killer = Killer(world.folder / "calls", programs)
    command, env = world.command("--cpu")
    build = world.project / "build"

    def begin():
        shutil.rmtree(build, ignore_errors=True)
        (world.state / "half").unlink(missing_ok=True)
        if not os.geteuid():
            (world.state / "installed").write_text("cmake\nmake\n")

    last = killed_and_run_again(killer, command, env, begin, build, 10)
    assert last.startswith(interrupt.BUILT)
    assert {path.name for path in build.iterdir()} <= {"caffe", "apt.log"}
    assert not list(build.rglob("*.unfinished"))
