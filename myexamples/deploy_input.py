"""What a net's data layer hands over: its shape, its transform, its images."""
import os
import re
import tempfile

import numpy as np

from caffe_model import read_bytes, read_mean, text
from caffe_proto import ROOT, UserError

IMAGES = ("Data", "ImageData", "WindowData", "MemoryData")


def said(path, name=None):
    """What the comments in the prototxt at path say of how the input of that
    name, or the only one, is made (Input.comments wrote them): a dict, empty
    without them."""
    try:
        with open(path, errors="replace") as file:
            head = file.read()
    except OSError as error:
        raise UserError("cannot read %s: %s" % (path, error.strerror))
    if name is not None:
        found = re.search(r'(?m)^# Input "%s": .*\n((?:#   .*\n)*)'
                          % re.escape(name), head)
        head = found[1] if found else ""
    return dict(re.findall(r"(?m)^#   (\w+): (.*)$", head))


class Input:
    """An input of the net, from the node of a data layer."""

    def __init__(self, pb, node, net_path):
        self.pb, self.node, self.layer = pb, node, node.layer
        self.top = node.tops[0]
        # Caffe takes names from the folder that it runs in: for the examples
        # the project's root.
        self.folders = [os.getcwd(), ROOT,
                        os.path.dirname(os.path.abspath(net_path))]
        self.shape = None

    @property
    def transform(self):
        return self.layer.transform_param

    @property
    def is_image(self):
        """Whether images of one or three channels go in."""
        return len(self.shape) == 4 and self.shape[1] in (1, 3)

    def folder_of(self, name):
        """The folder from which a name of the prototxt is there, or None."""
        return next((folder for folder in self.folders if name and
                     os.path.exists(os.path.join(folder, name))), None)

    # ---- Shape ----

    def find_shape(self, caffe, given, graph, weights):
        """Sets the shape: the given one, or what the data layer says."""
        if given is not None:
            self.shape = given
            return
        shape, why = self.declared_shape(), ""
        if shape is None and self.source():
            shape, why = self.data_shape(caffe)
        if shape is None:
            shape = self.deduced_shape(graph, weights)
        if shape is None:
            raise UserError("%s: the shape of '%s' is not clear%s. Give it "
                            "with --shape C,H,W" % (self.node, self.top.name,
                                                    why))
        if not shape or min(shape) < 1:
            raise UserError("%s: '%s' has the shape %s" % (
                self.node, self.top.name, text(shape)))
        self.shape = tuple(shape)

    def declared_shape(self):
        """What the layer's parameters say, or None."""
        layer, index = self.layer, self.top.index
        if layer.type in ("Input", "DummyData"):
            shapes = (layer.input_param if layer.type == "Input"
                      else layer.dummy_data_param).shape
            if shapes:
                return list(shapes[index if len(shapes) > 1 else 0].dim)
            param = layer.dummy_data_param
            if param.num:
                return [field[index if len(field) > 1 else 0] for field in
                        (param.num, param.channels, param.height,
                         param.width)]
        if layer.type == "MemoryData":
            param = layer.memory_data_param
            crop = self.transform.crop_size
            return [1, param.channels, crop or param.height,
                    crop or param.width]
        return None

    def source(self):
        """Where the layer's data are, or an empty string."""
        field = {"Data": "data_param", "ImageData": "image_data_param",
                 "HDF5Data": "hdf5_data_param"}.get(self.layer.type)
        return getattr(self.layer, field).source if field else ""

    def data_shape(self, caffe):
        """(shape, None) as Caffe reads it from the data, or (None, why)."""
        folder = self.folder_of(self.source())
        if folder is None:
            return None, ": %s is not there" % self.source()
        layer = self.pb.LayerParameter()
        layer.CopyFrom(self.layer)
        for field in ("phase", "include", "exclude"):
            layer.ClearField(field)
        # The mean does not change the shape, and its file may be away.
        if layer.HasField("transform_param"):
            layer.transform_param.ClearField("mean_file")
        param = getattr(layer, {"Data": "data_param",
                                "ImageData": "image_data_param",
                                "HDF5Data": "hdf5_data_param"}[layer.type])
        param.batch_size = 1
        if layer.type != "HDF5Data":
            param.rand_skip = 0
        net = self.pb.NetParameter(layer=[layer])
        try:
            shapes = caffe.data_shapes(str(net), folder)
        except UserError as error:
            return None, ", and %s could not be read (%s)" % (self.source(),
                                                              error)
        return shapes[layer.top[self.top.index]], None

    def deduced_shape(self, graph, weights):
        """What crop, mean and weights say together, or None."""
        if self.layer.type not in IMAGES:
            return None
        param = self.layer.image_data_param
        height = width = self.transform.crop_size
        mean = self.mean_image(must=False)
        if not height and param.new_height and param.new_width:
            height, width = param.new_height, param.new_width
        elif not height and mean is not None:
            height, width = mean.shape[1:]
        channels = self.deduced_channels(mean, graph, weights)
        return [1, channels, height, width] if height and channels else None

    def deduced_channels(self, mean, graph, weights):
        transform = self.transform
        if transform.force_gray or transform.force_color:
            return 1 if transform.force_gray else 3
        if self.layer.type == "ImageData":
            return 3 if self.layer.image_data_param.is_color else 1
        if mean is not None:
            return mean.shape[0]
        if len(transform.mean_value) > 1:
            return len(transform.mean_value)
        for user in graph.consumers(self.top):
            if user.type == "Convolution" and weights.get(user.name):
                shape = weights[user.name][0].shape
                if len(shape) == 4:
                    return shape[1] * user.layer.convolution_param.group
        return None

    # ---- Transform ----

    def mean_image(self, must):
        """The mean of the transform's file, (C, H, W), or None."""
        name = self.transform.mean_file
        folder = self.folder_of(name)
        if folder is None:
            if name and must:
                raise UserError("%s: its mean_file %s is not there"
                                % (self.node, name))
            return None
        return read_mean(self.pb, os.path.join(folder, name))

    def channel_means(self):
        """What to subtract from each channel, or None where that is not
        known."""
        values = list(self.transform.mean_value)
        if not values and self.transform.mean_file:
            mean = self.mean_image(must=False)
            if mean is None:
                return None
            values = [float(value) for value in mean.mean((1, 2))]
        values = values or [0.0]
        return values * self.shape[1] if len(values) == 1 else values

    def comments(self):
        """How to make this input, for the head of a prototxt."""
        lines = ["Input \"%s\": %s" % (self.top.name,
                                       " x ".join(map(str, self.shape)))]
        if not self.is_image or self.layer.type not in IMAGES:
            return lines + ["  as it comes from the layer '%s' (%s): the net "
                            "has no transform for it"
                            % (self.layer.name, self.layer.type)]
        transform, means = self.transform, self.channel_means()
        shown = "unknown" if means is None else ", ".join(
            "%.9g" % value for value in means)
        lines += ["  scalefactor: %.9g" % transform.scale,
                  "  size: %d, %d" % (self.shape[3], self.shape[2]),
                  "  mean: %s" % shown,
                  "  swapRB: false"]
        if self.shape[1] == 3:
            lines.append("  channels: blue, green, red, of 0 to 255, as "
                         "cv2.imread has them")
        else:
            lines.append("  channels: gray, of 0 to 255, as cv2.imread has "
                         "them with IMREAD_GRAYSCALE")
        if transform.crop_size:
            data = self.layer.image_data_param
            # Without a crop, the size above says as much.
            if data.new_height and data.new_width:
                lines.append("  resize: %d, %d"
                             % (data.new_width, data.new_height))
            lines.append("  crop: the middle %d x %d of the image"
                         % (transform.crop_size, transform.crop_size))
        if transform.mean_file:
            lines += ["  mean_file: %s" % transform.mean_file,
                      "  The net was trained with the mean image of that "
                      "file: %s" % (
                          "it is not there, so that its mean for each channel "
                          "is to be found out" if means is None else
                          "the mean above is its mean for each channel")]
        if means is not None:
            lines += ["  blob = cv2.dnn.blobFromImage(image, %.9g, (%d, %d),"
                      % (transform.scale, self.shape[3], self.shape[2]),
                      "                               (%s), swapRB=False)"
                      % (shown + "," if len(means) == 1 else shown)]
        return lines

    # ---- Samples ----

    def random(self, generator, as_pixels):
        """Numbers for the input; as_pixels: as an image's noise would be."""
        if not as_pixels:
            return generator.standard_normal(self.shape).astype("f4")
        pixels = generator.integers(0, 256, self.shape).astype("f4")
        means = np.asarray(self.channel_means() or [0], "f4")
        if means.size not in (1, self.shape[1]):
            raise UserError("%s has %d means for '%s' of %d channels" % (
                self.node, means.size, self.top.name, self.shape[1]))
        return ((pixels - means.reshape(-1, 1, 1))
                * np.float32(self.transform.scale))

    def images(self, caffe, paths):
        """Images as the net's data layer would hand them over."""
        if not self.is_image:
            raise UserError("--images: '%s' of the shape %s takes no images"
                            % (self.top.name, text(self.shape)))
        for path in paths:
            if not read_bytes(path):
                raise UserError("%s is empty" % path)
            if "\n" in path:
                raise UserError("Caffe takes no name with a newline: %r"
                                % path)
        layer = self.pb.LayerParameter(name="images", type="ImageData",
                                       top=["data", "label"])
        layer.transform_param.CopyFrom(self.transform)
        transform = layer.transform_param
        transform.ClearField("mirror")
        if transform.mean_file:
            self.mean_image(must=True)
            transform.mean_file = os.path.join(
                self.folder_of(transform.mean_file), transform.mean_file)
        param = layer.image_data_param
        theirs = self.layer.image_data_param
        param.batch_size = 1
        param.is_color = self.shape[1] == 3
        if theirs.new_height and theirs.new_width:
            param.new_height = theirs.new_height
            param.new_width = theirs.new_width
        elif not transform.crop_size:
            param.new_height, param.new_width = self.shape[2:]
        transform.ClearField("force_gray")
        transform.ClearField("force_color")
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.writelines("%s 0\n" % os.path.abspath(path)
                            for path in paths)
            file.flush()
            param.source = file.name
            found = caffe.images(str(self.pb.NetParameter(layer=[layer])),
                                 os.getcwd(), "data", len(paths))
        for path, image in zip(paths, found):
            if image.shape[1:] != self.shape[1:]:
                raise UserError("--images: %s becomes %s where '%s' is %s" % (
                    path, text(image.shape), self.top.name, text(self.shape)))
        return found
