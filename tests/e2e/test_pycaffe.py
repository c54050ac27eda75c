"""Both layers from Python, as Caffe's own."""

import os
import subprocess
import sys

import numpy as np
import pytest

import caffe
from caffe import layers as L
from caffe import params as P
from caffe_e2e import (
    CAFFE_ROOT, IP1, LOSS, data_layer, environment, lambda_at, margin_layer,
    write_net, write_solver)


def spec_net():
    """A net as a user of NetSpec writes it."""
    n = caffe.NetSpec()
    n.data, n.label = L.HDF5Data(source="data.txt", batch_size=16, ntop=2)
    n.ip1 = L.InnerProduct(n.data, num_output=6,
                           weight_filler=dict(type="xavier"))
    n.bn1 = L.BN(n.ip1, in_place=True, bn_param=dict(momentum=0.8, eps=1e-4))
    n.prelu1 = L.PReLU(n.bn1, in_place=True)
    n.ip2, n["lambda"], n.plain = L.LargeMarginInnerProduct(
        n.prelu1, n.label, ntop=3,
        largemargin_inner_product_param=dict(
            num_output=4, type=P.LargeMarginInnerProduct.QUADRUPLE,
            base=100, gamma=0.5, power=2, lambda_min=0.5,
            weight_filler=dict(type="xavier")))
    n.loss = L.SoftmaxWithLoss(n.ip2, n.label)
    n.accuracy = L.Accuracy(n.plain, n.label)
    return n.to_proto()


@pytest.fixture
def spec(data):
    (data / "net.prototxt").write_text(str(spec_net()))
    return data


def test_net_spec(spec):
    layer = [l for l in spec_net().layer
             if l.type == "LargeMarginInnerProduct"][0]
    param = layer.largemargin_inner_product_param
    assert (param.num_output, param.type, param.base) == (4, 3, 100)
    assert list(layer.top) == ["ip2", "lambda", "plain"]
    net = caffe.Net("net.prototxt", caffe.TRAIN)
    assert [layer.type for layer in net.layers if layer.type in (
        "BN", "LargeMarginInnerProduct")] == ["BN", "LargeMarginInnerProduct"]
    assert net.params["ip2"][0].data.shape == (4, 6)
    assert [blob.data.shape for blob in net.params["bn1"]] == 4 * [(1, 6)]
    assert len(net.layers[list(net._layer_names).index("ip2")].blobs) == 1


def test_solver_steps(spec):
    solver = caffe.SGDSolver(str(write_solver(
        spec, net="net.prototxt", display=0, max_iter=200)))
    losses, lambdas, accuracies = [], [], []
    for _ in range(200):
        solver.step(1)
        losses.append(float(solver.net.blobs["loss"].data))
        lambdas.append(solver.net.blobs["lambda"].data.item())
        accuracies.append(float(solver.net.blobs["accuracy"].data))
    expected = [lambda_at(i + 1, base=100, gamma=0.5, power=2, lambda_min=0.5)
                for i in range(200)]
    np.testing.assert_allclose(lambdas, expected, rtol=1e-6)
    assert np.mean(losses[-20:]) < 0.2
    assert accuracies[-1] == 1


def test_third_top_is_what_a_deployed_net_says(spec):
    solver = caffe.SGDSolver(str(write_solver(
        spec, net="net.prototxt", display=0)))
    solver.step(30)
    net = solver.net
    net.forward()
    ip2, plain = net.blobs["ip2"].data, net.blobs["plain"].data
    features = net.blobs["ip1"].data
    np.testing.assert_allclose(plain, features @ net.params["ip2"][0].data.T,
                               rtol=1e-4, atol=1e-5)
    labels = net.blobs["label"].data.astype(int)
    target = np.arange(4) == labels[:, None]
    assert np.array_equal(ip2[~target], plain[~target])
    # psi <= cos: the margin only ever lowers the target logit.
    assert (ip2[target] < plain[target]).all()


def saved_param(net, folder):
    """The margin layer's parameter in a model that the net saves."""
    from caffe.proto import caffe_pb2
    net.save("saved.caffemodel")
    saved = caffe_pb2.NetParameter()
    saved.ParseFromString((folder / "saved.caffemodel").read_bytes())
    layer, = [layer for layer in saved.layer if layer.name == "ip2"]
    return layer.largemargin_inner_product_param


def test_the_passes_are_in_a_solvers_net(spec):
    solver = caffe.SGDSolver(str(write_solver(
        spec, net="net.prototxt", display=0)))
    solver.step(5)
    param = saved_param(solver.net, spec)
    assert (param.passes, param.HasField("iteration")) == (5, False)


def test_no_passes_are_in_other_nets(spec):
    """They would be those since the net was made, whatever it has read."""
    net = caffe.Net("net.prototxt", caffe.TRAIN)
    for _ in range(5):
        net.forward()
    assert not saved_param(net, spec).HasField("passes")


def gradients(folder, touched):
    """Those by the weights, in a solver's net; touched: with a value in the
    gradient of the plain logits."""
    solver = caffe.SGDSolver(str(write_solver(
        folder, net="net.prototxt", display=0)))
    net = solver.net
    net.forward()
    if touched:
        net.blobs["plain"].diff[...] = 2.3
    net.backward()
    return {name: [blob.diff.copy() for blob in blobs]
            for name, blobs in net.params.items()}


def test_what_no_loss_wrote_is_no_gradient(spec):
    """On the GPU Accuracy clears its bottom's gradient, and the loss of an old
    Caffe leaves other numbers there, with loss_weight 0 as well."""
    untouched, touched = gradients(spec, False), gradients(spec, True)
    for name, blobs in untouched.items():
        for one, other in zip(blobs, touched[name]):
            assert one.tobytes() == other.tobytes(), name


