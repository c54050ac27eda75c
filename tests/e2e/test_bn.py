"""BN in whole nets: what the solver and Caffe's Net make of it."""

import re

import numpy as np
import pytest

import caffe
from caffe_e2e import (
    IP1, LOSS, assert_same_weights, data_layer, inner_product, read_weights,
    run_caffe, write_net, write_solver)


def bn(param="", extra=""):
    return """
layer {
  name: "bn1" type: "BN" bottom: "ip1" top: "bn1" %s bn_param { %s }
}
""" % (extra, param)


def net(param="", extra=""):
    return data_layer() + IP1 + bn(param, extra) + inner_product().replace(
        'bottom: "ip1"', 'bottom: "bn1"') + LOSS


def train(folder, text, prefix="snap", options=(), **solver):
    write_net(folder, text, prefix + ".net")
    fields = dict(max_iter=20, base_lr=0.1, weight_decay=0.05)
    fields.update(solver)
    path = write_solver(folder, net=prefix + ".net", name=prefix + ".solver",
                        snapshot_prefix=prefix, **fields)
    return run_caffe("train", "--solver=%s" % path, *options, cwd=folder)


def warnings(log):
    return re.findall(r"^W\S+ .*\] (BN layer 'bn1'.*)$", log, re.M)


MOVED = "param { } param { } " + 2 * "param { lr_mult: 3 decay_mult: 4 } "


def test_the_solver_moves_no_moving_statistics(data):
    train(data, net(), "plain")
    log = train(data, net(extra=MOVED), "spoken", test_iter=1,
                test_interval=10)
    assert_same_weights(data / "plain_iter_20.caffemodel",
                        data / "spoken_iter_20.caffemodel")
    said, = warnings(log)
    assert "lr_mult" in said and "decay_mult" in said
    assert "moving mean, moving inverse standard deviation" in said


@pytest.mark.parametrize("extra", [
    "", 4 * "param { lr_mult: 0 decay_mult: 0 } ",
    "param { decay_mult: 0 } param { decay_mult: 0 } "])
def test_no_warning_where_nothing_is_overruled(data, extra):
    assert warnings(train(data, net(extra=extra))) == []


def test_a_frozen_layer_stays_as_it_is(data):
    train(data, net(), "first")
    before = read_weights(data / "first_iter_20.caffemodel")
    log = train(data, net("frozen: true", extra=4 * (
        "param { lr_mult: 1 decay_mult: 1 } ")), "frozen", options=[
            "--weights=first_iter_20.caffemodel"])
    after = read_weights(data / "frozen_iter_20.caffemodel")
    for i in range(4):
        assert before["bn1", i].tobytes() == after["bn1", i].tobytes()
    assert before["ip1", 0].tobytes() != after["ip1", 0].tobytes()
    assert "slope, bias, moving mean" in warnings(log)[0]


@pytest.mark.parametrize("form", ["BINARYPROTO", "HDF5"])
@pytest.mark.parametrize("solver", ["SGD", "Nesterov", "Adam"])
def test_a_snapshot_brings_no_momentum_of_them(data, form, solver):
    """The original Caffe decays the moving statistics, so that its snapshots
    hold a momentum of theirs, which the solver would go on to apply."""
    import h5py
    from caffe.proto import caffe_pb2
    fields = dict(type=solver, snapshot=10, snapshot_format=form)
    text = net("frozen: true")
    train(data, text, "whole", **fields)
    # Blobs 2 to 5 are BN's: ip1 has two, its PReLU has one before them.
    if form == "HDF5":
        state = "whole_iter_10.solverstate.h5"
        with h5py.File(data / state, "a") as file:
            number = len(file["history"])
            for i in (3, 4, 5, 6):
                file["history"][str(i)][...] = 0.5
            shapes = {file["history"][str(i)].shape for i in (3, 4, 5, 6)}
    else:
        state = "whole_iter_10.solverstate"
        solved = caffe_pb2.SolverState()
        solved.ParseFromString((data / state).read_bytes())
        number = len(solved.history)
        for i in (3, 4, 5, 6):
            solved.history[i].data[:] = [0.5] * len(solved.history[i].data)
        shapes = {tuple(solved.history[i].shape.dim) for i in (3, 4, 5, 6)}
        (data / state).write_bytes(solved.SerializeToString())
    assert shapes == {(1, 6)}
    assert number == (16 if solver == "Adam" else 8)
    train(data, text, "resumed", options=["--snapshot=" + state], **fields)
    suffix = ".h5" if form == "HDF5" else ""
    assert_same_weights(data / ("whole_iter_20.caffemodel" + suffix),
                        data / ("resumed_iter_20.caffemodel" + suffix))


def test_a_frozen_trunk_ends_the_backward_pass(data):
    """Where the prototxt says so: Caffe's Net does not ask the layer."""
    still = "param { lr_mult: 0 } "
    trunk = IP1.replace('top: "ip1"\n', 'top: "ip1" %s\n' % (2 * still)
                        ).replace('type: "PReLU"', 'type: "PReLU" ' + still)
    text = data_layer() + trunk + bn("frozen: true", "%s") + \
        inner_product().replace('bottom: "ip1"', 'bottom: "bn1"') + LOSS
    log = train(data, text % (4 * still), max_iter=2)
    for name in ("ip1", "prelu1", "bn1"):
        assert "%s does not need backward computation." % name in log
    assert "ip2 needs backward computation." in log
    assert warnings(log) == []
    # Two of the four are not enough.
    log = train(data, text % (2 * still), max_iter=2)
    assert "bn1 needs backward computation." in log




