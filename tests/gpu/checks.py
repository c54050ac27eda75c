"""The parts tests, benchmark and profile."""
import csv
import filecmp
import glob
import json
import os
import re
import shutil
import time

import host
import processes
from results import BEGUN, FAILED, PASSED, SKIPPED
from processes import OutOfTime

PARITY = ["%s %s" % (layer, dtype) for layer in ("margin", "bn")
          for dtype in ("float", "double")]
REPEATED = ["margin float", "margin double"]
SANITIZERS = ["memcheck", "racecheck", "synccheck"]


class Run:
    """What the steps of a call work with."""

    def __init__(self, machine, results, limit, bundle_folder):
        self.host, self.results, self.limit = machine, results, limit
        self.bundle_folder = bundle_folder
        self.rehearsal = results.data["rehearsal"]
        self.steps = 0  # that have come to their ends in this call
        self.logs = os.path.join(results.folder, "logs")
        os.makedirs(self.logs, exist_ok=True)

    def log(self, step):
        """The file of a step's output."""
        name = re.sub(r"[^\w.=-]+", "-", step) + ".log"
        return os.path.join(self.logs, name)

    def fresh_log(self, step):
        """The same, empty."""
        path = self.log(step)
        open(path, "w").close()
        return path

    def step(self, part, name, function):
        """Runs one step: function returns (status, fields).

        A step that the limit ends is begun anew by the next call; one that a
        whole call is too short for has failed.
        """
        begin = time.monotonic()
        self.results.set(part, name, BEGUN)
        say("%s %s ..." % (part, name))
        try:
            status, fields = function(self.fresh_log(part + " " + name))
        except OutOfTime:
            if self.limit.signal is None and self.steps == 0:
                self.results.set(part, name, FAILED, words="does not end "
                                 "within %d s; see --limit"
                                 % self.limit.seconds)
            raise
        self.steps += 1
        fields.setdefault("seconds", round(time.monotonic() - begin, 1))
        self.results.set(part, name, status, **fields)
        words = fields.get("words", "")
        say("%s %s: %s in %.0f s%s" % (
            part, name, "FAILED" if status == FAILED else status,
            fields["seconds"], ": " + words if words else ""))
        if status == FAILED:
            show_end(self.log(part + " " + name))

    def run(self, command, log, cwd=None, watch=None):
        """Runs a command of the host's in a step."""
        return processes.run(command, log, self.limit,
                             self.host.environment(),
                             cwd or self.bundle_folder, watch)


def say(text):
    """A line of progress."""
    print("run.sh: " + text, flush=True)


def show_end(log, lines=15):
    """The last lines of a log."""
    with open(log, errors="replace") as file:
        for line in file.read().splitlines()[-lines:]:
            print("    " + line, flush=True)


# ---- Tests ----

def test_names(bundle):
    """The steps of the part tests, in their order."""
    names = ["gtest " + case for case in bundle["gtests"]]
    names += ["parity " + which for which in PARITY]
    names += ["repeat " + which for which in REPEATED] + ["training"]
    return names + ["%s %s" % (tool, which) for tool in SANITIZERS
                    for which in PARITY]


def run_test(run, name):
    """One step of the part tests."""
    kind, rest = name.split(" ", 1) if " " in name else (name, "")
    if kind == "gtest":
        run.step("tests", name, lambda log: _gtest(run, rest, log))
    elif kind in ("parity", "repeat"):
        run.step("tests", name, lambda log: _check(run, kind, rest, log))
    elif kind == "training":
        run.step("tests", name, lambda log: _training(run, log))
    else:
        run.step("tests", name, lambda log: _sanitizer(run, kind, rest, log))


def _gtest(run, case, log):
    status = run.run(run.host.command("test.testbin", "--gtest_color=no",
                                      "--gtest_filter=%s.*" % case), log)
    with open(log, errors="replace") as file:
        text = file.read()
    passed = re.search(r"^\[  PASSED  \] (\d+) test", text, re.M)
    failed = re.search(r"^\[  FAILED  \] (\d+) test", text, re.M)
    device = re.search(r"^\[-+\] \d+ tests? from .*TypeParam = (.*)$", text,
                       re.M)
    words = "%s tests passed" % (passed[1] if passed else 0)
    if failed:
        words += ", %s failed" % failed[1]
    if device:
        words += " (%s)" % device[1].replace("caffe::", "")
    # All of nothing would pass as well.
    good = status == 0 and passed and int(passed[1]) > 0
    return PASSED if good else FAILED, {"words": words}


def _check(run, kind, which, log):
    status = run.run(run.host.command("gpu_check", kind, *which.split()), log)
    return PASSED if status == 0 else FAILED, {}


