#!/usr/bin/python3
"""Makes a net for deployment from a trained one.

    myexamples/export_deploy.py NET MODEL -o FOLDER

writes FOLDER/deploy.prototxt and FOLDER/deploy.caffemodel, which need nothing
but upstream Caffe's layers: an unpatched Caffe, OpenCV's dnn or a converter
to another format reads them.

  LargeMarginInnerProduct  becomes InnerProduct without bias
  BN                       goes into the Convolution, Deconvolution or
                           InnerProduct before it, else becomes BatchNorm +
                           Scale
  data layers              become Input; their transforms stand as comments in
                           the prototxt, as OpenCV's blobFromImage wants them
  SoftmaxWithLoss          becomes Softmax; other losses, Accuracy and what
                           only labels feed are left out

Shared parameters are written to each layer that has them. Before the files
are written, both nets run on the same inputs; where their outputs differ by
more than 1e-4 (relative to the largest output), nothing is written. Where
OpenCV's Python module is there, it runs the new net on them, too: a warning
says what it makes otherwise.
"""
import argparse
import contextlib
import os

# First: Ctrl-C is quiet from here on.
import caffe_proto

import numpy as np

import caffe_model
import opencv_net
from bn_dialect import inverse_std, speaks_against
from caffe_net import Caffe
from caffe_proto import UserError, user_errors
from deploy_input import IMAGES, Input
from deploy_net import MARGIN, Graph

TOLERANCE = 1e-4
# Of OpenCV, which has other algorithms for convolutions.
OPENCV_TOLERANCE = 1e-3
# Random inputs of the proof.
SAMPLES = 4


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", metavar="NET", help="prototxt of the net: that "
                        "of the training, of which the TEST phase is taken, "
                        "or a deploy one")
    parser.add_argument("model", metavar="MODEL",
                        help="its weights, .caffemodel or .caffemodel.h5")
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True,
                        help="for deploy.prototxt and deploy.caffemodel; made "
                        "where it is not there")
    parser.add_argument("--shape", metavar="[BLOB=]DIMS", action="append",
                        default=[], help="shape of the input, as 3,32,32 (or "
                        "1,3,32,32 with a batch size), where the data layer "
                        "does not tell it; with several inputs one --shape "
                        "for each, as data=3,32,32")
    parser.add_argument("--images", metavar="IMAGE", nargs="+", default=[],
                        help="compare the nets on these images, too")
    parser.add_argument("--fold", choices=("bn", "none"), default="bn",
                        help="none: BatchNorm + Scale for every BN (default: "
                        "bn)")
    parser.add_argument("--bn", choices=("inverse-std", "variance"),
                        default="inverse-std", help="what the fourth blob of "
                        "the model's BN layers is: variance in models of "
                        "yjxiong's Caffe and PSPNet's (default: inverse-std)")
    parser.add_argument("--force", action="store_true",
                        help="replace files that are there")
    return parser.parse_args(argv)


def parse_shapes(texts):
    """The --shape options: a dict of blobs, or None, to shapes."""
    shapes = {}
    for given in texts:
        name, _, dims = given.rpartition("=")
        try:
            shape = [int(dim) for dim in dims.split(",")]
        except ValueError:
            shape = []
        if not shape or min(shape) < 1:
            raise UserError("--shape %s: a shape is numbers above 0 with "
                            "commas between, as 3,32,32" % given)
        # One sample, of features or an image.
        if len(shape) in (1, 3):
            shape.insert(0, 1)
        if (name or None) in shapes:
            raise UserError("--shape %s: there is another for that input"
                            % given)
        shapes[name or None] = tuple(shape)
    return shapes


def find_inputs(caffe, pb, graph, weights, args):
    """The Inputs of a graph, with their shapes."""
    given = parse_shapes(args.shape)
    inputs = [Input(pb, node, args.net) for node in graph.inputs()]
    if not inputs:
        raise UserError("%s has no data layer and no input" % args.net)
    names = [found.top.name for found in inputs]
    for name in given:
        if name is None and len(names) > 1:
            raise UserError("--shape: the net has the inputs %s; say which, "
                            "as --shape %s=3,32,32" % (
                                " and ".join(names), names[0]))
        if name is not None and name not in names:
            raise UserError("--shape %s=...: the net's input is %s"
                            % (name, " and ".join(names)))
    for found in inputs:
        found.find_shape(caffe, given.get(found.top.name, given.get(None)),
                         graph, weights)
    return inputs


