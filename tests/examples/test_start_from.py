"""start_from.py: what fits, what does not, and that Caffe agrees."""
import os
import re
import subprocess

import numpy as np
import pytest

import caffe_model_tools as tools
from conftest import CAFFE_ROOT, ROOT
from deploy_tools import Bench, bn, conv, image, inner, layer, loss, margin

from caffe_proto import UserError
import caffe_model
import start_from

SHAPE = (2, 4, 9, 9)
TRUNK = [conv("c", "data"), bn("b", "c", "c"), inner("ip1", "c")]
NET = [image(*SHAPE), *TRUNK,
       margin("ip2", "ip1 label", "ip2 lambda",
              "type: QUADRUPLE base: 1000 gamma: 0.0001 power: 12"),
       loss("ip2")]


class Start(Bench):
    def softmax(self, *layers, suffix=".caffemodel"):
        """Writes the model of a softmax net, as Caffe saves it."""
        text = "\n".join([image(*SHAPE, label=False), *layers])
        self.model = self.folder / ("softmax" + suffix)
        tools.save(self.caffe, text, self.random(text), self.model)

    def check(self, *options, net=NET):
        self.write(*net)
        start_from.run(self.caffe, self.pb, start_from.parse_args(
            ["--softmax", str(self.model), "--net", str(self.net),
             *map(str, options)]))

    def loads(self, model):
        """Has Caffe load a model into the net, in the TRAIN phase's shapes;
        what it says else."""
        self.run(self.net.read_text(), model,
                 {"data": np.ones(SHAPE), "label": [0, 1]}, "ip2")


@pytest.fixture
def start(tmp_path, pb, caffe):
    return Start(tmp_path, pb, caffe)


WITHOUT = inner("ip2", "ip1", "num_output: 5 bias_term: false")
WITH = inner("ip2", "ip1")
TRANSPOSED = inner("ip2", "ip1", "num_output: 5 transpose: true "
                   "bias_term: false")


@pytest.mark.parametrize("suffix", [".caffemodel", ".caffemodel.h5"])
def test_fits(start, capsys, suffix):
    start.softmax(*TRUNK, WITHOUT, suffix=suffix)
    start.check()
    out = capsys.readouterr().out.splitlines()
    assert re.match("copied: 4 layers: ", out[0])
    assert set(out[0].split(": ")[2].split(", ")) == {"c", "b", "ip1", "ip2"}
    assert out[1] == "start layer 'ip2' (LargeMarginInnerProduct) with " \
        "base: 10 (the net has 1000, for a start from scratch)"
    assert out[2].startswith("start the solver with a tenth of the base_lr")
    assert out[3] == "train with: caffe train --solver=SOLVER --weights=%s" \
        % start.model
    start.loads(start.model)


def test_layers_of_one_side(start, capsys):
    start.softmax(conv("c", "data"), inner("old", "c"),
                  inner("ip2", "old", "num_output: 5 bias_term: false"))
    start.check(net=[image(*SHAPE), conv("c", "data"), inner("new", "c"),
                     margin("ip2", "new label"), loss("ip2")])
    out = capsys.readouterr().out
    assert "copied: 2 layers: c, ip2" in out
    assert "not in the model, from their fillers: 1 layer: new" in out
    assert "not in the net, ignored: 1 layer: old" in out
    start.loads(start.model)


@pytest.mark.parametrize("suffix", [".caffemodel", ".caffemodel.h5"])
def test_bias(start, capsys, suffix):
    start.softmax(*TRUNK, WITH, suffix=suffix)
    with pytest.raises(UserError, match=r"does not fit as it is \(ip2, above"
                       r"\): write one that does with -o OUT"):
        start.check()
    # Which is so.
    with pytest.raises(UserError, match="Incompatible number of blobs"):
        start.loads(start.model)
    assert re.search(r"'ip2': its bias \(\S+ to \S+\) is dropped: a margin "
                     "layer has none", capsys.readouterr().out)
    with pytest.raises(UserError, match="without .h5: give it such a name"):
        start.check("-o", start.folder / "fits.caffemodel.h5")
    out = start.folder / "fits.caffemodel"
    start.check("-o", out)
    start.loads(out)
    assert capsys.readouterr().out.splitlines()[-1].endswith(
        "--weights=%s" % out)
    mine = caffe_model.read(start.pb, str(start.model))
    theirs = caffe_model.read(start.pb, str(out))
    assert [len(blobs) for blobs in theirs.values()] == [
        1 if name == "ip2" else len(mine[name]) for name in theirs]
    for name, blobs in theirs.items():
        for one, other in zip(mine[name], blobs):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("suffix", [".caffemodel", ".caffemodel.h5"])
