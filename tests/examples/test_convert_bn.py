"""convert_bn.py: every way between the dialects, and what it refuses."""
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

import caffe_model_tools as tools
from conftest import CAFFE_ROOT, ROOT
from deploy_tools import Bench, bn, conv, image, inner, layer

from caffe_proto import UserError
import caffe_model
import convert_bn

EPS = 1e-3
PARAM = "bn_param { eps: %g }" % EPS
LAYERS = [conv("c", "data"), bn("b1", "c", extra=PARAM),
          layer("ReLU", "r", "b1", "b1"), inner("ip", "b1"),
          bn("b2", "ip", "ip", PARAM)]
# The same with upstream's layers.
TWIN = [conv("c", "data"),
        layer("BatchNorm", "b1", "c", "b1",
              "batch_norm_param { use_global_stats: true eps: %g }" % EPS),
        layer("Scale", "b1_scale", "b1", "b1",
              "scale_param { bias_term: true }"),
        layer("ReLU", "r", "b1", "b1"), inner("ip", "b1"),
        layer("BatchNorm", "b2", "ip", "ip",
              "batch_norm_param { use_global_stats: true eps: %g }" % EPS),
        layer("Scale", "b2_scale", "ip", "ip",
              "scale_param { bias_term: true }")]
SHAPE = (2, 4, 7, 7)
WAYS = [(one, other) for one in convert_bn.DIALECTS
        for other in convert_bn.DIALECTS if one != other]


class Models(Bench):
    """A folder with models of LAYERS, as Caffe itself writes them."""

    def start(self, suffix):
        self.suffix = suffix
        self.text = self.write(image(*SHAPE, label=False), *LAYERS)
        self.twin = "\n".join([image(*SHAPE, label=False), *TWIN])
        self.nets = {"inverse-std": self.text, "variance": self.text,
                     "batchnorm-scale": self.twin}
        self.first = self.path("first")
        tools.save(self.caffe, self.text, self.random(self.text), self.first)

    def path(self, name):
        return self.folder / (name + self.suffix)

    def convert(self, source, target, *options, model=None, name="out"):
        """Converts a model to the file `name`; returns its path."""
        out = self.path(name)
        convert_bn.run(convert_bn.parse_args(
            [str(model or self.first), str(out), "--from", source, "--to",
             target, *map(str, options)]))
        return out

    def in_dialect(self, dialect):
        """The model in a dialect, by numpy."""
        weights = caffe_model.read(self.pb, str(self.first))
        found = {}
        for name, blobs in weights.items():
            found[name] = blobs
            if name[0] != "b":
                continue
            slope, bias, mean, inv_std = blobs
            variance = (inv_std.astype("f8") ** -2 - EPS).astype("f4")
            if dialect == "variance":
                found[name] = [slope, bias, mean, variance]
            elif dialect == "batchnorm-scale":
                # Sums over some batches, as BatchNorm has them.
                factor = np.float32(37.5)
                found[name] = [mean[0] * factor, variance[0] * factor,
                               np.array([factor], "f4")]
                found[name + "_scale"] = [slope[0], bias[0]]
        path = self.path(dialect)
        net = self.nets[dialect]
        tools.save(self.caffe, net, tools.filled(self.pb, net, found), path)
        return path

    def outputs(self, dialect, model):
        """What Caffe makes with a model."""
        data = np.random.default_rng(4).standard_normal(SHAPE)
        return self.run(self.nets[dialect], model, {"data": data}, "ip")[0]


@pytest.fixture(params=[".caffemodel", ".caffemodel.h5"])
def models(request, tmp_path, pb, caffe):
    made = Models(tmp_path, pb, caffe)
    made.start(request.param)
    return made


@pytest.fixture
def binary(tmp_path, pb, caffe):
    made = Models(tmp_path, pb, caffe)
    made.start(".caffemodel")
    return made


def eps_options(models):
    """HDF5 has no parameters."""
    return ["--eps", EPS] if models.suffix.endswith("h5") else []


def same(one, other, tolerance=1e-6):
    assert np.abs(one).max() > 0.1
    np.testing.assert_allclose(other, one, rtol=0,
                               atol=tolerance * np.abs(one).max())


