"""caffe_patch/apply.sh on stand-ins of Caffe trees (stand_in.py)."""

import fcntl
import os
import shutil
import signal
import subprocess

import pytest

from conftest import PROJECT
from stand_in import VERSIONS, make_tree, snapshot

MANIFEST = ".lsoftmax-manifest"
HOOKED = ["src/caffe/proto/caffe.proto", "CMakeLists.txt", "Makefile",
          "src/caffe/solver.cpp", "src/caffe/solvers/sgd_solver.cpp",
          "tools/caffe.cpp"]
NOTHING = "nothing was changed"


def read(tree, name):
    return (tree / name).read_text()


def refuses(apply, tree, *args, says):
    """An error that says so, and not a byte of the tree changed."""
    before = snapshot(tree)
    done = apply(*args, tree, status=1)
    for text in says:
        assert text in done.stdout
    assert done.stdout.count("error:") == 1 and NOTHING in done.stdout
    assert snapshot(tree) == before
    return done.stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_apply_again_and_revert(apply, project, tmp_path, layer_files, version):
    tree = make_tree(tmp_path / "caffe", version)
    before = snapshot(tree)

    apply(tree)
    after = snapshot(tree)
    assert set(after) - set(before) == set(layer_files) | {MANIFEST}
    cmake = read(tree, "CMakeLists.txt").splitlines()
    hook = cmake.index("# ---[ Subdirectories")
    assert cmake[hook - 1] == (
        f'include("{project}/cmake/lsoftmax.cmake" NO_POLICY_SCOPE)')
    make = read(tree, "Makefile").splitlines()
    hook = make.index("include $(CONFIG_FILE)")
    escaped = str(project).replace(" ", "\\ ")
    assert make[hook + 1:hook + 3] == [
        f"LSOFTMAX_ROOT := {project}", f"include {escaped}/cmake/lsoftmax.mk"]
    solver = read(tree, "src/caffe/solver.cpp")
    assert ("(state_filename);\n  }\n"
            "  ResumeLargeMargin(this, state_filename);\n}\n") in solver
    assert "  PrepareLayers(this);\n  iter_ = 0;\n" in solver
    sgd_solver = read(tree, "src/caffe/solvers/sgd_solver.cpp")
    assert "  SaveLargeMargin(*this->net_, file_hid);\n" in sgd_solver
    tool = read(tree, "tools/caffe.cpp")
    assert ("(FLAGS_weights);\n"
            "  caffe::ResumeLargeMargin(&caffe_net, FLAGS_weights);\n") in tool
    for text in (solver, sgd_solver, tool):
        assert '#include "caffe/util/resume_large_margin.hpp"\n' in text
    for name in layer_files:
        source = name.replace("src/caffe/test", "tests/caffe")
        assert read(tree, name) == read(project, source)

    done = apply(tree)
    assert "Nothing to do" in done.stdout
    assert snapshot(tree) == after

    apply("--revert", tree)
    assert snapshot(tree) == before
    assert "Nothing to do" in apply("--revert", tree).stdout


def test_again_touches_no_file(apply, tree):
    apply(tree)
    times = {p: p.stat().st_mtime_ns for p in tree.rglob("*") if p.is_file()}
    apply(tree)
    assert times == {p: p.stat().st_mtime_ns for p in tree.rglob("*")
                     if p.is_file()}


def test_from_any_folder_and_by_relative_path(project, tmp_path, tree):
    subprocess.run(["my project/caffe_patch/apply.sh", "caffe"], check=True,
                   cwd=tmp_path, stdout=subprocess.DEVNULL)
    assert (tree / MANIFEST).exists()


# ---- The proto extension ----

@pytest.fixture
def messages(tmp_path):
    protoc = shutil.which("protoc")
    descriptor = pytest.importorskip("google.protobuf.descriptor_pb2")
    if not protoc:
        pytest.skip("protoc is not installed")

    def compile_proto(tree):
        out = tmp_path / "set.pb"
        subprocess.run([protoc, f"--proto_path={tree}/src/caffe/proto",
                        f"--descriptor_set_out={out}", "caffe.proto"],
                       check=True)
        files = descriptor.FileDescriptorSet.FromString(out.read_bytes())
        return {m.name: m for m in files.file[0].message_type}
    return compile_proto


