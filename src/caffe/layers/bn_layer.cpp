#include <string>
#include <vector>

#include "caffe/filler.hpp"
#include "caffe/layers/bn_layer.hpp"
#include "caffe/util/format.hpp"
#include "caffe/util/math_functions.hpp"
#include "lsoftmax/blobs.hpp"
#include "lsoftmax/src/bridge.rs.h"

namespace caffe {

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
            phase == TRAIN)) {}

  // Returns the number of channels.
  int Reshape(const Blob<Dtype>* bottom) {
    const vector<int>& shape = bottom->shape();
    return lsoftmax::reshape(*rust,
        rust::Slice<const int32_t>(shape.data(), shape.size()));
  }

  rust::Box<lsoftmax::BatchNorm> rust;
#ifndef CPU_ONLY
  // What a forward pass on the GPU leaves to the backward pass.
  uint8_t* GpuScratch() { return scratch.Get(rust->device_bytes()); }
  lsoftmax::Scratch scratch;
#endif  // CPU_ONLY
};

template <typename Dtype>
void BNLayer<Dtype>::LayerSetUp(const vector<Blob<Dtype>*>& bottom,
    const vector<Blob<Dtype>*>& top) {
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
  try {
    state_->Reshape(bottom[0]);
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
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
  const vector<shared_ptr<Blob<Dtype> > >& blobs = this->blobs_;
  Blob<Dtype>* mean = blobs[kMovingMean].get();
  Blob<Dtype>* inv_std = blobs[kMovingInvStd].get();
  try {
    if (state_->rust->by_batch()) {
      lsoftmax::take_batch_statistics(*state_->rust, Data(bottom[0]),
          MutableData(mean), MutableData(inv_std));
    } else {
      lsoftmax::take_moving_statistics(*state_->rust, Data(mean),
          Data(inv_std));
    }
    if (bottom[0] == top[0]) {
      lsoftmax::normalize_in_place(*state_->rust, Data(blobs[kSlope].get()),
          Data(blobs[kBias].get()), MutableData(top[0]),
          KeepsXHat() ? MutableData(&x_hat_) : rust::Slice<Dtype>());
    } else {
      lsoftmax::normalize(*state_->rust, Data(bottom[0]),
          Data(blobs[kSlope].get()), Data(blobs[kBias].get()),
          MutableData(top[0]));
    }
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
  }
}

template <typename Dtype>
void BNLayer<Dtype>::Backward_cpu(const vector<Blob<Dtype>*>& top,
    const vector<bool>& propagate_down, const vector<Blob<Dtype>*>& bottom) {
  Blob<Dtype>* slope = this->blobs_[kSlope].get();
  Blob<Dtype>* bias = this->blobs_[kBias].get();
  const rust::Slice<Dtype> unwanted;
  const rust::Slice<Dtype> slope_diff =
      this->param_propagate_down_[kSlope] ? MutableDiff(slope) : unwanted;
  const rust::Slice<Dtype> bias_diff =
      this->param_propagate_down_[kBias] ? MutableDiff(bias) : unwanted;
  try {
    if (bottom[0] == top[0]) {
      lsoftmax::backward_in_place(*state_->rust,
          KeepsXHat() ? Data(&x_hat_) : rust::Slice<const Dtype>(),
          Data(slope), MutableDiff(top[0]), propagate_down[0], slope_diff,
          bias_diff);
    } else {
      lsoftmax::backward(*state_->rust, Diff(top[0]), Data(bottom[0]),
          Data(slope), propagate_down[0] ? MutableDiff(bottom[0]) : unwanted,
          slope_diff, bias_diff);
    }
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
  const vector<shared_ptr<Blob<Dtype> > >& blobs = this->blobs_;
  const bool in_place = bottom[0] == top[0];
  try {
    lsoftmax::forward_gpu(*state_->rust, GpuData(bottom[0]),
        GpuData(blobs[kSlope].get()), GpuData(blobs[kBias].get()),
        MutableGpuData(blobs[kMovingMean].get()),
        MutableGpuData(blobs[kMovingInvStd].get()), MutableGpuData(top[0]),
        in_place && KeepsXHat() ? MutableGpuData(&x_hat_) : NULL,
        state_->GpuScratch());
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
  try {
    lsoftmax::backward_gpu(*state_->rust, GpuDiff(top[0]),
        GpuData(has_x_hat ? &x_hat_ : bottom[0]), has_x_hat, GpuData(slope),
        propagate_down[0] ? MutableGpuDiff(bottom[0]) : NULL,
        learns && this->param_propagate_down_[kSlope] ? MutableGpuDiff(slope)
            : NULL,
        learns && this->param_propagate_down_[kBias] ? MutableGpuDiff(bias)
            : NULL,
        state_->GpuScratch());
  } catch (const rust::Error& error) {
    Fail(*this, error.what());
  }
}
#endif  // CPU_ONLY

INSTANTIATE_CLASS(BNLayer);
REGISTER_LAYER_CLASS(BN);

}  // namespace caffe
