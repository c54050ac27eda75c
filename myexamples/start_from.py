#!/usr/bin/python3
"""Checks that a net with large margins can start from a softmax model.

    myexamples/start_from.py --softmax MODEL --net NET

The safest start of a margin is a net that was trained with softmax: the same
layers, by name, with InnerProduct { bias_term: false } where NET has
LargeMarginInnerProduct. This says what `caffe train --weights=MODEL` will
copy into NET and what not, and which base and learning rate to start from.
It fails where Caffe would, with a reason.

A bias is where most models do not fit: the margin layer has none. With
-o OUT a model without it is written, also with the class weights transposed
where the InnerProduct was { transpose: true } (in HDF5, which does not say
that, where their shape shows it).
"""
import argparse
import os

# First: Ctrl-C is quiet from here on.
import caffe_proto

import numpy as np

import caffe_model
from caffe_net import Caffe
from caffe_proto import UserError, user_errors
from deploy_net import MARGIN, Graph
from export_deploy import find_inputs

# lambda to start from: the features are good already, so the margin may begin
# with an eleventh of the weight. A quick net that softmax had trained on MNIST
# began m = 4 with a loss of 0.03 at 10, 0.1 at 5, 4.5 at 1 and 17 at 0.
BASE = 10
# Of the learning rate that a net from scratch begins with.
RATE = 0.1


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--softmax", dest="model", metavar="MODEL",
                        required=True, help="the softmax model, .caffemodel "
                        "or .caffemodel.h5")
    parser.add_argument("--net", metavar="NET", required=True,
                        help="prototxt of the net with margin")
    parser.add_argument("--solver", metavar="SOLVER", help="NET's solver "
                        "or the softmax model's, for the learning rate that "
                        "a training from scratch has")
    parser.add_argument("--shape", metavar="[BLOB=]DIMS", action="append",
                        default=[], help="shape of the input, as 3,32,32, "
                        "where the data layer does not tell it")
    parser.add_argument("-o", "--output", metavar="OUT", help="write the "
                        "model as NET takes it, a .caffemodel")
    parser.add_argument("--force", action="store_true",
                        help="replace OUT where it is there")
    return parser.parse_args(argv)


class Fit:
    """What becomes of a model's layers in a net.

    copied, fresh, ignored: names of layers. changed: what was done to a
    margin layer's blobs, by name. wrong: why others do not fit.
    """

    def __init__(self):
        self.copied, self.fresh, self.ignored = [], [], []
        self.changed, self.wrong = {}, []


def compare(graph, shapes, weights, transposed):
    """The Fit of weights, whose blobs of margin layers it changes to fit."""
    fit = Fit()
    nodes = {node.name: node for node in graph.nodes}
    for name, wanted in shapes.items():
        node, blobs = nodes[name], weights.get(name)
        if not blobs:
            fit.fresh.append(name)
            continue
        if node.type == MARGIN:
            blobs = weights[name] = fit_margin(
                fit, name, blobs, wanted[0], name in transposed)
        given = [None if blob is None else blob.shape for blob in blobs]
        if matches(given, wanted):
            fit.copied.append(name)
        else:
            fit.wrong.append(mismatch(node, given, wanted,
                                      weights.types.get(name)))
    fit.ignored = [name for name in weights if name not in shapes]
    return fit


def fit_margin(fit, name, blobs, wanted, transposed):
    """The blobs of an InnerProduct as those of a margin layer."""
    done = []
    first = blobs[0]
    if first is not None and first.ndim == 2 and first.shape[::-1] == wanted \
            and (transposed or first.shape != wanted):
        first = first.T
        done.append("its weights are transposed")
    if len(blobs) == 2 and blobs[1] is not None and \
            blobs[1].size == wanted[0]:
        bias = blobs[1]
        done.append("its bias (%.3g to %.3g) is dropped: a margin layer has "
                    "none" % (bias.min(), bias.max()))
        blobs = blobs[:1]
    if done:
        fit.changed[name] = " and ".join(done)
    return [first, *blobs[1:]]


def legacy(shape):
    """A shape as the four dimensions of old models."""
    return (1,) * (4 - len(shape)) + tuple(shape)


def matches(given, wanted):
    """Whether Caffe takes blobs of those shapes."""
    return len(given) == len(wanted) and all(
        one in (tuple(other), legacy(other))
        for one, other in zip(given, wanted))


def mismatch(node, given, wanted, kind):
    """Why a model's layer does not fit."""
    shown = [" ".join(caffe_model.text(shape) for shape in shapes if shape)
             for shapes in (given, wanted)]
    why = "%s has %s in the model where the net has %s" % (node, *shown)
    if node.type == MARGIN and len(given[0] or ()) == 2 and \
            given[0][1:] == wanted[0][1:]:
        return why + ": %d classes, not %d. Rename the layer to learn it " \
            "anew" % (given[0][0], wanted[0][0])
    if node.type == "BN" and (kind == "BatchNorm" or len(given) == 3):
        return why + ": it was upstream's BatchNorm; myexamples/" \
            "convert_bn.py makes a BN of it and its Scale"
    if node.type == "BN" and len(given[0] or ()) == 4:
        return why + ": it is the BN of another Caffe; myexamples/" \
            "convert_bn.py converts it"
    return why


