"""The training scripts, with the built Caffe and little data."""
import contextlib
import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from conftest import CAFFE_ROOT, ROOT
from mirror import Mirror
from small_mnist import expect, small_mnist

for folder in ("", "mnist", "mnist_2d"):
    sys.path.insert(0, os.path.join(ROOT, "myexamples", folder))

import caffe_model  # noqa: E402
import caffe_proto  # noqa: E402

pytestmark = pytest.mark.usefixtures("caffe_root")


@contextlib.contextmanager
def quick_to_train(tree):
    """Gives the tree a small MNIST, and its quick net a short schedule."""
    files = small_mnist(train=200, test=100)
    expect(tree, files)
    tree.replace("mnist/quick_solver.prototxt", test_iter=1, test_interval=10,
                 display=5, max_iter=20, snapshot=10)
    tree.replace("mnist/compare_solver.prototxt", test_iter=1,
                 test_interval=4, display=2, max_iter=4)
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
    out = "myexamples/mnist/quick_snapshot/deploy/deploy."
    assert "made %sprototxt and %scaffemodel" % (out, out) in lines
    assert any(re.fullmatch(
        r"OpenCV \S+ on t10k-images-idx3-ubyte:0: class \d \(probability "
        r"[01]\.\d{3}\), label 0", line) for line in lines)
    shown = [line.split()[:3] for line in lines
             if re.match(r" +\d+/20 +\d", line)]
    assert [row[0] for row in shown] == ["0/20", "5/20", "10/20", "15/20",
                                         "20/20"]
    for row in shown[:4]:
        iteration = int(row[0].split("/")[0])
        assert float(row[2]) == pytest.approx(
            quick_lambda(mnist, iteration), rel=1e-3)

    again = quick(mnist)
    assert again.returncode == 0, again.stdout
    assert "the net is trained already" in again.stdout
    assert "deploy.prototxt" not in again.stdout
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


def test_quick_warns_of_a_training_that_goes_wrong(mnist):
    mnist.replace("mnist/quick_solver.prototxt", base_lr=1e6, average_loss=1)
    done = quick(mnist)
    warnings = [line for line in done.stdout.splitlines()
                if line.startswith("warning: iteration ")]
    assert len(warnings) >= 1, done.stdout
    assert "base_lr" in warnings[0]


def test_quick_tells_no_accuracy_of_a_model_that_has_diverged(mnist):
    """Caffe's Accuracy takes NaN for right."""
    assert quick(mnist).returncode == 0
    path = mnist.path("mnist/quick_snapshot/quick_iter_20.caffemodel")
    pb = caffe_proto.load()
    model = caffe_model.read_net(pb, str(path))
    for layer in model.layer:
        if layer.name == "ip2":
            layer.blobs[0].data[:] = [float("nan")] * len(layer.blobs[0].data)
    path.write_bytes(model.SerializeToString())
    done = quick(mnist)
    assert done.returncode == 1
    assert re.search(r"error: the training has diverged: the test loss of "
                     r"\S+quick_iter_20.caffemodel is nan", done.stdout)
    assert "test accuracy: 1" not in done.stdout


