#!/usr/bin/env python3
"""Times the layers beside Caffe's own, with `caffe time`.

With --old, a folder with another build's libcaffe.so, the layers are timed
beside those of that build instead, in processes of their own, in turns.

A ratio of two timings is only fair when both saw the same machine. So both
layers stand in one net, on the same input, and `caffe time` runs them in turns
and averages the forward and the backward pass of each. It does so ROUNDS
times, with the one or the other layer first; each round gives one ratio, and
the table has the median and the range of the ratios.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile

ROUNDS = 20
# About how long the measured layers work in one round, in milliseconds.
ROUND_MS = 1000


def shape(*dims):
    return "shape { %s }" % " ".join("dim: %d" % d for d in dims)


def dummy(name, dims, filler):
    return """
layer {
  name: "%s" type: "DummyData" top: "%s"
  dummy_data_param { %s data_filler { %s } }
}
""" % (name, name, shape(*dims), filler)


def margin_net(samples, features, classes):
    """Returns the margin layer and InnerProduct, each with a softmax loss."""
    data = dummy("x", (samples, features), 'type: "gaussian"')
    # A filler gives one label to all it fills: many of them mix the classes.
    parts = min(samples, classes, 64)
    sizes = [samples // parts + (i < samples % parts) for i in range(parts)]
    data += "".join(
        dummy("label%d" % i, (size,), 'type: "constant" value: %d'
              % (i * classes // parts)) for i, size in enumerate(sizes))
    data += """
layer { name: "label" type: "Concat" top: "label" %s concat_param { axis: 0 } }
""" % " ".join('bottom: "label%d"' % i for i in range(parts))
    param = 'num_output: %d weight_filler { type: "xavier" }' % classes
    loss = """
layer {
  name: "loss_%s" type: "SoftmaxWithLoss" bottom: "%s" bottom: "label"
  top: "loss_%s" propagate_down: true propagate_down: false
}
"""
    ours = """
layer {
  name: "ours" type: "LargeMarginInnerProduct" bottom: "x" bottom: "label"
  top: "ours" propagate_down: true propagate_down: false
  largemargin_inner_product_param { %s type: QUADRUPLE base: 10 }
}
""" % param + loss % (("ours",) * 3)
    theirs = """
layer {
  name: "theirs" type: "InnerProduct" bottom: "x" top: "theirs"
  inner_product_param { %s bias_term: false }
}
""" % param + loss % (("theirs",) * 3)
    return data, ours, theirs


def batch_norm_net(*dims):
    """Returns BN, and BatchNorm with Scale, in place as nets have them."""
    data = dummy("x", dims, 'type: "gaussian"')

    def branch(name, layers):
        return """
layer { name: "in_%s" type: "Power" bottom: "x" top: "%s" }
%s
layer {
  name: "loss_%s" type: "Reduction" bottom: "%s" top: "loss_%s"
  reduction_param { operation: SUMSQ } loss_weight: 1
}
""" % (name, name, layers, name, name, name)

    ours = branch("ours", """
layer { name: "ours" type: "BN" bottom: "ours" top: "ours" }
""")
    theirs = branch("theirs", """
layer { name: "theirs" type: "BatchNorm" bottom: "theirs" top: "theirs" }
layer {
  name: "theirs2" type: "Scale" bottom: "theirs" top: "theirs"
  scale_param { bias_term: true }
}
""")
    return data, ours, theirs


def control_net(samples, features, classes):
    """InnerProduct against itself: how far from 1 is the machine's doing."""
    data, _, theirs = margin_net(samples, features, classes)
    return data, theirs.replace("theirs", "ours"), theirs


