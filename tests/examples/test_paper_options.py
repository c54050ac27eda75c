"""The options of the paper's trainings, with the built Caffe (for the CPU)."""
import re
import shutil
import subprocess

import pytest

from conftest import CAFFE_ROOT, ROOT
from test_training import mnist as large_mnist  # noqa: F401

pytestmark = pytest.mark.usefixtures("caffe_root")
SCRIPT = "mnist/train_mnist.sh"
SOLVER = "mnist/mnist_solver.prototxt"


@pytest.fixture
def mnist(large_mnist):
    """With the quick net in the place of the paper's, which take long."""
    for net in ("mnist/model/mnist", "cifar10/model/cifar",
                "cifar10+/model/cifar"):
        shutil.copy(large_mnist.path("mnist/quick_train_test.prototxt"),
                    large_mnist.path(net + "_train_test.prototxt"))
    return large_mnist


@pytest.fixture
def cpu_only():
    words = subprocess.run(
        [CAFFE_ROOT + "/build/tools/caffe", "device_query", "--gpu=0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    if "CPU-only" not in words:
        pytest.skip("this Caffe is built with CUDA")


@pytest.mark.parametrize("script", [
    SCRIPT, "cifar10/train_cifar10.sh", "cifar10+/train_cifar10+.sh"])
def test_without_a_gpu(mnist, cpu_only, script):
    """One line, before anything is downloaded, made or trained."""
    before = sorted(mnist.root.rglob("*"))
    done = mnist.run(script, env=mnist.env)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "==> timing the net on the CPU"
    found = re.fullmatch(
        re.escape(script.split("/")[1]) +
        r": error: the training is made for a GPU, and this Caffe "
        r"is built without CUDA \(cmake/build_caffe.sh --cuda\); "
        r"with --cpu it takes about (\S+) hours on this machine", lines[1])
    assert found and 0.1 < float(found[1]) < 2000, done.stdout
    assert len(lines) == 2
    assert [path for path in sorted(mnist.root.rglob("*"))
            if "__pycache__" not in str(path)] == before


def test_cpu_and_snapshot_with_a_blank(mnist, cpu_only):
    """As `caffe train` takes it: --snapshot FILE."""
    mnist.replace(SOLVER, test_iter=1, test_interval=2, display=1, max_iter=2)
    done = mnist.run(SCRIPT, "--cpu", env=mnist.env)
    assert done.returncode == 0, done.stdout
    folder = mnist.path("mnist/mnist_snapshot")
    state, = folder.glob("*_iter_2.solverstate")
    solver = mnist.path(SOLVER).read_text()
    assert "solver_mode: GPU" in solver

    again = mnist.run(SCRIPT, "--cpu", env=mnist.env)
    assert again.returncode == 1
    where = "myexamples/mnist/mnist_snapshot"
    assert ("go on with --snapshot=%s/%s, or move its files away: mv %s/* "
            "ELSEWHERE\n" % (where, state.name, where)) in again.stdout

    mnist.replace(SOLVER, max_iter=4, test_interval=4)
    for form in (["--snapshot", state], ["-snapshot=%s" % state]):
        done = mnist.run(SCRIPT, "--cpu", *form, env=mnist.env)
        assert done.returncode == 0, done.stdout
        assert list(folder.glob("*_iter_4.caffemodel"))
        # The log of the first part is still there for the plot.
        assert "Iteration 0 " in (folder / "train.log").read_text()


@pytest.mark.parametrize("args, says", [
    (["more"], "unknown argument more"),
    (["--cpu", "--gpu=0"], "--cpu and --gpu exclude each other"),
    (["--cpu", "--solver=x"], "--solver is myexamples/mnist/mnist_solver"),
    (["-solver", "x"], "--solver is myexamples/mnist/mnist_solver")])
def test_bad_options(mnist, args, says):
    done = mnist.run(SCRIPT, *args, env=mnist.env)
    assert done.returncode in (1, 2) and says in done.stdout
    assert not mnist.path("mnist/mnist_train_lmdb").exists()


def test_hours_of_a_caffe_that_is_missing():
    done = subprocess.run(
        [ROOT + "/myexamples/cpu_hours.py", "/none/caffe",
         ROOT + "/myexamples/" + SOLVER, "1", "28", "28"], cwd="/",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert (done.returncode, done.stdout) == (
        1, "error: cannot start /none/caffe: No such file or directory\n")
