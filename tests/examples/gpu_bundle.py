"""A bundle for a GPU host, of stand-in programs, and a host for it."""
import json
import os
import pathlib
import shutil
import signal
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
GPU = ROOT / "tests/gpu"

# Trains at $STATE/rate iterations in 50 ms, with a snapshot where the solver
# wants one and at SIGINT, and writes its process id to $STATE/pids.
CAFFE = r'''
import os, re, signal, sys, time
if sys.argv[1] == "--version":
    sys.exit()
state = os.environ["STATE"]
flags = dict(a[2:].split("=", 1) for a in sys.argv[2:])
def log(text):
    sys.stderr.write("I1125 10:00:00.000000  1 solver.cpp:1] %s\n" % text)
    sys.stderr.flush()
if sys.argv[1] == "test":
    log("accuracy = 0.5")
    log("accuracy = " + open(state + "/accuracy").read())
    sys.exit()
with open(state + "/pids", "a") as file:
    file.write("%d %s\n" % (os.getpid(), " ".join(sys.argv[1:])))
solver = dict(re.findall(r'^(\w+): "?([^"\n]*)"?$',
                         open(flags["solver"]).read(), re.M))
assert os.path.exists(solver["net"])
rate = int(open(state + "/rate").read())
stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append(1))
def varint(n):
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])
def snapshot(n):
    prefix = "%s_iter_%d" % (solver["snapshot_prefix"], n)
    with open(prefix + ".caffemodel", "wb") as file:
        file.write(b"\xa2\x06" + varint(300) + 300 * b"w")
    with open(prefix + ".solverstate", "wb") as file:
        file.write(b"\x08" + varint(n) + b"\x20\x00")
at = 0
if "snapshot" in flags:
    at = int(re.search(r"_iter_(\d+)\.", flags["snapshot"])[1])
    assert os.path.exists(flags["snapshot"])
end, every = int(solver["max_iter"]), int(solver["snapshot"])
if solver["display"] == "1":
    rate = 1
while at < end and not stop:
    time.sleep(0.05 if rate > 1 else 0)
    before, at = at, min(end, at + rate)
    log("Iteration %d (1 iter/s, 1s/100 iters), loss = 0.5" % at)
    log("    Train net output #0: lambda = %g" % (1000.0 / at))
    log("Iteration %d, lr = 0.1" % at)
    if at // every > before // every:
        snapshot(at - at % every)
if stop:
    snapshot(at)
'''

GPU_CHECK = r'''
import json, os, sys, time
state = os.environ["STATE"]
if sys.argv[1] == "device":
    if os.path.exists(state + "/no_gpu"):
        sys.exit("gpu_check: no usable GPU: no device is detected")
    print(open(state + "/device").read())
elif sys.argv[1] == "parity":
    with open(state + "/parity", "a") as file:
        file.write(" ".join(sys.argv[2:]) + "\n")
elif sys.argv[1] == "time":
    seen = state + "/clocks"
    while not os.path.exists(seen):  # somebody looks at the clocks meanwhile
        time.sleep(0.02)
    os.remove(seen)
    times = json.load(open(state + "/times"))
    if sys.argv[2].startswith("bn"):
        times.update(gb_per_s=2400, copy_gb_per_s=3000)
    else:
        del times["share_of_copy"]
    print(json.dumps(times))
'''

GTEST = r'''
import re, sys
case = re.search("--gtest_filter=(.*)[.]", " ".join(sys.argv))[1]
print("[----------] 7 tests from %s, where TypeParam = "
      "caffe::GPUDevice<float>" % case)
print("[  PASSED  ] 7 tests.")
'''

CONVERT = r'''
import os, sys
with open(os.environ["STATE"] + "/converted", "a") as file:
    file.write(" ".join(sys.argv) + "\n")
if "cifar" in sys.argv[0]:
    for phase in ("train", "test"):
        os.mkdir("%s/cifar10_%s_lmdb" % (sys.argv[2], phase))
else:
    assert open(sys.argv[1], "rb").read(4) == b"\0\0\x08\x03"
    os.mkdir(sys.argv[3])
'''

SMI = r'''
import os, sys
values = {"name": "Stand-in 9000", "driver_version": "580.1",
          "memory.total": "81559", "clocks.sm": "1980", "clocks.mem": "2619"}
fields = [a for a in sys.argv if a.startswith("--query-gpu=")][0][12:]
if fields == "memory.used":
    print(open(os.environ["STATE"] + "/used").read())
    sys.exit()
if "clocks.sm" in fields.split(","):
    open(os.environ["STATE"] + "/clocks", "w").close()
print(", ".join(values.get(f, "[N/A]") for f in fields.split(",")))
'''