def _training(run, log):
    """The same training twice gives the same bits."""
    iterations = 20 if run.rehearsal else 200
    prefix = os.path.join(run.results.folder, "run")
    with open(os.path.join(run.bundle_folder, "nets/solver.prototxt")) as file:
        text = file.read().replace("200", str(iterations))
    if not run.host.is_gpu:
        text = text.replace("GPU", "CPU")
    solver = os.path.join(run.results.folder, "run.prototxt")
    with open(solver, "w") as file:
        file.write(text + 'snapshot_prefix: "%s"\n' % prefix)
    losses, models = [], []
    for number in (1, 2):
        path = run.fresh_log("tests training %d" % number)
        status = run.run(["env", "GLOG_logtostderr=1", "GLOG_minloglevel=0"]
                         + run.host.command("caffe", "train",
                                            "--solver=" + solver), path)
        if status != 0:
            shutil.copy(path, log)
            return FAILED, {"words": "caffe train failed"}
        with open(path, errors="replace") as file:
            losses.append(re.findall(r"\] Iteration (\d+).*loss = (\S+)",
                                     file.read()))
        models.append(prefix + "%d.caffemodel" % number)
        os.replace("%s_iter_%d.caffemodel" % (prefix, iterations), models[-1])
    if len(losses[0]) < iterations:
        return FAILED, {"words": "%d losses in the log" % len(losses[0])}
    if losses[0] != losses[1] or not filecmp.cmp(*models, shallow=False):
        return FAILED, {"words": "two runs differ"}
    return PASSED, {"words": "%d losses and the weights twice the same to the "
                    "last bit; the last loss %s" % (iterations,
                                                    losses[0][-1][1])}


def _sanitizer(run, tool, which, log):
    program = find_tool("compute-sanitizer")
    if not run.host.is_gpu or program is None:
        return SKIPPED, {"words": "there is no compute-sanitizer"}
    status = run.run(run.host.under(
        [program, "--tool", tool, "--error-exitcode", "9",
         "--target-processes", "all"], "gpu_check", "parity", *which.split()),
        log)
    with open(log, errors="replace") as file:
        text = file.read()
    if status != 9 and re.search("device not supported", text, re.I):
        return SKIPPED, {"words": "compute-sanitizer refuses this device"}
    # What these suspect in cuBLAS's kernels is not ours to judge.
    if tool != "memcheck" and status == 9 and not re.search(
            r"(large_margin|bn)_[a-z_]*_f(32|64)", text):
        return PASSED, {"words": "nothing in the layers' kernels"}
    return PASSED if status == 0 else FAILED, {}


