"""What tests/robustness/sanitize.py says of its stages, with stand-ins."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

PROJECT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT / "tests/robustness"))

import sanitize  # noqa: E402

CARGO = """#!/bin/sh
case $* in
  --version) echo cargo 1.95.0 ;;
  *miri*) exit 1 ;;
  test*) %s ;;
esac
"""


@pytest.fixture
def results(tmp_path):
    """Runs stages with a cargo whose tests do what is given.

    Returns the exit status and (result, name, words) of each row of the table.
    """
    def run(tests, *stages):
        project = tmp_path / "a project"
        for name in ("tests/robustness", "myexamples", "cmake"):
            shutil.copytree(
                PROJECT / name, project / name, symlinks=True,
                ignore=shutil.ignore_patterns("*_lmdb", "data*"))
        (project / "src").mkdir()
        shutil.copy(PROJECT / "Cargo.toml", project)
        shutil.copy(PROJECT / "tests/stages.py", project / "tests")
        for name, text in {"cargo": CARGO % tests,
                           "rustc": "#!/bin/sh\necho host: here\n"}.items():
            program = tmp_path / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(text)
            program.chmod(0o755)
        done = subprocess.run(
            [project / "tests/robustness/sanitize.py", *stages],
            env={**os.environ, "PATH": "%s:%s" % (tmp_path / "bin",
                                                  os.environ["PATH"])},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = done.stdout.split("==> results")[1].splitlines()[1:]
        rows = [line.split(maxsplit=4) for line in lines[-len(stages) - 1:-1]]
        return done.returncode, [(row[0], row[3], " ".join(row[4:]))
                                 for row in rows], lines[-1]
    return run


def test_a_tool_that_is_missing_is_the_reason_of_its_stage_alone(results):
    status, rows, total = results(
        "echo 'test result: ok. 3 passed; 0 failed; 1 ignored'", "miri",
        "asan")
    assert status == 0
    assert rows[0][:2] == ("SKIPPED", "miri")
    assert "it would run: cargo miri test --lib; --test large" in rows[0][2]
    assert rows[1] == ("passed", "asan", "3 passed, 0 failed")
    assert total == "3 passed, 0 failed, 2 skipped"


@pytest.mark.parametrize("tests, words, total", [
    ("echo 'test result: FAILED. 2 passed; 1 failed; 0 ignored'; exit 101",
     "2 passed, 1 failed", "2 passed, 1 failed, 0 skipped"),
    ("exit 3", "0 passed, 0 failed", "0 passed, 1 failed, 0 skipped"),
    ("true", "ran no test", "0 passed, 1 failed, 0 skipped"),
])
def test_stages_that_fail(results, tests, words, total):
    """Also one that says it passed, and has run nothing."""
    status, rows, closing = results(tests, "asan")
    assert status == 1
    assert rows == [("FAILED", "asan", words)] and closing == total


# Solvers as Caffe's, with an iteration that nobody has set.
SOLVER = """int characters;
struct Solver {
  void SnapshotFilename() { if (iter_ > 9) { characters = iter_; } }
  void CheckSnapshotWritePermissions() { SnapshotFilename(); }
  void Snapshot() { SnapshotFilename(); }
  int iter_;
};
int main() { Solver solver; solver.%s(); }
"""


@pytest.mark.skipif(not shutil.which("valgrind"), reason="no valgrind")
@pytest.mark.parametrize("caller, status", [
    ("CheckSnapshotWritePermissions", 0), ("Snapshot", 9)])
def test_only_the_name_that_caffes_solver_tries_is_let_through(
        tmp_path, caller, status):
    (tmp_path / "suppressions").write_text(sanitize.SUPPRESSIONS)
    subprocess.run(["c++", "-O0", "-g", "-x", "c++", "-o", tmp_path / "solver",
                    "-"], input=SOLVER % caller, text=True, check=True)
    done = subprocess.run(
        ["valgrind", "--suppressions=%s" % (tmp_path / "suppressions"),
         "--error-exitcode=9", tmp_path / "solver"], stderr=subprocess.PIPE,
        text=True)
    assert done.returncode == status, done.stderr


def stage(folder, *command):
    """A program that runs a command as its one stage."""
    return [sys.executable, "-c", "import pathlib, sys\n"
            "sys.path.insert(0, %r)\n"
            "import stages\n"
            "stages.ROOT = pathlib.Path(%r)\n"
            "run = stages.Stages('logs', 1)\n"
            "run.stage('slow', None, *sys.argv[1:])\n"
            "run.end()\n" % (str(PROJECT / "tests"), str(folder)), *command]


def test_a_stage_that_is_stopped_leaves_nothing_running(tmp_path):
    run = subprocess.Popen(
        stage(tmp_path, "sh", "-c", "echo $$; exec sleep 60"), text=True,
        stdout=subprocess.PIPE)
    assert run.stdout.readline() == "==> [1/1] slow\n"
    pid = int(run.stdout.readline())
    run.terminate()
    assert run.wait(timeout=60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_stage_hears_sigint_in_a_scripts_background(tmp_path):
    """There it is ignored, and tests send it."""
    done = subprocess.run(
        stage(tmp_path, "sh", "-c", "kill -s INT $$; echo ignored"),
        text=True, stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert done.returncode == 1
    assert "ignored" not in done.stdout and "slow failed" in done.stdout
