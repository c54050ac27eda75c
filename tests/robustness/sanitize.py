#!/usr/bin/python3
"""Looks for memory errors, data races and undefined behaviour.

Usage: sanitize.py [STAGE...]

Runs the layers' tests under tools that see what a test cannot: reads and
writes outside of their memory, uninitialised values, leaks, data races,
undefined behaviour. It is for changes of code with `unsafe`, threads or the
C++ border, takes 10 minutes or more on two cores and is no part of
tests/run.sh.

Stages, by default all of them:
  unsafe    every unsafe block says why it is safe (clippy, with the GPU path;
            its kernels are not compiled for it)
  asan      the crate's tests under AddressSanitizer
  tsan      the crate's tests under ThreadSanitizer, for BN's threads; the
            standard library is built with it (needs the component rust-src:
            in a library that is not, ThreadSanitizer does not see the locks)
  miri      tests of the crate that are small enough for Miri (needs it:
            rustup toolchain install nightly --component miri,rust-src)
  valgrind  the gtests of both layers in memcheck, with a library that has
            Rust's debug assertions; their death tests are left out, since a
            process that ends in LOG(FATAL) frees nothing

The sanitizers are options of rustc that only nightly compilers offer;
RUSTC_BOOTSTRAP=1 has a stable one take them. A stage whose tool cannot be had
is SKIPPED with the reason. What is built, and the logs, are in
build/robustness. The exit status is 0 if no stage failed.
"""
import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stages import (CARGO, GTEST, ROOT, CannotRun, Failed,  # noqa: E402
                    Stages, shell, use_the_builds_cargo, works)

WORK = ROOT / "build/robustness"
CAFFE_ROOT = Path(os.environ.get("CAFFE_ROOT") or ROOT / "build/caffe")

# Caffe's solver asks for the name of a snapshot, to try whether it may write
# one, before it has set the number of the iteration that is a part of it.
SUPPRESSIONS = "".join("""{
  the name that the solver tries
  Memcheck:%s
  ...
  fun:*SnapshotFilename*
  fun:*CheckSnapshotWritePermissions*
}
""" % kind for kind in ("Cond", "Value8"))

# Too many operations for an interpreter, or random cases by the thousand.
MIRI = (
    ["--lib"],
    ["--test", "large_margin", "--", "--skip", "equals_the_oracle", "--skip",
     "gradients_are", "--skip", "psi", "--skip", "the_", "--skip",
     "f32_keeps", "--skip", "any_", "--skip", "a_class_alone", "--skip",
     "huge"],
    ["--test", "batch_norm", "--", "--skip", "oracle", "--skip", "bit_by_bit",
     "--skip", "numerical", "--skip", "threads", "--skip", "dwarfs", "--skip",
     "huge", "--skip", "batches_may", "--skip", "what_is_not"],
)


def environment(**variables):
    return dict(os.environ, **{name: str(value)
                               for name, value in variables.items()})


def output_of(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, text=True,
                          check=True).stdout


def sanitized(stages, name, flags, *options):
    """The crate's tests with a sanitizer."""
    host = re.search(r"(?m)^host: (.*)", output_of("rustc", "-vV"))[1]
    # Optimised a little: the tests of BN's threads take large blobs.
    stages.run("cargo", "test", "--locked", "--tests", "--target", host,
               *options, env=environment(
                   CARGO_TARGET_DIR=WORK / name, RUSTC_BOOTSTRAP=1,
                   RUSTFLAGS=flags, CARGO_PROFILE_TEST_OPT_LEVEL=1))


def run_unsafe(stages):
    if not works("cargo", "clippy", "--version"):
        raise CannotRun("cargo clippy is missing")
    stages.clippy("-D", "clippy::undocumented_unsafe_blocks", "-D",
                  "clippy::missing_safety_doc", "-D", "unsafe_op_in_unsafe_fn",
                  CARGO_TARGET_DIR=str(WORK / "unsafe"))
    stages.print("%d unsafe blocks and impls in src, each with its SAFETY "
                 "fact" % sum(
                     len(re.findall(r"\bunsafe (?:\{|impl\b)",
                                    path.read_text(errors="replace")))
                     for path in (ROOT / "src").rglob("*") if path.is_file()))


