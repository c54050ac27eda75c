"""The face net, on generated images: training, verification, export."""
import os
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

SOLVER = "faces/face_solver.prototxt"
NET = "faces/face_train_test.prototxt"
PERSONS, EACH = 3, 4


def face(person, number):
    """An image of noise that is the same for each person but for a little."""
    pixels = np.random.RandomState(person).rand(112, 96, 3)
    pixels += 0.3 * np.random.RandomState(100 + 10 * person + number).rand(
        112, 96, 3)
    return Image.fromarray((pixels / pixels.max() * 255).astype(np.uint8))


@pytest.fixture
def faces(tree):
    """The tree with images, their lists, and what two iterations change."""
    data = tree.path("faces/data")
    data.mkdir()
    lines = []
    for person in range(PERSONS):
        for number in range(EACH):
            path = data / ("%d_%d.png" % (person, number))
            image = face(person, number)
            if (person, number) == (0, 0):  # of another size: it is scaled
                image = image.resize((50, 60))
            image.save(str(path))
            lines.append("myexamples/faces/data/%s %d\n" % (path.name, person))
    (data / "train.txt").write_text("".join(lines))
    tree.replace(SOLVER, max_iter=2, display=1, solver_mode="CPU")
    (data / "val.txt").write_text("".join(lines))
    tree.replace(NET, batch_size=6)
    net = tree.path(NET)
    text = net.read_text()
    assert text.count("num_output: 10572") == 2
    net.write_text(text.replace("num_output: 10572",
                                "num_output: %d" % PERSONS))
    return tree


def test_from_images_to_verification(faces, caffe_root):
    solver = faces.path(SOLVER)
    solver.write_text(solver.read_text() + "test_iter: 1\ntest_interval: 2\n")
    done = subprocess.run(
        [caffe_root + "/build/tools/caffe", "train",
         "--solver=myexamples/" + SOLVER], cwd=faces.root, text=True,
        stderr=subprocess.PIPE, env=dict(os.environ, GLOG_logtostderr="1"))
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"\), loss = (\S+)", done.stderr)]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert losses[0] == pytest.approx(np.log(PERSONS), abs=0.7)
    lambdas = re.findall(r": lambda = (\S+)", done.stderr)
    assert lambdas == ["892.857", "806.452"]
    assert len(re.findall(r": accuracy = (\S+)", done.stderr)) == 2
    model = "myexamples/faces/face_snapshot/face_iter_2.caffemodel"
    assert (faces.root / model).exists()

    pytest.importorskip("sklearn")
    (faces.root / "pairs.txt").write_text("".join(
        "myexamples/faces/data/%d_0.png myexamples/faces/data/%d_%d.png %d\n"
        % (a, b, n, a == b) for a in range(PERSONS) for b in range(PERSONS)
        for n in range(1, EACH)))
    done = faces.run(
        "verify.py", faces.path(NET), faces.root / model,
        faces.root / "pairs.txt", "--blob", "fc5", "--flip", "--batch", 6,
        "-o", faces.root / "roc.png")
    assert done.returncode == 0, done.stdout
    assert ("%d images: scaled to 112 x 96 (height x width), BGR, mean 127.5, "
            "scale 0.0078125" % (PERSONS * EACH)) in done.stdout
    assert "512 features" in done.stdout

    done = faces.run("export_deploy.py", faces.path(NET), faces.root / model,
                     "-o", faces.root / "deploy")
    assert done.returncode == 0, done.stdout
    deploy = (faces.root / "deploy/deploy.prototxt").read_text()
    assert "LargeMargin" not in deploy
    assert "#   scalefactor: 0.0078125\n#   size: 96, 112\n" in deploy


def test_without_a_list_to_test_with(faces, caffe_root):
    """As the solver stands: no val.txt, no test net."""
    (faces.root / "myexamples/faces/data/val.txt").unlink()
    faces.replace(SOLVER, max_iter=0)
    subprocess.run(
        [caffe_root + "/build/tools/caffe", "train",
         "--solver=myexamples/" + SOLVER], cwd=faces.root, check=True)


def test_epochs_of_the_list(faces, caffe_root):
    done = faces.run("plot_lambda.py", faces.path(SOLVER))
    assert done.returncode == 0, done.stdout
    assert ("data: myexamples/faces/data/train.txt, 12 samples, 6 an "
            "iteration: an epoch is 2 iterations\n") in done.stdout