@pytest.mark.parametrize("source, target", WAYS)
def test_every_way(models, source, target):
    """From a model that numpy made to one that Caffe reads alike."""
    out = models.convert(source, target, *eps_options(models),
                         model=models.in_dialect(source))
    want = caffe_model.read(models.pb, str(models.in_dialect(target)))
    got = caffe_model.read(models.pb, str(out))
    assert set(got) == set(want)
    for name, blobs in want.items():
        if target == "batchnorm-scale" and len(blobs) == 3:
            blobs = [blobs[0] / blobs[2], blobs[1] / blobs[2], np.ones(1)]
        assert [blob.shape for blob in got[name]] == [
            blob.shape for blob in blobs]
        for one, other in zip(blobs, got[name]):
            np.testing.assert_allclose(other, one, rtol=2e-6, atol=1e-7)
    if target != "variance":
        same(models.outputs("inverse-std", models.first),
             models.outputs(target, out), 1e-5)


@pytest.mark.parametrize("through", ["variance", "batchnorm-scale"])
def test_round_trip(models, through):
    """Exact to the rounding of a float."""
    options = eps_options(models)
    there = models.convert("inverse-std", through, *options)
    back = models.convert(through, "inverse-std", *options, model=there,
                          name="back")
    first = caffe_model.read(models.pb, str(models.first))
    got = caffe_model.read(models.pb, str(back))
    assert set(got) == set(first)
    for name, blobs in first.items():
        for i, (one, other) in enumerate(zip(blobs, got[name])):
            assert one.shape == other.shape
            if name[0] == "b" and i == 3:
                np.testing.assert_array_max_ulp(one, other, 1)
            else:
                np.testing.assert_array_equal(one, other)
    same(models.outputs("inverse-std", models.first),
         models.outputs("inverse-std", back))


@pytest.mark.parametrize("through", ["inverse-std", "batchnorm-scale"])
def test_round_trip_of_variances(models, through):
    options = eps_options(models)
    first = models.in_dialect("variance")
    there = models.convert("variance", through, *options, model=first)
    back = models.convert(through, "variance", *options, model=there,
                          name="back")
    one = caffe_model.read(models.pb, str(first))
    other = caffe_model.read(models.pb, str(back))
    for name in ("b1", "b2"):
        for i in range(4):
            eps = EPS if i == 3 else 0
            np.testing.assert_allclose(other[name][i] + eps,
                                       one[name][i] + eps, rtol=3e-7)


def test_four_axes(models):
    """PSPNet's shapes, which Caffe takes only after the conversion."""
    options = eps_options(models)
    there = models.convert("inverse-std", "variance", "--axes", 4, *options)
    blobs = caffe_model.read(models.pb, str(there))["b1"]
    assert [blob.shape for blob in blobs] == [(1, 6, 1, 1)] * 4
    if models.suffix == ".caffemodel":
        with pytest.raises(UserError, match="shape mismatch"):
            models.outputs("inverse-std", there)
    back = models.convert("variance", "inverse-std", *options, model=there,
                          name="back")
    same(models.outputs("inverse-std", models.first),
         models.outputs("inverse-std", back))


def test_one_channel(tmp_path, pb, caffe):
    """numpy makes a scalar of one number easily, which is no blob of Caffe."""
    made = Models(tmp_path, pb, caffe)
    one = conv("c", "data", "num_output: 1 kernel_size: 3")
    made.suffix, data = ".caffemodel", image(*SHAPE, label=False)
    made.nets = {"inverse-std": "\n".join([data, one, *LAYERS[1:]]),
                 "batchnorm-scale": "\n".join([data, one, *TWIN[1:]])}
    made.first = made.path("first")
    text = made.nets["inverse-std"]
    tools.save(caffe, text, made.random(text), made.first)
    same(made.outputs("inverse-std", made.first),
         made.outputs("batchnorm-scale",
                      made.convert("inverse-std", "batchnorm-scale")))


def test_reading_the_other_dialect_matters(binary):
    """What the tool is for: wrong numbers without a word."""
    other = binary.convert("inverse-std", "variance")
    good = binary.outputs("inverse-std", binary.first)
    bad = binary.outputs("inverse-std", other)
    assert np.abs(good - bad).max() > 0.1 * np.abs(good).max()


def test_one_layer(models):
    out = models.convert("inverse-std", "variance", "--layer", "b2",
                         *eps_options(models))
    first = caffe_model.read(models.pb, str(models.first))
    got = caffe_model.read(models.pb, str(out))
    for name in first:
        for i, blob in enumerate(first[name]):
            equal = np.array_equal(blob, got[name][i])
            assert equal == ((name, i) != ("b2", 3))


