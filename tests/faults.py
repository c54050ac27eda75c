"""Faults for the tests of scripts: kills at any program, full disks."""

import ctypes
import os
import pathlib
import signal
import subprocess

import pytest

# Takes the place of every program on a PATH. Each call, or each of the program
# that $CALLS/of names, adds a byte to $CALLS/count; number $CALLS/at sends the
# signal $CALLS/signal to all of the script instead, which is its process group
# and what `timeout` put into another one. The program itself is
# $CALLS/real/NAME.
SHIM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char* read_file(const char* folder, const char* name) {
  static char text[64];
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  memset(text, 0, sizeof text);
  int file = open(path, O_RDONLY);
  if (file < 0 || read(file, text, sizeof text - 1) < 0) _exit(99);
  close(file);
  return text;
}

int main(int argc, char** argv) {
  const char* calls = getenv("CALLS");
  const char* name = strrchr(argv[0], '/');
  char path[4096];
  struct stat is;
  name = name ? name + 1 : argv[0];
  const char* of = read_file(calls, "of");
  if (!*of || !strcmp(of, name)) {
    snprintf(path, sizeof path, "%s/count", calls);
    int file = open(path, O_WRONLY | O_APPEND | O_CREAT, 0666);
    if (file < 0 || write(file, name, 1) != 1 || fstat(file, &is)) _exit(99);
    close(file);
    if (is.st_size == atoi(read_file(calls, "at"))) {
      int what = atoi(read_file(calls, "signal"));
      if (getpgid(0) != getsid(0)) kill(-getsid(0), what);
      kill(0, what);
      usleep(10000);  /* A script that ignores the signal goes on. */
    }
  }
  snprintf(path, sizeof path, "%s/real/%s", calls, name);
  if (argc > 0) execv(path, argv);
  perror(path);
  return 127;
}
"""


def hear_ctrl_c():
    """What a shell starts in the background is deaf to it otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Killer:
    """Shims for programs, and scripts that they kill."""

    def __init__(self, folder, programs):
        """programs: a dict of name to the path of the program itself."""
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        (folder / "real").mkdir()
        (folder / "shim.c").write_text(SHIM)
        subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-o", folder / "shim",
                        folder / "shim.c"], check=True)
        for name, path in programs.items():
            (folder / "real" / name).symlink_to(path)
            (self.bin / name).symlink_to(folder / "shim")
        self.env = {"PATH": str(self.bin), "CALLS": str(folder)}

    def run(self, command, env, at=0, number=signal.SIGKILL, of=""):
        """Runs a script; returns its status, output and count of calls.

        It gets the signal at that call, of one program or of any. Nothing of
        it goes on after a kill.
        """
        for name, value in (("count", ""), ("at", at), ("of", of),
                            ("signal", int(number))):
            (self.folder / name).write_text(str(value))
        process = subprocess.Popen(
            [str(x) for x in command], env={**env, **self.env}, cwd="/",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
            preexec_fn=hear_ctrl_c)
        # A program that outlives its script keeps the pipe open.
        try:
            out = process.communicate(timeout=120)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return (process.returncode, out,
                (self.folder / "count").stat().st_size)


@pytest.fixture(scope="session")
def private_mounts():
    """Mounts that are only this process's, and end with it."""
    if os.geteuid():
        pytest.skip("only root can mount")
    clone_newns = 0x00020000
    if (ctypes.CDLL(None, use_errno=True).unshare(clone_newns) or
            subprocess.run(["mount", "--make-rprivate", "/"],
                           stderr=subprocess.DEVNULL).returncode):
        pytest.skip("no mount namespace can be made here")


class Disk:
    """A small disk, a tmpfs."""

    def __init__(self, path):
        self.path = path

    def mount(self, options):
        """Returns whether it could be mounted or mounted anew."""
        return not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.path],
            stderr=subprocess.DEVNULL).returncode

    def fill(self, left=0):
        """Fills it up with a file, until `left` KiB are left."""
        self.free()
        stat = os.statvfs(self.path)
        size = stat.f_bavail * stat.f_frsize - left * 1024
        (self.path / "fill").write_bytes(b"x" * size)

    def free(self):
        """Takes away what fill has put there."""
        (self.path / "fill").unlink(missing_ok=True)

    def read_only(self, on=True):
        """No write gets through."""
        assert self.mount("remount," + ("ro" if on else "rw"))


@pytest.fixture
def disk(private_mounts, tmp_path):
    """Makes Disks; call it with the options of mount (size=1m)."""
    disks = []

    def make(options):
        path = tmp_path / ("disk %d" % len(disks))
        path.mkdir()
        made = Disk(path)
        if not made.mount(options):
            pytest.skip("tmpfs cannot be mounted here")
        disks.append(made)
        return made
    yield make
    for made in disks:
        subprocess.run(["umount", made.path], check=True)


def spread(count, number):
    """`number` of 1, ..., count: the first, the last, and many between."""
    number = min(number, count)
    return sorted({1 + i * (count - 1) // max(number - 1, 1)
                   for i in range(number)})


def every(count, number):
    """As spread, or each one where the environment has EVERY_KILL=1."""
    return spread(count, count if os.environ.get("EVERY_KILL") else number)


def which(*names):
    """Programs on the PATH, as Killer takes them."""
    found = {}
    for folder in os.environ["PATH"].split(":"):
        for name in names:
            path = pathlib.Path(folder, name)
            if name not in found and os.access(path, os.X_OK):
                found[name] = path.resolve()
    return found
