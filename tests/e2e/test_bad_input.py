"""What nobody should feed the layers, through the real `caffe` binary.

Each wrong input ends in a LOG(FATAL) that names the layer, the field or the
sample, and the value; what has a meaning runs, with finite results where the
mathematics is finite.
"""

import re
import sys

import h5py
import numpy as np
import pytest

from caffe_e2e import (
    CAFFE, IP1, LOSS, data_layer, fatal_message, inner_product, margin_layer,
    read_weights, run, run_caffe, write_data, write_net, write_solver)

MARGIN_LAYER = "LargeMarginInnerProduct layer 'ip2'"
BN_LAYER = "BN layer 'bn'"
SAMPLES, CLASSES = 16, 4


def dummy(name, shape, value):
    return """
layer {
  name: "input_%s" type: "DummyData" top: "%s"
  dummy_data_param {
    shape { %s } data_filler { type: "constant" value: %s }
  }
}
""" % (name, name, " ".join("dim: %d" % d for d in shape), value)


def unfilled(name, shape):
    """For empty blobs, which Caffe's fillers refuse."""
    return """
layer {
  name: "input_%s" type: "Input" top: "%s" input_param { shape { %s } }
}
""" % (name, name, " ".join("dim: %d" % d for d in shape))


def gaussian(name, shape):
    return dummy(name, shape, 0).replace(
        'type: "constant" value: 0', 'type: "gaussian"')


def net_fails(folder, text, *words):
    """Expects `caffe time` to refuse the net with a message of these words."""
    net = write_net(folder, "force_backward: true\n" + text)
    message = fatal_message(
        [CAFFE, "time", "--model=%s" % net, "--iterations=1"], folder)
    for word in words:
        assert word in message, message
    return message


def net_runs(folder, text, finite=True, force_backward=True, **solver):
    """Trains two iterations; returns the log.

    With finite, no loss, output, gradient or weight may be inf or NaN.
    """
    write_net(folder, "force_backward: %s debug_info: true\n"
              % str(force_backward).lower() + text)
    options = dict(max_iter=2, base_lr=0.01, weight_decay=0)
    options.update(solver)
    path = write_solver(folder, debug_info=True, **options)
    log = run_caffe("train", "--solver=%s" % path, cwd=folder)
    assert "[Backward] Layer" in log
    if finite:
        for line in log.splitlines():
            # A sum of squares over all of the net is Caffe's own business.
            if "iter/s" not in line and "All net params" not in line:
                assert not re.search(r"[ =(]-?(nan|inf)\b", line), line
        for weights in read_weights(
                folder / ("snap_iter_%d.caffemodel"
                          % options["max_iter"])).values():
            assert np.isfinite(weights).all()
    return log


def own_blobs(*shapes):
    """Blobs of zeros that a prototxt gives its layer."""
    return " ".join("blobs { shape { %s } %s }" % (
        " ".join("dim: " + d for d in shape.split()),
        "data: 0 " * int(np.prod([int(d) for d in shape.split()])))
        for shape in shapes)


def margin_net(param="margin: 4 base: 0", **layer):
    return IP1 + margin_layer(param, **layer) + LOSS


def labelled(folder, label, sample=5, param="margin: 4 base: 0"):
    """A net over a data set one sample of which has this label."""
    labels = np.arange(SAMPLES) % CLASSES + 0.
    labels[sample] = label
    features = np.random.RandomState(0).randn(SAMPLES, 8)
    return data_layer(write_data(folder, "bad", features, labels)) + \
        margin_net(param)


@pytest.mark.parametrize("margin", ["margin: 1", "margin: 4 base: 0"])
@pytest.mark.parametrize("label, said", [
    (4, "4"), (5000, "5000"), (1e10, "10000000000"), (-1, "-1"),
    (1.5, "1.5"), (-0.5, "-0.5"), (3.9999, "3.9999"), (np.nan, "NaN"),
    (np.inf, "inf"), (-np.inf, "-inf"), (2147483648, "2147483648")])
def test_label(tmp_path, label, said, margin):
    message = net_fails(tmp_path, labelled(tmp_path, label, param=margin),
                        MARGIN_LAYER, "sample 5", "label %s" % said)
    assert "[0, 4)" in message


@pytest.mark.parametrize("label", [7, np.nan])
def test_label_that_is_not_the_ignored_one(tmp_path, label):
    net_fails(tmp_path, labelled(
        tmp_path, label, param="margin: 4 ignore_label: 255"),
        MARGIN_LAYER, "sample 5", "ignore_label (255)")


