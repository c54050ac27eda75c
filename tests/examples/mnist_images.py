"""Images in MNIST's format for tests."""
import gzip
import os

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
MNIST = os.path.join(HERE, "../../myexamples/mnist/data",
                     "t10k-images-idx3-ubyte")
FASHION = "/usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz"


def pictures(count):
    """The first test images: of MNIST where it is there, else of Debian's
    Fashion-MNIST."""
    if os.path.exists(MNIST):
        with open(MNIST, "rb") as file:
            data = file.read()
    else:
        with gzip.open(FASHION) as file:
            data = file.read()
    return np.frombuffer(data, np.uint8, count * 784, 16).reshape(
        count, 28, 28)
