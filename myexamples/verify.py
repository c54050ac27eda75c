#!/usr/bin/python3
"""Judges a net by verification: do two images show the same person?

Takes the features of every image in a list of pairs from the blob NAME of the
net, compares each pair by the cosine of its features, and reports

- the accuracy over ten folds as LFW's protocol has it: in each fold with the
  threshold that is best on the nine others; its mean and standard error;
- the equal error rate (EER), where as many pairs of different persons are
  accepted as pairs of the same person are refused;
- the true accept rate (TAR) at given false accept rates (FAR);

and draws the ROC curve.

PAIRS is LFW's pairs.txt (the number of folds and of pairs in each; then lines
NAME I J and NAME I NAME J, which mean NAME/NAME_000I.jpg under --root), one of
its pairsDev*.txt, or a list of lines PATH PATH 1 (same) or PATH PATH 0
(different); paths with spaces are set apart by tabs.

NET is the net's prototxt, for training or for deployment. Its images go
through what its data layer in the TEST phase says (mean, scale, crop), or what
export_deploy.py wrote into its net's comments; the options replace that. Other
deploy nets say nothing of mean and scale.
"""
import argparse
import math
import os

# First: Ctrl-C is quiet from here on.
import caffe_proto

import matplotlib.pyplot as plt
import numpy as np

import caffe_net
import features
import figures
import runs
from caffe_proto import UserError, user_errors

FOLDS = 10
FARS = [0.01, 0.001]


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", metavar="NET")
    parser.add_argument("model", metavar="MODEL", help=".caffemodel")
    parser.add_argument("pairs", metavar="PAIRS")
    parser.add_argument("--blob", metavar="NAME", required=True,
                        help="the blob with the features")
    parser.add_argument("--root", metavar="FOLDER", help="where the images "
                        "are (default: the folder of PAIRS)")
    parser.add_argument("--extension", metavar="EXT", default="jpg",
                        help="of the images of LFW's lists (default: jpg)")
    parser.add_argument("--size", metavar="N", type=int, nargs="+",
                        help="height and width that an image is scaled to; a "
                        "net with a smaller input takes its middle (default: "
                        "the net's input, or new_height and new_width of "
                        "ImageData; else the image is left as it is)")
    parser.add_argument("--mean", metavar="MEAN", nargs="+",
                        help="one value, one a channel in the net's order, or "
                        "a .binaryproto")
    parser.add_argument("--scale", type=float, metavar="S",
                        help="what pixels are multiplied with after the mean "
                        "is taken away")
    colour = parser.add_mutually_exclusive_group()
    colour.add_argument("--gray", action="store_const", const=1,
                        dest="channels", help="the net takes one channel")
    colour.add_argument("--color", action="store_const", const=3,
                        dest="channels", help="the net takes three channels "
                        "(default: what the net says, or the weights)")
    parser.add_argument("--order", choices=["bgr", "rgb"], default="bgr",
                        help="of the three channels (default: bgr, as Caffe's "
                        "own tools have it)")
    parser.add_argument("--flip", action="store_true", help="average the "
                        "features of an image and of its mirror image")
    parser.add_argument("--far", metavar="FAR", type=float, nargs="+",
                        default=FARS, help="default: 0.01 0.001")
    parser.add_argument("--batch", metavar="N", type=int, default=64,
                        help="images at once (default: 64)")
    parser.add_argument("--gpu", metavar="ID", type=int,
                        help="run the net on this GPU (default: on the CPU)")
    parser.add_argument("-o", "--output", metavar="PNG", help="default: the "
                        "name of PAIRS with _roc.png, in this folder")
    args = parser.parse_args()
    if args.scale is not None and not (args.scale and
                                       math.isfinite(args.scale)):
        parser.error("--scale %g: it must be a finite number other than 0"
                     % args.scale)
    if args.batch < 1:
        parser.error("--batch is at least 1")
    if args.size and (len(args.size) > 2 or min(args.size) < 1):
        parser.error("--size takes the height and the width, or one number "
                     "for both")
    if not all(0 < far < 1 for far in args.far):
        parser.error("--far takes rates between 0 and 1")
    return args