@pytest.mark.parametrize("version", VERSIONS)
def test_wire_format(apply, tmp_path, messages, version):
    tree = make_tree(tmp_path / "caffe", version)
    apply(tree)
    found = messages(tree)
    layer = {f.name: f.number for f in found["LayerParameter"].field}
    assert layer["bn_param"] == 201
    assert layer["largemargin_inner_product_param"] == 202

    def fields(name):
        return {f.name: (f.number, f.type, f.default_value)
                for f in found[name].field}
    U32, I32, I64, FLOAT, BOOL, ENUM, MESSAGE = 13, 5, 3, 2, 8, 14, 11
    assert fields("LargeMarginInnerProductParameter") == {
        "num_output": (1, U32, ""),
        "type": (2, ENUM, "SINGLE"),
        "weight_filler": (3, MESSAGE, ""),
        "axis": (4, I32, "1"),
        "base": (5, FLOAT, "1"),
        "gamma": (6, FLOAT, "0"),
        "power": (7, FLOAT, "1"),
        "iteration": (8, I32, "0"),
        "lambda_min": (9, FLOAT, "0"),
        "margin": (10, U32, ""),
        "ignore_label": (11, I32, ""),
        "passes": (12, I64, ""),
    }
    assert fields("BNParameter") == {
        "slope_filler": (1, MESSAGE, ""),
        "bias_filler": (2, MESSAGE, ""),
        "momentum": (3, FLOAT, "0.9"),
        "eps": (4, FLOAT, "1e-05"),
        "frozen": (5, BOOL, "false"),
        "engine": (6, ENUM, "DEFAULT"),
    }
    values = {e.name: {v.name: v.number for v in e.value}
              for name in ("LargeMarginInnerProductParameter", "BNParameter")
              for e in found[name].enum_type}
    assert values == {
        "LargeMarginType": {"SINGLE": 0, "DOUBLE": 1, "TRIPLE": 2,
                            "QUADRUPLE": 3},
        "Engine": {"DEFAULT": 0, "CAFFE": 1, "CUDNN": 2},
    }


def test_proto_without_newline_at_its_end(apply, tree, messages):
    path = tree / "src/caffe/proto/caffe.proto"
    path.write_text(path.read_text().rstrip("\n"))
    before = snapshot(tree)
    apply(tree)
    layer = messages(tree)["LayerParameter"]
    assert "bn_param" in {f.name for f in layer.field}
    apply("--revert", tree)
    assert snapshot(tree) == before


MARGIN = "largemargin_inner_product_param"


def numbers(messages, tree):
    """The numbers that our two fields have, and the whole list."""
    fields = {f.name: f.number
              for f in messages(tree)["LayerParameter"].field}
    return fields["bn_param"], fields[MARGIN], fields


@pytest.mark.parametrize("taken, bn, margin", [
    ((201,), 301, 202), ((202,), 201, 301), ((201, 202), 301, 302),
    ((201, 202, 301, 303), 302, 304),
])
def test_fields_in_use(apply, tmp_path, messages, taken, bn, margin):
    """Takes free numbers, says which, and keeps them."""
    tree = make_tree(tmp_path / "caffe", fields="".join(
        f"  optional FillerParameter x{n} = {n}\n"
        f"      [deprecated = true];  // = 300;\n" for n in taken))
    before = snapshot(tree)
    done = apply(tree)
    assert numbers(messages, tree)[:2] == (bn, margin)
    for name, usual, number in (("bn_param", 201, bn), (MARGIN, 202, margin)):
        said = (f"Field {usual} of LayerParameter is x{usual} here: "
                f"{name} gets {number}")
        assert (said in done.stdout) == (usual in taken)
    after = snapshot(tree)
    assert "Nothing to do" in apply(tree).stdout
    assert snapshot(tree) == after

    # Kept also where 201 and 202 have become free.
    path = tree / "src/caffe/proto/caffe.proto"
    text = path.read_text()
    for n in taken:
        text = text.replace(f" x{n} = {n}\n", f" x{n} = {900 + n}\n")
    path.write_text(text)
    apply(tree)
    assert numbers(messages, tree)[:2] == (bn, margin)
    for n in taken:
        path.write_text(path.read_text().replace(
            f" x{n} = {900 + n}\n", f" x{n} = {n}\n"))
    apply("--revert", tree)
    assert snapshot(tree) == before