@pytest.mark.parametrize("ignored", [255, -1, 2])
def test_ignored_labels(tmp_path, ignored):
    net = labelled(tmp_path, ignored,
                   param="margin: 4 base: 0 ignore_label: %d" % ignored)
    net = net.replace('top: "loss"', 'top: "loss" loss_param { '
                      'ignore_label: %d }' % ignored)
    net_runs(tmp_path, net)


def test_all_labels_ignored(tmp_path):
    net = dummy("label", [SAMPLES], 255) + gaussian("data", [SAMPLES, 8]) + \
        margin_net("margin: 4 base: 0 ignore_label: 255").replace(
            'top: "loss"', 'top: "loss" loss_param { ignore_label: 255 }')
    net_runs(tmp_path, net)


@pytest.mark.parametrize("shape", [[15], [17], [1], [16, 2], [8, 3]])
def test_wrong_number_of_labels(tmp_path, shape):
    net = dummy("label", shape, 1) + gaussian("data", [SAMPLES, 8]) + \
        margin_net()
    net_fails(tmp_path, net, MARGIN_LAYER, "%d labels" % np.prod(shape),
              "of shape %s" % shape, "16 samples", "Slice", "axis")


DATA = gaussian("data", [SAMPLES, 8]) + dummy("label", [SAMPLES], 1)


@pytest.mark.parametrize("param, words", [
    ("margin: 0", ["margin: 0"]),
    ("margin: 1001", ["margin: 1001"]),
    ("margin: 4294967295", ["margin: 4294967295"]),
    ("base: -1", ["base: -1"]),
    ("base: nan", ["base: NaN"]),
    ("base: inf", ["base: inf"]),
    ("base: 1e39", ["base: inf"]),
    ("gamma: -0.1", ["gamma: -0.1"]),
    ("gamma: nan", ["gamma: NaN"]),
    ("gamma: inf", ["gamma: inf"]),
    ("power: -2", ["power: -2"]),
    ("power: nan", ["power: NaN"]),
    ("power: inf", ["power: inf"]),
    ("lambda_min: -5", ["lambda_min: -5"]),
    ("lambda_min: nan", ["lambda_min: NaN"]),
    ("lambda_min: inf", ["lambda_min: inf"]),
    ("base: -inf", ["base: -inf"]),
    ("gamma: -inf", ["gamma: -inf"]),
    ("gamma: 1e39", ["gamma: inf"]),
    ("power: 1e39", ["power: inf"]),
    ("lambda_min: 1e39", ["lambda_min: inf"]),
    ("iteration: -3", ["iteration: -3"]),
    ("iteration: -2147483648", ["iteration: -2147483648"]),
    ("axis: 2", ["axis: 2", "16, 6"]),
    ("axis: -3", ["axis: -3", "16, 6"]),
    ("axis: 2147483647", ["axis: 2147483647"]),
    ("axis: -2147483648", ["axis: -2147483648"]),
    ("axis: 0", ["16 labels", "1 samples"]),
])
def test_parameter(tmp_path, param, words):
    net_fails(tmp_path, DATA + margin_net(param), MARGIN_LAYER, *words)


@pytest.mark.parametrize("text, words", [
    ("", ["num_output is missing", "in largemargin_inner_product_param"]),
    ("num_output: 0", ["num_output: 0"]),
    ("num_output: 4294967295", ["num_output: 4294967295"]),
])
def test_num_output(tmp_path, text, words):
    net = DATA + margin_net().replace("num_output: 4\n", text + "\n")
    net_fails(tmp_path, net, MARGIN_LAYER, *words)


@pytest.mark.parametrize("features, classes, words", [
    ([16, 512], 5000000, ["5000000 classes times 512 features", "2560000000 "
                          "weights", "2147483647 values at most"]),
    ([65536, 1], 40000, ["65536 samples times 40000 classes",
                         "2621440000 logits"]),
    # No value, but K is above 2^31, and here 2^64.
    ([0, 65536, 65536], 4, ["65536, 65536", "2147483647"]),
    ([0, 65536, 65536, 65536, 65536], 4, ["65536, 65536", "2147483647"]),
])
def test_more_than_2_to_the_31_elements(tmp_path, features, classes, words):
    """Said with the layer's name, before a blob ends in Caffe's words."""
    net = unfilled("ip1", features) + unfilled("label", features[:1]) + \
        margin_layer("margin: 4").replace("num_output: 4",
                                          "num_output: %d" % classes)
    net_fails(tmp_path, net, MARGIN_LAYER, *words)


