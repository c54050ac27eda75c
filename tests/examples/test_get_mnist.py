"""myexamples/mnist/get_mnist.sh against mirrors on this machine."""
import gzip
import os
import signal
import struct
import time

import pytest

from conftest import small_disk
from mirror import Mirror
from small_mnist import NAMES, expect, small_mnist

FASHION = "/usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz"
NO_MIRROR = "http://127.0.0.1:9"
needs_fashion = pytest.mark.skipif(
    not os.path.exists(FASHION), reason="needs dataset-fashion-mnist")


def get(tree, *mirrors, **options):
    return tree.run("mnist/get_mnist.sh",
                    env={"MNIST_MIRRORS": " ".join(mirrors)}, **options)


def assert_in_place(tree, files, name="MNIST"):
    data = tree.path("mnist/data")
    assert (data / "dataset.txt").read_text() == name + "\n"
    for file in NAMES:
        assert (data / file[:-3]).read_bytes() == gzip.decompress(files[file])
    left = {path.name for path in tree.path("mnist").iterdir()}
    assert not left & {"data.new", "data.download"}


def test_downloads_once(tree):
    files = small_mnist()
    expect(tree, files)
    with Mirror(files) as mirror:
        done = get(tree, mirror.url)
        assert done.returncode == 0, done.stdout
        assert "MNIST is ready" in done.stdout
        assert "Fashion" not in done.stdout
        assert_in_place(tree, files)
        asked = len(mirror.requests)
        again = get(tree, mirror.url)
        assert again.returncode == 0 and "is ready" in again.stdout
        assert len(mirror.requests) == asked == 4


def test_continues_a_broken_download(tree):
    files = small_mnist()
    expect(tree, files)
    with Mirror(files) as mirror:
        mirror.break_after["train-images-idx3-ubyte.gz"] = 5000
        done = get(tree, mirror.url)
        assert done.returncode == 0, done.stdout
        assert_in_place(tree, files)
        assert ("train-images-idx3-ubyte.gz", 5000) in mirror.requests


def test_continues_after_being_killed(tree):
    files = small_mnist()
    expect(tree, files)
    parts = tree.path("mnist/data.download")
    parts.mkdir()
    (parts / (NAMES[0])).write_bytes(files[NAMES[0]])
    (parts / (NAMES[1] + ".part")).write_bytes(files[NAMES[1]][:777])
    (parts / (NAMES[2] + ".part")).write_bytes(files[NAMES[2]])
    tree.path("mnist/data.new").mkdir()
    (tree.path("mnist/data.new") / "junk").write_text("junk")
    with Mirror(files) as mirror:
        done = get(tree, mirror.url)
        assert done.returncode == 0, done.stdout
        assert_in_place(tree, files)
        assert mirror.requests == [
            (NAMES[1], 777), (NAMES[2], len(files[NAMES[2]])), (NAMES[3], 0)]


def test_mirror_that_cannot_continue(tree):
    files = small_mnist()
    expect(tree, files)
    with Mirror(files, ranges=False) as mirror:
        mirror.break_after["train-images-idx3-ubyte.gz"] = 5000
        done = get(tree, mirror.url)
        assert done.returncode == 0, done.stdout
        assert_in_place(tree, files)


def test_wrong_checksum_goes_to_the_next_mirror(tree):
    files, others = small_mnist(), small_mnist()
    expect(tree, files)
    with Mirror(others) as bad, Mirror(files) as good:
        done = get(tree, bad.url, good.url)
    assert done.returncode == 0, done.stdout
    assert "SHA-256 differs" in done.stdout
    assert_in_place(tree, files)


def test_dead_mirror_costs_one_try(tree):
    files = small_mnist()
    expect(tree, files)
    with Mirror({}) as dead, Mirror(files) as good:
        done = get(tree, dead.url, good.url)
        assert done.returncode == 0, done.stdout
        assert len(dead.requests) == 1
    assert_in_place(tree, files)


@needs_fashion
def test_falls_back_to_fashion_aloud(tree):
    done = get(tree, NO_MIRROR)
    assert done.returncode == 0, done.stdout
    assert "taking Fashion-MNIST instead" in done.stdout
    data = tree.path("mnist/data")
    assert (data / "dataset.txt").read_text() == "Fashion-MNIST\n"
    assert (data / "train-images-idx3-ubyte").stat().st_size == 47040016
    assert (data / "t10k-labels-idx1-ubyte").stat().st_size == 10008


def test_short_file_is_refused(tree):
    files = small_mnist()
    whole = gzip.decompress(files[NAMES[3]])
    files[NAMES[3]] = gzip.compress(whole[:-100])
    expect(tree, files)
    with Mirror(files) as mirror:
        done = get(tree, mirror.url)
    assert done.returncode == 1
    assert ("train-images-idx3-ubyte has %d bytes where its header says %d"
            % (len(whole) - 100, len(whole))) in done.stdout
    assert not tree.path("mnist/data").exists()


def test_foreign_folder_is_left_alone(tree):
    mine = tree.path("mnist/data")
    mine.mkdir()
    (mine / "mine").write_text("mine")
    done = get(tree, NO_MIRROR)
    assert done.returncode == 1
    assert "myexamples/mnist/data is not this script's" in done.stdout
    assert [path.name for path in mine.iterdir()] == ["mine"]


def test_two_at_once(tree):
    files = small_mnist()
    expect(tree, files)
    with Mirror(files) as mirror:
        runs = [tree.start("mnist/get_mnist.sh",
                           env={"MNIST_MIRRORS": mirror.url})
                for _ in range(3)]
        for run in runs:
            out = run.communicate(timeout=60)[0]
            assert run.returncode == 0, out
        assert len(mirror.requests) == 4
    assert_in_place(tree, files)


@needs_fashion
def test_interrupted_while_unpacking(tree):
    for delay in (0.05, 0.2, 0.35):
        run = tree.start("mnist/get_mnist.sh",
                         env={"MNIST_MIRRORS": NO_MIRROR})
        time.sleep(delay)
        os.killpg(run.pid, signal.SIGINT)
        run.communicate(timeout=60)
        data = tree.path("mnist/data")
        assert not data.exists() or (data / "dataset.txt").exists()
    done = get(tree, NO_MIRROR)
    assert done.returncode == 0, done.stdout


def compressible_mnist():
    """Files that unpack to far more than they have themselves."""
    files = small_mnist()
    for name, count in ((NAMES[1], 20), (NAMES[3], 30)):
        files[name] = gzip.compress(
            struct.pack(">4i", 2051, count, 28, 28) + bytes(count * 784))
    return files


@pytest.mark.parametrize("files, message", [
    (small_mnist(), "cannot write myexamples/mnist/data.download/t10k-images"),
    (compressible_mnist(), "cannot unpack"),
], ids=["download", "unpack"])
def test_full_disk(tree, files, message):
    expect(tree, files)
    with Mirror(files) as mirror:
        done = get(tree, mirror.url, **small_disk(5000))
        assert done.returncode == 1, done.stdout
        assert message in done.stdout and "disk" in done.stdout
        assert not tree.path("mnist/data").exists()
        done = get(tree, mirror.url)
        assert done.returncode == 0, done.stdout
    assert_in_place(tree, files)