def test_field_that_the_tree_took_since(apply, tree, messages):
    apply(tree)
    path = tree / "src/caffe/proto/caffe.proto"
    path.write_text(path.read_text().replace(
        "  optional BNParameter bn_param = 201;",
        "  optional FillerParameter new = 201;\n"
        "  optional BNParameter bn_param = 201;"))
    # Beside our line, it makes the file half patched to a program.
    assert "half patched" in apply(tree, status=1).stdout
    path.write_text(path.read_text().replace(
        "  optional FillerParameter new = 201;\n", "").replace(
        "  optional string name = 1;",
        "  optional FillerParameter new = 201;\n  optional string name = 1;"))
    assert "bn_param gets 301" in apply(tree).stdout
    assert numbers(messages, tree)[:2] == (301, 202)


def test_fields_asked_for(apply, tree, messages):
    apply("--bn-field", 202, tree)
    assert numbers(messages, tree)[:2] == (202, 301)
    apply("--bn-field", 401, "--large-margin-field", 402, tree)
    assert numbers(messages, tree)[:2] == (401, 402)
    before = snapshot(tree)
    out = apply("--bn-field", 129, tree, status=1).stdout
    assert "uses field 129 for window_data_param" in out
    assert "--bn-field 301, say" in out
    assert snapshot(tree) == before


@pytest.mark.parametrize("number, says", [
    ("0", "not a protobuf field number"), ("-1", "not a protobuf field number"),
    ("x", "not a protobuf field number"), ("19500", "19000"),
    ("536870912", "536870911"), ("333", "both get field 333"),
    ("129", "window_data_param"),
])
def test_bad_field_number(apply, tree, number, says):
    before = snapshot(tree)
    done = apply("--bn-field", number, "--large-margin-field", 333, tree,
                 status=1)
    assert says in done.stdout
    assert snapshot(tree) == before


# ---- Trees with layers of their own ----

@pytest.mark.parametrize("register", [
    "REGISTER_LAYER_CLASS(BN);", "REGISTER_LAYER_CREATOR(BN, GetBNLayer);"])
@pytest.mark.parametrize("with_proto", [True, False])
def test_own_bn_is_kept(apply, tmp_path, messages, register, with_proto):
    fields = "  optional BNParameter bn_param = 137;\n" if with_proto else ""
    tree = make_tree(tmp_path / "caffe", fields=fields)
    if with_proto:
        with open(tree / "src/caffe/proto/caffe.proto", "a") as f:
            f.write("message BNParameter { optional float eps = 1; }\n")
    own = tree / "src/caffe/layers/bn_layer.cpp"
    own.write_text(f"// their BN\n{register}\n")
    before = snapshot(tree)

    done = apply(tree)
    assert "src/caffe/layers/bn_layer.cpp registers BN" in done.stdout
    assert own.read_text().startswith("// their BN")
    assert not (tree / "src/caffe/test/test_bn_layer.cpp").exists()
    found = messages(tree)
    layer = {f.name: f.number for f in found["LayerParameter"].field}
    assert layer.get("bn_param") == (137 if with_proto else None)
    assert layer["largemargin_inner_product_param"] == 202
    assert "Nothing to do" in apply(tree).stdout

    apply("--revert", tree)
    assert snapshot(tree) == before


def test_bn_in_a_comment_is_no_layer(apply, tree):
    (tree / "src/caffe/layers/x.cpp").write_text(
        "// REGISTER_LAYER_CLASS(BN);\nREGISTER_LAYER_CLASS(BNX);\n")
    apply(tree)
    assert (tree / "src/caffe/layers/bn_layer.cpp").exists()


def test_bn_param_without_a_layer(apply, tmp_path):
    tree = make_tree(tmp_path / "caffe",
                     fields="  optional FillerParameter bn_param = 150;\n")
    refuses(apply, tree, says=["bn_param", "no layer registers BN"])


def test_own_large_margin_layer(apply, tmp_path):
    tree = make_tree(
        tmp_path / "caffe",
        fields="  optional FillerParameter "
               "largemargin_inner_product_param = 227;\n")
    (tree / "src/caffe/layers/lm.cpp").write_text(
        "REGISTER_LAYER_CLASS(LargeMarginInnerProduct);\n")
    refuses(apply, tree, says=["src/caffe/layers/lm.cpp",
                               "LargeMarginInnerProduct itself"])


