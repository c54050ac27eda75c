"""runs.py: what counts as a finished run, and how a comparison ends."""
import os
import resource
import signal
import sys
import time

import pytest

from conftest import CAFFE_ROOT, ROOT
from faults import hear_ctrl_c
from test_training import mnist, wait_for  # noqa: F401

sys.path.insert(0, os.path.join(ROOT, "myexamples"))
import caffe_proto  # noqa: E402
import runs  # noqa: E402

SOLVER = os.path.join(ROOT, "myexamples/mnist/compare_solver.prototxt")
HEAD = "I1123 21:04:28.123456  1234 solver.cpp:330] "
LOSS = HEAD + "Iteration 5, loss = %s\n"
TEST = (HEAD + "Iteration 6, Testing net (#0)\n" +
        HEAD + "    Test net output #0: accuracy = 0.5\n")
END = HEAD + "Optimization Done.\n"
WHOLE = LOSS % 0.1 + TEST + END


@pytest.fixture
def run(pb, tmp_path):
    return runs.Run(pb, SOLVER, str(tmp_path / "m2_seed7"), 2, 7)


@pytest.fixture
def model(pb):
    """The bytes of a model."""
    net = pb.NetParameter(name="a net")
    net.layer.add(name="ip", type="InnerProduct").blobs.add().data.extend(
        range(100))
    return net.SerializeToString()


def train(run, tmp_path, log, model=None, status=0):
    """Trains with a stand-in for Caffe; returns its exit status."""
    for name, data in (("log", log.encode()), ("model", model)):
        if data is not None:
            (tmp_path / name).write_bytes(data)
    stub = tmp_path / "caffe"
    stub.write_text("#!/bin/sh\ncat '%s/log' >&2\n%s\nexit %d\n" % (
        tmp_path, "" if model is None else "cat '%s/model' > '%s'" % (
            tmp_path, run.model), status))
    stub.chmod(0o755)
    return run.start(str(stub)).wait(timeout=60)


def test_a_finished_run(run, tmp_path, model, capsys):
    assert not run.is_done()
    run.finish(train(run, tmp_path, WHOLE, model))
    assert run.is_done() and run.accuracy() == 0.5
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("log, status", [
    (WHOLE, 1), (LOSS % 0.1 + TEST, 0), (LOSS % 0.1 + END, 0), (TEST + END, 0),
    (LOSS % 0.1 + TEST + HEAD + "Optimization stopped early.\n" + END, 0)],
    ids=["fails", "is cut", "no test", "no training", "is stopped"])
def test_a_training_that_did_not_come_to_its_end(run, tmp_path, model, log,
                                                 status):
    status = train(run, tmp_path, log, model, status)
    with pytest.raises(caffe_proto.UserError,
                       match="m2_seed7 failed .* its log is .*train.log"):
        run.finish(status)
    assert not run.is_done()


@pytest.mark.parametrize("size", [None, 0, 200])
def test_a_model_that_is_not_whole(run, tmp_path, model, size):
    """Neither when it is trained, nor when it is looked at again."""
    run.finish(train(run, tmp_path, WHOLE, model))
    # One that an earlier training left does not count either.
    status = train(run, tmp_path, WHOLE,
                   None if size is None else model[:size])
    with pytest.raises(caffe_proto.UserError,
                       match="_iter_6000.caffemodel could not be written: "
                       "make room and run this again"):
        run.finish(status)
    assert not run.is_done()

    run.finish(train(run, tmp_path, WHOLE, model))
    if size is None:
        os.remove(run.model)
    else:
        os.truncate(run.model, size)
    assert not run.is_done()


def test_a_full_disk_makes_no_mark(run, tmp_path, model):
    """An empty one would say that the images are unknown."""
    status = train(run, tmp_path, WHOLE, model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError):
            run.finish(status)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not run.is_done() and not os.path.exists(run.path + "/done")
    # As earlier versions left it.
    open(run.path + "/done", "w").close()
    assert not run.is_done()


