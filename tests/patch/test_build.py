"""cmake/lsoftmax.cmake and cmake/lsoftmax.mk in stand-ins of Caffe's builds.

The real ones take minutes (cmake/build_caffe.sh). These have the same
variables and the same shape, one source file, and a cargo that compiles a C
file instead of the crate.
"""

import os
import pathlib
import shutil
import subprocess

import pytest

CARGO = r"""#!/bin/bash
set -e
if [[ $1 == --version ]]; then echo "cargo {version} (stand-in)"; exit; fi
echo "$*; $LSOFTMAX_NVCC; $LSOFTMAX_NVCC_FLAGS; $NVCC_CCBIN" >> {log}
source=$PWD/src/answer.c
mkdir -p "$CARGO_TARGET_DIR"
cd "$CARGO_TARGET_DIR"
mkdir -p release cxxbridge/lsoftmax/src/bridge
echo 'extern "C" int lsoftmax_answer();' > cxxbridge/new.h
cmp -s cxxbridge/new.h cxxbridge/lsoftmax/src/bridge/ffi.rs.h ||
  cp cxxbridge/new.h cxxbridge/lsoftmax/src/bridge/ffi.rs.h
if [[ ! release/liblsoftmax.a -nt $source ]]; then
  cc -fPIC -c "$source" -o answer.o
  rm -f release/liblsoftmax.a
  ar rcs release/liblsoftmax.a answer.o
fi
"""

LAYER = """#include "lsoftmax/src/bridge/ffi.rs.h"
#include "caffe/layers/own.hpp"
int answer() { return OWN * lsoftmax_answer(); }
"""

TOOL = """#include <cstdio>
int answer();
int main() { std::printf("%d\\n", answer()); }
"""

CMAKE = """cmake_minimum_required(VERSION 3.5)
project(Caffe C CXX)
include(GNUInstallDirs)
set(CMAKE_CXX_FLAGS "${{CMAKE_CXX_FLAGS}} -fPIC")
option(BUILD_SHARED_LIBS "" ON)
set(Caffe_LINKER_LIBS {libs})
{cuda}
function(caffe_default_properties target)
  if (DEFINED external_project_dependencies)
    add_dependencies(${{target}} ${{external_project_dependencies}})
  endif()
endfunction()
include("{project}/cmake/lsoftmax.cmake" NO_POLICY_SCOPE)
# ---[ Subdirectories
add_subdirectory(src/caffe)
add_executable(tool tool.cpp)
target_link_libraries(tool caffe)
caffe_default_properties(tool)
export(TARGETS caffe FILE "${{PROJECT_BINARY_DIR}}/CaffeTargets.cmake")
install(EXPORT CaffeTargets DESTINATION share/Caffe)
install(TARGETS tool DESTINATION bin)
install(DIRECTORY include/caffe DESTINATION include)
"""

CMAKE_SRC = """add_library(caffe layers/large_margin_inner_product_layer.cpp)
caffe_default_properties(caffe)
target_link_libraries(caffe ${Caffe_LINKER_LIBS})
target_include_directories(caffe PUBLIC
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:include>)
install(TARGETS caffe EXPORT CaffeTargets DESTINATION lib)
"""

CONSUMER = """cmake_minimum_required(VERSION 3.5)
project(consumer CXX)
include("${PREFIX}/share/Caffe/CaffeTargets.cmake")
add_executable(consumer ../tool.cpp)
target_link_libraries(consumer caffe)
"""

