"""What cmake/build_caffe.sh does around the build, with stand-in programs.

The build itself is seen in every run of the other tests.
"""

import fcntl
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from stand_in import make_tree, snapshot

PROJECT = pathlib.Path(__file__).resolve().parents[2]

PROGRAMS = (
    "bash", "env", "sed", "awk", "cut", "cksum", "flock", "id", "nproc", "tr",
    "sort", "head", "tail", "mkdir", "mktemp", "rm", "mv", "cp", "cat",
    "dirname", "basename", "tee", "grep", "patch", "diff", "cmp", "find", "ls",
    "sha256sum", "tar", "timeout", "make", "chown", "chmod", "sleep", "gzip",
    "setpriv", "readlink", "size", "comm", "touch", "rmdir", "wc")

STAND_INS = {
    # Installed are the packages that the file names; "all" is all of them.
    "dpkg-query": 'grep -qxF -e all -e "${@: -1}" "$STATE/installed" && '
                  'printf installed',
    "apt-cache": 'if [[ $1 == pkgnames ]]; then ls "$STATE/policy" | '
                 'grep "^$2"; exit 0; fi\n'
                 'echo "  Candidate: $(cat "$STATE/policy/$2")"',
    "apt-get": 'echo "$*" >> "$STATE/apt.log"\n'
               'case " $* " in\n'
               '*" indextargets "*) echo "http://mirror Debian Debian" ;;\n'
               '*" source "*) cp "$STATE"/*.orig.tar.gz . ;;\n'
               '*" install "*)\n'
               '  if [[ -e $STATE/half ]]; then echo "E: dpkg was interrupted,'
               ' you must manually run dpkg --configure -a"; exit 100; fi\n'
               '  : > "$STATE/half"; ls / > /dev/null\n'
               '  for p; do case $p in cargo*) '
               'cp "$STATE/cargo" "$BIN/cargo";; esac; done\n'
               '  echo all > "$STATE/installed"; rm "$STATE/half";;\n'
               'esac',
    "dpkg": 'if [[ "$*" == "--configure -a" ]]; then rm -f "$STATE/half"; fi',
    # Applies patches itself; what it would fetch is in a folder.
    "git": 'case " $* " in\n'
           '*" apply "*) exec "$BIN/real-git" "$@" ;;\n'
           '*" init "*) mkdir -p "${@: -1}" ;;\n'
           '*" fetch "*) if [[ -e $STATE/clone ]]; then '
           'cp -R "$STATE/clone/." "$2"; '
           'else echo "fatal: no network" >&2; exit 128; fi ;;\n'
           'esac',
    "cmake": 'if [[ $1 == --version ]]; then echo "cmake version 3.25.1"; '
             'exit; fi\n'
             'echo "$*" >> "$STATE/cmake.log"\n'
             'if [[ $1 == --install ]]; then\n'
             '  prefix=$(sed -n "s/.*-DCMAKE_INSTALL_PREFIX=//p" '
             '"$STATE/cmake.log" | tail -n 1)\n'
             '  mkdir -p "$DESTDIR${prefix%% -D*}"\n'
             '  cp -R "$STATE/installed-files/." "$DESTDIR${prefix%% -D*}"\n'
             'fi\n'
             'if [[ -e $STATE/broken ]]; then '
             'echo "something.cpp: error: broken"; exit 2; fi',
    "nvidia-smi": "exit 9",
}


