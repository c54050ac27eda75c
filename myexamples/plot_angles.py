#!/usr/bin/python3
"""Shows the angles between test samples and the class weights.

For each sample: the angle of its features to the weights of its own class, and
to the nearest other class's. Their difference is what a margin is to widen.
Prints the medians and draws histograms; with several models of one net, one
below the other (softmax beside margin).

SOLVER|NET is a solver, whose test_iter says how many batches are taken, or a
net with a data layer in the TEST phase. A net whose margin layer was trained
until lambda was nearly 0 has own angles far below those of softmax; one whose
angles are like softmax's had too large a lambda (see plot_lambda.py).
"""
import argparse
import os
import re

# First: Ctrl-C is quiet from here on.
import caffe_proto

import matplotlib.pyplot as plt
import numpy as np

import caffe_model
import caffe_net
import features
import figures
import lmdb_file
import runs
from caffe_proto import ROOT, UserError, user_errors

BATCHES = 100
WITH_WEIGHTS = ("Convolution", "Deconvolution", "InnerProduct",
                "LargeMarginInnerProduct")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", metavar="SOLVER|NET")
    parser.add_argument("models", metavar="MODEL", nargs="+",
                        help=".caffemodel")
    parser.add_argument("--layer", metavar="NAME", help="the layer with the "
                        "class weights (default: the LargeMarginInnerProduct "
                        "layer)")
    parser.add_argument("--label", metavar="NAME", help="the blob with the "
                        "labels (default: the second bottom that the layer "
                        "has in a phase, or \"label\")")
    parser.add_argument("--iterations", metavar="N", type=int, help="batches "
                        "to take (default: test_iter of the solver; %d for a "
                        "net)" % BATCHES)
    parser.add_argument("-o", "--output", metavar="PNG", help="default: the "
                        "name of SOLVER|NET with _angles.png, in this folder")
    parser.add_argument("-t", "--title", help="above the plot")
    args = parser.parse_args()
    if args.iterations is not None and args.iterations < 1:
        parser.error("--iterations is at least 1")
    return args


# ---- The net ----

def read(pb, path):
    """(NetParameter, test_iter or None) of a solver or a net."""
    try:
        return caffe_proto.read_net(pb, path), None
    except UserError as error:
        as_net = error
    try:
        solver, net = caffe_proto.read_solver(pb, path)
    except UserError:
        # Of what is neither, the error of what it looks like is of interest.
        if is_like_net(path):
            raise as_net
        raise
    if solver.test_net or solver.test_net_param:
        if solver.test_net_param:
            net = solver.test_net_param[0]
        else:
            net = caffe_proto.read_net(pb, caffe_proto.found(
                solver.test_net[0]) or solver.test_net[0])
    caffe_proto.check_upgraded(net, path)
    return net, solver.test_iter[0] if solver.test_iter else None


def is_like_net(path):
    """Whether a prototxt has layers, and not as a part of a solver."""
    try:
        with open(path) as file:
            text = file.read()
    except (OSError, UnicodeDecodeError):
        return False
    return "net_param" not in text and bool(
        re.search(r"(?m)^\s*layers?\s*[:{]", text))


def find_layer(pb, net, path, name=None):
    """The layer of the TEST phase that has the class weights."""
    if name is None:
        names = {layer.name for layer in net.layer
                 if layer.type == "LargeMarginInnerProduct"}
        if len(names) != 1:
            raise UserError("%s has %d LargeMarginInnerProduct layers: name "
                            "the one with the class weights by --layer"
                            % (path, len(names)))
        name, = names
    for layer in net.layer:
        if layer.name == name and caffe_proto.in_phase(pb, net, layer,
                                                       pb.TEST):
            return layer
    raise UserError("%s has no layer \"%s\" in the TEST phase" % (path, name))


def in_all_phases(net, layer):
    """The layer, then those of its name: some have it for a phase each."""
    return [layer] + [other for other in net.layer if other.name == layer.name]


