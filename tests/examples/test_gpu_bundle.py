"""The folder that tests/gpu/bundle.sh packs, and its run.sh, without a GPU."""
import gzip
import hashlib
import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest

from conftest import CAFFE_ROOT, ROOT
from gpu_bundle import GTESTS, Bundle, program
from small_mnist import small_mnist

sys.path.insert(0, os.path.join(ROOT, "tests/gpu"))
sys.path.insert(0, os.path.join(ROOT, "myexamples"))

import checks  # noqa: E402
import images  # noqa: E402
import pack  # noqa: E402
import trainings  # noqa: E402


@pytest.fixture
def bundle(tmp_path):
    return Bundle(tmp_path, small_mnist(8, 4))


def last_line(out):
    return out.splitlines()[-1]


# ---- The true thing, on the CPU ----

def test_rehearsal_on_the_cpu(tree, caffe_root, tmp_path):
    """A bundle of the built Caffe runs all parts, trainings of two steps."""
    if not os.path.exists(os.path.join(caffe_root, "build/test/test.testbin")):
        pytest.skip("needs the gtests: run cmake/build_caffe.sh --tests")
    with open(os.path.join(caffe_root, "build/CMakeCache.txt")) as file:
        if "CPU_ONLY:BOOL=ON" not in file.read():
            pytest.skip("needs a Caffe without CUDA")
    shutil.copytree(os.path.join(ROOT, "tests/gpu"), tree.root / "tests/gpu",
                    ignore=shutil.ignore_patterns("__pycache__"))
    data = tree.path("mnist/data")
    data.mkdir()
    (data / "dataset.txt").write_text("MNIST\n")
    for name, packed in small_mnist(40, 20).items():
        (data / name[:-3]).write_bytes(gzip.decompress(packed))
    dest, out = tree.root / "a bundle", tmp_path / "out"
    done = tree.run("../tests/gpu/bundle.sh", "--cpu", dest)
    assert done.returncode == 0, done.stdout
    assert "done: %s" % dest in last_line(done.stdout)

    cases = json.loads((dest / "bundle.json").read_text())["gtests"]
    assert {"BNLayerDeathTest/0", "BNLayerTest/1",
            "LargeMarginInnerProductLayerDataParallelTest/0"} <= set(cases)

    def run(*words, status=0):
        done = tree.run("../a bundle/run.sh", "--results", out, *words)
        assert done.returncode == status, done.stdout
        return done.stdout

    run("tests", "BNLayerTest/0", "parity bn", "repeat", "training")
    run("benchmark")
    text = run("paper", "mnist")
    assert "done: 4 passed" in last_line(text)
    found = json.loads((out / "results.json").read_text())
    assert found["rehearsal"]
    assert found["tests"]["gtest BNLayerTest/0"]["status"] == "passed"
    assert found["tests"]["repeat margin float"]["status"] == "passed"
    assert found["tests"]["training"]["status"] == "passed"
    assert {row["status"] for name, row in found["benchmark"].items()
            if "cuDNN" not in name} == {"passed"}
    assert all(budget["met"] is None for row in found["benchmark"].values()
               for budget in row.get("budgets", []))
    for m in (1, 2, 3, 4):
        entry = found["paper"]["mnist m=%d" % m]
        assert entry["status"] == "passed" and entry["iteration"] == 2
        assert 0 <= entry["error_percent"] <= 100
        assert entry["paper_percent"] == trainings.PAPER["mnist"][m]
        folder = out / ("paper/mnist-m%d" % m)
        assert "type: %s\n" % trainings.TYPES[m] in (
            folder / "net.prototxt").read_text()
    # The paper's descent.
    assert found["paper"]["mnist m=4"]["lambda"] == pytest.approx(
        1000 * (1 + 0.000025 * 2) ** -35, rel=1e-5)
    text = (out / "results.md").read_text()
    assert "| mnist | 4 |" in text and "| 0.31 |" in text
    # All of it has passed: nothing is done again.
    before = (out / "paper/mnist-m1/train.log").read_bytes()
    assert "done: 4 passed" in last_line(run("paper", "mnist"))
    assert (out / "paper/mnist-m1/train.log").read_bytes() == before


