"""export_deploy.py: what becomes of every kind of net, and that it runs."""
import os
import re
import struct
import subprocess

import numpy as np
import pytest

from conftest import CAFFE_ROOT, ROOT
from deploy_tools import Bench, bn, conv, image, inner, layer, loss, margin, \
    types

from caffe_net import Caffe
from caffe_proto import UserError
import caffe_model
import caffe_proto
import deploy_net
import export_deploy


@pytest.fixture
def bench(tmp_path, pb, caffe):
    return Bench(tmp_path, pb, caffe)


HEAD = [margin("ip2", "ip1 label"), loss("ip2")]


# ---- Folding ----

def only_types(net):
    return [kind for _, kind in types(net)]


def test_folds_not_in_place(bench, capsys):
    net = bench.check([conv("conv1", "data"), bn("bn1", "conv1"),
                       layer("ReLU", "relu1", "bn1", "bn1"),
                       inner("ip1", "bn1"), *HEAD], "bn1 ip1 ip2")
    assert types(net) == [
        ("data", "Input"), ("conv1", "Convolution"), ("relu1", "ReLU"),
        ("ip1", "InnerProduct"), ("ip2", "InnerProduct"),
        ("prob", "Softmax")]
    out = capsys.readouterr().out
    assert "'bn1' (BN) goes into layer 'conv1' (Convolution)" in out
    assert "'ip2' (LargeMarginInnerProduct) becomes InnerProduct" in out
    assert re.search(r"4 random inputs: largest relative difference \S+ \(",
                     out)
    assert out.splitlines()[-1] == "made %s/deploy.prototxt and " \
        "%s/deploy.caffemodel" % (bench.out, bench.out)


def test_folds_in_place(bench):
    net = bench.check([conv("conv1", "data"), bn("bn1", "conv1", "conv1"),
                       layer("PReLU", "prelu1", "conv1", "conv1"),
                       inner("ip1", "conv1", "num_output: 5 bias_term: false"),
                       bn("bn2", "ip1", "ip1"), *HEAD], "conv1 ip1 ip2")
    assert only_types(net) == ["Input", "Convolution", "PReLU",
                               "InnerProduct", "InnerProduct", "Softmax"]
    assert net.layer[3].inner_product_param.bias_term


@pytest.mark.parametrize("before", [
    conv("c", "data", "num_output: 6 kernel_size: 3 bias_term: false"),
    conv("c", "data", "num_output: 6 kernel_size: 3 group: 2"),
    conv("c", "data", "num_output: 6 kernel_size: 3 dilation: 2 pad: 2"),
    conv("c", "data", "num_output: 6 kernel_h: 1 kernel_w: 3 stride: 2"),
    conv("c", "data", "num_output: 6 kernel_size: 3 axis: -3"),
    conv("c", "data", "num_output: 6 kernel_size: 3 stride: 2",
         kind="Deconvolution"),
    conv("c", "data", "num_output: 6 kernel_size: 3 group: 2 bias_term: false",
         kind="Deconvolution"),
    conv("c", "data", "num_output: 4 kernel_size: 3 group: 4",
         kind="Deconvolution"),
    inner("c", "data"),
    inner("c", "data", "num_output: 5 bias_term: false"),
    inner("c", "data", "num_output: 5 transpose: true"),
    margin("c", "data"),
])
@pytest.mark.parametrize("top", ["c", "b"])
def test_folds_into(bench, before, top):
    net = bench.check([before, bn("b", "c", top), inner("ip2", top)],
                      "%s ip2" % top)
    assert len(net.layer) == 3
    assert "BN" not in str(net) and "BatchNorm" not in str(net)


def test_folds_twice(bench):
    net = bench.check([conv("c", "data"), bn("b1", "c", "c"), bn("b2", "c")],
                      "b2")
    assert only_types(net) == ["Input", "Convolution"]


NOT_FOLDED = {
    "before a convolution": [
        bn("b", "data"), conv("c", "b", "num_output: 3 kernel_size: 3 "
                              "pad: 1")],
    "after pooling": [
        conv("c", "data"), layer("Pooling", "p", "c", None,
                                 "pooling_param { kernel_size: 2 }"),
        bn("b", "p")],
    "after a nonlinearity": [
        conv("c", "data"), layer("ReLU", "r", "c", "c"), bn("b", "c", "c")],
    "the convolution is used elsewhere": [
        conv("c", "data"), bn("b", "c"),
        layer("Eltwise", "e", "b c")],
    "after a concatenation": [
        conv("c", "data"), conv("d", "data"), layer("Concat", "cat", "c d"),
        bn("b", "cat")],
    # Of one number numpy makes a scalar easily, which is no blob of Caffe.
    "one channel": [
        conv("c", "data", "num_output: 1 kernel_size: 3"),
        layer("Sigmoid", "s", "c"), bn("b", "s")],
    "channels are not the outputs": [
        inner("ip1", "data", "num_output: 5 axis: 2"), bn("b", "ip1")],
    "channels are not the outputs, counted from the end": [
        inner("ip1", "data", "num_output: 5 axis: -2"), bn("b", "ip1")],
    "another axis": [
        layer("Reshape", "re", "data", None,
              "reshape_param { shape { dim: 0 dim: 2 dim: 2 dim: 9 dim: 9 } "
              "}"),
        conv("c", "re", "num_output: 6 kernel_size: 3 axis: 2"),
        bn("b", "c")],
}


