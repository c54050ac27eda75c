#!/usr/bin/python3
"""Estimates how many hours a solver's training takes on this machine's CPU.

Times the net of SOLVER with `caffe time` on images of no meaning, of the size
CHANNELS x HEIGHT x WIDTH that the net sees: a quarter of a batch at least.
"""
import argparse
import os
import re
import subprocess
import tempfile

import caffe_proto
from caffe_proto import UserError, user_errors

SAMPLES = 32


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caffe", metavar="CAFFE", help="the program caffe")
    parser.add_argument("solver", metavar="SOLVER", help="solver prototxt")
    parser.add_argument("shape", metavar="N", type=int, nargs=3,
                        help="channels, height and width")
    return parser.parse_args()


def with_dummy_data(pb, net, shape):
    """Puts DummyData into net's TRAIN phase; returns batch and SAMPLES' part.

    The second is how much of a batch the dummy data are.
    """
    for layer in net.layer:
        params = {"Data": layer.data_param, "ImageData": layer.image_data_param}
        if (layer.type in params and
                caffe_proto.in_phase(pb, net, layer, pb.TRAIN)):
            batch = params[layer.type].batch_size
            used = min(batch, SAMPLES)
            layer.type = "DummyData"
            for field in ("data_param", "image_data_param", "transform_param"):
                layer.ClearField(field)
            layer.dummy_data_param.shape.add().dim.extend([used, *shape])
            layer.dummy_data_param.shape.add().dim.append(used)
            layer.dummy_data_param.data_filler.add(type="gaussian")
            layer.dummy_data_param.data_filler.add(type="constant")
            return used / batch
    raise UserError("the net reads no Data or ImageData in the TRAIN phase")


def hours(args):
    from google.protobuf import text_format
    pb = caffe_proto.load()
    solver, net = caffe_proto.read_solver(pb, args.solver)
    caffe_proto.check_solver(solver, args.solver)
    part = with_dummy_data(pb, net, args.shape)
    with tempfile.NamedTemporaryFile("w", suffix=".prototxt") as file:
        file.write(text_format.MessageToString(net))
        file.flush()
        try:
            done = subprocess.run(
                [args.caffe, "time", "--model=" + file.name, "--iterations=2"],
                env=dict(os.environ, GLOG_logtostderr="1"), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except OSError as error:
            raise UserError("cannot start %s: %s"
                            % (args.caffe, error.strerror))
    found = re.search(r"Average Forward-Backward: (\S+) ms", done.stdout)
    if done.returncode or not found:
        raise UserError("caffe time failed: " + done.stdout.strip()[-200:])
    iterations = solver.max_iter * solver.iter_size
    return float(found[1]) / part * iterations / 3.6e6


def main():
    with user_errors():
        found = hours(parse_args())
        print("%.2g" % found if found < 10 else round(found))


if __name__ == "__main__":
    main()