def test_layer_that_is_not_there(models):
    with pytest.raises(UserError, match="has no layer 'b3' of the type BN; it "
                       "has b1, b2"):
        models.convert("inverse-std", "variance", "--layer", "b3")
    assert not models.path("out").exists()


def test_eps_of_the_net(models, tmp_path):
    net = tmp_path / "other.prototxt"
    net.write_text("\n".join(LAYERS).replace("eps: %g" % EPS, "eps: 0.25"))
    out = models.convert("inverse-std", "variance", "--net", net)
    first = caffe_model.read(models.pb, str(models.first))
    got = caffe_model.read(models.pb, str(out))
    inv_std = first["b1"][3].astype("f8")
    # Where no variance has the inverse, it is in the slope.
    fits = inv_std < 2
    assert fits.any()
    np.testing.assert_allclose(got["b1"][3][fits] + 0.25,
                               inv_std[fits] ** -2, rtol=1e-6)
    assert (got["b1"][3][~fits] == 0).all()
    np.testing.assert_allclose(
        (got["b1"][0] / np.sqrt(got["b1"][3] + 0.25)),
        first["b1"][0] * inv_std, rtol=1e-6)


def test_default_eps(binary, capsys):
    net = binary.pb.NetParameter.FromString(binary.first.read_bytes())
    for found in net.layer:
        found.ClearField("bn_param")
    binary.first.write_bytes(net.SerializeToString())
    binary.convert("inverse-std", "variance")
    assert "with eps 1e-05: b1, b2" in capsys.readouterr().out


def test_what_is_not_converted_stays(binary):
    """Also what this Caffe's protobuf does not know."""
    net = binary.pb.NetParameter.FromString(binary.first.read_bytes())
    net.layer[0].name = "odd name"
    # A field 9999 of a layer, of two bytes.
    odd = net.layer[0].SerializeToString() + b"\xfa\xf0\x04\x02hi"
    data = b"".join(b"\xa2\x06" + caffe_model.varint(len(part)) + part
                    for part in [odd] + [found.SerializeToString()
                                         for found in net.layer[1:]])
    binary.first.write_bytes(data)
    out = binary.convert("inverse-std", "variance").read_bytes()
    assert b"\xfa\xf0\x04\x02hi" in out
    assert b"odd name" in out


def test_batch_norm_of_its_own(models):
    """A BatchNorm without a Scale, a Scale without bias, a factor of 0."""
    norm = "batch_norm_param { use_global_stats: true }"
    text = "\n".join([image(*SHAPE, label=False),
                      layer("BatchNorm", "b1", "data", None, norm),
                      layer("ReLU", "r", "b1", "b1"),
                      layer("BatchNorm", "b2", "b1", None, norm),
                      layer("Scale", "b2_scale", "b2", "b2"),
                      layer("BatchNorm", "b3", "b2", "ip", norm)])
    values = {"b1": [np.arange(4.), np.arange(1., 5), np.array([2.])],
              "b2": [np.ones(4), np.full(4, 3.), np.array([1.])],
              "b2_scale": [np.array([1., 2, 3, -4])],
              "b3": [np.ones(4), np.ones(4), np.zeros(1)]}
    first = models.path("norms")
    tools.save(models.caffe, text, tools.filled(models.pb, text, values),
               first)
    out = models.convert("batchnorm-scale", "inverse-std", model=first)
    models.nets["norms"] = text
    models.nets["bns"] = "\n".join([
        image(*SHAPE, label=False), bn("b1", "data"),
        layer("ReLU", "r", "b1", "b1"), bn("b2", "b1"), bn("b3", "b2", "ip")])
    same(models.outputs("norms", first), models.outputs("bns", out), 1e-5)


def test_scale_of_another_name(models):
    """By the net's bottoms and tops, or by --scale-name."""
    twin = models.twin.replace("b1_scale", "sc1").replace("b2_scale", "sc2")
    weights = caffe_model.read(models.pb, str(models.in_dialect(
        "batchnorm-scale")))
    weights["sc1"], weights["sc2"] = (weights.pop("b1_scale"),
                                      weights.pop("b2_scale"))
    first = models.path("renamed")
    tools.save(models.caffe, twin, tools.filled(models.pb, twin, weights),
               first)
    net = models.folder / "twin.prototxt"
    net.write_text(twin)
    out = models.convert("batchnorm-scale", "inverse-std", "--net", net,
                         model=first)
    same(models.outputs("inverse-std", models.first),
         models.outputs("inverse-std", out), 1e-5)
    again = models.convert("inverse-std", "batchnorm-scale", "--scale-name",
                           "{}/s", *eps_options(models), name="again") \
        if models.suffix == ".caffemodel" else None
    if again:
        assert "b1/s" in caffe_model.read(models.pb, str(again))


