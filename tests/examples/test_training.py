"""The training scripts, with the built Caffe and little data."""
import contextlib
import os
import re
import signal
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from mirror import Mirror
from small_mnist import expect, small_mnist

pytestmark = pytest.mark.usefixtures("caffe_root")


@contextlib.contextmanager
def quick_to_train(tree):
    """Gives the tree a small MNIST, and its quick net a short schedule."""
    files = small_mnist(train=200, test=100)
    expect(tree, files)
    tree.replace("mnist/quick_solver.prototxt", test_iter=1, test_interval=10,
                 display=5, max_iter=20, snapshot=10)
    with Mirror(files) as mirror:
        tree.env = {"MNIST_MIRRORS": mirror.url}
        yield tree


@pytest.fixture
def mnist(tree):
    with quick_to_train(tree):
        yield tree


def quick(tree, **options):
    return tree.run("mnist/train_quick.sh", env=tree.env, **options)


def quick_lambda(tree, iteration):
    """lambda of the quick net in that iteration of the solver."""
    net = tree.path("mnist/quick_train_test.prototxt").read_text()
    base, gamma, power = (
        float(re.search(r"(?m)^    %s: (\S+)$" % name, net)[1])
        for name in ("base", "gamma", "power"))
    return base * (1 + gamma * (iteration + 1)) ** -power


