#include <algorithm>
#include <cstdlib>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "caffe/filler.hpp"
#include "caffe/layers/large_margin_inner_product_layer.hpp"
#include "caffe/util/format.hpp"
#include "lsoftmax/blobs.hpp"

namespace caffe {

using lsoftmax::CheckShape;
using lsoftmax::Fail;
using lsoftmax::HasDiff;

namespace {

// Says which layer a blob is too large for; Caffe's own words do not.
template <typename Dtype>
void CheckSize(const Layer<Dtype>& layer, const string& what, int rows,
    const string& row, int columns, const string& column) {
  const int64_t size = static_cast<int64_t>(rows) * columns;
  const int most = std::numeric_limits<int>::max();
  if (size > most) {
    std::ostringstream message;
    message << rows << " " << row << " times " << columns << " " << column
        << " are " << size << " " << what << ", and a blob of Caffe holds "
        << most << " values at most";
    Fail(layer, message.str());
  }
}

}  // namespace

template <typename Dtype>
struct LargeMarginInnerProductLayer<Dtype>::State {
  explicit State(const string& param)
      : rust(lsoftmax::new_large_margin(rust::Slice<const uint8_t>(
            reinterpret_cast<const uint8_t*>(param.data()), param.size()))),
        has_labels(false), in_solver(false), takes_plain_diff(true) {}

  lsoftmax::MarginSizes Reshape(const vector<Blob<Dtype>*>& bottom) {
    has_labels = bottom.size() > 1;
    const vector<int>& features = bottom[0]->shape();
    const vector<int>& labels = bottom[has_labels ? 1 : 0]->shape();
    const lsoftmax::MarginSizes sizes = lsoftmax::reshape(*rust,
        rust::Slice<const int32_t>(features.data(), features.size()),
        has_labels, rust::Slice<const int32_t>(labels.data(), labels.size()));
    scratch.Reshape(sizes.device_bytes);
    return sizes;
  }

