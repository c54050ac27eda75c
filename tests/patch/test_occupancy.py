"""tests/cuda/occupancy.py, with a compiler that says what it is told."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "cuda/occupancy.py"

ENTRY = """\
ptxas info    : Compiling entry function '%s' for 'sm_%d'
ptxas info    : Function properties for %s
    %d bytes stack frame, %d bytes spill stores, %d bytes spill loads
ptxas info    : Used %d registers, used 1 barriers%s, 400 bytes cmem[0]
"""


def run(folder, entries, *options, archs=(75, 80, 90, 120), status=0, ptx=""):
    """Runs it with an nvcc that knows archs, says entries of the margin layer's
    kernels and makes ptx of them."""
    log = "".join(ENTRY % entry for entry in entries)
    (folder / "log").write_text(log)
    (folder / "ptx").write_text(ptx)
    nvcc = folder / "nvcc"
    nvcc.write_text("""#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then
  printf 'compute_%%s\\n' %s; exit
fi
echo "$*" >> %s/calls
for to; do :; done
case "$*" in
  -ptx*large_margin*) cp %s/ptx "$to" ;;
  -ptx*) : > "$to" ;;
  *large_margin*) cat %s/log >&2 ;;
esac
exit %d
""" % (" ".join(map(str, archs)), folder, folder, folder, status))
    nvcc.chmod(0o755)
    return subprocess.run(
        [sys.executable, str(PROGRAM), "--nvcc", str(nvcc), *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=dict(os.environ, NVCC_CCBIN=""))


def entry(name, gpu, registers, shared="", frame=0, stores=0, loads=0):
    return name, gpu, name, frame, stores, loads, registers, shared


@pytest.mark.parametrize("gpu, registers, shared, blocks", [
    # 128 threads, the margin layer's.
    (75, 64, "", 8),          # 64 x 128 registers, of 65536
    (75, 16, "", 8),          # 1024 threads
    (90, 16, "", 16),         # 2048 threads
    (90, 33, "", 12),         # a warp of 33 registers takes those of 40
    (90, 255, "", 2),         # and never parts of two schedulers
    (75, 16, ", 32768 bytes smem", 2),
    (80, 16, ", 82944 bytes smem", 2),  # 1024 are each block's own
    (80, 16, ", 82945 bytes smem", 1),
])
def test_what_bounds_the_blocks(tmp_path, gpu, registers, shared, blocks):
    done = run(tmp_path, [entry("k_f32", gpu, registers, shared)],
               archs=[gpu])
    bytes_shared = shared.split()[1] if shared else "0"
    assert done.stdout.splitlines()[2:] == ["| k_f32 | 128 | %s | %d, 0, %d |"
                                           % (bytes_shared, registers, blocks)]
    assert done.returncode == 0, done.stderr


def test_the_table_and_what_is_compiled(tmp_path):
    both = [entry(name, gpu, 32) for gpu in (80, 90)
            for name in ("a_f32", "a_f64")]
    done = run(tmp_path, both, "--float", archs=[70, 80, 90])
    assert done.stdout.splitlines() == [
        "| kernel | threads | shared | sm_80 | sm_90 |", "|---|---|---|---|---|",
        "| a_f32 | 128 | 0 | 32, 0, 16 | 32, 0, 16 |"]
    calls = (tmp_path / "calls").read_text()
    assert calls.count("arch=compute_80,code=sm_80") == 2
    assert calls.count("-ptx -arch=compute_90 ") == 2
    assert "sm_70" not in calls and "-DTHREADS=256" in calls
    done = run(tmp_path, both, "--check", archs=[80, 90])
    assert done.stdout == (
        "4 compiled kernels, none with local memory; loads of 16 bytes where "
        "they are meant\n")


def test_spills_and_a_compiler_that_fails(tmp_path):
    bad = entry("k_f64", 80, 255, stores=8, loads=16)
    for options in ([], ["--float"], ["--check"]):
        done = run(tmp_path, [bad], *options, archs=[80])
        assert done.returncode == 1
        assert done.stderr == (
            "error: registers spill, or arrays lie in local memory: "
            "k_f64 on sm_80 (24 bytes)\n")
    done = run(tmp_path, [entry("k_f32", 80, 20, frame=64)], "--check",
               archs=[80])
    assert done.stderr.endswith("k_f32 on sm_80 (64 bytes)\n")
    assert run(tmp_path, [], status=2).stderr.endswith(
        "failed on src/large_margin/kernels.cu\n")
    assert "says nothing of" in run(tmp_path, []).stderr
    assert "compiles for none of" in run(tmp_path, [], archs=[35]).stderr


def test_loads_of_16_bytes(tmp_path):
    """A kernel that is listed has them; those of others do not count."""
    name = "large_margin_forward_f32"
    wide = (" ld.global.nc.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1];\n"
            " ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];\n"
            " ld.global.L1::no_allocate.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];\n"
            " ld.global.nc.v2.f64 {%fd1, %fd2}, [%rd2];\n"
            " ld.global.f32 %f1, [%rd1];\n")
    kernel = ".visible .entry %s(\n%s)\n"
    for text, found in ((wide * 2 + wide[:40], 7), (wide * 3, 9), ("", 0)):
        ptx = kernel % (name, text) + kernel % ("other_f32", wide * 9)
        done = run(tmp_path, [entry(name, 90, 40)], "--check", archs=[90],
                   ptx=ptx)
        assert (done.returncode == 0) == (found >= 8), done.stderr
        assert found >= 8 or done.stderr == (
            "error: too few loads of 16 bytes: %s (%d, not 8)\n"
            % (name, found))