def test_cpu_bundle_needs_a_built_caffe(tree, tmp_path):
    shutil.copytree(os.path.join(ROOT, "tests/gpu"), tree.root / "tests/gpu")
    done = tree.run("../tests/gpu/bundle.sh", "--cpu",
                    env={"CAFFE_ROOT": str(tmp_path)})
    assert done.returncode == 1
    assert "there is no Caffe without CUDA" in done.stdout
    assert not (tree.root / "build/gpu/bundle-cpu").exists()


# ---- All parts ----

def test_all_parts(bundle):
    out = bundle.run()
    found = bundle.found()
    assert found["machine"]["card"] == "Stand-in 9000"
    assert found["machine"]["driver"] == "580.1"
    assert set(found["tests"]) == set(checks.test_names({"gtests": GTESTS}))
    assert found["tests"]["gtest BNLayerTest/3"]["words"] == (
        "7 tests passed (GPUDevice<float>)")
    assert len((bundle.state / "parity").read_text().splitlines()) == 4
    assert all(row["clocks"]["sm_mhz"] == "1980"
               for row in found["benchmark"].values())
    assert found["paper"]["mnist m=3"]["error_percent"] == 0.31
    assert found["paper"]["cifar10 m=2"]["status"] == "skipped"
    assert "test error 0.31 %, the paper's 0.40 %" in out
    assert "done: " in last_line(out) and "results.md" in last_line(out)
    text = (bundle.results / "results.md").read_text()
    for words in ("Stand-in 9000", "580.1", "3000 GB/s (median)",
                  "ratio at most 1.03: met", "1980 / 2619", "0.40"):
        assert words in text
    # What has passed is not done again; what could not be done is tried.
    again = bundle.run()
    assert "gtest" not in again and "benchmark" not in again
    assert len(bundle.trainings()) == 4
    bundle.run("paper", "m=1", "--again")
    assert len(bundle.trainings()) == 5


def test_parts_by_name(bundle):
    bundle.run("tests", "parity margin")
    assert set(bundle.found()["tests"]) == {"parity margin float",
                                            "parity margin double"}
    bundle.run("paper", "m=1", "m=4")
    assert set(bundle.found()["paper"]) == {"mnist m=1", "mnist m=4",
                                            "cifar10 m=4"}
    out = bundle.run("list")
    assert len(out.splitlines()) == (len(checks.test_names({"gtests": GTESTS}))
                                     + len(checks.ROWS)
                                     + len(checks.PROFILES) + 4 + 2)


@pytest.mark.parametrize("args, says", [
    (["frob"], "unknown part frob"),
    (["tests", "frob"], "no step of tests has frob in its name"),
    (["paper", "m=5"], "paper takes mnist, cifar10 and m=1 to m=4, not m=5"),
    (["--limit", "0"], "--limit and --jobs are greater than 0"),
    (["data"], "data takes the files"),
])
def test_wrong_calls(bundle, args, says):
    out = bundle.run(*args, status=2 if "unknown" in says or "--" in says
                     else 1)
    assert says in out
    assert not (bundle.results / "results.json").exists()


# ---- Ends of calls ----

def slow(bundle):
    bundle.write("rate", "100")  # 5 seconds for a training