def test_scale_that_is_no_part_of_it(binary):
    """A Scale behind another layer stays a Scale."""
    text = "\n".join([
        image(*SHAPE, label=False), layer("BatchNorm", "b", "data"),
        layer("ReLU", "r", "b", "b"), layer("Scale", "s", "b", "ip")])
    first = binary.path("norms")
    tools.save(binary.caffe, text, tools.filled(binary.pb, text, {
        "b": [np.ones(4), np.ones(4), np.ones(1)], "s": [np.ones(4)]}), first)
    out = binary.convert("batchnorm-scale", "inverse-std", model=first)
    net = binary.pb.NetParameter.FromString(out.read_bytes())
    kinds = [(found.name, found.type) for found in net.layer]
    assert ("s", "Scale") in kinds and ("b", "BN") in kinds


def test_scale_of_other_axes(binary):
    text = "\n".join([
        image(*SHAPE, label=False), layer("BatchNorm", "b", "data"),
        layer("Scale", "s", "b", "ip", "scale_param { axis: 2 }")])
    first = binary.path("norms")
    tools.save(binary.caffe, text, binary.random(text), first)
    with pytest.raises(UserError, match="layer 's' of .* scales other axes"):
        binary.convert("batchnorm-scale", "inverse-std", model=first)


def test_name_that_is_taken(binary):
    text = binary.text.replace('"ip"', '"b1_scale"', 1)
    first = binary.path("taken")
    tools.save(binary.caffe, text, binary.random(text), first)
    with pytest.raises(UserError, match="a layer 'b1_scale' already: name the "
                       "Scale of 'b1' by --scale-name"):
        binary.convert("inverse-std", "batchnorm-scale", model=first)


# ---- Warnings ----

def with_statistics(binary, deviation, dialect, dead=0):
    """A model whose channels have such a deviation; some are dead."""
    generator = np.random.default_rng(2)
    channels = 64
    text = "\n".join([image(1, channels, 2, 2, label=False), bn("b", "data")])
    deviation = deviation * generator.uniform(0.5, 2, channels)
    mean = deviation * generator.normal(0, 0.8, channels)
    variance = np.square(deviation)
    variance[:dead], mean[:dead] = 0, 0
    fourth = variance if dialect == "variance" else (variance + 1e-5) ** -0.5
    ones = np.ones(channels)
    model = tools.filled(binary.pb, text, {"b": [ones, ones, mean, fourth]})
    path = binary.path("statistics")
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("dead", [0, 3])
@pytest.mark.parametrize("deviation", [0.03, 0.2, 1, 5, 40])
@pytest.mark.parametrize("dialect", ["inverse-std", "variance"])
def test_no_warning_where_it_is_right(binary, capsys, deviation, dialect,
                                      dead):
    model = with_statistics(binary, deviation, dialect, dead)
    binary.convert(dialect, "batchnorm-scale", model=model)
    assert "warning:" not in capsys.readouterr().out


@pytest.mark.parametrize("deviation, dead", [(0.03, 0), (40, 0), (1, 3)])
@pytest.mark.parametrize("dialect", ["inverse-std", "variance"])
def test_warning_where_it_is_wrong(binary, capsys, deviation, dialect, dead):
    model = with_statistics(binary, deviation, dialect, dead)
    other = {"inverse-std": "variance", "variance": "inverse-std"}[dialect]
    binary.convert(other, "batchnorm-scale", model=model)
    assert "warning: is --from %s right? " % other in capsys.readouterr().out


# ---- What cannot be done ----

def test_no_such_layers(models):
    path = models.path("plain")
    text = "\n".join([image(*SHAPE, label=False), conv("c", "data", "num_"
                      "output: 3 kernel_size: 7"), inner("ip", "c")])
    tools.save(models.caffe, text, models.random(text), path)
    for source, kind in (("variance", "BN"), ("batchnorm-scale",
                                              "BatchNorm")):
        with pytest.raises(UserError, match="has no %s layer" % kind):
            models.convert(source, "inverse-std", model=path)
    assert not models.path("out").exists()


