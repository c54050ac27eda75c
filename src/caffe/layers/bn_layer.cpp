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
using lsoftmax::Fail;

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
    scratch.Reshape(sizes.device_bytes);
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
  // What a forward pass on the GPU leaves to the backward pass.
  lsoftmax::Scratch scratch;
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
    // A name that param gives twice makes two blobs one; they fit, unlike those
    // of other layers, so Caffe does not mind.
    for (int j = 0; j < i; ++j) {
      if (this->blobs_[i]->data() == this->blobs_[j]->data()) {
        Fail(*this, string(kBlobNames[j]) + " and " + kBlobNames[i]
            + " are one blob: give each param of the layer a name of its own");
      }
    }
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
template <class Memory>
void BNLayer<Dtype>::ForwardIn(const vector<Blob<Dtype>*>& bottom,
    const vector<Blob<Dtype>*>& top) {
  Blob<Dtype>* mean = this->blobs_[kMovingMean].get();
  Blob<Dtype>* inv_std = this->blobs_[kMovingInvStd].get();
  lsoftmax::BnForward pass = lsoftmax::BnForward();
  pass.memory = Memory::value;
  pass.dtype = lsoftmax::TypeOf<Dtype>::value;
  pass.bottom = Memory::Data(bottom[0]);
  pass.slope = Memory::Data(this->blobs_[kSlope].get());
  pass.bias = Memory::Data(this->blobs_[kBias].get());
  if (state_->rust->by_batch()) {
    pass.update_mean = Memory::MutableData(mean);
    pass.update_inv_std = Memory::MutableData(inv_std);
  } else {
    pass.moving_mean = Memory::Data(mean);
    pass.moving_inv_std = Memory::Data(inv_std);
  }
  pass.top = Memory::MutableData(top[0]);
  if (bottom[0] == top[0] && KeepsXHat()) {
    pass.x_hat = Memory::MutableData(&x_hat_);
  }
  pass.scratch = Memory::Of(&state_->scratch);
  try {
    lsoftmax::forward(*state_->rust, pass);
    state_->WarnOfConstantChannel(*this);
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
  }
}

template <typename Dtype>
template <class Memory>
void BNLayer<Dtype>::BackwardIn(const vector<Blob<Dtype>*>& top,
    const vector<bool>& propagate_down, const vector<Blob<Dtype>*>& bottom) {
  Blob<Dtype>* slope = this->blobs_[kSlope].get();
  Blob<Dtype>* bias = this->blobs_[kBias].get();
  lsoftmax::BnBackward pass = lsoftmax::BnBackward();
  pass.memory = Memory::value;
  pass.dtype = lsoftmax::TypeOf<Dtype>::value;
  pass.top_diff = Memory::Diff(top[0]);
  if (bottom[0] != top[0]) {
    pass.x = Memory::Data(bottom[0]);
  } else if (KeepsXHat()) {
    pass.x = Memory::Data(&x_hat_);
  }
  pass.slope = Memory::Data(slope);
  if (propagate_down[0]) { pass.bottom_diff = Memory::MutableDiff(bottom[0]); }
  if (this->param_propagate_down_[kSlope]) {
    pass.slope_diff = Memory::MutableDiff(slope);
  }
  if (this->param_propagate_down_[kBias]) {
    pass.bias_diff = Memory::MutableDiff(bias);
  }
  pass.scratch = Memory::Of(&state_->scratch);
  try {
    lsoftmax::backward(*state_->rust, pass);
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
  }
}

template <typename Dtype>
void BNLayer<Dtype>::Forward_cpu(const vector<Blob<Dtype>*>& bottom,
    const vector<Blob<Dtype>*>& top) {
  ForwardIn<lsoftmax::HostMemory>(bottom, top);
}

template <typename Dtype>
void BNLayer<Dtype>::Backward_cpu(const vector<Blob<Dtype>*>& top,
    const vector<bool>& propagate_down, const vector<Blob<Dtype>*>& bottom) {
  BackwardIn<lsoftmax::HostMemory>(top, propagate_down, bottom);
}

#ifdef CPU_ONLY
STUB_GPU(BNLayer);
#else
template <typename Dtype>
void BNLayer<Dtype>::Forward_gpu(const vector<Blob<Dtype>*>& bottom,
    const vector<Blob<Dtype>*>& top) {
  ForwardIn<lsoftmax::DeviceMemory>(bottom, top);
}

template <typename Dtype>
void BNLayer<Dtype>::Backward_gpu(const vector<Blob<Dtype>*>& top,
    const vector<bool>& propagate_down, const vector<Blob<Dtype>*>& bottom) {
  BackwardIn<lsoftmax::DeviceMemory>(top, propagate_down, bottom);
}
#endif  // CPU_ONLY

INSTANTIATE_CLASS(BNLayer);
REGISTER_LAYER_CLASS(BN);

}  // namespace caffe