class World:
    def __init__(self, folder):
        self.folder = folder
        self.project = folder / "my project"
        self.bin = folder / "bin"
        self.state = folder / "state"
        for name in ("cmake", "caffe_patch", "include", "src", "tests/caffe"):
            shutil.copytree(PROJECT / name, self.project / name)
        shutil.copy(PROJECT / "Cargo.toml", self.project)
        (self.state / "policy").mkdir(parents=True)
        self.bin.mkdir()
        for name in PROGRAMS:
            found = shutil.which(name)
            if found:
                (self.bin / name).symlink_to(os.path.realpath(found))
        (self.bin / "real-git").symlink_to(
            os.path.realpath(shutil.which("git")))
        for name, text in STAND_INS.items():
            self.program(self.bin / name, text)
        self.program(self.state / "cargo", "echo cargo 1.95.0")
        self.program(self.bin / "cargo", "echo cargo 1.95.0")
        (self.state / "installed").write_text("all\n")
        self.policy(cargo="0.66.0+ds1-1")
        self.caffe = self.project / "build/caffe"

    def program(self, path, text):
        path.write_text("#!/bin/bash\n" + text + "\n")
        path.chmod(0o755)

    def policy(self, **candidates):
        for package, version in candidates.items():
            (self.state / "policy" / package.replace("_", "-")).write_text(
                version + "\n")

    def command(self, *args, user=None):
        env = {"PATH": str(self.bin), "HOME": str(self.folder / "home"),
               "STATE": str(self.state), "BIN": str(self.bin),
               "XDG_RUNTIME_DIR": str(self.folder)}
        command = [str(self.project / "cmake/build_caffe.sh"), *args]
        if user:
            command[:0] = ["setpriv", f"--reuid={user}", "--clear-groups"]
        return command, env

    def run(self, *args, status, user=None, **env):
        command, base = self.command(*args, user=user)
        done = subprocess.run(command, env={**base, **env}, text=True, cwd="/",
                              stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert status in (None, done.returncode), done.stdout
        return done.stdout

    def cmake_calls(self):
        path = self.state / "cmake.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def world():
    folder = pathlib.Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield World(folder)
    shutil.rmtree(folder)


@pytest.fixture
def tree(world):
    return make_tree(world.caffe)


@pytest.mark.parametrize("args, says", [
    (["--frob"], "unknown argument --frob"),
    (["--cpu", "--cuda"], "exclude each other"),
    (["--jobs", "many"], "--jobs needs a number"),
    (["--jobs"], "--jobs needs a number"),
    (["--install"], "--install needs a PREFIX"),
    (["--install", "--cpu"], "--install needs a PREFIX"),
    (["--install", "/p", "--deb"], "exclude each other"),
    (["--deb", "--cuda"], "is made of a build with --cpu"),
])
def test_usage(world, args, says):
    assert says in world.run(*args, status=None)


def test_caffe_root_that_is_no_tree(world):
    out = world.run(status=1, CAFFE_ROOT=str(world.folder / "bin"))
    assert "CAFFE_ROOT=" in out and "is not a Caffe source tree" in out


def test_caffe_root_is_built_in_place(world):
    root = make_tree(world.folder / "their caffe")
    (root / "python/caffe/__init__.py").write_text(
        "layer_type_list = lambda: ['BN', 'LargeMarginInnerProduct']\n")
    out = world.run("--cpu", status=0, CAFFE_ROOT=str(root))
    assert out.splitlines()[-1].startswith("build_caffe.sh: done (cpu)")
    assert f"{root}/build/tools/caffe" in out
    assert f"-B {root}/build" in world.cmake_calls()
    assert "-DCPU_ONLY=ON" in world.cmake_calls()
    assert (root / ".lsoftmax-manifest").exists()
    assert not world.caffe.exists()


# ---- A tree that Make has built ----

@pytest.fixture
def made(world):
    """A tree as Make leaves it, patched and with pycaffe."""
    root = make_tree(world.folder / "their caffe")
    subprocess.run([world.project / "caffe_patch/apply.sh", root], check=True,
                   stdout=subprocess.DEVNULL)
    (root / ".build_release/tools").mkdir(parents=True)
    (root / ".build_release/.linked").touch()
    (root / "build").symlink_to(".build_release")
    (root / "build/tools/caffe").touch()
    (root / "python/caffe/_caffe.so").touch()
    pycaffe_works(root)
    return root


def test_a_tree_of_make_is_used_as_it_is(world, made):
    before = snapshot(made)
    for args in ([], ["--cpu"], ["--packages"]):
        out = world.run(*args, status=0, CAFFE_ROOT=str(made))
    assert out == ""
    out = world.run(status=0, CAFFE_ROOT=str(made))
    assert out == (f"build_caffe.sh: done: Make has built {made}, "
                   "which is used as it is\n")
    assert snapshot(made) == before and not world.cmake_calls()
    assert not (world.state / "apt.log").exists()


@pytest.mark.parametrize("missing, args, target", [
    ("build/tools/caffe", [], "all"),
    ("python/caffe/_caffe.so", [], "pycaffe"),
    ("build/test/test_all.testbin", ["--tests"], "test")])
def test_a_tree_of_make_without(world, made, missing, args, target):
    (made / missing).unlink(missing_ok=True)
    before = snapshot(made)
    out = world.run(*args, status=1, CAFFE_ROOT=str(made))
    where = str(made).replace(" ", "\\ ")
    assert out == (f"build_caffe.sh: error: Make has built {made}, but not "
                   f"{missing}: run\n  make -C {where} {target}\n")
    assert snapshot(made) == before and not world.cmake_calls()


def test_a_tree_of_make_without_the_layers(world, made):
    (made / "python/caffe/__init__.py").write_text(
        "layer_type_list = lambda: ['ReLU']\n")
    before = snapshot(made)
    out = world.run(status=1, CAFFE_ROOT=str(made))
    assert "does not have the layers: BN, LargeMarginInnerProduct" in out
    assert "caffe_patch/apply.sh" in out and "all pycaffe" in out
    assert snapshot(made) == before


def test_source_of_a_tree_of_make(world, made):
    """Patching it is what --source is for."""
    subprocess.run([world.project / "caffe_patch/apply.sh", "--revert", made],
                   check=True, stdout=subprocess.DEVNULL)
    world.run("--source", status=0, CAFFE_ROOT=str(made))
    assert (made / ".lsoftmax-manifest").exists()


def test_pycaffe_without_the_layers(world, tree):
    (tree / "python/caffe/__init__.py").write_text(
        "layer_type_list = lambda: ['BN']\n")
    assert "LargeMarginInnerProduct" in world.run(status=1)


def test_source_alone(world, tree):
    assert "done: Caffe's source" in world.run("--source", status=0)
    assert (tree / ".lsoftmax-manifest").exists()
    assert not (tree / "build").exists() and not world.cmake_calls()


def test_tests_are_only_ours(world, tree):
    pycaffe_works(tree)
    world.run("--tests", "--jobs", "3", status=0)
    calls = world.cmake_calls()
    assert ("-DBUILD_only_tests=bn_layer,large_margin_data_parallel,"
            "large_margin_inner_product_layer\n" in calls)
    assert "--parallel 3 --target all test.testbin" in calls


def test_by_way_of_a_link(world, tree):
    """CMake gets the paths, and the working folder, without the link."""
    pycaffe_works(tree)
    (world.folder / "link").symlink_to(world.project)
    with open(world.bin / "cmake", "a") as file:
        file.write('pwd >> "$STATE/cmake.log"\n')
    _, env = world.command()
    link = world.folder / "link"
    subprocess.run([link / "cmake/build_caffe.sh"], check=True, cwd=link,
                   env=dict(env, PWD=str(link)), stdout=subprocess.DEVNULL)
    assert "link" not in world.cmake_calls()
    assert f"\n{world.project}\n" in world.cmake_calls()


def test_a_build_that_fails(world, tree):
    (world.state / "broken").touch()
    out = world.run(status=1)
    assert "something.cpp: error: broken" in out
    assert f"The whole log: {tree}/build/build_caffe.log" in out


@pytest.mark.parametrize("log, first, package", [
    ("-- Boost version: 1.74\nCMake Error at cmake/Find.cmake:1 (message):\n"
     "  Could NOT find Boost (missing: regex)\n\nCall Stack:\n  x.cmake:2\n\n"
     "-- Configuring incomplete, errors occurred!\n",
     "CMake Error at cmake/Find.cmake:1 (message): Could NOT find Boost "
     "(missing: regex)", "libboost-regex-dev"),
    ("CMake Error at M.cmake:230 (message):\n  Could NOT find GFlags (missing: "
     "GFLAGS_INCLUDE_DIR)\n", "Could NOT find GFlags", "libgflags-dev"),
    ("[ 3%] Building CXX\n/a/io.cpp:4:10: fatal error: opencv2/core/core.hpp: "
     "No such file or directory\nmake: *** [all] Error 2\n",
     "/a/io.cpp:4:10: fatal error: opencv2/core/core.hpp: No such file or "
     "directory", "libopencv-dev"),
    ("/usr/bin/ld: cannot find -lboost_regex: No such file or directory\n"
     "collect2: error: ld returned 1\n", "cannot find -lboost_regex",
     "libboost-regex-dev"),
    ("/a/b.cpp:7:3: error: 'CV_RGB' was not declared in this scope\n"
     "/a/b.cpp:9:3: error: other\n", "'CV_RGB' was not declared", None),
    ("error[E0308]: mismatched types\n", "error[E0308]: mismatched", None),
    ("CMake Error: no such folder\n\nother\n", "CMake Error: no such folder",
     None),
    ("CPack Error: No description.\nCPack Error: other\n",
     "CPack Error: No description.", None),
])
def test_a_build_that_fails_shows_the_first_error(world, tree, log, first,
                                                  package):
    (world.state / "log").write_text(log)
    world.program(world.bin / "cmake",
                  "[[ $1 == --version ]] && { echo cmake version 3.25.1; exit;"
                  '}\ncat "$STATE/log"; exit 1')
    out = world.run(status=1)
    assert "its first error:\n  " in out and first in out
    assert "The whole log: " in out
    assert "other" not in out and "Call Stack" not in out
    if package:
        assert f"apt-get install {package}\n" in out
    else:
        assert "apt-get" not in out


def test_boost_regex_where_the_tree_asks_for_it(world, tree):
    (world.state / "installed").write_text("cmake\n")
    assert "libboost-regex-dev" not in world.run("--packages", status=0)
    (tree / "cmake/Dependencies.cmake").write_text(
        "find_package(Boost 1.55 REQUIRED COMPONENTS system thread regex)\n")
    assert "libboost-regex-dev" in world.run("--packages", status=0)


# ---- Installed ----

CARGO = """case $1 in
tree) echo "$*" > "$STATE/tree"
  printf '%s|%s|\\n' "lsoftmax v0.2.0 ($PWD)" MIT "rayon v1.12.0" Zlib ;;
*) echo cargo 1.95.0 ;;
esac"""


@pytest.fixture
def installs(world, tree):
    """What the stand-in for CMake installs; licenses of what is built."""
    pycaffe_works(tree)
    world.program(world.bin / "cargo", CARGO)
    rayon = world.folder / "rayon"
    rayon.mkdir()
    (rayon / "Cargo.toml").write_text(
        '[package]\nname = "rayon"\nversion = "1.12.0"\n')
    for folder, owner in ((tree, "Caffe"), (world.project, "our"),
                          (rayon, "rayon")):
        (folder / "LICENSE").write_text(f"{owner}'s license\n")
    deps = tree / "build/lsoftmax/release/deps"
    deps.mkdir(parents=True)
    (deps / "rayon-1234.d").write_text(f"{rayon}/src/lib.rs:\n")
    files = world.state / "installed-files"
    for name in ("bin", "python/caffe", "lib", "empty"):
        (files / name).mkdir(parents=True)
    world.program(files / "bin/caffe", "echo caffe version 1.0.0")
    (files / "lib/libcaffe.so.1").write_text("new")
    (files / "lib/libcaffe.so").symlink_to("libcaffe.so.1")
    shutil.copy(tree / "python/caffe/__init__.py", files / "python/caffe")
    return files


RECORD = "share/caffe-lsoftmax/files"
COPYRIGHT = "share/doc/caffe-lsoftmax/copyright"


def has_all_licenses(path):
    text = path.read_text()
    return (path.stat().st_mode & 0o777 == 0o644 and
            "\nThe crate rayon 1.12.0 (Zlib)\n" in text and
            all(f"\n---- {part} ----\n\n{owner}'s license\n" in text
                for part, owner in (("Caffe", "Caffe"), ("lsoftmax", "our"),
                                    ("rayon 1.12.0", "rayon"))))


def test_install(world, tree, installs):
    prefix = world.folder / "my prefix"
    out = world.run("--cpu", "--install", str(prefix), status=0)
    where = str(prefix).replace(" ", "\\ ")
    assert out.splitlines()[-1] == (
        f"build_caffe.sh: installed: {prefix}/bin/caffe; for Python, export "
        f"PYTHONPATH={where}/python")
    assert f"-DCMAKE_INSTALL_PREFIX={prefix} " in world.cmake_calls()
    names = ["bin/caffe", "lib/libcaffe.so", "lib/libcaffe.so.1",
             "python/caffe/__init__.py", RECORD, COPYRIGHT]
    assert sorted(str(path.relative_to(prefix)) for path in
                  prefix.rglob("*") if not path.is_dir()) == names
    assert (prefix / RECORD).read_text().split("\n") == [*names, ""]
    assert (prefix / "lib/libcaffe.so").is_symlink()
    assert has_all_licenses(prefix / COPYRIGHT)
    assert "--features" not in (world.state / "tree").read_text()
    assert not (tree / "build/package").exists()

    # Again: what is old is renewed, and what is no more goes.
    (prefix / "lib/mine").touch()
    (installs / "lib/libcaffe.so.1").write_text("newer")
    (installs / "python/caffe/classify.py").touch()
    (installs / "lib/libcaffe.so").unlink()
    world.run("--install", str(prefix), status=0)
    assert (prefix / "lib/libcaffe.so.1").read_text() == "newer"
    assert (prefix / "python/caffe/classify.py").exists()
    assert sorted(os.listdir(prefix / "lib")) == ["libcaffe.so.1", "mine"]
    assert "lib/libcaffe.so\n" not in (prefix / RECORD).read_text()


@pytest.mark.parametrize("moves", range(8))
def test_an_install_that_was_killed_is_finished_by_the_next(tmp_path, moves):
    """Its files are not those of somebody else."""
    for name in ("bin/caffe", "lib/libcaffe.so", "python/caffe.py"):
        for folder in "stage", "whole":
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True)
            path.write_text(name)
    program = """
import os, sys
sys.path.insert(0, sys.argv[1])
import install
replace, left = os.replace, [int(sys.argv[4])]
def counted(*args):
    if not left[0]: os.kill(os.getpid(), 9)
    left[0] -= 1
    replace(*args)
os.replace = counted
install.install(*sys.argv[2:4])
"""
    prefix = tmp_path / "prefix"
    prefix.mkdir()

    def install(moves):
        return subprocess.run(
            [sys.executable, "-c", program, PROJECT / "cmake",
             tmp_path / "stage", prefix, str(moves)]).returncode
    # One for each file, and one for each of two records.
    assert install(moves) == (-9 if moves < 5 else 0)
    assert install(100) == 0
    (prefix / RECORD).unlink()
    (prefix / "share/caffe-lsoftmax").rmdir()
    (prefix / "share").rmdir()
    assert snapshot(prefix) == snapshot(tmp_path / "whole")


