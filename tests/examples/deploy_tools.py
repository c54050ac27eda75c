"""What the tests of the deployment tools share: nets with random weights."""
import os
import sys

import numpy as np

from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, "myexamples"))

import caffe_model  # noqa: E402
import export_deploy  # noqa: E402


def image(*shape, label=True):
    """Input layers for the data and, if asked, for the labels."""
    text = ('layer { name: "data" type: "Input" top: "data" input_param { '
            'shape { %s } } }' % " ".join("dim: %d" % dim for dim in shape))
    if label:
        text += ('layer { name: "label" type: "Input" top: "label" '
                 'input_param { shape { dim: %d } } }' % shape[0])
    return text


def layer(kind, name, bottoms, tops=None, extra=""):
    """A layer with blobs in lists with blanks between; tops are its name."""
    return "layer { name: \"%s\" type: \"%s\" %s %s %s }" % (
        name, kind, " ".join('bottom: "%s"' % blob for blob in
                             bottoms.split()),
        " ".join('top: "%s"' % blob for blob in (tops or name).split()),
        extra)


def conv(name, bottom, extra="num_output: 6 kernel_size: 3", more="",
         kind="Convolution", top=None):
    return layer(kind, name, bottom, top,
                 "convolution_param { %s } %s" % (extra, more))


def bn(name, bottom, top=None, extra=""):
    return layer("BN", name, bottom, top, extra)


def inner(name, bottom, extra="num_output: 5", more=""):
    return layer("InnerProduct", name, bottom, None,
                 "inner_product_param { %s } %s" % (extra, more))


# Its default is m = 1: the net's own logits are those of the deployed one.
def margin(name, bottoms, tops=None, extra="", more=""):
    return layer("LargeMarginInnerProduct", name, bottoms, tops,
                 "largemargin_inner_product_param { num_output: 5 %s } %s"
                 % (extra, more))


def loss(bottom, name="loss", more="", top=None):
    return layer("SoftmaxWithLoss", name, bottom + " label", top, more)


def random_model(pb, shapes, types, seed=0):
    """A NetParameter with random weights for layers of those shapes."""
    generator = np.random.default_rng(seed)
    model = pb.NetParameter()
    for name, blobs in shapes.items():
        found = model.layer.add(name=name, type=types[name])
        for i, shape in enumerate(blobs):
            if types[name] == "BN":
                values = [generator.uniform(0.5, 2, shape),
                          generator.standard_normal(shape),
                          generator.standard_normal(shape),
                          generator.uniform(0.3, 3, shape)][i]
                # Slopes of both signs.
                if i == 0:
                    values *= generator.choice((-1, 1), shape)
            else:
                values = generator.standard_normal(shape) * np.sqrt(
                    2 / max(1, np.prod(shape[1:])))
            caffe_model.set_array(found.blobs.add(), values.astype("f4"))
    return model


class Bench:
    """A folder for a net, its model and what is exported from them."""

    def __init__(self, folder, pb, caffe):
        self.folder, self.pb, self.caffe = folder, pb, caffe
        self.net = folder / "net.prototxt"
        self.model = folder / "trained.caffemodel"
        self.out = folder / "out"

    def write(self, *layers, name="bench"):
        """Writes the net; returns its text."""
        text = 'name: "%s"\n%s\n' % (name, "\n".join(layers))
        self.net.write_text(text)
        return text

    def parsed(self, path=None):
        from google.protobuf import text_format
        return text_format.Parse((path or self.net).read_text(),
                                 self.pb.NetParameter())

    def make_model(self, text=None, seed=0):
        """Random weights for a net that Caffe takes as it is."""
        text = text or self.net.read_text()
        self.model.write_bytes(self.random(text, seed).SerializeToString())

    def random(self, text, seed=0):
        from google.protobuf import text_format
        net = text_format.Parse(text, self.pb.NetParameter())
        shapes, _ = self.caffe.shapes(text)
        return random_model(self.pb, shapes, {
            found.name: found.type for found in net.layer}, seed)

    def export(self, *options):
        export_deploy.export(self.caffe, self.pb, export_deploy.parse_args(
            [str(self.net), str(self.model), "-o", str(self.out),
             *map(str, options)]))
        return self.parsed(self.out / "deploy.prototxt")

    def run(self, text, model, inputs, *names):
        """Blobs of a net."""
        found = self.caffe.outputs(text, str(model), [inputs], list(names))[0]
        return [found[name] for name in names]

    def deployed(self, inputs, *names):
        return self.run((self.out / "deploy.prototxt").read_text(),
                        self.out / "deploy.caffemodel", inputs, *names)

    def trained(self, inputs, *names):
        return self.run(self.net.read_text(), self.model, inputs, *names)

    def check(self, layers, names, options=(), shape=(2, 4, 9, 9)):
        """Exports a net of Input layers; compares blobs with its own."""
        text = self.write(image(*shape), *layers)
        if not self.model.exists():
            self.make_model(text)
        net = self.export(*options)
        data = np.random.default_rng(9).standard_normal(shape)
        mine = self.trained({"data": data, "label": np.zeros(shape[0])},
                            *names.split())
        theirs = self.deployed({"data": data}, *names.split())
        for name, one, other in zip(names.split(), mine, theirs):
            assert np.abs(one).max() > 1e-3, name
            np.testing.assert_allclose(other, one, rtol=0,
                                       atol=1e-5 * np.abs(one).max(),
                                       err_msg=name)
        return net


def types(net):
    """A net as text: its layers' names and types."""
    return [(found.name, found.type) for found in net.layer]