def test_goes_on_after_its_limit(bundle):
    bundle.write("rate", "20")  # 25 seconds for a training
    out = bundle.run("paper", "m=1", "m=2", "mnist", "--limit", "9", status=3)
    assert "ended at its limit of 9 s: 2 left" in last_line(out)
    assert "goes on with paper mnist m=1" in last_line(out)
    reached = bundle.found()["paper"]["mnist m=1"]["iteration"]
    assert 0 < reached < 10000
    bundle.write("rate", "5000")
    out = bundle.run("paper", "m=1", "m=2", "mnist")
    assert "paper mnist m=1: going on from iteration %d" % reached in out
    assert "--snapshot=paper/mnist-m1/model_iter_%d.solverstate" % reached in (
        bundle.trainings()[2][1] + bundle.trainings()[3][1])
    assert bundle.found()["paper"]["mnist m=1"]["status"] == "passed"


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def is_running(process):
    try:
        with open("/proc/%d/stat" % process) as file:
            return file.read().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_goes_on_after_a_signal(bundle, number):
    slow(bundle)
    folder = bundle.results / "paper/mnist-m1"
    process = bundle.start("paper", "mnist", "m=1")
    wait_for(lambda: (folder / "model_iter_1000.solverstate").exists())
    process.send_signal(number)
    out = process.communicate(timeout=60)[0]
    (pid, _), = bundle.trainings()
    wait_for(lambda: not is_running(pid))
    if number == signal.SIGTERM:
        assert process.returncode == 3
        assert "ended by SIGTERM: 1 left" in last_line(out)
    # The newest snapshot is cut short, as by a kill while it is written.
    newest = trainings.snapshots(folder)[0]
    state = folder / ("model_iter_%d.solverstate" % newest)
    state.write_bytes(state.read_bytes()[:-1])
    left = trainings.snapshots(folder)[0]
    assert 0 < left < newest
    bundle.write("rate", "5000")
    out = bundle.run("paper", "mnist", "m=1")
    assert "going on from iteration %d\n" % left in out
    assert bundle.found()["paper"]["mnist m=1"]["error_percent"] == 0.31


def test_a_step_that_is_cut_is_done_anew(bundle):
    """Unless it had a whole call to itself."""
    program(bundle.root / "bin/test.testbin",
            "import time\ntime.sleep(600)\n")
    out = bundle.run("tests", "gtest BNLayerTest/0", "--limit", "2", status=1)
    assert "does not end within 2 s" in out
    assert bundle.found()["tests"]["gtest BNLayerTest/0"]["status"] == "failed"
    check = bundle.root / "bin/gpu_check"
    quick = check.read_text()
    program(check, "import sys, time\nif sys.argv[-1] == 'double':\n"
            "    time.sleep(600)\n" + quick)
    out = bundle.run("tests", "parity bn", "--limit", "5", status=3)
    assert bundle.found()["tests"]["parity bn float"]["status"] == "passed"
    assert "goes on with tests parity bn double" in last_line(out)
    program(check, quick)
    out = bundle.run("tests", "parity bn")
    assert "parity bn float" not in out and "done: 2 passed" in last_line(out)