def test_install_of_a_build_with_cuda(world, cuda, installs):
    """cudarc is in the library then."""
    world.run("--cuda", "--install", str(world.folder / "prefix"), status=0,
              **cuda)
    assert "--features cuda" in (world.state / "tree").read_text()


def test_install_without_a_license(world, tree, installs):
    (world.folder / "rayon/LICENSE").unlink()
    prefix = world.folder / "prefix"
    out = world.run("--install", str(prefix), status=1)
    assert "error: rayon 1.12.0 has no text of its license in" in out
    assert not prefix.exists()


def test_install_over_what_is_not_ours(world, installs):
    prefix = world.folder / "prefix"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin/caffe").write_text("another Caffe")
    (prefix / "lib").mkdir()
    (prefix / "lib/libcaffe.so").symlink_to("nowhere")
    before = sorted(prefix.rglob("*"))
    out = world.run("--install", str(prefix), status=1)
    assert f"error: {prefix}/bin/caffe is there, and is not" in out
    assert "(2 such files)" in out and "Nothing was installed" in out
    assert sorted(prefix.rglob("*")) == before
    assert (prefix / "bin/caffe").read_text() == "another Caffe"


@pytest.mark.parametrize("where, says", [
    ("file", "is a file"), ("file/below", "is a file"),
    ("closed/below", "cannot be written to")])