def find_label(net, layer):
    """The blob with the labels, which the layer may have in training alone."""
    return next((other.bottom[1] for other in in_all_phases(net, layer)
                 if len(other.bottom) > 1), "label")


def find_ignored(net, layer):
    """The ignore_label, which the layer may have in training alone; or None."""
    params = (other.largemargin_inner_product_param
              for other in in_all_phases(net, layer))
    return next((param.ignore_label for param in params
                 if param.HasField("ignore_label")), None)


def check_classes(pb, net, path, layer):
    """Raises UserError where another layer with weights follows on layer:
    what that one has are no class weights."""
    made = None
    for other in net.layer:
        if not caffe_proto.in_phase(pb, net, other, pb.TEST):
            continue
        if other.name == layer.name:
            made = set(layer.top)
        elif made and made.intersection(other.bottom):
            if other.type in WITH_WEIGHTS:
                raise UserError("layer \"%s\" of %s has no class weights: "
                                "\"%s\" goes on from it"
                                % (layer.name, path, other.name))
            made.update(other.top)


def check_sources(pb, net):
    """Goes to the folder from which the data of the net are found.

    Raises UserError where an LMDB is none: Caffe would not name it.
    """
    sources = [getattr(layer, field).source for layer in net.layer
               for field in ("data_param", "image_data_param",
                             "hdf5_data_param")
               if getattr(layer, field).source]
    for source in sources:
        if not os.path.exists(source):
            if not caffe_proto.found(source):
                raise UserError("the net takes its data from %s, which is not "
                                "there" % source)
            os.chdir(ROOT)
    for layer in net.layer:
        param = layer.data_param
        if param.source and param.backend == pb.DataParameter.LMDB and \
                not lmdb_file.entries(param.source):
            raise UserError("the LMDB %s is empty" % param.source)


# ---- Angles ----

class Angles:
    """Angles in degrees of samples to their own class and the nearest other.

    skipped counts the samples left out: without a label of a class, with the
    one that is ignored, or with features of zeros.
    """

    def __init__(self, rows, labels, weights, ignored=None):
        rows, weights = (np.asarray(array, np.float64)
                         for array in (rows, weights))
        good = ((labels >= 0) & (labels < len(weights))
                & (labels == np.floor(labels)) & rows.any(axis=1))
        if ignored is not None:
            good &= labels != ignored
        self.skipped = int(np.sum(~good))
        rows, labels = rows[good], labels[good].astype(int)
        lengths = np.linalg.norm(weights, axis=1)
        cosine = rows @ (weights / np.where(lengths > 0, lengths, 1)[:, None]
                         ).T / np.linalg.norm(rows, axis=1)[:, None]
        angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
        index = np.arange(len(rows))
        self.own = angle[index, labels]
        angle[index, labels] = np.inf
        self.other = angle.min(axis=1)

    def gap(self):
        """How much farther the nearest other class is."""
        return self.other - self.own


def sample(net, blobs, iterations, progress):
    """The values of blobs in that many batches, each as one array."""
    found = [[] for _ in blobs]
    for done in range(iterations):
        net.forward()
        for values, blob in zip(found, blobs):
            values.append(net.blobs[blob].data.copy())
        progress.show(lambda: "    %d/%d batches" % (done + 1, iterations))
    return [np.concatenate(values) for values in found]


def describe(pb, model, layer):
    """(m as text, lambda at the end or None) of what the model was.

    The text is empty where the model does not tell.
    """
    if caffe_model.is_hdf5(model):  # which has no parameters
        return "", None
    for candidate in caffe_model.read_net(pb, model).layer:
        if candidate.name != layer:
            continue
        if candidate.type != "LargeMarginInnerProduct":
            return "softmax", None
        param = candidate.largemargin_inner_product_param
        m = caffe_proto.margin(param)
        if m == 1:
            return "softmax (m = 1)", None
        return "m = %d" % m, (
            caffe_proto.lambda_after(param, param.passes)
            if param.HasField("passes") else None)
    return "", None


