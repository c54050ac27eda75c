"""snapshots.py: which snapshots are whole, wherever Caffe ran."""
import os
import re
import subprocess
import sys

import pytest

from conftest import CAFFE_ROOT, ROOT

sys.path.insert(0, os.path.join(ROOT, "myexamples"))

SOLVER = """
net_param {
  layer { name: "data" type: "DummyData" top: "x" top: "y"
          dummy_data_param { shape { dim: 4 dim: 3 } shape { dim: 4 }
                             data_filler { type: "gaussian" }
                             data_filler { type: "constant" } } }
  layer { name: "ip" type: "InnerProduct" bottom: "x" top: "ip"
          inner_product_param { num_output: 2 } }
  layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "y" }
}
base_lr: 0.1 momentum: 0.9 lr_policy: "fixed" max_iter: 3 snapshot: 1
snapshot_prefix: "out/x" solver_mode: CPU snapshot_format: %s
"""


def snapshots(folder, *args):
    done = subprocess.run(
        [os.path.join(ROOT, "myexamples/snapshots.py"), *map(str, args)],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=dict(os.environ, CAFFE_ROOT=CAFFE_ROOT))
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(params=["BINARYPROTO", "HDF5"])
def trained(request, tmp_path, caffe_root):
    """(a folder with out/x_iter_{1,2,3}.*, the files' second ending)."""
    if request.param == "HDF5":
        pytest.importorskip("h5py")
    (tmp_path / "out").mkdir()
    (tmp_path / "solver.prototxt").write_text(SOLVER % request.param)
    subprocess.run([caffe_root + "/build/tools/caffe", "train",
                    "--solver=solver.prototxt"], cwd=tmp_path, check=True,
                   stderr=subprocess.DEVNULL)
    return tmp_path, ".h5" if request.param == "HDF5" else ""


def test_the_newest_that_is_whole(trained):
    folder, h5 = trained
    name = "out/x_iter_%d.%s" + h5
    assert snapshots(folder, "out") == (
        0, name % (3, "solverstate") + "\n", "")
    assert snapshots(folder, *[name % (3, kind) for kind in (
        "solverstate", "caffemodel")])[0] == 0
    for number, kind in ((3, "solverstate"), (2, "caffemodel")):
        path = folder / (name % (number, kind))
        os.truncate(path, path.stat().st_size - 9)
        status, out, error = snapshots(folder, path)
        assert status == 1 and path.name in error and out == ""
    status, out, error = snapshots(folder, "out")
    assert status == 0 and out == name % (1, "solverstate") + "\n"
    assert re.findall(r"x_iter_(\d)", error) == ["3", "2"]


def test_from_another_folder(trained):
    """A state names its model as Caffe was told to."""
    folder, h5 = trained
    status, out, error = snapshots("/", folder / "out")
    assert (status, out) == (0, "")
    assert ("x_iter_3.solverstate%s is of the model out/x_iter_3.caffemodel%s,"
            " which is not there: run this in the folder that Caffe ran in"
            % (h5, h5)) in error
    assert error.endswith("%s has no whole snapshot\n" % (folder / "out"))


@pytest.mark.parametrize("name", ["a.caffemodel", "a.solverstate"])
@pytest.mark.parametrize("text", ["", "text", "layer {\n", "net: \"a\"\n"])
def test_what_is_no_snapshot(tmp_path, caffe_root, name, text):
    """One line, and no warning of protobuf's."""
    (tmp_path / name).write_text(text)
    assert snapshots(tmp_path, name) == (
        1, "", "error: %s is cut short, or no %s\n" % (name, name[1:]))


def test_a_folder_without_any(tmp_path, caffe_root):
    assert snapshots(tmp_path, ".") == (0, "", ". has no whole snapshot\n")
