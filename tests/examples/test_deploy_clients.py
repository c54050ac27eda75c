"""Exported nets in other programs: OpenCV's dnn, upstream's own protobuf."""
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

import mnist_images
from conftest import CAFFE_ROOT, ROOT
from deploy_tools import Bench, bn, inner, layer, random_model

cv2 = pytest.importorskip("cv2")

# Shape of the images that go in, and whether the net is the authors'.
NETS = {
    "mnist/quick_train_test.prototxt": (1, 28, 28),
    "mnist/model/mnist_train_test.prototxt": (1, 28, 28),
    "cifar10/model/cifar_train_test.prototxt": (3, 32, 32),
    "cifar10+/model/cifar_train_test.prototxt": (3, 32, 32),
}


def own_net(bench, shape):
    """The example's own TEST net with Input layers for its data."""
    net = bench.parsed()
    for found in list(net.layer):
        if found.type in ("Data", "ImageData"):
            net.layer.remove(found)
    found = bench.pb.NetParameter()
    for name, dims in (("data", (1, *shape)), ("label", (1,))):
        added = found.layer.add(name=name, type="Input", top=[name])
        added.input_param.shape.add().dim.extend(dims)
    found.layer.extend(net.layer)
    return found


def comments(path):
    """scalefactor, size, mean and swapRB from the head of a prototxt."""
    text = path.read_text()
    found = dict(re.findall(r"(?m)^#   (\w+): ([^\n]*)$", text))
    return {"scalefactor": float(found["scalefactor"]),
            "size": tuple(map(int, found["size"].split(", "))),
            "mean": tuple(map(float, found["mean"].split(", "))),
            "swapRB": {"false": False}[found["swapRB"]]}


@pytest.fixture(scope="module", params=NETS, ids=os.path.dirname)
def exported(request, tmp_path_factory, pb, caffe):
    """A Bench with an exported example, its own net and its logits' name."""
    bench = Bench(tmp_path_factory.mktemp("export"), pb, caffe)
    shape = NETS[request.param]
    bench.net = bench.folder / "net.prototxt"
    with open(os.path.join(ROOT, "myexamples", request.param)) as file:
        text = file.read()
    # Of a training's mean, as of the images, no more than its place is known.
    bench.net.write_text(re.sub(r'mean_file: *"[^"]*"',
                                "mean_value: 110 mean_value: 120 "
                                "mean_value: 130", text))
    bench.own = own_net(bench, shape)
    shapes, _ = caffe.shapes(str(bench.own))
    model = random_model(pb, shapes, {found.name: found.type
                                      for found in bench.own.layer})
    bench.model.write_bytes(model.SerializeToString())
    bench.export("--shape", ",".join(map(str, shape)))
    return bench


def test_opencv(exported):
    """The logits of OpenCV are those of the net as it was trained."""
    net = cv2.dnn.readNetFromCaffe(str(exported.out / "deploy.prototxt"),
                                   str(exported.out / "deploy.caffemodel"))
    transform = comments(exported.out / "deploy.prototxt")
    shape = exported.parsed(
        exported.out / "deploy.prototxt").layer[0].input_param.shape[0].dim
    own = str(exported.own)
    for picture in mnist_images.pictures(3):
        if shape[1] == 3:
            picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR)
            picture[..., 1] //= 2
            picture[..., 2] = 255 - picture[..., 2]
        blob = cv2.dnn.blobFromImage(picture, **transform)
        assert list(blob.shape) == list(shape)
        # Written anew, as Caffe's transformer does it.
        pixels = cv2.resize(picture, transform["size"]).astype("f4")
        data = ((pixels.reshape(shape[2], shape[3], shape[1])
                 .transpose(2, 0, 1) - np.reshape(
                     np.float32(transform["mean"]), (-1, 1, 1)))
                * np.float32(transform["scalefactor"]))[None]
        [logits] = exported.run(own, exported.model,
                                {"data": data, "label": [0]}, "ip2")
        net.setInput(blob)
        [seen] = net.forward(["ip2"])
        assert np.abs(logits).max() > 1e-3
        np.testing.assert_allclose(seen, logits, rtol=0,
                                   atol=1e-4 * np.abs(logits).max())
        net.setInput(blob)
        exact = np.exp(logits[0].astype("f8") - logits.max())
        np.testing.assert_allclose(net.forward()[0], exact / exact.sum(),
                                   atol=1e-4)