def test_install_where_it_cannot_be(world, installs, where, says):
    """Said before the build."""
    (world.folder / "file").touch()
    (world.folder / "closed").mkdir(mode=0o755)
    out = world.run("--install", str(world.folder / where), status=1,
                    user=user_without_root())
    assert f"error: --install {world.folder / where}: " in out and says in out
    assert not world.cmake_calls()


def test_install_on_a_full_disk(world, installs, disk):
    """Leaves nothing behind, and what was there as it was."""
    small = disk("size=1m")
    prefix = small.path / "prefix"
    world.run("--install", str(prefix), status=0)
    before = snapshot(prefix)
    (installs / "lib/libcaffe.so.1").write_bytes(b"x" * 500_000)
    small.fill(300)
    out = world.run("--install", str(prefix), status=1)
    assert f"cannot write to {prefix}: its disk is full" in out
    assert snapshot(prefix) == before
    small.free()
    world.run("--install", str(prefix), status=0)


CPACK = """echo "$*" > "$STATE/cpack.log"
find "$LSOFTMAX_STAGE" ! -type d -printf '%P\\n' | sort > "$STATE/packed"
mkdir "$LSOFTMAX_STAGE.deb"
cp "$LSOFTMAX_STAGE/usr/share/doc/caffe-lsoftmax/copyright" "$STATE"
touch "$LSOFTMAX_STAGE.deb/caffe-lsoftmax_0.2.0_amd64.deb"
"""


