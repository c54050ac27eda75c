#!/usr/bin/python3
"""Draws characters in many typefaces, for training and for verification.

    draw_characters.py FONTS OUT

draws with the font files of the folder FONTS, and makes the folder OUT with

    train_lmdb       the characters to train on, in the typefaces to train on
    test_lmdb        the same characters and typefaces, other drawings
    pairs.npz        characters that are not trained on, to compare
    lots.txt         which characters and typefaces are for what
    characters.png   some of them, to look at

The characters are the kanji of JIS level 1 that all typefaces have, or those
of a file. Which of them are to train on, for validation and for the test, and
which typefaces are trained on, is drawn by lot, always the same with the same
fonts. A drawing is 32 x 32 pixels; it is turned, sheared, scaled and moved by
a little, by half as much where it is not to train on.
"""
import argparse
import hashlib
import os
import shutil
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))
# First: Ctrl-C is quiet from here on.
import caffe_proto  # noqa: E402

import numpy as np  # noqa: E402

import lmdb_file  # noqa: E402
import runs  # noqa: E402
from caffe_proto import UserError  # noqa: E402

SIDE = 32
# A character is drawn larger, and brought to its size as it is distorted.
EM, PAPER = 52, 96
# Of the training characters and typefaces, in each of which a character is
# drawn twice; one drawing in so many typefaces of each other character.
COPIES, FACES = 2, 5
# A typeface that lacks more of the characters is left out.
MOST_LACKING = 0.1
SHOWN = 12


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fonts", metavar="FONTS")
    parser.add_argument("output", metavar="OUT")
    parser.add_argument("--characters", metavar="FILE", help="a text: the "
                        "characters to take (default: JIS level 1)")
    for name, default, what in (
            ("training", 800, "characters to train on"),
            ("validation", 400, "characters for validation"),
            ("test", 1000, "characters for the test"),
            ("new-typefaces", 7, "typefaces that are not trained on")):
        parser.add_argument("--" + name, metavar="N", type=int,
                            default=default,
                            help=what + " (default: %(default)s)")
    args = parser.parse_args()
    if min(args.training, args.validation, args.test) < 2 or \
            args.new_typefaces < 1:
        parser.error("--training, --validation and --test are at least 2, "
                     "--new-typefaces is at least 1")
    return args


def jis_level_1():
    """The 2965 kanji in the rows 16 to 47 of JIS X 0208."""
    found = []
    for row in range(16, 48):
        for cell in range(1, 95):
            try:
                found.append(bytes([0xA0 + row, 0xA0 + cell]).decode("euc_jp"))
            except UnicodeDecodeError:
                pass  # the last row is not full
    return found


def read_characters(path):
    try:
        with open(path, encoding="utf-8-sig") as file:
            return sorted(set("".join(file.read().split())))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("cannot read %s: %s" % (path, error))


class Typeface:
    """A font file."""

    def __init__(self, path):
        from matplotlib.ft2font import FT2Font
        from PIL import ImageFont
        self.name = os.path.splitext(os.path.basename(path))[0]
        # Layout 0, the plain one, whatever libraries PIL finds.
        self.font, self.small = (
            ImageFont.truetype(path, size, layout_engine=0)
            for size in (EM, 16))
        self.charmap = FT2Font(path).get_charmap()

    def has(self, character):
        """Whether it draws the character, and not as a blank."""
        return (ord(character) in self.charmap and
                self.small.getmask(character).getbbox() is not None)

    def draw(self, character):
        """The character in the middle of a paper, white on black."""
        from PIL import Image, ImageDraw
        paper = Image.new("L", (PAPER, PAPER), 0)
        left, top, right, bottom = self.font.getbbox(character)
        ImageDraw.Draw(paper).text(
            ((PAPER - left - right) / 2, (PAPER - top - bottom) / 2),
            character, 255, font=self.font)
        return paper


def distorted(paper, rng, strength):
    """An array (SIDE, SIDE) of the middle of a paper."""
    from PIL import Image
    scale, turn, shear, right, down = strength * rng.uniform(-1, 1, 5)
    turn *= 0.12
    matrix = 2 * (1 + 0.12 * scale) * np.array(
        [[np.cos(turn), 0.12 * shear - np.sin(turn)],
         [np.sin(turn), np.cos(turn)]])
    offset = (PAPER / 2 + 4 * np.array([right, down])
              - matrix.sum(axis=1) * (SIDE - 1) / 2)
    (a, b), (d, e) = matrix
    return np.asarray(paper.transform(
        (SIDE, SIDE), Image.AFFINE, (a, b, offset[0], d, e, offset[1]),
        Image.BILINEAR))


