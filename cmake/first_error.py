#!/usr/bin/python3
"""Finds out why a build failed.

    first_error.py LOG

prints the first error of CMake, a compiler, a linker or cargo in a log on one
line and, where what it says is missing is known, the Debian package of it on
another. Prints nothing where there is none.
"""
import argparse
import re
import sys

ERROR = re.compile(
    r"(^|[: ])(fatal )?error(\[E\d+\])?: |undefined reference to"
    r"|: cannot find -l|\*\*\* No rule to make|^CPack Error: ")
MISSING = re.compile(
    r"could not find|no such file or directory|cannot find -l"
    r"|package configuration file provided by|no module named", re.I)
BOOST = re.compile(r"boost.*?(regex|python|system|thread|filesystem)", re.I)
# The first that occurs counts: protoc before protobuf, numpy before python.
PACKAGES = (
    ("boost", "libboost-dev"), ("gflags", "libgflags-dev"),
    ("glog", "libgoogle-glog-dev"), ("protoc", "protobuf-compiler"),
    ("protobuf", "libprotobuf-dev"), ("hdf5", "libhdf5-dev"),
    ("lmdb", "liblmdb-dev"), ("leveldb", "libleveldb-dev"),
    ("snappy", "libsnappy-dev"), ("opencv", "libopencv-dev"),
    ("openblas", "libopenblas-dev"), ("cblas", "libopenblas-dev"),
    ("atlas", "libatlas-base-dev"), ("numpy", "python3-numpy"),
    ("python", "python3-dev"), ("turbojpeg", "libturbojpeg0-dev"),
    ("opencl", "ocl-icd-opencl-dev"), ("viennacl", "libviennacl-dev"),
)


def first_error(lines):
    """The first error; what CMake says goes on to the next empty line."""
    said = []
    for line in lines:
        if said or line.startswith("CMake Error"):
            if not line.strip():
                break
            said.append(line.strip())
        elif ERROR.search(line):
            return line.strip()
    return " ".join(filter(None, said))


def package_of(error):
    """The Debian package of what an error says is missing, or None."""
    if not MISSING.search(error):
        return None
    part = BOOST.search(error)
    if part:
        return "libboost-%s-dev" % part[1].lower()
    return next((package for word, package in PACKAGES
                 if word in error.lower()), None)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", metavar="LOG")
    args = parser.parse_args()
    try:
        with open(args.log, errors="replace") as file:
            error = first_error(file)
    except OSError as problem:
        sys.exit("error: cannot read %s: %s" % (args.log, problem.strerror))
    if error:
        print(error[:400])
        package = package_of(error)
        if package:
            print(package)


if __name__ == "__main__":
    main()