@pytest.mark.parametrize("param, words", [
    ("type: QUINTUPLE", ["QUINTUPLE", "type"]),
    ("type: 9", ["9", "type"]),
    ("margin: -4", ["Expected integer"]),
    ("margin: 2.5", ["2.5"]),
    ("lamda_min: 5", ["lamda_min"]),
    ("iteration: 3000000000", ["3000000000"]),
    ("margin: 4294967296", ["4294967296"]),
    ("ignore_label: 3000000000", ["3000000000"]),
    ("ignore_label: 2.5", ["Expected integer", "2.5"]),
    ("base: ten", ["ten"]),
    # A comment as the authors' README writes it.
    ("margin: 4 // four", ["Expected identifier", "/"]),
])
def test_text_that_protobuf_refuses(tmp_path, param, words):
    write_net(tmp_path, DATA + margin_net(param))
    log = run_caffe("time", "--model=net.prototxt", cwd=tmp_path, ok=False)
    error = [line for line in log.splitlines() if line.startswith("[libproto")
             or "Error parsing text-format" in line]
    assert error and "Failed to parse NetParameter file: net.prototxt" in log
    for word in words:
        assert word in error[0]


def test_loss_weight_of_lambda(tmp_path):
    net_fails(tmp_path, DATA + margin_net(
        extra="loss_weight: 0 loss_weight: 1"), MARGIN_LAYER, "loss_weight")


@pytest.mark.parametrize("tops, bottoms", [
    (["ip1"], ["ip1", "label"]),
    (["ip2", "label"], ["ip1", "label"]),
    (["ip1"], ["ip1"]),
])
def test_in_place(tmp_path, tops, bottoms):
    """Also where features and logits have one shape."""
    net = gaussian("ip1", [16, 4]) + dummy("label", [16], 1) + \
        margin_layer("margin: 4", tops=tops, bottoms=bottoms)
    net_fails(tmp_path, net, MARGIN_LAYER, "in place")


@pytest.mark.parametrize("tops, bottoms, words", [
    (["ip2"], [], ["LargeMarginInnerProduct", "at least 1 bottom"]),
    (["ip2"], ["ip1", "label", "label"],
     ["LargeMarginInnerProduct", "at most 2 bottom"]),
    ([], ["ip1", "label"], ["LargeMarginInnerProduct", "at least 1 top"]),
    (["a", "b", "c", "d"], ["ip1", "label"],
     ["LargeMarginInnerProduct", "at most 3 top"]),
])
def test_number_of_blobs(tmp_path, tops, bottoms, words):
    net = gaussian("ip1", [16, 8]) + dummy("label", [16], 1) + \
        margin_layer("margin: 4", tops=tops, bottoms=bottoms)
    net_fails(tmp_path, net, *words)


def test_labels_that_are_learned(tmp_path):
    """No gradient passes through a label."""
    net = gaussian("ip1", [16, 8]) + """
layer {
  name: "label" type: "InnerProduct" bottom: "ip1" top: "label"
  inner_product_param { num_output: 1 }
}
""" + margin_layer("margin: 4", tops=["ip2"]) + """
layer { name: "loss" type: "Reduction" bottom: "ip2" top: "loss"
  reduction_param { operation: SUMSQ } loss_weight: 1 }
"""
    net = net.replace("num_output: 1", "num_output: 1 weight_filler { "
                      "type: 'constant' value: 0 }")
    net_fails(tmp_path, net, MARGIN_LAYER, "label")


@pytest.mark.parametrize("extra, words", [
    ('param { name: "w" } param { name: "v" }', ["Too many params", "ip2"]),
    (own_blobs("4 5"), [MARGIN_LAYER, "4 6", "4 5"]),
    (own_blobs("24"), [MARGIN_LAYER, "4 6", "24"]),
    (own_blobs("4 6", "4"), [MARGIN_LAYER, "4 6", "2"]),
])
def test_blobs_of_the_prototxt(tmp_path, extra, words):
    net_fails(tmp_path, DATA + margin_net("margin: 4", extra=extra), *words)


def test_shared_weights_of_another_shape(tmp_path):
    other = margin_layer("margin: 4", tops=["other"],
                         extra='param { name: "w" }').replace(
        '"ip2"', '"other"').replace("num_output: 4", "num_output: 5")
    net = DATA + margin_net(extra='param { name: "w" }') + other
    net_fails(tmp_path, net, "Cannot share param 'w'", "layer 'other'",
              "5 6", "4 6")