def open_typefaces(folder, characters):
    """The Typefaces of a folder that have the characters, and those of the
    characters that all of these have."""
    try:
        names = sorted(name for name in os.listdir(folder)
                       if name.lower().endswith((".ttf", ".ttc", ".otf")))
    except OSError as error:
        raise UserError("cannot read %s: %s" % (folder, error.strerror))
    found, progress = [], runs.Progress()
    for name in names:
        progress.show(lambda: "    looking at %s" % name)
        try:
            typeface = Typeface(os.path.join(folder, name))
        except (OSError, RuntimeError) as error:
            progress.say("%s is left out: it cannot be read as a font (%s)"
                         % (name, error))
            continue
        there = [one for one in characters if typeface.has(one)]
        lacking = len(characters) - len(there)
        if lacking > MOST_LACKING * len(characters):
            progress.say("%s is left out: it lacks %d of %d characters"
                         % (name, lacking, len(characters)))
            continue
        found.append((typeface, set(there)))
    progress.clear()
    common = [one for one in characters
              if all(one in there for _, there in found)]
    return [typeface for typeface, _ in found], common


class Lots:
    """Which characters and typefaces are for what."""

    def __init__(self, args, typefaces, characters):
        if len(typefaces) < args.new_typefaces + 2:
            raise UserError("%d typefaces of %s can be used: at least %d are "
                            "needed, %d of them to be new at the test" % (
                                len(typefaces), args.fonts,
                                args.new_typefaces + 2, args.new_typefaces))
        wanted = args.training + args.validation + args.test
        if len(characters) < wanted:
            raise UserError("%d characters are in all %d typefaces: %d are "
                            "needed, %d to train on, %d for validation and %d "
                            "for the test" % (
                                len(characters), len(typefaces), wanted,
                                args.training, args.validation, args.test))
        order = np.random.default_rng(1).permutation(len(characters))
        mixed = [characters[i] for i in order]
        self.training = mixed[:args.training]
        self.validation = mixed[args.training:wanted - args.test]
        self.test = mixed[wanted - args.test:wanted]
        order = np.random.default_rng(2).permutation(len(typefaces))
        self.new_typefaces = [typefaces[i] for i in sorted(
            order[:args.new_typefaces])]
        self.typefaces = [typefaces[i] for i in sorted(
            order[args.new_typefaces:])]

    def text(self):
        lines = []
        for what, characters in (
                ("characters to train on", self.training),
                ("characters for validation", self.validation),
                ("characters for the test", self.test)):
            lines.append("%d %s:\n%s\n" % (len(characters), what,
                                           "".join(characters)))
        for what, typefaces in (
                ("typefaces to train on", self.typefaces),
                ("typefaces that are new at the test", self.new_typefaces)):
            lines.append("%d %s:\n%s\n" % (len(typefaces), what, "\n".join(
                typeface.name for typeface in typefaces)))
        return "\n".join(lines)


class Drawer:
    """Draws sets of images, and shows how far it is."""

    def __init__(self, total):
        self.rng, self.total, self.done = np.random.default_rng(3), total, 0
        self.progress = runs.Progress()

    def draw(self, typeface, character, copies, strength):
        self.done += copies
        self.progress.show(lambda: "    %d/%d images drawn" % (
            self.done, self.total))
        paper = typeface.draw(character)
        return [distorted(paper, self.rng, strength) for _ in range(copies)]

    def everywhere(self, characters, typefaces):
        """(images, labels): each character in each typeface, to train on."""
        images = [image for character in characters for typeface in typefaces
                  for image in self.draw(typeface, character, COPIES, 1)]
        return np.array(images), np.repeat(
            np.arange(len(characters)), COPIES * len(typefaces))

    def by_lot(self, characters, typefaces):
        """(images, labels): each character in FACES of the typefaces."""
        faces = min(FACES, len(typefaces))
        images = [image for character in characters
                  for i in self.rng.permutation(len(typefaces))[:faces]
                  for image in self.draw(typefaces[i], character, 1, 0.5)]
        return np.array(images), np.repeat(np.arange(len(characters)), faces)


