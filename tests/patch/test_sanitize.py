"""What tests/robustness/sanitize.sh says of its stages, with stand-ins."""

import os
import pathlib
import shutil
import subprocess

PROJECT = pathlib.Path(__file__).resolve().parents[2]

CARGO = """#!/bin/sh
case $* in
  --version) echo cargo 1.95.0 ;;
  *miri*) exit 1 ;;
  test*) echo "test result: ok. 3 passed; 0 failed; 0 ignored" ;;
esac
"""


def test_a_tool_that_is_missing_is_the_reason_of_its_stage_alone(tmp_path):
    project = tmp_path / "a project"
    for name in ("tests/robustness", "myexamples", "cmake"):
        shutil.copytree(PROJECT / name, project / name, symlinks=True,
                        ignore=shutil.ignore_patterns("*_lmdb", "data*"))
    (project / "src").mkdir()
    shutil.copy(PROJECT / "Cargo.toml", project)
    shutil.copy(PROJECT / "tests/stages.sh", project / "tests")
    for name, text in {"cargo": CARGO, "rustc": "#!/bin/sh\n"}.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    done = subprocess.run(
        [project / "tests/robustness/sanitize.sh", "miri", "asan"],
        env={**os.environ, "PATH": "%s:%s" % (tmp_path / "bin",
                                              os.environ["PATH"])},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    results = [line.split(maxsplit=4) for line in
               done.stdout.split("==> results")[1].splitlines()[1:]]
    assert [row[::3] for row in results[-3:-1]] == [
        ["SKIPPED", "miri"], ["passed", "asan"]], done.stdout
    assert "cargo miri test --lib; " in results[-3][4]
    assert results[-2][4] == "3 passed, 0 failed"
