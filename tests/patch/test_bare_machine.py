"""What tests/robustness/bare_machine.py makes of its commands' words."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]
                       / "robustness"))

import bare_machine  # noqa: E402

ASKS = "error: only root can\n  Ask for\n  apt-get install " \
    "--no-install-recommends %s\n"
QUICK, TESTS = bare_machine.COMMANDS[:2]


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system in which commands end with the next of what is given.

    That is an exit status, what it says, and a file that it makes.
    """
    class System:
        path = tmp_path / "system"
        home = path / "home/user"
        ends, installed = [], []

        def enter(self, path, user, command, log, show=False):
            assert path == self.path
            if "apt-get" in command:
                assert user == "root"
                self.installed.append(command[-2:])
                return 0
            status, words, makes = self.ends.pop(0)
            log.write_text(words)
            if makes:
                (self.home / makes).touch()
            return status

        def run(self, command, *ends, as_user=True):
            self.ends = list(ends)
            return bare_machine.run(command, self.path, tmp_path / "log",
                                    as_user)
    made = System()
    made.home.mkdir(parents=True)
    monkeypatch.setattr(bare_machine, "in_system", made.enter)
    return made


def test_packages_are_installed_and_the_command_runs_again(system):
    assert system.run(QUICK, (1, ASKS % "cmake curl", None),
                      (1, ASKS % "npm gzip", None),
                      (0, "done", "model")) == (True, 2)
    assert system.installed == [["cmake", "curl"], ["npm", "gzip"]]


def test_asks_for_what_is_there(system, capsys):
    assert system.run(TESTS, *[(1, ASKS % "a b", None)] * 2) == (False, 1)
    assert "asks for packages that are there: a b" in capsys.readouterr().out


def test_makes_files_before_it_asks(system, capsys):
    assert system.run(QUICK, (1, ASKS % "a b", "half")) == (False, 0)
    assert "made files before it asked for packages: " in (
        capsys.readouterr().out)
    # Only the first has to ask before anything.
    assert system.run(TESTS, (1, ASKS % "a b", "more"),
                      (0, "", None)) == (True, 1)


@pytest.mark.parametrize("as_user", [True, False])
def test_fails_for_another_reason(system, as_user):
    words = "E: broken" if as_user else ASKS % "a b"
    assert system.run(QUICK, (1, words, None), as_user=as_user) == (False, 0)
    assert not system.installed


@pytest.mark.parametrize("command, log, row", [
    (QUICK, "==> x\ntest accuracy: 0.9921 after 20 iterations\nmodel: m\n",
     (True, "test accuracy: 0.9921 after 20 iterations")),
    (TESTS, "12 passed, 0 failed, 0 skipped\n",
     (True, "12 passed, 0 failed, 0 skipped")),
    (TESTS, "==> [6/12] cuda emulated: SKIPPED, no nvcc\n11 passed, 0 failed, "
     "1 skipped\n", (False, "11 passed, 0 failed, 1 skipped, a stage SKIPPED,"
                     " see log")),
    ("cmake/build_caffe.sh --deb", "build_caffe.sh: made /a/b.deb: install it "
     "by sudo apt-get install /a/b.deb\n", (True, "made /a/b.deb")),
])
def test_rows(system, tmp_path, monkeypatch, command, log, row):
    monkeypatch.setattr(bare_machine, "rel", lambda path: "log")
    system.ends = [(0, log, None)]
    found = bare_machine.try_command(command, "bookworm", system.path,
                                     tmp_path / "prefix", False)
    assert (found.passed, found.words) == row
