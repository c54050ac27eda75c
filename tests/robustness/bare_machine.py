#!/usr/bin/python3
"""Runs the README's commands in a Debian with nothing installed.

Usage: bare_machine.py [--user] [--package DEB] [SUITE...]

Makes a minimal Debian of each SUITE (bookworm and trixie) with debootstrap,
puts a clone of this project's HEAD into it and runs
myexamples/mnist/train_quick.sh, tests/run.sh, cmake/build_caffe.sh --install
and --deb there, as root. The package that the last one makes is then installed
with apt in another system that has nothing else, in the place of a caffe-cpu;
a net with both layers is trained there by /usr/bin/caffe and run by pycaffe;
and the package is removed, which must leave nothing. Ends with a table; the exit
status is 0 if all passed in every suite and no stage of tests/run.sh was left
out.

It needs root, a Debian whose package lists are there, as it takes the mirror
from them, some GB of disk and, on two cores, some 20 minutes a suite. The
systems are in build/bare/SUITE, in which nothing stays mounted; that of a
suite that passed is removed. The logs stay in build/bare, the packages' files
in build/bare/archives.

What a network asks of its machines is carried over: resolv.conf, hosts, apt's
options for downloads, pip.conf, the certificates in
/usr/local/share/ca-certificates and the environment's proxies.
"""
import argparse
import collections
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BARE = ROOT / "build/bare"
ARCHIVES = BARE / "archives"
NETS = ROOT / "tests/gpu/nets"

HOME = "/home/user"
# The project is built where its path has a space in it.
CLONE = HOME + "/l softmax"
COMMANDS = ("myexamples/mnist/train_quick.sh", "tests/run.sh",
            "cmake/build_caffe.sh --install /home/user/caffe",
            "cmake/build_caffe.sh --deb")
# What tells in one line how a command ended.
CLOSING = re.compile(r"(?m)^(?:test accuracy: |\d+ passed, |accuracy of ).*"
                     r"|made .*?\.deb|installed: [^;]*")

# What a bare system's commands find in their environment: next to nothing of
# this machine's.
CARRIED = ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTP_PROXY",
           "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "PIP_INDEX_URL",
           "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT",
           "MNIST_MIRRORS")
ENVIRONMENT = [
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    *("%s=%s" % (name, os.environ[name]) for name in CARRIED
      if os.environ.get(name))]

Row = collections.namedtuple("Row", "suite what passed seconds words")


def say(words):
    print("==> " + words, flush=True)


def rel(path):
    return os.path.relpath(path, ROOT)


def output_of(*command):
    return subprocess.run(command, check=True, text=True,
                          stdout=subprocess.PIPE).stdout


def mirror(label):
    """Where this machine has its packages of that label from."""
    for line in output_of("apt-get", "indextargets", "--format",
                          "$(ORIGIN)|$(LABEL)|$(SITE)",
                          "Created-By: Packages").splitlines():
        if line.startswith("Debian|%s|" % label):
            return line.split("|")[2]
    sys.exit("error: the package lists of this machine name no mirror of "
             "Debian and of its security updates (apt-get update?)")


def apart(command, log, show=False):
    """Runs a command with mounts and processes of its own; its exit status.

    Whatever ends this program takes all of them away: the kernel ends
    unshare, unshare its child, and that, being pid 1 of its namespace, all the
    others.
    """
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid",
         "--fork", "--kill-child", "--mount-proc", *map(str, command)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    with open(log, "ab", 0) as file:
        while True:
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                return process.wait()
            file.write(part)
            if show:
                sys.stdout.buffer.write(part)
                sys.stdout.buffer.flush()


# The bash stays pid 1 and root: who becomes another user loses the signal of
# his parent's end.
ENTER = """
set -e
# Itself a mount, it can be the root of namespaces that a test makes.
mount --bind "$1" "$1"
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
mount --bind "$2" "$1/var/cache/apt/archives"
status=0
chroot --userspec="$3" "$1" /usr/bin/env -i "${@:4}" || status=$?
exit "$status"
"""


def in_system(system, user, command, log, show=False):
    """Runs a command in a system; its exit status."""
    home = "/root" if user == "root" else HOME
    return apart(["bash", "-c", ENTER, "bash", system, ARCHIVES, user + ":",
                  *ENVIRONMENT, "HOME=" + home, "USER=" + user, *command],
                 log, show)