def draw(lots):
    """The sets of (images, labels), by name."""
    count = len(lots.training) * COPIES * len(lots.typefaces) + sum(
        len(characters) * min(FACES, len(typefaces))
        for characters, typefaces in (
            (lots.training, lots.typefaces),
            (lots.validation, lots.typefaces),
            (lots.test, lots.typefaces), (lots.test, lots.new_typefaces)))
    drawer = Drawer(count)
    sets = {
        "train": drawer.everywhere(lots.training, lots.typefaces),
        "test": drawer.by_lot(lots.training, lots.typefaces),
        "validation": drawer.by_lot(lots.validation, lots.typefaces),
        "known_typefaces": drawer.by_lot(lots.test, lots.typefaces),
        "new_typefaces": drawer.by_lot(lots.test, lots.new_typefaces)}
    drawer.progress.clear()
    return sets


def write_lmdb(pb, path, images, labels):
    """Makes an LMDB for Caffe, in an order by lot: Caffe keeps to it."""
    order = np.random.default_rng(4).permutation(len(labels))
    lmdb_file.write(path, (pb.Datum(
        channels=1, height=SIDE, width=SIDE, data=images[i].tobytes(),
        label=int(labels[i])).SerializeToString() for i in order))


def sheet(lots, sets):
    """A figure: some characters to train on and some of the test."""
    import figures
    panels = []
    for name, columns, title in (
            ("train", COPIES * len(lots.typefaces),
             "to train on, in all %d typefaces" % len(lots.typefaces)),
            ("known_typefaces", min(FACES, len(lots.typefaces)),
             "test, typefaces\nof the training"),
            ("new_typefaces", min(FACES, len(lots.new_typefaces)),
             "test, new\ntypefaces")):
        images = sets[name][0]
        rows = len(images) // columns
        images = images.reshape(rows, columns, SIDE, SIDE)[:SHOWN]
        if name == "train":
            images = images[:, ::COPIES]
        panels.append((title, np.concatenate(
            [np.concatenate(list(row), 1) for row in images], 0)))
    widths = [image.shape[1] for _, image in panels]
    figure, axes = figures.plt.subplots(
        1, len(panels), constrained_layout=True,
        figsize=(sum(widths) / 90, 0.8 + panels[0][1].shape[0] / 90),
        gridspec_kw={"width_ratios": widths})
    for axis, (title, image) in zip(axes, panels):
        axis.imshow(255 - image, cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    return figure


def write(pb, lots, sets, folder):
    """Writes all files to a new folder."""
    digest = hashlib.sha256()
    for images, labels in sets.values():
        digest.update(images.tobytes() + labels.tobytes())
    name = "%d characters in %d typefaces, drawing %s\n" % (
        len(lots.training), len(lots.typefaces), digest.hexdigest()[:8])
    for part in ("train", "test"):
        db = os.path.join(folder, part + "_lmdb")
        write_lmdb(pb, db, *sets[part])
        with open(os.path.join(db, "dataset.txt"), "w") as file:
            file.write(name)
    np.savez(os.path.join(folder, "pairs.npz"), **{
        "%s_%s" % (part, what): array
        for part, both in sets.items() if part not in ("train", "test")
        for what, array in zip(("images", "labels"), both)})
    with open(os.path.join(folder, "lots.txt"), "w", encoding="utf-8") as file:
        file.write(lots.text())
    sheet(lots, sets).savefig(os.path.join(folder, "characters.png"), dpi=100)


def draw_all(args):
    try:
        import matplotlib.ft2font  # noqa: F401
        import PIL.ImageFont  # noqa: F401
    except ImportError as error:
        raise UserError("%s: install python3-matplotlib and python3-pil "
                        "(Debian), or matplotlib and Pillow (PyPI)" % error)
    pb = caffe_proto.load()
    if os.path.exists(args.output):
        raise UserError("%s is there already: move it away" % args.output)
    characters = (read_characters(args.characters) if args.characters
                  else jis_level_1())
    lots = Lots(args, *open_typefaces(args.fonts, characters))
    sets = draw(lots)
    new = args.output.rstrip("/") + ".new"
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(new)
    write(pb, lots, sets, new)
    os.rename(new, args.output)
    print("which characters are for what: %s\nsome of them: %s" % tuple(
        os.path.join(args.output, name)
        for name in ("lots.txt", "characters.png")))


def main():
    with runs.errors():
        draw_all(parse_args())


if __name__ == "__main__":
    main()
