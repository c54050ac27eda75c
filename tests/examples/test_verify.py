"""verify.py on pairs whose cosines are known, and its parts."""
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import CAFFE_ROOT, ROOT

sys.path.insert(0, os.path.join(ROOT, "myexamples"))
verify = pytest.importorskip("verify")
pytest.importorskip("sklearn")
from caffe_proto import UserError  # noqa: E402
import caffe_proto  # noqa: E402
import features  # noqa: E402


# ---- Rates ----

def test_rates_of_scores_known_by_hand():
    # Of four true pairs, one lies below two of the four false ones.
    scores = np.array([0.9, 0.8, 0.7, 0.3, 0.6, 0.4, 0.2, 0.1])
    same = np.array([True] * 4 + [False] * 4)
    roc = verify.Roc(scores, same)
    assert roc.eer() == pytest.approx(0.25)
    assert roc.tar_at(0.0) == 0.75
    assert roc.tar_at(0.25) == 0.75
    assert roc.tar_at(0.49) == 0.75
    assert list(roc.tar_at([0.5, 0.75, 1.0])) == [1, 1, 1]


@pytest.mark.parametrize("scores, eer, tar", [
    ([2, 2, 1, 1], 0, 1),        # told apart
    ([1, 1, 2, 2], 1, 0),        # the wrong way round
    ([1, 1, 1, 1], 0.5, 0),      # one threshold takes all or none
])
def test_rates_at_the_extremes(scores, eer, tar):
    roc = verify.Roc(np.array(scores, float),
                     np.array([True, True, False, False]))
    assert roc.eer() == pytest.approx(eer)
    assert roc.tar_at(0.001) == tar


def test_eer_between_two_thresholds():
    # FAR, TAR: (0, 1/3), (1/2, 1/3), (1/2, 2/3): the line FAR = 1 - TAR is
    # crossed where FAR is 1/2 and TAR goes from 1/3 to 2/3.
    roc = verify.Roc(np.array([6, 4, 3, 5, 2.]),
                     np.array([True, True, True, False, False]))
    assert roc.eer() == pytest.approx(0.5)


def test_rates_of_two_normal_distributions():
    """EER and TAR of equal normals, d apart, are known."""
    from scipy.stats import norm
    quantiles = norm.ppf((np.arange(20000) + 0.5) / 20000)
    scores = np.concatenate([quantiles + 3, quantiles])
    roc = verify.Roc(scores, np.arange(40000) < 20000)
    assert roc.eer() == pytest.approx(norm.cdf(-1.5), abs=1e-4)
    for far in (0.01, 0.001):
        assert roc.tar_at(far) == pytest.approx(
            norm.cdf(3 + norm.ppf(far)), abs=5e-3)


def test_threshold_lies_between_the_scores():
    scores, same = np.array([0.9, 0.7, 0.3, 0.1]), np.array([1, 1, 0, 0], bool)
    assert verify.best_threshold(scores, same) == pytest.approx(0.5)
    # Best is to accept nothing, or everything.
    assert verify.best_threshold(scores, np.array([0, 0, 1, 0], bool)) > 0.9
    assert verify.best_threshold(scores, np.array([0, 1, 1, 1], bool)) <= 0.1


def test_threshold_is_chosen_on_the_other_folds():
    # Two folds, each told apart by a threshold of its own: 0.5 and 0.9.
    scores = np.array([0.6, 0.7, 0.4, 0.3, 1.0, 1.1, 0.8, 0.85])
    same = np.array([1, 1, 0, 0, 1, 1, 0, 0], bool)
    accuracies, thresholds = verify.fold_accuracies(
        scores, same, np.array([0] * 4 + [1] * 4))
    assert thresholds == pytest.approx([0.925, 0.5])
    assert list(accuracies) == [0.5, 0.5]


def test_folds_of_a_list_in_lfws_order_are_lfws():
    count = 7
    same = np.tile(np.arange(2 * count) < count, 10)
    assert (verify.fold_numbers(same)
            == np.repeat(np.arange(10), 2 * count)).all()


def test_folds_of_a_sorted_list_have_both_kinds():
    same = np.arange(50) < 20
    fold = verify.fold_numbers(same)
    for number in range(10):
        assert np.sum(same[fold == number]) == 2
        assert np.sum(~same[fold == number]) == 3
    assert verify.fold_numbers(np.arange(50) < 9) is None