def make_system(suite, system, log, as_user=False):
    """Makes a minimal Debian with a clone of the project; whether it could."""
    site, security = mirror("Debian"), mirror("Debian-Security")
    # An earlier run's. If anything were mounted in there, it would stay.
    subprocess.run(["rm", "-rf", "--one-file-system", "--", system],
                   check=True)
    include = (["--include=ca-certificates"]
               if "https:" in site + security else [])
    if apart(["debootstrap", "--variant=minbase", *include,
              "--cache-dir=%s" % ARCHIVES, suite, system, site], log):
        return False

    (system / "etc/apt/sources.list").write_text(
        "deb {0} {2} main\ndeb {0} {2}-updates main\n"
        "deb {1} {2}-security main\n".format(site, security, suite))
    options = [line for line in output_of("apt-config", "dump").splitlines()
               if line.startswith("Acquire::")
               and not re.search("Auto-?Detect", line, re.I)]
    (system / "etc/apt/apt.conf.d/00network").write_text(
        "\n".join(options) + "\n")
    for name in ("resolv.conf", "hosts", "pip.conf"):
        if os.path.exists("/etc/" + name):
            shutil.copy("/etc/" + name, system / "etc")
    # The package ca-certificates takes them in when it is installed.
    certificates = "usr/local/share/ca-certificates"
    if os.path.isdir("/" + certificates):
        shutil.copytree("/" + certificates, system / certificates,
                        dirs_exist_ok=True)

    (system / HOME[1:]).mkdir(parents=True, exist_ok=True)
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", "--", ROOT,
                    str(system) + CLONE], check=True)
    return not as_user or not any(
        in_system(system, "root", command, log) for command in (
            ["useradd", "--home-dir", HOME, "--no-create-home", "--shell",
             "/bin/bash", "user"], ["chown", "-R", "user:", HOME],
            ["apt-get", "-qq", "update"]))


def files_in(folder):
    return sorted(str(path) for path in folder.rglob("*")
                  if path.is_symlink() or not path.is_dir())


def asked_for(log):
    """The packages that a command asked for at its end."""
    found = re.findall(r"apt-get install --no-install-recommends (.*)",
                       "\n".join(log.read_text().splitlines()[-5:]))
    return found[-1].split() if found else []


def run(command, system, log, as_user):
    """Runs one of the project's commands in its clone.

    Returns whether it passed, and how often it asked for packages.
    """
    home = system / HOME[1:]
    before = files_in(home)
    asked, last = 0, None
    while True:
        log.write_bytes(b"")
        if not in_system(
                system, "user" if as_user else "root",
                ["bash", "-c", 'cd -- "$1" && exec "./$2" "${@:3}"', "bash",
                 CLONE, *command.split()], log, show=True):
            return True, asked
        packages = asked_for(log) if as_user else []
        if not packages:
            return False, asked
        if command == COMMANDS[0] and files_in(home) != before:
            say("%s made files before it asked for packages: %s" % (
                command, " ".join(sorted(set(files_in(home)) - set(before)))))
            return False, asked
        if packages == last:
            say("%s asks for packages that are there: %s"
                % (command, " ".join(packages)))
            return False, asked
        last = packages
        asked += 1
        say("root installs what %s asked for: %s"
            % (command, " ".join(packages)))
        if in_system(system, "root", [
                "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq",
                "-y", "install", "--no-install-recommends", *packages],
                log.with_suffix(".log.apt")):
            return False, asked


def try_command(command, suite, system, prefix, as_user):
    """The row of one of the project's commands."""
    start = time.monotonic()
    name = re.sub(r"\.sh| /.*", "", command.split("/", 1)[1])
    log = Path("%s-%s.log" % (prefix, re.sub("[^a-z_]+", "-", name)))
    say("%s: %s" % (suite, command))
    passed, asked = run(command, system, log, as_user)
    text = log.read_text(errors="replace")
    words = CLOSING.findall(text)[-1:]
    # Nothing that a stage needs is out of a bare system's reach.
    if re.search(r"(?m)^==> .*: SKIPPED, ", text):
        passed = False
        words.append("a stage SKIPPED")
    if as_user:
        words.append("asked for packages: %d" % asked)
    if not passed:
        words.append("see " + rel(log))
    return Row(suite, command, passed, time.monotonic() - start,
               ", ".join(words))