# ---- Wrong, half-patched and edited trees ----

@pytest.mark.parametrize("missing", HOOKED)
def test_not_a_caffe_tree(apply, tree, missing):
    (tree / missing).unlink()
    before = snapshot(tree)
    assert missing in apply(tree, status=1).stdout
    assert snapshot(tree) == before


def test_no_such_folder(apply, tmp_path):
    assert "no such directory" in apply(tmp_path / "none", status=1).stdout


@pytest.mark.parametrize("folder", ["include/caffe/layers",
                                    "src/caffe/solvers"])
def test_older_than_rc3(apply, tree, folder):
    shutil.rmtree(tree / folder)
    assert "older than rc3" in apply(tree, status=1).stdout


def test_fork_with_another_layer_class(apply, tree):
    (tree / "include/caffe/layer.hpp").write_text("class LayerBase {};\n")
    assert "LayerBase" in apply(tree, status=1).stdout


@pytest.mark.parametrize("name, anchor", [
    ("src/caffe/proto/caffe.proto", "WindowDataParameter window_data_param"),
    ("src/caffe/proto/caffe.proto", "message PReLUParameter {"),
    ("CMakeLists.txt", "# ---[ Subdirectories"),
    ("Makefile", "include $(CONFIG_FILE)"),
    ("src/caffe/solver.cpp", "    RestoreSolverStateFromBinaryProto"),
    ("src/caffe/solver.cpp", "  iter_ = 0;"),
    ("src/caffe/solver.cpp", '#include "caffe/util/upgrade_proto.hpp"'),
    ("src/caffe/solvers/sgd_solver.cpp", '"current_step"'),
    ("tools/caffe.cpp", "caffe/util/signal_handler.h"),
    ("tools/caffe.cpp", "Running for"),
])
def test_missing_anchor(apply, tree, name, anchor):
    text = read(tree, name)
    assert anchor in text
    (tree / name).write_text(text.replace(anchor, "something else"))
    refuses(apply, tree, says=[name])


@pytest.mark.parametrize("name", HOOKED)
def test_half_patched_without_manifest(apply, tree, layer_files, name):
    native = {f: read(tree, f) for f in HOOKED}
    apply(tree)
    for file in [MANIFEST, *layer_files]:
        (tree / file).unlink()
    for file, text in native.items():
        if file != name:
            (tree / file).write_text(text)
    refuses(apply, tree, says=["half patched", name])
    refuses(apply, tree, "--revert", says=["half patched", name])


def test_layer_file_that_no_manifest_knows(apply, tree):
    (tree / "src/caffe/layers/bn_layer.cpp").write_text("// who knows\n")
    refuses(apply, tree, says=["half patched", "bn_layer.cpp"])


def test_edited_copy_is_not_lost(apply, tree):
    apply(tree)
    with open(tree / "src/caffe/layers/bn_layer.cpp", "a") as f:
        f.write("// an evening's work\n")
    refuses(apply, tree, says=["bn_layer.cpp", "was changed"])
    refuses(apply, tree, "--revert", says=["bn_layer.cpp", "was changed"])


def test_changed_hook(apply, tree):
    apply(tree)
    path = tree / "src/caffe/solver.cpp"
    path.write_text(path.read_text().replace("(this, ", "(NULL, "))
    refuses(apply, tree, says=["half patched", "solver.cpp"])


def test_files_taken_back_by_git_checkout(apply, tree):
    native = read(tree, "src/caffe/solver.cpp")
    before = snapshot(tree)
    apply(tree)
    after = snapshot(tree)
    (tree / "src/caffe/solver.cpp").write_text(native)
    apply(tree)
    assert snapshot(tree) == after
    (tree / "src/caffe/solver.cpp").write_text(native)
    apply("--revert", tree)
    assert snapshot(tree) == before


