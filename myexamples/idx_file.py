"""Files in MNIST's format, IDX: arrays of bytes."""
import math
import struct

import numpy as np

from caffe_model import read_bytes
from caffe_proto import UserError

MAGIC = {1: 2049, 3: 2051}


def read(path, axes):
    """The array of bytes in a file with that many axes."""
    data = read_bytes(path)
    head = struct.Struct(">%dI" % (1 + axes))
    if len(data) < head.size:
        raise UserError("%s is cut short" % path)
    magic, *shape = head.unpack_from(data)
    if magic != MAGIC[axes]:
        raise UserError("%s is no MNIST file: it begins with %d instead of %d"
                        % (path, magic, MAGIC[axes]))
    size = head.size + math.prod(shape)
    if len(data) != size:
        raise UserError("%s has %d bytes where its header says %d"
                        % (path, len(data), size))
    return np.frombuffer(data, np.uint8, offset=head.size).reshape(shape)


def write(path, array):
    """Writes such a file."""
    with open(path, "wb") as file:
        file.write(struct.pack(">%dI" % (1 + array.ndim), MAGIC[array.ndim],
                               *array.shape))
        file.write(array.tobytes())
