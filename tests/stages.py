"""Stages of tests, one after the other, whether or not an earlier one failed.

Each has its output on the screen and in a log of its own; a table ends them.
"""
import collections
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Lines with which the runners of tests count them.
CARGO = re.compile(r"^test result: ")
GTEST = re.compile(r"^\[  (PASSED|FAILED)  \] [0-9]+ tests?[.,]")
PYTEST = re.compile(
    r"^=+ .*[0-9]+ (passed|failed|errors?|skipped).* in [0-9.]+s")

# CUDA's compiler, for checks of the Rust: the crate embeds the kernels, and for
# these they may be empty.
NO_COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
: >"$2"
"""

Row = collections.namedtuple("Row", "result seconds name words")


class CannotRun(Exception):
    """Why this machine cannot run a stage."""


class Failed(Exception):
    """The exit status of a command of a stage."""


def say(words):
    print("==> " + words, flush=True)


def shell(function, *args):
    """The command that calls a function of myexamples/common.sh."""
    return ["bash", "-c", '. "$1/myexamples/common.sh"; shift; "$@"',
            os.path.basename(sys.argv[0]), str(ROOT), function, *args]


def use_the_builds_cargo():
    """The first cargo on the PATH may be too old for the library."""
    found = subprocess.run(
        [ROOT / "cmake/find_cargo.sh"], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True)
    if not found.returncode:
        os.environ["PATH"] = "%s:%s" % (found.stdout.strip(),
                                        os.environ["PATH"])


def works(*command):
    """Whether a program is there and content."""
    try:
        return not subprocess.run(command, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL).returncode
    except OSError:
        return False


def count(pattern, lines):
    """The sum of the first groups of pattern in lines."""
    return sum(int(number) for line in lines
               for number in re.findall(pattern, line))


def lock(folder):
    """A file that keeps other programs out of a folder, which it makes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")
    except OSError as error:
        sys.exit("error: cannot write to %s: %s"
                 % (folder.relative_to(ROOT), error.strerror))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("waiting for another script that works in %s"
            % folder.relative_to(ROOT))
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


class Stages:
    """Runs stages; their logs go to a folder in which nobody else works."""

    def __init__(self, folder, total, locked=False):
        """locked says that the caller has seen to it that nobody does."""
        self.folder = ROOT / folder
        self.total = total
        self.rows, self.closings = [], []
        self.passed = self.failed = self.skipped = self.number = 0
        self._log = None
        if not locked:
            self._lock = lock(self.folder)
        for log in self.folder.glob("*.log"):
            log.unlink()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        # A script's background ignores it, and so would what tests send it to.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def print(self, words):
        """Words of a stage, on the screen and in its log."""
        self._write(words.encode() + b"\n")

    def _write(self, data):
        self._log.write(data)
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def run(self, *command, **options):
        """Runs a command of a stage; raises Failed where that fails."""
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, **{"cwd": ROOT, **options})
        try:
            while True:
                part = os.read(process.stdout.fileno(), 65536)
                if not part:
                    break
                self._write(part)
            if process.wait():
                raise Failed(process.returncode)
        finally:
            # Of a stage that is stopped, too, nothing goes on in the folder.
            if process.poll() is None:
                process.terminate()
                process.wait()

    def clippy(self, *lints, **variables):
        """Clippy, with the GPU path; variables are those of its environment."""
        compiler = self.folder / "no-compiler"
        compiler.write_text(NO_COMPILER)
        compiler.chmod(0o755)
        self.run("cmake/find_cargo.sh", "clippy", "--locked", "--all-targets",
                 "--features", "cuda", "--", *lints,
                 env=dict(os.environ, LSOFTMAX_NVCC=str(compiler),
                          **variables))

    def stage(self, name, closing, *command, **options):
        """Runs a command, or calls a function, as a stage.

        closing finds the last lines of its test runner, which count its
        tests; without one, the stage counts as one test.
        """
        self.number += 1
        start = time.monotonic()
        say("[%d/%d] %s" % (self.number, self.total, name))
        log = self.folder / (re.sub("[^a-zA-Z0-9]", "-", name) + ".log")
        status, why = 0, None
        with open(log, "wb", 0) as self._log:
            try:
                if callable(command[0]):
                    command[0](*command[1:])
                else:
                    self.run(*command, **options)
            except CannotRun as reason:
                why = str(reason)
                self.print("SKIPPED: " + why)
            except Failed as failed:
                status = failed.args[0]
            except OSError as error:
                self.print(str(error))
                status = 127
        if why is not None:
            self.skipped += 1
            self._row("SKIPPED", start, name, why)
            return
        # Colours would hide the words from the patterns.
        text = re.sub("\x1b\\[[0-9;]*m", "", log.read_text(errors="replace"))
        lines = [line for line in text.splitlines()
                 if closing and closing.search(line)]
        good = (count(r"([0-9]+) passed", lines)
                + count(r"PASSED +\] ([0-9]+)", lines))
        bad = (count(r"([0-9]+) (?:failed|errors?)", lines)
               + count(r"FAILED +\] ([0-9]+)", lines))
        self.skipped += count(r"([0-9]+) (?:skipped|ignored)", lines)
        self.closings += ["%s: %s" % (name, line) for line in lines]
        words = "%d passed, %d failed" % (good, bad) if closing else ""
        if not closing and not status:
            good = 1
        elif not status and not good:
            words, status = "ran no test", 1
        if status:
            # A runner that broke down has counted nothing.
            bad = max(bad, 1)
            say("%s failed (exit status %d); its log is %s"
                % (name, status, log.relative_to(ROOT)))
        self.passed += good
        self.failed += bad
        self._row("FAILED" if status else "passed", start, name, words)

    def skip(self, name, why):
        """A stage that this machine cannot run."""
        self.number += 1
        say("[%d/%d] %s: SKIPPED, %s" % (self.number, self.total, name, why))
        self.skipped += 1
        self._row("SKIPPED", time.monotonic(), name, why)

    def _row(self, result, start, name, words):
        self.rows.append(Row(result, time.monotonic() - start, name, words))

    def end(self):
        """Prints the table, and exits."""
        seconds = sum(row.seconds for row in self.rows)
        say("results, in %d min %d s; the logs are in %s" % (
            *divmod(seconds, 60), self.folder.relative_to(ROOT)))
        for line in self.closings:
            print(line)
        for row in self.rows:
            print(("%-8s %5d s  %-34s %s" % row).rstrip())
        print("%d passed, %d failed, %d skipped"
              % (self.passed, self.failed, self.skipped))
        sys.exit(self.failed > 0)
