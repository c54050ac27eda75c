"""caffe_proto.py: nets and folders as Caffe takes them."""
import ast
import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import CAFFE_ROOT, ROOT

sys.path.insert(0, os.path.join(ROOT, "myexamples"))
import caffe_proto  # noqa: E402

# Layers, by the name of which the rules are told.
RULES = ["", "phase: TRAIN", "phase: TEST", "include { phase: TRAIN }",
         "phase: TRAIN include { phase: TEST }", "exclude { phase: TEST }",
         "include { phase: TEST stage: 'deploy' }", "include { stage: 'x' }",
         "include { not_stage: 'deploy' }", "exclude { stage: 'deploy' }",
         "include { min_level: 2 }", "include { max_level: 2 }",
         "include { max_level: 1 } include { phase: TRAIN }",
         "exclude { phase: TRAIN } exclude { min_level: 3 }"]
NET = "state { stage: 'deploy' level: 2 }" + "".join(
    """
layer {
  name: "%s" type: "Input" top: "%d" input_param { shape { dim: 1 } } %s
}""" % (rule, i, rule) for i, rule in enumerate(RULES))
LAYERS = """
import sys, caffe
print([list(caffe.Net(sys.argv[1], phase, 2, ["deploy"])._layer_names)
       for phase in (caffe.TRAIN, caffe.TEST)])
"""


def test_phases_are_those_of_caffe(tmp_path, pb):
    path = tmp_path / "net.prototxt"
    path.write_text(NET)
    done = subprocess.run(
        ["/usr/bin/python3", "-c", LAYERS, str(path)], check=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60,
        env=dict(os.environ, PYTHONPATH=os.path.join(CAFFE_ROOT, "python")))
    net = caffe_proto.read_net(pb, path)
    found = [[layer.name for layer in net.layer
              if caffe_proto.in_phase(pb, net, layer, phase)]
             for phase in (pb.TRAIN, pb.TEST)]
    assert found == ast.literal_eval(done.stdout)
    assert found[0] != found[1]


@pytest.mark.parametrize("script, waits_for, args", [
    ("snapshots.py", "src/caffe/proto/caffe.proto", ["."]),
    ("cifar10/make_images.py", "src/caffe/proto/caffe.proto",
     [".", "out", "--listed-as", "x", "--mean", "mean"]),
    ("cifar10/make_batches.py", "package.tgz", ["package.tgz", "."]),
    ("mnist_verification/split_digits.py", "x-images-idx3-ubyte",
     ["x", "y", "0-4"])])
def test_ctrl_c_is_one_word(tmp_path, script, waits_for, args):
    """While the script reads a file that says nothing."""
    fifo = tmp_path / waits_for
    fifo.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [os.path.join(ROOT, "myexamples", script), *args], cwd=tmp_path,
        env=dict(os.environ, CAFFE_ROOT=str(tmp_path)), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    writer = None
    while writer is None and process.poll() is None:
        with contextlib.suppress(OSError):  # until it reads
            writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=30)[0]
    os.close(writer)
    assert (process.returncode, out) == (1, "stopped\n")


def test_found_from_here_the_root_and_other_folders(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/name").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caffe_proto, "ROOT", str(tmp_path / "root"))
    assert caffe_proto.found("name") is None
    assert caffe_proto.found("name", "other") == "other/name"
    (tmp_path / "root").mkdir()
    (tmp_path / "root/name").touch()
    assert caffe_proto.found("name", "other") == str(tmp_path / "root/name")
    (tmp_path / "name").touch()
    assert caffe_proto.found("name", "other") == "name"
    monkeypatch.setenv("CAFFE_ROOT", "")
    assert caffe_proto.caffe_root() == str(tmp_path / "root/build/caffe")
    monkeypatch.setenv("CAFFE_ROOT", "other")
    assert caffe_proto.caffe_root() == str(tmp_path / "other")