MAKEFILE = """PROJECT := caffe

CONFIG_FILE := Makefile.config
include $(CONFIG_FILE)
{include}

BUILD_DIR_LINK := $(BUILD_DIR)
RELEASE_BUILD_DIR ?= .$(BUILD_DIR)_release
BUILD_DIR := $(RELEASE_BUILD_DIR)
NAME := $(BUILD_DIR)/lib/libcaffe.so
OBJS := $(BUILD_DIR)/src/caffe/layers/large_margin_inner_product_layer.o
CXXFLAGS += -fPIC -I./include
LINKFLAGS += -fPIC
LDFLAGS += -lm
.PHONY: all clean
all: $(BUILD_DIR)/tool
$(NAME): $(OBJS)
	@ mkdir -p $(@D)
	@ echo LD $@
	$(CXX) -shared -o $@ $(OBJS) $(LINKFLAGS) $(LDFLAGS)
$(BUILD_DIR)/%.o: %.cpp
	@ mkdir -p $(@D)
	@ echo CXX $<
	$(CXX) $< $(CXXFLAGS) -c -o $@
$(BUILD_DIR)/tool: tool.cpp | $(NAME)
	$(CXX) $< -o $@ $(LINKFLAGS) -L$(BUILD_DIR)/lib -lcaffe $(LDFLAGS) \\
		-Wl,-rpath,'$$ORIGIN/lib'
clean:
	rm -rf $(BUILD_DIR)
"""