def test_one_call_at_a_time(bundle):
    slow(bundle)
    process = bundle.start("paper", "mnist", "m=1")
    wait_for(lambda: (bundle.state / "pids").exists())
    assert "another run.sh is at work" in bundle.run("tests", status=1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def test_a_training_that_fails(bundle):
    program(bundle.root / "bin/caffe", "import sys\n"
            "if sys.argv[1] == 'train': sys.exit('F1125 out of memory')\n")
    out = bundle.run("paper", "mnist", "m=1", status=1)
    assert "F1125 out of memory" in out
    assert "FAILED: paper mnist m=1: caffe train ended with 1" in out
    assert "FAILED: 1 failed" in last_line(out)


# ---- Budgets ----

def test_budgets(bundle):
    bundle.times(ratio=1.02, more_ms=0.013)
    out = bundle.run("benchmark", status=1)
    rows = bundle.found()["benchmark"]
    met = {name: [b["met"] for b in row["budgets"]]
           for name, row in rows.items()}
    assert met["margin / InnerProduct (128, 512, 10)"] == []
    assert met["margin / InnerProduct (128, 512, 1000)"] == [False, True]
    assert met["margin / InnerProduct (512, 512, 10572)"] == [True, True]
    assert met["margin / InnerProduct (256, 512, 100000)"] == [False, True]
    assert met["BN / BatchNorm + Scale (128, 64, 28, 28)"] == [False, True]
    assert "budget MISSED: at most 12 us more" in out
    text = (bundle.results / "results.md").read_text()
    assert "ratio at most 1.01: MISSED" in text
    bundle.times(share_of_copy=0.69, extra_bytes=5 << 20)
    bundle.run("benchmark", "--again", status=1)
    rows = bundle.found()["benchmark"]
    assert [b["met"] for b in rows["the same in place"]["budgets"]] == [
        True, False]
    assert rows["margin / InnerProduct (512, 512, 10572)"]["status"] == (
        "failed")


def test_ncu(bundle):
    head = ('"ID","Process ID","Kernel Name","Block Size","Grid Size",'
            '"Section Name","Metric Name","Metric Unit","Metric Value"')
    rows = [('0', "bn_normalize_f32(Shape, int)", "gpu__time_duration.sum",
             "nsecond", "12,345"),
            ('0', "bn_normalize_f32(Shape, int)",
             "launch__registers_per_thread", "register/thread", "48"),
            ('1', "bn_normalize_f32(Shape, int)", "gpu__time_duration.sum",
             "nsecond", "11,000"),
            ('2', "large_margin_forward_f32", "gpu__time_duration.sum",
             "nsecond", "5,000")]
    lines = ["==PROF== Connected to process 7", head] + [
        '"%s","7","%s","(256, 1, 1)","(8, 1, 1)","Command line profiler '
        'metrics","%s","%s","%s"' % row for row in rows]
    program(bundle.tools / "ncu", "import sys\n"
            "open(%r, 'w').write(' '.join(sys.argv))\nprint(%r)\n"
            % (str(bundle.state / "ncu"), "\n".join(lines)))
    bundle.run("profile", "28 28")
    kernels = bundle.found()["profile"]["ncu bn 128 64 28 28"]["kernels"]
    assert kernels[0] == {"kernel": "bn_normalize_f32", "launches": 2,
                          "metrics": {"time": "11,000 nsecond",
                                      "registers": "48"}}
    assert kernels[1]["kernel"] == "large_margin_forward_f32"
    call = (bundle.state / "ncu").read_text()
    assert "--clock-control none" in call  # no setting of the card is touched
    assert call.endswith("gpu_check profile bn 128 64 28 28")
    text = (bundle.results / "results.md").read_text()
    assert "| ncu bn 128 64 28 28 | bn_normalize_f32 | 2 |" in text


def test_ncu_that_may_not_count(bundle):
    program(bundle.tools / "ncu", "import sys\nsys.exit('==ERROR== "
            "ERR_NVGPUCTRPERM - The user does not have permission')")
    out = bundle.run("profile", "28 28")
    assert "lets root alone count" in out and "done: 1 skipped" in out


@pytest.mark.parametrize("tool, words, status, outcome", [
    ("memcheck", "========= Error: Device not supported.", 1, "skipped"),
    ("memcheck", "Internal: pools are not supported\nInvalid __global__ write "
     "of size 4", 9, "failed"),
    ("memcheck", "Internal: pools are not supported", 0, "passed"),
    ("synccheck", "Barrier error at large_margin_backward_f32", 9, "failed"),
    ("synccheck", "Barrier error at gemm_kernel", 9, "passed")])
def test_what_the_sanitizer_says(bundle, tool, words, status, outcome):
    program(bundle.tools / "compute-sanitizer",
            "import sys\nprint(%r)\nsys.exit(%d)\n" % (words, status))
    bundle.run("tests", tool + " margin float",
               status=1 if outcome == "failed" else 0)
    found, = bundle.found()["tests"].values()
    assert found["status"] == outcome


def test_without_tools(bundle):
    (bundle.tools / "nvidia-smi").unlink()
    out = bundle.run("tests", "memcheck", "parity margin float",
                     env={"PATH": "%s:/usr/bin:/bin" % bundle.tools})
    assert "there is no compute-sanitizer" in out
    assert bundle.found()["machine"]["card"] == "Stand-in 9000"
    assert bundle.found()["machine"]["driver"] == "unknown"


# ---- The host ----

def test_libraries_of_pytorch(bundle):
    bundle.run("tests", "parity margin float")
    libraries = bundle.found()["machine"]["libraries"]
    assert libraries == {
        name: str(bundle.packages / "nvidia" / folder / "lib" / name)
        for name, folder in (("libcublas.so.13", "cu13"),
                             ("libcudnn.so.9", "cudnn"))}


def test_cudnn_root_comes_first(bundle, tmp_path):
    (tmp_path / "my cudnn/lib64").mkdir(parents=True)
    (tmp_path / "my cudnn/lib64/libcudnn.so.9").touch()
    bundle.run("tests", "parity margin float",
               env={"CUDNN_ROOT": str(tmp_path / "my cudnn")})
    assert bundle.found()["machine"]["libraries"]["libcudnn.so.9"] == str(
        tmp_path / "my cudnn/lib64/libcudnn.so.9")


def test_library_that_is_missing(bundle):
    bundle.write_bundle(libraries=["libcublas.so.13", "libcudnn.so.99"])
    out = bundle.run(status=1)
    assert "Caffe needs libcudnn.so.99, which this machine does not" in out
    assert "pip install" in out and "--no-cudnn" in out
    bundle.write_bundle(libraries=["libcublas.so.99", "libcudnn.so.9"])
    assert "--no-cudnn" not in bundle.run(status=1)


def test_another_processor(bundle):
    (bundle.root / "bin/caffe").write_bytes(b"\x7fELF\2\1\1" + bytes(60))
    out = bundle.run(status=1)
    assert "Caffe does not start on this machine (" in out
    assert "format error" in out


def test_no_driver(bundle):
    bundle.driver.joinpath("libcuda.so.1").unlink()
    program(bundle.tools / "ldconfig", "")
    out = bundle.run(status=1)
    assert "no NVIDIA driver" in out and len(out.splitlines()) == 1


def make_driver(folder, version, status=0):
    """A libcuda.so.1 that is for a version of CUDA."""
    folder.mkdir(exist_ok=True)
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-",
         "-o", folder / "libcuda.so.1"], check=True, text=True,
        input="int cuDriverGetVersion(int* v) { *v = %d; return %d; }"
        % (version, status))