def to_inverse_std(graph, weights):
    """Turns the other dialect's BN blobs in weights into ours."""
    for node in graph.nodes:
        blobs = weights.get(node.name)
        if node.type != "BN" or not blobs:
            continue
        where = "%s in %s" % (node, weights.path)
        if len(blobs) != 4 or any(blob is None for blob in blobs):
            raise UserError("%s has %d blobs where BN has 4"
                            % (where, len(blobs)))
        blobs = [np.asarray(blob, np.float64) for blob in blobs]
        blobs[3] = inverse_std(where, blobs[3].ravel(),
                               node.layer.bn_param.eps)
        weights[node.name] = [blob.reshape(1, -1).astype("f4")
                              for blob in blobs]


def check_dialect(graph, args):
    """Warns where the statistics look like those of the other dialect."""
    layers = [node for node in graph.nodes if node.type == "BN"]
    said = speaks_against(
        "inverse-std", [(node.name, node.blobs[2], node.blobs[3],
                         node.layer.bn_param.eps) for node in layers])
    if not said:
        return
    if args.bn == "variance":
        print("warning: %s does not look like a model with variances; is "
              "--bn variance right?" % args.model)
    else:
        print("warning: %s: if the model is of yjxiong's Caffe or PSPNet's, "
              "add --bn variance" % said)


def model_of(pb, graph, net):
    """The net with the weights of the graph's nodes, for a .caffemodel."""
    model = pb.NetParameter()
    model.CopyFrom(net)
    for node, layer in zip(graph.nodes, model.layer):
        for i, blob in enumerate(node.blobs):
            with np.errstate(over="ignore"):
                blob = np.asarray(blob).astype("f4")
            if not np.isfinite(blob).all():
                raise UserError("%s: its new weights do not fit into float"
                                % node)
            caffe_model.set_array(layer.blobs.add(), blob)
    return model


def samples(caffe, inputs, images):
    """The inputs of the proof, and how many of them are random."""
    generator = np.random.default_rng(1)
    found = []
    for i in range(SAMPLES):
        found.append({one.top.name: one.random(
            generator, i % 2 == 1 and one.is_image
            and one.layer.type in IMAGES) for one in inputs})
    if images:
        if len(inputs) > 1:
            raise UserError("--images: the net has %d inputs" % len(inputs))
        found += [{inputs[0].top.name: image}
                  for image in inputs[0].images(caffe, images)]
    return found


def compared(graph):
    """The blobs that the proof compares: outputs, and what makes scores."""
    values = list(graph.outputs)
    for node in graph.nodes:
        if node.type in ("Softmax", "Sigmoid") and \
                node.tops[0] in graph.outputs:
            values += node.bottoms
    return list(dict.fromkeys(value.name for value in values))


def largest_difference(ours, theirs):
    """(relative difference, blob) where the outputs differ most."""
    worst = (0.0, None)
    for name in ours[0]:
        first = np.stack([sample[name] for sample in ours])
        second = np.stack([sample[name] for sample in theirs])
        if first.shape != second.shape:
            raise UserError("'%s' has the shape %s where the net's own is %s"
                            % (name, caffe_model.text(second.shape[1:]),
                               caffe_model.text(first.shape[1:])))
        if not np.isfinite(first).all():
            raise UserError("'%s' of the net is not finite: nothing can be "
                            "compared" % name)
        largest = np.abs(first).max(initial=0)
        difference = np.abs(first - second).max(initial=0)
        if not difference == 0:
            difference = difference / largest if largest else np.inf
        if worst[1] is None or not difference <= worst[0]:
            worst = (float(difference), name)
    return worst


def prove(caffe, reference, reference_model, net, model, inputs, names):
    """Raises UserError where the nets do not agree; else says how well.

    Returns the outputs of the new net.
    """
    with caffe_model.scratch(model) as path:
        ours = caffe.outputs(reference, reference_model, inputs, names)
        theirs = caffe.outputs(net, path, inputs, names)
    difference, name = largest_difference(ours, theirs)
    count = len(inputs) - SAMPLES
    print("both nets on %d random inputs%s: largest relative difference %.2g "
          "(%s)" % (SAMPLES, " and %d image%s" % (count, "s"[:count != 1])
                    if count else "", difference, name))
    if not difference <= TOLERANCE:
        raise UserError("the nets differ by %.2g in '%s', more than %g: "
                        "nothing is written" % (difference, name, TOLERANCE))
    return theirs