@pytest.mark.parametrize("layers", NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_becomes_batch_norm_and_scale(bench, layers, capsys):
    last = re.findall(r'top: "(\w+)"', layers[-1])[-1]
    net = bench.check(layers, last)
    assert ("b", "BatchNorm") in types(net)
    assert ("b_scale", "Scale") in types(net)
    assert "'b' (BN) becomes BatchNorm + Scale" in capsys.readouterr().out


def test_output_is_not_folded_away(bench):
    # Accuracy looks at what BN starts from.
    net = bench.check([inner("ip1", "data"), bn("b", "ip1"),
                       layer("Accuracy", "accuracy", "ip1 label"),
                       inner("ip2", "b")], "ip1 ip2")
    assert ("b", "BatchNorm") in types(net)


def test_fold_none(bench):
    net = bench.check([conv("c", "data"), bn("b", "c", "c"),
                       inner("ip1", "c"), bn("b2", "ip1"), *HEAD[:1]],
                      "c ip1 ip2", ["--fold", "none"])
    assert only_types(net) == ["Input", "Convolution", "BatchNorm", "Scale",
                               "InnerProduct", "BatchNorm", "Scale",
                               "InnerProduct"]
    assert net.layer[2].batch_norm_param.use_global_stats


def test_eps_and_frozen(bench):
    net = bench.check([
        layer("AbsVal", "a", "data"),
        bn("b", "a", extra="bn_param { eps: 0.5 frozen: true momentum: 0.1 }"),
        inner("ip2", "b")], "b ip2")
    assert net.layer[2].batch_norm_param.eps == 0.5


def test_odd_statistics(bench):
    """Inverse deviations that no variance has."""
    text = bench.write(image(1, 4, 3, 3), layer("AbsVal", "a", "data"),
                       bn("b", "a"))
    model = bench.random(text)
    stats = np.array([[0, -2, 400, 1e-20]], "f4")
    caffe_model.set_array(model.layer[0].blobs[3], stats)
    bench.model.write_bytes(model.SerializeToString())
    bench.check([layer("AbsVal", "a", "data"), bn("b", "a")], "b",
                shape=(1, 4, 3, 3))


# ---- Graphs ----

def test_shared_parameters(bench):
    shared = 'param { name: "w" } param { name: "b" }'
    net = bench.check([
        layer("Slice", "s", "data", "one two"),
        conv("c1", "one", more=shared), bn("b1", "c1", "c1"),
        conv("c2", "two", more=shared), bn("b2", "c2", "c2"),
        layer("Eltwise", "e", "c1 c2"), inner("ip1", "e"), *HEAD], "e ip2")
    assert only_types(net) == ["Input", "Slice", "Convolution", "Convolution",
                               "Eltwise", "InnerProduct", "InnerProduct",
                               "Softmax"]
    assert not any(found.param for found in net.layer)
    model = bench.pb.NetParameter.FromString(
        (bench.out / "deploy.caffemodel").read_bytes())
    assert all(len(found.blobs) == 2 for found in model.layer
               if found.type == "Convolution")


def write_hdf5(pb, model, path, left_out=()):
    """A NetParameter's weights as Caffe has them in HDF5."""
    import h5py
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for found in model.layer:
            group = data.create_group(found.name)
            for i, blob in enumerate(found.blobs):
                if (found.name, i) not in left_out:
                    group[str(i)] = caffe_model.array_of(blob, "")


def test_hdf5_with_shared_parameters(bench):
    shared = 'param { name: "w" } param { name: "b" }'
    layers = [conv("c1", "data", more=shared), bn("b1", "c1", "c1"),
              conv("c2", "data", more=shared),
              layer("Concat", "cat", "c1 c2")]
    text = bench.write(image(2, 4, 9, 9), *layers)
    bench.model = bench.folder / "trained.caffemodel.h5"
    write_hdf5(bench.pb, bench.random(text), bench.model,
               [("c2", 0), ("c2", 1)])
    bench.check(layers, "cat")


def test_slice_split_concat_eltwise(bench):
    net = bench.check([
        layer("Split", "sp", "data", "d1 d2"),
        conv("c1", "d1"), bn("b1", "c1"), layer("ReLU", "r1", "b1", "b1"),
        conv("c2", "d2"), bn("b2", "c2"),
        layer("Eltwise", "sum", "b1 b2"),
        layer("Slice", "s", "sum", "left right"),
        bn("b3", "left", "left"),
        layer("Concat", "cat", "right left"),
        layer("Dropout", "drop", "cat", "cat"),
        inner("ip1", "cat"), bn("b4", "ip1", "ip1"), *HEAD], "sum cat ip2")
    assert only_types(net).count("BatchNorm") == 1


def test_several_heads(bench):
    net = bench.check([
        conv("c", "data"), bn("b", "c", "c"),
        inner("ip1", "c"), margin("ip2", "ip1 label"),
        loss("ip2", "loss_a"),
        margin("ip3", "ip1 label", "ip3 lambda3 plain3"),
        loss("ip3", "coarse"),
        layer("Accuracy", "accuracy", "plain3 label")], "ip2 ip3")
    assert types(net)[-2:] == [("prob_a", "Softmax"),
                               ("coarse_prob", "Softmax")]
    assert "Accuracy" not in str(net)


def test_third_top_and_lambda(bench):
    net = bench.check([
        inner("ip1", "data"), margin("ip2", "ip1", "ip2 lambda plain",
                                     "margin: 5"),
        layer("Power", "half", "plain", None, "power_param { scale: 0.5 }"),
        layer("Silence", "silence", "lambda", " ")], "ip2 half")
    assert types(net)[-1] == ("half", "Power")
    assert list(net.layer[-1].bottom) == ["ip2"]


def test_margin_is_left_out(bench):
    """With labels, the net's own logits have the margin."""
    text = bench.write(image(2, 4, 9, 9), inner("ip1", "data"),
                       margin("ip2", "ip1 label", extra="type: QUADRUPLE"),
                       loss("ip2"))
    bench.make_model(text)
    bench.export()
    data = np.random.default_rng(1).standard_normal((2, 4, 9, 9))
    [logits] = bench.deployed({"data": data}, "ip2")
    plain = text.replace('bottom: "ip1" bottom: "label"', 'bottom: "ip1"')
    [own] = bench.run(plain, bench.model, {"data": data}, "ip2")
    np.testing.assert_allclose(logits, own, atol=1e-5)


def test_axis(bench):
    net = bench.check([margin("ip2", "data", extra="axis: 2")], "ip2")
    assert net.layer[1].inner_product_param.axis == 2
    assert not net.layer[1].inner_product_param.bias_term


def test_phases(bench):
    """TEST is exported, and the softmax of a loss that only TRAIN has."""
    train, test = "include { phase: TRAIN }", "include { phase: TEST }"
    net = bench.check([
        conv("c", "data"), bn("b", "c", "c"),
        layer("Dropout", "drop", "c", "c", train),
        inner("ip1", "c"),
        layer("ELU", "abs", "ip1", "ip1", "exclude { phase: TRAIN }"),
        margin("ip2", "ip1 label", "ip2 lambda", "type: QUADRUPLE",
               'param { name: "ip2" } ' + train),
        margin("ip2", "ip1 label", "ip2", "type: SINGLE base: 0",
               'param { name: "ip2" } ' + test),
        inner("extra", "ip1", more=train),
        layer("Power", "staged", "ip1", None,
              'include { phase: TEST stage: "never" }'),
        loss("ip2", more=train),
        layer("Accuracy", "accuracy", "ip2 label", None, test)], "ip1 ip2")
    assert types(net) == [
        ("data", "Input"), ("c", "Convolution"), ("ip1", "InnerProduct"),
        ("abs", "ELU"), ("ip2", "InnerProduct"), ("prob", "Softmax")]


@pytest.mark.parametrize("kind, extra", [
    ("CenterLoss", ""), ("Python", "loss_weight: 1 python_param { module: "
                         '"mine" layer: "Loss" }')])
def test_losses_of_others(bench, kind, extra):
    """They need not be known to be left out."""
    layers = [inner("ip1", "data"), inner("ip2", "ip1"), loss("ip2")]
    bench.make_model("\n".join([image(2, 4, 9, 9), *layers]))
    bench.write(image(2, 4, 9, 9), *layers,
                layer(kind, "center", "ip1 label", None, extra))
    assert types(bench.export())[1:] == [
        ("ip1", "InnerProduct"), ("ip2", "InnerProduct"), ("prob", "Softmax")]


def test_net_that_caffe_has_dumped(bench):
    """Its layers say in which phase that was, which is no rule."""
    net = bench.check([inner("ip1", "data", more="phase: TRAIN"),
                       inner("ip2", "ip1", more="phase: TEST")], "ip2")
    assert len(net.layer) == 3 and "phase" not in str(net)


def test_margin_for_training_inner_product_for_tests(bench):
    net = bench.check([
        inner("ip1", "data"),
        margin("ip2", "ip1 label", "ip2", "type: QUADRUPLE",
               "include { phase: TRAIN }"),
        inner("ip2", "ip1", "num_output: 5 bias_term: false",
              "include { phase: TEST }"), loss("ip2")], "ip2")
    assert types(net)[-1] == ("prob", "Softmax")


def test_labels_and_what_they_feed_go(bench):
    net = bench.check([
        layer("Reshape", "flat", "label", None,
              "reshape_param { shape { dim: -1 } }"),
        inner("ip1", "data"), inner("ip2", "ip1"),
        layer("SoftmaxWithLoss", "loss", "ip2 flat", "loss"),
        layer("Power", "twice", "loss", None, "power_param { scale: 2 }"),
        layer("Silence", "silence", "twice", " ")], "ip2")
    assert only_types(net) == ["Input", "InnerProduct", "InnerProduct",
                               "Softmax"]


def test_autoencoder(bench):
    net = bench.check([
        layer("Flatten", "flat", "data"), inner("code", "flat"),
        inner("decode", "code", "num_output: 324"),
        layer("SigmoidCrossEntropyLoss", "loss", "decode flat")], "decode")
    assert types(net)[-1] == ("prob", "Sigmoid")
    assert only_types(net)[1] == "Flatten"


@pytest.mark.parametrize("kind, param", [
    ("SoftmaxWithLoss", "softmax_param { axis: 2 }"),
    ("SoftmaxWithLoss", "")])
def test_axis_of_the_softmax(bench, kind, param):
    text = bench.write(
        image(2, 4, 3, 1, label=False),
        'layer { name: "label" type: "Input" top: "label" input_param { '
        'shape { dim: 24 } } }', conv("c", "data", "num_output: 4 "
                                      "kernel_size: 1"),
        layer(kind, "loss", "c label", None, param
              + " include { phase: TRAIN }"))
    bench.make_model(text)
    net = bench.export()
    assert types(net)[-1] == ("prob", "Softmax")
    assert net.layer[-1].softmax_param.axis == (2 if param else 1)
    [prob] = bench.deployed({"data": np.ones((2, 4, 3, 1))}, "prob")
    np.testing.assert_allclose(prob.sum(2 if param else 1), 1, rtol=1e-5)


def test_softmax_that_is_there_is_enough(bench):
    net = bench.check([inner("ip2", "data"), layer("Softmax", "soft", "ip2"),
                       loss("ip2")], "soft")
    assert only_types(net) == ["Input", "InnerProduct", "Softmax"]


def test_in_place_beside_the_third_top(bench):
    """The third top becomes the first, which is needed unchanged then."""
    net = bench.check([
        inner("ip1", "data"), margin("ip2", "ip1", "ip2 lambda plain"),
        layer("ReLU", "r", "ip2", "ip2"),
        layer("Power", "half", "plain", None, "power_param { scale: -0.5 }"),
        inner("last", "ip2")], "half last")
    assert list(net.layer[3].top) == ["ip2_r"]
    assert list(net.layer[5].bottom) == ["ip2_r"]


def test_in_place_on_what_a_loss_saw(bench):
    net = bench.check([inner("ip2", "data"),
                       layer("Accuracy", "accuracy", "ip2 label"),
                       layer("ReLU", "r", "ip2", "out")], "ip2 out")
    assert len(net.layer) == 3


def test_deploy_net(bench):
    bench.write(image(3, 4, 9, 9, label=False), conv("c", "data"),
                bn("b", "c", "c"), margin("ip2", "c"),
                layer("Softmax", "prob", "ip2"))
    bench.make_model()
    net = bench.export()
    assert list(net.layer[0].input_param.shape[0].dim) == [3, 4, 9, 9]
    assert types(net)[1:] == [("c", "Convolution"), ("ip2", "InnerProduct"),
                              ("prob", "Softmax")]


@pytest.mark.parametrize("shape", [
    "input_dim: 2 input_dim: 4 input_dim: 9 input_dim: 9",
    "input_shape { dim: 2 dim: 4 dim: 9 dim: 9 }"])
def test_old_deploy_net(bench, shape):
    text = bench.write('input: "data" ' + shape, conv("c", "data"),
                       bn("b", "c"), margin("ip2", "b"))
    bench.make_model(text)
    net = bench.export()
    assert types(net) == [("data", "Input"), ("c", "Convolution"),
                          ("ip2", "InnerProduct")]
    assert list(net.layer[0].input_param.shape[0].dim) == [2, 4, 9, 9]


def test_two_inputs(bench):
    bench.write(image(1, 4, label=False),
                image(1, 6, label=False).replace('"data"', '"more"'),
                layer("Concat", "cat", "data more"), inner("ip1", "cat"))
    bench.make_model()
    net = bench.export("--shape", "more=1,6")
    assert types(net)[:2] == [("data", "Input"), ("more", "Input")]
    assert list(net.layer[1].input_param.shape[0].dim) == [1, 6]


def test_engines_fillers_and_multipliers_go(bench):
    net = bench.check([
        conv("c", "data", 'num_output: 3 kernel_size: 9 engine: CAFFE '
             'weight_filler { type: "msra" } bias_filler { value: 1 }',
             "param { lr_mult: 2 }"),
        layer("PReLU", "p", "c", "c",
              'prelu_param { filler { type: "constant" } }'),
        layer("Softmax", "s", "c", None, "softmax_param { engine: CAFFE }"),
        loss("c", "l", more="loss_weight: 0.5 propagate_down: true "
             "propagate_down: false", )], "s")
    for word in ("engine", "filler", "param {\n    lr", "loss_weight",
                 "propagate"):
        assert word not in str(net)


# ---- Inputs ----

def data_layer(kind, extra="", transform=""):
    return layer(kind, "data", "", "data label",
                 "%s transform_param { %s }" % (extra, transform))


TAIL = [conv("c", "data"), bn("b", "c", "c"), margin("ip2", "c label"),
        loss("ip2")]


def with_data(bench, data, shape, tail=TAIL):
    """Writes a net with that data layer, and a model for the shape."""
    bench.make_model("\n".join([image(*shape), *tail]))
    bench.write(data, *tail)


def input_shape(net):
    assert net.layer[0].type == "Input"
    return list(net.layer[0].input_param.shape[0].dim)


@pytest.fixture(scope="module")
def lmdb(tmp_path_factory, pb):
    """Images of 12 x 10 with a channel, as an LMDB."""
    folder = tmp_path_factory.mktemp("a folder")
    images, labels = folder / "images", folder / "labels"
    images.write_bytes(struct.pack(">4i", 2051, 3, 12, 10) + bytes(360))
    labels.write_bytes(struct.pack(">2i", 2049, 3) + bytes(3))
    subprocess.run([
        os.path.join(CAFFE_ROOT, "build/examples/mnist/convert_mnist_data"),
        str(images), str(labels), str(folder / "lmdb")], check=True,
        stderr=subprocess.DEVNULL)
    return folder / "lmdb"


def test_shape_from_lmdb(bench, lmdb):
    data = 'data_param { source: "%s" batch_size: 64 backend: LMDB }' % lmdb
    with_data(bench, data_layer("Data", data), (1, 1, 12, 10))
    assert input_shape(bench.export()) == [1, 1, 12, 10]


def test_shape_from_lmdb_with_crop(bench, lmdb):
    data = 'data_param { source: "%s" batch_size: 64 backend: LMDB }' % lmdb
    with_data(bench, data_layer("Data", data, "crop_size: 8 mirror: true"),
              (1, 1, 8, 8))
    assert input_shape(bench.export()) == [1, 1, 8, 8]


def test_broken_lmdb(bench, tmp_path):
    (tmp_path / "lmdb").mkdir()
    (tmp_path / "lmdb/data.mdb").write_bytes(bytes(5000))
    with_data(bench, data_layer("Data", 'data_param { source: "lmdb" '
                                'batch_size: 1 backend: LMDB }'),
              (1, 1, 8, 8))
    with pytest.raises(UserError, match=r"layer 'data' \(Data\): the shape "
                       "of 'data' is not clear, and lmdb could not be read "
                       r"\(Caffe says.*Give it with --shape C,H,W"):
        bench.export()
    assert not bench.out.exists()
    assert input_shape(bench.export("--shape", "1,8,8")) == [1, 1, 8, 8]


def save(path, values):
    import cv2
    assert cv2.imwrite(str(path), values)
    return path


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("extra, shape", [
    ("", (1, 3, 14, 9)), ("is_color: false", (1, 1, 14, 9)),
    ("new_height: 11 new_width: 12", (1, 3, 11, 12))])
def test_shape_from_the_first_image(bench, tmp_path, extra, shape):
    save(tmp_path / "an image.png", noise(14, 9, 3))
    (tmp_path / "list.txt").write_text("an image.png 1\n")
    with_data(bench, data_layer(
        "ImageData", 'image_data_param { source: "list.txt" root_folder: '
        '"%s/" batch_size: 50 %s }' % (tmp_path, extra)), shape)
    assert input_shape(bench.export()) == list(shape)


def test_shape_from_hdf5(bench, tmp_path):
    import h5py
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["data"] = np.zeros((4, 7), "f4")
        file["label"] = np.zeros(4, "f4")
    (tmp_path / "list.txt").write_text("data.h5\n")
    with_data(bench, layer("HDF5Data", "data", "", "data label",
                           'hdf5_data_param { source: "list.txt" '
                           'batch_size: 3 }'),
              (1, 7), [inner("ip1", "data"), bn("b", "ip1"),
                       margin("ip2", "b label"), loss("ip2")])
    net = bench.export()
    assert input_shape(net) == [1, 7]
    assert "#   as it comes from the layer 'data' (HDF5Data)" in \
        (bench.out / "deploy.prototxt").read_text()


@pytest.mark.parametrize("kind, extra, transform, shape", [
    # Its images are coloured unless the layer says that they are not.
    ("ImageData", 'image_data_param { source: "away.txt" }', "crop_size: 8",
     (1, 3, 8, 8)),
    ("ImageData", 'image_data_param { source: "away.txt" is_color: false }',
     "crop_size: 8", (1, 1, 8, 8)),
    ("Data", 'data_param { source: "away" }',
     "crop_size: 8 mean_value: 1 mean_value: 2", (1, 2, 8, 8)),
    ("Data", 'data_param { source: "away" }', "crop_size: 8 force_gray: true",
     (1, 1, 8, 8)),
    # The first convolution knows the channels.
    ("Data", 'data_param { source: "away" }', "crop_size: 8", (1, 5, 8, 8)),
    ("MemoryData", "memory_data_param { batch_size: 9 channels: 2 height: 7 "
     "width: 8 }", "", (1, 2, 7, 8)),
])
def test_shape_without_the_data(bench, kind, extra, transform, shape):
    with_data(bench, data_layer(kind, extra, transform), shape)
    assert input_shape(bench.export()) == list(shape)


def test_shape_from_dummy_data(bench):
    shape = "dummy_data_param { shape { dim: 2 dim: 3 dim: 8 dim: 8 } " \
        "shape { dim: 2 } }"
    with_data(bench, layer("DummyData", "data", "", "data label", shape),
              (2, 3, 8, 8))
    assert input_shape(bench.export()) == [2, 3, 8, 8]


def test_shape_that_is_not_clear(bench):
    with_data(bench, data_layer("Data", 'data_param { source: "away" }'),
              (1, 3, 8, 8))
    with pytest.raises(UserError, match=r"layer 'data' \(Data\): the shape "
                       "of 'data' is not clear: away is not there. Give it "
                       "with --shape C,H,W"):
        bench.export()
    assert not bench.out.exists()
    assert input_shape(bench.export("--shape", "3,8,8")) == [1, 3, 8, 8]
    assert input_shape(bench.export("--shape", "data=4,3,8,8", "--force")) \
        == [4, 3, 8, 8]


@pytest.mark.parametrize("options, message", [
    (["3,x"], "--shape 3,x: a shape is numbers above 0"),
    (["3,0,8"], "--shape 3,0,8: a shape is numbers above 0"),
    (["other=3,8,8"], "--shape other=...: the net's input is data"),
    (["3,8,8", "3,8,8"], "there is another for that input"),
    (["2,8,8"], r"layer 'c' \(Convolution\): blob 0 in .* has the shape "
     r"\(6, 3, 3, 3\) where the net has \(6, 2, 3, 3\)"),
    (["3,1,1"], "Caffe says"),
])
def test_shapes_that_cannot_be(bench, options, message):
    with_data(bench, data_layer("Data", 'data_param { source: "away" }'),
              (1, 3, 8, 8))
    with pytest.raises(UserError, match=message):
        bench.export(*[part for given in options
                       for part in ("--shape", given)])
    assert not bench.out.exists()


def test_data_layer_of_the_training_alone(bench):
    with_data(bench, data_layer(
        "ImageData", 'include { phase: TRAIN } image_data_param { source: '
        '"away.txt" }', "crop_size: 8"), (1, 3, 8, 8))
    assert input_shape(bench.export()) == [1, 3, 8, 8]


# ---- Transforms ----

def head(bench):
    """The comments of the exported net, without their signs."""
    return [line[2:] for line in
            (bench.out / "deploy.prototxt").read_text().splitlines()
            if line.startswith("#")]


def test_transform_as_comments(bench):
    with_data(bench, data_layer(
        "ImageData", 'image_data_param { source: "away.txt" }',
        "crop_size: 8 mean_value: 104 mean_value: 117.5 mean_value: 123 "
        "scale: 0.0078125"), (1, 3, 8, 8))
    bench.export()
    assert head(bench) == [
        "Made by export_deploy.py from net.prototxt and trained.caffemodel.",
        'Input "data": 1 x 3 x 8 x 8',
        "  scalefactor: 0.0078125", "  size: 8, 8", "  mean: 104, 117.5, 123",
        "  swapRB: false",
        "  channels: blue, green, red, of 0 to 255, as cv2.imread has them",
        "  crop: the middle 8 x 8 of the image",
        "  blob = cv2.dnn.blobFromImage(image, 0.0078125, (8, 8),",
        "                               (104, 117.5, 123), swapRB=False)",
        'Output: "prob"']


def mean_file(bench, mean):
    blob = bench.pb.BlobProto(num=1, channels=mean.shape[0],
                              height=mean.shape[1], width=mean.shape[2])
    blob.data.extend(mean.ravel())
    path = bench.folder / "mean.binaryproto"
    path.write_bytes(blob.SerializeToString())
    return path


def test_mean_file(bench):
    mean = noise(3, 8, 7).astype("f4")
    path = mean_file(bench, mean)
    data = data_layer("ImageData", 'image_data_param { source: "away.txt" }',
                      'mean_file: "%s"' % path)
    with_data(bench, data, (1, 3, 8, 7))
    # The mean has the images' shape.
    assert input_shape(bench.export()) == [1, 3, 8, 7]
    [line] = [line for line in head(bench) if "  mean: " in line]
    assert [float(value) for value in line[8:].split(",")] == pytest.approx(
        list(mean.mean((1, 2))))
    assert "  mean_file: %s" % path in head(bench)
    path.unlink()
    bench.export("--shape", "3,8,7", "--force")
    assert "  mean: unknown" in head(bench)
    assert not any("blobFromImage" in line for line in head(bench))


@pytest.mark.parametrize("content", [b"", b"\x0a\x90", b"no message"])
def test_broken_mean_file(bench, content):
    (bench.folder / "mean.binaryproto").write_bytes(content)
    data = data_layer("ImageData", 'image_data_param { source: "away.txt" }',
                      'crop_size: 8 mean_file: "mean.binaryproto"')
    with_data(bench, data, (1, 3, 8, 8))
    with pytest.raises(UserError, match="mean.binaryproto"):
        bench.export()
    assert not bench.out.exists()


# ---- The proof ----

def test_images(bench, tmp_path, capsys):
    """Images go the way that the data layer sends them."""
    mean = noise(3, 16, 16).astype("f4")
    data = data_layer("ImageData", 'image_data_param { source: "away.txt" }',
                      'crop_size: 8 mean_file: "%s" scale: 0.01'
                      % mean_file(bench, mean))
    with_data(bench, data, (1, 3, 8, 8))
    images = [save(tmp_path / ("image %d.png" % i), noise(16, 16, 3, seed=i))
              for i in range(3)]
    seen = []

    def compare(ours, theirs):
        seen.append(ours)
        return largest(ours, theirs)
    largest = export_deploy.largest_difference
    export_deploy.largest_difference = compare
    try:
        bench.export("--images", *images)
    finally:
        export_deploy.largest_difference = largest
    assert "on 4 random inputs and 3 images: largest relative" in \
        capsys.readouterr().out
    assert len(seen[0]) == 7
    pixels = noise(16, 16, 3, seed=2).transpose(2, 0, 1).astype("f4")
    own = ((pixels - mean) * 0.01)[None, :, 4:12, 4:12]
    [logits] = bench.deployed({"data": own}, "ip2")
    np.testing.assert_allclose(seen[0][6]["ip2"], logits, atol=1e-4)


def test_images_of_another_size(bench, tmp_path):
    with_data(bench, data_layer("ImageData",
                                'image_data_param { source: "away.txt" }'),
              (1, 3, 8, 8))
    path = save(tmp_path / "image.png", noise(20, 10, 3))
    bench.export("--shape", "3,8,8", "--images", path)


@pytest.mark.parametrize("name, content, message", [
    ("none.png", None, "cannot read .*none.png"),
    ("bad.png", b"no image", "Caffe says"),
    ("empty.png", b"", "empty.png is empty"),
])
def test_images_that_are_none(bench, tmp_path, name, content, message):
    with_data(bench, data_layer("ImageData",
                                'image_data_param { source: "away.txt" }',
                                "crop_size: 8"), (1, 3, 8, 8))
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        bench.export("--images", tmp_path / name)
    assert not bench.out.exists()


def test_images_for_features(bench, tmp_path):
    bench.write(image(1, 4), inner("ip1", "data"))
    bench.make_model()
    path = save(tmp_path / "image.png", noise(8, 8, 3))
    with pytest.raises(UserError, match=r"'data' of the shape \(1, 4\) "
                       "takes no images"):
        bench.export("--images", path)


def test_nets_that_differ_are_not_written(bench, monkeypatch):
    def wrong(before, node):
        deploy_fold(before, node)
        before.blobs[1] = before.blobs[1] + 0.01
    deploy_fold = deploy_net.fold_bn
    monkeypatch.setattr(deploy_net, "fold_bn", wrong)
    bench.write(image(1, 4, 9, 9), *TAIL)
    bench.make_model()
    with pytest.raises(UserError, match="the nets differ by .* in 'ip2', more "
                       "than 0.0001: nothing is written"):
        bench.export()
    assert not bench.out.exists()


def test_opencv_beside_it(bench, capsys):
    bench.write(image(1, 4, 9, 9), *TAIL)
    bench.make_model()
    bench.export()
    line, = re.findall(r"^OpenCV [\d.]+ on the same: largest relative "
                       r"difference (\S+) \((?:ip2|prob)\)$",
                       capsys.readouterr().out, re.M)
    assert float(line) < 1e-5


@pytest.mark.parametrize("answer, words", [
    (None, None),
    (("4.6.0", "no layer of the type X"),
     "OpenCV 4.6.0 does not run this net: no layer of the type X"),
    (("4.6.0", lambda own: own + 1), "OpenCV 4.6.0 makes something else of "
     "this net: 'ip2' differs by .*; run it in Caffe"),
    (("4.6.0", lambda own: own[:, :2]), "OpenCV 4.6.0 makes something else of "
     "this net: 'ip2' has the shape"),
    (("4.6.0", lambda own: own.reshape(1, 5, 1, 1)), None)])
def test_opencv_that_differs(bench, monkeypatch, capsys, answer, words):
    """It is warned of, and the files are written: Caffe agrees."""
    found = []

    def prove(*args):
        found.extend(real(*args))
        return found

    def outputs(*_):
        if answer is None or isinstance(answer[1], str):
            return answer
        return answer[0], [{"ip2": answer[1](own["ip2"])} for own in found]
    real = export_deploy.prove
    monkeypatch.setattr(export_deploy, "prove", prove)
    monkeypatch.setattr(export_deploy.opencv_net, "outputs", outputs)
    bench.write(image(1, 4, 9, 9), *TAIL)
    bench.make_model()
    bench.export()
    out = capsys.readouterr().out
    assert (bench.out / "deploy.caffemodel").exists()
    if words is None:
        assert "warning" not in out
    else:
        assert re.search("^warning: " + words, out, re.M), out


def test_blob_that_opencv_cannot_be_asked_for(bench):
    bench.write(image(1, 4, 9, 9), layer("Slice", "s", "data", "a b"), *TAIL)
    net = bench.parsed(bench.net)
    assert export_deploy.opencv_net.outputs(net, b"", [{}], ["b"]) is None


def test_net_that_opencv_does_not_read(bench):
    bench.write(image(1, 4, 9, 9), layer("MVN", "m", "data"),
                layer("Filter", "f", "m m"), *TAIL)
    answer = export_deploy.opencv_net.outputs(
        bench.parsed(bench.net), b"", [{}], ["f"])
    assert isinstance(answer[1], str) and answer[1], answer


def test_largest_difference():
    one = [{"a": np.array([1., -4]), "b": np.array([1.])}] * 2
    two = [one[0], {"a": np.array([1., -3]), "b": np.array([1.1])}]
    assert export_deploy.largest_difference(one, two) == (0.25, "a")
    assert export_deploy.largest_difference(one, one)[0] == 0
    two[1]["b"] = np.array([np.nan])
    assert not export_deploy.largest_difference(one, two)[0] <= 1e-4
    zero = [{"a": np.zeros(2)}]
    assert export_deploy.largest_difference(zero, zero)[0] == 0
    assert export_deploy.largest_difference(
        zero, [{"a": np.ones(2)}])[0] == np.inf
    with pytest.raises(UserError, match="'b' of the net is not finite"):
        export_deploy.largest_difference(two, two)


# ---- The other dialect ----

def variances(model, four_axes, eps=1e-5):
    """A model's BN blobs as the other dialect has them."""
    for found in model.layer:
        if found.type != "BN":
            continue
        blobs = [caffe_model.array_of(blob, "") for blob in found.blobs]
        blobs[3] = 1 / np.square(blobs[3].astype("f8")) - eps
        for blob, values in zip(found.blobs, blobs):
            caffe_model.set_array(blob, values.astype("f4").reshape(
                (1, -1) + (1, 1) * four_axes))


@pytest.mark.parametrize("four_axes", [False, True])
@pytest.mark.parametrize("fold", ["bn", "none"])
def test_variance(bench, four_axes, fold):
    text = bench.write(image(2, 4, 9, 9), *TAIL)
    model = bench.random(text)
    ours = bench.folder / "ours.caffemodel"
    ours.write_bytes(model.SerializeToString())
    variances(model, four_axes)
    bench.model.write_bytes(model.SerializeToString())
    if four_axes:
        with pytest.raises(UserError, match=r"layer 'b' \(BN\): blob 0 in "
                           r".* has the shape \(1, 6, 1, 1\).*--bn variance"):
            bench.export()
    bench.export("--bn", "variance", "--fold", fold)
    data = np.random.default_rng(9).standard_normal((2, 4, 9, 9))
    [own] = bench.run(text, ours, {"data": data, "label": [0, 0]}, "ip2")
    [other] = bench.deployed({"data": data}, "ip2")
    np.testing.assert_allclose(other, own, rtol=0,
                               atol=1e-5 * np.abs(own).max())


def test_variance_is_suspected(bench, capsys):
    layers = [conv("c", "data", "num_output: 16 kernel_size: 3"),
              bn("b", "c", "c")]
    text = bench.write(image(1, 4, 9, 9), *layers)
    model = bench.random(text)
    generator = np.random.default_rng(3)
    deviation = generator.uniform(20, 60, (1, 16))
    for i, values in ((2, deviation * generator.normal(0, 0.7, (1, 16))),
                      (3, 1 / deviation)):
        caffe_model.set_array(model.layer[1].blobs[i], values.astype("f4"))
    bench.model.write_bytes(model.SerializeToString())
    bench.export()
    assert "warning:" not in capsys.readouterr().out
    variances(model, False)
    bench.model.write_bytes(model.SerializeToString())
    bench.export("--force")
    assert re.search(r"warning: .*above eps.*, add --bn variance",
                     capsys.readouterr().out)
    bench.export("--force", "--bn", "variance")
    assert "warning:" not in capsys.readouterr().out


def test_variance_below_zero(bench):
    text = bench.write(image(1, 4, 9, 9), *TAIL)
    model = bench.random(text)
    caffe_model.set_array(model.layer[1].blobs[3],
                          np.array([[1, 1, -3, 1, 1, 1]], "f4"))
    bench.model.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"layer 'b' \(BN\) in .*: channel 2 "
                       "has the variance -3"):
        bench.export("--bn", "variance")
    assert not bench.out.exists()


