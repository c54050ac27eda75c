"""plot_lambda.py and plot_psi.py on solvers whose lambda is known."""
import glob
import math
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from conftest import CAFFE_ROOT, ROOT

sys.path.insert(0, os.path.join(ROOT, "myexamples"))

NET = """
layer { name: "ip" type: "InnerProduct" inner_product_param { num_output: 2 } }
layer { name: "lm" type: "LargeMarginInnerProduct"
  largemargin_inner_product_param { num_output: 10 %s }
  include { phase: TRAIN } }
layer { name: "lm" type: "LargeMarginInnerProduct"
  largemargin_inner_product_param { num_output: 10 type: SINGLE base: 0 }
  include { phase: TEST } }
"""
SOLVER = """
net: "%s" base_lr: 0.1 max_iter: 10000 lr_policy: "multistep" gamma: 0.1
stepvalue: 4000 stepvalue: 8000 %s
"""
GOOD = "type: QUADRUPLE base: 1000 gamma: 0.0001 power: 12"


@pytest.fixture
def solver(tmp_path, caffe_root):
    """Writes a solver and its net; returns the solver's path."""
    def write(param, extra="", text=SOLVER, net=NET):
        net_path = tmp_path / "a net.prototxt"
        net_path.write_text(net % param if "%s" in net else net)
        path = tmp_path / "solver.prototxt"
        path.write_text(text % (net_path, extra))
        return path
    return write


def run(script, *args, **options):
    return subprocess.run(
        [os.path.join(ROOT, "myexamples", script), *map(str, args)],
        universal_newlines=True, timeout=60, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(os.environ, CAFFE_ROOT=CAFFE_ROOT), **options)


def plot_lambda(path, *args, **options):
    return run("plot_lambda.py", path, "-o", path.parent / "out.png", *args,
               **options)


def table(text):
    """The first table as a dict: iteration to (lr, lambda, weight)."""
    rows = {}
    for line in text.splitlines():
        row = re.match(r" +(\d+) +(\S+) +(\S+) +(\S+)$", line)
        if row:
            if int(row[1]) in rows:
                break
            rows[int(row[1])] = tuple(map(float, row.groups()[1:]))
    return rows


def test_table_and_plot(solver):
    path = solver(GOOD)
    done = plot_lambda(path)
    assert done.returncode == 0, done.stdout
    assert "m = 4" in done.stdout
    # lambda passes 9, 1 and 1/9.
    assert "the margin's weight: 10 % from iteration 4807 on, 50 % from " \
        "iteration 7782 on, 90 % never" in done.stdout
    assert "warning: " not in done.stdout
    rows = table(done.stdout)
    assert {0, 4000, 8000, 9999} <= set(rows)
    for iteration, (rate, value, weight) in rows.items():
        # Caffe's first pass has the iteration 1.
        true = 1000 * (1 + 0.0001 * (iteration + 1)) ** -12
        assert value == pytest.approx(true, rel=1e-3)
        assert weight == pytest.approx(1 / (1 + true), rel=1e-3)
        drops = (iteration >= 4000) + (iteration >= 8000)
        assert rate == pytest.approx(0.1 * 0.1 ** drops)
    assert Image.open(str(path.parent / "out.png")).size == (800, 450)


def test_iteration_iter_size_and_minimum(solver):
    done = plot_lambda(solver(GOOD + " iteration: 500 lambda_min: 7",
                              "iter_size: 3"))
    rows = table(done.stdout)
    assert rows[0][1] == pytest.approx(1000 * (1 + 0.0503) ** -12, rel=1e-3)
    assert rows[9999][1] == 7


# lambda below 1 from iteration 899 of 10000 on, before the drop at 4000.
FAST = "margin: 4 base: 1000 gamma: 0.01 power: 3"


def test_the_layer_of_the_nets_stage(solver):
    net = "".join("""layer { name: "lm" type: "LargeMarginInnerProduct"
      largemargin_inner_product_param { num_output: 10 margin: %d %%s }
      include { stage: "m%d" } }""" % (m, m) for m in (2, 3))
    param = GOOD.replace("type: QUADRUPLE", "")
    done = plot_lambda(solver("", net='state { stage: "m3" }' + net.replace(
        "%s", param)))
    assert done.returncode == 0, done.stdout
    assert "m = 3" in done.stdout and "m = 2" not in done.stdout