def test_driver_that_is_too_old(bundle):
    """Said before anything is asked of a library that is missing."""
    bundle.write_bundle(libraries=["libcublas.so.13", "libcudnn.so.99"])
    make_driver(bundle.driver, 12080)
    out = bundle.run(status=1)
    assert "driver is for CUDA 12.8 at most, and Caffe here is built with " \
        "CUDA 13:\n  update the driver" in out
    make_driver(bundle.driver, 13010)
    assert "libcudnn.so.99" in bundle.run(status=1)


def test_driver_that_the_loader_alone_knows(bundle):
    """As where no ldconfig has run since the driver came."""
    bundle.driver.joinpath("libcuda.so.1").unlink()
    program(bundle.tools / "ldconfig", "")
    make_driver(bundle.state, 13000)
    bundle.run("tests", "parity margin float",
               env={"LD_PRELOAD": str(bundle.state / "libcuda.so.1")})


def test_stub_of_a_driver(bundle):
    """The toolkit's, which some containers have on their path, is none."""
    stubs = bundle.state / "stubs"
    make_driver(stubs, 0, status=34)
    make_driver(bundle.driver, 13000)
    path = bundle.root / "bin/gpu_check"
    program(path, 'import os\nassert "stubs" not in os.environ['
            '"LD_LIBRARY_PATH"]\n' + path.read_text())
    bundle.run("tests", "parity margin float", env={
        "LD_LIBRARY_PATH": "%s:%s" % (stubs, bundle.driver)})


@pytest.mark.parametrize("archs, capability, runs", [
    ("80 90", "8.6", True), ("80 90", "12.0", True), ("80 90", "7.5", False),
    ("75 90", "8.0", False), ("90", "9.0", True)])
def test_card_that_nothing_is_built_for(bundle, archs, capability, runs):
    """Said at once, not by each step's failure."""
    bundle.write_bundle(archs=archs)
    bundle.device(capability=capability)
    out = bundle.run("tests", "parity margin float", status=0 if runs else 1)
    assert ("CUDA_ARCHS=%s tests/gpu/bundle.sh" % capability.replace(".", "")
            in out) != runs