def wait_for(condition, process, seconds=120):
    """Waits until condition() is true, while the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def start_quick(mnist, iterations):
    """(process, folder, log) of a quick training that has begun."""
    mnist.replace("mnist/quick_solver.prototxt", max_iter=iterations,
                  test_interval=iterations, display=10, snapshot=iterations)
    out = mnist.path("mnist/quick_snapshot")
    process = mnist.start("mnist/train_quick.sh", env=mnist.env)
    log = out / "train.log"
    wait_for(lambda: log.exists() and "Iteration 10 " in log.read_text(),
             process)
    return process, out, log


def test_quick_goes_on_after_ctrl_c(mnist):
    process, out, log = start_quick(mnist, 1000)
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


def whole_output(process):
    """What a script and all that it has started write to their end."""
    try:
        return process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


@pytest.mark.parametrize("kill, number", [
    (os.kill, signal.SIGTERM), (os.killpg, signal.SIGHUP)])
def test_quick_ended_by_a_signal_ends_caffe(mnist, kill, number):
    """SIGHUP comes to all of its processes, where a terminal is closed."""
    process, out, log = start_quick(mnist, 100000)
    waiting = mnist.start("mnist/train_quick.sh", env=mnist.env)
    try:
        for line in waiting.stdout:
            if "waiting for another script" in line:
                break
        for name, pid in (("bash", process.pid), ("caffe", r"\d+")):
            assert re.search(r"%s %s[,)]" % (name, pid), line), line
    finally:
        os.killpg(waiting.pid, signal.SIGKILL)
        waiting.communicate()
    kill(process.pid, number)
    text = whole_output(process)
    assert process.returncode == 128 + number, text
    assert "stopped early" in log.read_text().splitlines()[-2]
    assert list(out.glob("*.solverstate"))
    assert "Traceback" not in text


def test_quick_stopped_before_a_snapshot(mnist):
    """In the test before the first iteration."""
    mnist.replace("mnist/quick_solver.prototxt", test_iter=100000)
    mnist.replace("mnist/quick_solver.prototxt", test_initialization="true")
    process = mnist.start("mnist/train_quick.sh", env=mnist.env)
    log = mnist.path("mnist/quick_snapshot/train.log")
    wait_for(lambda: log.exists() and "Testing net" in log.read_text(),
             process)
    os.killpg(process.pid, signal.SIGINT)
    lines = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 1
    assert lines[-1] == "train_quick.sh: error: stopped before the first " \
        "snapshot: run this again"


def test_comparison_ended_by_a_signal_ends_caffe(mnist):
    mnist.replace("mnist/compare_solver.prototxt", max_iter=100000,
                  test_interval=100000)
    process = mnist.start("mnist/compare_margins.sh", "-m", "1", "2", "-s",
                          "1", "-j", "2", env=mnist.env)
    logs = [mnist.path("mnist/comparison/m%d_seed1/train.log" % margin)
            for margin in (1, 2)]
    wait_for(lambda: all(log.exists() and "Iteration 2 " in log.read_text()
                         for log in logs), process)
    process.terminate()
    whole_output(process)
    assert process.returncode == -signal.SIGTERM
    before = [log.stat().st_size for log in logs]
    time.sleep(1)
    assert [log.stat().st_size for log in logs] == before


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


def test_quick_does_not_go_on_with_other_images(mnist):
    """Neither with a net that is trained already nor with a snapshot."""
    assert quick(mnist).returncode == 0
    out = mnist.path("mnist/quick_snapshot")
    say_that_it_is(mnist, "Others")
    # First as it is, then as if stopped; where there is nothing to go on from,
    # nothing is mixed.
    for lost in (20, 10):
        refused = quick(mnist)
        assert refused.returncode == 1, refused.stdout
        assert refused.stdout.splitlines()[-1] == (
            "train_quick.sh: error: myexamples/mnist/quick_snapshot was "
            "trained on MNIST: move it away to train on Others")
        for path in out.glob("quick_iter_%d.*" % lost):
            path.unlink()
    done = quick(mnist)
    assert done.returncode == 0, done.stdout
    assert "training on Others: 20 iterations" in done.stdout
    assert (out / "dataset.txt").read_text() == "Others\n"
    # Of what an earlier version has trained, it is not known.
    (out / "dataset.txt").unlink()
    say_that_it_is(mnist, "MNIST")
    done = quick(mnist)
    assert done.returncode == 0, done.stdout
    assert "trained already" in done.stdout
    assert not (out / "dataset.txt").exists()


def test_quick_whose_model_is_cut(mnist, tmp_path):
    """By a disk that was full for a moment, which Caffe did not notice."""
    root = tmp_path / "caffe"
    for folder in ("build/tools", "build/examples/mnist"):
        (root / folder).mkdir(parents=True)
    for name in ("python", "build/examples/mnist/convert_mnist_data"):
        (root / name).symlink_to(os.path.join(CAFFE_ROOT, name))
    caffe = root / "build/tools/caffe"
    caffe.write_text("""#!/bin/bash
"%s/build/tools/caffe" "$@" || exit
[ "$1" != train ] ||
  truncate -s -1 myexamples/mnist/quick_snapshot/quick_iter_20.caffemodel