def try_package(deb, suite, prefix):
    """The row of a package, in a system of its own."""
    start = time.monotonic()
    system = BARE / (suite + "-package")
    log = Path("%s-package.log" % prefix)
    log.write_bytes(b"")
    say("%s: %s" % (suite, deb.name))
    passed = make_system(suite, system, log)
    if passed:
        folder = system / "package"
        folder.mkdir()
        shutil.copy(deb, folder / "caffe.deb")
        shutil.copy(NETS / "train.prototxt", folder)
        shutil.copy(Path(__file__).with_name("try_package.sh"), folder)
        (folder / "solver.prototxt").write_text(
            (NETS / "solver.prototxt").read_text().replace("nets/", "")
            .replace("GPU", "CPU"))
        passed = not in_system(
            system, "root", ["/package/try_package.sh", "/package"], log,
            show=True)
    if passed:
        remove(system)
    words = CLOSING.findall(log.read_text(errors="replace"))[-1:]
    return Row(suite, deb.name, passed, time.monotonic() - start, ", ".join(
        words if passed else ["see " + rel(log)]))


def remove(system):
    subprocess.run(["rm", "-rf", "--one-file-system", "--", system],
                   check=True)


def try_suite(suite, args):
    """The rows of a suite."""
    prefix = BARE / (suite + ("-user" if args.user else ""))
    if args.package:
        return [try_package(args.package, suite, prefix)]
    system = BARE / suite
    log = Path("%s-system.log" % prefix)
    log.write_bytes(b"")
    start = time.monotonic()
    say("%s: making a system in %s" % (suite, rel(system)))
    if not make_system(suite, system, log, args.user):
        return [Row(suite, "debootstrap", False, time.monotonic() - start,
                    "see " + rel(log))]
    rows = [try_command(command, suite, system, prefix, args.user)
            for command in COMMANDS]
    rows += [try_package(deb, suite, prefix) for deb in Path(
        str(system) + CLONE, "build").glob("caffe-lsoftmax_*.deb")]
    if all(row.passed for row in rows):
        remove(system)
    return rows


def read_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--user", action="store_true", help="as a user without root and "
        "without sudo instead: where a command ends with the packages to ask "
        "for, root installs these and nothing else, and the command runs "
        "again. The first must have asked before it made anything")
    parser.add_argument(
        "--package", metavar="DEB", type=Path, help="try that package alone, "
        "which cmake/build_caffe.sh --deb has made on a Debian of the SUITE")
    parser.add_argument("suites", metavar="SUITE", nargs="*",
                        default=["bookworm", "trixie"])
    args = parser.parse_args()
    if args.package and not args.package.is_file():
        parser.error("--package: there is no %s" % args.package)
    for suite in args.suites:
        if not re.fullmatch("[a-z]+", suite):
            parser.error("%s is no name of a Debian" % suite)
    return args


def main():
    args = read_arguments()
    if os.geteuid():
        sys.exit("error: only root can make a Debian and go into it: run "
                 "this as root")
    if subprocess.run(["unshare", "--mount", "--pid", "--fork",
                       "true"]).returncode:
        sys.exit("error: this machine does not let root make namespaces (a "
                 "container without the right to?)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ARCHIVES.mkdir(parents=True, exist_ok=True)
    lock = open(BARE / ".lock", "a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not shutil.which("debootstrap"):
        subprocess.run(
            ["bash", "-c", '. "$1/cmake/shell.sh"; need_packages "making a '
             'bare Debian" debootstrap', "bare_machine.py", ROOT], check=True)
    say("the project's commit " + output_of(
        "git", "-C", str(ROOT), "log", "-1", "--format=%h (%s)").strip())
    rows = [row for suite in args.suites for row in try_suite(suite, args)]
    say("results%s; the logs are in %s" % (
        ", as a user without root" if args.user else "", rel(BARE)))
    for row in rows:
        print("%-9s %-36s %-7s %5d s  %s" % (
            row.suite, row.what, "passed" if row.passed else "FAILED",
            row.seconds, row.words))
    sys.exit(not all(row.passed for row in rows))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
