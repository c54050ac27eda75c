"""What `watch_training.py --stop` makes of a training that goes wrong."""
import os
import re
import shlex
import signal
import subprocess
import sys
import types

import h5py
import numpy as np
import pytest

from conftest import CAFFE_ROOT, ROOT

sys.path.insert(0, os.path.join(ROOT, "myexamples"))
import gentler  # noqa: E402

CAFFE = os.path.join(CAFFE_ROOT, "build/tools/caffe")
WATCH = os.path.join(ROOT, "myexamples/watch_training.py")
NET = """
name: "small"
layer {
  name: "data" type: "HDF5Data" top: "data" top: "label"
  hdf5_data_param { source: "data.txt" batch_size: 16 }
}
layer {
  name: "ip1" type: "InnerProduct" bottom: "data" top: "ip1"
  inner_product_param { num_output: 6 weight_filler { type: "xavier" } }
}
layer { name: "prelu1" type: "PReLU" bottom: "ip1" top: "ip1" }
layer {
  name: "ip2" type: "LargeMarginInnerProduct"
  bottom: "ip1" bottom: "label" top: "ip2" top: "lambda"
  largemargin_inner_product_param {
    num_output: 4 type: QUADRUPLE base: 1000 gamma: 0.1 power: 2
    weight_filler { type: "xavier" }
  }
}
layer {
  name: "loss" type: "SoftmaxWithLoss" bottom: "ip2" bottom: "label"
  top: "loss"
}
"""
# It learns, until the learning rate goes up.
SOLVER = """
net: "net.prototxt" base_lr: 0.05 momentum: 0.9
lr_policy: "multistep" gamma: 1e9 stepvalue: 35
max_iter: 100000 display: 10 snapshot: 10 snapshot_prefix: "a folder/small"
solver_mode: CPU random_seed: 1
"""


@pytest.fixture
def folder(tmp_path, caffe_root):
    """A folder to train in; a command is run from there."""
    random = np.random.RandomState(1)
    labels = np.arange(32) % 4
    with h5py.File(tmp_path / "data.h5", "w") as data:
        data["data"] = np.float32(
            random.randn(4, 8)[labels] + 0.3 * random.randn(32, 8))
        data["label"] = np.float32(labels)
    (tmp_path / "data.txt").write_text("data.h5\n")
    (tmp_path / "net.prototxt").write_text(NET)
    (tmp_path / "solver.prototxt").write_text(SOLVER)
    (tmp_path / "a folder").mkdir()
    return tmp_path


def run(folder, *args):
    return subprocess.run(
        [WATCH, *map(str, args)], cwd=folder, text=True, timeout=120,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=dict(os.environ, CAFFE_ROOT=CAFFE_ROOT, OMP_NUM_THREADS="1",
                 OPENBLAS_NUM_THREADS="1", LSOFTMAX_LOG_EVERY="10"))


def stopped(folder, *options):
    """A training that --stop has ended: its output, and its last command."""
    done = run(folder, "--stop", "--log", "train.log", "--", CAFFE, "train",
               "--solver=solver.prototxt", *options)
    assert done.returncode == 3, done.stdout
    return done.stdout, shlex.split(done.stdout.splitlines()[-1])


def read(pb, path, message):
    from google.protobuf import text_format
    return text_format.Parse(path.read_text(), getattr(pb, message)())


def test_stop_goes_back_to_the_last_good_snapshot(folder, pb):
    out, command = stopped(folder)
    lines = out.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 1
    at = int(re.match(r"warning: iteration (\d+): ", warnings[0])[1])
    assert at == 40
    assert lines[lines.index(warnings[0]) + 1] == (
        "stopping the training (--stop)")
    state = "a folder/small_iter_30.solverstate"
    assert "stopped: the last good snapshot is " + state in lines
    assert "go on from there with a gentler descent by" in lines
    assert command == [
        CAFFE, "train", "--solver=a folder/small_gentler_solver.prototxt",
        "--snapshot=" + state]
    # Caffe's log is whole, its last snapshot included.
    log = (folder / "train.log").read_text()
    assert "Optimization stopped early." in log
    solver = read(pb, folder / "a folder/small_gentler_solver.prototxt",
                  "SolverParameter")
    assert solver.net == "a folder/small_gentler_net.prototxt"
    assert solver.base_lr == pytest.approx(0.005)
    assert solver.snapshot_prefix == "a folder/small_gentler"
    net = read(pb, folder / solver.net, "NetParameter")
    param = net.layer[3].largemargin_inner_product_param
    # lambda gets to 1 after 0.15 of the iterations.
    assert param.base == 1000 and param.power == 2
    assert param.gamma == pytest.approx(
        (1000 ** 0.5 - 1) / (0.15 * 100000), rel=0.01)
    assert "base_lr: 0.005 (was 0.05)" in lines
    # The command works as it stands, and lambda is higher than before.
    solver_path = folder / "a folder/small_gentler_solver.prototxt"
    text = solver_path.read_text().replace("max_iter: 100000", "max_iter: 34")
    solver_path.write_text(text)
    again = run(folder, "--log", "again.log", "--", *command)
    assert again.returncode == 0, again.stdout
    assert "30/34" in again.stdout and "warning" not in again.stdout
    log = (folder / "again.log").read_text()
    assert "resumes after 30 forward passes" in log
    assert (folder / "a folder/small_gentler_iter_34.caffemodel").exists()