  rust::Box<lsoftmax::LargeMarginInnerProduct> rust;
  bool has_labels;
  // Whether the layer is in a solver's training net, and whether what is in the
  // gradient of the third top is one.
  bool in_solver, takes_plain_diff;
  // What a forward pass on the GPU leaves to the backward pass.
  lsoftmax::Scratch scratch;
};

template <typename Dtype>
LargeMarginInnerProductLayer<Dtype>::~LargeMarginInnerProductLayer() {
#ifndef CPU_ONLY
  // After the last batch no call is left that would report its bad label.
  if (!state_) { return; }
  try {
    lsoftmax::finish(*state_->rust);
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
  }
#endif  // CPU_ONLY
}

template <typename Dtype>
void LargeMarginInnerProductLayer<Dtype>::LayerSetUp(
    const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
  lsoftmax::LogVersion();
  if (this->layer_param_.loss_weight_size() > 1
      && this->layer_param_.loss_weight(1) != 0) {
    Fail(*this, "loss_weight of the second top must be 0: lambda follows the "
        "passes alone, no gradient goes through it");
  }
  for (int i = 0; i < top.size(); ++i) {
    if (std::find(bottom.begin(), bottom.end(), top[i]) != bottom.end()) {
      Fail(*this, "top " + format_int(i) + " is one of the bottoms: the layer "
          "does not work in place");
    }
  }
  const LargeMarginInnerProductParameter& param =
      this->layer_param_.largemargin_inner_product_param();
  vector<int> weight_shape(2);
  try {
    state_.reset(new State(param.SerializeAsString()));
    const lsoftmax::MarginSizes sizes = state_->Reshape(bottom);
    weight_shape[0] = sizes.classes;
    weight_shape[1] = sizes.features;
    // With several GPUs each has its layer: one of them tells.
    if (this->phase_ == TRAIN && bottom.size() > 1 && Caffe::root_solver()) {
      const char* const every = getenv("LSOFTMAX_LOG_EVERY");
      state_->rust->log_every(rust::String::lossy(every ? every : ""));
    }
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
  }
  CheckSize(*this, "weights", weight_shape[0], "classes", weight_shape[1],
      "features");
  Warn(bottom.size() > 1, top.size() > 2);
  if (this->blobs_.size() > 0) {
    LOG(INFO) << "Skipping parameter initialization";
    const Blob<Dtype>& weight = *this->blobs_[0];
    if (this->blobs_.size() != 1 || weight.shape() != weight_shape) {
      Fail(*this, "the net's own blobs must be one of shape "
          + Blob<Dtype>(weight_shape).shape_string() + ", not "
          + format_int(this->blobs_.size()) + ", the first of shape "
          + weight.shape_string());
    }
  } else {
    this->blobs_.resize(1);
    this->blobs_[0].reset(new Blob<Dtype>(weight_shape));
    // A filler divides by the fan-in and has nothing to fill without features.
    if (this->blobs_[0]->count() > 0) {
      shared_ptr<Filler<Dtype> > weight_filler(
          GetFiller<Dtype>(param.weight_filler()));
      weight_filler->Fill(this->blobs_[0].get());
    }
  }
  this->param_propagate_down_.resize(this->blobs_.size(), true);
}

template <typename Dtype>
void LargeMarginInnerProductLayer<Dtype>::Warn(bool labels,
    bool plain_logits) const {
  const int margin = state_->rust->margin();
  if (margin == 1 || !Caffe::root_solver()) { return; }
  const string layer =
      string(type()) + " layer '" + this->layer_param_.name() + "' of the ";
  const LargeMarginInnerProductParameter& param =
      this->layer_param_.largemargin_inner_product_param();
  // A prototxt that was made of a snapshot's model.
  LOG_IF(WARNING, this->phase_ == TRAIN && labels
      && param.passes() > param.iteration()) << layer << "TRAIN phase begins "
      << "after " << passes() << " forward passes, lambda = " << lambda()
      << ", as the prototxt has passes, which a snapshot wrote. Delete it to "
      << "begin at iteration " << param.iteration();
  LOG_IF(WARNING, this->phase_ == TRAIN && !labels) << layer << "TRAIN phase "
      << "has no labels, so it trains as InnerProduct does, without the margin "
      << "of " << margin << ". Give it the labels as a second bottom";
  LOG_IF(WARNING, this->phase_ == TEST && labels && !plain_logits) << layer
      << "TEST phase has a margin: Accuracy by its first top counts as wrong "
      << "what a deployed net gets right. Give it a third top, the logits "
      << "without margin, for Accuracy, or include it in the TRAIN phase only, "
      << "beside one of the same name with type: SINGLE in the TEST phase";
}

template <typename Dtype>
void LargeMarginInnerProductLayer<Dtype>::Reshape(
    const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
  vector<int> top_shape = bottom[0]->shape();
  vector<int> weight_shape(2);
  try {
    const lsoftmax::MarginSizes sizes = state_->Reshape(bottom);
    top_shape.resize(sizes.axis + 1);
    top_shape[sizes.axis] = sizes.classes;
    weight_shape[0] = sizes.classes;
    weight_shape[1] = sizes.features;
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
  }
  CheckShape(*this, "class weights", *this->blobs_[0], weight_shape);
  CheckSize(*this, "logits", bottom[0]->count(0, top_shape.size() - 1),
      "samples", top_shape.back(), "classes");
  top[0]->Reshape(top_shape);
  if (top.size() > 1) { top[1]->Reshape(vector<int>(1, 1)); }
  if (top.size() > 2) { top[2]->Reshape(top_shape); }
}

template <typename Dtype>
template <class Memory>
void LargeMarginInnerProductLayer<Dtype>::ForwardIn(
    const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
  lsoftmax::MarginForward pass = lsoftmax::MarginForward();
  pass.memory = Memory::value;
  pass.dtype = lsoftmax::TypeOf<Dtype>::value;
  pass.features = Memory::Data(bottom[0]);
  if (bottom.size() > 1) { pass.labels = Memory::Data(bottom[1]); }
  pass.weights = Memory::Data(this->blobs_[0].get());
  pass.logits = Memory::MutableData(top[0]);
  if (top.size() > 2) { pass.plain = Memory::MutableData(top[2]); }
  pass.scratch = Memory::Of(&state_->scratch);
  try {
    lsoftmax::forward(*state_->rust, typename Memory::Blas(), pass);
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
  }
  WriteLambda(top);
  LogDiagnosis(bottom, top);
}

template <typename Dtype>
void LargeMarginInnerProductLayer<Dtype>::WriteLambda(
    const vector<Blob<Dtype>*>& top) const {
  if (top.size() > 1) {
    top[1]->mutable_cpu_data()[0] = static_cast<Dtype>(state_->rust->lambda());
  }
}

template <typename Dtype>
void LargeMarginInnerProductLayer<Dtype>::LogDiagnosis(
    const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) const {
  if (!state_->rust->diagnosis_is_due()) { return; }
  // In GPU mode, this is where the host waits for the device.
  typedef lsoftmax::HostMemory Memory;
  lsoftmax::MarginDiagnosis pass = lsoftmax::MarginDiagnosis();
  pass.dtype = lsoftmax::TypeOf<Dtype>::value;
  pass.features = Memory::Data(bottom[0]);
  pass.labels = Memory::Data(bottom[1]);
  pass.weights = Memory::Data(this->blobs_[0].get());
  pass.logits = Memory::Data(top[0]);
  string line;
  try {
    line = std::string(lsoftmax::diagnose(*state_->rust, pass));
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
  }
  LOG(INFO) << type() << " layer '" << this->layer_param_.name() << "': "
      << line;
}

template <typename Dtype>
template <class Memory>
void LargeMarginInnerProductLayer<Dtype>::BackwardIn(
    const vector<Blob<Dtype>*>& top, const vector<bool>& propagate_down,
    const vector<Blob<Dtype>*>& bottom) {
  if (propagate_down.size() > 1 && propagate_down[1]) {
    Fail(*this, "cannot backpropagate to label inputs");
  }
  Blob<Dtype>* weight = this->blobs_[0].get();
  lsoftmax::MarginBackward pass = lsoftmax::MarginBackward();
  pass.memory = Memory::value;
  pass.dtype = lsoftmax::TypeOf<Dtype>::value;
  pass.logits_diff = Memory::MutableDiff(top[0]);
  if (top.size() > 2 && state_->takes_plain_diff && HasDiff(top[2])) {
    pass.plain_diff = Memory::Diff(top[2]);
  }
  pass.features = Memory::Data(bottom[0]);
  pass.weights = Memory::Data(weight);
  if (propagate_down[0]) {
    pass.features_diff = Memory::MutableDiff(bottom[0]);
  }
  if (this->param_propagate_down_[0]) {
    pass.weights_diff = Memory::MutableDiff(weight);
  }
  pass.scratch = Memory::Of(&state_->scratch);
  try {
    lsoftmax::backward(*state_->rust, typename Memory::Blas(), pass);
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
  }
}

template <typename Dtype>
void LargeMarginInnerProductLayer<Dtype>::Forward_cpu(
    const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
  ForwardIn<lsoftmax::HostMemory>(bottom, top);
}

template <typename Dtype>
void LargeMarginInnerProductLayer<Dtype>::Backward_cpu(
    const vector<Blob<Dtype>*>& top, const vector<bool>& propagate_down,
    const vector<Blob<Dtype>*>& bottom) {
  BackwardIn<lsoftmax::HostMemory>(top, propagate_down, bottom);
}

#ifdef CPU_ONLY
STUB_GPU(LargeMarginInnerProductLayer);
#else
template <typename Dtype>
void LargeMarginInnerProductLayer<Dtype>::Forward_gpu(
    const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
  ForwardIn<lsoftmax::DeviceMemory>(bottom, top);
}

template <typename Dtype>
void LargeMarginInnerProductLayer<Dtype>::Backward_gpu(
    const vector<Blob<Dtype>*>& top, const vector<bool>& propagate_down,
    const vector<Blob<Dtype>*>& bottom) {
  BackwardIn<lsoftmax::DeviceMemory>(top, propagate_down, bottom);
}
#endif  // CPU_ONLY

template <typename Dtype>
void LargeMarginInnerProductLayer<Dtype>::ToProto(LayerParameter* param,
    bool write_diff) {
  Layer<Dtype>::ToProto(param, write_diff);
  // Other nets, of pycaffe for example, know nothing of the training's passes
  // behind a model that they have read.
  if (state_->in_solver) {
    param->mutable_largemargin_inner_product_param()->set_passes(passes());
  }
}

template <typename Dtype>
void LargeMarginInnerProductLayer<Dtype>::JoinSolver(bool takes_plain_diff) {
  state_->in_solver = true;
  state_->takes_plain_diff = takes_plain_diff;
}

template <typename Dtype>
void LargeMarginInnerProductLayer<Dtype>::Resume(int64_t passes) {
  state_->rust->resume(passes);
}

template <typename Dtype>
int64_t LargeMarginInnerProductLayer<Dtype>::passes() const {
  return state_->rust->passes();
}

template <typename Dtype>
bool LargeMarginInnerProductLayer<Dtype>::has_margin() const {
  return state_->has_labels && state_->rust->margin() > 1;
}

template <typename Dtype>
double LargeMarginInnerProductLayer<Dtype>::lambda() const {
  return state_->rust->lambda();
}

INSTANTIATE_CLASS(LargeMarginInnerProductLayer);
REGISTER_LAYER_CLASS(LargeMarginInnerProduct);

}  // namespace caffe
