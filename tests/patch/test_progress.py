"""The progress lines of apt-get, in cmake/shell.sh."""

import os
import pathlib
import pty
import subprocess

SHELL = pathlib.Path(__file__).resolve().parents[2] / "cmake/shell.sh"

STATUS = """Get:1 http://mirror bookworm/main libfoo
dlstatus:1:12.5000:Retrieving file 1 of 8 (2min 3s remaining)
dlstatus:8:100.0000:Retrieving file 8 of 8
Waiting for cache lock: Could not get lock /var/lib/dpkg/lock-frontend.
pmstatus:libfoo:45.7142:Unpacking libfoo (amd64)
Setting up libfoo: 1.2 ...
E: the end"""


def script(text, program="apt-get"):
    return ["bash", "-c", '. "$1"; ' + text, program, str(SHELL)]


def progress(text, status=STATUS, **options):
    return subprocess.run(script(text), input=status, text=True,
                          stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                          check=True, **options)


def test_a_line_every_ten_seconds():
    """Here at once, and for the next ten seconds no more."""
    done = progress("SECONDS=100; apt_progress")
    assert done.stdout == (
        "apt-get: downloading  12%: Retrieving file 1 of 8 "
        "(2min 3s remaining)\n")
    # A short one needs none.
    assert progress("apt_progress").stdout == ""


def test_words_of_apt_are_kept_apart():
    done = progress("apt_progress")
    assert done.stderr.splitlines() == [
        line for line in STATUS.splitlines()
        if not line.startswith(("dlstatus", "pmstatus", "Waiting"))]


def test_percent_and_package_of_an_installation():
    done = progress("progress() { say \"$1\"; }; apt_progress")
    assert done.stdout.splitlines() == [
        "apt-get: downloading  12%: Retrieving file 1 of 8 "
        "(2min 3s remaining)",
        "apt-get: downloading 100%: Retrieving file 8 of 8",
        "apt-get: waiting for another program that installs packages",
        "apt-get: installing  45%: Unpacking libfoo (amd64)"]


def test_lines_that_are_cut():
    """As apt leaves them where its status finds no room."""
    done = progress("apt_progress; echo whole", "pmstatus:libfoo:45pmstatus:\n"
                    "pmstatus:x:08.1:y\npmstatus::a[0]:\ndlstatus:1:-\n")
    assert (done.stdout, done.stderr) == ("whole\n", "")


def test_apt_that_says_nothing():
    """Its last words come again, without a line of its own."""
    process = subprocess.Popen(
        script("every=1; next_line=0; apt_progress"), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    line = "apt-get: installing  45%: Unpacking libfoo (amd64)\n"
    process.stdin.write("pmstatus:libfoo:45.7142:Unpacking libfoo (amd64)\nE:")
    process.stdin.flush()
    assert process.stdout.readline() == line
    assert process.stdout.readline() == line
    # What had begun before the silence is one line with what comes after.
    assert process.communicate(" broken\n")[1] == "E: broken\n"


def test_in_place_on_a_terminal():
    parent, child = pty.openpty()
    process = subprocess.Popen(
        script("COLUMNS=40; apt_progress"), text=True, stdin=subprocess.PIPE,
        stdout=child, stderr=subprocess.DEVNULL)
    os.close(child)
    process.communicate(STATUS)
    seen = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:
            part = b""
        if not part:
            break
        seen += part
    os.close(parent)
    lines = seen.decode().split("\r")
    assert lines[2] == "apt-get: downloading 100%: Retrieving f\x1b[K"
    assert lines[4] == "apt-get: installing  45%: Unpacking lib\x1b[K"
    assert lines[5] == "\n" and len(lines) == 6


def test_apt_that_fails_is_a_failure(tmp_path):
    program = tmp_path / "apt-get"
    program.write_text("#!/bin/sh\necho 'E: no'\nexit 100\n")
    program.chmod(0o755)
    done = subprocess.run(
        script("as_root=(); apt_get update || echo $?"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert (done.stdout, done.stderr) == ("100\n", "E: no\n")


def test_scripts_of_packages_that_say_much(tmp_path):
    """apt makes the pipe for its status one that does not block."""
    program = tmp_path / "apt-get"
    program.write_text("""#!/usr/bin/python3
import os, re, subprocess, sys
status = int(re.search("Status-Fd=([0-9]+)", " ".join(sys.argv)).group(1))
os.set_blocking(status, False)
for i in range(20000):
    try:
        os.write(status, b"pmstatus:libfoo:45.7142:Unpacking libfoo\\n")
    except BlockingIOError:
        pass
script = "set -e; for i in $(seq 3000); do echo said $i; done"
sys.exit(subprocess.run(["sh", "-c", script]).returncode)
""")
    program.chmod(0o755)
    done = subprocess.run(
        script("as_root=(); apt_get install; echo $?"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.stdout.splitlines()[-1] == "0", done.stderr[-500:]
    said = [line for line in done.stderr.splitlines() if "said" in line]
    assert len(said) >= 2990 and said[-1].endswith("said 3000")
