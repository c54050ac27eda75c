"""Small stand-ins for Caffe trees.

They have what caffe_patch/apply.sh holds on to, at the line numbers and
between the neighbours of the version they stand for, and nothing else.
"""

# Per version: lines before the hooks in caffe.proto, CMakeLists.txt and
# solver.cpp, and whether CMake's link lists carry PUBLIC and PRIVATE.
VERSIONS = {
    "rc3": dict(proto=395, cmake=67, solver=471, keywords=False),
    "rc4": dict(proto=407, cmake=70, solver=463, keywords=False),
    "rc5": dict(proto=406, cmake=87, solver=463, keywords=True),
    "1.0": dict(proto=406, cmake=88, solver=462, keywords=True),
    "master": dict(proto=422, cmake=91, solver=479, keywords=True),
}


def proto(lines, fields=""):
    head = """syntax = "proto2";
package caffe;
message FillerParameter { optional string type = 1; }
message WindowDataParameter { optional string source = 1; }
// bn_param = 201; in a comment is no field.
message LayerParameter {
  optional string name = 1; // the layer name
  enum Kind { A = 201; }
  /* optional X x = 202; */
"""
    pad = lines - head.count("\n") - fields.count("\n")
    return (head + fields + "  // a line\n" * pad +
            "  optional WindowDataParameter window_data_param = 129;\n}\n\n"
            "message V1LayerParameter {\n"
            "  optional WindowDataParameter window_data_param = 20;\n"
            "  optional int32 other = 201;\n}\n\n"
            "message PReLUParameter {\n"
            "  optional FillerParameter filler = 1;\n}\n")


SOLVER = """#include <cstdio>

#include <string>

#include "caffe/solver.hpp"
#include "caffe/util/io.hpp"
#include "caffe/util/upgrade_proto.hpp"

namespace caffe {
template <typename Dtype>
void Solver<Dtype>::Init(const SolverParameter& param) {
  InitTestNets();
  iter_ = 0;
  current_step_ = 0;
}
%s
template <typename Dtype>
void Solver<Dtype>::Restore(const char* state_file) {
  string state_filename(state_file);
  if (IsHDF5(state_filename)) {
    RestoreSolverStateFromHDF5(state_filename);
  } else {
    RestoreSolverStateFromBinaryProto(state_filename);
  }
}

template <typename Dtype>
void Solver<Dtype>::Other() {
}

}  // namespace caffe
"""

SGD_SOLVER = """#include "caffe/util/io.hpp"
#include "caffe/util/upgrade_proto.hpp"

namespace caffe {
template <typename Dtype>
void SGDSolver<Dtype>::SnapshotSolverStateToHDF5(
    const string& model_filename) {
  hdf5_save_string(file_hid, "learned_net", model_filename);
  hdf5_save_int(file_hid, "current_step", this->current_step_);
  H5Fclose(file_hid);
}
}  // namespace caffe
"""

TOOL = """#include "caffe/caffe.hpp"
#include "caffe/util/signal_handler.h"

int test() {
  caffe_net.CopyTrainedLayersFrom(FLAGS_weights);
  LOG(INFO) << "Running for " << FLAGS_iterations << " iterations.";
}
"""

IO_CPP = """#include "caffe/util/io.hpp"
bool Read() {
  coded_input->SetTotalBytesLimit(kProtoReadBytesLimit, 536870912);
}
#ifdef USE_OPENCV
cv::Mat One() {
  int cv_read_flag = (is_color ? CV_LOAD_IMAGE_COLOR :
    CV_LOAD_IMAGE_GRAYSCALE);
}
cv::Mat Two() {
  int cv_read_flag = (is_color ? CV_LOAD_IMAGE_COLOR :
    CV_LOAD_IMAGE_GRAYSCALE);
}
#endif
"""

IO_PY = ("import skimage.io\n"
         "    img = skimage.img_as_float(skimage.io.imread(filename, "
         "as_grey=not color)).astype(np.float32)\n")

COMMON_CPP = """void Caffe::DeviceQuery() {
  LOG(INFO) << "Clock rate:                    " << prop.clockRate;
  LOG(INFO) << "Concurrent copy and execution: "
      << (prop.deviceOverlap ? "Yes" : "No");
  LOG(INFO) << "Kernel execution timeout:      "
      << (prop.kernelExecTimeoutEnabled ? "Yes" : "No");
}
"""


def make_tree(root, version="master", fields=""):
    v = VERSIONS[version]
    for folder in ("src/caffe/proto", "src/caffe/layers", "src/caffe/solvers",
                   "src/caffe/test", "src/caffe/util", "include/caffe/layers",
                   "include/caffe/util", "python/caffe", "cmake", "tools"):
        (root / folder).mkdir(parents=True)
    files = {
        "src/caffe/proto/caffe.proto": proto(v["proto"], fields),
        "CMakeLists.txt": "project(Caffe C CXX)\n" +
                          "# a line\n" * (v["cmake"] - 2) +
                          "\n# ---[ Subdirectories\nadd_subdirectory(src)\n",
        "Makefile": "PROJECT := caffe\n\nCONFIG_FILE := Makefile.config\n"
                    "# a line\nifeq ($(wildcard $(CONFIG_FILE)),)\n"
                    "$(error no config)\nendif\ninclude $(CONFIG_FILE)\n\n"
                    "BUILD_DIR_LINK := $(BUILD_DIR)\n",
        "src/caffe/solver.cpp":
            SOLVER % ("// a line\n" * (v["solver"] - SOLVER.count("\n"))),
        "src/caffe/solvers/sgd_solver.cpp": SGD_SOLVER,
        "tools/caffe.cpp": TOOL,
        "src/caffe/layers/window_data_layer.cpp":
            "// a line\n" * (290 if version == "rc3" else 293) +
            "        cv_img = cv::imread(image.first, CV_LOAD_IMAGE_COLOR);\n",
        "src/caffe/layers/relu_layer.cpp": "REGISTER_LAYER_CLASS(ReLU);\n",
        "src/caffe/util/io.cpp": IO_CPP,
        "src/caffe/test/test_io.cpp":
            "  int cv_read_flag = (is_color ? CV_LOAD_IMAGE_COLOR :\n"
            "    CV_LOAD_IMAGE_GRAYSCALE);\n",
        "src/caffe/common.cpp": COMMON_CPP,
        "src/caffe/layers/cudnn_softmax_layer.cpp":
            '#include <vector>\n#include "thrust/device_vector.h"\n',
        "include/caffe/util/cudnn.hpp":
            "#include <cudnn.h>\nnamespace caffe {\n}  // namespace caffe\n",
        "cmake/Cuda.cmake":
            "    file(READ ${CUDNN_INCLUDE}/cudnn.h "
            "CUDNN_VERSION_FILE_CONTENTS)\n",
        "include/caffe/layer.hpp": "class Layer {};\n",
        "include/caffe/layers/relu_layer.hpp": "// ReLU\n",
        "python/caffe/io.py": IO_PY,
    }
    for name, text in files.items():
        (root / name).write_text(text)
    (root / "Makefile").chmod(0o640)
    return root


def snapshot(root):
    """Every file of a tree: its bytes and its mode."""
    return {str(p.relative_to(root)): (p.read_bytes(), p.stat().st_mode)
            for p in sorted(root.rglob("*")) if p.is_file()}