""" % CAFFE_ROOT)
    caffe.chmod(0o755)
    mnist.env["CAFFE_ROOT"] = str(root)
    done = quick(mnist)
    assert done.returncode == 1, done.stdout
    assert done.stdout.splitlines()[-1] == (
        "train_quick.sh: error: the net could not be written: make room and "
        "run this again")


def test_quick_shows_the_error_of_caffe(mnist):
    mnist.replace("mnist/quick_train_test.prototxt", num_output="5")
    done = quick(mnist)
    assert done.returncode == 1
    assert "label" in done.stdout and "Check failed" not in done.stdout[:50]
    assert "caffe train failed; its whole log is myexamples/mnist/" \
        in done.stdout
    # Caffe aborts; bash's words on that tell nothing.
    assert "Abort" not in done.stdout, done.stdout


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


def say_that_it_is(mnist, name):
    """Calls the tree's images by another name."""
    for folder in ("data", "mnist_train_lmdb", "mnist_test_lmdb"):
        mnist.path("mnist", folder, "dataset.txt").write_text(name + "\n")


def test_lmdbs_of_other_images_than_the_files(mnist):
    """As those of a Fashion-MNIST that MNIST has replaced since."""
    assert mnist.run("mnist/create_mnist.sh", env=mnist.env).returncode == 0
    say_that_it_is(mnist, "Others")
    shutil.rmtree(mnist.path("mnist/data"))
    # Before there are any files, all is well.
    done = mnist.run("mnist/create_mnist.sh", env=mnist.env)
    assert done.returncode == 0 and "are ready" in done.stdout
    for script in ("create_validation.sh", "create_mnist.sh"):
        refused = mnist.run("mnist/" + script, env=mnist.env)
        assert refused.returncode == 1, refused.stdout
        assert refused.stdout.splitlines()[-1] == (
            "%s: error: myexamples/mnist/mnist_train_lmdb is not made from "
            "the images of myexamples/mnist/data: move it away" % script)
    assert not mnist.path("mnist/mnist_fit_lmdb").exists()
    # What a user's own LMDBs hold is for the user to know.
    for lmdb in ("mnist_train_lmdb", "mnist_test_lmdb"):
        mnist.path("mnist", lmdb, "dataset.txt").unlink()
    done = mnist.run("mnist/create_mnist.sh", env=mnist.env)
    assert done.returncode == 0 and "are ready" in done.stdout
    before = sorted(os.listdir(mnist.path("mnist")))
    refused = mnist.run("mnist/create_validation.sh", env=mnist.env)
    assert refused.returncode == 1
    assert refused.stdout.splitlines()[-1] == (
        "create_validation.sh: error: myexamples/mnist/mnist_train_lmdb does "
        "not say which images it holds: name them in its dataset.txt, or move "
        "it away")
    assert sorted(os.listdir(mnist.path("mnist"))) == before


def compare(mnist, *args):
    return mnist.run("mnist/compare_margins.sh", *args, env=mnist.env)


