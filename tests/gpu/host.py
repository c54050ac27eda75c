"""What the machine brings: CUDA's libraries, the card, a start for Caffe."""
import glob
import json
import os
import platform
import subprocess
import sys

from processes import output
from results import UserError

HERE = os.path.dirname(os.path.abspath(__file__))

# What nvidia-smi says of a card, and what the results call it.
_CARD = {"name": "card", "driver_version": "driver", "uuid": "uuid",
         "memory.total": "memory_mib", "power.limit": "power_limit_w",
         "clocks.max.sm": "sm_clock_max_mhz",
         "clocks.max.memory": "memory_clock_max_mhz"}
_CLOCKS = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz",
           "temperature.gpu": "celsius", "power.draw": "watt"}


def _smi(fields):
    """{name: value} of the card's fields; {} without nvidia-smi."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    text = output(["nvidia-smi", "-i", index,
                   "--query-gpu=" + ",".join(fields),
                   "--format=csv,noheader,nounits"])
    values = [value.strip() for value in (text or "").strip().split(",")]
    if len(values) != len(fields):
        return {}
    return dict(zip(fields.values(), values))


def clocks():
    """The card's clocks at this moment."""
    return _smi(_CLOCKS)


def _pythons_folders():
    """The folders of packages of all Pythons that may be in use here."""
    folders = list(sys.path)
    for python in ("python3", "/usr/bin/python3", "python"):
        # Without importing anything: PyTorch alone takes seconds.
        text = output([python, "-c",
                       "import sys; print(*sys.path, sep='\\n')"])
        folders += (text or "").splitlines()
    for base in (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"),
                 "/usr/local", "/usr", "/opt/*", "/opt/*/.venv"):
        if base:
            for name in ("site-packages", "dist-packages"):
                folders += glob.glob(base + "/lib/python3*/" + name)
    return folders


def library_folders():
    """Where CUDA's libraries may be, the user's choice first."""
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    for name in ("CUDNN_ROOT", "CUDA_HOME"):
        base = os.environ.get(name)
        if base:
            folders += [base + "/lib", base + "/lib64"]
    folders += glob.glob(HERE + "/cuda/nvidia/*/lib")
    for base in ["/usr/local/cuda"] + sorted(glob.glob("/usr/local/cuda*")):
        folders.append(base + "/lib64")
    for base in _pythons_folders():
        folders += sorted(glob.glob(base + "/nvidia/*/lib"))
        folders += glob.glob(base + "/torch/lib")
    found = []
    for folder in folders:
        if folder and folder not in found and os.path.isdir(folder):
            found.append(folder)
    return found


def find_libraries(names):
    """{name: path} of the libraries; a path is "" where the system has it.

    Raises UserError where some cannot be found.
    """
    folders = library_folders()
    cache = output(["ldconfig", "-p"]) or output(["/sbin/ldconfig", "-p"])
    known = {line.split()[0] for line in (cache or "").splitlines()
             if "=>" in line}
    found, missing = {}, []
    for name in names:
        paths = [os.path.join(folder, name) for folder in folders
                 if os.path.exists(os.path.join(folder, name))]
        if paths:
            found[name] = paths[0]
        elif name in known:
            found[name] = ""
        else:
            missing.append(name)
    if missing:
        raise UserError(
            "Caffe needs %s, which this machine does not have.\n  Take a "
            "Python with PyTorch for CUDA 13, install CUDA 13 and cuDNN (set "
            "CUDNN_ROOT),\n  or get the libraries into this folder with\n"
            "    pip install --no-deps --target %s nvidia-cublas==13.* "
            "nvidia-curand==10.4.* nvidia-cudnn-cu13"
            % (", ".join(missing), os.path.join(HERE, "cuda")))
    return found


def _driver_folder():
    """Where the driver's library is; "" where the loader finds it."""
    for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") + [
            "/usr/local/nvidia/lib64", "/usr/lib/wsl/lib"]:
        if folder and os.path.exists(folder + "/libcuda.so.1"):
            return folder
    cache = output(["ldconfig", "-p"]) or output(["/sbin/ldconfig", "-p"])
    if "libcuda.so.1" not in (cache or ""):
        raise UserError("this machine has no NVIDIA driver (libcuda.so.1), so "
                        "no usable GPU: copy %s to a machine with one, and "
                        "run it there" % HERE)
    return ""


class Host:
    """How programs of the bundle are started, and what the card is."""

    def __init__(self, bundle, folder):
        self.is_gpu = bundle["device"] == "cuda"
        self.bin = os.path.join(HERE, "bin")
        self.env = dict(os.environ, CUDA_DEVICE_ORDER="PCI_BUS_ID",
                        OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
        self.path = ""
        libraries = {}
        if self.is_gpu:
            folders = [_driver_folder()]
            libraries = find_libraries(bundle["libraries"])
            for path in libraries.values():
                if path:
                    folders.append(os.path.dirname(path))
                    if "/nvidia/" in path:
                        # What they open by name lies in packages beside them.
                        folders += sorted(glob.glob(os.path.normpath(
                            path + "/../../..") + "/*/lib"))
            folders = [f for i, f in enumerate(folders)
                       if f and f not in folders[:i]]
            self.path = ":".join(folders)
            self._find_a_start(folder)
        self.machine = self._describe(libraries)

    def environment(self):
        """The programs' environment."""
        env = dict(self.env)
        if self.path:
            env["LD_LIBRARY_PATH"] = self.path
        return env

    def command(self, name, *arguments):
        """The command that runs a program of the bundle."""
        return [os.path.join(self.bin, name)] + [str(a) for a in arguments]

    def under(self, tool, name, *arguments):
        """The same under a tool, which must not see the libraries itself."""
        env = ["env", "LD_LIBRARY_PATH=" + self.path] if self.path else []
        return tool + env + self.command(name, *arguments)

    def _starts(self):
        done = subprocess.run(self.command("caffe", "--version"),
                              env=self.environment(),
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT,
                              universal_newlines=True)
        return done.returncode == 0, done.stdout

    def _find_a_start(self, folder):
        """A C library older than that of the build is passed by.

        Scripts stand for the programs then: some tests start their own program
        anew.
        """
        if self._starts()[0]:
            return
        loaders = glob.glob(HERE + "/lib/c/ld-linux*")
        scripts = os.path.join(folder, "bin")
        os.makedirs(scripts, exist_ok=True)
        path = ":".join([HERE + "/lib/c", HERE + "/lib", self.path])
        for name in os.listdir(self.bin):
            script = os.path.join(scripts, name)
            with open(script, "w") as file:
                file.write('#!/bin/bash\nexec "%s" --argv0 "$0" '
                           '--library-path "%s" "%s" "$@"\n'
                           % (loaders[0] if loaders else "",
                              path, os.path.join(self.bin, name)))
            os.chmod(script, 0o755)
        self.bin, self.path = scripts, ""
        started, words = self._starts()
        if not started:
            raise UserError("Caffe does not start on this machine:\n  "
                            + words.strip())

    def _describe(self, libraries):
        done = subprocess.run(self.command("gpu_check", "device"),
                              env=self.environment(),
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, universal_newlines=True)
        if done.returncode != 0:
            raise UserError("the GPU cannot be used: "
                            + done.stderr.strip().split("\n")[-1])
        device = json.loads(done.stdout)
        machine = {"card": device["name"], "driver": "unknown",
                   "device": device, "system": platform.platform(),
                   "processor": _processor(), "processors": os.cpu_count(),
                   "libraries": libraries}
        if self.is_gpu:
            machine.update(_smi(_CARD))
        return machine


def _processor():
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()
