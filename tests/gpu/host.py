"""What the machine brings: CUDA's libraries, the card, a start for Caffe."""
import glob
import json
import os
import platform
import re
import subprocess
import sys

from processes import output
from results import UserError

HERE = os.path.dirname(os.path.abspath(__file__))

# Seconds; the first look at several GPUs takes half a minute, and so do large
# libraries on a slow disk.
_PATIENCE = 180

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


def _idlest():
    """The number of the GPU with most room, if the first one is in use.

    None where the first one will do, or the user has chosen.
    """
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return None
    text = output(["nvidia-smi", "--query-gpu=memory.used",
                   "--format=csv,noheader,nounits"]) or ""
    try:
        used = [int(line) for line in text.split()]  # MiB
    except ValueError:
        return None
    # A desktop's is no use that matters.
    if not used or used[0] < min(used) + 2048:
        return None
    return used.index(min(used))


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
        without = ("\n  or make the folder without cuDNN: tests/gpu/bundle.sh "
                   "--no-cudnn" if "libcudnn" in missing[0] else "")
        raise UserError(
            "Caffe needs %s, which this machine does not have.\n  Take a "
            "Python with PyTorch for CUDA 13, install CUDA 13 and cuDNN (set "
            "CUDNN_ROOT),\n  or get the libraries into this folder with\n"
            "    pip install --no-deps --target %s nvidia-cublas==13.* "
            "nvidia-curand==10.4.* nvidia-cudnn-cu13%s"
            % (", ".join(missing), os.path.join(HERE, "cuda"), without))
    return found


def _driver_version(path):
    """The CUDA of a driver's library, 13000 for 13.0.

    0 where it does not tell: the toolkit's stub of one, for example. None where
    it cannot be opened.
    """
    # In a process of its own: of two libraries of this name, one would stand
    # for both.
    text = output([sys.executable, "-c", """
import ctypes, sys
version = ctypes.c_int(0)
if ctypes.CDLL(sys.argv[1]).cuDriverGetVersion(ctypes.byref(version)):
    version.value = 0
print(version.value)""", path])
    return None if text is None else int(text)


def _driver_folder(libraries):
    """Where the driver's library is; "" where the loader finds it.

    Raises UserError where there is none, or one too old for the libraries.
    """
    folders = [folder for folder in os.environ.get(
        "LD_LIBRARY_PATH", "").split(":") + ["/usr/local/nvidia/lib64",
                                             "/usr/lib/wsl/lib"]
               if folder and os.path.exists(folder + "/libcuda.so.1")]
    needed = max([int(number) for name in libraries for number in re.findall(
        r"^libcublas\.so\.(\d+)$", name)], default=0)
    for folder in folders + [""]:
        version = _driver_version(os.path.join(folder, "libcuda.so.1"))
        if not version:
            continue
        if version >= 1000 * needed:
            return folder
        raise UserError(
            "this machine's driver is for CUDA %d.%d at most, and Caffe here "
            "is built with CUDA %d:\n  update the driver, or make a folder "
            "with an older CUDA toolkit (CUDA_HOME) by tests/gpu/bundle.sh"
            % (version // 1000, version % 1000 // 10, needed))
    if folders:
        return folders[0]
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
        gpu = _idlest() if self.is_gpu else None
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
        self.env = dict(os.environ, CUDA_DEVICE_ORDER="PCI_BUS_ID",
                        OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
        # Where a card needs kernels compiled, once and not in each process.
        if not os.access(os.path.expanduser("~"), os.W_OK):
            self.env.setdefault("CUDA_CACHE_PATH",
                                os.path.join(folder, "kernels"))
        self.path = ""
        self._make_executable()
        libraries = {}
        if self.is_gpu:
            folders = [_driver_folder(bundle["libraries"])]
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
        if self.is_gpu:
            _check_kernels(bundle["archs"],
                           self.machine["device"]["capability"])

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

    def _make_executable(self):
        """Some ways to copy a folder lose that."""
        for path in (glob.glob(self.bin + "/*")
                     + glob.glob(HERE + "/lib/c/ld-linux*")):
            if not os.access(path, os.X_OK):
                os.chmod(path, 0o755)

    def _ask(self, name, argument):
        """What a program answers that has little to do.

        Raises UserError where it does not, as on a GPU that hangs.
        """
        try:
            return subprocess.run(self.command(name, argument),
                                  env=self.environment(),
                                  stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, timeout=_PATIENCE,
                                  universal_newlines=True)
        except subprocess.TimeoutExpired:
            raise UserError("%s %s has not answered for %d s: does nvidia-smi?"
                            % (name, argument, _PATIENCE))

    def _starts(self):
        """Whether Caffe does, and what it says."""
        try:
            done = self._ask("caffe", "--version")
        except OSError as error:  # another processor, or another loader's place
            return False, str(error)
        return done.returncode == 0, (done.stdout + done.stderr).strip()

    def _find_a_start(self, folder):
        """A C library older than that of the build is passed by.

        Scripts stand for the programs then: some tests start their own program
        anew.
        """
        started, why = self._starts()
        if started:
            return
        loaders = glob.glob(HERE + "/lib/c/ld-linux*")
        scripts = os.path.join(folder, "bin")
        os.makedirs(scripts, exist_ok=True)
        path = ":".join([HERE + "/lib/c", HERE + "/lib", self.path])
        for name in os.listdir(self.bin):
            script = os.path.join(scripts, name)
            with open(script, "w") as file:
                file.write('#!/bin/sh\nexec "%s" --argv0 "$0" '
                           '--library-path "%s" "%s" "$@"\n'
                           % (loaders[0] if loaders else "",
                              path, os.path.join(self.bin, name)))
            os.chmod(script, 0o755)
        self.bin, self.path = scripts, ""
        started, words = self._starts()
        if not started:
            raise UserError("Caffe does not start on this machine (%s):\n  %s"
                            "\n  nor with this folder's C library: %s"
                            % (platform.machine(), why, words))

    def _describe(self, libraries):
        done = self._ask("gpu_check", "device")
        if done.returncode != 0:
            raise UserError("the GPU cannot be used: "
                            + done.stderr.strip().split("\n")[-1])
        device = json.loads(done.stdout)
        machine = {"card": device["name"], "driver": "unknown",
                   "device": device, "system": platform.platform(),
                   "processor": _processor(), "processors": os.cpu_count(),
                   "libraries": libraries}
        if self.is_gpu:
            machine.update(_smi(_CARD), gpu=os.environ.get(
                "CUDA_VISIBLE_DEVICES", "0"))
        return machine


def _check_kernels(archs, capability):
    """Raises UserError where the card can run nothing that was compiled.

    Code for a GPU runs on later ones of its generation, that of the last is
    there for all later generations, too.
    """
    built = [int(arch) for arch in re.findall(r"\d+", archs)]
    card = int(capability.replace(".", ""))
    if built and built[-1] > card and not any(
            arch <= card and arch // 10 == card // 10 for arch in built):
        raise UserError(
            "Caffe here is built for sm_%s, and this card is an sm_%d\n  "
            "CUDA_ARCHS=%d tests/gpu/bundle.sh makes a folder for it"
            % (", sm_".join(archs.split()), card, card))


def _processor():
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()