def test_quick_from_nothing_and_again(mnist, caffe_root):
    done = quick(mnist)
    assert done.returncode == 0, done.stdout
    assert "training on MNIST: 20 iterations" in done.stdout
    lines = done.stdout.splitlines()
    accuracy = re.match(r"test accuracy: (\d\.\d{4}) after 20 iterations",
                        lines[-3])
    assert accuracy, lines[-3]
    plot = lines[-2].split(": ", 1)[1]
    assert Image.open(plot).height > 700
    model = lines[-1].split(": ", 1)[1]
    assert model.endswith("quick_iter_20.caffemodel")
    before = os.stat(model).st_mtime_ns
    shown = [line.split()[:3] for line in lines
             if re.match(r" +\d+/20 +\d", line)]
    assert [row[0] for row in shown] == ["0/20", "5/20", "10/20", "15/20",
                                         "20/20", "20/20"]
    for row in shown[:4]:
        iteration = int(row[0].split("/")[0])
        assert float(row[2]) == pytest.approx(
            quick_lambda(mnist, iteration), rel=1e-3)

    again = quick(mnist)
    assert again.returncode == 0, again.stdout
    assert "the net is trained already" in again.stdout
    assert again.stdout.splitlines()[-3:] == lines[-3:]
    assert os.stat(model).st_mtime_ns == before

    # The figure is that of the model which is kept.
    tested = subprocess.run(
        [os.path.join(caffe_root, "build/tools/caffe"), "test",
         "--model=myexamples/mnist/quick_train_test.prototxt",
         "--weights=" + model, "--iterations=1"], cwd=mnist.root, text=True,
        env=dict(os.environ, GLOG_logtostderr="1"), check=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    assert accuracy[1] == "%.4f" % float(
        re.search(r"(?m)\] accuracy = (\S+)$", tested)[1])


def wait_for(condition, process, seconds=120):
    """Waits until condition() is true, while the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_quick_goes_on_after_ctrl_c(mnist):
    mnist.replace("mnist/quick_solver.prototxt", max_iter=1000,
                  test_interval=1000, display=10, snapshot=1000)
    out = mnist.path("mnist/quick_snapshot")
    process = mnist.start("mnist/train_quick.sh", env=mnist.env)
    log = out / "train.log"
    wait_for(lambda: log.exists() and "Iteration 10 " in log.read_text(),
             process)
    os.killpg(process.pid, signal.SIGINT)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 1, text
    assert "run this again to go on from there" in text
    states = list(out.glob("*.solverstate"))
    assert len(states) == 1
    stopped = int(re.search(r"iter_(\d+)", states[0].name)[1])
    assert 10 <= stopped < 1000

    end = stopped + 30
    mnist.replace("mnist/quick_solver.prototxt", max_iter=end,
                  test_interval=end, display=1)
    done = quick(mnist)
    assert done.returncode == 0, done.stdout
    assert "going on with an earlier training" in done.stdout
    assert " 0/%d" % end not in done.stdout
    first = re.search(r"(?m)^ +%d/%d +\S+ +(\S+)" % (stopped, end),
                      done.stdout)
    assert float(first[1]) == pytest.approx(quick_lambda(mnist, stopped),
                                            rel=1e-3)
    assert "after %d iterations" % end in done.stdout
    assert (out / ("quick_iter_%d.caffemodel" % end)).exists()
    # The log of the first part is still there for the plot.
    assert "Iteration 0 " in log.read_text()


def test_quick_killed_before_a_snapshot_starts_again(mnist):
    process = mnist.start("mnist/train_quick.sh", env=mnist.env)
    log = mnist.path("mnist/quick_snapshot/train.log")
    wait_for(lambda: log.exists() and "Iteration 0" in log.read_text(),
             process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = quick(mnist)
    assert done.returncode == 0, done.stdout
    assert "after 20 iterations" in done.stdout


def test_quick_shows_the_error_of_caffe(mnist):
    mnist.replace("mnist/quick_train_test.prototxt", num_output="5")
    done = quick(mnist)
    assert done.returncode == 1
    assert "label" in done.stdout and "Check failed" not in done.stdout[:50]
    assert "caffe train failed; its whole log is myexamples/mnist/" \
        in done.stdout


def test_lmdb_is_made_whole_or_not_at_all(mnist):
    half = mnist.path("mnist/lmdb.new")
    half.mkdir()
    (half / "data.mdb").write_text("half")
    done = mnist.run("mnist/create_mnist.sh", env=mnist.env)
    assert done.returncode == 0, done.stdout
    assert not half.exists()
    made = mnist.path("mnist/mnist_train_lmdb/data.mdb")
    assert made.stat().st_size > 200 * 784
    before = made.stat().st_mtime_ns
    again = mnist.run("mnist/create_mnist.sh", env=mnist.env)
    assert again.returncode == 0 and "are ready" in again.stdout
    assert made.stat().st_mtime_ns == before


def test_lmdbs_of_another_data_set(mnist):
    """What was asked for on purpose is not taken to be there."""
    assert mnist.run("mnist/create_mnist.sh", env=mnist.env).returncode == 0
    done = mnist.run("mnist/create_mnist.sh", "--fashion", env=mnist.env)
    assert done.returncode == 1
    assert "mnist_train_lmdb holds MNIST: move it, " in done.stdout
    assert "away to get Fashion-MNIST" in done.stdout


def test_comparison(mnist):
    args = ["-m", "1", "3", "--seeds", "2", "-j", "2"]
    done = mnist.run("mnist/compare_margins.sh", *args, env=mnist.env)
    assert done.returncode == 0, done.stdout
    rows = re.findall(r"^\| (\d) \| (\S+) \| (\S+) \| (\S+) (\S+) \|$",
                      done.stdout, re.M)
    assert [row[0] for row in rows] == ["1", "3"]
    for _, mean, deviation, *errors in rows:
        errors = np.array(errors, float)
        assert float(mean) == pytest.approx(errors.mean(), abs=0.006)
        assert float(deviation) == pytest.approx(errors.std(ddof=1), abs=0.01)
    folder = mnist.path("mnist/comparison/m3_seed2")
    assert "margin: 3" in (folder / "net.prototxt").read_text()
    assert "random_seed: 2" in (folder / "solver.prototxt").read_text()

    # One run undone: only that one trains again, to the same result.
    (folder / "done").unlink()
    again = mnist.run("mnist/compare_margins.sh", *args, env=mnist.env)
    assert "3 of 4 runs are done already" in again.stdout
    assert "1/1: m = 3, seed 2: test accuracy" in again.stdout
    assert again.stdout.splitlines()[-4:] == done.stdout.splitlines()[-4:]


def test_2d_features(mnist):
    mnist.replace("mnist_2d/mnist_2d_solver.prototxt", test_iter=1,
                  test_interval=4, display=2, max_iter=4)
    done = mnist.run("mnist_2d/train_2d.sh", env=mnist.env)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert [line[:5] for line in lines[-5:-1]] == [
        "m = %d" % m for m in (1, 2, 3, 4)]
    plot = lines[-1].split(": ", 1)[1]
    assert Image.open(plot).size == (1600, 450)