@pytest.mark.parametrize("param, warning", [
    ("margin: 3 base: 1000", "lambda is still 1000 at the end (gamma and"),
    ("margin: 3 base: 1000 gamma: 0.0001 power: 2", "is still 250 at the end"),
    # As long as lambda_min is not what keeps it.
    ("margin: 3 base: 1000 gamma: 0.0001 power: 2 lambda_min: 5",
     "is still 250 at the end, above its lambda_min of 5: "),
    ("margin: 3 base: 1.02 gamma: 0.0001 power: 0.02",
     "lambda is still 1.006 at the end: the margin has a weight of only 0.5"),
    ("margin: 2 base: 0", "1 or less from the first iteration on"),
    ("margin: 2 base: 1000 gamma: 0.21 power: 3", "1 or less after 42 iter"),
])
def test_warnings(solver, param, warning):
    done = plot_lambda(solver(param))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("warning: ") == 1
    assert "warning: lm: " in done.stdout and warning in done.stdout
    assert "note" not in done.stdout


@pytest.mark.parametrize("param, note", [
    (FAST, None),
    ("margin: 4 base: 1000 gamma: 0.17 power: 3", None),
    ("margin: 3 base: 1.02 gamma: 0.0001 power: 0.04", None),
    (GOOD + " lambda_min: 20", "lambda_min keeps lambda at 20 from iteration "
     "3854 on: the margin's weight ends at 0.048"),
    # The schedule of sphereface: small early, and no smaller on purpose.
    ("margin: 4 base: 1000 gamma: 0.12 power: 1 lambda_min: 5",
     "lambda_min keeps lambda at 5 from iteration 1658 on"),
    ("margin: 1 base: 1000", "m is 1: this is plain softmax"),
    # Goes on by hand from a snapshot of long ago.
    (GOOD + " iteration: 9000", None),
])
def test_no_warning_without_a_reason(solver, param, note):
    done = plot_lambda(solver(param))
    assert done.returncode == 0, done.stdout
    assert "warning: " not in done.stdout
    if note:
        assert "note: lm: " + note in done.stdout
    assert done.stdout.count("note: ") == bool(note)


def suggested(text):
    return tuple(float(re.search(r"^    %s: (\S+)$" % name, text, re.M)[1])
                 for name in ("base", "gamma", "power"))


@pytest.mark.parametrize("final", [5, 1, 0.1])
def test_suggestion_hits_both_points(solver, final):
    done = plot_lambda(solver(GOOD), "--suggest", final)
    assert done.returncode == 0, done.stdout
    base, gamma, power = suggested(done.stdout)
    assert base == 1000
    assert base * (1 + gamma * 10000) ** -power == pytest.approx(
        final, rel=0.02)
    assert base * (1 + gamma * 4000) ** -power == pytest.approx(15, rel=0.05)
    assert "warning: " not in done.stdout


# No drop, or one too late for lambda to pass 15 there.
@pytest.mark.parametrize("policy", ['lr_policy: "fixed"',
                                    'lr_policy: "multistep" stepvalue: 9999'])
def test_suggestion_without_a_useful_drop(solver, policy):
    text = 'net: "%%s" base_lr: 0.1 max_iter: 10000 gamma: 0.1 %s %%s' % policy
    done = plot_lambda(solver(GOOD, text=text), "--suggest", 0.5)
    base, gamma, power = suggested(done.stdout)
    assert base * (1 + gamma * 10000) ** -power == pytest.approx(
        0.5, rel=0.02)


def test_a_net_is_no_solver(solver, tmp_path):
    solver(GOOD)
    net = tmp_path / "a net.prototxt"
    done = plot_lambda(net)
    assert done.returncode == 1
    assert done.stdout == (
        'error: %s is a net: give its solver, the prototxt with the line  '
        'net: "%s"\n' % (net, net))
    net.write_text("layer { nam: 1 }")
    assert "SolverParameter" in plot_lambda(net).stdout


def test_without_pycaffe(solver, tmp_path, caffe_root):
    """A tree that Make has built has no caffe_pb2.py until `make pycaffe`."""
    root = tmp_path / "a caffe"
    proto = root / "src/caffe/proto/caffe.proto"
    proto.parent.mkdir(parents=True)
    proto.symlink_to(caffe_root + "/src/caffe/proto/caffe.proto")
    path = solver(GOOD)
    before = sorted(root.rglob("*"))
    for source in (caffe_root, root):
        done = subprocess.run(
            [os.path.join(ROOT, "myexamples/plot_lambda.py"), path],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=dict(os.environ, CAFFE_ROOT=str(source)))
        assert done.returncode == 0, done.stdout
        assert "m = 4" in done.stdout
    assert sorted(root.rglob("*")) == before
    proto.unlink()
    proto.write_text("message broken")
    done = subprocess.run(
        [os.path.join(ROOT, "myexamples/plot_lambda.py"), path],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=dict(os.environ, CAFFE_ROOT=str(root)))
    assert done.returncode == 1 and done.stdout.startswith("error: protoc: ")