@pytest.fixture
def packs(world, tree, installs):
    """With the programs that make a package."""
    world.program(world.bin / "cpack", CPACK)
    world.program(world.bin / "dpkg-architecture", "echo a-triplet")
    (installs / "python/classify.py").touch()


def test_deb(world, tree, packs):
    out = world.run("--deb", status=0)
    deb = world.project / "build/caffe-lsoftmax_0.2.0_amd64.deb"
    assert deb.exists()
    where = str(deb).replace(" ", "\\ ")
    assert out.splitlines()[-1] == (
        f"build_caffe.sh: made {where}: install it by sudo apt-get install "
        f"{where}")
    calls = world.cmake_calls()
    for option in ("CMAKE_INSTALL_PREFIX=/usr", "CPU_ONLY=ON",
                   "CMAKE_INSTALL_LIBDIR=lib/a-triplet",
                   "CMAKE_SKIP_INSTALL_RPATH=ON"):
        assert f"-D{option}" in calls
    assert (world.state / "packed").read_text().split() == [
        "usr/bin/caffe", "usr/lib/libcaffe.so", "usr/lib/libcaffe.so.1",
        "usr/lib/python3/dist-packages/caffe/__init__.py",
        "usr/share/caffe-lsoftmax/python/classify.py",
        "usr/share/doc/caffe-lsoftmax/copyright"]
    assert has_all_licenses(world.state / "copyright")
    assert not list((tree / "build").glob("package*"))


def test_deb_needs_programs(world, packs):
    (world.state / "installed").write_text("cmake\n")
    listed = world.run("--deb", "--packages", status=0).split()
    assert {"dpkg-dev", "file"} <= set(listed)
    assert "dpkg-dev" not in world.run("--packages", status=0).split()


def test_deb_of_a_build_with_cuda(world, tree, packs):
    (tree / "build/CMakeCache.txt").write_text("CPU_ONLY:BOOL=OFF\n")
    out = world.run("--deb", status=1)
    assert "made of a build without CUDA" in out and "Add --cpu" in out
    assert not world.cmake_calls()


@pytest.mark.parametrize("args", [["--deb"], ["--install", "/nowhere/at"]])
def test_install_of_a_tree_of_make(world, made, args):
    before = snapshot(made)
    out = world.run(*args, status=1, CAFFE_ROOT=str(made))
    assert "need a build by CMake" in out and snapshot(made) == before


# ---- What a killed build leaves ----

