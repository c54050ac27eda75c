"""What was found, in results.json and results.md, after each step."""
import json
import os
import time

# A part's steps are in the file under its name: {step: {"status": ..., ...}}.
PASSED, FAILED, SKIPPED, BEGUN = "passed", "failed", "skipped", "begun"


class UserError(Exception):
    """What is said without a traceback."""


def write_whole(path, text):
    """Writes a file that is never seen half written."""
    with open(path + ".new", "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".new", path)


class Results:
    """The results in a folder; those of an earlier call are there again."""

    def __init__(self, folder, bundle, rehearsal):
        self.folder = folder
        self.json = os.path.join(folder, "results.json")
        self.markdown = os.path.join(folder, "results.md")
        self.data = {"bundle": bundle, "rehearsal": rehearsal, "machine": None,
                     "calls": [], "tests": {}, "benchmark": {}, "profile": {},
                     "paper": {}}
        try:
            with open(self.json) as file:
                self.data.update(json.load(file))
        except FileNotFoundError:
            return
        except ValueError as error:
            raise UserError("%s cannot be read: %s" % (self.json, error))
        if (self.data["bundle"], self.data["rehearsal"]) != (bundle,
                                                            rehearsal):
            raise UserError(
                "%s has the results of another bundle (%s): name another "
                "folder with --results" % (folder, self.data["bundle"].get(
                    "revision")))

    def begin(self, machine, arguments):
        """A call begins on a machine, which must be like the last one."""
        last = self.data["machine"]
        # An nvidia-smi that fails once leaves the driver unknown.
        if last is not None and any(
                last[key] != machine[key]
                and "unknown" not in (last[key], machine[key])
                for key in ("card", "driver")):
            raise UserError(
                "%s has the results of another machine (%s, driver %s; this "
                "is %s, driver %s): name another folder with --results"
                % (self.folder, last["card"], last["driver"], machine["card"],
                   machine["driver"]))
        self.data["machine"] = machine
        self.data["calls"].append({"began": now(), "arguments": arguments})
        self.save()

    def end(self, how):
        """The call ends."""
        self.data["calls"][-1].update(ended=now(), how=how)
        self.save()

    def status(self, part, step):
        """A step's status, or None."""
        return self.data[part].get(step, {}).get("status")

    def set(self, part, step, status, **fields):
        """Keeps what is known of a step."""
        self.data[part][step] = dict(fields, status=status, at=now())
        self.save()

    def save(self):
        """Writes both files."""
        write_whole(self.json, json.dumps(self.data, indent=1) + "\n")
        write_whole(self.markdown, markdown(self.data))


def now():
    """The time, for a reader."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


# ---- Markdown ----

def _table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(str(cell).replace("|", "/") for cell in row)
              + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _number(value, form="%.3f"):
    return "-" if value is None else form % value


def _budgets(entry):
    words = []
    for budget in entry.get("budgets", []):
        met = {True: "met", False: "MISSED", None: "not judged"}[budget["met"]]
        words.append("%s: %s" % (budget["words"], met))
    return "; ".join(words) or "-"


def _benchmark(rows):
    def cells(name, entry):
        ratio = "-"
        if "ratio" in entry:
            ratio = "%.3f (%.3f to %.3f)" % (
                entry["ratio"], entry["ratio_min"], entry["ratio_max"])
        extra = entry.get("extra_bytes")
        share = entry.get("share_of_copy")
        copy = "-" if share is None else "%.0f of %.0f GB/s, %.0f %%" % (
            entry["gb_per_s"], entry["copy_gb_per_s"], 100 * share)
        clocks = entry.get("clocks") or {}
        return [name, _number(entry.get("ours_ms"), "%.4f"),
                _number(entry.get("theirs_ms"), "%.4f"), ratio,
                _number(entry.get("more_ms") and 1000 * entry["more_ms"],
                        "%+.1f"),
                "-" if extra is None else "%+.2f" % (extra / 2.0 ** 20), copy,
                "%s / %s" % (clocks.get("sm_mhz", "-"),
                             clocks.get("memory_mhz", "-")),
                _budgets(entry) if entry["status"] in (PASSED, FAILED)
                and "ratio" in entry else entry.get("words", entry["status"])]
    return _table(["layers, float, forward + backward", "ours, ms",
                   "theirs, ms", "ratio (range)", "more, us", "more, MiB",
                   "of a copy's bandwidth", "clocks, SM / memory, MHz",
                   "budget"],
                  [cells(name, entry) for name, entry in rows.items()])


def _profile(rows):
    metrics = sorted({metric for entry in rows.values()
                      for kernel in entry.get("kernels", [])
                      for metric in kernel["metrics"]})
    cells = []
    for name, entry in rows.items():
        cells += [[name, kernel["kernel"], kernel["launches"]]
                  + [kernel["metrics"].get(metric, "-") for metric in metrics]
                  for kernel in entry.get("kernels", [])] or [
                      [name, entry.get("words", entry["status"]), "-"]
                      + ["-"] * len(metrics)]
    return _table(["pass", "kernel", "launches"] + metrics, cells)


def _paper(rows):
    def cells(entry):
        return [entry["net"], entry["m"],
                _number(entry.get("error_percent"), "%.2f"),
                _number(entry.get("paper_percent"), "%.2f"),
                "%d of %d" % (entry.get("iteration", 0), entry["iterations"]),
                _number(entry.get("lambda"), "%.3g"),
                _number(entry.get("seconds"), "%.0f"),
                entry.get("words", entry["status"])]
    return _table(["net", "m", "test error, %", "the paper's, %", "iterations",
                   "lambda at the end", "seconds", "state"],
                  [cells(entry) for entry in rows.values()])


def markdown(data):
    """The results for a reader."""
    machine = data["machine"] or {}
    text = "# Results on %s\n\n" % machine.get("card", "no machine yet")
    if data["rehearsal"]:
        text += "A rehearsal: everything small, and no figure means much.\n\n"
    text += _table(["", ""], [(key, json.dumps(value)
                               if isinstance(value, (dict, list)) else value)
                              for key, value in sorted(machine.items())])
    text += "\nBundle %s for sm_%s, %d calls.\n" % (
        data["bundle"]["revision"],
        data["bundle"]["archs"].replace(" ", ", sm_") or "none",
        len(data["calls"]))
    if data["tests"]:
        text += "\n## Tests\n\n" + _table(
            ["test", "result", "seconds", ""],
            [(name, entry["status"], _number(entry.get("seconds"), "%.0f"),
              entry.get("words", "")) for name, entry in
             data["tests"].items()])
    if data["benchmark"]:
        copies = sorted(entry["copy_gb_per_s"] for entry in
                        data["benchmark"].values() if "copy_gb_per_s" in entry)
        text += "\n## Benchmark\n\n"
        if copies:
            text += ("A copy on the device, in the same processes: %.0f GB/s "
                     "(median), read and written.\n\n"
                     % copies[len(copies) // 2])
        text += _benchmark(data["benchmark"])
    if data["profile"]:
        text += "\n## Profile\n\n" + _profile(data["profile"])
    if data["paper"]:
        text += "\n## The paper's nets\n\n" + _paper(data["paper"])
    return text
