"""Small data sets in the format of MNIST."""
import gzip
import hashlib
import os
import struct

NAMES = ["t10k-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz",
         "train-labels-idx1-ubyte.gz", "train-images-idx3-ubyte.gz"]


def small_mnist(train=30, test=20):
    """The four files of a data set of noise, as name to bytes."""
    files = {}
    for prefix, count in (("train", train), ("t10k", test)):
        images = struct.pack(">4i", 2051, count, 28, 28) + os.urandom(
            count * 28 * 28)
        labels = struct.pack(">2i", 2049, count) + bytes(
            i % 10 for i in range(count))
        files[prefix + "-images-idx3-ubyte.gz"] = gzip.compress(images)
        files[prefix + "-labels-idx1-ubyte.gz"] = gzip.compress(labels)
    return files


def expect(tree, files):
    """Makes files the ones whose checksums the tree expects."""
    lines = []
    for name in NAMES:
        for file, data in ((name, files[name]),
                           (name[:-3], gzip.decompress(files[name]))):
            lines.append("%s  %s\n" % (hashlib.sha256(data).hexdigest(),
                                       file))
    tree.path("mnist/mnist.sha256").write_text("".join(lines))