def make_object(path, cut=0):
    """An object of the real compiler, without its last bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cc", "-x", "c", "-c", "-o", path, "-"], check=True,
                   input="int f(void) { return 1; }", text=True)
    path.write_bytes(path.read_bytes()[:path.stat().st_size - cut])


def pycaffe_works(tree):
    (tree / "python/caffe/__init__.py").write_text(
        "layer_type_list = lambda: ['BN', 'LargeMarginInnerProduct']\n")


def test_half_written_files_are_made_again(world, tree):
    """Those of a build that did not come to its end; whole ones stay."""
    pycaffe_works(tree)
    build = tree / "build"
    objects = build / "src/caffe/CMakeFiles/caffe.dir"
    proto = build / "include/caffe/proto"
    unfinished = build / "build_caffe.unfinished"
    proto.mkdir(parents=True)
    for name in ("caffe.pb.cc", "caffe.pb.h", "caffe_pb2.py"):
        (proto / name).write_text("// whole\n")
    (build / "CMakeCache.txt").write_text("CPU_ONLY:BOOL=ON\n")
    make_object(objects / "old.cpp.o")
    make_object(objects / "older.cpp.o")
    time.sleep(0.02)
    unfinished.touch()
    time.sleep(0.02)
    make_object(build / "src/caffe/CMakeFiles/p.dir/proto/caffe.pb.cc.o")
    make_object(objects / "whole.cpp.o")
    for cut, name in ((1, "short"), (10 ** 6, "empty"), (300, "shorter")):
        make_object(objects / f"{name}.cpp.o", cut)
    # A compiler that was killed before it came to the object.
    (objects / "old.cpp.o.d").write_text("old.cpp.o: old.c")
    for name in ("whole", "short"):
        (objects / f"{name}.cpp.o.d").write_text("")
    (objects / "link.txt").write_text("c++ -o libcaffe.so")

    out = world.run(status=0)
    assert "did not come to its end" in out
    assert {path.name for path in objects.iterdir()} == {
        "older.cpp.o", "whole.cpp.o", "whole.cpp.o.d"}
    assert len(list(proto.iterdir())) == 3
    assert not unfinished.exists()

    # A build that fails is not finished either; one that is stays as it is.
    (world.state / "broken").touch()
    world.run(status=1)
    assert unfinished.exists()
    (world.state / "broken").unlink()
    (build / "src/caffe/CMakeFiles/p.dir/proto/caffe.pb.cc.o").unlink()
    world.run(status=0)
    assert not list(proto.iterdir())
    make_object(objects / "short.cpp.o", 1)
    (objects / "link.txt").touch()
    assert "come to its end" not in world.run(status=0)
    assert (objects / "short.cpp.o").exists()
    assert (objects / "link.txt").exists()


def test_first_configuration_that_was_killed(world, tree):
    pycaffe_works(tree)
    half = tree / "build/CMakeFiles/3.25.1/CMakeCXXCompiler.cmake"
    half.parent.mkdir(parents=True)
    half.write_text("set(CMAKE_CXX_COM")
    (tree / "build/build_caffe.unfinished").touch()
    out = world.run(status=0)
    assert not half.exists()
    assert "find: " not in out  # no file of protoc's is there yet


def test_ctrl_c_ends_a_clone(world):
    """git does not go on in a process group of its own."""
    world.program(world.bin / "git", 'echo $$ > "$STATE/git"; sleep 60')
    command, env = world.command()
    # Of a suite in the background the shell has Ctrl-C ignored, for all below.
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    pid = world.state / "git"
    try:
        while not (pid.exists() and pid.read_text().endswith("\n")):
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=30)
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert not any(world.caffe.parent.iterdir())


# ---- Disks ----

def test_full_disk(world, disk):
    """Says so at any time, and goes on when there is room."""
    clone = make_tree(world.state / "clone")
    pycaffe_works(clone)
    (clone / "data").write_bytes(b"x" * 150_000)
    small = disk("size=2m")
    shutil.copytree(world.project, small.path / "project")
    world.project = small.path / "project"
    (world.project / "build").mkdir()
    seen = []
    for left in (0, 100, 200, 280, 340, 400):
        small.fill(left)
        out = world.run(status=None)
        if out.splitlines()[-1].startswith("build_caffe.sh: done"):
            break
        errors = [line for line in out.splitlines() if "error: " in line]
        assert "could not be had" not in out
        assert ("disk is full" in errors[-1] or
                "apply.sh: error: " in errors[-1]), out
        assert "No space left on device" in out or "is full" in out
        seen.append(errors[-1].split(":")[0])
        assert not list(small.path.glob("project/build/*.part.*"))
    assert {"build_caffe.sh", "apply.sh"} <= set(seen)
    small.free()
    assert world.run(status=0).splitlines()[-1].startswith("build_caffe.sh: done")


def test_compiler_on_a_full_disk(world, tree):
    """Its message is in the log, however much room it left at its end."""
    world.program(world.bin / "cmake",
                  "[[ $1 == --version ]] && { echo cmake version 3.25.1; exit;"
                  "}\n[[ $1 != --build ]] || { echo 'x.cpp:1: fatal error: "
                  "error writing to x.s: No space left on device'; exit 1; }")
    out = world.run(status=1)
    assert f"error: cannot write to {tree}/build: its disk is full" in out
    assert "x.cpp:1: fatal error" in out


def test_read_only_tree(world, tree, disk):
    small = disk("size=2m")
    shutil.copytree(world.project, small.path / "project")
    world.project = small.path / "project"
    small.read_only()
    try:
        out = world.run(status=1)
    finally:
        small.read_only(False)
    assert out == (f"build_caffe.sh: error: cannot write to {world.project}/build:"
                   " Read-only file system\n")


def test_tree_of_somebody_else(world, tree):
    user = user_without_root()
    if user is None:
        pytest.skip("only root can be somebody else")
    for path in (world.project, *world.project.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o022)
    out = world.run(status=1, user=user)
    assert out == (f"build_caffe.sh: error: cannot write to {world.project}/build:"
                   " Permission denied\n")


def test_runtime_folder_of_somebody_else(world, tree):
    """su leaves root's XDG_RUNTIME_DIR in the environment."""
    (world.state / "broken").touch()
    out = world.run(status=1, XDG_RUNTIME_DIR=str(world.folder / "none"))
    assert "something.cpp: error: broken" in out


# ---- Packages ----

@pytest.mark.skipif(os.geteuid() != 0, reason="root installs")
def test_goes_on_where_apt_was_killed(world, tree):
    (world.state / "installed").write_text("cmake\n")
    (world.state / "half").touch()
    pycaffe_works(tree)
    world.run(status=0)
    assert "--fix-broken" in (world.state / "apt.log").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="root installs")
def test_installs_what_is_missing(world, tree):
    (world.bin / "cargo").unlink()
    (world.state / "installed").write_text("cmake\nmake\ng++\n")
    world.policy(cargo_web="1.96.0+dfsg1-1~deb12u2")
    world.run(status=1)  # the stand-in tree has no pycaffe
    install, = [line.split() for line in
                (world.state / "apt.log").read_text().splitlines()
                if " install " in line]
    assert {"cargo-web", "rustc-web", "libopencv-dev", "python3-six"} <= set(
        install)
    assert not {"cmake", "make", "g++", "cargo"} & set(install)


