"""The stages of tests/run.sh, which has installed what they need."""
import argparse
import os
import subprocess
import sys

from stages import (CARGO, GTEST, PYTEST, ROOT, Stages, shell,
                    use_the_builds_cargo, works)

CAFFE_ROOT = os.path.realpath(os.environ.get("CAFFE_ROOT")
                              or ROOT / "build/caffe")


def add_rust_tool(name, component, cargo):
    """For cargo NAME, which may come apart from cargo; whether it is there.

    component is rustup's name of it, and Debian's but for the version.
    """
    if works("cargo", name, "--version"):
        return True
    print("cargo %s is missing; installing it" % name, flush=True)
    if not (works("rustup", "component", "add", component)
            and works("cargo", name, "--version")):
        package = {"rustfmt": "rustfmt%s", "clippy": "rust%s-clippy"}
        subprocess.run(shell("need_packages", "cargo " + name,
                             package[component] % cargo[len("cargo"):]))
    return works("cargo", name, "--version")


def check_rust(stages):
    """Clippy, without and with the GPU path."""
    stages.run("cmake/find_cargo.sh", "clippy", "--locked", "--all-targets",
               "--", "-D", "warnings")
    stages.clippy("-D", "warnings")


def check_scripts(stages):
    """Shellcheck, on all scripts that are not built or fetched."""
    scripts = [ROOT / ".ci/run"]
    for where, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders
                      if os.path.join(where, name) not in
                      {str(ROOT / top) for top in
                       ("build", "target", "vendor", ".git")}]
        scripts += [os.path.join(where, name) for name in files
                    if name.endswith(".sh")]
    stages.run("shellcheck", "--external-sources", "--", *sorted(
        map(str, scripts)))
    stages.print("%d scripts are clean" % len(scripts))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-cuda", action="store_true")
    parser.add_argument("--cargo", default="cargo", help="Debian's package")
    parser.add_argument("--packages-failed", action="store_true")
    args = parser.parse_args()
    # The tests leave no byte code beside the sources.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    stages = Stages("build/test-logs", 12, locked=True)
    stages.stage("packages", None,
                 "false" if args.packages_failed else "true")
    stages.stage("build of Caffe", None, *shell("build_caffe", "--tests"))
    use_the_builds_cargo()
    if add_rust_tool("fmt", "rustfmt", args.cargo):
        stages.stage("cargo fmt", None, "cargo", "fmt", "--check")
    else:
        stages.skip("cargo fmt", "rustfmt cannot be had")
    if add_rust_tool("clippy", "clippy", args.cargo):
        stages.stage("cargo clippy", None, check_rust, stages)
    else:
        stages.skip("cargo clippy", "clippy cannot be had")
    stages.stage("cargo test", CARGO, "cmake/find_cargo.sh", "test",
                 "--locked")
    if args.no_cuda:
        stages.skip("cuda emulated", "--no-cuda")
    elif not subprocess.run(["cmake/cuda_toolkit.sh", "--compiler"], cwd=ROOT,
                            stdout=subprocess.DEVNULL).returncode:
        stages.stage("cuda emulated", None, "tests/cuda/run.sh")
    else:
        stages.skip("cuda emulated", "nvcc cannot be had (see above)")
    stages.stage("shellcheck", None, check_scripts, stages)
    # Make's are those of all layers.
    tests = ("build/test/test_all.testbin"
             if os.path.exists(CAFFE_ROOT + "/build/.linked")
             else "build/test/test.testbin")
    for layer in ("LargeMarginInnerProductLayer", "BNLayer"):
        # Caffe's tests find their data from the root of its tree.
        stages.stage("gtest " + layer, GTEST, os.path.join(CAFFE_ROOT, tests),
                     "--gtest_color=no", "--gtest_filter=%s*" % layer,
                     cwd=CAFFE_ROOT)
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra",
              "--durations=5"]
    stages.stage("pytest patch", PYTEST, *pytest, "tests/patch")
    stages.stage("pytest examples", PYTEST, *pytest, "tests/examples")
    # Apart from each other, since a LOG(FATAL) in pycaffe ends its process.
    stages.stage("pytest e2e", PYTEST, *pytest, "-n",
                 str(len(os.sched_getaffinity(0))), "tests/e2e")
    stages.end()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