# ---- What cannot be done ----

REFUSED = {
    "another Caffe's layer": (
        [layer("ROIPooling", "roi", "data")],
        r"layer 'roi' \(ROIPooling\) is no layer of upstream Caffe"),
    "a Python layer": (
        [layer("Python", "mine", "data", None, 'python_param { module: "m" '
               'layer: "L" }')], r"layer 'mine' \(Python\) is no layer"),
    "a label in the net": (
        [inner("ip1", "data"), layer("Eltwise", "e", "ip1 lambda"),
         margin("ip2", "ip1 label", "ip2 lambda2")],
        "layer 'e' of .* takes 'lambda', which no layer before it makes"),
    "lambda in the net": (
        [inner("ip1", "data"), margin("ip2", "ip1 label", "ip2 lambda"),
         layer("Scale", "s", "ip2 lambda", None, "scale_param { axis: 0 }")],
        r"layer 's' \(Scale\) takes 'lambda', which comes from labels"),
    "two layers of a name": (
        [inner("ip1", "data"), inner("ip1", "ip1")],
        "has two layers 'ip1' in the TEST phase"),
    "nothing but training": (
        [inner("ip1", "data", more="include { phase: TRAIN }")],
        "makes nothing from its data in the TEST phase"),
    "a net that is wrong": (
        [conv("c", "data", "num_output: 0 kernel_size: 3")],
        "Caffe says of layer 'c'"),
}