def test_unknown_filler(tmp_path):
    net_fails(tmp_path, DATA + margin_net().replace("xavier", "javier"),
              "Unknown filler name", "javier")


@pytest.mark.parametrize("shape, axis, words", [
    ([16], 1, ["axis: 1", "[16]"]),
    ([16, 2, 4], 2, ["16 labels", "32 samples"]),
    ([16, 2, 4], -1, ["16 labels", "32 samples"]),
    ([16, 2, 2, 2, 2], 5, ["axis: 5", "16, 2, 2, 2, 2"]),
    ([16, 2, 2, 2, 2], -6, ["axis: -6", "16, 2, 2, 2, 2"]),
])
def test_axis(tmp_path, shape, axis, words):
    net = gaussian("ip1", shape) + dummy("label", [16], 1) + \
        margin_layer("margin: 4 axis: %d" % axis)
    net_fails(tmp_path, net, MARGIN_LAYER, *words)


@pytest.mark.parametrize("param", [
    # 1 + gamma * iteration far outside the range of float and int
    "margin: 4 base: 1 gamma: 3e38 iteration: 2147483647 power: 100",
    "margin: 4 base: 3e38 gamma: 3e38 iteration: 2147483646 power: 0",
    "margin: 4 base: 3e38 lambda_min: 3e38",
    "margin: 4 base: 0 gamma: 1 power: 3e38",
    "margin: 1000 base: 0",
    "margin: 4 base: -0.0 gamma: -0.0 power: -0.0 lambda_min: -0.0",
    "margin: 4 base: 1e-46 gamma: 1e-46",
    "margin: 4 ignore_label: -2147483648",
    "type: QUADRUPLE axis: -1",
    "type: QUADRUPLE axis: 1",
])
def test_parameters_at_their_limits(tmp_path, param):
    log = net_runs(tmp_path, DATA + margin_net(param))
    values = re.findall(r"output #\d+: lambda = (\S+)", log)
    assert len(values) == 2
    assert all(np.isfinite(float(value)) for value in values)


@pytest.mark.parametrize("shape", [
    [16, 8], [16, 2, 4], [16, 2, 2, 2], [16, 2, 2, 2, 1], [1, 8], [3, 1]])
def test_shapes_of_features(tmp_path, shape):
    net = gaussian("ip1", shape) + dummy("label", shape[:1], 1) + \
        margin_layer("margin: 4 base: 0") + LOSS
    net_runs(tmp_path, net)


@pytest.mark.parametrize("kept", [
    [16, 3, 16], [1, 16, 0], [16, 0, 1], [0, 0, 16]])
def test_the_batch_changes_between_iterations(tmp_path, kept):
    """Filter passes on those samples of a batch that a selector names."""
    random = np.random.RandomState(2)
    samples = SAMPLES * len(kept)
    with h5py.File(tmp_path / "some.h5", "w") as data:
        data["all"] = random.randn(samples, 8).astype("f4")
        data["labels"] = (np.arange(samples) % CLASSES).astype("f4")
        data["selector"] = np.concatenate(
            [np.arange(SAMPLES) < count for count in kept]).astype("f4")
    (tmp_path / "some.txt").write_text("some.h5\n")
    net = """
layer {
  name: "data" type: "HDF5Data" top: "all" top: "labels" top: "selector"
  hdf5_data_param { source: "some.txt" batch_size: %d }
}
layer {
  name: "filter" type: "Filter" bottom: "all" bottom: "labels"
  bottom: "selector" top: "x" top: "label"
}
layer { name: "bn" type: "BN" bottom: "x" top: "ip1" }
""" % SAMPLES + margin_layer("margin: 4 base: 0") + """
layer { name: "loss" type: "Reduction" bottom: "ip2" top: "loss"
  reduction_param { operation: SUMSQ } loss_weight: 0.01 }
"""
    steps = 2 * len(kept)
    # Caffe's softmax cannot divide by no sample, and its log says that the
    # mean of nothing is NaN.
    net_runs(tmp_path, net, finite=0 not in kept, force_backward=False,
             max_iter=steps)
    for weights in read_weights(
            tmp_path / ("snap_iter_%d.caffemodel" % steps)).values():
        assert np.isfinite(weights).all()


def test_one_class(tmp_path):
    net = gaussian("ip1", [16, 8]) + dummy("label", [16], 0) + \
        margin_layer("margin: 4 base: 0").replace("num_output: 4",
                                                  "num_output: 1") + LOSS
    net_runs(tmp_path, net)