def test_the_plot_goes_beside_the_solver(solver, tmp_path):
    path = solver(GOOD)
    done = run("plot_lambda.py", path, cwd=str(tmp_path / ".."))
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "solver_lambda.png").exists()
    ignored = subprocess.run(
        ["git", "-C", ROOT, "check-ignore", "-q",
         "myexamples/mnist/mnist_solver_lambda.png"])
    assert ignored.returncode in (0, 128)  # 128: not a clone


# The notebook's own are what a run of it has left.
@pytest.mark.parametrize("path", sorted(
    path for path in
    glob.glob(os.path.join(ROOT, "myexamples", "*", "*solver.prototxt"))
    + glob.glob(os.path.join(ROOT, "myexamples", "*", "model",
                             "*solver.prototxt"))
    if "/tutorial/" not in path),
    ids=lambda path: os.path.relpath(path, os.path.join(ROOT, "myexamples")))
def test_reads_the_examples(tmp_path, caffe_root, path):
    png = tmp_path / "lambda.png"
    done = run("plot_lambda.py", path, "-o", png)
    assert done.returncode == 0, done.stdout
    assert "warning: " not in done.stdout
    assert png.exists()


POLICIES = [
    ('"fixed"', lambda i: 0.1),
    ('"step" gamma: 0.1 stepsize: 3000', lambda i: 0.1 * 0.1 ** (i // 3000)),
    ('"step" gamma: 0.9 stepsize: 1', lambda i: 0.1 * 0.9 ** i),
    ('"exp" gamma: 0.999', lambda i: 0.1 * 0.999 ** i),
    ('"exp" gamma: 1.5', lambda i: 0.1 if i == 0 else math.inf),
    ('"exp" gamma: 0', lambda i: 0.1 if i == 0 else 0),
    ('"inv" gamma: 0.001 power: 0.75',
     lambda i: 0.1 * (1 + 0.001 * i) ** -0.75),
    ('"inv" gamma: 1e30 power: -20', lambda i: 0.1 if i == 0 else math.inf),
    ('"poly" power: 2', lambda i: 0.1 * (1 - i / 10000) ** 2),
    ('"sigmoid" gamma: -0.01 stepsize: 5000', None),
    ('"sigmoid" gamma: 0.01 stepsize: 5000',
     lambda i: 0.1 / (1 + math.exp(-0.01 * (i - 5000)))),
    # exp(5000) is inf, so the rate is 0 at first.
    ('"sigmoid" gamma: 1 stepsize: 5000',
     lambda i: 0.1 / (1 + math.exp(5000 - i)) if i > 4500 else 0),
    ('"multistep" gamma: 0.1', lambda i: 0.1),
    # Caffe takes them in their order, one an iteration.
    ('"multistep" gamma: 0.1 stepvalue: 4000 stepvalue: 3000 stepvalue: 4000',
     lambda i: 0.1 * 0.1 ** ((i >= 4000) + (i >= 4001) + (i >= 4002))),
    # What a policy does not use may be anything.
    ('"fixed" gamma: -1 power: nan stepsize: -7 stepvalue: -7',
     lambda i: 0.1),
    ('"step" gamma: 0 stepsize: 9999', lambda i: 0.1 if i < 9999 else 0),
    ('"poly" power: -2 gamma: -1', lambda i: 0.1 * (1 - i / 10000) ** -2),
    ('"poly" power: -1e30', lambda i: 0.1 if i == 0 else math.inf),
    ('"inv" gamma: 3e38 power: 3e38', lambda i: 0.1 if i == 0 else 0),
    ('"multistep" gamma: 0.1 stepvalue: -5 stepvalue: 2147483647',
     lambda i: 0.01),
    ('"sigmoid" gamma: 3e38 stepsize: 2147483647', lambda i: 0),
]


@pytest.mark.parametrize("policy, rate", POLICIES)
def test_every_policy_is_drawn(solver, policy, rate, capsys, monkeypatch):
    import plot_lambda as tool
    text = 'net: "%%s" base_lr: 0.1 max_iter: 10000 lr_policy: %s %%s' % policy
    path = solver(GOOD, text=text)
    png = path.parent / "out.png"
    monkeypatch.setenv("CAFFE_ROOT", CAFFE_ROOT)
    monkeypatch.setattr(sys, "argv", ["plot_lambda.py", str(path), "-o",
                                      str(png)])
    if rate is None:
        with pytest.raises(SystemExit, match="prototxt: gamma is -0.01"):
            tool.main()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tool.main()
    rows = table(capsys.readouterr().out)
    assert len(rows) >= 13
    for iteration, (shown, _, _) in rows.items():
        # Caffe's is a float, whose smallest is near 1e-45.
        assert shown == pytest.approx(rate(iteration), rel=1e-3, abs=2e-45)
    assert Image.open(str(png)).size == (800, 450)


@pytest.mark.parametrize("policy", [
    '"exp" gamma: 100', '"sigmoid" gamma: 10 stepsize: 15',
    '"inv" gamma: 0.1 power: 0.75', '"poly" power: 2',
    '"multistep" gamma: 0.1 stepvalue: 4 stepvalue: 3 stepvalue: 9'])
def test_rate_is_that_of_caffe(tmp_path, caffe_root, policy):
    """The log of the built Caffe shows the same."""
    import caffe_proto
    solver = tmp_path / "solver.prototxt"
    # A net of one weight.
    solver.write_text('''
net_param {
  layer { name: "one" type: "DummyData" top: "one"
          dummy_data_param { shape { dim: 1 dim: 1 } } }
  layer { name: "ip" type: "InnerProduct" bottom: "one" top: "ip"
          inner_product_param { num_output: 1 } }
  layer { name: "loss" type: "EuclideanLoss" bottom: "ip" bottom: "one"
          top: "loss" }
}
base_lr: 0.1 max_iter: 20 display: 1 snapshot_after_train: false
solver_mode: CPU snapshot_prefix: "%s/none" lr_policy: %s
''' % (tmp_path, policy))
    done = subprocess.run(
        [os.path.join(caffe_root, "build/tools/caffe"), "train",
         "--solver=%s" % solver], env=dict(os.environ, GLOG_logtostderr="1"),
        stderr=subprocess.PIPE, universal_newlines=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rates = [float(value) for value in re.findall(
        r"Iteration \d+, lr = (\S+)", done.stderr)]
    assert len(rates) == 20
    param = caffe_proto.read_solver(caffe_proto.load(), str(solver))[0]
    caffe_proto.check_solver(param, "solver")
    ours = [caffe_proto.learning_rate(param, i) for i in range(20)]
    assert ours == pytest.approx(rates, rel=1e-5, abs=1e-38)


@pytest.mark.parametrize("param, extra, message", [
    ("no_such: 1", "", 'a net.prototxt:4:52 : Message type "caffe.'),
    ("gamma: -1", "", "layer lm: largemargin_inner_product_param.gamma is -1"),
    ("base: nan", "", "largemargin_inner_product_param.base is nan"),
    ("margin: 0", "", "largemargin_inner_product_param.margin is 0"),
    ("margin: 1001", "", "margin is 1001: it must be from 1 to 1000"),
    (GOOD, "iter_size: 0", "iter_size is 0"),
    (GOOD, "max_iter: 0", "max_iter is 0"),
    (GOOD, 'lr_policy: "up"', 'lr_policy "up" is none of Caffe\'s'),
    (GOOD, 'lr_policy: "step"', 'lr_policy "step" needs a stepsize above 0'),
])
def test_mistakes(solver, param, extra, message):
    text = SOLVER
    name = extra.split(":")[0]
    if name in ("max_iter", "lr_policy"):
        text = re.sub(name + r': (\d+|"\w+")', "", text)
    path = solver(param, extra, text=text)
    done = plot_lambda(path)
    assert done.returncode == 1
    assert done.stdout.startswith("error: ") and message in done.stdout
    assert not (path.parent / "out.png").exists()


def test_a_margin_layer_without_labels(solver):
    for bottoms, warned in (('bottom: "x"', True),
                            ('bottom: "x" bottom: "y"', False)):
        path = solver(GOOD)
        net = path.parent / "a net.prototxt"
        net.write_text(net.read_text().replace(
            'name: "lm"', 'name: "lm" ' + bottoms))
        done = plot_lambda(path)
        assert done.returncode == 0 and bottoms in net.read_text()
        assert ("layer lm has no labels in the TRAIN phase"
                in done.stdout) == warned


def test_no_margin_layer(solver):
    path = solver("", net='layer { name: "ip" type: "InnerProduct" }')
    done = plot_lambda(path)
    assert done.returncode == 1
    assert "has no LargeMarginInnerProduct layer" in done.stdout


def test_missing_files(solver, tmp_path):
    done = plot_lambda(tmp_path / "none.prototxt")
    assert done.returncode == 1 and "error: cannot read" in done.stdout
    path = solver(GOOD)
    binary = tmp_path / "a.caffemodel"
    binary.write_bytes(b"\n\x02ip\xff\xfe")
    assert plot_lambda(binary).stdout == (
        "error: %s is no prototxt: it is no text\n" % binary)
    (tmp_path / "a net.prototxt").unlink()
    done = plot_lambda(path)
    assert done.returncode == 1 and "which is not there" in done.stdout


@pytest.mark.parametrize("final", ["0", "-1", "nan", "inf", "2000"])
def test_suggestion_of_nonsense(solver, final):
    done = plot_lambda(solver(GOOD), "--suggest=" + final)
    assert done.returncode != 0
    assert "--suggest %s" % final in done.stdout


# ---- Epochs ----

DATA = """
layer { name: "data" type: "%s" top: "data" top: "label"
  %s { source: "%s" batch_size: 20 %s } include { phase: TRAIN } }
layer { name: "data" type: "ImageData" top: "data" top: "label"
  image_data_param { source: "none.txt" batch_size: 1 }
  include { phase: TEST } }
"""


def image_list(folder, count):
    """The list of that many images, with an empty line at its end."""
    names = []
    for i in range(count):
        names.append("%d.png" % i)
        Image.new("L", (4, 4), i).save(str(folder / names[-1]))
    path = folder / "list.txt"
    path.write_text("".join("%s %d\n" % (name, i % 2)
                            for i, name in enumerate(names)) + "\n")
    return path


@pytest.mark.parametrize("kind", ["list", "lmdb"])
def test_epochs(solver, tmp_path, caffe_root, kind):
    images = tmp_path / "some images"
    images.mkdir()
    source = image_list(images, 50)
    layer = ("ImageData", "image_data_param", source, "")
    if kind == "lmdb":
        database = tmp_path / "a database"
        subprocess.run(
            [os.path.join(caffe_root, "build/tools/convert_imageset"),
             "--gray", "%s/" % images, source, database], check=True,
            stderr=subprocess.DEVNULL)
        layer = ("Data", "data_param", database, "backend: LMDB")
        before = sorted(database.iterdir())
    # An iteration is 3 x 20 of 50 images.
    done = plot_lambda(solver(GOOD, "iter_size: 3", net=DATA % layer
                              + NET.replace("%s", GOOD)))
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith(
        "data: %s, 50 samples, 60 an iteration: an epoch is 0.8333 iterations"
        % layer[2])
    first = re.search(r"10 % from iteration (\d+) on \((\S+) epochs\)",
                      done.stdout)
    assert float(first[2]) == pytest.approx(int(first[1]) * 1.2, rel=0.005)
    if kind == "lmdb":
        # Nothing was written beside the data.
        assert sorted(database.iterdir()) == before


@pytest.mark.parametrize("layer, why", [
    (("ImageData", "image_data_param", "none.txt", ""),
     "none.txt is not there"),
    (("Data", "data_param", "a folder", "backend: LMDB"), "a folder: "),
    (("Data", "data_param", "a folder", ""),
     "a LevelDB does not tell its size"),
    (("ImageData", "image_data_param", "empty.txt", ""),
     "empty.txt has 0 samples"),
])
def test_no_epochs(solver, tmp_path, layer, why):
    (tmp_path / "a folder").mkdir()
    (tmp_path / "empty.txt").write_text("")
    path = solver(GOOD, net=DATA % layer + NET.replace("%s", GOOD))
    done = plot_lambda(path, cwd=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "data: no epochs, as %s" % why in done.stdout
    assert "epochs)" not in done.stdout
    assert sorted((tmp_path / "a folder").iterdir()) == []


# ---- Several ----

def comparison(text):
    """The table of --compare: for each row its name, and cells by column."""
    lines = text[text.index("\ncompared: "):].splitlines()
    rows = [re.split(r"  +", line.strip()) for line in lines[3:-1]]
    return {row[-1]: dict(zip(rows[0], row)) for row in rows[1:]}


def test_compare(solver, tmp_path):
    path = solver(GOOD)
    text = path.read_text()
    other_net = tmp_path / "other.prototxt"
    other_net.write_text(NET % FAST)
    other = tmp_path / "other_solver.prototxt"
    other.write_text(text.replace("a net.prototxt", "other.prototxt").replace(
        "4000", "3000"))
    candidate = "base=1000, gamma=0.12,power=1,lambda_min=5,margin=3"
    done = run("plot_lambda.py", path, "--compare", other, candidate,
               cwd=str(tmp_path))
    assert done.returncode == 0, done.stdout
    rows = comparison(done.stdout)
    assert list(rows) == [str(path), str(other), candidate]
    assert rows[str(path)] == {
        "m": "4", "base": "1000", "gamma": "0.0001", "power": "12",
        "lambda_min": "0", "at the first drop": "17.6 (4000)",
        "at the end": "0.244 (10000)", "10 %": "4807", "50 %": "7782",
        "90 %": "never", "of": str(path)}
    assert rows[str(other)]["at the first drop"] == "0.0335 (3000)"
    assert rows[candidate]["m"] == "3"
    assert rows[candidate]["at the end"] == "5 (10000)"
    assert rows[candidate]["50 %"] == "never"
    assert "note: %s: lambda_min keeps lambda at 5" % candidate in done.stdout
    png = tmp_path / "solver_compare_lambda.png"
    assert done.stdout.endswith("plot: %s\n" % png)
    # The legend of four names is below.
    assert Image.open(str(png)).size == (800, 530)


def test_the_legend_names_each_layer_once(solver, monkeypatch, capsys):
    import plot_lambda as tool
    second = NET.split("layer {")[-2].replace('"lm"', '"other"')
    path = solver(GOOD, net=NET + "layer {" + second % GOOD)
    made = []
    monkeypatch.setattr(tool.figures, "save",
                        lambda figure, path: made.append(figure))
    monkeypatch.setattr(sys, "argv", ["plot_lambda.py", str(path),
                                      "--suggest", "5"])
    tool.main()
    names = [text.get_text() for figure in made
             for text in figure.axes[0].get_legend().get_texts()]
    assert names == [
        "lambda of " + name + what for name in ("lm", "other")
        for what in ("", ", suggested", ", with lambda_min")] + [
            "learning rate"]


def test_a_candidate_is_drawn_over_the_net(solver, pb):
    import plot_lambda as tool
    first = tool.read(pb, str(solver(GOOD + " lambda_min: 2 iteration: 7")))
    # What is not named stays; the net itself, too.
    made, = tool.others(pb, first, ["gamma=0.01"])
    param = made.param
    assert (param.base, param.gamma, param.power, param.lambda_min,
            param.iteration, made.m) == (1000, pytest.approx(0.01), 12, 2, 7,
                                         4)
    assert first[0].param.gamma == pytest.approx(0.0001)
    axis, rate = tool.draw(first + [made], "title").axes
    curves = [line for line in axis.get_lines()
              if line.get_label().startswith("lambda of")]
    for line, descent in zip(curves, first + [made]):
        x, y = line.get_data()
        assert [descent.at(i) for i in x[::500]] == list(y[::500])
    assert len(curves) == 2 and len(rate.get_lines()) == 1
    # Where the margin has 10 % of the weight; 50 % never comes.
    dots = [line.get_xdata()[0] for line in axis.get_lines()
            if line.get_marker() == "o"]
    assert dots == [first[0].first_below(9), made.first_below(9)]
    assert str(dots[0]) in [text.get_text() for text in axis.texts]


@pytest.mark.parametrize("other, says", [
    ("none.prototxt", "cannot read none.prototxt"),
    ("bas=3", '--compare bas=3: "bas" is none of margin, base, gamma, power'),
    ("base=x", '--compare base=x: base is "x": a number is wanted'),
    ("base=1,base=2", "--compare base=1,base=2: base is there twice"),
    ("gamma=-1", "--compare gamma=-1: layer lm: largemargin_inner_product_"
     "param.gamma is -1"),
    ("margin=0", "largemargin_inner_product_param.margin is 0"),
    ("margin=-1", "--compare margin=-1: "),
    ("margin=2.5", '--compare margin=2.5: margin is "2.5": a whole number is '
     "wanted"),
    ("margin=100000", "margin is 100000: it must be from 1 to 1000"),
    ("base=inf", "base is inf: it must be finite and at least 0"),
])
def test_mistakes_in_what_is_compared(solver, pb, other, says):
    import plot_lambda as tool
    first = tool.read(pb, str(solver(GOOD)))
    with pytest.raises(tool.UserError, match=re.escape(says)):
        tool.others(pb, first, ["base=1", other])


# ---- What the authors used ----

SPHEREFACE = ("margin: 4 base: 1000 gamma: 0.12 power: 1 lambda_min: 5 "
              "iteration: 0")


def test_spherefaces_schedule(solver):
    """lambda is at its minimum long before the first drop, on purpose."""
    text = '''net: "%s" base_lr: 0.1 lr_policy: "multistep" gamma: 0.1
stepvalue: 16000 stepvalue: 24000 stepvalue: 28000 max_iter: 28000 %s'''
    done = plot_lambda(solver(SPHEREFACE, text=text))
    assert done.returncode == 0, done.stdout
    assert "warning: " not in done.stdout
    assert ("lambda at the drops of the learning rate: 5 (iteration 16000), 5 "
            "(iteration 24000)\n") in done.stdout
    assert "lambda_min keeps lambda at 5 from iteration 1658 on" in done.stdout
    # Without lambda_min, it would end low before the first drop: no harm.
    done = plot_lambda(solver(SPHEREFACE.replace("lambda_min: 5", ""),
                              text=text))
    assert "warning: " not in done.stdout


@pytest.mark.parametrize("classes, batch, iter_size, warned", [
    (10, 100, 1, False), (800, 100, 1, True), (800, 5000, 1, False),
    (10, 10, 1, True), (10, 100, 10, False)])
def test_early_is_by_the_samples_of_a_class(solver, classes, batch, iter_size,
                                            warned):
    """lambda is 1 after some 90 forward passes."""
    data = ('layer { name: "d" type: "Data" top: "x" top: "y" '
            'data_param { source: "none" batch_size: %d } }' % batch)
    net = data + NET.replace("num_output: 10", "num_output: %d" % classes)
    done = plot_lambda(solver("margin: 4 base: 1000 gamma: 0.1 power: 3",
                              "iter_size: %d" % iter_size, net=net))
    assert done.returncode == 0, done.stdout
    assert ("before the net has learned anything" in done.stdout) == warned
    assert not warned or "samples of a class" in done.stdout


def test_the_readme_promises_what_the_tool_warns_of():
    """Its section names the two warnings, with the tool's numbers."""
    import plot_lambda as tool
    with open(os.path.join(ROOT, "README.md")) as file:
        text = file.read()
    section = re.search(r"(?ms)^## lambda\n(.*?)^## ", text)[1]
    section = " ".join(section.split())
    assert "warns of two things" in section
    assert "Lambda still above %g at the end" % tool.HALF in section
    assert "Lambda at %g or less before the net has seen %d samples of a " \
        "class" % (tool.HALF, tool.EARLY) in section
    assert "before the first drop of the learning rate does no harm" in section


@pytest.mark.parametrize("max_iter, drop", [(3000, 1800), (30000, 5000),
                                            (28000, 16000), (400000, 200000),
                                            (20000000, 8000000), (300, 200)])
@pytest.mark.parametrize("final", [0.01, 0.5, 5, 20])
def test_suggestions_keep_to_what_was_used(solver, pb, max_iter, drop, final):
    import plot_lambda as tool
    text = ('net: "%%s" base_lr: 0.1 lr_policy: "multistep" gamma: 0.1 '
            'stepvalue: %d max_iter: %d %%s' % (drop, max_iter))
    descent, = tool.read(pb, str(solver(
        "type: DOUBLE base: 100000", text=text)))
    made = descent.changed("suggested", **tool.suggest(descent, final))
    param = made.param
    assert param.base == 1000
    assert 1e-5 * (1 - 1e-6) <= param.gamma <= 0.12 * (1 + 1e-6)
    assert 1 <= param.power <= 45
    assert made.end() == pytest.approx(final, rel=0.01)
    # In no more than 20 million iterations power 1 is slow enough.
    assert (param.lambda_min > 0) == (max_iter == 20000000 and final > 4.9)
    if not param.lambda_min and final < 15:
        # No other of them is nearer to 15 at the drop.
        wanted = math.log(15)
        here = abs(math.log(made.at(drop)) - wanted)
        for power in np.linspace(1, 45, 200):
            gamma = ((1000 / final) ** (1 / power) - 1) / max_iter
            if 1e-5 <= gamma <= 0.12:
                there = 1000 * (1 + gamma * drop) ** -power
                assert abs(math.log(there) - wanted) > here - 0.05


def test_a_suggestion_that_nothing_reaches(solver):
    text = SOLVER.replace("10000", "2")
    done = plot_lambda(solver(GOOD, text=text), "--suggest", "0.001")
    assert done.returncode == 1
    assert ("--suggest 0.001: 2 iterations are too few for it: with gamma "
            "0.12 and power 45") in done.stdout


def test_suggestion_tells_lambda_at_the_drops_and_a_minimum(solver):
    done = plot_lambda(solver(GOOD), "--suggest", "1.5")
    assert done.returncode == 0, done.stdout
    drops = re.findall(r"^lambda at the drops of the learning rate: (\S+) "
                       r"\(iteration 4000\), (\S+) \(iteration 8000\)$",
                       done.stdout, re.M)
    # Of the net, the suggestion, and the net's own with a minimum.
    assert drops == [("17.6", "0.864"), ("15", "2.72"), ("17.6", "1.5")]
    own = done.stdout[done.stdout.index("or the net's own"):]
    assert own.startswith("or the net's own base, gamma and power, with a "
                          "lambda_min: lambda is 1.5 from iteration 7191 on\n"
                          "    base: 1000\n    gamma: 0.0001\n    power: 12\n"
                          "    lambda_min: 1.5\n")
    assert 1000 * 1.7191 ** -12 > 1.5 > 1000 * 1.7193 ** -12


@pytest.mark.parametrize("param, why", [
    ("margin: 2 base: 1000", "lambda is still 1e+03 at the end"),
    ("margin: 2 base: 3 gamma: 0.1", "lambda begins at 2.73"),
])
def test_no_minimum_where_it_makes_no_descent(solver, pb, capsys, param, why):
    import plot_lambda as tool
    descent, = tool.read(pb, str(solver(param)))
    assert len(tool.print_suggestions(descent, 5)) == 1
    assert ("with the net's own base, gamma and power a lambda_min of 5 makes "
            "no descent to it: %s\n" % why) in capsys.readouterr().out


def test_recipes(pb):
    """The table is what the tool computes from the prototxts."""
    import plot_lambda as tool
    with open(os.path.join(ROOT, "myexamples", "RECIPES.md")) as file:
        lines = [line.strip("| \n").split(" | ") for line in file
                 if line.startswith("|")]
    assert lines[0] == ["solver", "data"] + tool.CELLS
    for row in lines[2:]:
        name, path = re.fullmatch(r"\[(.*)\]\((.*)\)", row[0]).groups()
        assert path == name + ".prototxt"
        descent, = tool.read(pb, os.path.join(ROOT, "myexamples", path))
        assert row[2:] == descent.cells(), name
    named = {row[0].split("/")[0].lstrip("[") for row in lines[2:]}
    assert {"mnist", "cifar10", "cifar10+", "faces"} <= named
    sphereface, = [row for row in lines[2:] if "SphereFace" in row[1]]
    assert sphereface[2:7] == ["4", "1000", "0.12", "1", "5"]


def test_psi_is_continuous_and_falls():
    from plot_psi import psi
    theta = np.linspace(0, np.pi, 100001)
    for m in range(1, 9):
        values = psi(theta, m)
        assert values[0] == 1
        assert values[-1] == pytest.approx(1 - 2 * m)
        steps = np.diff(values)
        assert steps.max() <= 1e-12
        assert steps.min() > -1.001 * m * np.pi / 100000
    assert np.allclose(psi(theta, 1), np.cos(theta))
    # On the first segment it is cos(m theta).
    first = theta[theta < np.pi / 4]
    assert np.allclose(psi(first, 4), np.cos(4 * first))


@pytest.mark.parametrize("lambdas, axis_name, names", [
    ([0], "psi(theta)", ["m = 1", "m = 4"]),
    ([0, 5], "(lambda cos(theta) + psi(theta)) / (1 + lambda)",
     ["m = 1, lambda = 5", "m = 1, lambda = 0", "m = 4, lambda = 5",
      "m = 4, lambda = 0"]),
])
def test_psi_names_its_curves_where_they_end(lambdas, axis_name, names):
    from plot_psi import draw
    axis, = draw([1, 4], lambdas).axes
    assert axis.get_ylabel() == axis_name
    assert [text.get_text() for text in axis.texts] == names
    ends = [line.get_ydata()[-1] for line in axis.get_lines()]
    assert sorted(text.xy[1] for text in axis.texts) == sorted(ends)
    # At the curve of that name, and not on each other.
    places = [text.get_position()[1] for text in axis.texts]
    assert max(np.diff(places)) < -0.3
    for text, place in zip(axis.texts, places):
        assert text.xy[1] >= place > text.xy[1] - 1


def test_psi_plot(tmp_path):
    png = tmp_path / "psi.png"
    done = run("plot_psi.py", "-m", 2, 4, "--lambda", 0, 5, "-o", png)
    assert done.returncode == 0, done.stdout
    assert Image.open(str(png)).size == (600, 450)
    for m in (0, 1001):
        done = run("plot_psi.py", "-m", m, "-o", png)
        assert done.returncode == 2
        assert "-m %d: a margin is from 1 to 1000" % m in done.stdout
    assert run("plot_psi.py", "-l", "-1", "-o", png).returncode != 0


def test_psi_of_many_margins_and_lambdas(tmp_path):
    """Each curve has a look of its own and its name in the picture."""
    from plot_psi import draw
    figure = draw([1, 2, 3, 4], [0, 1, 3, 10])
    figure.canvas.draw()
    axis, = figure.axes
    looks = {(line.get_color(), line.get_linestyle())
             for line in axis.get_lines()}
    assert len(looks) == len(axis.get_lines()) == len(axis.texts) == 16
    for text in axis.texts:
        box = text.get_window_extent()
        assert axis.bbox.y0 < box.y0 < box.y1 < axis.bbox.y1
        assert box.x1 < figure.bbox.x1
    for args in (["-m", *range(1, 6), "-l", 0, 1, 3, 10],
                 ["-m", *range(1, 9)], ["-m", 2, "-l", 0, 1, 2, 3, 4]):
        done = run("plot_psi.py", *args, "-o", tmp_path / "x.png")
        assert done.returncode == 2
        assert ("a plot takes 7 margins, 4 values of lambda and 16 curves at "
                "most") in done.stdout