@pytest.mark.parametrize("layers, message", REFUSED.values(), ids=REFUSED)
def test_refused(bench, layers, message):
    bench.write(image(1, 4, 9, 9), *layers)
    model = bench.pb.NetParameter(name="m")
    caffe_model.set_array(model.layer.add(name="none").blobs.add(),
                          np.zeros(1, "f4"))
    bench.model.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=message):
        bench.export()
    assert not bench.out.exists()


def test_old_format(bench):
    bench.net.write_text('layers { name: "c" type: CONVOLUTION }')
    bench.model.write_bytes(b"\x0a\x01m\xa2\x06\x03\x0a\x01x")
    with pytest.raises(UserError, match="upgrade_net_proto_text"):
        bench.export()


def test_a_solver_is_no_net(bench):
    bench.net.write_text('net: "n.prototxt" max_iter: 3')
    with pytest.raises(UserError, match="is a solver: give a net"):
        bench.export()


def edit_model(bench, change):
    model = bench.pb.NetParameter.FromString(bench.model.read_bytes())
    change(model)
    bench.model.write_bytes(model.SerializeToString())


def add_bias(model):
    caffe_model.set_array(model.layer[2].blobs.add(), np.zeros(5, "f4"))


def wider(model):
    caffe_model.set_array(model.layer[2].blobs[0], np.zeros((7, 294), "f4"))