@pytest.mark.parametrize("features, labels", [
    ([0, 8], [0]), ([0, 8], [0, 1]), ([16, 0], [16]), ([16, 3, 0], [16])])
def test_nothing_to_do(tmp_path, features, labels):
    """An empty batch and samples without features: empty sums."""
    net = unfilled("ip1", features) + unfilled("label", labels) + \
        margin_layer("margin: 4 base: 0")
    write_net(tmp_path, "force_backward: true\n" + net)
    run_caffe("time", "--model=net.prototxt", "--iterations=2", cwd=tmp_path)


@pytest.mark.parametrize("margin", [1, 2, 4, 8])
@pytest.mark.parametrize("value", [0, 1e-45, 1e-39, 1e-20, 1e20, 1e30, -1e30])
def test_values_with_a_finite_result(tmp_path, value, margin):
    net = dummy("ip1", [16, 8], value) + dummy("label", [16], 1) + \
        margin_layer("margin: %d base: 0" % margin) + LOSS
    # The weights stay: a step of this gradient would be the infinite one.
    net_runs(tmp_path, net, base_lr=0)


@pytest.mark.parametrize("value", [0, 1e-45, 1e30])
def test_weights_with_a_finite_result(tmp_path, value):
    net = gaussian("ip1", [16, 8]) + dummy("label", [16], 1) + \
        margin_layer("margin: 4 base: 0").replace(
            'type: "xavier"', 'type: "constant" value: %s' % value) + LOSS
    net_runs(tmp_path, net, base_lr=0)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "3e38"])
def test_values_without_a_finite_result(tmp_path, value):
    """They flow through as through InnerProduct; nothing crashes."""
    net = dummy("ip1", [16, 8], value) + dummy("label", [16], 1) + \
        margin_layer("margin: 4 base: 0") + LOSS
    net_runs(tmp_path, net, finite=False)


@pytest.mark.parametrize("margin", [1, 4])
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "3e38"])
def test_weights_without_a_finite_result(tmp_path, value, margin):
    net = gaussian("ip1", [16, 8]) + dummy("label", [16], 1) + \
        margin_layer("margin: %d base: 0" % margin).replace(
            'type: "xavier"', 'type: "constant" value: %s' % value) + LOSS
    net_runs(tmp_path, net, finite=False)


@pytest.mark.parametrize("value", [1e30, np.inf, np.nan, 1e-45])
def test_one_bad_value_spoils_its_sample_alone(tmp_path, value):
    """It is one feature of one sample; no step is taken."""
    features = np.random.RandomState(0).randn(SAMPLES, 8)
    features[5, 3] = value
    net = data_layer(write_data(
        tmp_path, "bad", features, np.arange(SAMPLES) % CLASSES))
    net += margin_layer("margin: 4 base: 0", bottoms=["data", "label"]) + """
layer {
  name: "rows" type: "Slice" bottom: "ip2" top: "before" top: "it" top: "after"
  slice_param { axis: 0 slice_point: 5 slice_point: 6 }
}
"""
    write_net(tmp_path, net)
    log = run_caffe("train", "--solver=%s" % write_solver(
        tmp_path, max_iter=1, base_lr=0), cwd=tmp_path)
    rows = re.findall(r"net output #\d+: (before|it|after) = (\S+)", log)
    assert {name for name, _ in rows} == {"before", "it", "after"}
    for name, logit in rows:
        if name != "it" or np.isfinite(value):
            assert np.isfinite(float(logit)), (name, logit)


@pytest.mark.parametrize("base_lr", [1e10, 1e30, 3e38])
def test_a_training_that_diverges(tmp_path, base_lr):
    """Weights and features become inf and NaN; nothing crashes."""
    write_data(tmp_path)
    net_runs(tmp_path, data_layer() + margin_net(), finite=False,
             base_lr=base_lr, max_iter=20)


def test_features_of_another_size_than_the_weights(tmp_path):
    net = DATA + margin_net()
    write_net(tmp_path, net)
    solver = write_solver(tmp_path, max_iter=1)
    run_caffe("train", "--solver=%s" % solver, cwd=tmp_path)
    write_net(tmp_path, net.replace("num_output: 6", "num_output: 7"))
    message = fatal_message([CAFFE, "test", "--model=net.prototxt",
                             "--weights=snap_iter_1.caffemodel"], tmp_path)
    assert "layer 'ip1'" in message and "shape mismatch" in message
    write_net(tmp_path, gaussian("ip1", [16, 7]) + dummy("label", [16], 1)
              + margin_layer("margin: 4") + LOSS)
    message = fatal_message([CAFFE, "test", "--model=net.prototxt",
                             "--weights=snap_iter_1.caffemodel"], tmp_path)
    assert "layer 'ip2'" in message and "4 6" in message and "4 7" in message