def try_opencv(net, model, inputs, ours):
    """Says whether OpenCV, where it is there, makes the same of the net."""
    answer = opencv_net.outputs(net, model, inputs, list(ours[0]))
    if answer is None:
        return
    version, theirs = answer
    if isinstance(theirs, str):
        print("warning: OpenCV %s does not run this net: %s" % (version,
                                                                theirs))
        return
    # It has 1 x 5 x 1 x 1 where Caffe has 1 x 5.
    theirs = [{name: array.reshape(own[name].shape)
               if array.size == own[name].size else array
               for name, array in sample.items()}
              for own, sample in zip(ours, theirs)]
    ours = [{name: own[name] for name in sample}
            for own, sample in zip(ours, theirs)]
    try:
        difference, name = largest_difference(ours, theirs)
    except UserError as error:
        print("warning: OpenCV %s makes something else of this net: %s"
              % (version, error))
        return
    if difference <= OPENCV_TOLERANCE:
        print("OpenCV %s on the same: largest relative difference %.2g (%s)"
              % (version, difference, name))
    else:
        print("warning: OpenCV %s makes something else of this net: '%s' "
              "differs by %.2g; run it in Caffe, or try another OpenCV"
              % (version, name, difference))


def report(graph, before):
    """Says what became of the plugin's layers and what was left out."""
    for node in graph.nodes:
        if node.folded:
            print("%s goes into %s" % (" and then ".join(
                "'%s' (BN)" % name for name in node.folded), node))
        elif before.get(node.name) == "BN":
            print("'%s' (BN) becomes BatchNorm + Scale" % node.name)
        elif before.get(node.name) == MARGIN:
            print("'%s' (%s) becomes InnerProduct" % (node.name, MARGIN))
    for note in graph.notes:
        print(note)


def export(caffe, pb, args):
    prototxt = os.path.join(args.output, "deploy.prototxt")
    caffemodel = os.path.join(args.output, "deploy.caffemodel")
    caffe_model.check_free([prototxt, caffemodel], args.force)
    source = caffe_proto.read_net(pb, args.net)
    weights = caffe_model.read(pb, args.model)
    graph = Graph(pb, source, args.net)
    graph.strip()
    if args.bn == "variance":
        to_inverse_std(graph, weights)
    inputs = find_inputs(caffe, pb, graph, weights, args)
    graph.set_inputs({one.top.name: one.shape for one in inputs})
    # Shapes before weights: a net that is wrong is Caffe's to tell.
    reference = graph.net(source.name, for_deploy=False)
    parameters, blobs = caffe.shapes(str(reference))
    graph.load(weights, parameters)
    check_dialect(graph, args)
    arrays = samples(caffe, inputs, args.images)
    with contextlib.ExitStack() as stack:
        reference_model = args.model
        if args.bn == "variance":
            reference_model = stack.enter_context(caffe_model.scratch(
                model_of(pb, graph, reference).SerializeToString()))
        before = {node.name: node.type for node in graph.nodes}
        graph.replace_plugin(args.fold == "bn", blobs)
        graph.spell_out()
        net = graph.net(source.name, for_deploy=True)
        model = model_of(pb, graph, net).SerializeToString()
        report(graph, before)
        theirs = prove(caffe, str(reference), reference_model, str(net), model,
                       arrays, compared(graph))
        try_opencv(net, model, arrays, theirs)
    lines = ["Made by export_deploy.py from %s and %s." % (
        os.path.basename(args.net), os.path.basename(args.model))]
    for one in inputs:
        lines += one.comments()
    lines.append("Output: %s" % ", ".join(
        '"%s"' % value.name for value in graph.outputs))
    # It writes 1e-05 where str() writes 9.999999747378752e-06.
    from google.protobuf.text_format import MessageToString
    head = "".join("# %s\n" % line.replace("\n", " ") for line in lines)
    caffe_model.write_all({prototxt: (head + MessageToString(net)).encode(),
                           caffemodel: model})
    print("made %s and %s" % (prototxt, caffemodel))


def main():
    args = parse_args()
    with user_errors(), Caffe() as caffe:
        export(caffe, caffe_proto.load(), args)


if __name__ == "__main__":
    main()
