"""classify.py: an exported net in OpenCV, from the command line."""
import os
import re
import struct
import subprocess

import numpy as np
import pytest

from conftest import ROOT
from deploy_tools import Bench, conv, image, inner, layer

cv2 = pytest.importorskip("cv2")

HEAD = """# Made by hand.
# Input "data": 1 x %d x 4 x 4
#   scalefactor: 0.5
#   size: 4, 4
#   mean: %s
#   swapRB: false
#   channels: %s
"""


def classify(*args):
    # No CAFFE_ROOT: it needs no Caffe.
    env = {name: value for name, value in os.environ.items()
           if name != "CAFFE_ROOT"}
    done = subprocess.run(
        [os.path.join(ROOT, "myexamples/classify.py"), *map(str, args)],
        env=env, cwd="/", text=True, timeout=60, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


@pytest.fixture(params=[1, 3])
def folder(request, tmp_path, pb, caffe):
    """A net that gives each quarter of an image a class by its first channel,
    behind a transform."""
    import caffe_model
    channels = request.param
    bench = Bench(tmp_path, pb, caffe)
    bench.out.mkdir()
    text = "\n".join([
        image(1, channels, 4, 4, label=False),
        conv("c", "data", "num_output: 1 kernel_size: 2 stride: 2 bias_term: "
             "false"), layer("Flatten", "f", "c"), layer("Softmax", "prob",
                                                         "f")])
    (bench.out / "deploy.prototxt").write_text(
        HEAD % (channels, ", ".join(["10"] * channels),
                ["", "gray, of 0 to 255", "", "blue, green, red"][channels])
        + text)
    model = pb.NetParameter()
    weights = np.zeros((1, channels, 2, 2), "f4")
    weights[:, 0] = 0.01
    caffe_model.set_array(model.layer.add(
        name="c", type="Convolution").blobs.add(), weights)
    (bench.out / "deploy.caffemodel").write_bytes(model.SerializeToString())
    return bench.out


def picture(path, quarter, size=4):
    pixels = np.zeros((size, size, 3), np.uint8)
    middle = size // 2
    pixels[middle - 2 + 2 * (quarter // 2):middle + 2 * (quarter // 2),
           middle - 2 + 2 * (quarter % 2):middle + 2 * (quarter % 2)] = (
               200, 100, 100)
    assert cv2.imwrite(str(path), pixels)
    return path


def test_pictures(folder, tmp_path):
    names = [picture(tmp_path / ("%d.png" % i), i) for i in range(4)]
    status, out = classify(folder, *names)
    assert status == 0, out
    for i, line in enumerate(out.splitlines()):
        assert re.fullmatch(r"OpenCV \S+ on %d.png: class %d \(probability "
                            r"0\.\d+\)" % (i, i), line)
    # The transform counts: (value - 10) * 0.5, and a hundredth of four.
    gray = folder.joinpath("deploy.prototxt").read_text().count("gray")
    value = 0.114 * 200 + 0.886 * 100 if gray else 200
    other = np.exp(-0.02 * round(value))
    assert "(probability %.3f)" % (1 / (1 + 3 * other)) in out.splitlines()[0]


def test_nets_without_a_softmax(folder, tmp_path):
    net = folder / "deploy.prototxt"
    text = net.read_text()
    net.write_text(text[:text.index('layer { name: "prob"')])
    path = picture(tmp_path / "a.png", 3)
    status, out = classify(folder, path)
    assert status == 0 and re.search(r"class 3 \(score [\d.]+\)$", out)
    net.write_text(text[:text.index('layer { name: "f"')])
    status, out = classify(folder, path)
    assert status == 1
    assert "'c' of the net has the shape (1, 1, 2, 2): no score for" in out


def test_crop(folder, tmp_path):
    net = folder / "deploy.prototxt"
    net.write_text(net.read_text().replace(
        "#   swapRB", "#   crop: the middle 4 x 4 of the image\n#   swapRB"))
    status, out = classify(folder, picture(tmp_path / "a.png", 2, size=10))
    assert status == 0 and "class 2 " in out
    status, out = classify(folder, picture(tmp_path / "a.png", 0, size=2))
    assert status == 1
    assert "has 2 x 2 pixels; the net crops 4 x 4" in out


def test_resize_and_crop_like_caffe(tmp_path, pb, caffe):
    """What an ImageData layer with both does, as the nets for ImageNet have
    it: the crop is of the resized image."""
    bench = Bench(tmp_path, pb, caffe)
    noise = np.random.default_rng(0)
    images = [tmp_path / ("%d.png" % i) for i in range(4)]
    for path in images:
        # Coarse, so that it is another image at another size.
        coarse = noise.integers(0, 256, (6, 5, 3), np.uint8)
        assert cv2.imwrite(str(path), cv2.resize(coarse, (30, 40)))
    (tmp_path / "list.txt").write_text("".join(
        "%s 0\n" % path for path in images))
    net = bench.write(
        layer("ImageData", "data", "", "data label",
              'image_data_param { source: "%s/list.txt" batch_size: 4 '
              "new_height: 16 new_width: 12 } transform_param { crop_size: 8 "
              "scale: 0.01 mean_value: 104 mean_value: 117 mean_value: 123 }"
              % tmp_path),
        inner("ip", "data"), layer("Softmax", "prob", "ip"))
    bench.make_model()
    bench.export()
    [found] = caffe.outputs(net, str(bench.model), [{}], ["prob"])
    status, out = classify(bench.out, *images)
    assert status == 0, out
    for probabilities, line in zip(found["prob"], out.splitlines()):
        assert "class %d (probability %.3f)" % (
            probabilities.argmax(), probabilities.max()) in line


def test_nets_with_several_losses(folder, tmp_path):
    """OpenCV's own forward() gives the last one, whichever that is."""
    net = folder / "deploy.prototxt"
    text = net.read_text()
    head = layer("Power", "less", "f", extra="power_param { scale: -1 }")
    net.write_text(text + head + layer("Softmax", "aux", "less"))
    path = picture(tmp_path / "a.png", 3)
    status, out = classify(folder, path)
    assert status == 0 and re.search(
        r"a.png: prob: class 3 \(probability 0\.\d+\), aux: class [012] "
        r"\(probability 0\.\d+\)$", out)
    # An output that is no probability is none of a class.
    net.write_text(text + head)
    status, out = classify(folder, path)
    assert status == 0 and re.search(r"a.png: class 3 \(probability", out)


@pytest.fixture
def mnist(tmp_path):
    pixels = np.zeros((2, 4, 4), np.uint8)
    pixels[1, 2:, 2:] = 99
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(struct.pack(">4i", 2051, 2, 4, 4) + pixels.tobytes())
    return path


def test_mnist(folder, mnist):
    status, out = classify(folder, "%s:1" % mnist)
    assert status == 0, out
    assert re.search(r"on t10k-images-idx3-ubyte:1: class 3 \(probability "
                     r"\S+\)$", out)
    (mnist.parent / "t10k-labels-idx1-ubyte").write_bytes(
        struct.pack(">2i", 2049, 2) + b"\x07\x03")
    assert classify(folder, "%s:1" % mnist)[1].endswith("), label 3\n")


@pytest.mark.parametrize("change, message", [
    (lambda path: path.write_bytes(path.read_bytes()[:-1]),
     "has 47 bytes where its header says 48"),
    (lambda path: path.write_bytes(path.read_bytes()[:15]), "is cut short"),
    (lambda path: path.write_bytes(b"12345678901234567890"),
     "is no MNIST file: it begins with"),
    # As many as there are, were the sizes negative.
    (lambda path: path.write_bytes(struct.pack(">4i", 2051, 2, -4, -4)
                                   + bytes(32)), "where its header says"),
    (lambda path: path.unlink(), "cannot read"),
    (lambda path: path.write_bytes(struct.pack(">4i", 2051, 1, 4, 4)
                                   + bytes(16)), "has 1 images"),
])
def test_mnist_that_is_broken(folder, mnist, change, message):
    change(mnist)
    status, out = classify(folder, "%s:1" % mnist)
    assert status == 1 and out.startswith("error: ")
    assert message in out and out.count("\n") == 1


def test_what_is_no_export(folder, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    status, out = classify(folder, tmp_path / "bad.png")
    assert (status, out.splitlines()[-1]) == (
        1, "error: cannot read the image %s: OpenCV does not know its format, "
        "or it is broken" % (tmp_path / "bad.png"))
    (tmp_path / "bad.png").write_text("")
    assert classify(folder, tmp_path / "bad.png") == (
        1, "error: cannot read the image %s: it is empty\n"
        % (tmp_path / "bad.png"))
    assert classify(folder, "/no.png") == (
        1, "error: cannot read /no.png: No such file or directory\n")
    good = picture(tmp_path / "a.png", 1)
    status, out = classify(tmp_path, good)
    assert status == 1 and "error: cannot read %s" % tmp_path in out
    net = folder / "deploy.prototxt"
    text = net.read_text()
    for wrong in (text.replace("#   mean", "#   maen").encode(), b"\xff\xfe"):
        net.write_bytes(wrong)
        status, out = classify(folder, good)
        assert status == 1 and "does not say how its input is made" in out
    net.write_text(text)
    # Of two of these OpenCV makes a net without weights.
    for model in (b"\x01\x02", b"", b"text"):
        (folder / "deploy.caffemodel").write_bytes(model)
        status, out = classify(folder, good)
        assert (status, out.count("\n")) == (1, 1)
        assert out.startswith(
            "error: OpenCV cannot read or run the net in %s: " % folder)
