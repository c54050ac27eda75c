"""Verification on characters that were not trained on, with letters of the
DejaVu that matplotlib brings in the place of kanji."""
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT

sys.path[:0] = [os.path.join(ROOT, "myexamples"),
                os.path.join(ROOT, "myexamples", "kanji_verification")]
pytest.importorskip("sklearn")
import draw_characters  # noqa: E402
import lmdb_file  # noqa: E402
import pair_judging  # noqa: E402
from caffe_proto import UserError  # noqa: E402

FAMILIES = ("Sans", "Sans-Bold", "Sans-Oblique", "Serif", "Serif-Bold",
            "SansMono")
LETTERS = "".join(map(chr, range(0x0410, 0x0450)))  # Cyrillic
SMALL = ["--training", 5, "--validation", 4, "--test", 6,
         "--new-typefaces", 2]
DRAW = "kanji_verification/draw_characters.py"


def dejavu(name):
    """The path of a font."""
    import matplotlib
    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf",
                        "DejaVu%s.ttf" % name)


@pytest.fixture
def fonts(tmp_path):
    """A folder with six typefaces."""
    folder = tmp_path / "fonts"
    folder.mkdir()
    for family in FAMILIES:
        shutil.copy(dejavu(family), folder)
    return folder


@pytest.fixture
def letters(tmp_path):
    """A text with the characters to draw."""
    path = tmp_path / "letters.txt"
    path.write_text(LETTERS[:40] + "\n" + LETTERS[30:] + "\n",
                    encoding="utf-8")
    return path


def read_lots(path):
    """What lots.txt names, by the words before it."""
    found = {}
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        count, what = re.match(r"(\d+) (.*):\n", block).groups()
        lines = block.strip().split("\n")[1:]
        found[what] = lines if "typefaces" in what else list(lines[0])
        assert len(found[what]) == int(count)
    return found


def test_level_1():
    kanji = draw_characters.jis_level_1()
    assert len(kanji) == len(set(kanji)) == 2965
    assert (kanji[0], kanji[-1]) == ("亜", "腕")