def test_nothing_is_overwritten(folder):
    for _ in range(2):
        _, command = stopped(folder)
    assert command[2] == "--solver=a folder/small_gentler_solver_2.prototxt"
    assert "small_gentler_net_2.prototxt" in (
        folder / "a folder/small_gentler_solver_2.prototxt").read_text()


def test_a_snapshot_that_is_cut_short_is_not_gone_back_to(
        folder, pb, monkeypatch):
    (folder / "solver.prototxt").write_text(
        SOLVER.replace("snapshot: 10", "snapshot: 15"))
    out, command = stopped(folder)
    assert command[-1].endswith("small_iter_30.solverstate")
    model = folder / "a folder/small_iter_30.caffemodel"
    model.write_bytes(model.read_bytes()[:100])
    monkeypatch.chdir(folder)
    states = ["a folder/small_iter_%d.solverstate" % n for n in (15, 30, 45)]
    assert gentler.last_good(pb, states, 30) == states[0]
    assert gentler.last_good(pb, states, 14) is None
    assert gentler.last_good(pb, states, None) is None


def test_without_a_good_snapshot_the_training_begins_again(folder):
    (folder / "solver.prototxt").write_text(
        SOLVER.replace("snapshot: 10", "").replace(
            "stepvalue: 35", "stepvalue: 5"))
    out, command = stopped(folder)
    assert "stopped: no snapshot is from before the trouble" in out
    assert "start again with a gentler descent by" in out
    assert command == [CAFFE, "train", "--solver=a folder/"
                       "small_gentler_solver.prototxt"]


def test_a_training_that_learns_is_left_alone(folder):
    (folder / "solver.prototxt").write_text(
        SOLVER.replace("gamma: 1e9", "gamma: 0.1").replace("100000", "60"))
    done = run(folder, "--stop", "--", CAFFE, "train",
               "-solver", "solver.prototxt")
    assert done.returncode == 0, done.stdout
    assert "warning" not in done.stdout and "60/60" in done.stdout
    assert not list((folder / "a folder").glob("*gentler*"))


def test_the_status_and_the_words_of_a_caffe_that_fails(folder):
    done = run(folder, "--stop", "--", CAFFE, "train", "--solver=none")
    assert done.returncode == 128 + signal.SIGABRT
    assert "File not found: none" in done.stdout