def find_tool(name):
    """A tool of CUDA's; None where it is not there."""
    folders = [os.environ.get("PATH", ""),
               os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    folders += sorted(glob.glob("/opt/nvidia/nsight-compute/*"), reverse=True)
    return shutil.which(name, path=":".join(folders))


# ---- Benchmark ----

class Row:
    """A line of the benchmark.

    budgets are (field, scale, most or least, limit, words): a field of what
    gpu_check prints, times scale, is judged.
    """

    def __init__(self, name, words, small, budgets=()):
        self.name, self.words, self.small = name, words.split(), small.split()
        self.budgets = budgets


def _ratio(limit):
    return ("ratio", 1, "most", limit, "ratio at most %.2f" % limit)


_MEMORY = ("extra_bytes", 2.0 ** -20, "most", 4, "at most 4 MiB more, no "
           "buffer of M x N")
_COPY = ("share_of_copy", 1, "least", 0.7, "at least 70 % of a copy")
_BN = (_ratio(0.33), _COPY)

# The budgets are those of the design.
ROWS = [
    Row("margin / InnerProduct (128, 512, 10)", "margin 128 512 10",
        "margin 8 16 4"),
    Row("margin / InnerProduct (128, 512, 1000)", "margin 128 512 1000",
        "margin 8 16 10",
        (("more_ms", 1000, "most", 12, "at most 12 us more"), _MEMORY)),
    # A label a pixel, without a budget until a GPU has run it: the products
    # take little beside the passes over x and dx.
    Row("margin / InnerProduct (65536, 64, 21)", "margin 65536 64 21",
        "margin 40 8 3"),
    Row("margin / InnerProduct (512, 512, 10572)", "margin 512 512 10572",
        "margin 16 16 30", (_ratio(1.03), _MEMORY)),
    Row("margin / InnerProduct (256, 512, 100000)", "margin 256 512 100000",
        "margin 16 16 40", (_ratio(1.01), _MEMORY)),
    Row("BN / BatchNorm + Scale (128, 64, 28, 28)", "bn 128 64 28 28",
        "bn 4 3 5 5", _BN),
    Row("the same in place", "bn_in_place 128 64 28 28",
        "bn_in_place 4 3 5 5", _BN),
    # Too large for any cache.
    Row("BN / BatchNorm + Scale (128, 64, 112, 112)", "bn 128 64 112 112",
        "bn 4 3 6 6", _BN),
    Row("the same in place, (128, 64, 112, 112)", "bn_in_place 128 64 112 112",
        "bn_in_place 4 3 6 6", _BN),
    Row("BN / cuDNN's (128, 64, 28, 28)", "cudnn 128 64 28 28", ""),
    Row("BN / cuDNN's (128, 64, 112, 112)", "cudnn 128 64 112 112", "")]


def judge(budgets, entry, rehearsal):
    """The budgets beside what was found; nothing is judged in a rehearsal."""
    judged = []
    for field, scale, which, limit, words in budgets:
        value = entry[field] * scale
        met = value <= limit if which == "most" else value >= limit
        judged.append({"field": field, "limit": limit, "value": value,
                       "words": words, "met": None if rehearsal else met})
    return judged


def benchmark_names():
    """The steps of the part benchmark."""
    return [row.name for row in ROWS]


def run_benchmark(run, name):
    """One line of the benchmark."""
    row, = [row for row in ROWS if row.name == name]
    run.step("benchmark", name, lambda log: _benchmark(run, row, log))


def _benchmark(run, row, log):
    words = row.words
    if row.words[0] == "cudnn" and not run.host.machine["device"]["cudnn"]:
        return SKIPPED, {"words": "Caffe is built without cuDNN"}
    if run.rehearsal:
        words = (row.small or row.words) + ["2"]
    clocks = [{}]  # those at its end, as far as can be seen from here
    status = run.run(run.host.command("gpu_check", "time", *words), log,
                     watch=lambda: clocks.append(host.clocks())
                     if run.host.is_gpu else None)
    with open(log, errors="replace") as file:
        lines = [line for line in file if line.startswith("{")]
    try:
        entry = json.loads(lines[-1])
    except (IndexError, ValueError):
        status = status or 1
    if status != 0:
        return FAILED, {"words": "gpu_check ended with %d and no times"
                        % status}
    entry["clocks"] = clocks[-1]
    entry["budgets"] = judge(row.budgets, entry, run.rehearsal)
    entry["words"] = "%.4f ms, theirs %.4f, ratio %.3f" % (
        entry["ours_ms"], entry["theirs_ms"], entry["ratio"])
    if "share_of_copy" in entry:
        entry["words"] += ", %.0f %% of a copy" % (
            100 * entry["share_of_copy"])
    missed = [b["words"] for b in entry["budgets"] if b["met"] is False]
    if missed:
        entry["words"] += "; budget MISSED: " + "; ".join(missed)
    elif any(b["met"] for b in entry["budgets"]):
        entry["words"] += "; budget met"
    return FAILED if missed else PASSED, entry


# ---- Profile ----

METRICS = {
    "gpu__time_duration.sum": "time",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "blocks by registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM, %",
    "lts__t_sector_hit_rate.pct": "L2 hits, %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM, %"}


# What gpu_check profiles: of what the benchmark times, and BN by columns.
PROFILES = ["margin 128 512 1000", "margin 65536 64 21",
            "margin 512 512 10572", "bn 128 64 28 28", "bn 128 64 112 112",
            "bn_in_place 128 64 112 112", "bn 4096 512 1 1"]


def profile_names():
    """The steps of the part profile."""
    return ["ncu " + words for words in PROFILES]


def run_profile(run, name):
    """Nsight Compute on the kernels of one pass of a layer."""
    run.step("profile", name,
             lambda log: _profile(run, name.split()[1:], log))


def _profile(run, words, log):
    program = find_tool("ncu")
    if not run.host.is_gpu or program is None:
        return SKIPPED, {"words": "there is no ncu"}
    # The card's clocks are left as they are, and the cache as a training has
    # it: with what the kernel before has read or written.
    status = run.run(run.host.under(
        [program, "--csv", "--clock-control", "none", "--cache-control",
         "none", "--profile-from-start", "off", "--target-processes", "all",
         "--kernel-name", "regex:^(large_margin|bn)_",
         "--metrics", ",".join(METRICS)], "gpu_check", "profile", *words), log)
    with open(log, errors="replace") as file:
        text = file.read()
    if "ERR_NVGPUCTRPERM" in text:
        return SKIPPED, {"words": "the driver lets root alone count "
                         "(ERR_NVGPUCTRPERM)"}
    kernels = read_ncu(text)
    if status != 0 or not kernels:
        return FAILED, {"words": "ncu ended with %d and names %d kernels"
                        % (status, len(kernels))}
    return PASSED, {"words": "%d kernels of the layer" % len(kernels),
                    "kernels": kernels}


def read_ncu(text):
    """[{kernel, launches, metrics}] of ncu's CSV; the last launch counts."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found = {}
    for row in csv.DictReader(lines):
        try:
            name = re.match(r"\w+", row["Kernel Name"])[0]
            entry = found.setdefault(name, {"kernel": name, "ids": set(),
                                            "metrics": {}})
            entry["ids"].add(row["ID"])
            metric = METRICS.get(row["Metric Name"], row["Metric Name"])
            unit = row["Metric Unit"]
            entry["metrics"][metric] = row["Metric Value"] + (
                " " + unit if "second" in unit else "")
        except (KeyError, TypeError):
            continue
    kernels = []
    for entry in found.values():
        entry["launches"] = len(entry.pop("ids"))
        kernels.append(entry)
    return kernels