def hints(graph, shapes, weights, fit):
    """What else may be wrong: margin layers that start from nothing."""
    margins = [node for node in graph.nodes if node.type == MARGIN]
    for node in margins:
        if node.name not in fit.fresh:
            continue
        wanted = tuple(shapes[node.name][0])
        alike = [name for name in fit.ignored
                 if weights[name][0] is not None
                 and wanted in (weights[name][0].shape,
                                weights[name][0].shape[::-1])]
        yield "warning: %s starts from its filler%s" % (
            node, ": rename it to '%s' to have that layer's weights"
            % alike[0] if alike else "")


def show(title, names):
    if names:
        print("%s %d layer%s: %s" % (title, len(names), "s"[:len(names) != 1],
                                     ", ".join(names)))


def advise(pb, graph, args):
    """Says which base and learning rate to start from."""
    for node in graph.nodes:
        if node.type != MARGIN:
            continue
        param = node.layer.largemargin_inner_product_param
        caffe_proto.check_schedule(node.name, param)
        if caffe_proto.margin(param) == 1:
            print("%s: m is 1, plain softmax: base means nothing" % node)
            continue
        base = max(BASE, param.lambda_min)
        print("start %s with base: %g%s" % (
            node, base, "" if param.base == base else
            " (the net has %g, for a start from scratch)" % param.base
            if param.base > base else " (the net has %g: the margin would "
            "begin at once)" % param.base))
    if args.solver:
        solver = caffe_proto.read_text(args.solver, pb.SolverParameter())
        caffe_proto.check_solver(solver, args.solver)
        print("start the solver with base_lr: %g, a tenth of the %g of %s"
              % (RATE * solver.base_lr, solver.base_lr, args.solver))
    else:
        print("start the solver with a tenth of the base_lr that the softmax "
              "net began with")


def trains(pb, solver, net):
    """Whether a solver, or None, trains the net of that file."""
    if not solver:
        return False
    param = caffe_proto.read_text(solver, pb.SolverParameter())
    path = caffe_proto.found(param.net or param.train_net or " ")
    return path is not None and os.path.samefile(path, net)


def read_transposed(pb, path):
    """The InnerProduct layers of a .caffemodel that are transposed."""
    if caffe_model.is_hdf5(path):
        return set()
    return {layer.name for layer in caffe_model.read_net(pb, path).layer
            if layer.type == "InnerProduct"
            and layer.inner_product_param.transpose}


def written(pb, shapes, weights, fit, graph):
    """The bytes of a .caffemodel with what the net copies."""
    model = pb.NetParameter()
    types = {node.name: node.type for node in graph.nodes}
    for name in fit.copied:
        layer = model.layer.add(name=name, type=types[name])
        for blob, shape in zip(weights[name], shapes[name]):
            caffe_model.set_array(layer.blobs.add(), blob.reshape(shape))
    return model.SerializeToString()


def run(caffe, pb, args):
    if args.output:
        caffe_model.check_free([args.output], args.force)
        caffe_model.check_format(args.output, hdf5=False)
        if os.path.exists(args.output) and \
                os.path.exists(args.model) and \
                os.path.samefile(args.output, args.model):
            raise UserError("OUT is MODEL, %s: write to another file"
                            % args.output)
    source = caffe_proto.read_net(pb, args.net)
    weights = caffe_model.read(pb, args.model)
    for name, blobs in weights.items():
        for blob in blobs:
            if blob is not None and not np.isfinite(blob).all():
                raise UserError("layer '%s' of %s holds numbers that are not "
                                "finite: that training had diverged"
                                % (name, args.model))
    graph = Graph(pb, source, args.net, "TRAIN")
    graph.strip()
    if not any(node.type == MARGIN for node in graph.nodes):
        raise UserError("%s has no %s layer in the TRAIN phase"
                        % (args.net, MARGIN))
    inputs = find_inputs(caffe, pb, graph, weights, args)
    graph.set_inputs({one.top.name: one.shape for one in inputs})
    shapes, _ = caffe.shapes(str(graph.net(source.name, for_deploy=False)))
    fit = compare(graph, shapes, weights, read_transposed(pb, args.model))
    show("copied:", fit.copied)
    show("not in the model, from their fillers:", fit.fresh)
    show("not in the net, ignored:", fit.ignored)
    for name, change in fit.changed.items():
        print("'%s': %s" % (name, change))
    for hint in hints(graph, shapes, weights, fit):
        print(hint)
    for why in fit.wrong:
        print(why)
    if fit.wrong:
        raise UserError("%s does not fit %s: Caffe would refuse %d layer%s "
                        "(above)" % (args.model, args.net, len(fit.wrong),
                                     "s"[:len(fit.wrong) != 1]))
    if not fit.copied:
        raise UserError("%s and %s have no layer in common"
                        % (args.model, args.net))
    if fit.changed and not args.output:
        raise UserError("%s does not fit as it is (%s, above): write one that "
                        "does with -o OUT" % (args.model,
                                              ", ".join(fit.changed)))
    advise(pb, graph, args)
    model = args.model
    if args.output:
        caffe_model.write_all({args.output: written(pb, shapes, weights, fit,
                                                    graph)})
        model = args.output
        print("made %s" % model)
    print("train with: caffe train --solver=%s --weights=%s"
          % (args.solver if trains(pb, args.solver, args.net) else "SOLVER",
             model))


def main():
    args = parse_args()
    with user_errors(), Caffe() as caffe:
        run(caffe, caffe_proto.load(), args)


if __name__ == "__main__":
    main()