@pytest.mark.parametrize("features", [5, 7])
def test_transposed(start, capsys, features, suffix):
    if features == 5 and suffix == ".caffemodel.h5":
        pytest.skip("HDF5 does not tell that a square matrix is transposed")
    trunk = [inner("ip1", "data", "num_output: %d" % features)]
    start.softmax(*trunk, TRANSPOSED, suffix=suffix)
    out = start.folder / "fits.caffemodel"
    net = [image(*SHAPE), *trunk, margin("ip2", "ip1 label"), loss("ip2")]
    with pytest.raises(UserError, match="does not fit as it is"):
        start.check(net=net)
    start.check("-o", out, net=net)
    assert "its weights are transposed" in capsys.readouterr().out
    start.loads(out)
    np.testing.assert_array_equal(
        caffe_model.read(start.pb, str(out))["ip2"][0],
        caffe_model.read(start.pb, str(start.model))["ip2"][0].T)


BATCH_NORM = [conv("c", "data"), layer("BatchNorm", "b", "c", "c"),
              layer("Scale", "b_scale", "c", "c"), inner("ip1", "c")]
WRONG = {
    "classes": ([*TRUNK, inner("ip2", "ip1", "num_output: 8 bias_term: "
                               "false")],
                r"layer 'ip2' \(LargeMarginInnerProduct\) has \(8, 5\) in the "
                r"model where the net has \(5, 5\): 8 classes, not 5. Rename"),
    "a convolution": ([conv("c", "data", "num_output: 6 kernel_size: 5"),
                       inner("ip1", "c")],
                      r"layer 'c' \(Convolution\) has \(6, 4, 5, 5\) \(6\) in "
                      r"the model where the net has \(6, 4, 3, 3\) \(6\)"),
    "BatchNorm": ([*BATCH_NORM, WITHOUT],
                  r"layer 'b' \(BN\) has .*: it was upstream's BatchNorm; "
                  "myexamples/convert_bn.py makes"),
}


@pytest.mark.parametrize("layers, message", WRONG.values(), ids=WRONG)
def test_does_not_fit(start, capsys, layers, message):
    start.softmax(*layers)
    out = start.folder / "out.caffemodel"
    with pytest.raises(UserError, match=r"does not fit .*: Caffe would refuse "
                       r"\d layers? \(above\)"):
        start.check("-o", out)
    assert re.search(message, capsys.readouterr().out)
    assert not out.exists()
    with pytest.raises(UserError, match="Caffe says"):
        start.loads(start.model)


def test_bn_of_another_caffe(start, capsys):
    start.softmax(*TRUNK, WITHOUT)
    model = start.pb.NetParameter.FromString(start.model.read_bytes())
    [found] = [found for found in model.layer if found.name == "b"]
    for blob in found.blobs:
        caffe_model.set_array(blob, np.ones((1, 6, 1, 1), "f4"))
    start.model.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="does not fit"):
        start.check()
    assert "it is the BN of another Caffe; myexamples/convert_bn.py" in \
        capsys.readouterr().out


def test_margin_layer_of_another_name(start, capsys):
    start.softmax(*TRUNK, inner("fc", "ip1", "num_output: 5 bias_term: "
                                "false"))
    start.check()
    assert "warning: layer 'ip2' (LargeMarginInnerProduct) starts from its " \
        "filler: rename it to 'fc' to have that layer's weights" in \
        capsys.readouterr().out


def test_advice(start, capsys, tmp_path):
    start.softmax(*TRUNK, WITHOUT)
    solver = tmp_path / "solver.prototxt"
    solver.write_text('base_lr: 0.05 max_iter: 100 lr_policy: "fixed"')
    start.check("--solver", solver)
    out = capsys.readouterr().out
    assert "start the solver with base_lr: 0.005, a tenth of the 0.05 of %s" \
        % solver in out
    # It may be that of the softmax model, which trains another net.
    assert "caffe train --solver=SOLVER --weights=" in out
    for field, named in (("net", start.net), ("train_net", start.net),
                         ("net", start.model)):
        solver.write_text('%s: "%s" base_lr: 0.05 max_iter: 100 '
                          'lr_policy: "fixed"' % (field, named))
        start.check("--solver", solver)
        assert ("caffe train --solver=%s --weights=" % solver in
                capsys.readouterr().out) == (named is start.net)
    net = "\n".join(NET)
    for old, new, said in (
            ("base: 1000", "base: 1", "(the net has 1: the margin would begin "
             "at once)"),
            ("base: 1000", "base: 10", "with base: 10\n"),
            ("base: 1000", "base: 900 lambda_min: 20", "with base: 20 (the"),
            ("type: QUADRUPLE", "margin: 1", "m is 1, plain softmax")):
        start.check(net=[net.replace(old, new)])
        assert said in capsys.readouterr().out