@pytest.mark.parametrize("value, message", [
    (-1, "layer 'b1' of .*: channel 2 has the variance -1, which with eps "
     "0.001 is not above 0"),
    (np.nan, r"layer 'b1' of .*: its moving statistics are not finite "
     r"\(channel 2: nan\)"),
])
def test_values_that_cannot_be(binary, value, message):
    net = binary.pb.NetParameter.FromString(binary.first.read_bytes())
    [found] = [found for found in net.layer if found.name == "b1"]
    found.blobs[3].data[2] = value
    binary.first.write_bytes(net.SerializeToString())
    with pytest.raises(UserError, match=message):
        binary.convert("variance", "inverse-std")
    assert not binary.path("out").exists()


def test_blobs_that_cannot_be(binary):
    net = binary.pb.NetParameter.FromString(binary.first.read_bytes())
    [found] = [found for found in net.layer if found.name == "b1"]
    del found.blobs[3]
    binary.first.write_bytes(net.SerializeToString())
    with pytest.raises(UserError, match="layer 'b1' of .* has 3 blobs, not 4"):
        binary.convert("variance", "inverse-std")
    caffe_model.set_array(found.blobs.add(), np.ones((1, 5), "f4"))
    binary.first.write_bytes(net.SerializeToString())
    with pytest.raises(UserError, match="layer 'b1' of .*: its blobs have 6 "
                       "and 6 and 6 and 5 numbers"):
        binary.convert("variance", "inverse-std")


@pytest.mark.parametrize("spoil", [
    lambda data: data[:-7], lambda data: data[:20], lambda data: b"",
    lambda data: b"layer { name: 'x' }"])
def test_broken_and_foreign_files(models, spoil):
    models.first.write_bytes(spoil(models.first.read_bytes()))
    with pytest.raises(UserError, match=re.escape(str(models.first))):
        models.convert("variance", "inverse-std")
    assert not models.path("out").exists()
    assert sorted(os.listdir(models.folder)) == sorted(
        ["net.prototxt", models.first.name])


def test_files_that_are_there(models):
    out = models.path("out")
    out.write_text("mine")
    with pytest.raises(UserError, match="out.* is there already; --force"):
        models.convert("variance", "inverse-std")
    assert out.read_text() == "mine"
    models.convert("variance", "inverse-std", "--force")
    assert out.stat().st_size > 100
    with pytest.raises(UserError, match="OUT is MODEL"):
        models.convert("variance", "inverse-std", "--force", name="first")
    with pytest.raises(UserError, match="cannot read .*none"):
        models.convert("variance", "inverse-std", "--force",
                       model=models.path("none"))


def test_name_of_another_format(models):
    other = {".caffemodel": ".caffemodel.h5", ".caffemodel.h5": ".caffemodel"}
    first = models.first
    models.suffix = other[models.suffix]
    with pytest.raises(UserError, match=r"out\.caffemodel.* is to be a "
                       r"\.caffemodel.*: give it such a name"):
        models.convert("variance", "inverse-std", model=first)
    assert not models.path("out").exists()


def command(*args):
    return subprocess.run(
        [os.path.join(ROOT, "myexamples/convert_bn.py"), *map(str, args)],
        env=dict(os.environ, CAFFE_ROOT=CAFFE_ROOT), text=True, timeout=120,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_command(binary):
    out = binary.path("a new/out")
    done = command(binary.first, out, "--from", "inverse-std", "--to",
                   "variance")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-2:] == [
        "converted 2 layers from inverse-std to variance with eps 0.001: b1, "
        "b2", "made %s" % out]
    shutil.rmtree(out.parent)
    done = command(binary.folder / "none", out, "--from", "variance", "--to",
                   "inverse-std")
    assert done.returncode == 1 and done.stdout.count("\n") == 1
    assert done.stdout.startswith("error: cannot read ")
    # In which protobuf may find an end without a beginning.
    text = binary.path("text")
    text.write_text("layer {\n")
    done = command(text, out, "--from", "variance", "--to", "inverse-std")
    assert done.stdout == ("error: %s is cut short, or no .caffemodel\n"
                           % text)
    assert not out.parent.exists()
    done = command(binary.first, out, "--from", "variance", "--to", "variance")
    assert done.returncode == 2
    assert "--from and --to are both variance" in done.stdout
    for eps in ("-1", "inf"):
        done = command(binary.first, out, "--from", "variance", "--to",
                       "inverse-std", "--eps", eps)
        assert done.returncode == 2
        assert "--eps %s: it must be at least 0 and below 1e30" % eps \
            in done.stdout
