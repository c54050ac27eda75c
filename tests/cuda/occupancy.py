#!/usr/bin/env python3
"""Prints how many blocks of each kernel an SM of a GPU holds at once.

Compiles the kernels as build.rs does, for sm_75, 80, 90 and 120 as far as nvcc
knows them, and prints a Markdown table of what ptxas says of each kernel: bytes
of shared memory a block, and for each GPU the registers a thread, the bytes
that it spills, and the blocks that its registers, threads and shared memory
leave room for. Fails if a kernel spills or has anything else in local memory,
or if one that is written with loads of 16 bytes has fewer of them. Needs no
GPU.
"""
import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("large_margin", "batch_norm")

# Of an SM, from the compute capabilities table of the CUDA Programming Guide:
# threads, blocks, bytes of shared memory, and of these what each block takes
# for itself. All have 65536 registers in four parts.
Limits = collections.namedtuple("Limits", "threads blocks shared a_block")
GPUS = {75: Limits(1024, 16, 65536, 0), 80: Limits(2048, 32, 167936, 1024),
        90: Limits(2048, 32, 233472, 1024),
        120: Limits(1536, 24, 102400, 1024)}
WARP, PARTS, PART_REGISTERS = 32, 4, 16384

# Loads of 16 bytes, at least: those of values, with the records of channels
# that a kernel of BN loads beside them. The kernels of double are the same
# templates.
WIDE = {"large_margin_forward_f32": 8, "large_margin_backward_f32": 16,
        "bn_segment_moments_vec_f32": 8, "bn_segment_gradients_vec_f32": 16,
        "bn_normalize_vec_f32": 6, "bn_pass_down_vec_f32": 6}

Usage = collections.namedtuple(
    "Usage", "kernel gpu threads registers spilled local shared")