def test_cosines():
    rows = np.array([[3, 4], [6, 8], [-4, 3], [0, 0], [1e-30, 0]], np.float32)
    first, second = np.array([0, 0, 1, 0, 0]), np.array([1, 2, 2, 3, 4])
    assert verify.cosines(rows, first, second) == pytest.approx(
        [1, 0, 0, 0, 0.6])
    many = np.arange(200000)
    assert verify.cosines(rows, many % 2, many % 2) == pytest.approx(
        np.ones(200000))


# ---- Lists ----

def write(tmp_path, text):
    path = tmp_path / "pairs.txt"
    path.write_text(text)
    return str(path)


def test_lfws_list(tmp_path):
    path = write(tmp_path, "2\t1\nAna_B\t1\t12\nAna_B\t2\tO'Hara\t3\n"
                           "Bo\t1\t2\nBo\t1\tAna_B\t12\n")
    pairs = verify.read_pairs(path, "/lfw")
    assert list(pairs.same) == [True, False, True, False]
    assert list(pairs.fold) == [0, 0, 1, 1]
    assert pairs.paths[:4] == ["/lfw/Ana_B/Ana_B_0001.jpg",
                               "/lfw/Ana_B/Ana_B_0002.jpg",
                               "/lfw/Bo/Bo_0001.jpg",
                               "/lfw/Ana_B/Ana_B_0012.jpg"]
    assert len(pairs.paths) == len(set(pairs.paths)) == 6
    assert pairs.paths[pairs.second[1]] == "/lfw/O'Hara/O'Hara_0003.jpg"
    # Bo_0001 and Ana_B_0012 stand twice in the list, once among the images.
    assert pairs.first[2] == pairs.first[3]
    assert pairs.second[0] == pairs.second[3]


def test_lfws_development_list(tmp_path):
    pairs = verify.read_pairs(write(tmp_path, "1\nA 1 2\nA 1 B 1\n"), "",
                              "png")
    assert pairs.fold is None and list(pairs.same) == [True, False]
    assert pairs.paths[0] == "A/A_0001.png"


def test_plain_list(tmp_path):
    path = write(tmp_path, "a.png b.png 1\r\n\na b.png\tc d.png\t0\n"
                           "/x/a.png  a.png 0")
    pairs = verify.read_pairs(path)
    folder = str(tmp_path)
    assert sorted(pairs.paths) == sorted(
        [folder + "/" + name
         for name in ("a.png", "b.png", "a b.png", "c d.png")] + ["/x/a.png"])
    assert list(pairs.same) == [True, False, False]
    assert pairs.fold is None
    assert pairs.paths[pairs.second[2]] == folder + "/a.png"
    path = write(tmp_path, "\ufeffa.png b.png 1\na.png c.png 0")
    assert verify.read_pairs(path).paths[0] == folder + "/a.png"


