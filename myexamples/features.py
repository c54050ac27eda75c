"""Features of images: the values of one blob of a net.

The net may be of any kind, for training or for deployment: only the layers
that the blob needs are kept, and the images take the place of its data layer.
What that layer would have done to an image (mean, scale, crop) is done here.
"""
import copy
import os
import sys
import tempfile

import numpy as np

import caffe_model
import caffe_net
import caffe_proto
import deploy_input
import deploy_net
from caffe_proto import UserError


def load_pycaffe():
    """pycaffe, without its log on the screen."""
    os.environ.setdefault("GLOG_minloglevel", "2")
    caffe_root = caffe_proto.caffe_root()
    sys.path.insert(0, os.path.join(caffe_root, "python"))
    try:
        import caffe
    except ImportError as error:
        raise UserError("cannot load pycaffe from %s/python: %s"
                        % (caffe_root, error))
    caffe.set_mode_cpu()
    return caffe


def start_pycaffe():
    """pycaffe for a program, which goes on in a child process: where Caffe
    ends that, it is a UserError."""
    caffe_net.guard()
    return load_pycaffe()


def cut(pb, net, blobs, path):
    """A copy of net in the TEST phase with the layers that blobs need.

    A margin layer gives the plain inner product there: it loses its label.
    """
    layers = deploy_net.legacy_inputs(pb, net)
    for layer in net.layer:
        if not caffe_proto.in_phase(pb, net, layer, pb.TEST):
            continue
        layers.append(copy.deepcopy(layer))
        # Its own phase would go before the net's.
        for field in ("phase", "include", "exclude"):
            layers[-1].ClearField(field)
        if layer.type == "LargeMarginInnerProduct" and len(layer.bottom) > 1:
            del layers[-1].bottom[1:], layers[-1].top[1:]
    made = [top for layer in layers for top in layer.top]
    for blob in blobs:
        if blob not in made:
            raise UserError("%s has no blob \"%s\" in the TEST phase; it has "
                            "%s" % (path, blob, ", ".join(
                                dict.fromkeys(made)) or "none"))
    needed, kept = set(blobs), []
    for layer in reversed(layers):
        if needed.intersection(layer.top):
            needed.update(layer.bottom)
            kept.append(layer)
    # A layer in place may alter its blob once more for layers that are gone,
    # as in the whole net: what Caffe leaves in the blob is what counts.
    result = copy.deepcopy(net)
    for field in ("layer", "input", "input_shape", "input_dim", "state"):
        result.ClearField(field)
    result.state.phase = pb.TEST
    result.layer.extend(reversed(kept))
    return result


def load_net(caffe, net, weights):
    """A caffe.Net of the NetParameter net with the weights of a model.

    weights are those that caffe_model reads from it. Caffe itself leaves a
    layer that the model does not have as it was initialised, without a word.
    """
    from google.protobuf import text_format
    model = weights.path
    with tempfile.NamedTemporaryFile("w", suffix=".prototxt") as file:
        file.write(text_format.MessageToString(net))
        file.flush()
        made = caffe.Net(file.name, caffe.TEST)
    for name, blobs in made.params.items():
        if name not in weights:
            raise UserError("%s has no weights for layer \"%s\"; it has "
                            "weights for %s" % (model, name,
                                                ", ".join(weights) or "none"))
        # A blob that another layer owns is left out of HDF5 models.
        want = [blob.count for blob in blobs]
        have = [count if array is None else array.size
                for array, count in zip(weights[name], want)]
        if have != want or len(weights[name]) > len(want):
            have = [array.size for array in weights[name]
                    if array is not None]
            raise UserError("layer \"%s\": the net has weights of %s numbers, "
                            "%s of %s" % (name, _list(want), model,
                                          _list(have)))
    made.copy_from(model)
    return made


def _list(numbers):
    return " and ".join("%d" % number for number in numbers)


def _only_source(net, path, blob):
    """The one layer of a cut net that images are to replace."""
    used = {bottom for layer in net.layer for bottom in layer.bottom}
    missing = used - {top for layer in net.layer for top in layer.top}
    if missing:
        raise UserError("%s has no layer in the TEST phase that makes the "
                        "blob \"%s\"" % (path, sorted(missing)[0]))
    sources = [layer for layer in net.layer if deploy_net.is_source(layer)]
    inputs = sorted({top for layer in sources for top in layer.top} & used)
    if len(sources) != 1 or len(inputs) != 1:
        raise UserError("the blob \"%s\" of %s does not come from images "
                        "alone; it needs %s" % (
                            blob, path, ", ".join(inputs) or "nothing"))
    return sources[0], inputs[0]