def test_users_edits_survive(apply, tree):
    """Work of the user in a patched file stays, patched and reverted."""
    apply(tree)
    path = tree / "src/caffe/proto/caffe.proto"
    path.write_text(path.read_text().replace(
        "message V1LayerParameter {", "// mine\nmessage V1LayerParameter {"))
    apply(tree)
    assert "// mine\n" in path.read_text()
    apply("--revert", tree)
    assert "// mine\n" in path.read_text()
    assert "BNParameter" not in path.read_text()


# ---- Renewal ----

def test_renewed_when_the_project_changes(apply, project, tree):
    apply(tree)
    with open(project / "src/caffe/layers/bn_layer.cpp", "a") as f:
        f.write("// new\n")
    done = apply("--check", tree)
    assert "would change src/caffe/layers/bn_layer.cpp" in done.stdout
    unchanged = (tree / "src/caffe/solver.cpp").stat().st_mtime_ns
    cmake = (tree / "CMakeLists.txt").stat().st_mtime_ns
    apply(tree)
    assert read(tree, "src/caffe/layers/bn_layer.cpp").endswith("// new\n")
    assert (tree / "src/caffe/solver.cpp").stat().st_mtime_ns == unchanged
    assert (tree / "CMakeLists.txt").stat().st_mtime_ns == cmake


def test_a_new_source_has_cmake_look_again(apply, project, tree):
    """CMake lists the sources when it runs, and runs where its file is new."""
    apply(tree)
    cmake = tree / "CMakeLists.txt"
    text = cmake.read_text()
    for change in ("write_text", "unlink"):
        before = cmake.stat().st_mtime_ns
        getattr(project / "src/caffe/util/more.cpp", change)(
            *["// new\n"] * (change == "write_text"))
        apply(tree)
        assert (tree / "src/caffe/util/more.cpp").exists() == (
            change == "write_text")
        assert cmake.stat().st_mtime_ns > before
        assert cmake.read_text() == text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has files of others")
def test_as_root_the_files_stay_the_users(apply, tree):
    for path in [tree, *tree.rglob("*")]:
        os.chown(path, 1234, 1234)
    apply(tree)
    assert {(path.stat().st_uid, path.stat().st_gid)
            for path in tree.rglob("*") if path.is_file()} == {(1234, 1234)}


def test_renewed_when_the_project_moves(project, tmp_path, tree):
    script = "caffe_patch/apply.sh"
    subprocess.run([project / script, tree], check=True)
    before = snapshot(tree)
    moved = tmp_path / "moved & away"
    project.rename(moved)
    subprocess.run([moved / script, tree], check=True)
    text = read(tree, "CMakeLists.txt")
    assert f'"{moved}/cmake/lsoftmax.cmake"' in text
    assert str(project) not in text
    subprocess.run([moved / script, "--revert", tree], check=True)
    assert set(snapshot(tree)) < set(before)


def test_a_new_patch_reaches_a_patched_tree(apply, project, tree):
    before = snapshot(tree)
    apply(tree)
    (project / "caffe_patch/compat/new.patch").write_text(
        "--- a/include/caffe/layer.hpp\n+++ b/include/caffe/layer.hpp\n"
        "@@ -1,1 +1,1 @@\n-class Layer {};\n+class Layer { int x; };\n")
    apply(tree)
    assert read(tree, "include/caffe/layer.hpp") == "class Layer { int x; };\n"
    apply("--revert", tree)
    assert snapshot(tree) == before


# ---- compat/ ----

def test_compat(apply, tree):
    apply(tree)
    text = read(tree, "src/caffe/util/io.cpp")
    assert "CV_LOAD" not in text and text.count("cv::IMREAD_COLOR") == 2
    assert "SetTotalBytesLimit(kProtoReadBytesLimit);" in text
    for name in ("layers/window_data_layer.cpp", "test/test_io.cpp"):
        text = read(tree, "src/caffe/" + name)
        assert "CV_LOAD" not in text and "cv::IMREAD" in text
    assert "as_gray=not color" in read(tree, "python/caffe/io.py")
    assert "prop." not in read(tree, "src/caffe/common.cpp")
    assert "thrust" not in read(tree,
                                "src/caffe/layers/cudnn_softmax_layer.cpp")
    assert "cudnn_version.h" in read(tree, "cmake/Cuda.cmake")