def not_finite(model):
    model.layer[0].blobs[0].data[3] = np.nan


def short(model):
    del model.layer[0].blobs[0].data[-1]


MODELS = {
    "a bias": (add_bias, r"layer 'ip2' \(LargeMarginInnerProduct\) has 2 "
               "blobs in .*trained.caffemodel where the net has 1: it was an "
               "InnerProduct with a bias"),
    "another shape": (wider, r"layer 'ip2' .*: blob 0 in .* has the shape "
                      r"\(7, 294\) where the net has \(5, 294\)"),
    "a layer missing": (lambda model: model.layer.pop(1),
                        r"layer 'b' \(BN\) has no weights in .*trained"),
    "a blob missing": (lambda model: model.layer[1].blobs.pop(),
                       r"layer 'b' \(BN\) has 3 blobs in .* has 4"),
    "a number missing": (short, "blob 0 of layer 'c' has 215 values where its "
                         "shape"),
    "no number": (not_finite, r"layer 'c' .*: blob 0 in .* not finite"),
}


@pytest.mark.parametrize("change, message", MODELS.values(), ids=MODELS)
def test_models_that_do_not_fit(bench, change, message):
    bench.write(image(1, 4, 9, 9), *TAIL)
    bench.make_model()
    edit_model(bench, change)
    with pytest.raises(UserError, match=message):
        bench.export()
    assert not bench.out.exists()


