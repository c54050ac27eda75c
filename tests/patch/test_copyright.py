"""cmake/copyright.py, on a library that the real cargo has built."""

import os
import pathlib
import shutil
import subprocess

import pytest

PROJECT = pathlib.Path(__file__).resolve().parents[2]

# name: where it lies, and what it depends on.
CRATES = {
    "linked": ("my crates/linked", '[dependencies]\nbelow = { path = "../below"'
               ' }\n[build-dependencies]\ntool = { path = "../tool" }\n'),
    "below": ("my crates/below", ""),
    "tool": ("my crates/tool", ""),
    "macros": ("my crates/macros", "[dependencies]\ntool = { path = "
               '"../tool" }\n[lib]\nproc-macro = true\n'),
    "bundled": ("a project/vendor/bundled", ""),
    "optional": ("my crates/optional", ""),
}
LIBRARY = """[package]
name = "lsoftmax"
version = "0.2.0"
edition = "2021"
rust-version = "1.80"
[lib]
crate-type = ["staticlib"]
[features]
cuda = ["dep:optional"]
[dependencies]
linked = { path = "../my crates/linked" }
macros = { path = "../my crates/macros" }
bundled = { path = "vendor/bundled" }
optional = { path = "../my crates/optional", optional = true }
[dev-dependencies]
"""


@pytest.fixture
def library(tmp_path):
    """A project with crates beside and in it; its paths have blanks."""
    project = tmp_path / "a project"
    (project / "src").mkdir(parents=True)
    shutil.copytree(PROJECT / "cmake", project / "cmake")
    (project / "Cargo.toml").write_text(LIBRARY)
    (project / "src/lib.rs").touch()
    (project / "LICENSE").write_text("ours")
    for name, (where, depends) in CRATES.items():
        folder = tmp_path / where
        (folder / "src").mkdir(parents=True)
        (folder / "src/lib.rs").touch()
        (folder / "build.rs").write_text("fn main() {}")
        (folder / "Cargo.toml").write_text(
            f'[package]\nname = "{name}"\nversion = "1.2.3"\nlicense = "MIT"'
            f"\nedition = '2021'\n{depends}")
        (folder / "LICENSE-MIT").write_text(f"of {name}, by \u00c5sa\n")
        (folder / "license-apache").write_text("\nApache\n")
    caffe = tmp_path / "caffe"
    caffe.mkdir()
    (caffe / "LICENSE").write_text("of Caffe")
    return project


def cargo(library, *command):
    """As Caffe's build runs it."""
    subprocess.run(
        [library / "cmake/find_cargo.sh", *command], check=True,
        env={**os.environ,
             "CARGO_TARGET_DIR": str(library.parent / "build/lsoftmax")})


def written(library, *options, status=0):
    done = subprocess.run(
        [library / "cmake/copyright.py", library.parent / "caffe",
         library.parent / "build", *options], cwd="/", encoding="utf-8",
        env={**os.environ, "LC_ALL": "C"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.mark.parametrize("features, crates", [
    ((), ["below", "bundled", "linked"]),
    (("--features", "cuda"), ["below", "bundled", "linked", "optional"])])
def test_crates_of_the_library(library, features, crates):
    """And none that only built it; a text that many have stands there once."""
    cargo(library, "generate-lockfile", "--offline")
    cargo(library, "build", "--release", "--offline", *features)
    text = written(library, *features)
    assert [line for line in text.splitlines() if "(MIT)" in line] == [
        "The layers LargeMarginInnerProduct and BN, lsoftmax 0.2.0 (MIT)",
        *(f"The crate {name} 1.2.3 (MIT)" for name in crates)]
    for part, words in (("Caffe", "of Caffe"), ("lsoftmax", "ours"), *(
            (f"{name} 1.2.3", f"of {name}, by \u00c5sa") for name in crates)):
        assert text.count(f"\n---- {part} ----\n\n{words}\n") == 1
    assert "of tool" not in text and "of macros" not in text
    owners = ", ".join(f"{name} 1.2.3" for name in crates)
    assert text.count(f"\n---- {owners} ----\n\nApache\n") == 1


def test_crate_without_a_license(library):
    cargo(library, "generate-lockfile", "--offline")
    cargo(library, "build", "--release", "--offline")
    bundled = library / "vendor/bundled"
    for text in bundled.glob("[lL]*"):
        text.unlink()
    assert written(library, status=1) == (
        f"error: bundled 1.2.3 has no text of its license in {bundled}\n")
    for listed in library.parent.glob("build/lsoftmax/release/deps/*.d"):
        listed.unlink()
    assert "error: below 1.2.3 has no text of its license: its source" in (
        written(library, status=1))


def test_library_that_cargo_does_not_know(library):
    assert "error: cargo cannot tell which crates" in written(
        library, status=1)