@pytest.mark.parametrize("used, chosen, gpu", [
    ("70000\n600\n3\n", None, "2"), ("900\n3\n", None, "0"),
    ("70000\n3\n", "0", "0"), ("[N/A]\n3\n", None, "0")])
def test_a_gpu_in_use_is_passed_by(bundle, used, chosen, gpu):
    bundle.write("used", used)
    path = bundle.root / "bin/gpu_check"
    program(path, 'import os\nassert os.environ.get("CUDA_VISIBLE_DEVICES", '
            '"0") == "%s"\n' % gpu + path.read_text())
    bundle.run("tests", "parity margin float", env={
        "CUDA_VISIBLE_DEVICES": chosen} if chosen else None)
    assert bundle.found()["machine"]["gpu"] == gpu


def test_kernels_are_compiled_once(bundle):
    """The driver keeps what it compiles at home, which may not be writable."""
    path = bundle.root / "bin/gpu_check"
    program(path, 'import os\nopen(os.environ["STATE"] + "/cache", "w").write('
            'os.environ.get("CUDA_CACHE_PATH", ""))\n' + path.read_text())
    home = bundle.state / "home"
    home.mkdir()
    bundle.run("tests", "parity margin float", env={"HOME": str(home)})
    assert (bundle.state / "cache").read_text() == ""
    bundle.run("tests", "parity bn float", env={"HOME": str(home / "not")})
    assert (bundle.state / "cache").read_text() == str(
        bundle.results / "kernels")


def test_copy_without_modes(bundle):
    """A folder that came by a way that loses what is executable."""
    for path in (bundle.root / "bin").iterdir():
        path.chmod(0o644)
    bundle.run("tests", "parity margin float")


def test_gpu_that_hangs(bundle):
    path = bundle.root / "bin/gpu_check"
    program(path, "import time\ntime.sleep(60)")
    host = bundle.root / "host.py"
    host.write_text(host.read_text().replace("_PATIENCE = 180",
                                             "_PATIENCE = 1"))
    out = bundle.run(status=1)
    assert "gpu_check device has not answered for 1 s" in out


def test_folder_on_a_disk_without_locks(bundle):
    run = bundle.root / "run.py"
    run.write_text(run.read_text().replace(
        "    file = open(", "    def flock(*_):\n        raise OSError("
        "38, 'Function not implemented')\n    fcntl.flock = flock\n"
        "    file = open(", 1))
    out = bundle.run("tests", "parity margin float")
    assert "going on without a lock" in out and "done: 1 passed" in out


def test_no_gpu(bundle):
    bundle.write("no_gpu", "")
    out = bundle.run(status=1)
    assert out == ("run.sh: error: the GPU cannot be used: gpu_check: no "
                   "usable GPU: no device is detected\n")


@pytest.mark.parametrize("is_there", [True, False])
def test_older_c_library(bundle, is_there):
    """Programs that do not start by themselves do with the folder's own.

    Some systems have none where programs look for it.
    """
    for name in ("caffe", "gpu_check"):
        path = bundle.root / "bin" / name
        program(path, "import os, sys\n'LOADED' in os.environ or "
                "sys.exit('GLIBC_2.36 not found')\n" + path.read_text())
        if not is_there:
            program(bundle.state / name, path.read_text())
            path.write_text("#!/there/is/none\n")
    loader = bundle.root / "lib/c/ld-linux-x86-64.so.2"
    loader.parent.mkdir(parents=True)
    loader.write_text('#!/bin/bash\n[[ $1 == --argv0 && $2 == */bin/* && '
                      '$3 == --library-path && $4 == *cudnn/lib* ]] || exit\n'
                      'run=$STATE/${5##*/}; [[ -e $run ]] || run=$5\n'
                      'LOADED=1 exec "$run" "${@:6}"\n')
    loader.chmod(0o755)
    bundle.run("tests", "parity margin float")
    bundle.run("paper", "mnist", "m=1")
    loader.unlink()
    out = bundle.run("tests", "parity bn float", status=1)
    assert "Caffe does not start on this machine" in out


