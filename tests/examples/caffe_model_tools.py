"""Models of given weights, as Caffe itself saves them."""
import os
import subprocess
import sys
import tempfile

import numpy as np

from conftest import CAFFE_ROOT

SAVE = """
import sys
import caffe
net = caffe.Net(sys.argv[1], caffe.TEST)
net.copy_from(sys.argv[2])
if sys.argv[3].endswith(".h5"):
    net.save_hdf5(sys.argv[3])
else:
    net.save(sys.argv[3])
"""


def filled(pb, text, values):
    """A NetParameter with those blobs for a net's layers, in float."""
    import caffe_model
    from google.protobuf import text_format
    net = text_format.Parse(text, pb.NetParameter())
    model = pb.NetParameter()
    for found in net.layer:
        if found.name in values:
            added = model.layer.add()
            added.CopyFrom(found)
            for array in values[found.name]:
                array = np.asarray(array, "f4")
                if found.type == "BN":
                    array = array.reshape(1, -1)
                caffe_model.set_array(added.blobs.add(), array)
    return model


# What was saved before: a process takes its time.
saved = {}


def save(caffe, text, model, path):
    """Has Caffe load a model into a net and save it."""
    key = text, model.SerializeToString(), path.suffix
    if key not in saved:
        caffe.shapes(text)  # says what is wrong with the net
        run_save(text, model, path)
        saved[key] = path.read_bytes()
    path.write_bytes(saved[key])


def run_save(text, model, path):
    with tempfile.TemporaryDirectory() as folder:
        for name, data in (("net", text.encode()),
                           ("model", model.SerializeToString())):
            with open(os.path.join(folder, name), "wb") as file:
                file.write(data)
        done = subprocess.run(
            [sys.executable, "-c", SAVE, os.path.join(folder, "net"),
             os.path.join(folder, "model"), str(path)],
            env=dict(os.environ, GLOG_minloglevel="2",
                     PYTHONPATH=os.path.join(CAFFE_ROOT, "python")),
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