def test_a_loss_on_the_plain_logits_is_one_in_a_solver(spec):
    text = (spec / "net.prototxt").read_text()
    without = gradients(spec, False)
    (spec / "net.prototxt").write_text(text.replace(
        "Accuracy", "SoftmaxWithLoss"))
    assert "Accuracy" in text
    with_loss = gradients(spec, False)
    assert not np.allclose(without["ip2"][0], with_loss["ip2"][0])


def test_a_gradient_by_hand_on_the_plain_logits_counts(spec):
    """In a solver's net as in others, where no layer has the third top."""
    text = (spec / "net.prototxt").read_text()
    (spec / "net.prototxt").write_text(text.replace(
        'bottom: "plain"', 'bottom: "ip2"'))
    assert 'bottom: "plain"' in text
    more = gradients(spec, True)["ip2"][0] - gradients(spec, False)["ip2"][0]
    # The same for each class and sample: 2.3 times the sum of the features.
    assert np.abs(more).max() > 1
    np.testing.assert_allclose(more, np.tile(more[:1], (4, 1)), rtol=1e-3)


def test_reshape_between_passes(data):
    text = """
layer { name: "data" type: "Input" top: "data" top: "label"
  input_param { shape { dim: 2 dim: 8 } shape { dim: 2 } } }
""" + IP1 + margin_layer("margin: 4 base: 0")
    net = caffe.Net(str(write_net(data, text)), caffe.TRAIN)
    random = np.random.RandomState(0)
    samples, labels = random.randn(20, 8), np.arange(20) % 4
    whole = None
    for batch in (20, 3, 1, 7):
        net.blobs["data"].reshape(batch, 8)
        net.blobs["label"].reshape(batch)
        net.blobs["data"].data[...] = samples[:batch]
        net.blobs["label"].data[...] = labels[:batch]
        logits = net.forward()["ip2"].copy()
        whole = logits if whole is None else whole
        np.testing.assert_allclose(logits, whole[:batch], rtol=1e-5,
                                   atol=1e-6)


@pytest.mark.parametrize("in_place", (True, False))
def test_bn_in_a_test_net(spec, in_place):
    """The gradient by its input is there. For those by its parameters it
    would, in place, keep its normalized input: that is saved."""
    text = "force_backward: true\n" + (spec / "net.prototxt").read_text()
    if not in_place:
        text = text.replace('top: "ip1"', 'top: "raw"', 1).replace(
            'bottom: "ip1"', 'bottom: "raw"', 1)
    (spec / "net.prototxt").write_text(text)
    solver = caffe.SGDSolver(str(write_solver(
        spec, net="net.prototxt", display=0, test_iter=1, test_interval=100)))
    plain = caffe.Net("net.prototxt", caffe.TEST)
    tested = solver.test_nets[0]
    for name, blobs in tested.params.items():
        for own, other in zip(plain.params[name], blobs):
            own.data[...] = other.data
    plain.params["bn1"][3].data[...] = tested.params["bn1"][3].data[...] = 2
    for net in (plain, tested):
        net.forward()
        net.blobs["ip2"].diff[...] = 0
        net.blobs["ip2"].diff[:, 0] = 1
        # Accuracy has no backward pass.
        net.backward(start="ip2")
    assert tested.blobs["data"].diff.any()
    assert np.array_equal(tested.blobs["data"].diff, plain.blobs["data"].diff)
    for i in range(2):
        there = plain.params["bn1"][i].diff
        assert there.any()
        assert np.array_equal(tested.params["bn1"][i].diff,
                              np.zeros_like(there) if in_place else there)


def test_bn_test_phase_after_training(spec):
    """What BN has moved during training is what its TEST phase uses."""
    solver = caffe.SGDSolver(str(write_solver(
        spec, net="net.prototxt", display=0)))
    solver.step(100)
    solver.net.save("trained.caffemodel")
    net = caffe.Net("net.prototxt", "trained.caffemodel", caffe.TEST)
    trained = [blob.data.copy() for blob in net.params["bn1"]]
    net.forward()
    assert float(net.blobs["accuracy"].data) == 1
    for blob, before in zip(net.params["bn1"], trained):
        assert np.array_equal(blob.data, before)
    slope, bias, mean, inv_std = trained
    assert (inv_std != 1).all() and (mean != 0).all()
    data = net.blobs["data"].data @ net.params["ip1"][0].data.T
    data += net.params["ip1"][1].data
    expected = slope * (data - mean) * inv_std + bias
    expected = np.where(expected > 0, expected,
                        net.params["prelu1"][0].data * expected)
    np.testing.assert_allclose(net.blobs["ip1"].data, expected, rtol=1e-3,
                               atol=1e-4)


def test_draw_net(data):
    """Caffe's draw_net.py draws a net with the layers."""
    pytest.importorskip("pydot", reason="needs python3-pydot")
    write_net(data, data_layer() + IP1 + margin_layer("type: TRIPLE") + LOSS)
    if not any(os.access(os.path.join(folder, "dot"), os.X_OK)
               for folder in os.environ["PATH"].split(os.pathsep)):
        pytest.skip("needs graphviz")
    done = subprocess.run(
        [sys.executable, str(CAFFE_ROOT / "python" / "draw_net.py"),
         "net.prototxt", "net.svg"], cwd=data, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert "LargeMarginInnerProduct" in (data / "net.svg").read_text()