@pytest.mark.parametrize("text, message", [
    ("", "has no pairs"),
    ("a b 2\n", "pairs.txt:1: expected PATH PATH 0 or PATH PATH 1"),
    ("a b 1\na b\n", "pairs.txt:2: expected PATH PATH"),
    ("a b 1\nb c 1\n", "has no pair of different persons"),
    ("a b 0\n", "has no pair of the same person"),
    ("1 1\nA 1 2\n", "has 1 pairs where its first line says 2 (1 fold of 1"),
    ("1 1\nA 1 2\nA 1 2\n", "pairs.txt:3: expected NAME I NAME J"),
    ("1\nA 1 B 2\nA 1 B 1\n", "pairs.txt:2: expected NAME I J"),
    ("1\nA 1 x\nA 1 B 1\n", 'pairs.txt:2: expected NAME I J, found "A 1 x"'),
])
def test_broken_lists(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        verify.read_pairs(write(tmp_path, text))
    assert message in str(error.value)


# ---- The tool ----

NET = """
name: "stand-in"
layer { name: "data" type: "ImageData" top: "data" top: "label"
  include { phase: TEST }
  transform_param { %s }
  image_data_param { source: "no such list" batch_size: 3 is_color: %s } }
layer { name: "data" type: "Data" top: "data" top: "label"
  include { phase: TRAIN } data_param { source: "none" batch_size: 3 } }
layer { name: "flat" type: "Flatten" bottom: "data" top: "flat" }
layer { name: "ip" type: "InnerProduct" bottom: "flat" top: "ip"
  inner_product_param { num_output: %d bias_term: false } }
layer { name: "lm" type: "LargeMarginInnerProduct" bottom: "ip"
  bottom: "label" top: "lm"
  largemargin_inner_product_param { num_output: 2 } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "lm" bottom: "label"
  top: "loss" }
"""


class Net:
    """A net whose blob ip is its input, after a transformation."""

    def __init__(self, folder, count, color=False, transform=""):
        self.pb = caffe_proto.load()
        self.path = folder / "net.prototxt"
        self.model = folder / "a.caffemodel"
        self.path.write_text(NET % (transform, str(color).lower(), count))
        self.write({"ip": np.eye(count),
                    "lm": np.arange(2 * count).reshape(2, count)})

    def write(self, weights, path=None):
        """Writes a model with these weights by layer."""
        net = self.pb.NetParameter()
        for name, array in weights.items():
            layer = net.layer.add(name=name)
            layer.blobs.add(data=array.ravel()).shape.dim.extend(array.shape)
        (path or self.model).write_bytes(net.SerializeToString())

    def verify(self, pairs, *args, **options):
        if "--blob" not in args:
            args += ("--blob", "ip")
        return subprocess.run(
            [os.path.join(ROOT, "myexamples/verify.py"), str(self.path),
             str(self.model), str(pairs), *map(str, args)],
            universal_newlines=True, timeout=120, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, cwd=str(self.path.parent),
            env=dict(os.environ, CAFFE_ROOT=CAFFE_ROOT), **options)

    def errors(self, calls, models=None):
        """How verify.py ends with each of the arguments, and a model each."""
        models = models or [self.model] * len(calls)
        found = self.extract(
            "import verify\n"
            "result = []\n"
            "for call in %r:\n"
            "    sys.argv = ['verify.py', %r, '--blob', 'ip'] + call\n"
            "    try:\n"
            "        verify.main()\n"
            "    except SystemExit as error:\n"
            "        result.append(str(error))" % (
                [[str(part) for part in (model, *call)]
                 for model, call in zip(models, calls)], str(self.path)))
        assert len(found) == len(calls)
        assert all(error.startswith("error: ") for error in found)
        return found

    def extract(self, code):
        """The array that code, in a process of its own, calls result."""
        code = ("import sys, numpy as np; sys.path.insert(0, %r)\n"
                "import caffe_proto, features\n"
                "pb, caffe = caffe_proto.load(), features.load_pycaffe()\n"
                "def extractor(blob='ip', batch=2):\n"
                "    return features.Extractor(pb, caffe, %r, %r, blob, "
                "batch)\n%s\nnp.save(%r, result)" % (
                    os.path.join(ROOT, "myexamples"), str(self.path),
                    str(self.model), code, str(self.path.parent / "out")))
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120,
                       env=dict(os.environ, CAFFE_ROOT=CAFFE_ROOT),
                       cwd=str(self.path.parent))
        return np.load(str(self.path.parent / "out.npy"))


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(pixels, np.uint8)).save(str(path))


@pytest.fixture
def faces(tmp_path, caffe_root):
    """LFW's list of 10 folds of 2 + 2 pairs; images of one row, 2 pixels.

    Persons P and Q lie at angles of 0 and 90 degrees. In the last fold, a
    true pair has a cosine of 0.6 and a false one of 0.8.
    """
    right, up, tilted = [[200, 0]], [[0, 100]], [[60, 80]]
    for name, images in (("P", [right, right, tilted]),
                         ("Q", [up, up])):
        for number, pixels in enumerate(images, 1):
            save(tmp_path / "lfw" / name / ("%s_%04d.png" % (name, number)),
                 pixels)
    plain = ["P 1 2", "Q 1 2", "P 1 Q 1", "Q 2 P 2"]
    last = ["P 1 3", "P 1 2", "P 3 Q 1", "P 2 Q 2"]
    path = tmp_path / "pairs.txt"
    path.write_text("10\t2\n" + "\n".join(plain * 9 + last) + "\n")
    return path


