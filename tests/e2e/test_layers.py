"""What the layers do in a whole process: the version in the log, forked
children, a loss on the logits without margin, a channel without variance."""

import re

import pytest

from caffe_e2e import (
    IP1, LOSS, ROOT, data_layer, inner_product, margin_layer, read_weights,
    run, run_caffe, write_net, write_solver)

BN = """
layer { name: "bn%d" type: "BN" bottom: "ip1" top: "ip1" }
"""


def test_the_log_says_the_version_once(data):
    write_net(data, data_layer() + IP1 + BN % 1 + BN % 2 + margin_layer()
              + LOSS)
    log = run_caffe("time", "--model=net.prototxt", "--iterations=2",
                    cwd=data)
    version = re.search(r'^version = "(.*)"', (
        ROOT / "Cargo.toml").read_text(), re.M).group(1)
    assert re.findall(r"\] L-Softmax layers, version (.*)", log) == [version]


FORK = """
import os
os.environ["RAYON_NUM_THREADS"] = "3"
import multiprocessing
import sys
import caffe
import numpy as np

# Large enough for several threads.
net = caffe.Net("net.prototxt", caffe.TRAIN)
net.blobs["data"].data[...] = np.sin(np.arange(64 * 48 * 100).reshape(
    64, 48, 10, 10))
net.blobs["bn"].diff[...] = np.cos(np.arange(64 * 48 * 100).reshape(
    64, 48, 10, 10))

def both(_):
    net.forward()
    net.backward(start="bn")
    return net.blobs["bn"].data.tobytes() + net.blobs["data"].diff.tobytes()

def grandchild(_):
    both(None)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map_async(both, [None]).get(timeout=120)[0]

parent = both(None)
# A pool's workers have no children; a process has.
end, other = multiprocessing.Pipe(False)
child = multiprocessing.get_context("fork").Process(
    target=lambda: other.send([both(None) == parent,
                               grandchild(None) == parent]))
child.start()
assert end.poll(200), "the child hangs"
print("same:", end.recv())
child.join()
"""


def test_bn_in_forked_children(data):
    write_net(data, """force_backward: true
layer {
  name: "data" type: "Input" top: "data"
  input_param { shape { dim: 64 dim: 48 dim: 10 dim: 10 } }
}
layer { name: "bn" type: "BN" bottom: "data" top: "bn" }
""")
    (data / "fork.py").write_text(FORK)
    done = run(["/usr/bin/python3", "fork.py"], data)
    assert done.returncode == 0, done.stdout
    assert "same: [True, True]" in done.stdout


PLAIN_LOSS = LOSS.replace('"loss"', '"plain_loss"').replace('"ip2"',
                                                            '"plain"')


@pytest.mark.parametrize("order", [PLAIN_LOSS, PLAIN_LOSS.replace(
    "}", 'loss_weight: 1 }')])
def test_a_loss_on_the_plain_logits_trains(data, order):
    """As the plain inner product, step for step."""
    solver = dict(max_iter=20, snapshot_prefix="snap", net="net.prototxt")
    for name, layers in (
            ("margin", margin_layer(param="type: QUADRUPLE", tops=(
                "ip2", "lambda", "plain")) + order),
            ("inner", inner_product() + LOSS)):
        write_net(data, data_layer() + IP1 + layers)
        solver["snapshot_prefix"] = name
        path = write_solver(data, **solver)
        run_caffe("train", "--solver=%s" % path, cwd=data)
    margin = read_weights(data / "margin_iter_20.caffemodel")
    inner = read_weights(data / "inner_iter_20.caffemodel")
    assert margin.keys() == inner.keys() and margin
    for key in margin:
        assert abs(margin[key] - inner[key]).max() < 1e-5, key


def test_a_channel_without_variance_is_said_once(data):
    # The second feature of ip1 is 0 whatever comes in.
    dead = IP1.replace('name: "prelu1" type: "PReLU"',
                       'name: "zero" type: "Power"').replace(
        'top: "ip1" }', 'top: "ip1" power_param { scale: 0 } }')
    write_net(data, data_layer() + dead + BN % 1 + inner_product() + LOSS)
    path = write_solver(data, max_iter=5)
    log = run_caffe("train", "--solver=%s" % path, cwd=data)
    said = re.findall(r"^W.*\] BN layer 'bn1': all values of channel 0 of a "
                      "batch are the same", log, re.M)
    assert len(said) == 1, log
    write_net(data, data_layer() + IP1 + BN % 1 + inner_product() + LOSS)
    log = run_caffe("train", "--solver=%s" % path, cwd=data)
    assert "all values of channel" not in log