class Preprocessing:
    """What becomes of an image before the net sees it.

    channels is 1 or 3; size (height, width) is what an image is scaled to, or
    None; crop (height, width) is the part in its middle that the net takes,
    or None for all of it. mean is an array (1 or C), or (C, H, W); the pixels
    are (value - mean) * scale. rgb tells the order of the channels, where
    Caffe's own is BGR.
    """

    def __init__(self):
        self.channels, self.size, self.crop = None, None, None
        self.mean, self.scale, self.rgb = np.zeros(1, np.float32), 1.0, False

    @classmethod
    def of_layer(cls, pb, layer, net_path):
        """That of a data layer of the net at net_path."""
        self = cls()
        param = layer.transform_param
        self.scale = param.scale
        # An Input may leave its shape to whoever fills it.
        if layer.type == "Input" and layer.input_param.shape:
            shape = layer.input_param.shape[0].dim
            if len(shape) == 4:
                self.channels = shape[1]
                self.size = self.crop = tuple(shape[2:])
                self.take(deploy_input.said(net_path, layer.top[0]), net_path)
        if layer.type == "ImageData":
            data = layer.image_data_param
            self.channels = 3 if data.is_color else 1
            if data.new_height and data.new_width:
                self.size = (data.new_height, data.new_width)
        if layer.type == "MemoryData":
            data = layer.memory_data_param
            self.channels = data.channels
            self.size = self.crop = (data.height, data.width)
        if param.crop_size:
            self.crop = (param.crop_size, param.crop_size)
        if param.force_color or param.force_gray:
            self.channels = 3 if param.force_color else 1
        if param.mean_file:
            self.set_mean_file(pb, param.mean_file, os.path.dirname(net_path))
        elif param.mean_value:
            self.mean = np.array(param.mean_value, np.float32)
        return self

    def take(self, said, net_path):
        """Takes what export_deploy.py has written into its prototxt."""
        try:
            self.scale = float(said.get("scalefactor", self.scale))
            if said.get("mean", "unknown") != "unknown":
                self.mean = np.array(said["mean"].split(","), np.float32)
            if "crop" in said:
                width, height = map(int, said.get("resize", "0,0").split(","))
                self.size = (height, width) if height else None
        except ValueError:
            raise UserError("%s does not say how its input is made: were "
                            "its comments changed?" % net_path)

    def set_mean_file(self, pb, path, *folders):
        """Takes the mean image of a .binaryproto."""
        path = caffe_proto.found(path, *folders) or path
        self.mean = caffe_model.read_mean(pb, path).astype(np.float32)

    def describe(self):
        """One line for the user."""
        size = ("scaled to %d x %d (height x width)" % self.size if self.size
                else "as large as they are")
        if self.crop and self.crop != self.size:
            size += ", the middle %d x %d" % self.crop
        mean = ("mean image" if self.mean.ndim == 3 else "mean " + " ".join(
            "%g" % value for value in self.mean))
        return "%s, %s, %s, scale %g" % (
            size, "grey" if self.channels == 1
            else "RGB" if self.rgb else "BGR", mean, self.scale)

    def check(self):
        """Raises UserError where the mean does not fit the channels."""
        if self.mean.ndim == 1 and len(self.mean) not in (1, self.channels):
            raise UserError("%d mean values for images of %d channel%s" % (
                len(self.mean), self.channels, "s"[self.channels == 1:]))

    def read(self, path):
        """The image file at path, of the right size and channels."""
        from PIL import Image, ImageOps
        try:
            with Image.open(path) as image:
                # As OpenCV does, with which Caffe reads: PIL by itself leaves
                # a photo lying, and makes 255 of all beyond in 16 bits.
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):
                    image = Image.fromarray(
                        (np.asarray(image) >> 8).astype(np.uint8))
                elif image.mode == "F":
                    raise UserError("cannot read the image %s: its pixels are "
                                    "no bytes" % path)
                image = image.convert("L" if self.channels == 1 else "RGB")
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError("no such image: %s" % path)
        except Exception as error:  # PIL has no one error for broken files
            raise UserError("cannot read the image %s: %s" % (path, error))
        if self.size and image.size != self.size[::-1]:
            image = image.resize(self.size[::-1], Image.BILINEAR)
        array = np.asarray(image)
        # Caffe's order is OpenCV's.
        return array[..., ::-1] if array.ndim == 3 and not self.rgb else array

    def apply(self, image, name):
        """The (C, H, W) input of the net, from an array (H, W[, C])."""
        pixels = np.asarray(image, np.float32)
        pixels = (pixels[np.newaxis] if pixels.ndim == 2
                  else pixels.transpose(2, 0, 1))
        mean = self.mean
        if mean.ndim == 3:
            if mean.shape != pixels.shape:
                raise UserError("%s is %d x %d x %d (channels x height x "
                                "width), the mean image %d x %d x %d"
                                % ((name,) + pixels.shape + mean.shape))
        else:
            mean = mean[:, np.newaxis, np.newaxis]
        pixels = (pixels - mean) * np.float32(self.scale)
        if self.crop:
            tops = [have - want for have, want in zip(pixels.shape[1:],
                                                      self.crop)]
            if min(tops) < 0:
                raise UserError("%s is %d x %d (height x width), smaller than "
                                "the net's %d x %d"
                                % ((name,) + pixels.shape[1:] + self.crop))
            top, left = (offset // 2 for offset in tops)
            pixels = pixels[:, top:top + self.crop[0],
                            left:left + self.crop[1]]
        return pixels


class Extractor:
    """Takes the features of images from a blob of a trained net."""

    def __init__(self, pb, caffe, net_path, model, blob, batch=64):
        self.pb, self.caffe = pb, caffe
        self.path, self.blob, self.batch = net_path, blob, batch
        self.param = cut(pb, caffe_proto.read_net(pb, net_path), [blob],
                         net_path)
        self.source, self.input = _only_source(self.param, net_path, blob)
        self.weights = caffe_model.read(pb, model)
        self.preprocessing = Preprocessing.of_layer(pb, self.source,
                                                     net_path)
        if self.preprocessing.channels is None:
            self.preprocessing.channels = self._channels()
        self.net = None

    def _channels(self):
        """What the first convolution of the model takes, or None."""
        for layer in self.param.layer:
            if (layer.type == "Convolution" and self.input in layer.bottom
                    and layer.name in self.weights):
                shape = self.weights[layer.name][0].shape
                return shape[1] * layer.convolution_param.group
        return None

    def _build(self, shape):
        """Builds the net for images of that shape (C, H, W)."""
        layer = self.pb.LayerParameter(name=self.source.name, type="Input",
                                       top=[self.input])
        layer.input_param.shape.add().dim.extend((self.batch,) + shape)
        net = copy.deepcopy(self.param)
        rest = [other for other in net.layer
                if not deploy_net.is_source(other)]
        net.ClearField("layer")
        net.layer.extend([layer] + rest)
        caffe_net.about("%s with images of %d x %d x %d (channels x height x "
                        "width)" % ((self.path,) + shape))
        self.net = load_net(self.caffe, net, self.weights)
        made = self.net.blobs[self.blob].data
        if made.ndim < 2 or made.shape[0] != self.batch:
            raise UserError("the blob \"%s\" of %s has the shape %s for %d "
                            "images: no feature for each" % (
                                self.blob, self.path,
                                " x ".join(map(str, made.shape)), self.batch))

    def features(self, images, read, flip=False, progress=None):
        """An array with a row for each of images, a list of their names.

        read(name) returns the image as an array (H, W[, C]) of pixels. With
        flip, it is the mean of the image's features and its mirror image's.
        progress, if given, is called with the number of images done.
        """
        rows = None
        for start in range(0, len(images), self.batch):
            names = images[start:start + self.batch]
            inputs = [self.preprocessing.apply(read(name), name)
                      for name in names]
            if self.net is None:
                self._build(inputs[0].shape)
            blob = self.net.blobs[self.input]
            for name, pixels in zip(names, inputs):
                if pixels.shape != blob.data.shape[1:]:
                    raise UserError("%s is %d x %d x %d (channels x height x "
                                    "width), the images before it %d x %d x "
                                    "%d" % ((name,) + pixels.shape
                                            + blob.data.shape[1:]))
            made = self._forward(np.stack(inputs))
            if flip:
                made = (made + self._forward(
                    np.stack(inputs)[..., ::-1])) / 2
            if rows is None:
                rows = np.empty((len(images), made.shape[1]), np.float32)
            for name, row in zip(names, made):
                if not np.isfinite(row).all():
                    raise UserError("the features of %s are not finite (%s)"
                                    % (name, row[~np.isfinite(row)][0]))
            rows[start:start + len(names)] = made
            if progress:
                progress(start + len(names))
        return rows

    def _forward(self, inputs):
        """The features of up to a batch of inputs."""
        data = self.net.blobs[self.input].data
        data[:len(inputs)] = inputs
        data[len(inputs):] = 0
        self.net.forward()
        made = self.net.blobs[self.blob].data[:len(inputs)]
        return made.reshape(len(inputs), -1).copy()
