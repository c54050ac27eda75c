"""Where cmake/nvidia_library.sh has NCCL and cuDNN from."""

import pathlib
import shutil
import subprocess

import pytest

from test_build_caffe import cuda, tree, world  # noqa: F401


@pytest.fixture
def find(world, cuda):  # noqa: F811
    """Runs the script; PYTHONPATH is what its Python has."""
    world.program(pathlib.Path(cuda["CUDA_HOME"]) / "bin/nvcc",
                  "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    (world.bin / "ln").symlink_to(shutil.which("ln"))
    packages = world.folder / "packages"
    (packages / "pip").mkdir(parents=True)
    (packages / "pip/__init__.py").touch()

    def run(*args, status=0, **env):
        done = subprocess.run(
            [world.project / "cmake/nvidia_library.sh", *args], text=True,
            cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={
                "PATH": str(world.bin), "PYTHONPATH": str(packages),
                "PYTHONDONTWRITEBYTECODE": "1", **cuda, **env})
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr
    run.packages = packages
    return run


def put(folder, name, header):
    for path in (folder / "include" / header, folder / "lib" / name):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# In pip's place: unpacks a wheel that says which package it is.
PIP = """
import os, sys
if "--version" not in sys.argv:
    target = sys.argv[sys.argv.index("--target") + 1]
    name = sys.argv[-1].split("-")[1]
    for path in ("include/%s.h" % name, "lib/lib%s.so.9" % name):
        path = os.path.join(target, "nvidia", name, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").write(sys.argv[-1])
"""


def test_the_users_choice(world, find):  # noqa: F811
    put(world.folder / "mine", "libcudnn.so.9", "cudnn.h")
    assert find("cudnn", CUDNN_ROOT=str(world.folder / "mine")) == (
        "%s/mine/lib/libcudnn.so.9\n" % world.folder)
    assert "CUDNN_ROOT=/nowhere has no include/cudnn.h" in find(
        "cudnn", status=1, CUDNN_ROOT="/nowhere")


def test_that_of_pytorch(find):
    put(find.packages / "nvidia/nccl", "libnccl.so.2", "nccl.h")
    (find.packages / "nvidia_nccl_cu13-2.28.9.dist-info").mkdir()
    assert find("nccl") == "%s/nvidia/nccl/lib/libnccl.so.2\n" % find.packages


def test_that_of_pypi(world, find):  # noqa: F811
    """What is of another CUDA is none; what is unpacked stays."""
    put(find.packages / "nvidia/cudnn", "libcudnn.so.9", "cudnn.h")
    (find.packages / "nvidia_cudnn_cu12-9.28.dist-info").mkdir()
    main = find.packages / "pip/__main__.py"
    main.write_text(PIP)
    dest = world.project / "build/cudnn"
    for _ in range(2):
        assert find("cudnn") == "%s/lib/libcudnn.so\n" % dest
        assert (dest / "lib/libcudnn.so").read_text() == "nvidia-cudnn-cu13"
        main.write_text("raise SystemExit(1)")


def test_pypi_that_does_not_answer(world, find):  # noqa: F811
    (find.packages / "pip/__main__.py").write_text(
        "import sys\nsys.exit('--version' not in sys.argv)\n")
    assert "pip could not get nvidia-nccl-cu13" in find("nccl", status=1)
    assert {p.name for p in (world.project / "build").iterdir()} <= {
        "nccl.lock", "caffe"}


def test_wrong_call(find):
    assert "which library, nccl or cudnn?" in find("frob", status=2)