def dummy(shape, filler):
    return """
layer {
  name: "x" type: "DummyData" top: "x"
  dummy_data_param { shape { %s } data_filler { %s } }
}
""" % (" ".join("dim: %d" % d for d in shape), filler)


def constant_net(shape, filler, param=""):
    return dummy(shape, filler) + bn(param).replace('"ip1"', '"x"') + """
layer { name: "loss" type: "Reduction" bottom: "bn1" top: "loss"
  reduction_param { operation: SUMSQ } }
"""


GAUSSIAN = 'type: "gaussian"'


@pytest.mark.parametrize("shape, filler, param, warned", [
    # One value a channel; values that are all the same.
    ((1, 3), GAUSSIAN, "", True),
    ((1, 3, 1, 1), GAUSSIAN, "", True),
    ((4, 3, 2, 2), "value: 0.1", "", True),
    ((2, 3), GAUSSIAN, "", False),
    ((1, 3, 2, 1), GAUSSIAN, "", False),
    ((1, 3), GAUSSIAN, "frozen: true", False)])
def test_nothing_to_measure_warns_once(data, shape, filler, param, warned):
    log = train(data, constant_net(shape, filler, param), test_iter=2,
                test_interval=5)
    said = warnings(log)
    assert len(said) == warned
    for words in warned * ("channel 0", "variance is 0", "= 316.2",
                           "larger batches"):
        assert words in said[0]
    inv_std = read_weights(data / "snap_iter_20.caffemodel")["bn1", 3]
    assert (inv_std.min() > 250) == warned


def test_the_channel_that_is_constant_is_named(data):
    """The others are as they should be, and other batches are, too."""
    import h5py
    import numpy as np
    features = np.random.RandomState(0).randn(32, 8).astype("f4")
    features[16:, 5] = -2.5
    with h5py.File(data / "data.h5", "a") as file:
        file["data"][...] = features
    text = data_layer() + bn().replace('"ip1"', '"data"') + \
        inner_product().replace('"ip1"', '"bn1"') + LOSS
    log = train(data, text)
    said, = warnings(log)
    assert "channel 5 of a batch" in said


def test_two_layers_share_their_blobs_by_name(tmp_path):
    """As in a Siamese net: one slope and bias, and each branch moves on the
    moving statistics."""
    shared = "".join('param { name: "%s" }' % name for name in "sbmv")
    path = write_net(tmp_path, """
force_backward: true
layer {
  name: "x" type: "Input" top: "ip1" input_param { shape { dim: 6 dim: 3 } }
}
layer {
  name: "twice" type: "Power" bottom: "ip1" top: "other"
  power_param { power: 2 }
}
""" + bn(extra=shared) + bn(extra=shared).replace('"bn1"', '"bn2"').replace(
        '"ip1"', '"other"'))
    net = caffe.Net(str(path), caffe.TRAIN)
    x = np.random.RandomState(1).randn(6, 3)
    net.blobs["ip1"].data[...] = x
    net.params["bn2"][0].data[...] = [[2, 3, 4]]
    net.forward()
    moving = np.zeros(3)
    for top, values in (("bn1", x), ("bn2", x ** 2)):
        x_hat = (values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5)
        np.testing.assert_allclose(net.blobs[top].data, x_hat * [2, 3, 4],
                                   rtol=1e-4, atol=1e-5)
        moving = 0.9 * moving + 0.1 * values.mean(0)
    np.testing.assert_allclose(net.params["bn1"][2].data[0], moving,
                               rtol=1e-5, atol=1e-6)
    net.blobs["bn1"].diff[...] = 1
    net.blobs["bn2"].diff[...] = 2
    net.clear_param_diffs()
    net.backward()
    np.testing.assert_allclose(net.params["bn2"][1].diff, [[18, 18, 18]])


@pytest.mark.parametrize("frozen", ("bn1", "bn2"))
def test_what_a_frozen_layer_shares_is_not_learned(data, frozen):
    """Whichever comes first: a blob has one learning rate."""
    shared = "".join('param { name: "%s" }' % name for name in "sbmv")
    both = "".join(
        bn("frozen: true" if name == frozen else "", shared).replace(
            '"bn1"', '"%s"' % name) for name in ("bn1", "bn2"))
    train(data, data_layer() + IP1 + both + """
layer {
  name: "sum" type: "Eltwise" bottom: "bn1" bottom: "bn2" top: "sum"
}
""" + inner_product().replace('bottom: "ip1"', 'bottom: "sum"') + LOSS)
    weights = read_weights(data / "snap_iter_20.caffemodel")
    for name in ("bn1", "bn2"):
        assert (weights[name, 0] == 1).all() and not weights[name, 1].any()
        assert weights[name, 2].all() and (weights[name, 3] != 1).all()
