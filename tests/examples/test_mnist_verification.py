"""Verification on digits that were not trained on, with little data."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from mirror import Mirror
from small_mnist import expect, small_mnist

sys.path[:0] = [os.path.join(ROOT, "myexamples"),
                os.path.join(ROOT, "myexamples", "mnist_verification")]
pytest.importorskip("sklearn")
import idx_file  # noqa: E402
import pair_judging  # noqa: E402
import split_digits  # noqa: E402
from caffe_proto import UserError  # noqa: E402


def test_every_pair_once():
    rows = np.array([[1, 0], [2, 0], [0, 3]])
    scores, same = pair_judging.all_pairs(rows, np.array([5, 5, 6]))
    assert scores == pytest.approx([1, 0, 0])
    assert list(same) == [True, False, False]


def test_split(tmp_path):
    images = np.arange(6 * 4, dtype=np.uint8).reshape(6, 2, 2)
    labels = np.array([4, 5, 0, 9, 4, 3], np.uint8)
    prefix = str(tmp_path / "x")
    idx_file.write(prefix + "-images-idx3-ubyte", images)
    idx_file.write(prefix + "-labels-idx1-ubyte", labels)
    head = (tmp_path / "x-images-idx3-ubyte").read_bytes()[:16]
    assert head == bytes([0, 0, 8, 3, 0, 0, 0, 6, 0, 0, 0, 2, 0, 0, 0, 2])
    chosen, kept = split_digits.read(prefix, 0, 4)
    assert list(kept) == [4, 0, 4, 3]
    assert (chosen == images[[0, 2, 4, 5]]).all()
    with pytest.raises(UserError, match="no image with a label from 6 to 8"):
        split_digits.read(prefix, 6, 8)
    with pytest.raises(UserError, match="it begins with 2051 instead of 2049"):
        idx_file.read(prefix + "-images-idx3-ubyte", 1)
    path = tmp_path / "x-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="has 39 bytes where its header says"):
        split_digits.read(prefix, 0, 4)


def test_split_leaves_its_source_alone(tmp_path):
    prefix = tmp_path / "x"
    for end, axes in zip(split_digits.ENDS, (3, 1)):
        idx_file.write(str(prefix) + end,
                       np.ones((6, 2, 2)[:axes], np.uint8))
    os.symlink("x" + split_digits.ENDS[1], str(tmp_path / "y")
               + split_digits.ENDS[1])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for target in ("x", "y"):
        done = subprocess.run(
            [split_digits.__file__, str(prefix), str(tmp_path / target),
             "fit"], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)
        assert done.returncode == 1
        assert done.stdout.startswith("error: TO is FROM, %s-" % (
            tmp_path / target))
        assert before == {path: path.read_bytes()
                          for path in tmp_path.iterdir()}


def test_from_nothing_and_again(tree, caffe_root):
    files = small_mnist(train=200, test=100)
    expect(tree, files)
    tree.replace("mnist_verification/verification_solver.prototxt",
                 test_iter=1, test_interval=10, display=5, max_iter=20)
    script = "mnist_verification/train_verification.sh"
    args = ["-m", "1", "3", "--seeds", "2", "-j", "2"]
    with Mirror(files) as mirror:
        env = {"MNIST_MIRRORS": mirror.url}
        done = tree.run(script, *args, env=env)
        assert done.returncode == 0, done.stdout
        lines = done.stdout.splitlines()
        assert "==> training on the classes 0 to 4 of MNIST" in lines
        for what in ("5 to 9, never trained on", "0 to 4, trained on"):
            assert "digits %s: 1225 pairs of 50 test images, mean ± " \
                "standard deviation of 2 seeds" % what in lines
        rate = r" \| (\S+) ± (\S+)"
        rows = re.findall(r"^\| (\d)%s \| (?:-|[+-]\S+ ± \S+) \| (\S+) "
                          r"(\S+) \|$" % (3 * rate), done.stdout, re.M)
        assert [row[0] for row in rows] == ["1", "3", "1", "3"]
        for row in rows:
            rates = np.array(row[1:], float)
            assert rates[0] == pytest.approx(rates[6:].mean(), abs=0.011)
            assert rates[1] == pytest.approx(rates[6:].std(ddof=1), abs=0.011)
            # Noise is not told apart.
            assert 25 < rates[0] < 75 and rates[4] <= rates[2] < 25
        plot = lines[-1].split(": ", 1)[1]
        assert Image.open(plot).size == (1100, 500)
        # The nets have never seen the other digits.
        db = tree.path("mnist_verification/train_lmdb")
        assert (db / "dataset.txt").read_text() == "MNIST\n"
        assert 100 * 784 < (db / "data.mdb").stat().st_size < 200 * 784
        assert not tree.path("mnist_verification/lmdb.new").exists()

        # One run undone: only that one trains again, to the same result.
        tree.path("mnist_verification/runs/m3_seed2/done").unlink()
        again = tree.run(script, *args, env=env)
        assert "train_lmdb is ready" in again.stdout
        assert "3 of 4 runs are done already" in again.stdout
        assert again.stdout.splitlines()[-18:] == lines[-18:]

        tree.path("mnist/data/dataset.txt").write_text("Fashion-MNIST\n")
        other = tree.run(script, *args, env=env)
        assert other.returncode == 1
        assert "train_lmdb is not made from the images of myexamples/mnist/" \
            "data: move it away" in other.stdout