def test_tool_on_lfws_list(faces, tmp_path):
    net = Net(tmp_path, 2)
    done = net.verify(faces, "--root", tmp_path / "lfw", "--extension", "png",
                      "--batch", 2)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == "5 images: as large as they are, grey, mean 0, scale 1"
    assert lines[1] == '2 features of blob "ip"'
    assert lines[2] == ("20 pairs of the same person, mean cosine 0.980; 20 "
                        "of different persons, 0.040")
    # The nine first folds choose a threshold of 0.5 for the last one, which
    # takes all of its true pairs and one false one; with the last one among
    # them, they choose 0.3 or 0.7: no error there.
    accuracy = re.match(r"accuracy over 10 folds: (\S+) % \+- (\S+) \(stand",
                        lines[3])
    assert float(accuracy[1]) == pytest.approx(97.5)
    assert float(accuracy[2]) == pytest.approx(2.5)
    # One of 20 pairs of either kind is on the wrong side.
    assert lines[4] == "EER: 5.00 %"
    assert lines[5] == ("TAR at FAR 1 %: 95.00 % (20 pairs of different "
                        "persons are too few to tell)")
    assert lines[-1] == "plot: pairs_roc.png"
    assert Image.open(str(tmp_path / "pairs_roc.png")).size == (600, 500)


def plain_list(tmp_path, *pixels):
    """A list that compares the first image with all others."""
    for number, image in enumerate(pixels):
        save(tmp_path / ("%d.png" % number), image)
    path = tmp_path / "list.txt"
    path.write_text("".join("0.png %d.png %d\n" % (i, i % 2)
                            for i in range(1, len(pixels))))
    return path


def test_tool_on_a_plain_list_with_options(tmp_path, caffe_root):
    path = plain_list(tmp_path, [[10, 20]], [[10, 20]], [[20, 10]])
    net = Net(tmp_path, 2, transform="mean_value: 1 scale: 0.5")
    done = net.verify(path, "--mean", 10, "--scale", 2, "--far", 0.5,
                      "-o", tmp_path / "x.pdf")
    assert done.returncode == 0, done.stdout
    assert "grey, mean 10, scale 2" in done.stdout
    # Without the mean of 10, the cosine of the second pair was 0.8.
    assert "mean cosine 1.000; 1 of different persons, 0.000" in done.stdout
    assert "accuracy over folds: not told by fewer than 10" in done.stdout
    assert "TAR at FAR 50 %: 100.00 % (1 pairs" in done.stdout
    assert (tmp_path / "x.pdf").exists()

    # All features with the same direction, but for one that is turned round.
    path = plain_list(tmp_path, [[10, 20]], [[0, 0]], [[20, 10]])
    flipped = net.verify(path, "--mean", 10, "--flip")
    assert "mean of image and mirror image" in flipped.stdout
    assert "cosine -1.000; 1 of different persons, 1.000" in flipped.stdout


def test_hdf5_model(tmp_path, caffe_root):
    h5py = pytest.importorskip("h5py")
    path = plain_list(tmp_path, [[10, 20]], [[10, 20]], [[20, 10]])
    net = Net(tmp_path, 2)
    net.model = tmp_path / "a.caffemodel.h5"
    with h5py.File(str(net.model), "w") as file:
        file["data/ip/0"] = np.array([[1, -1], [0, 0]], np.float32)
    done = net.verify(path)
    assert done.returncode == 0, done.stdout
    assert "cosine 1.000; 1 of different persons, -1.000" in done.stdout


def test_gpu_of_a_caffe_without(tmp_path, caffe_root):
    path = plain_list(tmp_path, [[10, 20]], [[10, 20]], [[20, 10]])
    done = Net(tmp_path, 2).verify(path, "--gpu", 0)
    if "CPU-only" not in done.stdout:
        pytest.skip("this Caffe is built with CUDA")
    assert done.returncode == 1
    assert done.stdout == ("error: --gpu 0: Caffe says: Cannot use GPU in "
                           "CPU-only Caffe: check mode.\n")