def snapshot(folder, text, suffix="", **solver):
    """Trains one iteration; returns the names of both files."""
    write_net(folder, text)
    run_caffe("train", "--solver=%s" % write_solver(
        folder, max_iter=1, **solver), cwd=folder)
    return ["snap_iter_1.%s%s" % (kind, suffix)
            for kind in ("caffemodel", "solverstate")]


def load_fails(folder, text, option, *words):
    write_net(folder, text)
    message = fatal_message(
        [CAFFE, "train", "--solver=%s" % write_solver(folder, max_iter=2),
         option], folder)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("was, now, words", [
    ("num_output: 4", "num_output: 5", ["layer 'ip2'", "4 6", "5 6"]),
    ("num_output: 6", "num_output: 7", ["layer 'ip1'", "6 8", "7 8"]),
])
@pytest.mark.parametrize("kind", [0, 1])
def test_snapshot_of_another_shape(tmp_path, kind, was, now, words):
    net = DATA + margin_net()
    files = snapshot(tmp_path, net)
    load_fails(tmp_path, net.replace(was, now), [
        "--weights=", "--snapshot="][kind] + files[kind], *words)


def test_snapshot_of_an_inner_product_with_bias(tmp_path):
    biased = inner_product().replace("bias_term: false", "")
    model, _ = snapshot(tmp_path, DATA + IP1 + biased + LOSS)
    load_fails(tmp_path, DATA + margin_net(), "--weights=" + model,
               "layer ip2", "number of blobs")


def test_a_test_layer_with_bias(tmp_path):
    """InnerProduct has a bias unless it is told otherwise."""
    phase = "include { phase: %s }"
    biased = inner_product(phase % "TEST").replace("bias_term: false", "")
    write_net(tmp_path, DATA + IP1 + margin_layer(
        "margin: 4", tops=("ip2",), extra=phase % "TRAIN") + biased + LOSS)
    solver = write_solver(tmp_path, test_iter=1, test_interval=5)
    message = fatal_message([CAFFE, "train", "--solver=%s" % solver],
                            tmp_path)
    assert "Incompatible number of blobs for layer ip2" in message


def test_snapshot_in_hdf5_of_another_shape(tmp_path):
    net = DATA + margin_net()
    model, _ = snapshot(tmp_path, net, ".h5", snapshot_format="HDF5")
    load_fails(tmp_path, net.replace("num_output: 4", "num_output: 5"),
               "--weights=" + model, "shape")


def test_snapshot_of_batch_norm(tmp_path):
    """Three blobs of upstream's layer do not pass for four of BN."""
    net = bn_net("")
    model, _ = snapshot(tmp_path, net.replace('"BN"', '"BatchNorm"').replace(
        "bn_param {  }", ""))
    load_fails(tmp_path, net, "--weights=" + model, "layer bn",
               "number of blobs")


def bn_net(param, shape=(16, 3, 4, 4)):
    return gaussian("x", shape) + """
layer {
  name: "bn" type: "BN" bottom: "x" top: "y" bn_param { %s }
}
layer { name: "loss" type: "Reduction" bottom: "y" top: "loss"
  reduction_param { operation: SUMSQ } loss_weight: 0.01 }
""" % param


@pytest.mark.parametrize("param, words", [
    ("momentum: 1.5", ["momentum", "1.5"]),
    ("momentum: -0.1", ["momentum", "-0.1"]),
    ("momentum: 1.0000001", ["momentum", "1.0000001"]),
    ("momentum: -1e-45", ["momentum", "-0.000"]),
    ("momentum: inf", ["momentum", "inf"]),
    ("momentum: -inf", ["momentum", "-inf"]),
    ("momentum: nan", ["momentum", "NaN"]),
    ("eps: 1e-46", ["eps", "0"]),
    ("eps: 1e39", ["eps", "inf"]),
    ("eps: -inf", ["eps", "-inf"]),
    ("eps: 0", ["eps", "0"]),
    ("eps: -1", ["eps", "-1"]),
    ("eps: nan", ["eps", "NaN"]),
    ("eps: inf", ["eps", "inf"]),
])
def test_bn_parameter(tmp_path, param, words):
    net_fails(tmp_path, bn_net(param), BN_LAYER, *words)