def test_drawings(tree, fonts, letters, caffe_root, caffe, tmp_path):
    out = tmp_path / "drawn"
    for path in (out, tmp_path / "again"):
        done = tree.run(DRAW, fonts, path, "--characters", letters, *SMALL)
        assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "some of them: %s" % (
        tmp_path / "again" / "characters.png")
    lots = read_lots(out / "lots.txt")
    characters = [lots["characters " + what] for what in (
        "to train on", "for validation", "for the test")]
    assert list(map(len, characters)) == [5, 4, 6]
    assert len(set(sum(characters, [])) & set(LETTERS)) == 15
    faces, new = (lots["typefaces " + what] for what in (
        "to train on", "that are new at the test"))
    assert len(new) == 2
    assert sorted(faces + new) == sorted("DejaVu" + x for x in FAMILIES)
    assert Image.open(out / "characters.png").size[0] > 200

    with np.load(out / "pairs.npz") as pairs:
        # Less than the five faces of each that there are with more of them.
        for part, count in (("validation", 4), ("known_typefaces", 6)):
            assert pairs[part + "_images"].shape == (4 * count, 32, 32)
            assert list(pairs[part + "_labels"]) == [
                i for i in range(count) for _ in range(4)]
        images = pairs["new_typefaces_images"]
        assert images.shape == (12, 32, 32) and images.dtype == np.uint8
        # White on black, the character in the middle.
        assert images.max(axis=(1, 2)).min() > 100
        assert images[:, 0].max() == 0 and images[:, :, 8:24].any(
            axis=(1, 2)).all()
        with np.load(tmp_path / "again" / "pairs.npz") as again:
            assert all((pairs[name] == again[name]).all() for name in pairs)

    # What Caffe reads: 5 characters, 2 drawings in each of 4 typefaces.
    read = {}
    for part, count in (("train", 40), ("test", 20)):
        db = out / (part + "_lmdb")
        assert (db / "dataset.txt").read_text() == (
            tmp_path / "again" / db.name / "dataset.txt").read_text()
        assert lmdb_file.entries(str(db)) == count
        read[part] = [caffe.images(
            'layer { name: "d" type: "Data" top: "data" top: "label" '
            'data_param { source: "%s" batch_size: %d backend: LMDB } }'
            % (db, count), str(tmp_path), top, 1)[0]
            for top in ("data", "label")]
        images, labels = read[part]
        assert images.shape == (count, 1, 32, 32)
        assert list(np.bincount(labels.astype(int))) == [count // 5] * 5
        # Mixed, and each of its own.
        assert (np.diff(labels) < 0).sum() > 5
        assert len(np.unique(images, axis=0)) == count
    both = [images.reshape(-1, 1024) for images, _ in read.values()]
    assert not set(map(bytes, both[0])) & set(map(bytes, both[1]))
    # The label goes with its image: the next drawing is mostly of the same.
    near = np.argmin(((both[1][:, None] - both[0]) ** 2).sum(-1), axis=1)
    right = read["train"][1][near] == read["test"][1]
    assert right.mean() > 0.6


def test_less_distorted_where_it_is_not_trained_on(monkeypatch):
    seen = []
    monkeypatch.setattr(draw_characters, "distorted",
                        lambda paper, rng, strength: seen.append(strength))
    drawer = draw_characters.Drawer(100)
    face = type("Face", (), {"draw": lambda self, character: None})()
    drawer.everywhere("ab", [face])
    assert seen == [1] * 4
    drawer.by_lot("ab", [face] * 9)
    assert seen[4:] == [0.5] * 10


@pytest.mark.parametrize("strength", [0, 1])
def test_distortion(strength):
    typeface = draw_characters.Typeface(dejavu("Sans"))
    paper = typeface.draw("+")
    rng = np.random.default_rng(1)
    images = [draw_characters.distorted(paper, rng, strength).astype(int)
              for _ in range(20)]
    middles = np.array([[np.average(np.arange(32), weights=image.sum(axis))
                         for axis in (0, 1)] for image in images])
    assert middles.mean() == pytest.approx(15.5, abs=0.8)
    assert (np.ptp(middles, axis=0) > 0.5).all() == bool(strength)
    assert (middles.min() > 12) and (middles.max() < 19)
    sums = [image.sum() for image in images]
    assert (max(sums) > 1.1 * min(sums)) == bool(strength)


def test_typefaces_that_are_left_out(tree, fonts, letters, caffe_root,
                                     tmp_path):
    """DejaVu Sans Display has no letters."""
    shutil.copy(dejavu("SansDisplay"), fonts)
    (fonts / "broken.ttf").write_bytes(b"no font")
    (fonts / "README").write_text("no font either")
    out = tmp_path / "drawn"
    done = tree.run(DRAW, fonts, out, "--characters", letters, *SMALL)
    assert done.returncode == 0, done.stdout
    assert "DejaVuSansDisplay.ttf is left out: it lacks 64 of 64 characters" \
        in done.stdout
    assert "broken.ttf is left out: it cannot be read as a font (" \
        in done.stdout
    assert len(read_lots(out / "lots.txt")["typefaces to train on"]) == 4


def test_a_blank_is_no_character():
    typeface = draw_characters.Typeface(dejavu("Sans"))
    assert typeface.has("a") and not typeface.has("亜")
    assert ord("\u2003") in typeface.charmap and not typeface.has("\u2003")


@pytest.mark.parametrize("args, words", [
    (["--test", 56], "64 characters are in all 6 typefaces: 65 are needed, 5 "
     "to train on, 4 for validation and 56 for the test"),
    (["--new-typefaces", 5], "6 typefaces of {fonts} can be used: at least 7 "
     "are needed, 5 of them to be new at the test"),
    (["--validation", 1], "--training, --validation and --test are at least"),
    (["--characters", "none.txt"], "cannot read none.txt: "),
])
def test_wrong_sets(tree, fonts, letters, caffe_root, tmp_path, args, words):
    done = tree.run(DRAW, fonts, tmp_path / "drawn", "--characters", letters,
                    *SMALL, *args)
    assert done.returncode in (1, 2)
    last = done.stdout.splitlines()[-1]
    assert "error: " + words.format(fonts=fonts) in last
    assert not list(tmp_path.glob("drawn*"))


def test_wrong_folders(tree, fonts, letters, caffe_root, tmp_path):
    done = tree.run(DRAW, tmp_path / "none", tmp_path / "drawn")
    assert done.stdout == ("error: cannot read %s: No such file or directory\n"
                           % (tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    done = tree.run(DRAW, tmp_path / "empty", tmp_path / "drawn")
    assert done.stdout.startswith("error: 0 typefaces of ")
    done = tree.run(DRAW, fonts, tmp_path)
    assert done.stdout == ("error: %s is there already: move it away\n"
                           % tmp_path)
    assert done.returncode == 1


def test_without_pil(tree, fonts, caffe_root, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "PIL.py").write_text("raise ImportError('No module named PIL')")
    done = tree.run(DRAW, fonts, tmp_path / "drawn",
                    env={"PYTHONPATH": str(hidden)})
    assert done.stdout.splitlines()[-1] == (
        "error: No module named PIL: install python3-matplotlib and "
        "python3-pil (Debian), or matplotlib and Pillow (PyPI)")
    assert done.returncode == 1


def test_lmdb_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(lmdb_file, "MAP_SIZE", 1 << 16)
    with pytest.raises(UserError, match="cannot write .*db: MDB_MAP_FULL"):
        lmdb_file.write(str(tmp_path / "db"), [bytes(1000)] * 100)


# ---- The packages ----

APT_CACHE = """#!/bin/sh
for name; do
  for deb in "%(folder)s/$name"_*.deb; do
    [ ! -e "$deb" ] || printf 'Package: %%s\\nSize: 2500000\\n\\n' "$name"
  done
done
"""
APT_GET = """#!/bin/sh
echo "$*" >>"%(folder)s/calls"
case "$*" in *download*) ;; *) exit 0 ;; esac
status=0
while [ "$1" != download ]; do shift; done
shift
for name; do
  if [ -e "%(folder)s/broken/$name" ]; then
    head -c 1000 "%(folder)s/$name"_*.deb >"${name}_1_all.deb"
    echo "E: Failed to fetch $name" >&2
    status=100
  else
    cp "%(folder)s/$name"_*.deb .
  fi
done
exit $status
"""


class Apt:
    """Stand-ins for apt-get and apt-cache, with packages of their own."""

    def __init__(self, folder, tree):
        self.folder, self.tree = folder, tree
        (folder / "broken").mkdir(parents=True)
        for name, text in (("apt-get", APT_GET), ("apt-cache", APT_CACHE)):
            program = tree.npm.folder / name
            program.write_text(text % {"folder": folder})
            program.chmod(0o755)

    def offer(self, packages):
        """Makes packages, a name to the names of its typefaces, the ones
        that are wanted."""
        lines = ["# package file\n"]
        for package, files in packages.items():
            root = self.folder / "root"
            (root / "DEBIAN").mkdir(parents=True)
            (root / "DEBIAN" / "control").write_text(
                "Package: %s\nVersion: 1\nArchitecture: all\n"
                "Maintainer: nobody\nDescription: none\n" % package)
            where = root / "usr/share/fonts" / package
            where.mkdir(parents=True)
            for file in files:
                shutil.copy(dejavu("Sans"), where / file)
                lines.append("%s %s\n" % (package, file))
            subprocess.run(
                ["dpkg-deb", "--root-owner-group", "-Znone", "--build",
                 str(root), str(self.folder / (package + "_1_all.deb"))],
                check=True, stdout=subprocess.DEVNULL)
            shutil.rmtree(root)
        self.tree.path("kanji_verification/typefaces.txt").write_text(
            "".join(lines))

    def calls(self):
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def apt(tree, tmp_path):
    """Such an apt, with 22 typefaces in 12 packages."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("not on a Debian")
    apt = Apt(tmp_path / "apt", tree)
    apt.offer({"fonts-%d" % i: ["a%d.ttf" % i, "b%d.ttf" % i][i < 2:]
               for i in range(12)})
    return apt


GET = "kanji_verification/get_typefaces.sh"


def test_typefaces(tree, apt):
    done = tree.run(GET)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines() == [
        "==> downloading 12 packages of typefaces (30 MB)",
        "==> 22 typefaces are ready in myexamples/kanji_verification/data"]
    data = tree.path("kanji_verification/data")
    assert len(list(data.iterdir())) == 22
    with open(dejavu("Sans"), "rb") as file:
        assert (data / "b7.ttf").read_bytes() == file.read()
    assert not tree.path("kanji_verification/data.download").exists()
    calls = apt.calls()
    assert len(calls) == 1 and "install" not in calls[0]
    assert tree.run(GET).stdout == done.stdout.splitlines()[-1] + "\n"
    assert apt.calls() == calls


def test_typefaces_that_apt_does_not_have(tree, apt):
    (apt.folder / "fonts-3_1_all.deb").unlink()
    done = tree.run(GET)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-3:] == [
        "==> downloading 11 packages of typefaces (28 MB)",
        "==> left out, as they cannot be had: a3.ttf b3.ttf",
        "==> 20 typefaces are ready in myexamples/kanji_verification/data"]


def test_too_few_typefaces_and_again(tree, apt):
    for i in (3, 4):
        (apt.folder / "broken" / ("fonts-%d" % i)).touch()
    done = tree.run(GET)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-4:] == [
        "E: Failed to fetch fonts-3",
        "==> apt could not download all of them (its first words stand "
        "above)",
        "==> left out, as they cannot be had: a3.ttf b3.ttf a4.ttf b4.ttf",
        "get_typefaces.sh: error: 18 of 22 typefaces could be had, and 20 are "
        "needed: run this again with a network"]
    assert not tree.path("kanji_verification/data").exists()
    (apt.folder / "broken" / "fonts-4").unlink()
    again = tree.run(GET)
    assert again.returncode == 0, again.stdout
    assert "left out, as they cannot be had: a3.ttf b3.ttf\n" in again.stdout
    assert len(list(tree.path("kanji_verification/data").iterdir())) == 20


def test_no_typefaces(tree, apt):
    for deb in apt.folder.glob("*.deb"):
        deb.unlink()
    done = tree.run(GET)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == (
        "get_typefaces.sh: error: apt knows none of the packages with "
        "typefaces: have root run apt-get update, and run this again")
    assert tree.run(GET, "x").returncode == 2


def test_every_typeface_has_its_package():
    """Each file once, and a name that PIL and Debian take."""
    path = os.path.join(ROOT, "myexamples/kanji_verification/typefaces.txt")
    with open(path) as file:
        lines = [line for line in file if not line.startswith("#")]
    found = [re.fullmatch(r"(fonts-[a-z0-9-]+) ([\w-]+\.(?:ttf|ttc|otf))\n",
                          line) for line in lines]
    assert all(found) and len({one[2] for one in found}) == len(found) >= 30


# ---- The training ----

SCRIPT = "kanji_verification/train_kanji.sh"


def test_from_nothing(tree, apt, caffe_root):
    """All steps up to the drawing: DejaVu has no kanji."""
    done = tree.run(SCRIPT)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert "==> drawing the characters" in lines
    assert "b5.ttf is left out: it lacks 2965 of 2965 characters" in lines
    assert re.fullmatch(r"error: 0 typefaces of .*kanji_verification/data can "
                        r"be used: at least 9 are needed, 7 of them to be "
                        r"new at the test", lines[-1])
    assert not tree.path("kanji_verification/drawn").exists()


def test_training(tree, fonts, letters, caffe_root):
    drawn = tree.path("kanji_verification/drawn")
    done = tree.run(DRAW, fonts, drawn, "--characters", letters, *SMALL)
    assert done.returncode == 0, done.stdout
    tree.replace("kanji_verification/kanji_solver.prototxt", test_iter=1,
                 test_interval=10, display=5, max_iter=20)
    # Batches of 100 took longer than all the rest.
    tree.replace("kanji_verification/kanji_train_test.prototxt",
                 batch_size=20)
    args = ["-m", "1", "3", "--seeds", "2", "-j", "2"]
    done = tree.run(SCRIPT, *args)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert any(re.fullmatch(
        r"==> training on 5 characters in 4 typefaces, drawing [0-9a-f]{8}",
        line) for line in lines)
    assert ("6 characters, in the training's typefaces: 276 pairs of 24 test "
            "images, mean ± standard deviation of 2 seeds") in lines
    assert ("6 characters, in new typefaces: 66 pairs of 12 test images, "
            "mean ± standard deviation of 2 seeds") in lines
    runs = str(tree.path("kanji_verification/runs"))
    assert lines[-3:] == [
        "models: %s/m*_seed*/model_iter_20.caffemodel" % runs,
        "figures of each net: %s/results.json" % runs,
        "plot: %s/roc.png" % runs]
    assert Image.open(runs + "/roc.png").size == (1100, 500)

    # The tables are those of the file, paired by seed.
    with open(runs + "/results.json") as file:
        parts = json.load(file)
    rows = [re.findall(r"[^|]+", line) for line in lines
            if re.match(r"\| \d", line)]
    assert [int(row[0]) for row in rows] == [1, 3, 1, 3]
    for part, (softmax, margin) in zip(parts, (rows[:2], rows[2:])):
        assert [(net["margin"], net["seed"]) for net in part["nets"]] == [
            (1, 1), (1, 2), (3, 1), (3, 2)]
        eers = {m: np.array([100 * net["eer"] for net in part["nets"]
                             if net["margin"] == m]) for m in (1, 3)}
        tars = np.array([100 * net["tar"]["0.01"] for net in part["nets"]
                         if net["margin"] == 3])
        assert softmax[4].strip() == "-"
        for cell, values in ((softmax[1], eers[1]), (margin[1], eers[3]),
                             (margin[2], tars), (margin[4],
                                                 eers[3] - eers[1])):
            mean, deviation = map(float, cell.split(" ± "))
            assert mean == pytest.approx(values.mean(), abs=0.006)
            assert deviation == pytest.approx(values.std(ddof=1), abs=0.006)

    # Another look at the same nets: the test characters stay alone.
    results = os.stat(runs + "/results.json").st_mtime_ns
    again = tree.run(SCRIPT, *args, "--validation")
    assert "the characters are ready in myexamples/kanji_verification/drawn" \
        in again.stdout
    assert "4 of 4 runs are done already" in again.stdout
    assert "4 characters for validation: 120 pairs of 16 validation images" \
        in again.stdout
    assert "test images" not in again.stdout
    assert again.stdout.splitlines()[-2:] == [
        "figures of each net: %s/validation_results.json" % runs,
        "plot: %s/validation_roc.png" % runs]
    assert os.stat(runs + "/results.json").st_mtime_ns == results

    # Nets of other drawings are not taken for these.
    (drawn / "train_lmdb" / "dataset.txt").write_text("others\n")
    other = tree.run(SCRIPT, *args)
    assert other.returncode == 1
    assert "was trained on 5 characters in 4 typefaces" in other.stdout
    (drawn / "pairs.npz").write_bytes(b"no numbers")
    other = tree.run(SCRIPT, *args)
    assert re.search(r"error: cannot read .*pairs\.npz: ", other.stdout)


def test_differences_are_paired_by_seed():
    def judged(eer):
        return type("Judged", (), {"eer": eer})()
    judgements = {1: [judged(0.02), judged(0.03)],
                  2: [judged(0.01), judged(0.025)]}
    assert pair_judging.difference(judgements, 2) == "-0.75 ± 0.35"
    assert pair_judging.difference(judgements, 1) == "-"
    assert pair_judging.difference({2: judgements[2]}, 2) == "-"