# ---- Lists of pairs ----

class Pairs:
    """Pairs of image files.

    first and second hold indices into paths; same tells whether a pair is
    one; fold is the fold of each, or None where the list has no folds.
    """

    def __init__(self, entries, folds=None):
        index = {}
        self.first, self.second = (
            np.array([index.setdefault(entry[side], len(index))
                      for entry in entries]) for side in (0, 1))
        self.paths = list(index)
        self.same = np.array([entry[2] for entry in entries])
        self.fold = folds


def read_pairs(path, root=None, extension="jpg"):
    """The Pairs of a list in one of the two forms."""
    root = os.path.dirname(path) if root is None else root
    try:
        # Editors of Windows begin a file with a mark, which is no name's.
        with open(path, encoding="utf-8-sig") as file:
            lines = [(number, line.strip("\r\n"))
                     for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("cannot read %s: %s" % (path, error))
    if not lines:
        raise UserError("%s has no pairs" % path)
    head = lines[0][1].split()
    if len(head) <= 2 and all(word.isdecimal() for word in head):
        folds, count = map(int, head) if len(head) == 2 else (1, int(head[0]))
        pairs = _read_lfw(path, lines[1:], folds, count, root, extension)
    else:
        pairs = Pairs([_plain(path, number, line, root)
                       for number, line in lines])
    for kind in (True, False):
        if kind not in pairs.same:
            raise UserError("%s has no pair of %s: nothing can be told from "
                            "it" % (path, "the same person" if kind
                                    else "different persons"))
    return pairs


def _plain(path, number, line, root):
    words = line.split("\t") if "\t" in line else line.split()
    words = [word.strip() for word in words]
    if len(words) != 3 or words[2] not in ("0", "1"):
        raise UserError("%s:%d: expected PATH PATH 0 or PATH PATH 1, found "
                        "\"%s\"" % (path, number, line))
    return (os.path.join(root, words[0]), os.path.join(root, words[1]),
            words[2] == "1")


def _read_lfw(path, lines, folds, count, root, extension):
    if len(lines) != 2 * folds * count:
        raise UserError("%s has %d pairs where its first line says %d (%d "
                        "fold%s of %d pairs of the same person and as many of "
                        "different persons)" % (
                            path, len(lines), 2 * folds * count, folds,
                            "s"[folds == 1:], count))

    def image(name, number):
        return os.path.join(root, name, "%s_%04d.%s" % (
            name, int(number), extension.lstrip(".")))

    entries = []
    for i, (number, line) in enumerate(lines):
        words, same = line.split(), i // count % 2 == 0
        if same and len(words) == 3:
            words.insert(2, words[0])
        elif same or len(words) != 4:
            words = []
        if not words or not (words[1] + words[3]).isdecimal():
            raise UserError("%s:%d: expected %s, found \"%s\"" % (
                path, number, "NAME I J" if same else "NAME I NAME J", line))
        entries.append((image(*words[:2]), image(*words[2:]), same))
    return Pairs(entries, np.arange(len(entries)) // (2 * count)
                 if folds > 1 else None)


# ---- Judging ----

def cosines(rows, first, second):
    """The cosine of rows[first[i]] and rows[second[i]] for each i.

    It is 0 with a row of zeros, as that has no direction.
    """
    rows = normalised(rows)
    result = np.empty(len(first))
    for start in range(0, len(first), 65536):
        part = slice(start, start + 65536)
        result[part] = np.einsum("ij,ij->i", rows[first[part]],
                                 rows[second[part]])
    return result


def normalised(rows):
    """rows with a length of 1 each; those of zeros stay."""
    rows = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


class Roc:
    """The ROC curve of scores: rates at every threshold, in falling order.

    A pair is accepted where its score is at least the threshold.
    """

    def __init__(self, scores, same):
        metrics = load_sklearn("metrics")
        self.far, self.tar, self.thresholds = metrics.roc_curve(
            same, scores, drop_intermediate=False)

    def eer(self):
        """The rate at which FAR and 1 - TAR cross."""
        # From one threshold to the next both rates are taken as straight.
        gap = self.far - (1 - self.tar)
        after = int(np.argmax(gap >= 0))
        before = after - 1
        part = -gap[before] / (gap[after] - gap[before])
        return self.far[before] + part * (self.far[after] - self.far[before])

    def tar_at(self, far):
        """The largest TAR whose FAR is at most far, a number or an array."""
        return self.tar[np.searchsorted(self.far, far, side="right") - 1]


def best_threshold(scores, same):
    """The threshold with the highest accuracy, between two scores."""
    roc = Roc(scores, same)
    right = roc.tar * np.sum(same) + (1 - roc.far) * np.sum(~same)
    best = int(np.argmax(right))
    here = min(roc.thresholds[best], 1 + roc.thresholds[1])
    if best + 1 == len(roc.thresholds):
        return here
    return (here + roc.thresholds[best + 1]) / 2


def fold_numbers(same):
    """The fold of each pair: in order, each with as many of either kind.

    None where there are fewer pairs of a kind than folds. For a list in the
    order of LFW's, these are LFW's folds.
    """
    if min(np.sum(same), np.sum(~same)) < FOLDS:
        return None
    selection = load_sklearn("model_selection")
    fold = np.empty(len(same), int)
    split = selection.StratifiedKFold(FOLDS).split(same, same)
    for number, (_, members) in enumerate(split):
        fold[members] = number
    return fold


def fold_accuracies(scores, same, fold):
    """(accuracies, thresholds), the latter chosen on the other folds."""
    accuracies, thresholds = [], []
    for number in np.unique(fold):
        test = fold == number
        thresholds.append(best_threshold(scores[~test], same[~test]))
        accuracies.append(np.mean(
            (scores[test] >= thresholds[-1]) == same[test]))
    return np.array(accuracies), np.array(thresholds)


def load_sklearn(name):
    """A module of scikit-learn."""
    import importlib
    try:
        return importlib.import_module("sklearn." + name)
    except ImportError:
        raise UserError("scikit-learn is missing: install python3-sklearn "
                        "(Debian) or scikit-learn (PyPI)")


def percent(rate):
    return "%.4g %%" % (100 * rate)


def false_rates(lowest):
    """The false accept rates that a curve is drawn at."""
    return np.logspace(np.log10(lowest), 0, 300)


def draw_roc(axis, rates, curves):
    """TAR over FAR; curves are (label, list of arrays of TARs at rates).

    Where a curve has several arrays, it is their mean, with their range.
    """
    for label, tars in curves:
        tars = np.array(tars)
        line, = axis.plot(rates, tars.mean(axis=0), label=label)
        if len(tars) > 1:
            axis.fill_between(rates, tars.min(axis=0), tars.max(axis=0),
                              color=line.get_color(), alpha=0.2, linewidth=0)
    axis.plot(rates, 1 - rates, color="gray", linewidth=0.8, linestyle=":",
              label="FAR = 1 - TAR")
    axis.set_xscale("log")
    axis.set_xlim(rates[0], 1)
    axis.set_xlabel("false accept rate (FAR)")
    axis.set_ylabel("true accept rate (TAR)")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")


# ---- The tool ----

def set_options(pb, args, preprocessing):
    """Puts the options over what the net says."""
    if args.channels:
        preprocessing.channels = args.channels
    if preprocessing.channels not in (1, 3):
        raise UserError("%s does not tell whether its images are grey or in "
                        "colour: give --gray or --color" % args.net)
    if args.size:
        preprocessing.size = (args.size[0], args.size[-1])
    if args.scale is not None:
        preprocessing.scale = args.scale
    preprocessing.rgb = args.order == "rgb"
    if args.mean:
        try:
            preprocessing.mean = np.array(args.mean, np.float32)
        except ValueError:
            if len(args.mean) > 1:
                raise UserError("--mean %s: neither numbers nor one file"
                                % " ".join(args.mean))
            preprocessing.set_mean_file(pb, args.mean[0])
        if not np.isfinite(preprocessing.mean).all():
            raise UserError("--mean %s: it must be finite"
                            % " ".join(args.mean))
    preprocessing.check()


def run(args):
    pb = caffe_proto.load()
    load_sklearn("metrics")
    pairs = read_pairs(args.pairs, args.root, args.extension)
    missing = [path for path in pairs.paths if not os.path.exists(path)]
    if missing:
        raise UserError("no such image: %s (%d of %d are missing; --root and "
                        "--extension say where they are)"
                        % (missing[0], len(missing), len(pairs.paths)))
    caffe = features.start_pycaffe()
    if args.gpu is not None:
        caffe_net.about("--gpu %d" % args.gpu)
        caffe.set_device(args.gpu)
        caffe.set_mode_gpu()
    extractor = features.Extractor(pb, caffe, args.net, args.model, args.blob,
                                   args.batch)
    set_options(pb, args, extractor.preprocessing)
    print("%d images: %s" % (len(pairs.paths),
                             extractor.preprocessing.describe()), flush=True)
    progress = runs.Progress()
    rows = extractor.features(
        pairs.paths, extractor.preprocessing.read, args.flip,
        lambda done: progress.show(lambda: "    %d/%d images" % (
            done, len(pairs.paths))))
    progress.say("%d features of blob \"%s\"%s" % (
        rows.shape[1], args.blob,
        ", mean of image and mirror image" if args.flip else ""))
    empty = [path for path, row in zip(pairs.paths, rows) if not row.any()]
    if empty:
        print("warning: the features of %d image%s are all 0 (%s is the "
              "first): their cosines are taken as 0"
              % (len(empty), "s"[len(empty) == 1:], empty[0]))
    scores = cosines(rows, pairs.first, pairs.second)
    # Rates would be those of the rounding.
    if np.ptp(scores) < 1e-6:
        raise UserError("the cosine of every pair is %.3f: the features of "
                        "blob \"%s\" tell nothing apart"
                        % (scores[0], args.blob))
    report(args, pairs, scores)


def report(args, pairs, scores):
    """Prints and draws what the scores say."""
    same = pairs.same
    positive, negative = int(np.sum(same)), int(np.sum(~same))
    print("%d pairs of the same person, mean cosine %.3f; %d of different "
          "persons, %.3f" % (positive, scores[same].mean(), negative,
                             scores[~same].mean()))
    fold = fold_numbers(same) if pairs.fold is None else pairs.fold
    if fold is None:
        print("accuracy over folds: not told by fewer than %d pairs of a kind"
              % FOLDS)
    else:
        accuracies, thresholds = fold_accuracies(scores, same, fold)
        error = accuracies.std(ddof=1) / np.sqrt(len(accuracies))
        print("accuracy over %d folds: %.2f %% +- %.2f (standard error), "
              "threshold %.3f to %.3f" % (
                  len(accuracies), 100 * accuracies.mean(), 100 * error,
                  thresholds.min(), thresholds.max()))
    roc = Roc(scores, same)
    print("EER: %.2f %%" % (100 * roc.eer()))
    for far in args.far:
        few = ("" if far * negative >= 1 else
               " (%d pairs of different persons are too few to tell)"
               % negative)
        print("TAR at FAR %s: %.2f %%%s" % (percent(far),
                                            100 * roc.tar_at(far), few))
    stem = os.path.splitext(os.path.basename(args.pairs))[0]
    output = args.output or stem + "_roc.png"
    figure, axis = plt.subplots(figsize=(6, 5), constrained_layout=True)
    rates = false_rates(min(1 / negative, 0.1))
    draw_roc(axis, rates, [(
        figures.shortened(os.path.basename(args.model), 40),
        [roc.tar_at(rates)])])
    axis.set_title("%s, EER %.2f %%" % (
        figures.shortened(os.path.basename(args.pairs), 40),
        100 * roc.eer()))
    figures.save(figure, output)


def main():
    with user_errors():
        run(parse_args())


if __name__ == "__main__":
    main()