@pytest.mark.parametrize("layers", [
    [inner("x", "data", "num_output: 5 transpose: true")],
    [inner("c", "data", "num_output: 6 transpose: true"), bn("b", "c"),
     inner("x", "b", "num_output: 5 transpose: true bias_term: false")],
    [layer("LRN", "n", "data", extra="lrn_param { local_size: 3 }"),
     inner("x", "n")],
    [layer("LRN", "n", "data", extra="lrn_param { norm_region: "
           "WITHIN_CHANNEL local_size: 3 }"), inner("x", "n")],
])
def test_opencv_reads_it_as_caffe_does(tmp_path, pb, caffe, layers):
    bench = Bench(tmp_path, pb, caffe)
    bench.check(layers, "x", shape=(1, 4, 9, 9))
    data = np.random.default_rng(1).standard_normal((1, 4, 9, 9))
    [mine] = bench.trained({"data": data, "label": [0]}, "x")
    net = cv2.dnn.readNetFromCaffe(str(bench.out / "deploy.prototxt"),
                                   str(bench.out / "deploy.caffemodel"))
    net.setInput(data.astype("f4"))
    np.testing.assert_allclose(net.forward(), mine, rtol=0,
                               atol=1e-5 * np.abs(mine).max())


@pytest.fixture(scope="module")
def upstream(tmp_path_factory, pb):
    """A folder with caffe_pb2 as upstream has it, and upstream's layers."""
    folder = tmp_path_factory.mktemp("upstream")
    tree = folder / "caffe"
    shutil.copytree(CAFFE_ROOT, tree, symlinks=True,
                    ignore=lambda path, names: {
                        "build", "data", "docs", "examples", "matlab",
                        "models", ".git"} if path == CAFFE_ROOT else ())
    subprocess.run([os.path.join(ROOT, "caffe_patch/apply.sh"), "--revert",
                    str(tree)], check=True, stdout=subprocess.DEVNULL)
    proto = tree / "src/caffe/proto/caffe.proto"
    assert not re.search("LargeMargin|BNParam", proto.read_text())
    subprocess.run(["protoc", "-I", str(proto.parent), "--python_out",
                    str(folder), str(proto)], check=True)
    kinds = set()
    for path in tree.glob("src/caffe/**/*.cpp"):
        kinds.update(re.findall(r"REGISTER_LAYER_(?:CLASS|CREATOR)\((\w+)",
                                path.read_text()))
    assert "Convolution" in kinds and "BN" not in kinds
    (folder / "kinds").write_text("\n".join(kinds))
    return folder


PARSE = """
import sys
from google.protobuf import text_format
sys.path.insert(0, sys.argv[1])
import caffe_pb2
kinds = set(open(sys.argv[1] + "/kinds").read().split())
net = text_format.Parse(open(sys.argv[2]).read(), caffe_pb2.NetParameter())
data = open(sys.argv[3], "rb").read()
model = caffe_pb2.NetParameter.FromString(data)
assert model.SerializeToString() == data
model.DiscardUnknownFields()
assert model.SerializeToString() == data, "unknown fields"
for layers in (net.layer, model.layer):
    strange = {layer.type for layer in layers} - kinds
    assert not strange, strange
assert [layer.name for layer in net.layer] == [
    layer.name for layer in model.layer]
print(len(net.layer), "layers")
"""


def parse_upstream(upstream, out):
    return subprocess.run(
        ["/usr/bin/python3", "-c", PARSE, str(upstream),
         str(out / "deploy.prototxt"), str(out / "deploy.caffemodel")],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_upstream_proto(upstream, exported):
    done = parse_upstream(upstream, exported.out)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[0]) > 9


def test_upstream_proto_does_not_take_all(upstream, exported, tmp_path):
    """What it would say of the net as it was trained."""
    (tmp_path / "deploy.prototxt").write_text(
        (exported.out / "deploy.prototxt").read_text())
    model = exported.pb.NetParameter.FromString(
        (exported.out / "deploy.caffemodel").read_bytes())
    model.layer[1].bn_param.eps = 1
    (tmp_path / "deploy.caffemodel").write_bytes(model.SerializeToString())
    assert "unknown fields" in parse_upstream(upstream, tmp_path).stdout
    (tmp_path / "deploy.prototxt").write_text(
        'layer { name: "b" type: "BN" bn_param { eps: 1 } }')
    assert "no field named" in parse_upstream(upstream, tmp_path).stdout
