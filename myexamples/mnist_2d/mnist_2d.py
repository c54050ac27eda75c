#!/usr/bin/python3
"""Trains nets with 2-D features for m = 1, 2, 3, 4 and draws the features.

The picture on the paper's front page: a column for each m, the training images
in the upper row and the test images in the lower one, coloured by class, the
class weights as rays. Several seeds are trained; the picture shows the first,
and a Markdown table the test accuracy of all, beside the paper's.
train_2d.sh gets what it needs.
"""
import io
import os
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))
# First: Ctrl-C is quiet from here on.
import caffe_proto  # noqa: E402

import numpy as np  # noqa: E402
from matplotlib.patheffects import withStroke  # noqa: E402
from PIL import Image  # noqa: E402  (matplotlib needs it too)

import caffe_net  # noqa: E402
import runs  # noqa: E402
from features import start_pycaffe  # noqa: E402
from figures import plt  # noqa: E402

SCRIPT = "myexamples/mnist_2d/train_2d.sh"
SOLVER = os.path.join(HERE, "mnist_2d_solver.prototxt")
# Test accuracy in percent, from figure 2 of the paper.
PAPER = {1: 98.45, 2: 98.96, 3: 99.22, 4: 99.34}


def parse_args():
    options = runs.parser(__doc__, SOLVER, os.path.join(HERE, "runs"), seeds=3)
    options.add_argument("-t", "--title", help="above the panels (default: "
                         "names the images)")
    return runs.parse(options)


class Features:
    """What a trained net makes of a set of images."""

    def __init__(self, net, count):
        features, labels, self.accuracy = [], [], 0.0
        while sum(map(len, labels)) < count:
            net.forward()
            features.append(net.blobs["feature"].data.copy())
            labels.append(net.blobs["label"].data.astype(int))
            self.accuracy += float(net.blobs["accuracy"].data)
        self.accuracy /= len(labels)
        self.features = np.concatenate(features)
        self.labels = np.concatenate(labels)
        self.weights = net.params["ip2"][0].data.copy()


def features_of(caffe, pb, run):
    """(training, test) Features of a run, both as in the TEST phase.

    Of the training images, as many as there are of the others.
    """
    from google.protobuf import text_format
    sources = {layer.include[0].phase: layer.data_param
               for layer in run.net.layer if layer.type == "Data"}
    net_proto = pb.NetParameter()
    net_proto.CopyFrom(run.net)
    for layer in net_proto.layer:
        if layer.type == "Data" and layer.include[0].phase == pb.TEST:
            layer.data_param.source = sources[pb.TRAIN].source
    on_training = os.path.join(run.path, "on_training_images.prototxt")
    with open(on_training, "w") as file:
        file.write(text_format.MessageToString(net_proto))
    found = []
    for path in (on_training, os.path.join(run.path, "net.prototxt")):
        caffe_net.about(path)
        net = caffe.Net(path, caffe.TEST, weights=run.model)
        found.append(Features(
            net, run.solver.test_iter[0] * sources[pb.TEST].batch_size))
    return found


def draw_panel(axis, found, colours):
    """The features of a set of images, and the class weights as rays."""
    features, labels = found.features, found.labels
    # A few features far out must not make the rest a dot.
    reach = np.percentile(np.linalg.norm(features, axis=1), 99.8) * 1.05
    for label, weight in enumerate(found.weights):
        end = weight / np.linalg.norm(weight) * reach
        axis.plot([0, end[0]], [0, end[1]], color=colours(label),
                  linewidth=0.8, alpha=0.8, zorder=1)
        axis.annotate(str(label), end * 1.1, ha="center", va="center",
                      fontsize=9, fontweight="bold", color=colours(label),
                      path_effects=[withStroke(linewidth=2,
                                               foreground="white")])
    axis.scatter(features[:, 0], features[:, 1], s=1.5, linewidths=0,
                 c=labels, cmap=colours, vmin=-0.5, vmax=9.5,
                 rasterized=True, zorder=2)
    axis.set_xlim(-reach * 1.2, reach * 1.2)
    axis.set_ylim(-reach * 1.2, reach * 1.2)
    axis.set_aspect("equal")
    axis.tick_params(labelsize=7, length=2)
    axis.locator_params(nbins=5)


def draw(panels, title, paper):
    """A figure of (margin, training Features, test Features).

    paper maps margins to the test accuracies to name beside ours.
    """
    figure, axes = plt.subplots(2, len(panels), squeeze=False,
                                figsize=(3 * len(panels), 6.9),
                                constrained_layout=True)
    colours = plt.get_cmap("tab10")
    for column, (margin, training, test) in zip(axes.T, panels):
        column[0].set_title("softmax (m = 1)" if margin == 1
                            else "L-Softmax, m = %d" % margin)
        draw_panel(column[0], training, colours)
        column[0].set_xlabel("training accuracy %.2f %%"
                             % (100 * training.accuracy))
        draw_panel(column[1], test, colours)
        column[1].set_xlabel("test accuracy %.2f %%%s" % (
            100 * test.accuracy, "\n(paper: %.2f %%)" % paper[margin]
            if margin in paper else ""))
    for axis, found, name in zip(axes[:, 0], panels[0][1:],
                                 ("training", "test")):
        axis.set_ylabel("{:,} {} images".format(len(found.labels), name))
    figure.suptitle(title)
    return figure


def save(figure, png):
    """Writes a figure; with a palette it takes a third of the place."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    Image.open(buffer).convert("RGB").quantize(
        128, dither=Image.NONE).save(png, optimize=True)


def print_table(all_runs, margins, paper):
    """The accuracy of each margin over the seeds."""
    print("| m | test accuracy, mean (%%) | standard deviation | runs |%s"
          % (" the paper's |" if paper else ""))
    print("|---|---|---|---|%s" % ("---|" if paper else ""))
    for margin in margins:
        found = [100 * run.accuracy() for run in all_runs
                 if run.margin == margin]
        print("| %d | %.2f | %s | %s |%s" % (
            margin, statistics.mean(found),
            "%.2f" % statistics.stdev(found) if len(found) > 1 else "-",
            " ".join("%.2f" % value for value in found),
            " %s |" % ("%.2f" % paper[margin] if margin in paper else "-")
            if paper else ""))


def run_all(args):
    pb = caffe_proto.load()
    output = os.path.abspath(args.output)
    all_runs = runs.of_each(args, lambda name, margin, seed: runs.Run(
        pb, args.solver, os.path.join(output, name), margin, seed))
    runs.train_all(all_runs, args.jobs, SCRIPT)
    first = all_runs[:len(args.margins)]
    images = first[0].dataset() or "images of your own"
    paper = PAPER if images == "MNIST" else {}
    caffe = start_pycaffe()
    # Where the paths of the nets are meant from.
    os.chdir(caffe_proto.ROOT)
    caffe.set_mode_cpu()
    panels = []
    for run in first:
        print("drawing m = %d" % run.margin, flush=True)
        training, test = features_of(caffe, pb, run)
        # As in the table. The model may differ in the last digit: before
        # Caffe's last test, a forward pass moves BN's statistics once more.
        test.accuracy = run.accuracy()
        panels.append((run.margin, training, test))
    figure = draw(panels, args.title or "2-D features of %s" % images, paper)
    png = os.path.join(output, "features.png")
    save(figure, png)
    for run in first:
        print("m = %d: test accuracy %.4f, model %s" % (
            run.margin, run.accuracy(), run.model))
    print_table(all_runs, args.margins, paper)
    print("plot (of seed 1): %s" % png)


def main():
    with runs.errors():
        run_all(parse_args())


if __name__ == "__main__":
    main()