def test_compat_workers_that_restore_nothing(apply, tree):
    """rc3's lambda, on all GPUs but the first."""
    path = tree / "src/caffe/parallel.cpp"
    path.write_text("""#include "caffe/parallel.hpp"

    Caffe::set_root_solver(false);
    solver_.reset(new WorkerSolver<Dtype>(param, root_solver.get()));
    Caffe::set_root_solver(true);
""")
    before = snapshot(tree)
    apply(tree)
    text = path.read_text()
    assert '#include "caffe/util/resume_large_margin.hpp"\n' in text
    assert ("root_solver.get()));\n"
            "    ResumeLargeMargin(solver_.get(), root_solver.get());\n"
            "    Caffe::set_root_solver(true);\n") in text
    apply("--revert", tree)
    assert snapshot(tree) == before


def test_compat_getters_of_cudnn(apply, tree, tmp_path):
    """What cuDNN 8 took away names the fastest algorithm within the limit."""
    apply(tree)
    (tmp_path / "cudnn.h").write_text("""
typedef int cudnnStatus_t, cudnnHandle_t, cudnnConvolutionDescriptor_t;
typedef int cudnnTensorDescriptor_t, cudnnFilterDescriptor_t;
enum { CUDNN_STATUS_SUCCESS, CUDNN_STATUS_NOT_SUPPORTED = 9 };
#define CUDNN_VERSION 9000
#define FAMILY(Name, Algo, ALGO) \\
enum cudnnConvolution##Algo##Algo_t { Algo##0, Algo##1, Algo##2, \\
  CUDNN_CONVOLUTION_##ALGO##_ALGO_COUNT }; \\
struct cudnnConvolution##Algo##AlgoPerf_t { \\
  cudnnConvolution##Algo##Algo_t algo; int status; unsigned long memory; }; \\
inline int cudnnGetConvolution##Name##Algorithm_v7(int, int, int, int, int, \\
    int, int* count, cudnnConvolution##Algo##AlgoPerf_t* found) { \\
  *count = 3; \\
  found[0].algo = Algo##2; found[0].status = 0; found[0].memory = 100; \\
  found[1].algo = Algo##0; found[1].status = 9; found[1].memory = 0; \\
  found[2].algo = Algo##1; found[2].status = 0; found[2].memory = 10; \\
  return 0; \\
}
FAMILY(Forward, Fwd, FWD)
FAMILY(BackwardFilter, BwdFilter, BWD_FILTER)
FAMILY(BackwardData, BwdData, BWD_DATA)
""")
    (tmp_path / "main.cpp").write_text("""
#include <cstddef>
#include <cstdio>
#include "caffe/util/cudnn.hpp"
#define TRY(Name, Algo, ALGO) { \\
  cudnnConvolution##Algo##Algo_t algo; \\
  for (unsigned long limit = 0; limit < 1000; limit = limit * 10 + 10) { \\
    algo = Algo##0; \\
    int s = cudnnGetConvolution##Name##Algorithm(1, 2, 3, 4, 5, \\
        CUDNN_CONVOLUTION_##ALGO##_SPECIFY_WORKSPACE_LIMIT, limit, &algo); \\
    std::printf("%d:%d ", s, static_cast<int>(algo)); } }
int main() {
  TRY(Forward, Fwd, FWD)
  TRY(BackwardFilter, BwdFilter, BWD_FILTER)
  TRY(BackwardData, BwdData, BWD_DATA)
}
""")
    subprocess.run(["c++", "-std=c++11", "-Wall", "-Werror", f"-I{tmp_path}",
                    f"-I{tree}/include", tmp_path / "main.cpp",
                    "-o", tmp_path / "main"], check=True)
    out = subprocess.run([tmp_path / "main"], check=True, text=True,
                         stdout=subprocess.PIPE).stdout
    # Nothing fits 0 bytes; the smaller one fits 10, the fastest 110.
    assert out.split() == ["9:0", "0:1", "0:2"] * 3


def test_compat_leaves_alone_what_is_new_already(apply, tree):
    """A fork that was partly brought up to date gets the rest."""
    path = tree / "src/caffe/util/io.cpp"
    path.write_text(path.read_text()
                    .replace("Limit(kProtoReadBytesLimit, 536870912)",
                             "Limit(INT_MAX)")
                    .replace("CV_LOAD_IMAGE_", "cv::IMREAD_", 2))
    (tree / "python/caffe/io.py").unlink()
    before = snapshot(tree)
    apply(tree)
    text = path.read_text()
    assert "Limit(INT_MAX)" in text and "CV_LOAD" not in text
    assert text.count("cv::IMREAD_COLOR") == 2
    assert not (tree / "python/caffe/io.py").exists()
    apply("--revert", tree)
    assert snapshot(tree) == before


