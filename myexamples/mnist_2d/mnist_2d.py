#!/usr/bin/python3
"""Trains nets with 2-D features for m = 1, 2, 3, 4 and draws the features.

A panel each: the features of the test images, coloured by class, and the
class weights as rays. This is the picture on the paper's front page.
"""
import argparse
import os
import sys

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))
import caffe_proto  # noqa: E402
import runs  # noqa: E402

MARGINS = [1, 2, 3, 4]
SOLVER = os.path.join(HERE, "mnist_2d_solver.prototxt")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--solver", default=SOLVER, metavar="SOLVER",
                        help="default: mnist_2d_solver.prototxt")
    parser.add_argument("-o", "--output", metavar="FOLDER",
                        default=os.path.join(HERE, "runs"),
                        help="default: myexamples/mnist_2d/runs")
    parser.add_argument("-t", "--title", default="", help="above the panels")
    parser.add_argument("-j", "--jobs", type=int, metavar="N",
                        default=os.cpu_count(),
                        help="nets trained at once (default: one a core)")
    parser.add_argument("-s", "--seeds", type=int, default=3, metavar="N",
                        help="runs of each margin (default: 3)")
    args = parser.parse_args()
    if args.seeds < 1 or args.jobs < 1:
        parser.error("seeds and jobs are at least 1")
    return args


def load_pycaffe():
    """pycaffe, without its log on the screen."""
    os.environ.setdefault("GLOG_minloglevel", "2")
    caffe_root = os.environ.get("CAFFE_ROOT") or os.path.join(
        caffe_proto.ROOT, "build", "caffe")
    sys.path.insert(0, os.path.join(caffe_root, "python"))
    try:
        import caffe
    except ImportError as error:
        raise caffe_proto.UserError("cannot load pycaffe from %s/python: %s"
                                    % (caffe_root, error))
    return caffe


def test_features(caffe, run):
    """(features, labels, class weights) of a trained net on its test set."""
    os.chdir(caffe_proto.ROOT)
    caffe.set_mode_cpu()
    net = caffe.Net(run.solver.net, caffe.TEST, weights=run.model)
    features, labels = [], []
    for _ in range(run.solver.test_iter[0]):
        net.forward()
        features.append(net.blobs["feature"].data.copy())
        labels.append(net.blobs["label"].data.copy())
    return (np.concatenate(features), np.concatenate(labels).astype(int),
            net.params["ip2"][0].data.copy())


def draw(panels, title):
    """A figure of (margin, accuracy, features, labels, weights)."""
    figure, axes = plt.subplots(1, len(panels), squeeze=False,
                                figsize=(4 * len(panels), 4.5),
                                constrained_layout=True)
    colours = plt.get_cmap("tab10")
    for axis, (margin, accuracy, features, labels, weights) in zip(
            axes[0], panels):
        axis.scatter(features[:, 0], features[:, 1], s=1, alpha=0.5,
                     c=labels, cmap=colours, vmin=-0.5, vmax=9.5,
                     rasterized=True)
        # A few features far out must not make the rest a dot.
        reach = np.percentile(np.abs(features), 99.5) * 1.1
        for label, weight in enumerate(weights):
            end = weight / np.linalg.norm(weight) * reach
            axis.plot([0, end[0]], [0, end[1]], color=colours(label),
                      linewidth=1.5)
            axis.annotate(str(label), end, ha="center", va="center",
                          fontsize=8, bbox=dict(boxstyle="circle",
                                                fc="white",
                                                ec=colours(label)))
        axis.set_xlim(-reach * 1.1, reach * 1.1)
        axis.set_ylim(-reach * 1.1, reach * 1.1)
        axis.set_aspect("equal")
        axis.set_title("%s, test accuracy %.2f %%" % (
            "softmax (m = 1)" if margin == 1 else "m = %d" % margin,
            100 * accuracy))
    figure.suptitle(title)
    return figure


def run_all(args):
    pb = caffe_proto.load()
    output = os.path.abspath(args.output)
    all_runs = [runs.Run(pb, args.solver, os.path.join(
        output, "m%d_seed%d" % (m, seed)), m, seed)
        for seed in range(1, args.seeds + 1) for m in MARGINS]
    runs.train_all(all_runs, args.jobs)
    caffe = load_pycaffe()
    figure = draw([(run.margin, run.accuracy()) + test_features(caffe, run)
                   for run in all_runs if run.seed == 1], args.title)
    png = os.path.join(output, "features.png")
    figure.savefig(png, dpi=100)
    for run in all_runs[:len(MARGINS)]:
        print("m = %d: test accuracy %.4f, model %s" % (
            run.margin, run.accuracy(), run.model))
    print("plot: %s" % png)


def main():
    try:
        run_all(parse_args())
    except caffe_proto.UserError as error:
        sys.exit("error: %s" % error)
    except OSError as error:
        sys.exit("error: cannot write: %s" % error)
    except KeyboardInterrupt:
        sys.exit("stopped; run this again to go on")


if __name__ == "__main__":
    main()