def run_asan(stages):
    sanitized(stages, "asan", "-Zsanitizer=address")


def run_tsan(stages):
    sysroot = output_of("rustc", "--print", "sysroot").strip()
    if not os.path.exists(sysroot + "/lib/rustlib/src/rust/library"):
        raise CannotRun("no source of the standard library (rustup component "
                        "add rust-src)")
    sanitized(stages, "tsan", "-Zsanitizer=thread", "-Zbuild-std")


def run_miri(stages):
    for miri in (["cargo", "miri"], ["cargo", "+nightly", "miri"]):
        if works(*miri, "--version"):
            break
    else:
        raise CannotRun("Miri is missing; it would run: cargo miri test "
                        + "; ".join(map(" ".join, MIRI)))
    # Miri makes powf wrong in its last bits at random unless told not to;
    # proptest asks for the working directory; rayon's epochs need tree
    # borrows; with AVX2 on, the calls that need it are made.
    env = environment(
        CARGO_TARGET_DIR=WORK / "miri", RUSTFLAGS="-Ctarget-feature=+avx2",
        MIRIFLAGS="-Zmiri-deterministic-floats -Zmiri-disable-isolation "
        "-Zmiri-tree-borrows")
    for options in MIRI:
        stages.run(*miri, "test", "--locked", *options, env=env)


def run_valgrind(stages):
    work = WORK / "valgrind"
    library = work / "lib/libcaffe.so.1.0.0"
    if not shutil.which("valgrind"):
        stages.run(*shell("need_packages", "this stage", "valgrind"))
    stages.run(*shell("build_caffe", "--tests"))
    # Not the library that Caffe has: assertions find more, and memcheck
    # (3.19) does not know every instruction of optimised AVX2 code.
    stages.run("cargo", "build", "--locked", env=environment(
        CARGO_TARGET_DIR=work, CARGO_PROFILE_DEV_OPT_LEVEL=1))
    library.parent.mkdir(parents=True, exist_ok=True)
    folder = CAFFE_ROOT / "build/src/caffe"
    link = (folder / "CMakeFiles/caffe.dir/link.txt").read_text()
    for theirs, ours in (
            ("../../lsoftmax/release/liblsoftmax.a",
             work / "debug/liblsoftmax.a"),
            ("../../lib/libcaffe.so.1.0.0", library)):
        if theirs not in link:
            stages.print("Caffe's link command does not name " + theirs)
            raise Failed(1)
        link = link.replace(theirs, shlex.quote(str(ours)), 1)
    stages.run("bash", "-c", link, cwd=folder)
    suppressions = work / "suppressions"
    suppressions.write_text(SUPPRESSIONS)
    # One thread of the BLAS: memcheck runs one at a time anyway. Leaks are
    # those that no pointer leads to, since glog, protobuf and Python keep
    # theirs until the end.
    stages.run(
        "valgrind", "--suppressions=%s" % suppressions, "--error-exitcode=9",
        "--track-origins=yes", "--num-callers=30", "--leak-check=full",
        "--show-leak-kinds=definite", "--errors-for-leak-kinds=definite",
        "build/test/test.testbin",
        "--gtest_color=no", "--gtest_filter="
        "LargeMarginInnerProductLayer*:BNLayer*-*Death*:*GPU*",
        cwd=CAFFE_ROOT, env=environment(OPENBLAS_NUM_THREADS=1,
                                        LD_LIBRARY_PATH=library.parent))


# The stages, with what tells how each ended.
STAGES = {
    "unsafe": (run_unsafe, None),
    "asan": (run_asan, re.compile(CARGO.pattern + "|SUMMARY: ")),
    "tsan": (run_tsan, re.compile(CARGO.pattern + "|SUMMARY: ")),
    "miri": (run_miri, CARGO),
    "valgrind": (run_valgrind, re.compile(
        GTEST.pattern + "|ERROR SUMMARY|definitely lost:")),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", metavar="STAGE", nargs="*")
    chosen = parser.parse_args().stages or list(STAGES)
    for name in chosen:
        if name not in STAGES:
            parser.error("unknown stage " + name)
    use_the_builds_cargo()
    stages = Stages("build/robustness", len(chosen))
    for name in chosen:
        run, closing = STAGES[name]
        stages.stage(name, closing, run, stages)
    stages.end()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