def test_comparison(mnist):
    args = ["-m", "1", "3", "--seeds", "2", "-j", "2"]
    done = compare(mnist, *args)
    assert done.returncode == 0, done.stdout
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in done.stdout.splitlines()
            if re.match(r"\| \d \|", line)]
    assert [row[0] for row in rows] == ["1", "3"]
    errors = [np.array(row[6].split(), float) for row in rows]
    for row, values in zip(rows, errors):
        assert float(row[1]) == pytest.approx(values.mean(), abs=0.006)
        assert float(row[2]) == pytest.approx(values.std(ddof=1), abs=0.01)
    assert rows[0][3:6] == ["-", "-", "-"]
    assert float(rows[1][3]) == pytest.approx(
        (errors[1] - errors[0]).mean(), abs=0.01)
    plot = done.stdout.splitlines()[-1].split("plot: ", 1)[1]
    assert Image.open(plot).size == (900, 400)
    folder = mnist.path("mnist/comparison/m3_seed2")
    assert plot == str(folder.parent / "comparison.png")
    net = (folder / "net.prototxt").read_text()
    assert "margin: 3" in net and "gamma: 0.01" in net
    assert "random_seed: 2" in (folder / "solver.prototxt").read_text()

    # One run undone: only that one trains again, to the same result.
    (folder / "done").unlink()
    again = compare(mnist, *args)
    assert "3 of 4 runs are done already" in again.stdout
    assert "1/1: m = 3, seed 2: test accuracy" in again.stdout
    assert again.stdout.splitlines()[-5:] == done.stdout.splitlines()[-5:]

    # Another descent: softmax has none, so its runs count there too.
    gamma = compare(mnist, *args, "--gamma", "0.02")
    assert "2 of 4 runs are done already" in gamma.stdout
    other = mnist.path("mnist/comparison/m3_seed2_gamma0.02/net.prototxt")
    assert "gamma: 0.02" in other.read_text()
    assert gamma.stdout.splitlines()[-1].endswith("comparison_gamma0.02.png")
    assert "4 of 4 runs are done already" in compare(mnist, *args).stdout

    # In a tree that moved, all of them are still the same.
    moved = mnist.root.parent / "moved"
    mnist.root.rename(moved)
    mnist.root = moved
    assert "4 of 4 runs are done already" in compare(mnist, *args).stdout

    # Other images, another solver: no finished run is lost to them.
    before = (moved / "myexamples/mnist/comparison/m1_seed1/train.log"
              ).read_text()
    dataset = mnist.path("mnist/mnist_train_lmdb/dataset.txt")
    name = dataset.read_text().strip()
    say_that_it_is(mnist, "Others")
    refused = compare(mnist, *args)
    assert refused.returncode == 1
    assert "error: myexamples/mnist/comparison/m1_seed1 was trained on " \
        "%s: move it away to train on Others" % name in refused.stdout
    say_that_it_is(mnist, name)
    mnist.replace("mnist/compare_solver.prototxt", base_lr=0.01)
    refused = compare(mnist, *args)
    assert refused.returncode == 1
    assert "m1_seed1 has a finished run of another net or solver" \
        in refused.stdout
    assert mnist.path("mnist/comparison/m1_seed1/train.log").read_text() \
        == before


@pytest.mark.parametrize("args, message", [
    (["--gamma", "-1"], "largemargin_inner_product_param.gamma is -1"),
    (["--seeds", "0"], "seeds and jobs are at least 1"),
    (["-m", "1", "0"], "-m 0: a margin is from 1 to 1000"),
    (["-m", "2000"], "-m 2000: a margin is from 1 to 1000"),
    (["--solver", "none.prototxt"], "cannot read none.prototxt"),
])
def test_comparison_of_nonsense(tree, args, message):
    done = tree.run("mnist/compare_margins.py", *args)
    assert done.returncode != 0
    assert message in done.stdout and "Traceback" not in done.stdout
    assert not tree.path("mnist/comparison").exists()


@pytest.mark.parametrize("program, args, lacks, script", [
    ("mnist/compare_margins.py", [], "mnist/mnist_train_lmdb",
     "mnist/compare_margins.sh"),
    ("mnist/compare_margins.py", ["--validation"], "mnist/mnist_fit_lmdb",
     "mnist/compare_margins.sh --validation"),
    ("mnist_2d/mnist_2d.py", [], "mnist/mnist_train_lmdb",
     "mnist_2d/train_2d.sh"),
    ("mnist_verification/mnist_verification.py", [],
     "mnist/data/t10k-images-idx3-ubyte",
     "mnist_verification/train_verification.sh"),
    ("mnist_verification/mnist_verification.py", ["--images", "{}/x"],
     "mnist_verification/train_lmdb",
     "mnist_verification/train_verification.sh"),
    ("kanji_verification/kanji_verification.py", [],
     "kanji_verification/drawn/pairs.npz",
     "kanji_verification/train_kanji.sh"),
])
def test_without_the_images(tree, tmp_path, program, args, lacks, script):
    """Before anything is trained, it is said how to get them."""
    for name, data in small_mnist(test=20).items():
        if name.startswith("t10k"):
            (tmp_path / name.replace("t10k", "x").replace(".gz", "")
             ).write_bytes(gzip.decompress(data))
    done = tree.run(program, *[arg.format(tmp_path) for arg in args])
    assert (done.returncode, done.stdout) == (
        1, "error: myexamples/%s is missing: run myexamples/%s, which gets "
        "what is needed\n" % (lacks, script))
    assert not list(tree.root.rglob("train.log"))