def test_compat_names_of_opencv_in_ssd(apply, tree):
    """OpenCV 4 without the names of old compiles; an older one is as it was."""
    cases = {"src/caffe/layers/video_data_layer.cpp":
             ("#include <opencv2/highgui/highgui.hpp>\n", "constants_c.h"),
             "src/caffe/util/im_transforms.cpp":
             ("#if CV_VERSION_MAJOR == 3\n#endif\n", "CV_VERSION_MAJOR >= 3\n"),
             "include/caffe/util/bbox_util.hpp":
             ("#include <opencv2/imgproc/imgproc.hpp>\n", "CV_FILLED")}
    for name, (text, _) in cases.items():
        (tree / name).write_text("#ifdef USE_OPENCV\n" + text + "#endif\n")
    before = snapshot(tree)
    apply(tree)
    for name, (_, new) in cases.items():
        text = read(tree, name)
        assert new in text and text.count("#if") == text.count("#endif")
    apply("--revert", tree)
    assert snapshot(tree) == before


@pytest.mark.parametrize("patch, name", [
    ("python_3", "parse_log.py"),
    ("python_3", "plot_training_log.py.example"),
    ("glog_0_6", "extract_seconds.py"),
    ("log_tools", "parse_log.sh"),
    ("log_tools", "plot_training_log.py.example"),
])
def test_compat_tools_for_logs(apply, project, tree, patch, name):
    """What a patch knows of a program is brought up to date, once."""
    parts = (project / f"caffe_patch/compat/{patch}.patch").read_text().split(
        "--- a/")[1:]
    hunks = [hunk.splitlines()[1:] for part in parts
             if part.startswith(f"tools/extra/{name}\n")
             for hunk in part.split("@@ -")[1:]]
    old, new = (["".join(line[1:] + "\n" for line in hunk
                         if line[:1] in (sign, " ")) for hunk in hunks]
                for sign in "-+")
    assert old and old != new
    path = tree / "tools/extra" / name
    path.parent.mkdir(parents=True)
    path.write_text("# a line\n".join(old))
    path.chmod(0o755)
    before = snapshot(tree)
    apply(tree)
    assert path.read_text() == "# a line\n".join(new)
    assert path.stat().st_mode & 0o111
    apply("--revert", tree)
    assert snapshot(tree) == before
    path.write_text("# a line\n".join(new))
    apply(tree)
    assert path.read_text() == "# a line\n".join(new)


@pytest.mark.parametrize("patch", sorted(
    path.relative_to(PROJECT).as_posix()
    for path in (PROJECT / "caffe_patch").rglob("*.patch")))
def test_patches_are_well_formed(patch):
    """One that git cannot read would look like one that nothing needs."""
    done = subprocess.run(
        ["git", "apply", "--numstat", "--unidiff-zero", PROJECT / patch],
        cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    lines = (PROJECT / patch).read_text().splitlines()
    assert len(done.stdout.splitlines()) == sum(
        line.startswith("+++ b/") for line in lines)


# ---- --check ----

def test_check_changes_nothing(apply, tree):
    before = snapshot(tree)
    done = apply("--check", tree)
    assert "would change src/caffe/proto/caffe.proto" in done.stdout
    assert "would add    src/caffe/layers/bn_layer.cpp" in done.stdout
    assert snapshot(tree) == before
    apply(tree)
    after = snapshot(tree)
    assert "Nothing to do" in apply("--check", tree).stdout
    done = apply("--check", "--revert", tree)
    assert "would delete src/caffe/layers/bn_layer.cpp" in done.stdout
    assert snapshot(tree) == after


def test_check_finds_errors(apply, tmp_path):
    tree = make_tree(tmp_path / "caffe",
                     fields="  optional FillerParameter x = 201;\n")
    refuses(apply, tree, "--check", "--bn-field", 201, says=["field 201"])


# ---- All or nothing ----

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@pytest.fixture
def tmpfs(tmp_path):
    mounted = []

    def mount(options):
        where = tmp_path / f"mnt{len(mounted)}"
        where.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs",
                           where], stderr=subprocess.DEVNULL).returncode:
            pytest.skip("tmpfs cannot be mounted here")
        mounted.append(where)
        return where
    yield mount
    for where in mounted:
        subprocess.run(["umount", where], check=True)