def sh(*command, cwd=None, env=None, status=0):
    done = subprocess.run(list(map(str, command)), cwd=cwd, text=True,
                          env={**os.environ, **(env or {})},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if status is not None:
        assert done.returncode == status, done.stdout
    return done.stdout


class Setup:
    """A project with a stand-in crate, a Caffe, and a PATH with a cargo."""

    def __init__(self, tmp_path, folder="project", caffe="caffe"):
        self.project = tmp_path / folder
        self.caffe = tmp_path / caffe
        self.build = self.caffe / "build"
        self.log = tmp_path / "cargo.log"
        self.bin = tmp_path / "bin"
        self.home = tmp_path / "home"
        layer = "src/caffe/layers/large_margin_inner_product_layer.cpp"
        here = os.path.dirname(os.path.abspath(__file__))
        shutil.copytree(f"{here}/../../cmake", self.project / "cmake")
        for name, text in {
            self.project / "Cargo.toml": '[package]\nrust-version = "1.88"\n',
            self.project / "src/answer.c":
                "int lsoftmax_answer() { return 42; }\n",
            self.project / layer: LAYER,
            # Must not shadow the tree's own header of that name.
            self.project / "include/caffe/layers/own.hpp": "#define OWN 0\n",
            self.caffe / "include/caffe/layers/own.hpp": "#define OWN 1\n",
            self.caffe / layer: LAYER,
            self.caffe / "tool.cpp": TOOL,
            self.caffe / "src/caffe/CMakeLists.txt": CMAKE_SRC,
            self.caffe / "consumer/CMakeLists.txt": CONSUMER,
        }.items():
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_text(text)
        self.cargo(self.bin, "1.95.0")
        # No other cargo than ours.
        for program in ("cc", "c++", "gcc", "g++", "as", "ld", "ar", "ranlib",
                        "nm", "make", "cmake", "bash", "sh", "env", "sed",
                        "awk", "uname", "mkdir", "rm", "cp", "cmp", "dirname",
                        "touch", "echo", "ninja", "find", "sort", "head"):
            found = shutil.which(program)
            if found:
                (self.bin / program).symlink_to(os.path.realpath(found))
        self.env = {"PATH": str(self.bin), "HOME": str(self.home),
                    "CARGO_HOME": ""}

    def cargo(self, folder, version):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "cargo"
        path.write_text(CARGO.replace("{version}", version)
                        .replace("{log}", str(self.log)))
        path.chmod(0o755)

    def cmake(self, *options, keywords=True, cuda="", status=0):
        (self.caffe / "CMakeLists.txt").write_text(CMAKE.format(
            project=self.project, cuda=cuda,
            libs="PUBLIC m PRIVATE dl" if keywords else "m dl"))
        return self.sh("cmake", "-S", self.caffe, "-B", self.build, *options,
                       status=status)

    def make(self):
        return self.sh("cmake", "--build", self.build)

    def sh(self, *command, **kw):
        return sh(*command, env=self.env, **kw)

    def new_answer(self, answer):
        (self.project / "src/answer.c").write_text(
            f"int lsoftmax_answer() {{ return {answer}; }}\n")


@pytest.fixture
def setup(tmp_path):
    return Setup(tmp_path)


def generators():
    return ["Unix Makefiles"] + (["Ninja"] if shutil.which("ninja") else [])


@pytest.mark.parametrize("generator", generators())
@pytest.mark.parametrize("keywords", [True, False])
@pytest.mark.parametrize("shared", ["ON", "OFF"])
def test_cmake(tmp_path, generator, keywords, shared):
    s = Setup(tmp_path, "my project")
    s.cmake("-G", generator, f"-DBUILD_SHARED_LIBS={shared}",
            f"-DCMAKE_INSTALL_PREFIX={tmp_path}/prefix", keywords=keywords)
    s.make()
    assert s.sh(s.build / "tool") == "42\n"
    if shared == "ON":
        symbols = s.sh("nm", "-D", "--defined-only",
                       s.build / "src/caffe/libcaffe.so")
        assert "answer" in symbols and "lsoftmax_answer" not in symbols

    calls = s.log.read_text().count("build --release --locked")
    assert "Linking" not in s.make()
    assert s.log.read_text().count("build --release --locked") == calls + 1

    s.new_answer(43)
    s.make()
    assert s.sh(s.build / "tool") == "43\n"
    assert "Linking" not in s.make()

    # Installed, and everything that it was built from gone.
    s.sh("cmake", "--build", s.build, "--target", "install")
    s.project.rename(tmp_path / "gone")
    s.build.rename(tmp_path / "gone too")
    moved = tmp_path / "opt"
    (tmp_path / "prefix").rename(moved)
    if shared == "ON":
        assert not list(moved.rglob("*lsoftmax*"))
        assert "lsoftmax" not in "".join(
            f.read_text() for f in moved.rglob("*.cmake"))
    consumer = s.caffe / "consumer"
    s.sh("cmake", "-S", consumer, "-B", consumer / "b", f"-DPREFIX={moved}")
    s.sh("cmake", "--build", consumer / "b")
    assert s.sh(consumer / "b" / "consumer") == "43\n"


def test_cmake_clean_takes_the_library_along(setup):
    setup.cmake()
    setup.make()
    setup.sh("cmake", "--build", setup.build, "--target", "clean")
    assert not list(setup.build.rglob("liblsoftmax.a"))
    setup.make()
    assert setup.sh(setup.build / "tool") == "42\n"


def test_cmake_hands_cuda_on(setup):
    setup.cmake(cuda='set(HAVE_CUDA TRUE)\nset(CUDA_NVCC_EXECUTABLE /x/nvcc)\n'
                     'set(NVCC_FLAGS_EXTRA -gencode;arch=compute_80,code=sm_80)'
                     '\nset(CUDA_HOST_COMPILER /x/g++)')
    setup.make()
    call = setup.log.read_text()
    assert "--features cuda" in call
    assert "; /x/nvcc; -gencode arch=compute_80,code=sm_80; /x/g++" in call


def test_cmake_passes_an_old_cargo_by(setup):
    setup.cargo(setup.bin, "1.65.0")
    out = setup.cmake(status=1)
    assert "Rust 1.88 or" in out
    assert f"{setup.bin}/cargo has version 1.65.0" in out
    assert "cargo-web" in out
    setup.cargo(setup.home / ".cargo/bin", "1.88.0")
    assert f"{setup.home}/.cargo/bin/cargo\n" in setup.cmake()
    setup.make()


def test_cmake_without_cargo(setup):
    (setup.bin / "cargo").unlink()
    assert "Rust 1.88 or" in setup.cmake(status=1)


# ---- Make ----

@pytest.fixture(params=[("project", "caffe"), ("my project", "a caffe")],
                ids=["plain", "blanks"])
def setup_of_make(request, tmp_path):
    return Setup(tmp_path, *request.param)


@pytest.fixture
def make(setup_of_make):
    setup = setup_of_make
    escaped = str(setup.project).replace(" ", "\\ ")
    (setup.caffe / "Makefile").write_text(MAKEFILE.replace(
        "{include}", f"LSOFTMAX_ROOT := {setup.project}\n"
                     f"include {escaped}/cmake/lsoftmax.mk"))
    (setup.caffe / "Makefile.config").write_text(
        "CPU_ONLY := 1\nBUILD_DIR := build\n"
        "CUDA_DIR := /x\nCUDA_ARCH := -gencode arch=compute_80,code=sm_80 \\\n"
        "\t\t-gencode arch=compute_90,code=sm_90\n")

    def run(*args, status=0):
        return setup.sh("make", *args, cwd=setup.caffe, status=status)
    return run


def test_make(setup_of_make, make):
    setup = setup_of_make
    make()
    tool = setup.caffe / ".build_release/tool"
    assert setup.sh(tool) == "42\n"
    symbols = setup.sh("nm", "-D", "--defined-only",
                       setup.caffe / ".build_release/lib/libcaffe.so")
    assert "answer" in symbols and "lsoftmax_answer" not in symbols

    out = make()
    assert "CARGO" in out and "LD ." not in out and "CXX src" not in out
    setup.new_answer(43)
    assert "LD ." in make()
    assert setup.sh(tool) == "43\n"
    assert "LD ." not in make()

    make("clean")
    assert not list(setup.caffe.rglob("*lsoftmax*"))


def test_make_hands_cuda_on(setup_of_make, make):
    setup = setup_of_make
    make("CPU_ONLY=0")
    call = setup.log.read_text()
    assert "--features cuda" in call
    assert ("; /x/bin/nvcc; -gencode arch=compute_80,code=sm_80 "
            "-gencode arch=compute_90,code=sm_90; g++") in call


def test_make_passes_an_old_cargo_by(setup_of_make, make):
    setup = setup_of_make
    setup.cargo(setup.bin, "1.65.0")
    assert "Rust 1.88 or newer is needed" in make(status=2)
    setup.cargo(setup.home / ".cargo/bin", "2.0.0")
    make()


# ---- Without a network ----

OFFLINE = r"""#!/bin/bash
if [[ $1 == --version ]]; then echo "cargo 1.95.0 (stand-in)"; exit; fi
echo "$*" >> {log}
case $* in *vendor*) ;; *) echo "no matching package named cxx" >&2; exit 101;; esac
"""


def test_offline(setup):
    """Says what to bring; and a folder vendor/ is what cargo takes."""
    (setup.bin / "cargo").write_text(
        OFFLINE.replace("{log}", str(setup.log)))
    find = setup.project / "cmake/find_cargo.sh"
    out = setup.sh(find, "build", "--locked", status=101)
    assert "no matching package named cxx" in out
    assert "crates are missing" in out and "cargo vendor" in out
    assert f"{setup.project}/vendor" in out
    (setup.project / "vendor").mkdir()
    setup.log.unlink()
    assert setup.sh(find, "build", "--locked", cwd="/") == ""
    assert setup.log.read_text() == (
        'build --config source.crates-io.replace-with="vendor" '
        '--config source.vendor.directory="vendor" --locked\n')
    setup.sh(find, "fmt", "--check", status=101)
    assert setup.log.read_text().endswith("\nfmt --check\n")


def test_a_crate_that_does_not_compile_is_no_missing_one(setup):
    (setup.bin / "cargo").write_text(
        OFFLINE.replace("{log}", str(setup.log)).replace("*vendor*", "tree*"))
    out = setup.sh(setup.project / "cmake/find_cargo.sh", "build", status=101)
    assert "crates are missing" not in out


# ---- Without git ----

def test_cargo_does_not_look_into_what_was_built(tmp_path):
    """In it are links to the project, of which cargo warns."""
    project = pathlib.Path(__file__).resolve().parents[2]
    for name in ("Cargo.toml", "Cargo.lock", "build.rs"):
        shutil.copy(project / name, tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src/lib.rs").touch()
    (tmp_path / "build/caffe").mkdir(parents=True)
    (tmp_path / "build/caffe/file").touch()
    (tmp_path / "build/caffe/link").symlink_to(tmp_path)
    listed = subprocess.run(
        [project / "cmake/find_cargo.sh", "package", "--list", "--offline",
         "--manifest-path", tmp_path / "Cargo.toml"], check=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    assert "src/lib.rs" in listed.split()
    assert "build/" not in listed
