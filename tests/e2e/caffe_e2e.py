"""What the end-to-end tests share: the patched Caffe, small data and nets."""

import math
import os
import re
import subprocess
from pathlib import Path

import h5py
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CAFFE_ROOT = Path(os.environ.get("CAFFE_ROOT") or ROOT / "build" / "caffe")
CAFFE = CAFFE_ROOT / "build" / "tools" / "caffe"


def environment():
    # The nets are tiny: threads of the BLAS only get in each other's way.
    return dict(os.environ, GLOG_logtostderr="1", GLOG_minloglevel="0",
                OPENBLAS_NUM_THREADS="1",
                PYTHONPATH=str(CAFFE_ROOT / "python"))


def run_caffe(*arguments, cwd, ok=True):
    """`caffe ARGUMENTS`; returns its log, or fails with it."""
    done = run([CAFFE, *arguments], cwd)
    assert not ok or done.returncode == 0, done.stdout
    return done.stdout


def run(command, cwd):
    return subprocess.run([str(part) for part in command], cwd=cwd, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=environment(), timeout=300)


def fatal_message(command, cwd):
    """The words of the LOG(FATAL) or failed CHECK that must end a command."""
    done = run(command, cwd)
    fatal = re.search(r"^F\d{4,8} \S+ +\d+ (\S+\] .*)$", done.stdout, re.M)
    assert fatal and done.returncode == -6, (
        "exit status %d, and no LOG(FATAL) in\n%s"
        % (done.returncode, done.stdout))
    return fatal.group(1)


def lambda_at(iteration, base=1, gamma=0, power=1, lambda_min=0):
    """The descent of lambda; Caffe keeps its parameters in float."""
    base, gamma, power, lambda_min = (
        float(np.float32(v)) for v in (base, gamma, power, lambda_min))
    return max(lambda_min, base * math.pow(1 + gamma * iteration, -power))


def logged_lambdas(log):
    """[(iteration, lambda)] of a training log with `display: 1`."""
    iteration, found = None, []
    for line in log.splitlines():
        at = re.search(r"\] Iteration (\d+)[ ,].*loss = ", line)
        if at:
            iteration = int(at.group(1))
        value = re.search(r"Train net output #\d+: lambda = (\S+)", line)
        if value:
            found.append((iteration, value.group(1)))
    return found


def write_data(folder, name="data", features=None, labels=None, classes=4):
    """An HDF5 data set and its list file, as the HDF5Data layer takes them.

    The names in it are meant from the folder: Caffe ends them at a blank.
    Without features and labels: two batches of 16 samples that a small net
    can learn.
    """
    if features is None:
        random = np.random.RandomState(1)
        centers = random.randn(classes, 8)
        labels = np.arange(32) % classes
        features = centers[labels] + 0.3 * random.randn(32, 8)
    with h5py.File(folder / (name + ".h5"), "w") as data:
        data["data"] = np.asarray(features, "f4")
        data["label"] = np.asarray(labels, "f4")
    (folder / (name + ".txt")).write_text(name + ".h5\n")
    return name + ".txt"


def data_layer(source="data.txt", batch_size=16):
    return """
layer {
  name: "data" type: "HDF5Data" top: "data" top: "label"
  hdf5_data_param { source: "%s" batch_size: %d }
}
""" % (source, batch_size)


IP1 = """
layer {
  name: "ip1" type: "InnerProduct" bottom: "data" top: "ip1"
  inner_product_param {
    num_output: 6
    weight_filler { type: "xavier" }
  }
}
layer { name: "prelu1" type: "PReLU" bottom: "ip1" top: "ip1" }
"""


def margin_layer(param="", tops=("ip2", "lambda"), bottoms=("ip1", "label"),
                 extra=""):
    return """
layer {
  name: "ip2" type: "LargeMarginInnerProduct"
  %s %s %s
  largemargin_inner_product_param {
    num_output: 4
    weight_filler { type: "xavier" }
    %s
  }
}
""" % (" ".join('bottom: "%s"' % b for b in bottoms),
       " ".join('top: "%s"' % t for t in tops), extra, param)


def inner_product(extra="", name="ip2"):
    return """
layer {
  name: "%s" type: "InnerProduct" bottom: "ip1" top: "%s" %s
  inner_product_param {
    num_output: 4 bias_term: false
    weight_filler { type: "xavier" }
  }
}
""" % (name, name, extra)


LOSS = """
layer {
  name: "loss" type: "SoftmaxWithLoss" bottom: "ip2" bottom: "label"
  top: "loss"
}
"""


def deploy_input(samples=32):
    return """
layer {
  name: "data" type: "Input" top: "data"
  input_param { shape { dim: %d dim: 8 } }
}
""" % samples


def write_net(folder, text, name="net.prototxt"):
    path = folder / name
    path.write_text('name: "tiny"\n' + text)
    return path


def write_solver(folder, net="net.prototxt", name="solver.prototxt",
                 **fields):
    """A solver file. Strings that name an enum value stay without quotes."""
    values = dict(net=str(net), base_lr=0.05, lr_policy="fixed", momentum=0.9,
                  weight_decay=0.001, max_iter=12, display=1, random_seed=5,
                  snapshot_prefix=str(folder / "snap"), solver_mode="CPU")
    values.update(fields)

    def literal(key, value):
        quoted = isinstance(value, str) and key not in (
            "solver_mode", "snapshot_format")
        return '"%s"' % value if quoted else str(value).lower() if isinstance(
            value, bool) else str(value)

    path = folder / name
    path.write_text("".join("%s: %s\n" % (k, literal(k, v))
                            for k, v in values.items()))
    return path


def read_model(path):
    """{layer name: LayerParameter} of a .caffemodel."""
    from caffe.proto import caffe_pb2
    net = caffe_pb2.NetParameter()
    net.ParseFromString(Path(path).read_bytes())
    return {layer.name: layer for layer in net.layer}


def read_weights(path):
    """{(layer name, blob number): array} of a .caffemodel, binary or HDF5."""
    if str(path).endswith(".h5"):
        with h5py.File(path, "r") as model:
            return {(layer, int(i)): np.array(blob, "f4")
                    for layer, blobs in model["data"].items()
                    for i, blob in blobs.items()}
    return {(name, i): np.array(blob.data, "f4").reshape(blob.shape.dim)
            for name, layer in read_model(path).items()
            for i, blob in enumerate(layer.blobs)}


def assert_same_weights(one, other):
    one, other = read_weights(one), read_weights(other)
    assert one and one.keys() == other.keys()
    for key in one:
        assert one[key].tobytes() == other[key].tobytes(), key