def test_net_that_ends_caffe(tmp_path, caffe_root):
    """Where the images are too small for it."""
    path = plain_list(tmp_path, [[10, 20]], [[10, 20]], [[20, 10]])
    net = Net(tmp_path, 2)
    net.path.write_text(net.path.read_text().replace(
        'layer { name: "flat" type: "Flatten" bottom: "data"',
        'layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" '
        "convolution_param { num_output: 1 kernel_size: 2 } }\n"
        'layer { name: "flat" type: "Flatten" bottom: "conv"'))
    done = net.verify(path)
    assert done.returncode == 1
    *lines, error = done.stdout.splitlines()
    assert len(lines) == 1 and lines[0].startswith("3 images: ")
    assert re.fullmatch(
        r"error: %s with images of 1 x 1 x 2 \(channels x height x width\): "
        r"Caffe says of layer 'conv': Check failed: .+" % net.path, error)


def test_ctrl_c_ends_both_processes():
    """The one with pycaffe as well, and one of them speaks."""
    code = ("import os, signal, sys, time; sys.path.insert(0, %r)\n"
            "import caffe_net, caffe_proto\n"
            "with caffe_proto.user_errors():\n"
            "    caffe_net.guard()\n"
            "    print(os.getpid(), flush=True)\n"
            "    time.sleep(600)" % os.path.join(ROOT, "myexamples"))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT)
    child = int(process.stdout.readline())
    assert child != process.pid
    process.send_signal(signal.SIGINT)
    # To the end of what both can write to.
    assert process.communicate(timeout=30)[0] == "stopped\n"
    assert process.returncode == 1


def test_progress_on_long_lists(tmp_path, caffe_root):
    path = plain_list(tmp_path, *[[[10, 20 + i]] for i in range(5)])
    net = Net(tmp_path, 2)
    shown = net.extract(
        "import contextlib, io, runs, verify\n"
        "runs.Progress.__init__.__defaults__ = (0,)\n"
        "sys.argv = %r\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    verify.main()\n"
        "result = out.getvalue().splitlines()" % [
            "verify.py", str(net.path), str(net.model), str(path), "--blob",
            "ip", "--batch", "2"])
    assert list(shown[1:4]) == ["    2/5 images", "    4/5 images",
                                "    5/5 images"]


MISTAKES = [
    (["--blob", "fc5"], 'has no blob "fc5" in the TEST phase; it has data, '
     "label, flat, ip, lm, loss"),
    (["--blob", "loss"], 'the blob "loss" of'),
    (["--blob", "label"], "does not come from images alone"),
    (["--mean", "1", "2"], "2 mean values for images of 1 channel"),
    (["--mean", "none.binaryproto"],
     "none.binaryproto: No such file or directory"),
    (["--mean", "1", "x"], "--mean 1 x: neither numbers nor one file"),
    (["--mean", "nan"], "--mean nan: it must be finite"),
    (["--size", "4"], 'layer "ip": the net has weights of 32 numbers'),
    (["--root", "/none"], "no such image: /none/0.png (3 of 3 are missing"),
    (["-o", "/none/x.png"], "cannot write /none/x.png"),
]


def test_mistakes(tmp_path, caffe_root):
    path = plain_list(tmp_path, [[10, 20]], [[10, 20]], [[20, 10]])
    net = Net(tmp_path, 2)
    found = net.errors([[path, *args] for args, _ in MISTAKES])
    for error, (_, message) in zip(found, MISTAKES):
        assert message in error
    assert not (tmp_path / "list_roc.png").exists()


@pytest.mark.parametrize("scale", ["nan", "inf", "0"])
def test_scale_that_leaves_nothing(tmp_path, monkeypatch, capsys, scale):
    monkeypatch.setattr(sys, "argv", ["verify.py", "net", "model", "pairs",
                                      "--blob", "ip", "--scale", scale])
    with pytest.raises(SystemExit):
        verify.main()
    assert "error: --scale %s: it must be a finite number other than 0" \
        % scale in capsys.readouterr().err