@needs_root
@pytest.mark.parametrize("left", range(0, 200, 16))
def test_full_disk(apply, tmpfs, left):
    """With LEFT KiB left on the disk: it all fits, or nothing changes."""
    where = tmpfs("size=1m")
    tree = make_tree(where / "caffe")
    before = snapshot(tree)
    stat = os.statvfs(where)
    fill = stat.f_bavail * stat.f_frsize - left * 1024
    (where / "fill").write_bytes(b"x" * fill)
    done = apply(tree, status=None)
    if done.returncode:
        assert NOTHING in done.stdout
        assert snapshot(tree) == before
        (where / "fill").unlink()
        apply(tree)
    elif left == 0:
        pytest.fail("a full disk took the patch")
    assert "ResumeLargeMargin" in read(tree, "src/caffe/solver.cpp")


@needs_root
def test_read_only_tree(apply, tmpfs):
    where = tmpfs("size=1m")
    tree = make_tree(where / "caffe")
    subprocess.run(["mount", "-o", "remount,ro", where], check=True)
    refuses(apply, tree, says=["cannot write", str(tree)])
    done = apply("--check", tree)
    assert "would change Makefile" in done.stdout


def wrapper_of_mv(tmp_path, at, action):
    """A PATH on which the AT-th mv does ACTION instead of its work."""
    folder = tmp_path / "bin"
    folder.mkdir()
    count = folder / "count"
    count.write_text("0")
    (folder / "mv").write_text(
        f"#!/bin/bash\nn=$(( $(cat {count}) + 1 ))\necho $n > {count}\n"
        f"if (( n == {at} )); then {action}; fi\nexec /bin/mv \"$@\"\n")
    (folder / "mv").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("at", [1, 2, 5, 9, 15])
def test_a_move_that_fails_is_undone(apply, tree, tmp_path, at):
    before = snapshot(tree)
    done = apply(tree, status=1,
                 env=wrapper_of_mv(tmp_path, at, "echo no >&2; exit 1"))
    assert NOTHING in done.stdout
    assert snapshot(tree) == before
    apply(tree)


@pytest.mark.parametrize("at", [1, 2, 5, 9, 15])
@pytest.mark.parametrize("mode", ["apply", "revert"])
def test_killed_at_any_time(apply, tree, tmp_path, at, mode):
    """The next run finishes what a killed one began."""
    native = snapshot(tree)
    apply(tree)
    patched = snapshot(tree)
    args = ["--revert"] if mode == "revert" else []
    if mode == "apply":
        apply("--revert", tree)
    done = apply(*args, tree, status=None,
                 env=wrapper_of_mv(tmp_path, at, "kill -9 $PPID; exit 1"))
    if mode == "apply":
        assert done.returncode == -signal.SIGKILL
    apply(*args, tree)
    assert snapshot(tree) == (native if mode == "revert" else patched)


def test_leftovers_of_a_killed_run_go_away(apply, tree):
    (tree / ".lsoftmax-stage.abc123").mkdir()
    (tree / ".lsoftmax-stage.abc123" / "x").write_text("x")
    apply(tree)
    assert not list(tree.glob(".lsoftmax-stage*"))


def test_two_at_once(apply, tree):
    before = snapshot(tree)
    holder = os.open(tree, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert "another apply.sh" in apply(tree, status=1).stdout
        assert snapshot(tree) == before
    finally:
        os.close(holder)


def test_incomplete_project(apply, project, tree):
    (project / "src/caffe/layers/bn_layer.cpp").unlink()
    refuses(apply, tree, says=["src/caffe/layers/bn_layer.cpp is missing"])


def test_usage(apply):
    assert "CAFFE_ROOT" in apply("--help").stdout
    assert "unknown option --frob" in apply("--frob", status=2).stdout
    assert "CAFFE_ROOT is missing" in apply(status=2).stdout