@pytest.mark.parametrize("spoil, message", [
    (lambda data: data[:len(data) // 2], "is cut short, or no .caffemodel"),
    (lambda data: data[:-1], "is cut short, or no .caffemodel"),
    (lambda data: b"", "holds no layers"),
    (lambda data: b"name: 'a net'\n", "is cut short, or no .caffemodel"),
    # As a .solverstate begins.
    (lambda data: b"\x08\x05", "holds no layers"),
    (lambda data: caffe_model.HDF5_SIGNATURE + data, "as HDF5"),
])
def test_broken_models(bench, spoil, message):
    bench.write(image(1, 4, 9, 9), *TAIL)
    bench.make_model()
    bench.model.write_bytes(spoil(bench.model.read_bytes()))
    with pytest.raises(UserError, match=message):
        bench.export()
    assert not bench.out.exists()


def test_foreign_hdf5(bench):
    import h5py
    bench.write(image(1, 4, 9, 9), *TAIL)
    with h5py.File(bench.model, "w") as file:
        file["label"] = np.zeros(3)
    with pytest.raises(UserError, match="has no group /data"):
        bench.export()
    with h5py.File(bench.model, "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(UserError, match="has no group /data"):
        bench.export()
    with h5py.File(bench.model, "w") as file:
        file["data/b"] = np.zeros(3)
    with pytest.raises(UserError, match="cannot read|holds no weights"):
        bench.export()


@pytest.mark.parametrize("name", ["deploy.prototxt", "deploy.caffemodel"])
def test_overwrites_only_by_force(bench, name):
    bench.write(image(1, 4, 9, 9), *TAIL)
    bench.make_model()
    bench.out.mkdir()
    (bench.out / name).write_text("mine")
    with pytest.raises(UserError, match="%s is there already; --force" % name):
        bench.export()
    assert os.listdir(bench.out) == [name]
    assert (bench.out / name).read_text() == "mine"
    bench.export("--force")
    assert sorted(os.listdir(bench.out)) == ["deploy.caffemodel",
                                             "deploy.prototxt"]
    assert (bench.out / name).read_bytes() != b"mine"


def command(*args, **options):
    return subprocess.run(
        [os.path.join(ROOT, "myexamples/export_deploy.py"), *map(str, args)],
        env=dict(os.environ, CAFFE_ROOT=CAFFE_ROOT), text=True, timeout=120,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def test_command(bench):
    bench.write(image(1, 4, 9, 9), *TAIL)
    bench.make_model()
    done = command(bench.net, bench.model, "-o", bench.out / "deeper")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith("made ")
    done = command(bench.net, bench.model, "-o", bench.out / "deeper")
    assert done.returncode == 1
    assert done.stdout == "error: %s is there already; --force replaces it\n" \
        % (bench.out / "deeper/deploy.prototxt")
    done = command(bench.folder / "none", bench.model, "-o", bench.folder)
    assert done.returncode == 1
    assert done.stdout.startswith("error: cannot read ")
    help_text = command("--help").stdout
    for option in ("--shape", "--images", "--fold", "--bn", "--force"):
        assert option in help_text


def test_full_disk(bench):
    from conftest import small_disk
    bench.write(image(1, 4, 9, 9), *TAIL, inner("big", "c",
                                                "num_output: 2000"))
    bench.make_model()
    done = command(bench.net, bench.model, "-o", bench.out,
                   **small_disk(100000))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stdout
    assert not bench.out.exists()