def test_paired_difference_and_its_interval():
    """By the book: mean 0.1, sd 0.1, n = 4, t(0.975, 3) = 3.1824."""
    from compare_margins import Result
    softmax = [1.0, 2.0, 3.0, 4.0]
    found = Result(2, [1.0, 2.2, 3.1, 4.1], softmax)
    half = 3.18245 * np.std([0, 0.2, 0.1, 0.1], ddof=1) / 2
    assert found.difference == pytest.approx(0.1)
    assert found.interval == pytest.approx((0.1 - half, 0.1 + half),
                                           abs=1e-5)
    # Their t is 2.449 with 3 degrees of freedom.
    assert found.p == pytest.approx(0.0917, abs=1e-3)
    # The same difference in each: there is no spread to judge by.
    assert Result(2, [1.5, 2.5], [1.0, 2.0]).interval is None
    assert Result(2, [1.5], [1.0]).interval is None


def test_comparison_has_the_colour_of_all_plots():
    import figures
    from compare_margins import Result, draw
    figure = draw([Result(1, [1.0, 2.0]), Result(2, [1.0, 2.5], [1.0, 2.0])],
                  "test", "a title")
    for axis in figure.axes:
        (points, _, bars), = axis.containers
        assert points.get_color() == figures.COLOURS[0]
        for bar in bars:
            assert to_hex(bar.get_color()[0]) == figures.COLOURS[0].lower()


def cut(path, record):
    """The items of an idx file as one byte string each."""
    data = path.read_bytes()
    count = int.from_bytes(data[4:8], "big")
    head = len(data) - count * record
    assert head in (8, 16)
    return [data[head + i * record:head + (i + 1) * record]
            for i in range(count)]


def records(lmdb, caffe_root):
    """The (label, pixels) of an LMDB in their order, as Caffe reads them."""
    code = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1] + "/python")
import caffe
net = caffe.Net(sys.argv[2], caffe.TEST)
out = []
for _ in range(int(sys.argv[3])):
    net.forward()
    out.append(bytes([int(net.blobs["label"].data[0])])
               + net.blobs["data"].data.astype(np.uint8).tobytes())