def up(value, unit):
    """value, rounded up to whole units."""
    return -(-value // unit) * unit


def blocks(usage):
    """How many blocks of a kernel an SM holds."""
    limits = GPUS[usage.gpu]
    # A part gives a warp whole units of 256 registers.
    warps = PARTS * (PART_REGISTERS // up(usage.registers * WARP, 256))
    return min(warps // -(-usage.threads // WARP),
               limits.threads // usage.threads, limits.blocks,
               limits.shared // max(1, up(usage.shared + limits.a_block, 128)))


def macros(layer):
    """The numbers of src/cuda/layout.rs for a layer that are no expressions."""
    text = (ROOT / "src/cuda/layout.rs").read_text()
    module = re.search(r"^pub mod %s \{$(.*?)^\}$" % layer, text,
                       re.M | re.S).group(1)
    return dict(re.findall(r"pub const (\w+): \w+ = ([0-9]+);", module))


def read(log, threads):
    """The Usages that `nvcc -Xptxas -v` tells of."""
    found, kernel = [], None
    for line in log.splitlines():
        entry = re.search(r"Compiling entry function '(\w+)' for 'sm_(\d+)'",
                          line)
        if entry:
            kernel, spilled, local = entry.groups(), 0, 0
        frame = re.search(r"(\d+) bytes stack frame", line)
        if frame:
            local += int(frame.group(1))
        spills = re.search(
            r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if spills:
            spilled += sum(map(int, spills.groups()))
        used = re.search(r"Used (\d+) registers", line)
        if used and kernel:
            shared = re.search(r"(\d+) bytes smem", line)
            found.append(Usage(kernel[0], int(kernel[1]), threads,
                               int(used.group(1)), spilled, local,
                               int(shared.group(1)) if shared else 0))
    return found


def wide_loads(ptx):
    """{kernel: its loads of 4 floats} of a file of PTX."""
    kernels = re.split(r"^\.visible \.entry ", ptx, flags=re.M)[1:]
    return {re.match(r"\w+", text).group(): len(re.findall(
        r"\bld\.global[\w.:]*\.v4\.[fbu]32\b", text))
        for text in kernels}


def compile_all(nvcc, gpus):
    """The Usages of all kernels, and their wide loads. The layers side by side:
    they take a while."""
    ccbin = os.environ.get("NVCC_CCBIN")
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for layer in LAYERS:
            both = ["-D%s=%s" % pair for pair in macros(layer).items()]
            both += ["-ccbin", ccbin] if ccbin else []
            both += ["-O3", ROOT / "src" / layer / "kernels.cu", "-o"]
            ptx = os.path.join(folder, layer + ".ptx")
            for command in (
                    ["-ptx", "-arch=compute_%d" % gpus[-1], *both, ptx],
                    ["-fatbin", "-Xptxas", "-v",
                     *("-gencode=arch=compute_%d,code=sm_%d" % (gpu, gpu)
                       for gpu in gpus), *both, os.path.join(folder, layer)]):
                jobs.append((layer, subprocess.Popen(
                    [nvcc, *command], stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, text=True)))
        usages, wide = [], {}
        # All are waited for before one of them may end the program.
        for layer, job, log in [(layer, job, job.communicate()[0])
                                for layer, job in jobs]:
            if job.returncode:
                sys.exit("%serror: %s failed on src/%s/kernels.cu"
                         % (log, nvcc, layer))
            usages += read(log, int(macros(layer)["THREADS"]))
            wide.update(wide_loads(
                Path(folder, layer + ".ptx").read_text()))
    return usages, wide


def print_table(usages, gpus):
    print("| kernel | threads | shared |%s"
          % "".join(" sm_%d |" % gpu for gpu in gpus))
    print("|---|---|---|%s" % ("---|" * len(gpus)))
    cells = {(usage.kernel, usage.gpu): "%d, %d, %d" % (
        usage.registers, usage.spilled, blocks(usage)) for usage in usages}
    for kernel, usage in {usage.kernel: usage for usage in usages}.items():
        print("| %s | %d | %d |%s" % (
            kernel, usage.threads, usage.shared,
            "".join(" %s |" % cells[kernel, gpu] for gpu in gpus)))


def main():
    parser = argparse.ArgumentParser(
        prog="tests/cuda/occupancy.sh", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvcc", default="nvcc", help=argparse.SUPPRESS)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--check", action="store_true", help="print no table")
    which.add_argument("--float", action="store_true", help="the kernels of "
                       "float alone, which is the table of README.md")
    args = parser.parse_args()
    known = subprocess.run([args.nvcc, "--list-gpu-arch"], check=True,
                           stdout=subprocess.PIPE, text=True).stdout.split()
    gpus = [gpu for gpu in GPUS if "compute_%d" % gpu in known]
    if not gpus:
        sys.exit("error: %s compiles for none of sm_75, 80, 90 and 120"
                 % args.nvcc)
    usages, wide = compile_all(args.nvcc, gpus)
    if not usages:
        sys.exit("error: %s -Xptxas -v says nothing of the kernels' registers"
                 % args.nvcc)
    if not args.check:
        print_table([usage for usage in usages if not args.float
                     or usage.kernel.endswith("_f32")], gpus)
    local = ["%s on sm_%d (%d bytes)" % (
        usage.kernel, usage.gpu, max(usage.spilled, usage.local))
        for usage in usages if usage.spilled or usage.local]
    if local:
        sys.exit("error: registers spill, or arrays lie in local memory: "
                 + ", ".join(local))
    narrow = ["%s (%d, not %d)" % (kernel, wide.get(kernel, 0), least)
              for kernel, least in WIDE.items() if kernel in {
                  usage.kernel for usage in usages}
              and wide.get(kernel, 0) < least]
    if narrow:
        sys.exit("error: too few loads of 16 bytes: " + ", ".join(narrow))
    if args.check:
        print("%d compiled kernels, none with local memory; loads of 16 bytes "
              "where they are meant" % len(usages))


if __name__ == "__main__":
    main()