def user_without_root():
    if os.geteuid():
        return None
    if not shutil.which("setpriv"):
        pytest.skip("setpriv is not installed")
    return 65534


def test_without_root(world, tree):
    """Says what to ask for, all of it at once, and installs nothing."""
    user = user_without_root()
    (world.bin / "cargo").unlink()
    (world.state / "installed").write_text("cmake\n")
    world.policy(cargo_web="1.96.0+dfsg1-1~deb12u2")
    (world.project / "build").chmod(0o777)
    out = world.run(status=1, user=user)
    line = [x for x in out.splitlines() if "apt-get install" in x][0].split()
    assert {"libopencv-dev", "libboost-python-dev", "cargo-web",
            "rustc-web"} <= set(line)
    assert "cmake" not in line
    # cargo needs them, and its package does not say so.
    assert "ca-certificates" in line
    assert "git" in line  # which applies the patches
    assert not (world.state / "apt.log").exists()

    listed = world.run("--packages", status=0, user=user).splitlines()
    assert listed == line[line.index("--no-install-recommends") + 1:]


def test_no_packages_are_missing(world):
    assert world.run("--packages", status=0) == ""


@pytest.mark.parametrize("candidates, chosen", [
    (dict(cargo="1.94.1-1"), "cargo rustc"),
    (dict(cargo="1.75.0+dfsg0ubuntu1", **{"cargo-1.80": "1.80.1",
                                          "cargo-1.89": "1.89.0"}),
     "cargo-1.89 rustc-1.89"),
    (dict(cargo="0.66.0", cargo_web="1.85.0+dfsg3"), None),
])
def test_choice_of_rust(world, tree, candidates, chosen):
    user = user_without_root()
    (world.project / "build").chmod(0o777)
    (world.bin / "cargo").unlink()
    world.policy(**candidates)
    out = world.run(status=1, user=user)
    if chosen:
        assert out.rstrip().endswith("--no-install-recommends " + chosen)
    else:
        assert "Rust 1.88 or newer is needed" in out and "rustup" in out


def test_old_cargo_first_on_the_path(world, tree):
    world.program(world.bin / "cargo", "echo cargo 1.65.0")
    new = world.folder / "home/.cargo/bin"
    new.mkdir(parents=True)
    world.program(new / "cargo", "echo cargo 1.88.0")
    (world.state / "broken").touch()
    assert "Rust" not in world.run(status=1)


# ---- Source ----

def test_clone(world):
    make_tree(world.state / "clone")
    (world.state / "broken").touch()
    out = world.run(status=1)
    assert "cloning BVLC/caffe" in out
    assert (world.caffe / ".lsoftmax-manifest").exists()
    assert sorted(p.name for p in world.caffe.parent.iterdir()) == ["caffe"]


def test_clone_is_of_the_commit(world):
    """Not of what the branch has come to since; with the real git."""
    origin = make_tree(world.folder / "origin")

    def git(*args):
        return subprocess.run(
            ["git", "-C", origin, "-c", "user.name=n", "-c", "user.email=e",
             *args], check=True, text=True, stdout=subprocess.PIPE).stdout

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "the one")
    commit = git("rev-parse", "HEAD").strip()
    (origin / "later").touch()
    git("add", ".")
    git("commit", "--quiet", "-m", "later")
    script = world.project / "cmake/caffe_source.sh"
    text = script.read_text()
    pinned = re.search(r"(?m)^caffe_commit=(99bd997[0-9a-f]{33})$", text)
    script.write_text(text.replace(pinned[1], commit))
    (world.bin / "git").unlink()
    (world.bin / "git").symlink_to(world.bin / "real-git")
    out = world.run("--source", status=0, GIT_CONFIG_COUNT="1",
                    GIT_CONFIG_KEY_0=f"url.file://{origin}.insteadOf",
                    GIT_CONFIG_VALUE_0="https://github.com/BVLC/caffe.git")
    assert "cloning BVLC/caffe at " + commit[:7] in out
    assert (world.caffe / "src/caffe/solver.cpp").exists()
    assert not (world.caffe / "later").exists()
    head = subprocess.run(["git", "-C", world.caffe, "rev-parse", "HEAD"],
                          check=True, text=True, stdout=subprocess.PIPE)
    assert head.stdout.strip() == commit


def test_no_source(world):
    out = world.run(status=1)
    assert "set CAFFE_ROOT" in out
    assert not any(world.caffe.parent.iterdir())


def test_tarball_with_another_checksum(world):
    (world.state / "caffe_1.0.0+git20180821.99bd997.orig.tar.gz").write_text(
        "not Caffe")
    out = world.run(status=1)
    assert "getting the source package caffe" in out and "FAILED" in out
    assert not any(world.caffe.parent.iterdir())


def test_folder_in_the_way(world):
    world.caffe.mkdir(parents=True)
    (world.caffe / "precious").touch()
    assert "move it away" in world.run(status=1)
    assert (world.caffe / "precious").exists()


# ---- CUDA ----

@pytest.fixture
def cuda(world, tree):
    """A toolkit that knows the GPUs from 5.0 to 9.0."""
    (tree / "python/caffe/__init__.py").write_text(
        "layer_type_list = lambda: ['BN', 'LargeMarginInnerProduct']\n")
    home = world.folder / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include/cuda_runtime.h").touch()
    world.program(home / "bin/nvcc",
                  "printf 'compute_%s\\n' 50 52 60 70 75 80 86 89 90")
    return {"CUDA_HOME": str(home)}


