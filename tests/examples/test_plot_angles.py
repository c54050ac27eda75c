"""plot_angles.py on features whose angles are known."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import CAFFE_ROOT, ROOT

sys.path.insert(0, os.path.join(ROOT, "myexamples"))
import caffe_proto  # noqa: E402
import lmdb_file  # noqa: E402
import plot_angles  # noqa: E402

NET = """
layer { name: "data" type: "ImageData" top: "data" top: "label"
  include { phase: TEST }
  image_data_param { source: "%s" batch_size: 4 is_color: false } }
layer { name: "data" type: "Data" top: "data" top: "label"
  include { phase: TRAIN } data_param { source: "none" batch_size: 4 } }
layer { name: "flat" type: "Flatten" bottom: "data" top: "flat" }
layer { name: "ip" type: "LargeMarginInnerProduct" bottom: "flat"
  bottom: "label" top: "ip" include { phase: TRAIN }
  largemargin_inner_product_param { num_output: 3 type: QUADRUPLE } }
layer { name: "ip" type: "%s" bottom: "flat" %s top: "ip"
  include { phase: TEST } %s }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label"
  top: "loss" }
"""
SOLVER = 'net: "%s" test_iter: 1 test_interval: 1 max_iter: 1 base_lr: 1'


def test_angles_known_by_hand():
    weights = np.array([[2, 0], [0, 3], [-1, 0], [0, 0]])
    rows = np.array([[1, 0], [1, 1], [5, 0], [0, 0], [1, 1], [1, 0]])
    labels = np.array([0, 1, 2, 0, 255, 0.5])
    angles = plot_angles.Angles(rows, labels, weights)
    # The weights of class 3 have no direction: a right angle.
    assert angles.own == pytest.approx([0, 45, 180])
    assert angles.other == pytest.approx([90, 45, 0])
    assert angles.gap() == pytest.approx([90, 0, -180])
    assert angles.skipped == 3


class Net:
    def __init__(self, folder, layer="LargeMarginInnerProduct"):
        self.folder, self.pb = folder, caffe_proto.load()
        # Two samples at 0 degrees, one at 45 and one at 90.
        pixels = [[200, 0], [9, 0], [50, 50], [0, 7]]
        for number, image in enumerate(pixels):
            Image.fromarray(np.array([image], np.uint8)).save(
                str(folder / ("%d.png" % number)))
        self.list = folder / "list"
        self.list.write_text("".join("%s/%d.png %d\n" % (folder, i, label)
                                     for i, label in enumerate([0, 0, 0, 1])))
        self.path, self.solver = folder / "net.prototxt", folder / "s.prototxt"
        param = ("largemargin_inner_product_param { num_output: 3 }"
                 if layer[0] == "L" else
                 "inner_product_param { num_output: 3 bias_term: false }")
        self.path.write_text(NET % (self.list, layer, 'bottom: "label"'
                                    if layer[0] == "L" else "", param))
        self.solver.write_text(SOLVER % self.path)

    def model(self, name, degrees, **param):
        """A model whose class weights lie at those angles."""
        net = self.pb.NetParameter()
        layer = net.layer.add(name="ip", type="LargeMarginInnerProduct")
        for field, value in param.items():
            setattr(layer.largemargin_inner_product_param, field, value)
        angles = np.radians(degrees)
        weights = np.stack([np.cos(angles), np.sin(angles)], axis=1) * 3
        layer.blobs.add(data=weights.ravel()).shape.dim.extend([3, 2])
        path = self.folder / name
        path.write_bytes(net.SerializeToString())
        return path

    def plot(self, net, *args):
        return subprocess.run(
            [os.path.join(ROOT, "myexamples/plot_angles.py"), str(net),
             *map(str, args)],
            universal_newlines=True, timeout=120, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, cwd=str(self.folder),
            env=dict(os.environ, CAFFE_ROOT=CAFFE_ROOT))


def test_two_models_of_a_solver(tmp_path, caffe_root):
    net = Net(tmp_path)
    one = net.model("one.caffemodel", [10, 80, 180], margin=1)
    four = net.model("four.caffemodel", [0, 90, 200], type=3, base=1000,
                     gamma=1, power=2, passes=99)
    done = net.plot(net.solver, one, four)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    # Own: 10 10 35 10; nearest other: 80 80 35 80; gap: 70 70 0 70.
    assert lines[0] == "%s: softmax (m = 1)" % one
    assert lines[1] == ("    4 samples: own class 10.0, nearest other class "
                        "80.0 degrees (medians); median gap 70.0")
    # Own: 0 0 45 0; nearest other: 90 90 45 90.
    assert lines[2] == "%s: m = 4, lambda 0.1 at the end" % four
    assert lines[3].endswith("own class 0.0, nearest other class 90.0 degrees "
                             "(medians); median gap 90.0")
    assert lines[4] == "plot: %s" % (tmp_path / "s_angles.png")
    assert Image.open(str(tmp_path / "s_angles.png")).size == (800, 580)


def test_net_with_a_plain_layer_in_the_test_phase(tmp_path, caffe_root):
    net = Net(tmp_path, "InnerProduct")
    # Of 5 batches, as the net does not say how many there are.
    done = net.plot(net.path, net.model("a", [0, 90, 180]), "--iterations", 5,
                    "-o", tmp_path / "out.png", "--layer", "ip")
    assert done.returncode == 0, done.stdout
    assert "    20 samples: own class 0.0, nearest" in done.stdout
    assert Image.open(str(tmp_path / "out.png")).size == (800, 340)


def test_labels_that_the_layer_has_in_training_alone(tmp_path, caffe_root):
    net = Net(tmp_path)
    net.path.write_text(net.path.read_text().replace('"label"', '"kind"')
                        .replace('bottom: "flat" bottom: "kind" top: "ip"\n  '
                                 "include { phase: TEST",
                                 'bottom: "flat" top: "ip"\n  '
                                 "include { phase: TEST"))
    assert net.path.read_text().count('bottom: "kind"') == 2
    done = net.plot(net.solver, net.model("a", [0, 90, 180]))
    assert done.returncode == 0, done.stdout
    assert "    4 samples: own class 0.0" in done.stdout


def test_solvers_that_hold_their_nets(tmp_path, caffe_root):
    net = Net(tmp_path)
    text = net.path.read_text()
    for form in ("net_param { %s }", "train_net_param { %s }\n"
                 "test_net_param { %s }"):
        net.solver.write_text(form.replace("%s", text) + "test_iter: 1")
        found, iterations = plot_angles.read(net.pb, str(net.solver))
        assert "ip" in [layer.name for layer in found.layer]
        assert iterations == 1


def test_samples_without_a_class_are_left_out(tmp_path, caffe_root):
    net = Net(tmp_path)
    net.list.write_text(net.list.read_text().replace("2.png 0", "2.png 7"))
    model = net.model("a", [0, 90, 180])
    done = net.plot(net.solver, model)
    assert "    3 samples (1 without a class or with features of zeros left " \
        "out): own class 0.0" in done.stdout
    net.list.write_text(re.sub(r"(?m) \d$", " 7", net.list.read_text()))
    done = net.plot(net.solver, model)
    assert done.returncode == 1
    assert "no sample has features and a label of the 3 classes" in done.stdout


MISTAKES = [
    (('"Flatten" bottom: "data" top: "flat" }', """"InnerProduct"
       bottom: "data" top: "a" inner_product_param { num_output: 2 } }
       layer { name: "relu" type: "ReLU" bottom: "a" top: "flat" }"""),
     ["--layer", "flat"],
     'net.prototxt has no class weights: "ip" goes on from it'),
    (("", ""), ["--layer", "fc"], 'has no layer "fc" in the TEST'),
    (("", ""), ["--label", "y"], 'has no blob "y" in the TEST phase'),
    (('"ip" type: "L', '"x" type: "InnerProduct" #'), [],
     "has 0 LargeMarginInnerProduct layers: name the one"),
    (("LIST", "no/list"), [],
     "takes its data from no/list, which is not there"),
    (("top: ", "tip: "), [], '"caffe.LayerParameter" has no field'),
]


@pytest.mark.parametrize("change, args, message", MISTAKES)
def test_mistakes(tmp_path, caffe_root, monkeypatch, change, args, message):
    """Each is seen before pycaffe is loaded, which may end its process."""
    net = Net(tmp_path)
    text = net.path.read_text()
    old = change[0].replace("LIST", str(net.list))
    net.path.write_text(text.replace(old, change[1]) if old else text)
    monkeypatch.setattr(sys, "argv", [
        "plot_angles.py", str(net.path), str(net.model("a", [0, 90, 180])),
        *args])
    with pytest.raises(SystemExit) as error:
        plot_angles.main()
    assert str(error.value).startswith("error: ")
    assert message in str(error.value)


@pytest.mark.parametrize("data, message", [
    (None, "No such file or directory"),
    (b"", "is empty"),
    (b"no database" * 999, "MDB_INVALID: File is not an LMDB file"),
], ids=["no file", "no entry", "junk"])
def test_data_that_are_no_lmdb(tmp_path, caffe_root, data, message):
    net = Net(tmp_path)
    db = tmp_path / "lmdb"
    if data == b"":
        lmdb_file.write(str(db), [])
    else:
        db.mkdir()
        if data:
            (db / "data.mdb").write_bytes(data)
    text = net.path.read_text()
    net.path.write_text(text.replace('"ImageData"', '"Data"', 1).replace(
        'image_data_param { source: "%s" batch_size: 4 is_color: false }'
        % net.list, 'data_param { source: "%s" batch_size: 4 backend: LMDB }'
        % db))
    done = net.plot(net.path, net.model("a", [0, 90, 180]))
    assert done.returncode == 1
    assert re.fullmatch("error: .*%s.*%s.*\n" % (db, message), done.stdout)


def test_data_that_end_caffe(tmp_path, caffe_root):
    """In a thread of its own, with no layer at fault."""
    net = Net(tmp_path)
    (tmp_path / "3.png").write_text("no image")
    model = net.model("a", [0, 90, 180])
    done = net.plot(net.path, model)
    assert done.returncode == 1
    assert re.fullmatch("error: %s with %s: Caffe says.*: Check failed: .+\n"
                        % (net.path, model), done.stdout)


def test_model_and_files_that_do_not_fit(tmp_path, caffe_root):
    net = Net(tmp_path)
    model = net.model("a", [0, 90, 180])
    net.path.write_text(net.path.read_text().replace('"ip" t', '"other" t'))
    done = net.plot(net.path, model)
    assert done.returncode == 1
    assert done.stdout.startswith('error: %s has no weights for layer "other"'
                                  % model)
    net.solver.write_text("max_iter 3")
    with pytest.raises(caffe_proto.UserError) as error:
        plot_angles.read(net.pb, str(net.solver))
    assert "s.prototxt:1:10" in str(error.value)
    with pytest.raises(caffe_proto.UserError) as error:
        plot_angles.read(net.pb, "/none")
    assert "cannot read /none" in str(error.value)
