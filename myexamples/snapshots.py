#!/usr/bin/python3
"""Finds snapshots of a training that are whole.

    myexamples/snapshots.py FOLDER...             the newest whole .solverstate
    myexamples/snapshots.py MODEL.caffemodel...   those that are whole

A kill or a full disk can leave one cut short, which Caffe does not always
notice. Each of these is named on stderr.
"""
import os
import re
import sys

import caffe_proto


def read(message, path):
    """Fills message from a binary file; raises UserError where it is cut."""
    from google.protobuf.message import DecodeError
    try:
        with open(path, "rb") as file:
            message.ParseFromString(file.read())
    except OSError as error:
        raise caffe_proto.UserError("%s cannot be read: %s"
                                    % (path, error.strerror))
    except DecodeError:
        raise caffe_proto.UserError("%s is cut short" % path)
    return message


def check_model(pb, path):
    """Raises UserError where a .caffemodel is not whole."""
    # To protobuf, an empty file is a net without layers.
    if not read(pb.NetParameter(), path).layer:
        raise caffe_proto.UserError("%s is cut short" % path)


def check_state(pb, path, base=caffe_proto.ROOT):
    """Raises UserError where a .solverstate or its model is not whole.

    base is the folder that Caffe ran in.
    """
    state = read(pb.SolverState(), path)
    # Caffe always writes this field, and it comes last.
    if not state.HasField("current_step"):
        raise caffe_proto.UserError("%s is cut short" % path)
    check_model(pb, os.path.join(base, state.learned_net))


def newest(pb, folder):
    """The whole .solverstate with the most iterations, or None."""
    found = []
    for name in os.listdir(folder):
        match = re.search(r"_iter_(\d+)\.solverstate$", name)
        if match:
            found.append((int(match[1]), os.path.join(folder, name)))
    for _, path in sorted(found, reverse=True):
        try:
            check_state(pb, path)
            return path
        except caffe_proto.UserError as error:
            print("warning: %s; leaving that snapshot out" % error,
                  file=sys.stderr)
    return None


def main():
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        pb = caffe_proto.load()
        for path in sys.argv[1:]:
            if os.path.isdir(path):
                path = newest(pb, path)
            else:
                check_model(pb, path)
            if path:
                print(path)
    except caffe_proto.UserError as error:
        sys.exit("error: %s" % error)


if __name__ == "__main__":
    main()