@pytest.mark.parametrize("snapshots", [True, False])
def test_ctrl_c_lets_caffe_write_its_snapshot(folder, snapshots):
    (folder / "solver.prototxt").write_text(
        SOLVER.replace("gamma: 1e9", "gamma: 0.1").replace(
            "snapshot: 10 ", "snapshot: 1000000 snapshot_after_train: %s "
            % str(snapshots).lower()))
    process = subprocess.Popen(
        [WATCH, "--log", "train.log", "--", CAFFE, "train",
         "--solver=solver.prototxt"], cwd=folder, text=True,
        start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    for line in process.stdout:
        if "10/" in line:
            break
    # As a terminal does, to both.
    os.killpg(process.pid, signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0, out
    assert "Traceback" not in out
    states = list((folder / "a folder").glob("*.solverstate"))
    assert len(states) == snapshots
    assert out.splitlines()[-1] == "stopped before the end; " + (
        "go on from there with --snapshot='a folder/%s'" % states[0].name
        if snapshots else "there is no snapshot to go on from")
    assert "stopped early" in (folder / "train.log").read_text()


@pytest.mark.parametrize("args, words", [
    (["--stop"], "--stop needs a Caffe to start"),
    (["--log", "x"], "--log needs a Caffe to start"),
    (["--"], "no command after --"),
    (["--stop", "--", "caffe", "train"], "--stop needs the --solver"),
    (["--stop", "--", "caffe", "train", "--solver=x",
      "--sigint_effect=snapshot"], "with --sigint_effect=snapshot"),
    (["LOG"], "unrecognized arguments: LOG"),
])
def test_bad_usage(tmp_path, args, words):
    done = subprocess.run([WATCH, *args], cwd=tmp_path, text=True,
                          stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_command_that_is_not_there(tmp_path):
    done = subprocess.run([WATCH, "--", "no-caffe", "train"], cwd=tmp_path,
                          text=True, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == (
        "error: cannot start no-caffe: No such file or directory\n")


def test_options_in_the_manner_of_gflags():
    command = ["caffe", "train", "-solver", "a", "--gpu=0", "--weights=w",
               "--solver=b"]
    assert gentler.option(command, "solver") == "b"
    assert gentler.option(command, "gpu") == "0"
    assert gentler.option(command, "snapshot") is None
    assert gentler.without(command, "solver") == [
        "caffe", "train", "--gpu=0", "--weights=w"]


def test_advice_after_weights_and_with_iter_size(folder, pb, monkeypatch):
    (folder / "solver.prototxt").write_text(
        SOLVER.replace("100000", "10000") + "iter_size: 5")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(gentler, "is_whole", lambda pb, state: True)
    alarm = types.SimpleNamespace(good=30, cause="descent")
    lines = gentler.advice(
        [CAFFE, "train", "--weights=w", "--solver=solver.prototxt"], alarm,
        ["x_iter_20.solverstate"]).splitlines()
    # Caffe refuses --weights beside --snapshot.
    assert shlex.split(lines[-1]) == [
        CAFFE, "train", "--solver=a folder/small_gentler_solver.prototxt",
        "--snapshot=x_iter_20.solverstate"]
    # lambda gets to 1 after 0.15 of the passes, five an iteration.
    net = read(pb, folder / "a folder/small_gentler_net.prototxt",
               "NetParameter")
    assert net.layer[3].largemargin_inner_product_param.gamma == pytest.approx(
        (1000 ** 0.5 - 1) / (0.15 * 50000), rel=0.01)
    # A start anew keeps its weights.
    again = gentler.advice(
        [CAFFE, "train", "--weights=w", "--solver=solver.prototxt"], alarm, [])
    assert shlex.split(again.splitlines()[-1])[2] == "--weights=w"


@pytest.mark.parametrize("before, base, power", [
    ("base: 1000 gamma: 1000 power: 3", 1000, 3),
    ("base: 0", 1000, 3),
    ("base: 200", 2000, 3),
    ("base: 1 gamma: 0 power: 1", 1000, 3),
    ("base: 1000 gamma: 0.000025 power: 35", 1000, 35)])
def test_a_gentler_descent(pb, before, base, power):
    from google.protobuf import text_format
    param = text_format.Parse(
        "num_output: 10 margin: 4 " + before,
        pb.LargeMarginInnerProductParameter())
    gamma = param.gamma
    change = gentler.slow_down(param, 6000)
    assert (param.base, param.power) == (base, power)
    assert "gamma: %.6g (was %.6g)" % (param.gamma, gamma) in change
    # lambda is 1 after 900 iterations at the soonest.
    at_900 = param.base * (1 + param.gamma * 900) ** -param.power
    assert at_900 > 0.97
    if gamma == pytest.approx(0.000025):
        assert param.gamma == pytest.approx(gamma / 4)
    else:
        assert at_900 < 1.03


def test_no_descent_without_a_margin(pb):
    param = pb.LargeMarginInnerProductParameter(num_output=10, gamma=0.1)
    assert gentler.slow_down(param, 100) == ""
    assert param.gamma == pytest.approx(0.1)


def test_ctrl_c_in_a_pipe_shows_the_rest_of_the_log():
    process = subprocess.Popen([WATCH], stdin=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE, bufsize=1,
                               stderr=subprocess.PIPE)
    line = "I1123 21:04:05.1  1 solver.cpp:1] Iteration %d, loss = 2\n"
    process.stdin.write(line % 0 + line % 5)
    # The first row is out, so that the program is past its start.
    assert process.stdout.readline() and process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(line % 10, timeout=30)
    assert process.returncode == 0 and errors == ""
    assert [row.split()[0] for row in out.splitlines()] == ["5/?", "10/?"]
