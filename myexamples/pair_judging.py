"""What the verification examples share: every pair of images that a net has
not seen, judged by the cosine of their features, for each m and seed."""
import json
import os
import statistics

import numpy as np

import caffe_proto
import features
import figures
import runs
import verify

# Of the examples' nets: the features.
BLOB = "bn3"


class Part:
    """Images whose pairs are judged apart from others.

    title is said of them; kind is "test" or "validation".
    """

    def __init__(self, title, images, labels, kind="test"):
        self.title, self.images, self.labels = title, images, labels
        self.kind = kind

    def describe(self, seeds):
        count = len(self.images)
        return "%s: %d pairs of %d %s images, mean%s of %d seed%s" % (
            self.title, count * (count - 1) // 2, count, self.kind,
            " ± standard deviation" if seeds > 1 else "", seeds,
            "s"[seeds == 1:])


def all_pairs(rows, labels):
    """(cosines, same) of every pair of rows."""
    rows = verify.normalised(rows).astype(np.float32)
    pairs = np.triu(np.ones((len(rows), len(rows)), bool), 1)
    return (rows @ rows.T)[pairs], (labels[:, None] == labels)[pairs]


class Judgement:
    """What the pairs say of a trained run; rates are those of the plot."""

    def __init__(self, extractor, part, rates):
        rows = extractor.features(range(len(part.images)),
                                  lambda i: part.images[i])
        # Of millions of pairs: the whole curve is too large to keep.
        roc = verify.Roc(*all_pairs(rows, part.labels))
        self.eer = roc.eer()
        self.tars = roc.tar_at(verify.FARS)
        self.curve = roc.tar_at(rates)


def judge(pb, caffe, all_runs, parts, rates):
    """For each part: margins to Judgements, one a seed."""
    found = [{} for _ in parts]
    progress = runs.Progress()
    for done, run in enumerate(all_runs):
        progress.show(lambda: "    %d/%d nets judged" % (done, len(all_runs)))
        extractor = features.Extractor(
            pb, caffe, os.path.join(run.path, "net.prototxt"), run.model,
            BLOB, batch=100)
        for part, judgements in zip(parts, found):
            judgements.setdefault(run.margin, []).append(
                Judgement(extractor, part, rates))
    progress.clear()
    return found


def name(margin):
    return "softmax (m = 1)" if margin == 1 else "m = %d" % margin


def mean_and_deviation(rates, form="%.2f"):
    rates = [100 * rate for rate in rates]
    mean = form % statistics.mean(rates)
    if len(rates) == 1:
        return mean
    return "%s ± %.2f" % (mean, statistics.stdev(rates))


def difference(judgements, margin):
    """The EER's difference to m = 1 of the same seed."""
    if margin == 1 or 1 not in judgements:
        return "-"
    return mean_and_deviation(
        [one.eer - softmax.eer for one, softmax in zip(
            judgements[margin], judgements[1])], "%+.2f")


def print_table(judgements):
    """judgements: margin to its Judgements, one a seed."""
    print("| m | EER (%%) | %s | EER, difference to m = 1 | runs: EER |"
          % " | ".join("TAR at FAR %s (%%)" % verify.percent(far)
                       for far in verify.FARS))
    print("|---|---|%s---|---|" % ("---|" * len(verify.FARS)))
    for margin, ones in judgements.items():
        cells = [mean_and_deviation([one.eer for one in ones])]
        cells += [mean_and_deviation(rates)
                  for rates in zip(*(one.tars for one in ones))]
        print("| %d | %s | %s | %s |" % (
            margin, " | ".join(cells), difference(judgements, margin),
            " ".join("%.2f" % (100 * one.eer) for one in ones)))


def as_numbers(parts, found):
    """The figures of all runs, for JSON: rates between 0 and 1."""
    return [{"pairs": part.title, "images": len(part.images), "nets": [
        {"margin": margin, "seed": seed, "eer": float(one.eer),
         "tar": {"%g" % far: float(tar)
                 for far, tar in zip(verify.FARS, one.tars)}}
        for margin, ones in judgements.items()
        for seed, one in enumerate(ones, 1)]}
        for part, judgements in zip(parts, found)]


def draw(parts, found, rates, title):
    """A figure with the ROC curves of each part."""
    figure, axes = figures.plt.subplots(
        1, len(parts), figsize=(5.5 * len(parts), 5),
        constrained_layout=True, sharey=True, squeeze=False)
    for axis, part, judgements in zip(axes[0], parts, found):
        verify.draw_roc(axis, rates, [
            (name(margin), [one.curve for one in ones])
            for margin, ones in judgements.items()])
        axis.set_title("Pairs of the " + part.title, fontsize="medium")
    figure.suptitle(title)
    return figure


def run_all(args, parts, script):
    """Trains what is missing, judges all, and reports.

    script is the one that gets the images.
    """
    pb = caffe_proto.load()
    verify.load_sklearn("metrics")
    output = os.path.abspath(args.output)
    all_runs = runs.of_each(args, lambda name, margin, seed: runs.Run(
        pb, args.solver, os.path.join(output, name), margin, seed))
    runs.train_all(all_runs, args.jobs, script)
    rates = verify.false_rates(1e-4)
    found = judge(pb, features.start_pycaffe(), all_runs, parts, rates)
    for part, judgements in zip(parts, found):
        print("\n%s\n" % part.describe(args.seeds))
        print_table(judgements)
    prefix = "" if parts[0].kind == "test" else parts[0].kind + "_"
    path = os.path.join(output, prefix + "results.json")
    with open(path, "w") as file:
        json.dump(as_numbers(parts, found), file, indent=1)
        file.write("\n")
    print("\nmodels: %s" % os.path.join(
        output, "m*_seed*", os.path.basename(all_runs[0].model)))
    print("figures of each net: %s" % path)
    figures.save(
        draw(parts, found, rates,
             "Verification on %s, mean and range of %d seed%s" % (
                 all_runs[0].dataset() or "images of your own", args.seeds,
                 "s"[args.seeds == 1:])),
        os.path.join(output, prefix + "roc.png"))
