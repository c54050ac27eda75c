"""caffe_proto.py: nets and folders as Caffe takes them."""
import ast
import os
import subprocess
import sys

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