def test_results_of_two_cards_do_not_mix(bundle):
    bundle.run("tests", "parity margin float")
    program(bundle.tools / "nvidia-smi", (
        bundle.tools / "nvidia-smi").read_text().replace("9000", "9001"))
    out = bundle.run("tests", status=1)
    assert "the results of another machine (Stand-in 9000, driver 580.1" in out
    assert "--results" in out
    # It may fail, and the card be the same.
    program(bundle.tools / "nvidia-smi", "raise SystemExit(1)")
    bundle.run("tests", "parity margin float")


def test_results_of_two_bundles_do_not_mix(bundle):
    bundle.run("tests", "parity margin float")
    bundle.write_bundle(revision="def")
    assert "the results of another bundle (abc)" in bundle.run(
        "tests", status=1)


# ---- Images ----

def test_data_comes_in_pieces(bundle, tmp_path):
    """Each file is checked; the LMDBs are made when all are there."""
    sums, pieces = [], []
    for name in images.FILES["cifar10"]:
        data = os.urandom(images.CIFAR_RECORD)
        sums.append("%s  %s\n" % (hashlib.sha256(data).hexdigest(), name))
        folder = tmp_path / ("piece %d" % (len(pieces) // 2))
        folder.mkdir(exist_ok=True)
        path = folder / (name + ".gz")
        path.write_bytes(gzip.compress(data))
        pieces.append(path)
    (bundle.root / "myexamples/cifar10/cifar10.sha256").write_text(
        "".join(sums))
    out = bundle.run("data", pieces[0].parent)
    assert "cifar10: without data_batch_3.bin" in out
    assert "mnist: all there" in out
    out = bundle.run("paper", "cifar10", status=1)
    assert "error: paper cifar10: without its images (data_batch_3.bin" in out
    out = bundle.run("paper", "m=2")
    assert "cifar10: skipped, without its images (data_batch_3.bin" in out
    out = bundle.run("data", pieces[2].parent, pieces[4], pieces[5])
    assert "cifar10: all there" in out
    out = bundle.run("paper", "cifar10", "m=2")
    assert "test error 0.31 %, the paper's 7.73 %" in out
    assert (bundle.results / "data/cifar10_train_lmdb").is_dir()
    assert (bundle.results / "data/cifar10_mean.binaryproto").exists()


def test_data_that_is_not_official(bundle, tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(b"something else")
    out = bundle.run("data", tmp_path / "test_batch.bin", status=1)
    assert "test_batch.bin is not the official file" in out
    out = bundle.run("data", bundle.driver, status=1)
    assert "there is no file of MNIST or CIFAR-10 in" in out


def test_mean(tmp_path, pb):
    data = [os.urandom(3 * images.CIFAR_RECORD) for _ in range(5)]
    for number, batch in enumerate(data, 1):
        (tmp_path / ("data_batch_%d.bin" % number)).write_bytes(batch)
    images.write_mean(str(tmp_path), str(tmp_path / "mean"))
    blob = pb.BlobProto()
    blob.ParseFromString((tmp_path / "mean").read_bytes())
    assert (blob.num, blob.channels, blob.height, blob.width) == (1, 3, 32, 32)
    whole = b"".join(data)
    for pixel in (0, 1, 1024, 3071):
        expected = sum(whole[1 + pixel::images.CIFAR_RECORD]) / 15
        assert blob.data[pixel] == pytest.approx(expected, rel=1e-6)


# ---- Prototxts ----

@pytest.mark.parametrize("net", ["mnist", "cifar10"])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_prototxts(pb, net, m):
    from google.protobuf import text_format
    solver_path, net_path = (pathlib.Path(ROOT, "myexamples", name)
                             for name in trainings.FILES[net])
    authors = text_format.Parse(net_path.read_text(), pb.NetParameter())
    ours = text_format.Parse(trainings.net_text(
        net_path.read_text(), net, m, False), pb.NetParameter())
    train, test = ours.layer[0], ours.layer[1]
    assert train.data_param.source == "data/%s_train_lmdb" % net
    assert test.data_param.source == "data/%s_test_lmdb" % net
    assert train.data_param.backend == pb.DataParameter.LMDB
    assert (train.data_param.batch_size, test.data_param.batch_size) == (128,
                                                                        100)
    if net == "cifar10":
        assert train.transform_param.mirror
        assert train.transform_param.mean_file == (
            "data/cifar10_mean.binaryproto")
    # Nothing else differs but the margin.
    margin, = [layer for layer in ours.layer
               if layer.type == "LargeMarginInnerProduct"
               and layer.include[0].phase == pb.TRAIN]
    param = margin.largemargin_inner_product_param
    assert param.type == m - 1
    other, = [layer for layer in authors.layer
              if layer.type == "LargeMarginInnerProduct"
              and layer.include[0].phase == pb.TRAIN]
    param.type = other.largemargin_inner_product_param.type
    del ours.layer[:2], authors.layer[:2]
    assert ours == authors

    before = text_format.Parse(solver_path.read_text(), pb.SolverParameter())
    after = text_format.Parse(trainings.solver_text(
        solver_path.read_text(), "paper/x", 10000, True, False),
        pb.SolverParameter())
    assert after.max_iter == 10000 and after.net == "paper/x/net.prototxt"
    assert after.solver_mode == pb.SolverParameter.GPU
    for field in ("net", "max_iter", "snapshot", "snapshot_prefix", "display",
                  "random_seed"):
        before.ClearField(field)
        after.ClearField(field)
    assert after == before


def test_snapshots_that_are_whole(tmp_path):
    def write(iteration, model, state):
        prefix = tmp_path / ("model_iter_%d" % iteration)
        prefix.with_suffix(".caffemodel").write_bytes(model)
        prefix.with_suffix(".solverstate").write_bytes(state)

    model = b"\x0a\x01n\xa2\x06\x05layer"
    state = b"\x08\x05\x1a\x03abc\x20\x00"
    write(500, model, state)
    write(1000, model, state)
    for iteration, (cut_model, cut_state) in enumerate(
            [(model, b""), (b"", state), (model[:-1], state),
             (model, state[:-1]), (model, state[:-2]), (model[:3], state)]):
        write(2000 + iteration, cut_model, cut_state)
    (tmp_path / "model_iter_1500.solverstate").write_bytes(state)
    assert trainings.snapshots(str(tmp_path)) == [1000, 500]


# ---- Packing ----

def test_ldd():
    assert pack.parse_ldd(
        "/a/bin/caffe:\n"
        "\tlinux-vdso.so.1 (0x00007ffd)\n"
        "\tlibcaffe.so.1.0.0 => /a/lib/libcaffe.so.1.0.0 (0x00007f)\n"
        "\tlibgone.so.3 => not found\n"
        "\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n") == {
            "libcaffe.so.1.0.0": "/a/lib/libcaffe.so.1.0.0",
            "libgone.so.3": None,
            "ld-linux-x86-64.so.2": "/lib64/ld-linux-x86-64.so.2"}


def test_libraries_that_are_packed(tmp_path, caffe_root):
    """What the programs need, but CUDA's; the C library's apart."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib/c").mkdir(parents=True)
    shutil.copy("/usr/bin/gzip", tmp_path / "bin")
    left = pack.pack_libraries(str(tmp_path),
                               os.path.join(caffe_root, "build"), [])
    assert left == []
    assert (tmp_path / "lib/c/libc.so.6").exists()
    assert list((tmp_path / "lib/c").glob("ld-linux*"))
    assert list((tmp_path / "lib").glob("libcaffe.so.*"))
    for name in ("libcudnn.so.9", "libcublasLt.so.13", "libnccl.so.2"):
        assert pack.OF_THE_HOST.match(name)
    assert not pack.OF_THE_HOST.match("libcudart.so.13")