@pytest.mark.parametrize("param, words", [
    ("engine: CUDA", ["CUDA", "engine"]),
    ("engine: 7", ["7", "engine"]),
    ("frozen: 2", ["2"]),
    ("momentun: 0.5", ["momentun"]),
    ("eps: tiny", ["tiny"]),
])
def test_bn_text_that_protobuf_refuses(tmp_path, param, words):
    write_net(tmp_path, bn_net(param))
    log = run_caffe("time", "--model=net.prototxt", cwd=tmp_path, ok=False)
    error = [line for line in log.splitlines()
             if "Error parsing text-format" in line]
    assert error and "Failed to parse NetParameter file: net.prototxt" in log
    for word in words:
        assert word in error[0]


@pytest.mark.parametrize("shape, words", [
    ([16], ["[16]", "2 axes"]),
    ([16, 0], ["[16, 0]", "no channel"]),
    ([16, 0, 4, 4], ["[16, 0, 4, 4]", "no channel"]),
    ([0, 3, 65536, 65536, 65536, 65536], ["65536, 65536", "2147483647"]),
])
def test_bn_refuses_the_shape(tmp_path, shape, words):
    net_fails(tmp_path, unfilled("x", shape) +
              'layer { name: "bn" type: "BN" bottom: "x" top: "y" }',
              BN_LAYER, *words)


def test_bn_of_more_than_2_to_the_31_values(tmp_path):
    net_fails(tmp_path, unfilled("x", [65536, 3, 128, 128]) +
              'layer { name: "bn" type: "BN" bottom: "x" top: "y" }',
              "blob size exceeds INT_MAX")


@pytest.mark.parametrize("tops, bottoms, words", [
    (["y"], [], ["BN", "1 bottom"]),
    (["y"], ["x", "z"], ["BN", "1 bottom"]),
    (["y", "z"], ["x"], ["BN", "1 top"]),
])
def test_bn_number_of_blobs(tmp_path, tops, bottoms, words):
    net_fails(tmp_path, gaussian("x", [4, 3]) + gaussian("z", [4, 3]).replace(
        '"z"', '"%s"' % ("z" if "z" in bottoms else "u")) +
        'layer { name: "bn" type: "BN" %s %s }' % (
            " ".join('bottom: "%s"' % b for b in bottoms),
            " ".join('top: "%s"' % t for t in tops)), *words)


@pytest.mark.parametrize("blobs, words", [
    (["1 3"], ["4", "1"]),
    (["1 3"] * 3, ["4", "3"]),
    (["1 3", "1 3", "1 4", "1 3"], ["moving mean", "1 3", "1 4"]),
    (["3", "1 3", "1 3", "1 3"], ["slope", "1 3"]),
    (["1 3"] * 5, ["4", "5"]),
])
def test_bn_blobs_of_the_prototxt(tmp_path, blobs, words):
    net_fails(tmp_path, bn_net("").replace("bn_param {  }",
                                           own_blobs(*blobs)),
              BN_LAYER, *words)


@pytest.mark.parametrize("names, words", [
    ("wwww", ["slope and bias are one blob", "param"]),
    ("sbmm", ["moving mean and moving inverse standard deviation are one"]),
])
def test_bn_blobs_of_one_name(tmp_path, names, words):
    """All four have one shape, so Caffe lets them share."""
    params = "".join('param { name: "%s" }' % name for name in names)
    net_fails(tmp_path, bn_net("").replace("bn_param {", params +
                                           " bn_param {"),
              BN_LAYER, *words)


@pytest.mark.parametrize("shape", [
    [16, 3], [16, 3, 5], [16, 3, 4, 5], [4, 3, 2, 2, 2], [1, 3, 4, 4],
    [16, 1], [1, 3]])
def test_bn_shapes(tmp_path, shape):
    net_runs(tmp_path, bn_net("", shape))


@pytest.mark.parametrize("shape", [[0, 3, 4, 4], [16, 3, 0, 4], [0, 3]])
def test_bn_nothing_to_do(tmp_path, shape):
    write_net(tmp_path, "force_backward: true\n" + unfilled("x", shape) +
              'layer { name: "bn" type: "BN" bottom: "x" top: "y" }')
    run_caffe("time", "--model=net.prototxt", "--iterations=2", cwd=tmp_path)