@pytest.mark.parametrize("gpus, archs, chosen", [
    (None, None, "60 70 75 80 86 89 90"),
    (["8.6", "7.5", "8.6"], None, "75 86"),
    (["8.6"], "90 80", "80 90"),
])
def test_cuda_architectures(world, cuda, gpus, archs, chosen):
    if gpus:
        world.program(world.bin / "nvidia-smi", "printf '%s\\n' "
                      + " ".join(gpus))
    if archs:
        cuda["CUDA_ARCHS"] = archs
    assert "done (cuda)" in world.run("--cuda", status=0, **cuda)
    calls = world.cmake_calls()
    assert f"-DCUDA_ARCH_BIN={chosen} " in calls
    assert f"-DCUDA_ARCH_PTX={chosen.split()[-1]}\n" in calls
    assert f"-DCUDA_TOOLKIT_ROOT_DIR={cuda['CUDA_HOME']} " in calls


@pytest.mark.parametrize("there, chosen", [
    (["cc", "g++-12"], "cc"),
    (["g++-9", "g++-11", "g++-13"], "g++-11"),
    (["g++-13"], None),
])
def test_cuda_host_compiler(world, cuda, there, chosen):
    """CMake's own if nvcc takes it, else the newest that it takes."""
    accepted = ["cc"] if chosen == "cc" else ["g++-9", "g++-11"]
    world.program(pathlib.Path(cuda["CUDA_HOME"]) / "bin/nvcc",
                  "while (( $# )); do\n"
                  "  if [[ $1 == --list-gpu-arch ]]; then echo compute_80; fi\n"
                  "  if [[ $1 == -ccbin ]]; then case ${2##*/} in\n"
                  f"    {'|'.join(accepted)}) ;;\n"
                  "    *) echo 'unsupported GNU version!' >&2; exit 1;;\n"
                  "  esac; fi\n"
                  "  shift\n"
                  "done")
    for name in there:
        world.program(world.bin / name, "")
    out = world.run("--cuda", status=0 if chosen else 1, **cuda)
    calls = world.cmake_calls()
    if chosen == "g++-11":
        assert f"-DCUDA_HOST_COMPILER={world.bin}/g++-11\n" in calls
    else:
        assert "HOST_COMPILER" not in calls
    if not chosen:
        assert "unsupported GNU version!" in out and "older one" in out
        assert not calls


def test_cuda_architectures_that_nvcc_does_not_know(world, cuda):
    out = world.run("--cuda", status=1, CUDA_ARCHS="80 100 120", **cuda)
    assert "does not know\n  100 120\n" in out and " 86 89 90" in out
    assert not world.cmake_calls()

    world.program(world.bin / "nvidia-smi", "echo 12.0")
    out = world.run("--cuda", status=1, **cuda)
    assert "knows none of this machine's GPUs" in out


@pytest.fixture
def nccl(world, cuda):
    """NCCL, as NVIDIA's package for Python has it."""
    with open(world.caffe / "CMakeLists.txt", "a") as file:
        file.write('caffe_option(USE_NCCL "Build Caffe with NCCL" OFF)\n')
    home = world.folder / "my nccl"
    (home / "include").mkdir(parents=True)
    (home / "include/nccl.h").touch()
    (home / "lib").mkdir()
    (home / "lib/libnccl.so.2").touch()
    return {**cuda, "NCCL_DIR": str(home)}


def test_nccl(world, nccl):
    world.run("--cuda", "--nccl", status=0, **nccl)
    calls = world.cmake_calls()
    assert "-DUSE_NCCL=ON" in calls
    assert f"-DNCCL_INCLUDE_DIR={nccl['NCCL_DIR']}/include" in calls
    assert f"-DNCCL_LIBRARIES={nccl['NCCL_DIR']}/lib/libnccl.so.2" in calls
    (world.state / "cmake.log").unlink()
    world.run("--cuda", status=0, **nccl)
    assert "NCCL" not in world.cmake_calls()  # CMake keeps what it was told


def test_nccl_that_is_not_there(world, nccl):
    nccl["NCCL_DIR"] = str(world.folder)
    out = world.run("--cuda", "--nccl", status=1, **nccl)
    assert f"NCCL_DIR={world.folder} has no include/nccl.h" in out
    assert not world.cmake_calls()


def test_nccl_needs_cuda(world, tree):
    out = world.run("--cpu", "--nccl", status=1)
    assert "--nccl is for a build with CUDA" in out


def test_nccl_came_after_rc3(world, cuda):
    out = world.run("--cuda", "--nccl", status=1, **cuda)
    assert "knows no NCCL: BVLC Caffe has it from rc4 on" in out
    assert not world.cmake_calls()


# ---- Several at once ----

def test_waits_for_another_run(world, tree):
    (world.state / "broken").touch()
    world.run(status=1)
    lock, = world.folder.glob("lsoftmax-*.lock")
    command, env = world.command()
    with open(lock) as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        run = subprocess.Popen(command, env=env, text=True, cwd="/",
                               stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
        first = run.stdout.readline()
        assert "waiting for another script that works in" in first
        assert str(tree) in first
        assert run.poll() is None
    assert "something.cpp: error: broken" in run.communicate(timeout=60)[0]
