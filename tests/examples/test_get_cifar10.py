"""myexamples/cifar10/get_cifar10.sh with small archives of the same format."""
import gzip
import hashlib
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from conftest import small_disk
from mirror import Mirror

ARCHIVE = "cifar-10-binary.tar.gz"
BATCHES = ["data_batch_%d.bin" % i for i in range(1, 6)] + ["test_batch.bin"]
COUNT = 4

pytestmark = pytest.mark.usefixtures("caffe_root")


def make_batches():
    """Maps each batch to (labels, images as N x 3 x 32 x 32)."""
    random = np.random.RandomState(1)
    return {name: (random.randint(0, 10, COUNT).astype(np.uint8),
                   random.randint(0, 256, (COUNT, 3, 32, 32)).astype(np.uint8))
            for name in BATCHES}


def pack(batches, cut=0):
    """The archive of the batches, the last batch without its last bytes."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, (labels, images) in batches.items():
            data = np.hstack([labels[:, None],
                              images.reshape(len(labels), -1)]).tobytes()
            if name == BATCHES[-1] and cut:
                data = data[:-cut]
            info = tarfile.TarInfo("cifar-10-batches-bin/" + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(raw.getvalue())


def expect(tree, archive):
    tree.path("cifar10/cifar10.sha256").write_text(
        "%s  %s\n" % (hashlib.sha256(archive).hexdigest(), ARCHIVE))


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
    archive = pack(batches)
    expect(tree, archive)
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
    archive = pack(make_batches())
    expect(tree, archive)
    with Mirror({ARCHIVE: archive}) as mirror:
        mirror.break_after[ARCHIVE] = 1000
        done = get(tree, mirror.url)
        assert done.returncode == 0, done.stdout
        assert mirror.requests == [(ARCHIVE, 0), (ARCHIVE, 1000)]


def test_unreachable_says_what_to_do(tree):
    done = get(tree, "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "put cifar-10-binary.tar.gz into myexamples/cifar10/data.download" \
        in done.stdout
    assert_nothing_in_place(tree)


def test_wrong_checksum(tree):
    archive = pack(make_batches())
    expect(tree, archive + b"more")
    with Mirror({ARCHIVE: archive}) as mirror:
        done = get(tree, mirror.url)
    assert done.returncode == 1
    assert "SHA-256 differs" in done.stdout
    assert_nothing_in_place(tree)


def test_own_download_with_a_wrong_checksum(tree):
    archive = pack(make_batches())
    expect(tree, archive)
    parts = tree.path("cifar10/data.download")
    parts.mkdir()
    (parts / ARCHIVE).write_bytes(archive[:-1])
    done = get(tree, "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "has a wrong SHA-256" in done.stdout
    (parts / ARCHIVE).write_bytes(archive)
    assert get(tree, "http://127.0.0.1:9").returncode == 0


def truncated(archive):
    return archive[:len(archive) // 2]


@pytest.mark.parametrize("archive, message", [
    (truncated(pack(make_batches())), "cannot read"),
    (b"no archive", "cannot read"),
    (pack(make_batches(), cut=5), "no whole number of images"),
    (pack(dict(list(make_batches().items())[1:])), "has no "),
    (pack(dict(make_batches(), **{"data_batch_2.bin": (
        np.array([3, 10], np.uint8), np.zeros((2, 3, 32, 32), np.uint8))})),
     "has the label 10"),
], ids=["truncated", "no-archive", "short-batch", "missing", "label"])
def test_bad_archive(tree, archive, message):
    expect(tree, archive)
    with Mirror({ARCHIVE: archive}) as mirror:
        done = get(tree, mirror.url)
    assert done.returncode == 1
    assert message in done.stdout
    assert "Traceback" not in done.stdout
    assert_nothing_in_place(tree)


@pytest.mark.parametrize("size, message", [
    (10000, "cannot write myexamples/cifar10/data.download"),
    (1500, "cannot write")])
def test_full_disk(tree, size, message):
    archive = pack(make_batches())
    assert len(archive) > 10000
    expect(tree, archive)
    parts = tree.path("cifar10/data.download")
    if size < 10000:
        parts.mkdir()
        (parts / ARCHIVE).write_bytes(archive)
    with Mirror({ARCHIVE: archive}) as mirror:
        done = get(tree, mirror.url, **small_disk(size))
        assert done.returncode == 1
        assert message in done.stdout, done.stdout
        assert "Traceback" not in done.stdout
        assert_nothing_in_place(tree)
        assert get(tree, mirror.url).returncode == 0
