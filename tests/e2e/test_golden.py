"""The layers give what the original release gave for the same inputs."""

import numpy as np
import pytest

import caffe
from caffe_e2e import ROOT, write_net

GOLDEN = ROOT / "tests" / "golden"
TYPES = ("single", "double", "triple", "quadruple")


def vectors(pattern):
    found = sorted(GOLDEN.glob(pattern))
    assert found, "no %s in %s" % (pattern, GOLDEN)
    return [pytest.param(path, id=path.stem) for path in found]


def shape(array):
    return "shape { %s }" % " ".join("dim: %d" % d for d in array.shape)


def close(actual, expected):
    np.testing.assert_allclose(
        actual.reshape(expected.shape), expected, rtol=1e-4,
        atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("path", vectors("lm_*.npz"))
def test_large_margin(path, tmp_path):
    golden = np.load(path)
    base, gamma, power, lambda_min, iteration, axis = golden["param"]
    margin_type = path.stem.split("_")[1]
    assert margin_type in TYPES
    net = caffe.Net(str(write_net(tmp_path, """
force_backward: true
layer { name: "x" type: "Input" top: "x" input_param { %s } }
layer { name: "label" type: "Input" top: "label" input_param { %s } }
layer {
  name: "lm" type: "LargeMarginInnerProduct"
  bottom: "x" bottom: "label" top: "lm" top: "lambda"
  largemargin_inner_product_param {
    num_output: %d type: %s axis: %d
    base: %r gamma: %r power: %r lambda_min: %r iteration: %d
  }
}
""" % (shape(golden["x"]), shape(golden["label"]), golden["w"].shape[0],
       margin_type.upper(), axis, float(base), float(gamma), float(power),
       float(lambda_min), iteration))), caffe.TRAIN)
    net.blobs["x"].data[...] = golden["x"]
    net.blobs["label"].data[...] = golden["label"]
    net.params["lm"][0].data[...] = golden["w"]
    for expected in golden["lambdas"]:
        net.forward()
        close(net.blobs["lambda"].data, np.array([expected]))
    close(net.blobs["lm"].data, golden["top"])
    net.params["lm"][0].diff[...] = 0
    net.blobs["lm"].diff[...] = golden["top_diff"]
    net.backward()
    close(net.blobs["x"].diff, golden["x_diff"])
    close(net.params["lm"][0].diff, golden["w_diff"])


@pytest.mark.parametrize("path", vectors("bn_*.npz"))
def test_batch_norm(path, tmp_path):
    golden = np.load(path)
    text = """
force_backward: true
layer { name: "x" type: "Input" top: "x" input_param { %s } }
layer { name: "bn" type: "BN" bottom: "x" top: "y" bn_param { frozen: %s } }
""" % (shape(golden["x"]), "true" if path.stem == "bn_frozen" else "false")
    names = ("slope", "bias", "moving_mean", "moving_inv_std")

    def make_net(phase, suffix):
        net = caffe.Net(str(write_net(tmp_path, text)), phase)
        net.blobs["x"].data[...] = golden["x"]
        for blob, name in zip(net.params["bn"], names):
            blob.data[...] = golden[
                name + suffix if name.startswith("moving") else name]
        return net

    net = make_net(caffe.TRAIN, "")
    for _ in range(2 if path.stem == "bn_4d" else 1):
        net.forward()
    close(net.blobs["y"].data, golden["y"])
    for blob, name in zip(net.params["bn"][2:], names[2:]):
        close(blob.data, golden[name + "_after"])
    for blob in net.params["bn"]:
        blob.diff[...] = 0
    net.blobs["y"].diff[...] = golden["top_diff"]
    net.backward()
    close(net.blobs["x"].diff, golden["x_diff"])
    for blob, name in zip(net.params["bn"], names[:2]):
        close(blob.diff, golden[name + "_diff"])

    net = make_net(caffe.TEST, "_after")
    net.forward()
    close(net.blobs["y"].data, golden["y_test"])
