#!/usr/bin/python3
"""Prints the licenses of what is in Caffe's library, as Debian's copyright file.

    copyright.py CAFFE BUILD [CARGO-OPTION...]

These are Caffe's own in the tree CAFFE, this project's, and those of the crates
that cargo has compiled below BUILD and that the Rust library has in it: not
those of its build scripts and macros. CARGO-OPTIONs are the features that it
was built with.
"""
import os
import re
import subprocess
import sys

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CARGO = os.path.join(PROJECT, "cmake/find_cargo.sh")
TEXTS = re.compile(r"(licen[sc]e|copying|copyright|notice|unlicense)\b", re.I)

INTRODUCTION = """\
BVLC Caffe with the layers LargeMarginInnerProduct and BN. Its parts, with their
licenses; the texts of these follow.

Caffe (BSD 2-Clause)
The layers LargeMarginInnerProduct and BN, lsoftmax %s (MIT)
%s
The standard library of Rust, linked into Caffe's library as these crates are, is
Copyright (c) The Rust Project Contributors (MIT OR Apache-2.0: the same texts).
"""


def read(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def linked_crates(options):
    """The project's version, and name, version, license of what it links.

    cargo metadata would ask for the crates of the tests as well, which a
    machine without a network need not have.
    """
    done = subprocess.run(
        [CARGO, "tree", "--locked", "--offline", "--edges",
         "normal,no-proc-macro", "--prefix", "none", "--format", "{p}|{l}|",
         *options], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("error: cargo cannot tell which crates the library has")
    crates = [re.match(r"(\S+) v(\S+).*\|(.*)\|", line).groups()
              for line in done.stdout.splitlines()]
    return crates[0][1], sorted(set(crates[1:]))


def named(folder):
    """Name and version in a folder's Cargo.toml; None where there is none."""
    try:
        text = read(os.path.join(folder, "Cargo.toml"))
    except FileNotFoundError:
        return None
    found = [re.search(r'(?m)^%s *= *"(.*?)"' % key, text)
             for key in ("name", "version")]
    return all(found) and tuple(one[1] for one in found)


def folders(build):
    """Where the sources were that cargo has compiled: {(name, version): path}.

    rustc has listed them for each crate, wherever cargo had taken it from.
    """
    sources = set()
    listed = os.path.join(build, "lsoftmax/release/deps")
    for name in os.listdir(listed):
        if name.endswith(".d"):
            for path in re.findall(r"(?m)^((?:\\ |\S)+\.rs):$",
                                   read(os.path.join(listed, name))):
                sources.add(os.path.dirname(os.path.join(
                    PROJECT, path.replace("\\ ", " "))))
    found = {}
    for folder in sources:
        while not (crate := named(folder)) and folder != "/":
            folder = os.path.dirname(folder)
        if crate:
            found[crate] = folder
    return found


def license_texts(folder):
    """The texts that a folder brings."""
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))
             if TEXTS.match(name)]
    return [read(path) for path in paths if os.path.isfile(path)]


def copyright_of(caffe, build, options):
    version, crates = linked_crates(options)
    parts = [("Caffe", caffe), ("lsoftmax", PROJECT)]
    known = folders(build)
    parts += [(" ".join(crate[:2]), known.get(crate[:2])) for crate in crates]
    owners = {}  # of each text, of which many crates have the same
    for part, folder in parts:
        texts = license_texts(folder) if folder else []
        if not texts:
            sys.exit("error: %s has no text of its license%s" % (
                part, " in " + folder if folder else
                ": its source is not where cargo had it from"))
        for text in texts:
            owners.setdefault(text.strip("\n"), []).append(part)
    return "\n".join(
        [INTRODUCTION % (version, "".join(
            "The crate %s %s (%s)\n" % crate for crate in crates))]
        + ["---- %s ----\n\n%s\n" % (", ".join(parts), text)
           for text, parts in owners.items()])


def main():
    if len(sys.argv) < 3 or {"-h", "--help"} & set(sys.argv):
        print(__doc__.strip())
        sys.exit(len(sys.argv) < 2)
    sys.stdout.reconfigure(encoding="utf-8")
    sys.stdout.write(copyright_of(sys.argv[1], sys.argv[2], sys.argv[3:]))


if __name__ == "__main__":
    main()
