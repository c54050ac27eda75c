"""plot_lambda.py and plot_psi.py on solvers whose lambda is known."""
import os
import re
import subprocess
import sys

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
    assert "warning" not in done.stdout
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


@pytest.mark.parametrize("param, warning", [
    ("margin: 3 base: 1000", "lambda is still 1000 at the end (gamma and"),
    ("margin: 3 base: 1000 gamma: 0.0001 power: 2", "is still 250 at the end"),
    (GOOD + " lambda_min: 20", "lambda is still 20 at the end (lambda_min"),
    ("margin: 3 base: 1000 gamma: 0.0001 power: 40",
     "falls below 1 at iteration 1885, before the first drop of the learning "
     "rate at 4000"),
    ("margin: 2 base: 0", "below 1 from the first iteration"),
    ("margin: 1 base: 1000", "plain softmax"),
])
def test_warnings(solver, param, warning):
    done = plot_lambda(solver(param))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("warning: lm: ") == 1
    assert warning in done.stdout


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
    assert "warning" not in done.stdout


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


def test_reads_the_examples(tmp_path, caffe_root):
    for name in ("mnist/mnist_solver", "mnist/quick_solver",
                 "cifar10/cifar10_solver", "cifar10+/model/cifar10+_solver"):
        done = run("plot_lambda.py",
                   os.path.join(ROOT, "myexamples", name + ".prototxt"),
                   "-o", tmp_path / "out.png")
        assert done.returncode == 0, done.stdout
        assert "warning" not in done.stdout


@pytest.mark.parametrize("param, extra, message", [
    ("no_such: 1", "", 'a net.prototxt:4:52 : Message type "caffe.'),
    ("gamma: -1", "", "layer lm: largemargin_inner_product_param.gamma is -1"),
    ("base: nan", "", "largemargin_inner_product_param.base is nan"),
    ("margin: 0", "", "largemargin_inner_product_param.margin is 0"),
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


def test_no_margin_layer(solver):
    path = solver("", net='layer { name: "ip" type: "InnerProduct" }')
    done = plot_lambda(path)
    assert done.returncode == 1
    assert "has no LargeMarginInnerProduct layer" in done.stdout


def test_missing_files(solver, tmp_path):
    done = plot_lambda(tmp_path / "none.prototxt")
    assert done.returncode == 1 and "error: cannot read" in done.stdout
    path = solver(GOOD)
    (tmp_path / "a net.prototxt").unlink()
    done = plot_lambda(path)
    assert done.returncode == 1 and "which is not there" in done.stdout


@pytest.mark.parametrize("final", ["0", "-1", "nan", "inf", "2000"])
def test_suggestion_of_nonsense(solver, final):
    done = plot_lambda(solver(GOOD), "--suggest=" + final)
    assert done.returncode != 0
    assert "--suggest %s" % final in done.stdout


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


def test_psi_plot(tmp_path):
    png = tmp_path / "psi.png"
    done = run("plot_psi.py", "-m", 2, 4, "--lambda", 0, 5, "-o", png)
    assert done.returncode == 0, done.stdout
    assert Image.open(str(png)).size == (600, 450)
    assert run("plot_psi.py", "-m", 0, "-o", png).returncode != 0
    assert run("plot_psi.py", "-l", "-1", "-o", png).returncode != 0