@pytest.mark.parametrize("value", [0, 1, 1e-45, 1e-20, 1e15])
def test_bn_constant_input(tmp_path, value):
    net = bn_net("").replace('type: "gaussian"',
                             'type: "constant" value: %s' % value, 1)
    net_runs(tmp_path, net, base_lr=1e-6)


IN_PLACE = bn_net("").replace('top: "y"', 'top: "x"').replace(
    'bottom: "y"', 'bottom: "x"')


@pytest.mark.parametrize("net", [bn_net(""), IN_PLACE, bn_net("frozen: true")])
@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e15])
def test_bn_values_with_a_finite_result(tmp_path, scale, net):
    net = net.replace('type: "gaussian"',
                      'type: "gaussian" std: %s' % scale, 1)
    net_runs(tmp_path, net, base_lr=0)


@pytest.mark.parametrize("net", [bn_net(""), IN_PLACE, bn_net("frozen: true")])
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "3e38"])
def test_bn_values_without_a_finite_result(tmp_path, value, net):
    """They flow through; nothing crashes."""
    net = net.replace('type: "gaussian"',
                      'type: "constant" value: %s' % value, 1)
    net_runs(tmp_path, net, finite=False)


@pytest.mark.parametrize("filler", [
    "slope_filler { type: 'constant' value: inf }",
    "slope_filler { type: 'constant' value: nan }",
    "bias_filler { type: 'constant' value: -inf }",
    "slope_filler { type: 'constant' value: 1e30 }",
])
def test_bn_slope_and_bias_of_any_value(tmp_path, filler):
    net_runs(tmp_path, bn_net(filler), finite=False)


@pytest.mark.parametrize("filler", [
    "slope_filler { type: 'constant' value: 0 }",
    "slope_filler { type: 'constant' value: 1e-45 }",
    "slope_filler { type: 'constant' value: -1 }",
])
def test_bn_slopes_with_a_finite_result(tmp_path, filler):
    net_runs(tmp_path, bn_net(filler))


@pytest.mark.parametrize("net", [
    DATA + margin_net(), bn_net(""), IN_PLACE])
def test_the_phase_of_a_deployed_net(tmp_path, net):
    model, _ = snapshot(tmp_path, net)
    run_caffe("test", "--model=net.prototxt", "--weights=" + model,
              "--iterations=2", cwd=tmp_path)


@pytest.mark.parametrize("momentum", [0, 1])
def test_bn_momentum_at_its_limits(tmp_path, momentum):
    net_runs(tmp_path, bn_net("momentum: %d" % momentum))


def test_bn_channels_of_another_model(tmp_path):
    write_net(tmp_path, bn_net(""))
    run_caffe("train", "--solver=%s" % write_solver(tmp_path, max_iter=1),
              cwd=tmp_path)
    write_net(tmp_path, bn_net("", (16, 5, 4, 4)))
    message = fatal_message([CAFFE, "test", "--model=net.prototxt",
                             "--weights=snap_iter_1.caffemodel"], tmp_path)
    assert "layer 'bn'" in message and "shape mismatch" in message


@pytest.mark.parametrize("net, blob, shape, named, words", [
    (DATA + margin_net(), ("ip2", 0), "4, 5", MARGIN_LAYER,
     "class weights of shape 4 5 (20), not 4 6 (24): "),
    (bn_net(""), ("bn", 0), "1, 2", BN_LAYER, "slope of shape 1 2 (2), not "),
    (bn_net(""), ("bn", 3), "1, 4", BN_LAYER,
     "moving inverse standard deviation of shape 1 4 (4), not "),
    (IN_PLACE, ("bn", 1), "7", BN_LAYER, "bias of shape 7 (7), not "),
])
def test_a_blob_that_lost_its_shape(tmp_path, net, blob, shape, named, words):
    """Old Caffes give it that of an HDF5 model without a word."""
    path = write_net(tmp_path, net)
    done = run([sys.executable, "-c", """
import caffe
net = caffe.Net(%r, caffe.TRAIN)
net.forward()
net.params[%r][%d].reshape(%s)
net.forward()
print("went on")
""" % ((str(path),) + blob + (shape,))], tmp_path)
    fatal = [line for line in done.stdout.splitlines()
             if re.match(r"F\d{4,8} ", line)]
    assert done.returncode == -6 and len(fatal) == 1, done.stdout
    assert named in fatal[0] and words in fatal[0]
    assert "another net's model was loaded" in fatal[0]
    assert "went on" not in done.stdout