@pytest.mark.parametrize("value, cosine", [(1, "1.000"), (0, "0.000")])
def test_features_that_tell_nothing_apart(tmp_path, caffe_root, value, cosine):
    path = plain_list(tmp_path, [[10, 20]], [[30, 40]], [[20, 10]])
    net = Net(tmp_path, 2)
    net.write({"ip": np.array([[value, value], [0, 0]])})
    done = net.verify(path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == (
        'error: the cosine of every pair is %s: the features of blob "ip" '
        "tell nothing apart" % cosine)
    assert not (tmp_path / "list_roc.png").exists()


def test_broken_image_is_named(tmp_path, caffe_root):
    noise = np.random.RandomState(1).randint(0, 256, (30, 30))
    plain_list(tmp_path, [[10, 20]], [[10, 20]], noise, [[1, 2, 3]])
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    names = ["cut", "text", "3"]
    for name in names:
        (tmp_path / name).write_text("0.png 1.png 1\n0.png %s.png 0\n" % name)
    found = Net(tmp_path, 2).errors([[tmp_path / name] for name in names])
    for name, error in zip(names[:2], found):
        assert "cannot read the image %s/%s.png: " % (tmp_path, name) in error
    assert "3.png is 1 x 1 x 3 (channels x height x width), the images " \
        "before it 1 x 1 x 2" in found[2]


def test_model_that_does_not_fit(tmp_path, caffe_root):
    path = plain_list(tmp_path, [[10, 20]], [[10, 20]], [[20, 10]])
    net = Net(tmp_path, 2)
    cases = [
        ({"fc": np.eye(2)},
         'has no weights for layer "ip"; it has weights for fc'),
        ({"ip": np.eye(3)},
         'layer "ip": the net has weights of 4 numbers, '),
        ({"ip": np.array([[1, np.nan], [0, 1]])},
         "0.png are not finite (nan)")]
    models = []
    for weights, _ in cases:
        models.append(tmp_path / ("%d.caffemodel" % len(models)))
        net.write(weights, models[-1])
    (tmp_path / "cut").write_bytes(net.model.read_bytes()[:-3])
    models += [tmp_path / "cut", tmp_path / "none"]
    messages = [message for _, message in cases] + [
        "cut is cut short", "cannot read %s/none" % tmp_path]
    for error, message in zip(net.errors([[path]] * 5, models), messages):
        assert message in error


def test_features_of_zeros_are_told(tmp_path, caffe_root):
    path = plain_list(tmp_path, [[10, 20]], [[10, 20]], [[0, 0]])
    done = Net(tmp_path, 2).verify(path)
    assert done.returncode == 0
    assert "the features of 1 image are all 0 (%s" % (
        tmp_path / "2.png") in done.stdout


# ---- Features ----

@pytest.mark.parametrize("color", [False, True])
def test_images_are_read_as_caffe_reads_them(tmp_path, caffe_root, color):
    """Against ImageData itself: channels, mean, scale, crop."""
    rng = np.random.RandomState(1)
    names = []
    for i in range(3):
        names.append(str(tmp_path / ("%d.png" % i)))
        save(tmp_path / ("%d.png" % i), rng.randint(0, 256, (8, 9, 3)))
    (tmp_path / "no such list").write_text(
        "".join(name + " 0\n" for name in names))
    count = 25 * (3 if color else 1)
    mean = "mean_value: 3 mean_value: 40 mean_value: 120" if color \
        else "mean_value: 77"
    net = Net(tmp_path, count, color, mean + " scale: 0.125 crop_size: 5")
    both = net.extract(
        "one = extractor()\n"
        "ours = one.features(%r, one.preprocessing.read)\n"
        "whole = caffe.Net(one.path, caffe.TEST, weights=one.weights.path)\n"
        "whole.forward()\n"
        "result = np.stack([ours, whole.blobs['ip'].data])" % names)
    assert both.shape == (2, 3, count)
    # OpenCV and PIL round a grey value differently at times.
    tolerance = 1e-6 if color else 0.1251
    assert both[0] == pytest.approx(both[1], abs=tolerance)
    assert np.abs(both[1]).max() > 5


def test_deep_and_turned_images_are_read_as_opencv_reads_them(tmp_path):
    """16 bits a channel, and photos whose camera was held upright."""
    import features
    from PIL import Image
    cv2 = pytest.importorskip("cv2")
    rng = np.random.RandomState(1)
    gray = str(tmp_path / "gray.png")
    cv2.imwrite(gray, rng.randint(0, 65536, (8, 9)).astype(np.uint16))
    color = str(tmp_path / "color.png")
    cv2.imwrite(color, rng.randint(0, 65536, (8, 9, 3)).astype(np.uint16))
    turned = Image.fromarray(rng.randint(0, 256, (8, 9, 3)).astype(np.uint8))
    exif = turned.getexif()
    exif[0x112] = 6  # turn it by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    turned.save(tmp_path / "turned.jpg", exif=exif)
    reading = features.Preprocessing()
    for channels, flag in ((1, cv2.IMREAD_GRAYSCALE), (3, cv2.IMREAD_COLOR)):
        reading.channels = channels
        for path in (gray, color):
            np.testing.assert_allclose(
                reading.read(path).astype(int), cv2.imread(path, flag),
                atol=1)
        found = reading.read(str(tmp_path / "turned.jpg"))
        assert found.shape == cv2.imread(
            str(tmp_path / "turned.jpg"), flag).shape
        assert found.shape[:2] == (9, 8)
    values = Image.fromarray(rng.rand(8, 9).astype("f4"))
    values.save(tmp_path / "values.tif")
    with pytest.raises(UserError, match="values.tif: its pixels are no bytes"):
        reading.read(str(tmp_path / "values.tif"))


def test_channels_mean_image_and_batches(tmp_path, caffe_root):
    save(tmp_path / "a.png", [[[10, 20, 30], [40, 50, 60]]])
    net = Net(tmp_path, 6, color=True, transform='mean_file: "mean"')
    (tmp_path / "mean").write_bytes(net.pb.BlobProto(
        num=1, channels=3, height=1, width=2,
        data=[0, 0, 0, 0, 5, 7]).SerializeToString())
    rows = net.extract(
        "one, done = extractor(), []\n"
        "read = one.preprocessing.read\n"
        "names = ['a.png'] * 5\n"
        "bgr = one.features(names, read, progress=done.append)\n"
        "assert done == [2, 4, 5], done\n"
        "flip = one.features(names, read, flip=True)\n"
        "one.preprocessing.rgb = True\n"
        "rgb = one.features(names, read)\n"
        "result = np.stack([bgr, rgb, flip])")
    assert (rows == rows[:, :1]).all()
    assert list(rows[0, 0]) == [30, 60, 20, 50, 5, 33]
    assert list(rows[1, 0]) == [10, 40, 20, 50, 25, 53]
    assert list(rows[2, 0]) == [45, 45, 35, 35, 19, 19]


@pytest.mark.parametrize("shape, legacy, message", [
    ([3, 1, 2], {}, None), ([1, 3, 1, 2], {}, None),
    ([], {"num": 1, "channels": 3, "height": 1, "width": 2}, None),
    ([2, 3, 1, 1], {}, r"is no mean image: its shape is \(2, 3, 1, 1\)"),
    ([6], {}, "is no mean image"), ([4], {}, "6 values where its shape")])
@pytest.mark.parametrize("field", ["data", "double_data"])
def test_mean_images_of_both_kinds(tmp_path, pb, field, shape, legacy,
                                   message):
    blob = pb.BlobProto(**legacy, **{field: [0, 0, 0, 0, 5, 7]})
    blob.shape.dim.extend(shape)
    (tmp_path / "mean").write_bytes(blob.SerializeToString())
    layer = pb.LayerParameter(type="Data", transform_param={
        "mean_file": str(tmp_path / "mean")})
    if message:
        with pytest.raises(UserError, match=message):
            features.Preprocessing.of_layer(pb, layer, "net")
    else:
        mean = features.Preprocessing.of_layer(pb, layer, "net").mean
        assert mean.dtype == np.float32
        assert mean.tolist() == [[[0, 0]], [[0, 0]], [[5, 7]]]


def test_mean_image_beside_the_net(tmp_path, pb):
    """As export_deploy.py finds it."""
    (tmp_path / "mean").write_bytes(pb.BlobProto(
        num=1, channels=1, height=1, width=1, data=[3]).SerializeToString())
    layer = pb.LayerParameter(type="Data", transform_param={
        "mean_file": "mean"})
    found = features.Preprocessing.of_layer(
        pb, layer, str(tmp_path / "net.prototxt"))
    assert found.mean.tolist() == [[[3]]]


def test_a_net_that_was_dumped_in_training(pb):
    """Its layers' own phase is no rule, nor that of the features."""
    from google.protobuf import text_format
    net = text_format.Parse("""
        layer { name: "data" type: "Input" top: "data" phase: TRAIN }
        layer { name: "drop" type: "Dropout" bottom: "data" top: "drop"
                phase: TRAIN }""", pb.NetParameter())
    layers = features.cut(pb, net, ["drop"], "net.prototxt").layer
    assert [layer.name for layer in layers] == ["data", "drop"]
    assert not any(layer.HasField("phase") for layer in layers)


def test_input_without_a_shape_takes_images_as_they_are(tmp_path, caffe_root):
    path = plain_list(tmp_path, [[10, 20]], [[10, 20]], [[20, 10]])
    net = Net(tmp_path, 2)
    _, layers = net.path.read_text().split('layer { name: "flat"')
    net.path.write_text('layer { name: "x" type: "Input" top: "data" }'
                        '\nlayer { name: "flat"' + layers)
    done = net.verify(path, "--gray")
    assert done.returncode == 0, done.stdout
    assert "as large as they are, grey" in done.stdout
    [error] = net.errors([[path]])
    assert "--gray" in error


def test_deploy_net_scales_images_to_its_input(tmp_path, caffe_root):
    """Both forms of an input; a margin layer without its label."""
    save(tmp_path / "a.png", np.full((6, 8), 7))
    save(tmp_path / "b.png", [[1, 2, 3, 4]] * 3)
    for text in ('input: "data" input_dim: 1 input_dim: 1 input_dim: 1 '
                 "input_dim: 2",
                 'layer { name: "x" type: "Input" top: "data" input_param '
                 "{ shape { dim: 9 dim: 1 dim: 1 dim: 2 } } }"):
        net = Net(tmp_path, 2)
        _, layers = net.path.read_text().split('layer { name: "flat"')
        net.path.write_text(text + '\nlayer { name: "flat"' + layers)
        rows = net.extract(
            "one, two = extractor('lm'), extractor()\n"
            "a = one.features(['a.png'], one.preprocessing.read)\n"
            # A larger image, of which the net sees the middle.
            "two.preprocessing.size = 3, 4\n"
            "b = two.features(['b.png'], two.preprocessing.read)\n"
            "result = np.stack([a, b])")
        assert rows.tolist() == [[[7, 35]], [[2, 3]]]


def test_exported_net_takes_images_as_the_trained_one(tmp_path, pb):
    """What its comments say, as export_deploy.py wrote them."""
    from google.protobuf import text_format
    import deploy_input

    class Node:
        layer = text_format.Parse("""
            name: "data" type: "ImageData" top: "data"
            transform_param { crop_size: 3 scale: 0.5 %s }
            image_data_param { new_height: 6 new_width: 5 }""" % " ".join(
                "mean_value: %d" % mean for mean in (9, 8, 7)),
            pb.LayerParameter())
        tops = [type("Top", (), {"name": "da.ta", "index": 0})]
    trained = deploy_input.Input(pb, Node, "net")
    trained.shape = 1, 3, 3, 3
    deployed = pb.LayerParameter(type="Input", top=["da.ta"])
    deployed.input_param.shape.add(dim=trained.shape)
    path = tmp_path / "deploy.prototxt"

    def read():
        text = ['Input "other": 1 x 1', "  scalefactor: 9"]
        path.write_text("".join("# %s\n" % line for line in
                                text + trained.comments() + text))
        return features.Preprocessing.of_layer(
            pb, deployed, str(path)).describe()
    assert read() == features.Preprocessing.of_layer(
        pb, Node.layer, "net").describe()
    Node.layer.ClearField("image_data_param")
    assert read() == features.Preprocessing.of_layer(
        pb, Node.layer, "net").describe()
    assert "as large as they are, the middle 3 x 3" in read()
    path.write_text('# Input "da.ta": 3\n#   scalefactor: much\n')
    with pytest.raises(caffe_proto.UserError) as error:
        features.Preprocessing.of_layer(pb, deployed, str(path))
    assert "does not say how its input is made" in str(error.value)