def test_the_quick_net(start, capsys):
    """An example's net, whose data may not be there."""
    with open(os.path.join(ROOT, "myexamples/mnist/"
                           "quick_train_test.prototxt")) as file:
        quick = file.read().replace('name: "mnist_quick"', "")
    test = start.pb.NetParameter()
    from google.protobuf import text_format
    text_format.Parse(quick, test)
    kept = [found for found in test.layer if found.type not in (
        "Data", "Accuracy", "SoftmaxWithLoss")]
    softmax = []
    for found in kept:
        if found.type == "LargeMarginInnerProduct":
            if found.include[0].phase == start.pb.TRAIN:
                continue
            found.ClearField("largemargin_inner_product_param")
            found.ClearField("include")
            found.ClearField("param")
            del found.bottom[1]
            found.type = "InnerProduct"
            found.inner_product_param.num_output = 10
        softmax.append("layer { %s }" % text_format.MessageToString(found))
    text = "\n".join([image(1, 1, 28, 28, label=False), *softmax])
    start.model = start.folder / "softmax.caffemodel"
    start.model.write_bytes(start.random(text).SerializeToString())
    start.check("--shape", "1,28,28", "-o", start.folder / "out.caffemodel",
                net=[quick])
    out = capsys.readouterr().out
    assert "'ip2': its bias" in out
    assert re.search(r"copied: 1\d layers: conv1, bn1, ", out)


def test_no_margin_layer(start):
    start.softmax(*TRUNK, WITHOUT)
    with pytest.raises(UserError, match="has no LargeMarginInnerProduct layer "
                       "in the TRAIN phase"):
        start.check(net=[image(*SHAPE), *TRUNK, WITHOUT])


def test_nothing_in_common(start):
    start.softmax(inner("other", "data"))
    with pytest.raises(UserError, match="have no layer in common"):
        start.check()


def test_diverged_model(start):
    start.softmax(*TRUNK, WITHOUT)
    model = start.pb.NetParameter.FromString(start.model.read_bytes())
    [found] = [found for found in model.layer if found.name == "ip1"]
    found.blobs[0].data[0] = np.inf
    start.model.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="layer 'ip1' of .* not finite"):
        start.check()


@pytest.mark.parametrize("spoil", [
    lambda data: data[:-3], lambda data: b"", lambda data: b"name: 'x'"])
def test_broken_models(start, spoil):
    start.softmax(*TRUNK, WITHOUT)
    start.model.write_bytes(spoil(start.model.read_bytes()))
    out = start.folder / "out.caffemodel"
    with pytest.raises(UserError, match="softmax.caffemodel"):
        start.check("-o", out)
    assert not out.exists()


def test_command(start):
    start.softmax(*TRUNK, WITH)
    start.write(*NET)
    out = start.folder / "out.caffemodel"
    out.write_text("mine")

    def command(*args):
        return subprocess.run(
            [os.path.join(ROOT, "myexamples/start_from.py"), "--softmax",
             str(start.model), "--net", str(start.net), *map(str, args)],
            env=dict(os.environ, CAFFE_ROOT=CAFFE_ROOT), text=True,
            timeout=120, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    done = command("-o", out)
    assert done.returncode == 1
    assert done.stdout == "error: %s is there already; --force replaces it\n" \
        % out
    assert out.read_text() == "mine"
    done = command("-o", out, "--force")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-2] == "made %s" % out
    start.loads(out)
    done = command("-o", start.model, "--force")
    assert done.stdout.startswith("error: OUT is MODEL")


@pytest.mark.parametrize("tool, options", [
    ("start_from.py", "--softmax --net --solver --shape --output --force"),
    ("convert_bn.py", "--from --to --net --eps --layer --axes --scale-name "
     "--force"), ("classify.py", "FOLDER IMAGE")])
def test_help(tool, options):
    done = subprocess.run([os.path.join(ROOT, "myexamples", tool), "--help"],
                          text=True, stdout=subprocess.PIPE)
    assert done.returncode == 0
    for option in options.split():
        assert option in done.stdout


@pytest.mark.parametrize("tool, args", [
    ("start_from.py", "--softmax %s --net %s"),
    ("export_deploy.py", "%s %s -o out")])
def test_no_pycaffe(start, tmp_path, tool, args):
    """A Caffe that Make has built without it."""
    start.softmax(*TRUNK, WITHOUT)
    start.write(*NET)
    root = tmp_path / "caffe"
    proto = root / "python/caffe/proto"
    proto.mkdir(parents=True)
    with open(os.path.join(CAFFE_ROOT, "python/caffe/proto/caffe_pb2.py")) \
            as file:
        (proto / "caffe_pb2.py").write_text(file.read())
    files = [start.model, start.net]
    if tool == "export_deploy.py":
        files.reverse()
    done = subprocess.run(
        [os.path.join(ROOT, "myexamples", tool), *(args % tuple(files))
         .split()], env=dict(os.environ, CAFFE_ROOT=str(root)), cwd=tmp_path,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 1
    assert done.stdout.startswith("error: no built pycaffe in %s: run cmake/"
                                  "build_caffe.sh" % root)
    assert not (tmp_path / "out").exists()