TIMES = {"ours_ms": 0.5, "theirs_ms": 2.0, "more_ms": 0.005, "ratio": 0.25,
         "ratio_min": 0.24, "ratio_max": 0.26, "rounds": 15,
         "extra_bytes": 4096, "share_of_copy": 0.8}


def program(path, text):
    """A Python program."""
    path.write_text("#!/usr/bin/python3 -B\n" + text)
    path.chmod(0o755)


GTESTS = ["%s/%d" % (case, number) for case in (
    "LargeMarginInnerProductLayerTest", "BNLayerTest") for number in range(4)]


class Bundle:
    """The folder, and the machine around it."""

    def __init__(self, folder, images):
        self.state, self.root = folder / "state", folder / "a bundle"
        self.results = folder / "out"
        self.tools, self.home = folder / "tools", folder / "env"
        for path in (self.state, self.root / "bin", self.tools,
                     self.root / "mnist", self.home):
            path.mkdir(parents=True)
        for path in GPU.glob("*.py"):
            shutil.copy(path, self.root)
        shutil.copy(GPU / "run.sh", self.root)
        shutil.copy(ROOT / "myexamples/caffe_log.py", self.root)
        shutil.copytree(GPU / "nets", self.root / "nets")
        for name in ("mnist/mnist_solver.prototxt", "mnist/mnist.sha256",
                     "mnist/model/mnist_train_test.prototxt",
                     "cifar10/cifar_solver.prototxt", "cifar10/cifar10.sha256",
                     "cifar10/model/cifar_train_test.prototxt"):
            path = self.root / "myexamples" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / "myexamples" / name, path)
        for name, data in images.items():
            (self.root / "mnist" / name).write_bytes(data)
        for name, text in (("caffe", CAFFE), ("gpu_check", GPU_CHECK),
                           ("test.testbin", GTEST),
                           ("convert_mnist_data", CONVERT),
                           ("convert_cifar_data", CONVERT)):
            program(self.root / "bin" / name, text)
        program(self.tools / "nvidia-smi", SMI)
        self.device()
        self.write("used", "400\n")
        self.write("rate", "5000")
        self.write("accuracy", "0.9969")
        self.times()
        self.write_bundle()
        # The driver, and PyTorch with what it brings.
        (folder / "driver").mkdir()
        (folder / "driver/libcuda.so.1").touch()
        self.driver = folder / "driver"
        self.packages = self.home / "lib/python3.12/site-packages"
        for name in ("cu13/lib/libcublas.so.13", "cudnn/lib/libcudnn.so.9"):
            path = self.packages / "nvidia" / name
            path.parent.mkdir(parents=True)
            path.touch()
        (self.packages / "torch").mkdir()
        (self.packages / "torch/__init__.py").write_text("raise SystemExit")

    def write(self, name, text):
        (self.state / name).write_text(text)

    def device(self, name="Stand-in 9000", capability="9.0"):
        self.write("device", json.dumps({
            "name": name, "capability": capability, "cuda": "13.0",
            "cudnn": True}))

    def times(self, **fields):
        self.write("times", json.dumps({**TIMES, **fields}))

    def write_bundle(self, **fields):
        (self.root / "bundle.json").write_text(json.dumps({
            "revision": "abc", "device": "cuda", "archs": "80 90",
            "libraries": ["libcublas.so.13", "libcudnn.so.9"],
            "images": "MNIST", "gtests": GTESTS, **fields}))

    def start(self, *args, env=None):
        return subprocess.Popen(
            [self.root / "run.sh", "--results", self.results,
             *map(str, args)], cwd="/", text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "STATE": str(self.state),
                 "VIRTUAL_ENV": str(self.home),
                 "LD_LIBRARY_PATH": str(self.driver),
                 "PATH": "%s:%s" % (self.tools, os.environ["PATH"]),
                 **(env or {})})

    def run(self, *args, status=0, env=None):
        process = self.start(*args, env=env)
        try:
            out = process.communicate(timeout=120)[0]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            raise
        assert process.returncode == status, out
        return out

    def found(self):
        """What results.json has."""
        return json.loads((self.results / "results.json").read_text())

    def trainings(self):
        """[(process id, arguments)] of the trainings of the part paper."""
        lines = (self.state / "pids").read_text().splitlines()
        return [(int(line.split()[0]), line) for line in lines
                if "=paper/" in line]
