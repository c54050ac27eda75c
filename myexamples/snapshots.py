#!/usr/bin/python3
"""Finds snapshots of a training that are whole.

    myexamples/snapshots.py FOLDER...             the newest whole .solverstate
    myexamples/snapshots.py MODEL.caffemodel...   those that are whole

Binary ones and HDF5 (.solverstate.h5, .caffemodel.h5). A kill or a full disk
can leave one cut short, which Caffe does not always notice. Each of these is
named on stderr. A state names its model from the folder that Caffe ran in: run
this there, or in the project's root.
"""
import os
import re
import sys

import caffe_proto


def check_model(pb, path):
    """Raises UserError where a .caffemodel or .caffemodel.h5 is not whole."""
    if path.endswith(".h5"):
        # Here, as that module needs numpy, which no log needs.
        import caffe_model
        caffe_model.read_hdf5(path)
    # To protobuf, an empty file is a net without layers.
    elif not caffe_proto.read_binary(path, pb.NetParameter(),
                                     ".caffemodel").layer:
        raise caffe_proto.UserError("%s is cut short, or no .caffemodel"
                                    % path)


def model_of(pb, path):
    """The model that a .solverstate or .solverstate.h5 names."""
    if path.endswith(".h5"):
        import caffe_model
        try:
            with caffe_model.hdf5().File(path, "r") as file:
                return file["learned_net"][()].decode()
        except (OSError, KeyError, AttributeError):
            raise caffe_proto.UserError("%s is cut short, or no .solverstate"
                                    % path)
    state = caffe_proto.read_binary(path, pb.SolverState(), ".solverstate")
    # Caffe always writes this field, and it comes last.
    if not state.HasField("current_step"):
        raise caffe_proto.UserError("%s is cut short, or no .solverstate"
                                    % path)
    return state.learned_net


def check_state(pb, path):
    """Raises UserError where a solver state or its model is not whole."""
    name = model_of(pb, path)
    model = caffe_proto.found(name)
    if not model:
        raise caffe_proto.UserError(
            "%s is of the model %s, which is not there: run this in the "
            "folder that Caffe ran in" % (path, name))
    check_model(pb, model)


def newest(pb, folder):
    """The whole solver state with the most iterations, or None."""
    found = []
    for name in os.listdir(folder):
        match = re.search(r"_iter_(\d+)\.solverstate(\.h5)?$", name)
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
    with caffe_proto.user_errors():
        pb = caffe_proto.load()
        for path in sys.argv[1:]:
            if os.path.isdir(path):
                found = newest(pb, path)
                if not found:
                    print("%s has no whole snapshot" % path, file=sys.stderr)
                path = found
            elif re.search(r"\.solverstate(\.h5)?$", path):
                check_state(pb, path)
            else:
                check_model(pb, path)
            if path:
                print(path)


if __name__ == "__main__":
    main()