def panel_name(model, what):
    """The name of a model's panel; what it was may be empty."""
    return figures.shortened(model, 50) + (what and ": " + what)


def draw(panels, title):
    """A figure of (name, Angles), one below the other."""
    figure, axes = plt.subplots(len(panels), 1, sharex=True, sharey=True,
                                squeeze=False, constrained_layout=True,
                                figsize=(8, 1 + 2.4 * len(panels)))
    last = max(angles.other.max() for _, angles in panels)
    bins = np.arange(0, min(180, last + 2) + 1, 1.5)
    for axis, (name, angles) in zip(axes[:, 0], panels):
        for label, values, colour in (
                ("own class", angles.own, figures.COLOURS[0]),
                ("nearest other class", angles.other, figures.COLOURS[1])):
            axis.hist(values, bins, alpha=0.6, color=colour, label=label,
                      weights=np.full(len(values), 100 / len(values)))
            axis.axvline(np.median(values), color=colour, linewidth=1)
        axis.set_ylabel("% of samples")
        axis.set_title("%s, median gap %.1f degrees" % (
            name, np.median(angles.gap())), fontsize="medium")
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center")
    axes[-1, 0].set_xlabel("angle between features and class weights, degrees")
    figure.suptitle(figures.shortened(title))
    return figure


def run(args):
    pb = caffe_proto.load()
    net, iterations = read(pb, args.net)
    iterations = args.iterations or iterations or BATCHES
    layer = find_layer(pb, net, args.net, args.layer)
    check_classes(pb, net, args.net, layer)
    label = args.label or find_label(net, layer)
    ignored = find_ignored(net, layer)
    blobs = [layer.bottom[0], label]
    # The whole layer is kept for its weights.
    cut = features.cut(pb, net, [layer.top[0], *blobs], args.net)
    models = [os.path.abspath(model) for model in args.models]
    output = os.path.abspath(args.output or os.path.splitext(
        os.path.basename(args.net))[0] + "_angles.png")
    check_sources(pb, cut)
    caffe = features.start_pycaffe()
    progress = runs.Progress()
    panels = []
    for shown, model in zip(args.models, models):
        caffe_net.about("%s with %s" % (args.net, shown))
        trained = features.load_net(caffe, cut,
                                    caffe_model.read(pb, model))
        weights = trained.params[layer.name][0].data
        rows, labels = sample(trained, blobs, iterations, progress)
        rows = rows.reshape(len(labels.ravel()), -1)
        if rows.shape[1] != weights.shape[-1]:
            raise UserError("layer \"%s\": features of %d numbers do not fit "
                            "class weights of %s" % (
                                layer.name, rows.shape[1],
                                " x ".join(map(str, weights.shape))))
        if not np.isfinite(rows).all():
            raise UserError("the features of %s are not finite" % shown)
        angles = Angles(rows, labels.ravel(), weights, ignored)
        if not len(angles.own):
            raise UserError("%s: no sample has features and a label of the %d "
                            "classes" % (shown, len(weights)))
        name, last = describe(pb, model, layer.name)
        panels.append((panel_name(shown, name), angles))
        progress.say(shown + (name and ": " + name) + (
            "" if last is None else ", lambda %.3g at the end" % last))
        print("    %d samples%s: own class %.1f, nearest other class %.1f "
              "degrees (medians); median gap %.1f" % (
                  len(angles.own), " (%d without a class or with features of "
                  "zeros left out)" % angles.skipped if angles.skipped else
                  "", np.median(angles.own), np.median(angles.other),
                  np.median(angles.gap())), flush=True)
        del trained
    figures.save(draw(panels, args.title or os.path.basename(args.net)),
                 output)


def main():
    with user_errors():
        run(parse_args())


if __name__ == "__main__":
    main()
