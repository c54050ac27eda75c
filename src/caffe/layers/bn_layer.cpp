#include <cmath>
#include <string>
#include <vector>

#include "caffe/filler.hpp"
#include "caffe/layers/bn_layer.hpp"
#include "caffe/util/format.hpp"
#include "caffe/util/math_functions.hpp"
#include "lsoftmax/blobs.hpp"

namespace caffe {

using lsoftmax::CheckShape;
using lsoftmax::Data;
using lsoftmax::Diff;
using lsoftmax::Fail;
using lsoftmax::MutableData;
using lsoftmax::MutableDiff;
#ifndef CPU_ONLY
using lsoftmax::GpuData;
using lsoftmax::GpuDiff;
using lsoftmax::MutableGpuData;
using lsoftmax::MutableGpuDiff;
#endif  // CPU_ONLY

namespace {

// The order of the blobs.
enum { kSlope, kBias, kMovingMean, kMovingInvStd, kBlobs };

const char* const kBlobNames[kBlobs] = {
    "slope", "bias", "moving mean", "moving inverse standard deviation"};

template <typename Dtype>
void Fill(const FillerParameter& param, Blob<Dtype>* blob) {
  shared_ptr<Filler<Dtype> > filler(GetFiller<Dtype>(param));
  filler->Fill(blob);
}

}  // namespace

template <typename Dtype>
struct BNLayer<Dtype>::State {
  State(const string& param, Phase phase)
      : rust(lsoftmax::new_batch_norm(rust::Slice<const uint8_t>(
            reinterpret_cast<const uint8_t*>(param.data()), param.size()),
            phase == TRAIN)), warned(false) {}

  // Returns the number of channels.
  int Reshape(const Blob<Dtype>* bottom) {
    const vector<int>& shape = bottom->shape();
    const lsoftmax::BnSizes sizes = lsoftmax::reshape(*rust,
        rust::Slice<const int32_t>(shape.data(), shape.size()));
#ifndef CPU_ONLY
    scratch.Reshape(sizes.device_bytes);
#endif  // CPU_ONLY
    return sizes.channels;
  }

  // A batch may have nothing to measure: said once, with what it does.
  void WarnOfConstantChannel(const BNLayer<Dtype>& layer) {
    const int channel = warned ? -1 : lsoftmax::constant_channel(*rust);
    if (channel < 0) { return; }
    warned = true;
    LOG_IF(WARNING, Caffe::root_solver()) << layer.type() << " layer '"
        << layer.layer_param().name() << "': all values of channel " << channel
        << " of a batch are the same. Its variance is 0, and such batches move "
        << "its moving inverse standard deviation, by which the TEST phase "
        << "normalizes, towards 1 / sqrt(eps) = "
        << 1 / std::sqrt(layer.layer_param().bn_param().eps())
        << ": use larger batches, a larger eps, or frozen: true";
  }

