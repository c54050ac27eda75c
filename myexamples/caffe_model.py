"""Trained weights: .caffemodel and .caffemodel.h5 files, read and written."""
import contextlib
import os
import tempfile

import numpy as np

import caffe_proto
from caffe_proto import UserError

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def read_bytes(path):
    """The bytes of a file."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError("cannot read %s: %s" % (path, error.strerror))


def is_hdf5(path):
    """Whether the file is one of HDF5: its first bytes tell, as to Caffe."""
    try:
        with open(path, "rb") as file:
            return file.read(len(HDF5_SIGNATURE)) == HDF5_SIGNATURE
    except OSError as error:
        raise UserError("cannot read %s: %s" % (path, error.strerror))


def hdf5():
    """The module h5py."""
    try:
        import h5py
    except ImportError:
        raise UserError("HDF5 models need h5py: apt-get install python3-h5py")
    return h5py


def read_net(pb, path):
    """The NetParameter of a .caffemodel."""
    net = caffe_proto.read_binary(path, pb.NetParameter(), ".caffemodel")
    if not net.layer and not net.layers:
        raise UserError("%s holds no layers: it is cut short, or no "
                        ".caffemodel" % path)
    return net


def array_of(blob, where):
    """A BlobProto as an array; where says whose it is in errors.

    The old four dimensions are kept as they are, unlike a shape's.
    """
    legacy = [getattr(blob, name) if blob.HasField(name) else 0
              for name in ("num", "channels", "height", "width")]
    shape = legacy if any(legacy) else list(blob.shape.dim)
    values = blob.double_data if blob.double_data else blob.data
    count = int(np.prod(shape, dtype=np.int64))
    if len(values) != count:
        raise UserError("%s has %d values where its shape %s says %d: the "
                        "file is broken" % (where, len(values), text(shape),
                                            count))
    dtype = np.float64 if blob.double_data else np.float32
    return np.fromiter(values, dtype, count).reshape(shape)


def read_mean(pb, path):
    """The mean image of a .binaryproto, (C, H, W)."""
    mean = array_of(caffe_proto.read_binary(path, pb.BlobProto(),
                                            ".binaryproto"), path)
    if mean.ndim < 3 or not mean.size or any(
            count != 1 for count in mean.shape[:-3]):
        raise UserError("%s is no mean image: its shape is %s"
                        % (path, text(mean.shape)))
    return mean.reshape(mean.shape[-3:])


def set_array(blob, array):
    """Makes a BlobProto hold an array, in its own type."""
    doubles = array.dtype == np.float64
    blob.Clear()
    blob.shape.dim.extend(array.shape)
    # The wire format of a packed field: its tag, its length, its values. To
    # go through a list would take seconds for the weights of a VGG.
    values = np.ascontiguousarray(array, "<f8" if doubles else "<f4").tobytes()
    if values:
        blob.MergeFromString(
            bytes([(8 if doubles else 5) << 3 | 2]) + varint(len(values))
            + values)


def varint(number):
    """A number as protobuf writes it."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def text(shape):
    """A shape as it is usually written."""
    return "(%s)" % ", ".join(map(str, shape))


class Weights(dict):
    """The blobs of a model: name of the layer to a list of arrays.

    A blob that the file leaves out, since a layer before owns it, is None.
    """

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.types = {}


def read(pb, path):
    """The Weights of a .caffemodel or .caffemodel.h5."""
    if is_hdf5(path):
        return read_hdf5(path)
    net = read_net(pb, path)
    weights = Weights(path)
    # Very old models have `layers`; they name the same blobs.
    for layer in net.layer or net.layers:
        blobs = [array_of(blob, "%s: blob %d of layer '%s'"
                          % (path, i, layer.name))
                 for i, blob in enumerate(layer.blobs)]
        if blobs:
            weights[layer.name] = blobs
        if net.layer:
            weights.types[layer.name] = layer.type
    return weights


def open_hdf5(path, mode="r"):
    """The h5py.File and its group of layers."""
    h5py = hdf5()
    try:
        file = h5py.File(path, mode)
    except OSError as error:
        raise UserError("cannot read %s as HDF5 (%s): is it cut short?"
                        % (path, error))
    data = file.get("data")
    if not isinstance(data, h5py.Group):
        file.close()
        raise UserError("%s has no group /data: it is no .caffemodel.h5"
                        % path)
    return file, data


def read_hdf5(path):
    weights = Weights(path)
    file, data = open_hdf5(path)
    with file:
        try:
            for name, group in data.items():
                last = max([int(key) for key in group if key.isdigit()],
                           default=-1)
                blobs = [group[str(i)][()] if str(i) in group else None
                         for i in range(last + 1)]
                if blobs:
                    weights[name] = blobs
        except (OSError, AttributeError, TypeError, ValueError) as error:
            raise UserError("cannot read %s: %s" % (path, error))
    if not weights:
        raise UserError("%s holds no weights" % path)
    return weights


def check_format(path, hdf5):
    """Raises UserError where a name stands for another format: some versions
    of Caffe go by it."""
    if path.endswith(".h5") != hdf5:
        raise UserError("%s is to be a .caffemodel%s: give it such a name"
                        % (path, ".h5" if hdf5 else ", without .h5"))


@contextlib.contextmanager
def scratch(data):
    """The path of a file with those bytes, for as long as it is used."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "scratch.caffemodel")
        try:
            with open(path, "wb") as file:
                file.write(data)
        except OSError as error:
            raise UserError("cannot write to %s: %s"
                            % (folder, error.strerror))
        yield path


def check_free(paths, force):
    """Raises UserError where one of the paths is taken."""
    for path in paths:
        if os.path.isdir(path):
            raise UserError("%s is a folder" % path)
        if os.path.lexists(path) and not force:
            raise UserError("%s is there already; --force replaces it" % path)


def write_all(contents):
    """Writes files, all or none: a dict of paths to bytes or functions.

    A function gets the path that it shall write to. The folder is made where
    there is none.
    """
    parts, made = {}, []
    try:
        for path, content in contents.items():
            folder = os.path.dirname(os.path.abspath(path))
            if not os.path.isdir(folder):
                made += missing_folders(folder)
                os.makedirs(folder)
            part = "%s.%d.part" % (path, os.getpid())
            parts[path] = part
            if callable(content):
                content(part)
            else:
                with open(part, "wb") as file:
                    file.write(content)
        for path, part in parts.items():
            os.replace(part, path)
        made = []
    except OSError as error:
        raise UserError("cannot write %s: %s"
                        % (path, error.strerror or error))
    finally:
        for part in parts.values():
            if os.path.lexists(part):
                os.remove(part)
        for folder in made:
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def missing_folders(folder):
    """The folders of a path that are not there, from the innermost on."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing
