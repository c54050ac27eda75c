#include <algorithm>
#include <fstream>  // NOLINT(readability/streams)
#include <sstream>
#include <string>
#include <vector>

#include "caffe/layers/large_margin_inner_product_layer.hpp"
#include "caffe/sgd_solvers.hpp"
#include "caffe/util/format.hpp"
#include "caffe/util/io.hpp"
#include "caffe/util/math_functions.hpp"
#include "caffe/util/resume_large_margin.hpp"

namespace caffe {

namespace {

// Where a .solverstate.h5 has what a .caffemodel has in the fields passes and
// iteration: in groups with an attribute a layer.
const char* const kPassesGroup = "large_margin_passes";
const char* const kIterationGroup = "large_margin_iteration";

// What a snapshot says of the margin layer of one name.
struct SavedLayer {
  SavedLayer() : found(false), has_passes(false), passes(0), iteration(0) {}
  bool found;
  bool has_passes;
  int64_t passes;
  // What the prototxt said then.
  int64_t iteration;
};

// A layer of the net if it is a margin layer, else NULL.
template <typename Dtype>
LargeMarginInnerProductLayer<Dtype>* MarginLayer(const Net<Dtype>& net,
    int layer) {
  return dynamic_cast<LargeMarginInnerProductLayer<Dtype>*>(
      net.layers()[layer].get());
}

template <typename Dtype>
vector<LargeMarginInnerProductLayer<Dtype>*> MarginLayers(
    const Net<Dtype>& net) {
  vector<LargeMarginInnerProductLayer<Dtype>*> layers;
  for (int i = 0; i < net.layers().size(); ++i) {
    if (MarginLayer(net, i)) { layers.push_back(MarginLayer(net, i)); }
  }
  return layers;
}

template <typename Dtype>
int64_t StartOf(const LargeMarginInnerProductLayer<Dtype>& layer) {
  return layer.layer_param().largemargin_inner_product_param().iteration();
}

bool EndsWith(const string& text, const string& end) {
  return text.size() >= end.size()
      && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// The margin layers of a snapshot, asked for by name.
class Snapshot {
 public:
  virtual ~Snapshot() {}
  virtual SavedLayer Find(const string& name) const = 0;
};

class BinarySnapshot : public Snapshot {
 public:
  explicit BinarySnapshot(const string& model_file) {
    // A solver state need not name a model.
    if (model_file.size()) {
      ReadProtoFromBinaryFileOrDie(model_file, &model_);
    }
  }
  virtual SavedLayer Find(const string& name) const {
    SavedLayer saved;
    for (int i = 0; i < model_.layer_size() && !saved.found; ++i) {
      const LayerParameter& layer = model_.layer(i);
      if (layer.name() == name
          && layer.has_largemargin_inner_product_param()) {
        const LargeMarginInnerProductParameter& param =
            layer.largemargin_inner_product_param();
        saved.found = true;
        saved.has_passes = param.has_passes();
        saved.passes = param.passes();
        saved.iteration = param.iteration();
      }
    }
    return saved;
  }

 private:
  NetParameter model_;
};

#ifdef H5_VERS_MAJOR
class HDF5Snapshot : public Snapshot {
 public:
  // A file that is not there is a snapshot that says nothing.
  explicit HDF5Snapshot(const string& state_file)
      : file_(std::ifstream(state_file.c_str()).good()
            ? H5Fopen(state_file.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT) : -1) {}
  virtual ~HDF5Snapshot() {
    if (file_ >= 0) { H5Fclose(file_); }
  }
  virtual SavedLayer Find(const string& name) const {
    SavedLayer saved;
    saved.found = saved.has_passes = Read(kPassesGroup, name, &saved.passes)
        && Read(kIterationGroup, name, &saved.iteration);
    return saved;
  }

 private:
  bool Read(const char* group, const string& name, int64_t* value) const {
    if (file_ < 0 || H5Lexists(file_, group, H5P_DEFAULT) <= 0
        || H5Aexists_by_name(file_, group, name.c_str(), H5P_DEFAULT) <= 0) {
      return false;
    }
    long long read;  // NOLINT(runtime/int)
    CHECK_GE(H5LTget_attribute_long_long(file_, group, name.c_str(), &read), 0)
        << "Error reading " << group << " of layer '" << name << "'";
    *value = read;
    return true;
  }

  const hid_t file_;
};
#endif  // H5_VERS_MAJOR

// The snapshot of which `state_file` is the solver's part.
shared_ptr<Snapshot> SnapshotOfState(const string& state_file) {
  // By the end of its name, as Solver::Restore tells them apart.
  if (EndsWith(state_file, ".h5")) {
#ifdef H5_VERS_MAJOR
    return shared_ptr<Snapshot>(new HDF5Snapshot(state_file));
#endif  // H5_VERS_MAJOR
  }
  SolverState state;
  ReadProtoFromBinaryFileOrDie(state_file, &state);
  return shared_ptr<Snapshot>(new BinarySnapshot(state.learned_net()));
}

// The snapshot of which `model_file` is the net's part.
shared_ptr<Snapshot> SnapshotOfModel(const string& model_file) {
#ifdef H5_VERS_MAJOR
  if (H5Fis_hdf5(model_file.c_str()) > 0) {
    const string model = ".caffemodel.h5";
    const string state = EndsWith(model_file, model)
        ? model_file.substr(0, model_file.size() - model.size())
            + ".solverstate.h5" : "";
    return shared_ptr<Snapshot>(new HDF5Snapshot(state));
  }
#endif  // H5_VERS_MAJOR
  return shared_ptr<Snapshot>(new BinarySnapshot(model_file));
}

// Sets the layer's count and says so; `source` is where `passes` is from.
template <typename Dtype>
void Resume(LargeMarginInnerProductLayer<Dtype>* layer, int64_t passes,
    const string& where, string source) {
  layer->Resume(passes);
  if (layer->passes() > passes) {
    std::ostringstream by_hand;
    by_hand << "iteration of the prototxt, above the " << passes << " "
        << source;
    source = by_hand.str();
  }
  // The TEST layers of most nets have no margin, and no lambda to speak of.
  LOG_IF(INFO, Caffe::root_solver() && (layer->has_margin()
      || layer->layer_param().phase() == TRAIN)) << layer->type() << " layer '"
      << layer->layer_param().name() << "'" << where << " resumes after "
      << layer->passes() << " forward passes (" << source << "), lambda = "
      << layer->lambda();
}

// The tests that an uninterrupted run has made before it goes on at `iter`.
int64_t TestsBefore(int iter, const SolverParameter& param) {
  if (iter <= 0 || param.test_interval() <= 0) { return 0; }
  return (iter - 1) / param.test_interval()
      + (param.test_initialization() ? 1 : 0);
}

// What no gradient and no decay may move has no momentum either. A snapshot
// may bring one: where the prototxt names no multipliers of BN's moving
// statistics, the original Caffe decays them.
template <typename Dtype>
void StopMovingStatistics(Solver<Dtype>* solver) {
  SGDSolver<Dtype>* const sgd = dynamic_cast<SGDSolver<Dtype>*>(solver);
  if (!sgd) { return; }
  const Net<Dtype>& net = *solver->net();
  const vector<Blob<Dtype>*>& params = net.learnable_params();
  for (int i = 0; i < net.layers().size(); ++i) {
    if (string(net.layers()[i]->type()) != "BN") { continue; }
    const vector<shared_ptr<Blob<Dtype> > >& blobs = net.layers()[i]->blobs();
    for (int j = 0; j < blobs.size(); ++j) {
      const int id = std::find(params.begin(), params.end(), blobs[j].get())
          - params.begin();
      if (id == params.size() || net.params_lr()[id] != 0) { continue; }
      // Some solvers have a second history behind the first.
      for (int k = id; k < sgd->history().size(); k += params.size()) {
        Blob<Dtype>* const history = sgd->history()[k].get();
        caffe_set(history->count(), Dtype(0), history->mutable_cpu_data());
      }
    }
  }
}

// The name that shares the weights of a layer within its net, or "".
template <typename Dtype>
string WeightName(const Layer<Dtype>& layer) {
  return layer.layer_param().param_size() > 0
      ? layer.layer_param().param(0).name() : "";
}

// Whether what is in the gradient of the layer's third top is one. Some layers
// write there without being led to by a loss: on the GPU Accuracy and, before
// BVLC Caffe's #6202, a loss with loss_weight 0. Where no layer has the top, it
// is its user's who writes, by pycaffe for example.
template <typename Dtype>
bool TakesPlainDiff(const Net<Dtype>& net, int layer) {
  const vector<int>& tops = net.top_ids(layer);
  if (tops.size() < 3) { return false; }
  if (net.layers()[layer]->loss(2) != 0) { return true; }
  bool is_bottom = false;
  for (int i = 0; i < net.layers().size(); ++i) {
    const vector<int>& bottoms = net.bottom_ids(i);
    for (int j = 0; j < bottoms.size(); ++j) {
      if (bottoms[j] != tops[2]) { continue; }
      if (net.bottom_need_backward()[i][j]) { return true; }
      is_bottom = true;
    }
  }
  return !is_bottom;
}

// Hardly anybody uses the gradients by the parameters of a test net; for those
// of slope and bias, BN would keep x-hat in each pass in place.
template <typename Dtype>
void KeepNothingForBackward(const Net<Dtype>& test_net) {
  for (int i = 0; i < test_net.layers().size(); ++i) {
    Layer<Dtype>* const layer = test_net.layers()[i].get();
    if (string(layer->type()) != "BN"
        || test_net.bottom_ids(i) != test_net.top_ids(i)) { continue; }
    for (int j = 0; j < layer->blobs().size(); ++j) {
      layer->set_param_propagate_down(j, false);
    }
  }
}

// Whether a layer of a test net looks like one that is to have the weights of a
// margin layer of the training net: by their name or by their shape.
template <typename Dtype>
bool IsMeantFor(Layer<Dtype>* test_layer, Layer<Dtype>* layer) {
  const string weights = WeightName(*test_layer);
  return (weights.size() && WeightName(*layer) == weights)
      || (test_layer->blobs().size() > 0
          && test_layer->blobs()[0]->shape() == layer->blobs()[0]->shape());
}

// Between two nets Caffe shares the weights by the layers' names alone.
template <typename Dtype>
void WarnOfUnsharedWeights(Solver<Dtype>* solver) {
  const Net<Dtype>& net = *solver->net();
  const vector<LargeMarginInnerProductLayer<Dtype>*> layers =
      MarginLayers(net);
  for (int i = 0; i < solver->test_nets().size(); ++i) {
    const Net<Dtype>& test_net = *solver->test_nets()[i];
    for (int j = 0; j < test_net.layers().size(); ++j) {
      Layer<Dtype>* const layer = test_net.layers()[j].get();
      const string& name = layer->layer_param().name();
      if (net.has_layer(name)) { continue; }
      for (int k = 0; k < layers.size(); ++k) {
        const string& meant = layers[k]->layer_param().name();
        if (test_net.has_layer(meant) || !IsMeantFor<Dtype>(layer, layers[k])) {
          continue;
        }
        LOG_IF(WARNING, Caffe::root_solver()) << layer->type() << " layer '"
            << name << "' of test net #" << i << " never gets the weights that "
            << "are trained: between two nets Caffe shares them by the layer's "
            << "name, and a name in param counts within one net only. Call it '"
            << meant << "', like the layer of the training net";
        break;
      }
    }
  }
}

}  // namespace

template <typename Dtype>
void PrepareLayers(Solver<Dtype>* solver) {
  const Net<Dtype>& net = *solver->net();
  for (int i = 0; i < net.layers().size(); ++i) {
    if (MarginLayer(net, i)) {
      MarginLayer(net, i)->JoinSolver(TakesPlainDiff(net, i));
    }
  }
  for (int i = 0; i < solver->test_nets().size(); ++i) {
    KeepNothingForBackward(*solver->test_nets()[i]);
  }
  WarnOfUnsharedWeights(solver);
}

template <typename Dtype>
void ResumeLargeMargin(Solver<Dtype>* solver, const string& state_file) {
  typedef vector<LargeMarginInnerProductLayer<Dtype>*> Layers;
  StopMovingStatistics(solver);
  const SolverParameter& param = solver->param();
  const Layers layers = MarginLayers(*solver->net());
  vector<Layers> test_layers;
  bool any = !layers.empty();
  for (int i = 0; i < solver->test_nets().size(); ++i) {
    test_layers.push_back(MarginLayers(*solver->test_nets()[i]));
    any |= !test_layers.back().empty();
  }
  if (!any) { return; }

  const shared_ptr<Snapshot> snapshot = SnapshotOfState(state_file);
  for (int i = 0; i < layers.size(); ++i) {
    const string& name = layers[i]->layer_param().name();
    const SavedLayer saved = snapshot->Find(name);
    if (saved.has_passes) {
      Resume(layers[i], saved.passes, "", "of the snapshot");
    } else {
      Resume(layers[i], static_cast<int64_t>(solver->iter())
          * param.iter_size(), "", "of the solver's iterations: the snapshot "
          "has no count of a layer '" + name + "'");
    }
  }
  // Test nets are in no snapshot.
  for (int i = 0; i < test_layers.size(); ++i) {
    const int64_t passes = TestsBefore(solver->iter(), param)
        * param.test_iter(i);
    for (int j = 0; j < test_layers[i].size(); ++j) {
      LargeMarginInnerProductLayer<Dtype>* const layer = test_layers[i][j];
      const string& name = layer->layer_param().name();
      // An iteration that a user set since then is not where it started.
      const SavedLayer saved = snapshot->Find(name);
      int64_t start = saved.found ? StartOf(*layer) : 0;
      for (int k = 0; k < layers.size(); ++k) {
        if (saved.found && layers[k]->layer_param().name() == name
            && StartOf(*layers[k]) != saved.iteration) {
          start = saved.iteration;
        }
      }
      Resume(layer, start + passes, " of test net #" + format_int(i),
          "of the tests so far");
    }
  }
}

template <typename Dtype>
void ResumeLargeMargin(Solver<Dtype>* worker, Solver<Dtype>* root) {
  const vector<LargeMarginInnerProductLayer<Dtype>*> layers =
      MarginLayers(*worker->net());
  const vector<LargeMarginInnerProductLayer<Dtype>*> roots =
      MarginLayers(*root->net());
  // Both are made of one net.
  for (int i = 0; i < layers.size() && i < roots.size(); ++i) {
    layers[i]->Resume(roots[i]->passes());
  }
}

template <typename Dtype>
void ResumeLargeMargin(Net<Dtype>* net, const string& model_file) {
  KeepNothingForBackward(*net);
  const vector<LargeMarginInnerProductLayer<Dtype>*> layers =
      MarginLayers(*net);
  if (layers.empty()) { return; }
  const shared_ptr<Snapshot> snapshot = SnapshotOfModel(model_file);
  for (int i = 0; i < layers.size(); ++i) {
    const SavedLayer saved =
        snapshot->Find(layers[i]->layer_param().name());
    if (saved.has_passes) {
      Resume(layers[i], saved.passes, "", "of the model");
    }
  }
}

#ifdef H5_VERS_MAJOR
template <typename Dtype>
void SaveLargeMargin(const Net<Dtype>& net, hid_t state_file) {
  const vector<LargeMarginInnerProductLayer<Dtype>*> layers =
      MarginLayers(net);
  if (layers.empty()) { return; }
  const char* const groups[] = {kPassesGroup, kIterationGroup};
  for (int g = 0; g < 2; ++g) {
    const hid_t group = H5Gcreate2(state_file, groups[g], H5P_DEFAULT,
        H5P_DEFAULT, H5P_DEFAULT);
    CHECK_GE(group, 0) << "Error saving " << groups[g];
    for (int i = 0; i < layers.size(); ++i) {
      const string& name = layers[i]->layer_param().name();
      const long long value =  // NOLINT(runtime/int)
          g == 0 ? layers[i]->passes() : StartOf(*layers[i]);
      CHECK_GE(H5LTset_attribute_long_long(state_file, groups[g],
          name.c_str(), &value, 1), 0) << "Error saving " << groups[g]
          << " of layer '" << name << "'";
    }
    H5Gclose(group);
  }
}

template void SaveLargeMargin<float>(const Net<float>& net, hid_t state_file);
template void SaveLargeMargin<double>(const Net<double>& net,
    hid_t state_file);
#endif  // H5_VERS_MAJOR

template void PrepareLayers<float>(Solver<float>* solver);
template void PrepareLayers<double>(Solver<double>* solver);
template void ResumeLargeMargin<float>(Solver<float>* solver,
    const string& state_file);
template void ResumeLargeMargin<double>(Solver<double>* solver,
    const string& state_file);
template void ResumeLargeMargin<float>(Solver<float>* worker,
    Solver<float>* root);
template void ResumeLargeMargin<double>(Solver<double>* worker,
    Solver<double>* root);
template void ResumeLargeMargin<float>(Net<float>* net,
    const string& model_file);
template void ResumeLargeMargin<double>(Net<double>* net,
    const string& model_file);

}  // namespace caffe