sys.stdout.buffer.write(b"".join(out))
"""
    net = lmdb.parent / "read.prototxt"
    net.write_text("""layer {
        name: "data" type: "Data" top: "data" top: "label"
        data_param { source: "%s" batch_size: 1 backend: LMDB } }""" % lmdb)
    count = {"mnist_fit_lmdb": 167, "mnist_validation_lmdb": 33}[lmdb.name]
    # One more: a data layer begins again after the last image.
    raw = subprocess.run(
        ["/usr/bin/python3", "-c", code, caffe_root, str(net),
         str(count + 1)], env=dict(os.environ, GLOG_minloglevel="2"),
        stdout=subprocess.PIPE, check=True, timeout=60).stdout
    found = [raw[i:i + 785] for i in range(0, len(raw), 785)]
    assert found.pop() == found[0]
    return found


def test_validation_is_the_last_sixth_of_the_training_images(mnist,
                                                             caffe_root):
    done = mnist.run("mnist/compare_margins.sh", "--validation", "-m", "1",
                     "2", "--seeds", "1", env=mnist.env)
    assert done.returncode == 0, done.stdout
    here = mnist.path("mnist")
    images = cut(here / "data/train-images-idx3-ubyte", 784)
    labels = cut(here / "data/train-labels-idx1-ubyte", 1)
    whole = [label + image for label, image in zip(labels, images)]
    assert records(here / "mnist_fit_lmdb", caffe_root) == whole[:167]
    assert records(here / "mnist_validation_lmdb", caffe_root) == whole[167:]
    net = (here / "comparison/validation/m2_seed1/net.prototxt").read_text()
    assert re.findall(r"mnist/mnist_\w+", net) == [
        "mnist/mnist_fit_lmdb", "mnist/mnist_validation_lmdb"]
    assert not (here / "comparison/m2_seed1").exists()
    assert not (here / "lmdb.new").exists()

    # Parts of different images are not put beside each other.
    shutil.rmtree(here / "mnist_validation_lmdb")
    (here / "mnist_fit_lmdb/dataset.txt").write_text("Others\n")
    refused = mnist.run("mnist/create_validation.sh", env=mnist.env)
    assert refused.returncode == 1
    assert "mnist_fit_lmdb is not made from the images of myexamples/mnist/" \
        "mnist_train_lmdb: move it away" in refused.stdout
    # Nor is one moved away that cannot be read.
    (here / "mnist_fit_lmdb/dataset.txt").unlink()
    (here / "mnist_fit_lmdb/dataset.txt").mkdir()
    refused = mnist.run("mnist/create_validation.sh", env=mnist.env)
    assert refused.returncode == 1
    assert re.search(
        r"error: cannot read which images myexamples/mnist/mnist_fit_lmdb and "
        r"myexamples/mnist/mnist_train_lmdb hold: cmp: .*: Is a directory\n",
        refused.stdout)
    assert not (here / "mnist_validation_lmdb").exists()


def test_validation_takes_no_argument(tree):
    done = tree.run("mnist/create_validation.sh", "--fashion")
    assert done.returncode == 2
    assert "unknown argument --fashion" in done.stdout


def test_2d_features(mnist):
    mnist.replace("mnist_2d/mnist_2d_solver.prototxt", test_iter=1,
                  test_interval=4, display=2, max_iter=4)
    done = mnist.run("mnist_2d/train_2d.sh", "--seeds", "2", env=mnist.env)
    assert done.returncode == 0, done.stdout
    rows = [re.findall(r"[\d.]+", line) for line in done.stdout.splitlines()
            if re.match(r"\| \d \|", line)]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    for _, mean, deviation, *errors, _ in rows:
        errors = np.array(errors, float)
        assert float(mean) == pytest.approx(errors.mean(), abs=0.006)
        assert float(deviation) == pytest.approx(errors.std(ddof=1), abs=0.01)
    assert [row[-1] for row in rows] == ["98.45", "98.96", "99.22", "99.34"]
    line = done.stdout.splitlines()[-1]
    assert line.startswith("plot (of seed 1): ")
    plot = line.split(": ", 1)[1]
    assert Image.open(plot).size == (1560, 897)
    # The paper's figures are those of MNIST.
    say_that_it_is(mnist, "Others")
    for mark in mnist.path("mnist_2d/runs").glob("*/done"):
        mark.write_text("Others\n")
    other = mnist.run("mnist_2d/train_2d.sh", "--seeds", "2", env=mnist.env)
    assert "8 of 8 runs are done already" in other.stdout
    assert "98.45" not in other.stdout


class Result:
    """Features as mnist_2d.py draws them."""

    def __init__(self, features, labels, accuracy=0.5):
        self.features, self.labels = features, labels
        self.accuracy, self.weights = accuracy, np.eye(2)


def test_2d_picture_names_what_it_shows():
    from mnist_2d import draw
    found = Result(np.array([[3.0, 0.1], [0.1, 2.0]]), np.array([0, 1]))
    figure = draw([(1, found, found), (4, found, Result(
        found.features, found.labels, 0.9876))], "Some images", {4: 99.34})
    assert figure._suptitle.get_text() == "Some images"
    upper, lower = figure.axes[:2], figure.axes[2:]
    assert [axis.get_title() for axis in upper] == [
        "softmax (m = 1)", "L-Softmax, m = 4"]
    assert upper[0].get_xlabel() == "training accuracy 50.00 %"
    assert lower[0].get_xlabel() == "test accuracy 50.00 %"
    assert lower[1].get_xlabel() == "test accuracy 98.76 %\n(paper: 99.34 %)"
    assert lower[0].get_ylabel() == "2 test images"
    for axis in figure.axes:
        assert axis.get_aspect() in ("equal", 1.0)
        # The classes are named where their rays end.
        assert {text.get_text(): tuple(np.sign(np.round(text.xy, 3)))
                for text in axis.texts} == {"0": (1, 0), "1": (0, 1)}


def test_2d_table_of_margins_that_the_paper_does_not_have(capsys):
    from mnist_2d import PAPER, print_table

    class Run:
        def __init__(self, margin, accuracy):
            self.margin, self.accuracy = margin, lambda: accuracy
    print_table([Run(4, 0.99), Run(8, 0.98)], [4, 8], PAPER)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| 4 | 99.00 | - | 99.00 | 99.34 |", "| 8 | 98.00 | - | 98.00 | - |"]