  rust::Box<lsoftmax::BatchNorm> rust;
  bool warned;
#ifndef CPU_ONLY
  // What a forward pass on the GPU leaves to the backward pass.
  lsoftmax::Scratch scratch;
#endif  // CPU_ONLY
};

template <typename Dtype>
void BNLayer<Dtype>::LayerSetUp(const vector<Blob<Dtype>*>& bottom,
    const vector<Blob<Dtype>*>& top) {
  lsoftmax::LogVersion();
  const BNParameter& param = this->layer_param_.bn_param();
  vector<int> shape(2, 1);
  try {
    state_.reset(new State(param.SerializeAsString(), this->phase_));
    shape[1] = state_->Reshape(bottom[0]);
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
  }

  if (this->blobs_.size() > 0) {
    LOG(INFO) << "Skipping parameter initialization";
    if (this->blobs_.size() != kBlobs) {
      Fail(*this, "the net's own blobs must be " + format_int(kBlobs)
          + ", not " + format_int(this->blobs_.size()));
    }
    for (int i = 0; i < kBlobs; ++i) {
      if (this->blobs_[i]->shape() != shape) {
        Fail(*this, string("the net's own blob of the ") + kBlobNames[i]
            + " must have shape " + Blob<Dtype>(shape).shape_string()
            + ", not " + this->blobs_[i]->shape_string());
      }
    }
  } else {
    this->blobs_.resize(kBlobs);
    for (int i = 0; i < kBlobs; ++i) {
      this->blobs_[i].reset(new Blob<Dtype>(shape));
    }
    FillerParameter one;
    one.set_value(1);
    Fill(param.has_slope_filler() ? param.slope_filler() : one,
        this->blobs_[kSlope].get());
    Fill(param.bias_filler(), this->blobs_[kBias].get());
    caffe_set(shape[1], Dtype(0),
        this->blobs_[kMovingMean]->mutable_cpu_data());
    caffe_set(shape[1], Dtype(1),
        this->blobs_[kMovingInvStd]->mutable_cpu_data());
  }
  this->param_propagate_down_.resize(this->blobs_.size(), true);

  // What forward passes move, or nothing may, is not the solver's; weight
  // decay would change even blobs that have no gradient.
  string overruled;
  while (this->layer_param_.param_size() < kBlobs) {
    this->layer_param_.add_param();
  }
  for (int i = 0; i < kBlobs; ++i) {
    const bool moving = i == kMovingMean || i == kMovingInvStd;
    if (!moving && !state_->rust->frozen()) { continue; }
    ParamSpec* spec = this->layer_param_.mutable_param(i);
    if ((spec->has_lr_mult() && spec->lr_mult() != 0)
        || (spec->has_decay_mult() && spec->decay_mult() != 0)) {
      overruled += (overruled.empty() ? "" : ", ") + string(kBlobNames[i]);
    }
    spec->set_lr_mult(0);
    spec->set_decay_mult(0);
  }
  // The solver does not look at the multipliers of a test net.
  LOG_IF(WARNING, !overruled.empty() && this->phase_ == TRAIN
      && Caffe::root_solver()) << type() << " layer '"
      << this->layer_param_.name() << "': lr_mult and decay_mult in the param "
      << "of its " << overruled << " are taken as 0: the solver does not "
      << "move " << (state_->rust->frozen() ? "what is frozen"
          : "the moving statistics, forward passes do");
}

template <typename Dtype>
void BNLayer<Dtype>::Reshape(const vector<Blob<Dtype>*>& bottom,
    const vector<Blob<Dtype>*>& top) {
  vector<int> shape(2, 1);
  try {
    shape[1] = state_->Reshape(bottom[0]);
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
  }
  for (int i = 0; i < kBlobs; ++i) {
    CheckShape(*this, kBlobNames[i], *this->blobs_[i], shape);
  }
  if (bottom[0] == top[0]) {
    // Takes memory only when it is first written.
    x_hat_.ReshapeLike(*bottom[0]);
  } else {
    top[0]->ReshapeLike(*bottom[0]);
  }
}

template <typename Dtype>
bool BNLayer<Dtype>::KeepsXHat() const {
  return state_->rust->by_batch() || (!state_->rust->frozen()
      && (this->param_propagate_down_[kSlope]
          || this->param_propagate_down_[kBias]));
}

template <typename Dtype>
void BNLayer<Dtype>::Forward_cpu(const vector<Blob<Dtype>*>& bottom,
    const vector<Blob<Dtype>*>& top) {
  Blob<Dtype>* mean = this->blobs_[kMovingMean].get();
  Blob<Dtype>* inv_std = this->blobs_[kMovingInvStd].get();
  const bool in_place = bottom[0] == top[0];
  lsoftmax::BnForward pass = lsoftmax::BnForward();
  pass.dtype = lsoftmax::TypeOf<Dtype>::value;
  if (!in_place) { pass.bottom = Data(bottom[0]); }
  pass.slope = Data(this->blobs_[kSlope].get());
  pass.bias = Data(this->blobs_[kBias].get());
  if (state_->rust->by_batch()) {
    pass.update_mean = MutableData(mean);
    pass.update_inv_std = MutableData(inv_std);
  } else {
    pass.moving_mean = Data(mean);
    pass.moving_inv_std = Data(inv_std);
  }
  pass.top = MutableData(top[0]);
  if (in_place && KeepsXHat()) { pass.x_hat = MutableData(&x_hat_); }
  try {
    lsoftmax::forward(*state_->rust, pass);
    state_->WarnOfConstantChannel(*this);
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
  }
}

template <typename Dtype>
void BNLayer<Dtype>::Backward_cpu(const vector<Blob<Dtype>*>& top,
    const vector<bool>& propagate_down, const vector<Blob<Dtype>*>& bottom) {
  Blob<Dtype>* slope = this->blobs_[kSlope].get();
  Blob<Dtype>* bias = this->blobs_[kBias].get();
  const bool in_place = bottom[0] == top[0];
  lsoftmax::BnBackward pass = lsoftmax::BnBackward();
  pass.dtype = lsoftmax::TypeOf<Dtype>::value;
  if (propagate_down[0]) { pass.bottom_diff = MutableDiff(bottom[0]); }
  if (!in_place || !propagate_down[0]) { pass.top_diff = Diff(top[0]); }
  if (!in_place) {
    pass.x = Data(bottom[0]);
  } else if (KeepsXHat()) {
    pass.x = Data(&x_hat_);
  }
  pass.slope = Data(slope);
  if (this->param_propagate_down_[kSlope]) {
    pass.slope_diff = MutableDiff(slope);
  }
  if (this->param_propagate_down_[kBias]) {
    pass.bias_diff = MutableDiff(bias);
  }
  try {
    lsoftmax::backward(*state_->rust, pass);
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
  }
}

#ifdef CPU_ONLY
STUB_GPU(BNLayer);
#else
template <typename Dtype>
void BNLayer<Dtype>::Forward_gpu(const vector<Blob<Dtype>*>& bottom,
    const vector<Blob<Dtype>*>& top) {
  Blob<Dtype>* mean = this->blobs_[kMovingMean].get();
  Blob<Dtype>* inv_std = this->blobs_[kMovingInvStd].get();
  lsoftmax::DeviceBnForward pass = lsoftmax::DeviceBnForward();
  pass.dtype = lsoftmax::TypeOf<Dtype>::value;
  pass.bottom = GpuData(bottom[0]);
  pass.slope = GpuData(this->blobs_[kSlope].get());
  pass.bias = GpuData(this->blobs_[kBias].get());
  if (state_->rust->by_batch()) {
    pass.update_mean = MutableGpuData(mean);
    pass.update_inv_std = MutableGpuData(inv_std);
  } else {
    pass.moving_mean = GpuData(mean);
    pass.moving_inv_std = GpuData(inv_std);
  }
  pass.top = MutableGpuData(top[0]);
  if (bottom[0] == top[0] && KeepsXHat()) {
    pass.x_hat = MutableGpuData(&x_hat_);
  }
  pass.scratch = state_->scratch.gpu_data();
  try {
    lsoftmax::forward_gpu(*state_->rust, pass);
    state_->WarnOfConstantChannel(*this);
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
  }
}

template <typename Dtype>
void BNLayer<Dtype>::Backward_gpu(const vector<Blob<Dtype>*>& top,
    const vector<bool>& propagate_down, const vector<Blob<Dtype>*>& bottom) {
  Blob<Dtype>* slope = this->blobs_[kSlope].get();
  Blob<Dtype>* bias = this->blobs_[kBias].get();
  const bool has_x_hat = bottom[0] == top[0] && KeepsXHat();
  const bool learns = !state_->rust->frozen();
  lsoftmax::DeviceBnBackward pass = lsoftmax::DeviceBnBackward();
  pass.dtype = lsoftmax::TypeOf<Dtype>::value;
  pass.top_diff = GpuDiff(top[0]);
  pass.x = GpuData(has_x_hat ? &x_hat_ : bottom[0]);
  pass.slope = GpuData(slope);
  if (propagate_down[0]) { pass.bottom_diff = MutableGpuDiff(bottom[0]); }
  if (learns && this->param_propagate_down_[kSlope]) {
    pass.slope_diff = MutableGpuDiff(slope);
  }
  if (learns && this->param_propagate_down_[kBias]) {
    pass.bias_diff = MutableGpuDiff(bias);
  }
  pass.scratch = state_->scratch.gpu_data();
  try {
    lsoftmax::backward_gpu(*state_->rust, pass);
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
  }
}
#endif  // CPU_ONLY

INSTANTIATE_CLASS(BNLayer);
REGISTER_LAYER_CLASS(BN);

}  // namespace caffe
