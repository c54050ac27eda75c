#!/usr/bin/python3
"""Packs what tests/gpu/bundle.sh has built into a folder to carry away."""
import argparse
import gzip
import json
import os
import re
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
MOST_MIB = 60

PROGRAMS = ["tools/caffe", "test/test.testbin",
            "examples/mnist/convert_mnist_data",
            "examples/cifar10/convert_cifar_data"]
# Of the project's files; they keep their places.
FILES = ["myexamples/mnist/mnist_solver.prototxt",
         "myexamples/mnist/model/mnist_train_test.prototxt",
         "myexamples/mnist/mnist.sha256",
         "myexamples/cifar10/cifar_solver.prototxt",
         "myexamples/cifar10/model/cifar_train_test.prototxt",
         "myexamples/cifar10/cifar10.sha256"]
SCRIPTS = ["tests/gpu/run.sh", "tests/gpu/run.py", "tests/gpu/host.py",
           "tests/gpu/results.py", "tests/gpu/checks.py",
           "tests/gpu/trainings.py", "tests/gpu/processes.py",
           "tests/gpu/images.py", "myexamples/caffe_log.py"]

# CUDA's large libraries are the host's business; those of the C library are
# for hosts with an older one.
OF_THE_HOST = re.compile(r"lib(cublas|curand|cudnn|nccl)")
OF_C = re.compile(r"(ld-linux|lib(c|m|dl|pthread|rt|resolv)\.so)")


class UserError(Exception):
    """What is said without a traceback."""


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dest", metavar="DEST", help="the folder to make")
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--build", required=True, metavar="FOLDER",
                        help="where CMake has built Caffe")
    parser.add_argument("--check", required=True, metavar="PROGRAM",
                        help="the built gpu_check.cpp")
    parser.add_argument("--archs", default="", help="GPUs it is built for")
    parser.add_argument("--search", action="append", default=[],
                        metavar="FOLDER", help="has libraries of Caffe's")
    return parser.parse_args()


def parse_ldd(text):
    """{name: path} of what ldd lists; a missing one's path is None."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 3 and words[1] == "=>":
            found[words[0]] = None if words[2] == "not" else words[2]
        elif words and "/ld-linux" in words[0]:
            found[os.path.basename(words[0])] = words[0]
    return found


def pack_libraries(part, build, search):
    """Copies what the programs need; returns what the host must have."""
    shutil.copy(os.path.realpath(os.path.join(build, "lib/libcaffe.so")),
                os.path.join(part, "lib"))
    env = dict(os.environ, LD_LIBRARY_PATH=":".join(
        [os.path.join(part, "lib")] + search))
    programs = [os.path.join(part, "bin", name)
                for name in os.listdir(os.path.join(part, "bin"))]
    libraries = parse_ldd(subprocess.run(
        ["ldd"] + programs, env=env, check=True, universal_newlines=True,
        stdout=subprocess.PIPE).stdout)
    of_the_host = []
    for name, path in sorted(libraries.items()):
        if OF_THE_HOST.match(name):
            of_the_host.append(name)
        elif path is None:
            raise UserError("Caffe's library %s is not found" % name)
        elif not name.startswith("libcaffe.so"):
            shutil.copy(path, os.path.join(
                part, "lib/c" if OF_C.match(name) else "lib", name))
    stripped = programs + [
        os.path.join(part, "lib", name)
        for name in os.listdir(os.path.join(part, "lib")) if ".so" in name]
    subprocess.run(["strip", "--strip-unneeded"] + stripped, check=True)
    return of_the_host


def gtest_cases(part, search):
    """The cases of the packed test.testbin, in its order."""
    listing = subprocess.run(
        [os.path.join(part, "bin/test.testbin"), "--gtest_list_tests"],
        env=dict(os.environ, LD_LIBRARY_PATH=":".join(search)), check=True,
        universal_newlines=True, stdout=subprocess.PIPE).stdout
    return re.findall(r"^(\w+/\d+)\.", listing, re.M)


def pack_images(part):
    """The files of myexamples/mnist/data, gzipped; returns their name."""
    data = os.path.join(ROOT, "myexamples/mnist/data")
    with open(os.path.join(data, "dataset.txt")) as file:
        name = file.read().strip()
    if name != "MNIST":
        print("pack.py: warning: MNIST could not be had, and the paper's "
              "figures are of no other images: the folder gets none (run.sh "
              "data brings them there)", flush=True)
        return None
    os.mkdir(os.path.join(part, "mnist"))
    for file in sorted(os.listdir(data)):
        if file.endswith("ubyte"):
            path = os.path.join(part, "mnist", file + ".gz")
            with open(os.path.join(data, file), "rb") as plain, \
                    gzip.GzipFile(path, "wb", 9, mtime=0) as packed:
                shutil.copyfileobj(plain, packed)
    return name


def revision():
    """The project's commit, with a mark where files differ from it."""
    done = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=12",
         "--exclude=*"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        universal_newlines=True)
    return done.stdout.strip() or "unknown"


def size_mib(folder):
    """The bytes of all files, in MiB."""
    return sum(os.path.getsize(os.path.join(path, name))
               for path, _, names in os.walk(folder)
               for name in names) / 2.0 ** 20


def pack(args, part):
    """Fills the folder part."""
    for folder in ("bin", "lib/c"):
        os.makedirs(os.path.join(part, folder))
    for program in PROGRAMS:
        shutil.copy(os.path.join(args.build, program),
                    os.path.join(part, "bin"))
    shutil.copy(args.check, os.path.join(part, "bin/gpu_check"))
    # A Caffe without CUDA stays on this machine, and its libraries with it.
    libraries = [] if args.device == "cpu" else pack_libraries(
        part, args.build, args.search)
    for name in SCRIPTS:
        shutil.copy(os.path.join(ROOT, name), part)
    for name in FILES:
        path = os.path.join(part, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), path)
    shutil.copytree(os.path.join(HERE, "nets"), os.path.join(part, "nets"))
    images = pack_images(part)
    with open(os.path.join(part, "bundle.json"), "w") as file:
        json.dump({"revision": revision(), "device": args.device,
                   "archs": args.archs, "libraries": libraries,
                   "images": images,
                   "gtests": gtest_cases(part, args.search)}, file, indent=2)
        file.write("\n")


def main():
    args = parse_args()
    dest = os.path.abspath(args.dest)
    part = dest + ".part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        pack(args, part)
        size = size_mib(part)
        if args.device == "cuda" and size > MOST_MIB:
            raise UserError("the folder has %.1f MiB, more than %d: name "
                            "fewer GPUs in CUDA_ARCHS (%s)"
                            % (size, MOST_MIB, args.archs))
        shutil.rmtree(dest, ignore_errors=True)
        os.rename(part, dest)
    except UserError as error:
        sys.exit("pack.py: error: %s" % error)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit("pack.py: error: cannot pack %s: %s" % (dest, error))
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if args.device == "cpu":
        print("bundle.sh: done: %s, to rehearse on this machine: run.sh in it"
              % dest)
    else:
        print("bundle.sh: done: %s (%.1f MiB, for sm_%s and later); on a host "
              "with a GPU: run.sh in it"
              % (dest, size, args.archs.replace(" ", ", sm_")))


if __name__ == "__main__":
    main()