CASES = [
    # title, net, budget of the ratio, budget of the milliseconds more
    ("InnerProduct / InnerProduct, (128, 512, 1000), as a control",
     control_net(128, 512, 1000), None, None),
    ("LargeMarginInnerProduct / InnerProduct, (M, K, N) = (128, 512, 10)",
     margin_net(128, 512, 10), None, 0.015),
    ("LargeMarginInnerProduct / InnerProduct, (128, 512, 1000)",
     margin_net(128, 512, 1000), 1.05, None),
    ("LargeMarginInnerProduct / InnerProduct, (256, 512, 10572)",
     margin_net(256, 512, 10572), 1.03, None),
    ("LargeMarginInnerProduct / InnerProduct, (128, 512, 85742)",
     margin_net(128, 512, 85742), 1.01, None),
    ("LargeMarginInnerProduct / InnerProduct, a dense head (65536, 64, 21)",
     margin_net(65536, 64, 21), None, None),
    ("BN / (BatchNorm + Scale), (128, 64, 28, 28)",
     batch_norm_net(128, 64, 28, 28), 0.33, None),
    ("BN / (BatchNorm + Scale), (128, 512)",
     batch_norm_net(128, 512), None, None),
]


def time_net(caffe, folder, parts, iterations, libraries=None):
    """Milliseconds of forward and backward, of ours and of theirs; with the
    libcaffe.so of the folder `libraries`."""
    path = os.path.join(folder, "net.prototxt")
    with open(path, "w") as net:
        net.write("force_backward: true" + "".join(parts))
    env = dict(os.environ, GLOG_logtostderr="1", GLOG_minloglevel="0")
    if libraries:
        env["LD_LIBRARY_PATH"] = libraries
    done = subprocess.run(
        [caffe, "time", "--model=" + path, "--iterations=%d" % iterations],
        env=env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    times = re.findall(
        r"\] +(ours|theirs)2?\t(?:forward|backward): (\S+) ms\.",
        done.stdout)
    found = [[float(time) for who, time in times if who == name]
             for name in ("ours", "theirs")]
    if done.returncode != 0 or len(found[0]) != 2 or not found[1]:
        sys.exit("%s\nbenchmark: error: `caffe time` failed; its log is above"
                 % done.stdout)
    return [sum(times) for times in found]


def measure(args, folder, data, ours, theirs):
    """[(milliseconds of ours, of theirs)], one pair a round; with --old, of
    ours in both builds."""
    both = sum(time_net(args.caffe, folder, (data, ours, theirs), 3))
    iterations = int(min(1000, max(3, ROUND_MS / both)))
    pairs = []
    for number in range(args.rounds):
        layers = (theirs, ours) if number % 2 else (ours, theirs)
        parts = (data, *layers)
        if args.old:
            turns = (args.old, None) if number % 2 else (None, args.old)
            took = {turn: time_net(args.caffe, folder, parts, iterations,
                                   turn)[0] for turn in turns}
            pairs.append((took[None], took[args.old]))
        else:
            pairs.append(time_net(args.caffe, folder, parts, iterations))
        print(".", end="", file=sys.stderr, flush=True)
    return pairs


def spread(values, form):
    return "%s (%s to %s)" % tuple(
        form % v for v in (statistics.median(values), min(values),
                           max(values)))


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caffe", help="the caffe tool")
    parser.add_argument("--old", metavar="FOLDER",
                        help="of another build's libcaffe.so")
    parser.add_argument("--rounds", type=int, default=ROUNDS,
                        help="default: %(default)s")
    return parser.parse_args()


def main():
    args = parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (title, net, ratio, more) in enumerate(CASES, 1):
            print("[%d/%d] %s " % (number, len(CASES), title), end="",
                  file=sys.stderr, flush=True)
            pairs = measure(args, folder, *net)
            print(file=sys.stderr)
            ours, theirs = zip(*pairs)
            budget = "-"
            if args.old:
                budget = "ratio <= 1"
            elif ratio is not None:
                budget = "ratio <= %g" % ratio
            elif more is not None:
                budget = "<= %g ms more" % more
            rows.append((title, "%.3f" % statistics.median(ours),
                         "%.3f" % statistics.median(theirs),
                         spread([a / b for a, b in pairs], "%.3f"),
                         spread([a - b for a, b in pairs], "%+.3f"), budget))
    print("\nForward and backward on %d CPUs, %d rounds: median (min to max). "
          "Load average at the end: %.1f.\n"
          % (os.cpu_count(), args.rounds, os.getloadavg()[0]))
    head = ("layers", "ours, ms", "old, ms" if args.old else "Caffe's, ms", "ratio", "ms more", "budget")
    for row in (head, ("---",) * len(head), *rows):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