def test_a_run_that_diverged_is_not_the_best(run, tmp_path, model):
    """Caffe's Accuracy takes NaN for right, and would give it 1."""
    log = LOSS % "nan" + TEST.replace("0.5", "1") + (
        HEAD + "    Test net output #1: loss = nan (* 1 = nan loss)\n" + END)
    run.finish(train(run, tmp_path, log, model))
    assert run.accuracy() == 0


@pytest.mark.parametrize("loss", ["nan", "87.3365"])
def test_a_run_that_diverged_is_told(run, tmp_path, model, capsys, loss):
    run.finish(train(run, tmp_path, LOSS % loss + TEST + END, model))
    assert capsys.readouterr().out == "warning: m = 2, seed 7 diverged\n"
    assert run.is_done()


# ---- Comparisons that end early ----

# Trains m = 1; another m hangs as long as a file is there, and lives on at
# Ctrl-C and at the end of its terminal, as Caffe does.
CAFFE = """#!/bin/bash
if [ -e "%(folder)s/hang" ] && [[ $2 != */m1_seed1/* ]]; then
  trap '' HUP INT
  echo $$ >"%(folder)s/new"
  mv "%(folder)s/new" "%(folder)s/training"
  exec sleep 300
fi
exec "%(real)s/build/tools/caffe" "$@"
"""


class Comparison:
    """Of m = 1, which comes to its end, and m = 2, which hangs."""

    def __init__(self, tree, folder):
        self.tree, self.root = tree, folder / "caffe"
        self.hang, self.training = folder / "hang", folder / "training"
        self.hang.touch()
        program = self.root / "build/tools/caffe"
        program.parent.mkdir(parents=True)
        program.write_text(CAFFE % {"folder": folder, "real": CAFFE_ROOT})
        program.chmod(0o755)
        (self.root / "python").symlink_to(CAFFE_ROOT + "/python")

    def start(self):
        return self.tree.start(
            "mnist/compare_margins.py", "-m", "1", "2", "--seeds", "1", "-j",
            "1", env={"CAFFE_ROOT": str(self.root)}, preexec_fn=hear_ctrl_c)

    def trains(self):
        """Whether the training that hangs is there and alive."""
        try:
            with open("/proc/%s/stat" % self.training.read_text().strip()
                      ) as file:
                return file.read().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False


@pytest.fixture
def comparison(mnist, tmp_path):  # noqa: F811
    done = mnist.run("mnist/create_mnist.sh", env=mnist.env)
    assert done.returncode == 0, done.stdout
    made = Comparison(mnist, tmp_path)
    yield made
    if made.trains():
        os.kill(int(made.training.read_text()), signal.SIGKILL)


def test_stopped_and_run_again_it_goes_on(comparison):
    process = comparison.start()
    wait_for(comparison.trains, process)
    os.killpg(process.pid, signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 1, out
    assert "1/2: m = 1, seed 1: test accuracy" in out
    assert out.splitlines()[-1] == "stopped; run this again to go on"
    assert not comparison.trains()
    comparison.hang.unlink()
    again = comparison.start()
    out = again.communicate(timeout=120)[0]
    assert again.returncode == 0, out
    assert "1 of 2 runs are done already" in out
    assert "1/1: m = 2, seed 1: test accuracy" in out


@pytest.mark.parametrize("kill, number", [
    (os.killpg, signal.SIGHUP), (os.kill, signal.SIGTERM),
    (os.kill, signal.SIGKILL)], ids=["SIGHUP", "SIGTERM", "SIGKILL"])
def test_no_training_outlives_its_comparison(comparison, kill, number):
    """The next one would write to the same files."""
    process = comparison.start()
    wait_for(comparison.trains, process)
    kill(process.pid, number)
    process.communicate(timeout=60)
    end = time.monotonic() + 10
    while comparison.trains():
        assert time.monotonic() < end, "the training goes on"
        time.sleep(0.05)
