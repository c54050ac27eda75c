#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

#include "caffe/blob.hpp"
#include "caffe/common.hpp"
#include "caffe/filler.hpp"
#include "caffe/layer_factory.hpp"
#include "caffe/layers/batch_norm_layer.hpp"
#include "caffe/layers/bn_layer.hpp"
#include "caffe/layers/scale_layer.hpp"
#include "caffe/sgd_solvers.hpp"

#include "caffe/test/test_caffe_main.hpp"
#include "caffe/test/test_gradient_check_util.hpp"

namespace caffe {

// Shows a BN layer to GradientChecker. The checker changes a layer's inputs
// and blobs one by one and expects to find them again after a forward pass: a
// layer in place needs a copy of its input, and blobs that are used but get no
// gradient must not be seen.
template <typename Dtype>
class CheckableBNLayer : public Layer<Dtype> {
 public:
  CheckableBNLayer(const LayerParameter& param, const bool in_place)
      : Layer<Dtype>(param), layer_(param), in_place_(in_place) {}
  virtual void LayerSetUp(const vector<Blob<Dtype>*>& bottom,
      const vector<Blob<Dtype>*>& top) {
    Reshape(bottom, top);
    layer_.SetUp(Bottom(bottom, top), top);
    if (!this->layer_param_.bn_param().frozen()) {
      this->blobs_.assign(layer_.blobs().begin(), layer_.blobs().begin() + 2);
    }
  }
  virtual void Reshape(const vector<Blob<Dtype>*>& bottom,
      const vector<Blob<Dtype>*>& top) {
    if (in_place_) {
      top[0]->ReshapeLike(*bottom[0]);
    }
  }
  virtual inline const char* type() const { return "CheckableBN"; }

  vector<shared_ptr<Blob<Dtype> > >& all_blobs() { return layer_.blobs(); }

 protected:
  virtual void Forward_cpu(const vector<Blob<Dtype>*>& bottom,
      const vector<Blob<Dtype>*>& top) {
    if (in_place_) {
      caffe_copy(bottom[0]->count(), bottom[0]->cpu_data(),
          top[0]->mutable_cpu_data());
    }
    layer_.Forward(Bottom(bottom, top), top);
  }
  virtual void Backward_cpu(const vector<Blob<Dtype>*>& top,
      const vector<bool>& propagate_down,
      const vector<Blob<Dtype>*>& bottom) {
    layer_.Backward(top, propagate_down, Bottom(bottom, top));
    if (in_place_ && propagate_down[0]) {
      caffe_copy(bottom[0]->count(), top[0]->cpu_diff(),
          bottom[0]->mutable_cpu_diff());
    }
  }

 private:
  const vector<Blob<Dtype>*>& Bottom(const vector<Blob<Dtype>*>& bottom,
      const vector<Blob<Dtype>*>& top) const {
    return in_place_ ? top : bottom;
  }

  BNLayer<Dtype> layer_;
  const bool in_place_;
};

template <typename TypeParam>
class BNLayerTest : public MultiDeviceTest<TypeParam> {
  typedef typename TypeParam::Dtype Dtype;

 protected:
  BNLayerTest()
      : blob_bottom_(new Blob<Dtype>()), blob_top_(new Blob<Dtype>()) {
    Caffe::set_random_seed(1701);
    layer_param_.set_name("norm");
    layer_param_.set_type("BN");
    layer_param_.set_phase(TRAIN);
    FillBottom(Shape(5, 2, 3, 4));
    bottom_.push_back(blob_bottom_.get());
    top_.push_back(blob_top_.get());
  }

  BNParameter* BN() { return layer_param_.mutable_bn_param(); }

  static vector<int> Shape(const int a, const int b = -1, const int c = -1,
      const int d = -1, const int e = -1) {
    const int dims[] = {a, b, c, d, e};
    return vector<int>(dims, std::find(dims, dims + 5, -1));
  }

  // Channel c gets the mean 2 c + 1 and the standard deviation c + 1.
  void FillBottom(const vector<int>& shape) {
    blob_bottom_->Reshape(shape);
    const int count = blob_bottom_->count();
    if (count == 0) {
      return;
    }
    Dtype* data = blob_bottom_->mutable_cpu_data();
    caffe_rng_gaussian<Dtype>(count, Dtype(0), Dtype(1), data);
    for (int i = 0; i < count; ++i) {
      const int c = Channel(i);
      data[i] = data[i] * (c + 1) + 2 * c + 1;
    }
  }

  int Channel(const int i) const {
    return i / blob_bottom_->count(2) % blob_bottom_->shape(1);
  }

  // Slope and bias that are not those of another channel.
  void SetRandomFillers() {
    BN()->mutable_slope_filler()->set_type("uniform");
    BN()->mutable_slope_filler()->set_min(0.5);
    BN()->mutable_slope_filler()->set_max(2);
    BN()->mutable_bias_filler()->set_type("gaussian");
  }

  // Moving values that are not those of the batch.
  static void SetMovingValues(const vector<shared_ptr<Blob<Dtype> > >& blobs) {
    for (int c = 0; c < blobs[2]->count(); ++c) {
      blobs[2]->mutable_cpu_data()[c] = Dtype(0.3) + c;
      blobs[3]->mutable_cpu_data()[c] = Dtype(0.8) / (c + 1);
    }
  }

  // Mean and biased variance of each channel of a blob's data, in double.
  static void Moments(const Blob<Dtype>& blob, vector<double>* mean,
      vector<double>* variance) {
    const int channels = blob.shape(1);
    const int positions = blob.count(2);
    const double share = static_cast<double>(channels) / blob.count();
    mean->assign(channels, 0);
    variance->assign(channels, 0);
    for (int i = 0; i < blob.count(); ++i) {
      (*mean)[i / positions % channels] += share * blob.cpu_data()[i];
    }
    for (int i = 0; i < blob.count(); ++i) {
      const int c = i / positions % channels;
      const double distance = blob.cpu_data()[i] - (*mean)[c];
      (*variance)[c] += share * distance * distance;
    }
  }

  // Forward, and backward from a random gradient of the top. In place where
  // bottom and top are the same.
  static void ForwardBackward(Layer<Dtype>* layer,
      const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
    layer->Forward(bottom, top);
    Caffe::set_random_seed(42);
    caffe_rng_gaussian<Dtype>(top[0]->count(), Dtype(0.5), Dtype(1),
        top[0]->mutable_cpu_diff());
    for (int i = 0; i < layer->blobs().size(); ++i) {
      Blob<Dtype>* blob = layer->blobs()[i].get();
      caffe_set(blob->count(), Dtype(0), blob->mutable_cpu_diff());
    }
    layer->Backward(top, vector<bool>(1, true), bottom);
  }

  // Checks the gradients by every input, slope and bias.
  void CheckGradient(const vector<int>& shape, const bool in_place) {
    FillBottom(shape);
    SetRandomFillers();
    CheckableBNLayer<Dtype> layer(layer_param_, in_place);
    layer.SetUp(bottom_, top_);
    SetMovingValues(layer.all_blobs());
    // Not CheckGradientExhaustive: it would set the layer up again.
    GradientChecker<Dtype> checker(1e-2, 2e-3);
    for (int i = 0; i < blob_top_->count(); ++i) {
      checker.CheckGradientSingle(&layer, bottom_, top_, -1, 0, i);
    }
  }

  static void ExpectSameData(const Blob<Dtype>& a, const Blob<Dtype>& b) {
    ASSERT_EQ(a.shape(), b.shape());
    for (int i = 0; i < a.count(); ++i) {
      EXPECT_EQ(a.cpu_data()[i], b.cpu_data()[i]) << "at " << i;
    }
  }

  static void ExpectSameDiff(const Blob<Dtype>& a, const Blob<Dtype>& b) {
    ASSERT_EQ(a.shape(), b.shape());
    for (int i = 0; i < a.count(); ++i) {
      EXPECT_EQ(a.cpu_diff()[i], b.cpu_diff()[i]) << "at " << i;
    }
  }

  static void ExpectNear(const int count, const Dtype* a, const Dtype* b,
      const double tolerance) {
    for (int i = 0; i < count; ++i) {
      EXPECT_NEAR(a[i], b[i], tolerance * std::max(1., std::fabs(double(b[i]))))
          << "at " << i;
    }
  }

  shared_ptr<Blob<Dtype> > blob_bottom_;
  shared_ptr<Blob<Dtype> > blob_top_;
  vector<Blob<Dtype>*> bottom_;
  vector<Blob<Dtype>*> top_;
  LayerParameter layer_param_;
};

TYPED_TEST_CASE(BNLayerTest, TestDtypesAndDevices);

TYPED_TEST(BNLayerTest, TestSetUp) {
  typedef typename TypeParam::Dtype Dtype;
  BNLayer<Dtype> layer(this->layer_param_);
  layer.SetUp(this->bottom_, this->top_);
  EXPECT_EQ(this->blob_bottom_->shape(), this->blob_top_->shape());
  const Dtype start[] = {1, 0, 0, 1};
  ASSERT_EQ(4, layer.blobs().size());
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(this->Shape(1, 2), layer.blobs()[i]->shape());
    for (int c = 0; c < 2; ++c) {
      EXPECT_EQ(start[i], layer.blobs()[i]->cpu_data()[c]) << "blob " << i;
    }
  }
}

TYPED_TEST(BNLayerTest, TestFillers) {
  typedef typename TypeParam::Dtype Dtype;
  this->BN()->mutable_slope_filler()->set_value(0.25);
  this->BN()->mutable_bias_filler()->set_value(-3);
  BNLayer<Dtype> layer(this->layer_param_);
  layer.SetUp(this->bottom_, this->top_);
  EXPECT_EQ(Dtype(0.25), layer.blobs()[0]->cpu_data()[1]);
  EXPECT_EQ(Dtype(-3), layer.blobs()[1]->cpu_data()[1]);
}

TYPED_TEST(BNLayerTest, TestRegistered) {
  typedef typename TypeParam::Dtype Dtype;
  shared_ptr<Layer<Dtype> > layer =
      LayerRegistry<Dtype>::CreateLayer(this->layer_param_);
  EXPECT_STREQ("BN", layer->type());
}

TYPED_TEST(BNLayerTest, TestParamSpecDefaults) {
  typedef typename TypeParam::Dtype Dtype;
  BNLayer<Dtype> layer(this->layer_param_);
  layer.SetUp(this->bottom_, this->top_);
  ASSERT_EQ(4, layer.layer_param().param_size());
  for (int i = 0; i < 4; ++i) {
    const ParamSpec& spec = layer.layer_param().param(i);
    EXPECT_EQ(i < 2 ? 1 : 0, spec.lr_mult()) << "blob " << i;
    EXPECT_EQ(i < 2 ? 1 : 0, spec.decay_mult()) << "blob " << i;
  }
}

TYPED_TEST(BNLayerTest, TestParamSpecOfThePrototxt) {
  typedef typename TypeParam::Dtype Dtype;
  ASSERT_TRUE(google::protobuf::TextFormat::MergeFromString(
      "param { lr_mult: 2 decay_mult: 0 } param { decay_mult: 0 } "
      "param { lr_mult: 3 } param { decay_mult: 4 name: 'shared' }",
      &this->layer_param_));
  const float lr[] = {2, 1, 0, 0};
  const float decay[] = {0, 0, 0, 0};
  BNLayer<Dtype> layer(this->layer_param_);
  layer.SetUp(this->bottom_, this->top_);
  ASSERT_EQ(4, layer.layer_param().param_size());
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(lr[i], layer.layer_param().param(i).lr_mult());
    EXPECT_EQ(decay[i], layer.layer_param().param(i).decay_mult());
  }
  EXPECT_EQ("shared", layer.layer_param().param(3).name());
}

TYPED_TEST(BNLayerTest, TestParamSpecFrozen) {
  typedef typename TypeParam::Dtype Dtype;
  ASSERT_TRUE(google::protobuf::TextFormat::MergeFromString(
      "param { lr_mult: 2 } bn_param { frozen: true }", &this->layer_param_));
  BNLayer<Dtype> layer(this->layer_param_);
  layer.SetUp(this->bottom_, this->top_);
  ASSERT_EQ(4, layer.layer_param().param_size());
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(0, layer.layer_param().param(i).lr_mult());
    EXPECT_EQ(0, layer.layer_param().param(i).decay_mult());
  }
}

TYPED_TEST(BNLayerTest, TestForward) {
  typedef typename TypeParam::Dtype Dtype;
  const vector<int> shapes[] = {this->Shape(5, 2, 3, 4), this->Shape(17, 7),
      this->Shape(4, 3, 2, 3, 2), this->Shape(3, 5, 19), this->Shape(1, 3, 8)};
  for (int s = 0; s < 5; ++s) {
    this->FillBottom(shapes[s]);
    BNLayer<Dtype> layer(this->layer_param_);
    layer.SetUp(this->bottom_, this->top_);
    const int channels = shapes[s][1];
    for (int c = 0; c < channels; ++c) {
      layer.blobs()[0]->mutable_cpu_data()[c] = 2 + c;
      layer.blobs()[1]->mutable_cpu_data()[c] = 3 - c;
    }
    layer.Forward(this->bottom_, this->top_);
    vector<double> mean, variance;
    this->Moments(*this->blob_top_, &mean, &variance);
    for (int c = 0; c < channels; ++c) {
      EXPECT_NEAR(3 - c, mean[c], 1e-4);
      EXPECT_NEAR((2 + c) * (2 + c), variance[c], 1e-3 * (2 + c) * (2 + c));
    }
  }
}

// BatchNorm and Scale do the same in two layers.
TYPED_TEST(BNLayerTest, TestAgainstBatchNormAndScale) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetRandomFillers();
  BNLayer<Dtype> layer(this->layer_param_);
  layer.SetUp(this->bottom_, this->top_);
  this->ForwardBackward(&layer, this->bottom_, this->top_);

  Blob<Dtype> input, normalized, output;
  input.CopyFrom(*this->blob_bottom_, false, true);
  const vector<Blob<Dtype>*> inputs(1, &input);
  const vector<Blob<Dtype>*> between(1, &normalized);
  const vector<Blob<Dtype>*> outputs(1, &output);
  LayerParameter norm_param, scale_param;
  norm_param.set_phase(TRAIN);
  scale_param.mutable_scale_param()->set_bias_term(true);
  BatchNormLayer<Dtype> norm(norm_param);
  ScaleLayer<Dtype> scale(scale_param);
  norm.SetUp(inputs, between);
  scale.SetUp(between, outputs);
  for (int i = 0; i < 2; ++i) {
    Blob<Dtype>* blob = scale.blobs()[i].get();
    caffe_copy(blob->count(), layer.blobs()[i]->cpu_data(),
        blob->mutable_cpu_data());
    caffe_set(blob->count(), Dtype(0), blob->mutable_cpu_diff());
  }
  norm.Forward(inputs, between);
  scale.Forward(between, outputs);
  output.CopyFrom(*this->blob_top_, true);
  scale.Backward(outputs, vector<bool>(1, true), between);
  norm.Backward(between, vector<bool>(1, true), inputs);

  this->ExpectNear(output.count(), this->blob_top_->cpu_data(),
      output.cpu_data(), 1e-4);
  this->ExpectNear(input.count(), this->blob_bottom_->cpu_diff(),
      input.cpu_diff(), 1e-4);
  for (int i = 0; i < 2; ++i) {
    this->ExpectNear(2, layer.blobs()[i]->cpu_diff(),
        scale.blobs()[i]->cpu_diff(), 1e-4);
  }
}

TYPED_TEST(BNLayerTest, TestMovingValues) {
  typedef typename TypeParam::Dtype Dtype;
  const double momentum = 0.75;
  const double eps = 0.125;
  this->BN()->set_momentum(momentum);
  this->BN()->set_eps(eps);
  BNLayer<Dtype> layer(this->layer_param_);
  layer.SetUp(this->bottom_, this->top_);
  vector<double> moving_mean(2, 0), moving_inv_std(2, 1);
  for (int pass = 0; pass < 2; ++pass) {
    this->FillBottom(this->blob_bottom_->shape());
    layer.Forward(this->bottom_, this->top_);
    vector<double> mean, variance;
    this->Moments(*this->blob_bottom_, &mean, &variance);
    for (int c = 0; c < 2; ++c) {
      moving_mean[c] = momentum * moving_mean[c] + (1 - momentum) * mean[c];
      moving_inv_std[c] = momentum * moving_inv_std[c]
          + (1 - momentum) / sqrt(variance[c] + eps);
      EXPECT_NEAR(moving_mean[c], layer.blobs()[2]->cpu_data()[c], 1e-5);
      EXPECT_NEAR(moving_inv_std[c], layer.blobs()[3]->cpu_data()[c], 1e-5);
    }
  }
}

TYPED_TEST(BNLayerTest, TestForwardByMovingValues) {
  typedef typename TypeParam::Dtype Dtype;
  for (int frozen = 0; frozen < 2; ++frozen) {
    this->layer_param_.set_phase(frozen ? TRAIN : TEST);
    this->BN()->set_frozen(frozen);
    this->SetRandomFillers();
    BNLayer<Dtype> layer(this->layer_param_);
    layer.SetUp(this->bottom_, this->top_);
    this->SetMovingValues(layer.blobs());
    for (int pass = 0; pass < 2; ++pass) {
      layer.Forward(this->bottom_, this->top_);
      for (int i = 0; i < this->blob_top_->count(); ++i) {
        const int c = this->Channel(i);
        const double want = layer.blobs()[0]->cpu_data()[c]
            * (this->blob_bottom_->cpu_data()[i] - (Dtype(0.3) + c))
            * Dtype(0.8) / (c + 1) + layer.blobs()[1]->cpu_data()[c];
        EXPECT_NEAR(want, this->blob_top_->cpu_data()[i],
            1e-5 * std::max(1., std::fabs(want)));
      }
    }
    EXPECT_EQ(Dtype(1.3), layer.blobs()[2]->cpu_data()[1]);
    EXPECT_EQ(Dtype(0.4), layer.blobs()[3]->cpu_data()[1]);
  }
}

#ifndef CPU_ONLY
// What only reads the moving values leaves the host's copy of them valid.
TYPED_TEST(BNLayerTest, TestMovingValuesStayOnTheHost) {
  typedef typename TypeParam::Dtype Dtype;
  this->layer_param_.set_phase(TEST);
  BNLayer<Dtype> layer(this->layer_param_);
  layer.SetUp(this->bottom_, this->top_);
  this->SetMovingValues(layer.blobs());
  layer.Forward(this->bottom_, this->top_);
  for (int i = 2; i < 4; ++i) {
    EXPECT_NE(SyncedMemory::HEAD_AT_GPU, layer.blobs()[i]->data()->head());
  }
}
#endif  // CPU_ONLY

TYPED_TEST(BNLayerTest, TestInPlace) {
  typedef typename TypeParam::Dtype Dtype;
  // The TRAIN phase, the TEST phase, frozen.
  for (int mode = 0; mode < 3; ++mode) {
    this->layer_param_.set_phase(mode == 1 ? TEST : TRAIN);
    this->BN()->set_frozen(mode == 2);
    this->SetRandomFillers();
    const vector<int> shapes[] = {this->Shape(5, 2, 3, 4),
        this->Shape(3, 4, 5, 5), this->Shape(6, 5)};
    for (int s = 0; s < 3; ++s) {
      this->FillBottom(shapes[s]);
      Blob<Dtype> blob;
      blob.CopyFrom(*this->blob_bottom_, false, true);
      const vector<Blob<Dtype>*> both(1, &blob);

      BNLayer<Dtype> apart(this->layer_param_);
      Caffe::set_random_seed(7);
      apart.SetUp(this->bottom_, this->top_);
      BNLayer<Dtype> in_place(this->layer_param_);
      Caffe::set_random_seed(7);
      in_place.SetUp(both, both);
      this->SetMovingValues(apart.blobs());
      this->SetMovingValues(in_place.blobs());
      this->ForwardBackward(&apart, this->bottom_, this->top_);
      this->ForwardBackward(&in_place, both, both);

      this->ExpectSameData(*this->blob_top_, blob);
      this->ExpectSameDiff(*this->blob_bottom_, blob);
      for (int i = 0; i < 4; ++i) {
        this->ExpectSameData(*apart.blobs()[i], *in_place.blobs()[i]);
        this->ExpectSameDiff(*apart.blobs()[i], *in_place.blobs()[i]);
      }
    }
  }
}

TYPED_TEST(BNLayerTest, TestReshape) {
  typedef typename TypeParam::Dtype Dtype;
  BNLayer<Dtype> layer(this->layer_param_);
  layer.SetUp(this->bottom_, this->top_);
  layer.Forward(this->bottom_, this->top_);
  // Another batch size, other spatial axes.
  this->FillBottom(this->Shape(9, 2, 17));
  layer.Reshape(this->bottom_, this->top_);
  layer.Forward(this->bottom_, this->top_);
  EXPECT_EQ(this->blob_bottom_->shape(), this->blob_top_->shape());
  vector<double> mean, variance;
  this->Moments(*this->blob_top_, &mean, &variance);
  for (int c = 0; c < 2; ++c) {
    EXPECT_NEAR(0, mean[c], 1e-5);
    EXPECT_NEAR(1, variance[c], 1e-3);
  }
}

TYPED_TEST(BNLayerTest, TestBatchOfOne) {
  typedef typename TypeParam::Dtype Dtype;
  this->FillBottom(this->Shape(1, 3));
  BNLayer<Dtype> layer(this->layer_param_);
  layer.SetUp(this->bottom_, this->top_);
  for (int c = 0; c < 3; ++c) {
    layer.blobs()[1]->mutable_cpu_data()[c] = c - 1;
  }
  this->ForwardBackward(&layer, this->bottom_, this->top_);
  for (int c = 0; c < 3; ++c) {
    // A single value is its own mean.
    EXPECT_EQ(c - 1, this->blob_top_->cpu_data()[c]);
    EXPECT_EQ(0, this->blob_bottom_->cpu_diff()[c]);
    EXPECT_EQ(0, layer.blobs()[0]->cpu_diff()[c]);
    EXPECT_EQ(this->blob_top_->cpu_diff()[c], layer.blobs()[1]->cpu_diff()[c]);
  }
}

TYPED_TEST(BNLayerTest, TestEmptyBatch) {
  typedef typename TypeParam::Dtype Dtype;
  const vector<int> shapes[] = {this->Shape(0, 3), this->Shape(0, 3, 2, 2),
      this->Shape(4, 3, 0)};
  for (int s = 0; s < 3; ++s) {
    for (int in_place = 0; in_place < 2; ++in_place) {
      this->FillBottom(shapes[s]);
      const vector<Blob<Dtype>*>& top =
          in_place ? this->bottom_ : this->top_;
      BNLayer<Dtype> layer(this->layer_param_);
      layer.SetUp(this->bottom_, top);
      layer.Forward(this->bottom_, top);
      layer.Backward(top, vector<bool>(1, true), this->bottom_);
      EXPECT_EQ(shapes[s], top[0]->shape());
      for (int c = 0; c < 3; ++c) {
        EXPECT_EQ(0, layer.blobs()[2]->cpu_data()[c]);
        EXPECT_EQ(1, layer.blobs()[3]->cpu_data()[c]);
        EXPECT_EQ(0, layer.blobs()[0]->cpu_diff()[c]);
      }
    }
  }
}

TYPED_TEST(BNLayerTest, TestGradient2D) {
  this->CheckGradient(this->Shape(5, 3), false);
}

TYPED_TEST(BNLayerTest, TestGradient4D) {
  this->CheckGradient(this->Shape(3, 2, 2, 3), false);
}

TYPED_TEST(BNLayerTest, TestGradientManyPositions) {
  this->CheckGradient(this->Shape(2, 2, 3, 7), false);
}

TYPED_TEST(BNLayerTest, TestGradient5D) {
  this->CheckGradient(this->Shape(2, 2, 1, 3, 2), false);
}

TYPED_TEST(BNLayerTest, TestGradientInPlace) {
  this->CheckGradient(this->Shape(3, 2, 2, 3), true);
}

TYPED_TEST(BNLayerTest, TestGradientTestPhase) {
  this->layer_param_.set_phase(TEST);
  this->CheckGradient(this->Shape(3, 2, 2, 3), false);
}

TYPED_TEST(BNLayerTest, TestGradientTestPhaseInPlace) {
  this->layer_param_.set_phase(TEST);
  this->CheckGradient(this->Shape(3, 2, 2, 3), true);
}

TYPED_TEST(BNLayerTest, TestGradientFrozen) {
  this->BN()->set_frozen(true);
  this->CheckGradient(this->Shape(3, 2, 2, 3), false);
}

TYPED_TEST(BNLayerTest, TestGradientFrozenInPlace) {
  this->BN()->set_frozen(true);
  this->CheckGradient(this->Shape(3, 2, 2, 3), true);
}

TYPED_TEST(BNLayerTest, TestParameterGradientsAccumulate) {
  typedef typename TypeParam::Dtype Dtype;
  BNLayer<Dtype> layer(this->layer_param_);
  layer.SetUp(this->bottom_, this->top_);
  this->ForwardBackward(&layer, this->bottom_, this->top_);
  const Dtype slope = layer.blobs()[0]->cpu_diff()[1];
  const Dtype bias = layer.blobs()[1]->cpu_diff()[1];
  layer.Backward(this->top_, vector<bool>(1, true), this->bottom_);
  EXPECT_EQ(2 * slope, layer.blobs()[0]->cpu_diff()[1]);
  EXPECT_EQ(2 * bias, layer.blobs()[1]->cpu_diff()[1]);
  EXPECT_EQ(0, layer.blobs()[2]->cpu_diff()[1]);
  EXPECT_EQ(0, layer.blobs()[3]->cpu_diff()[1]);
}

TYPED_TEST(BNLayerTest, TestFrozenHasNoParameterGradient) {
  typedef typename TypeParam::Dtype Dtype;
  this->BN()->set_frozen(true);
  BNLayer<Dtype> layer(this->layer_param_);
  layer.SetUp(this->bottom_, this->top_);
  this->ForwardBackward(&layer, this->bottom_, this->top_);
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(0, layer.blobs()[i]->asum_diff()) << "blob " << i;
  }
}

TYPED_TEST(BNLayerTest, TestPropagateDown) {
  typedef typename TypeParam::Dtype Dtype;
  for (int in_place = 0; in_place < 2; ++in_place) {
    this->FillBottom(this->Shape(5, 2, 3, 4));
    const vector<Blob<Dtype>*>& top = in_place ? this->bottom_ : this->top_;
    BNLayer<Dtype> layer(this->layer_param_);
    layer.SetUp(this->bottom_, top);
    layer.set_param_propagate_down(0, false);
    layer.Forward(this->bottom_, top);
    const int count = top[0]->count();
    caffe_set(count, Dtype(9), this->blob_bottom_->mutable_cpu_diff());
    caffe_set(count, Dtype(2), top[0]->mutable_cpu_diff());
    layer.Backward(top, vector<bool>(1, false), this->bottom_);
    EXPECT_EQ(0, layer.blobs()[0]->asum_diff());
    EXPECT_EQ(2 * count, layer.blobs()[1]->asum_diff());
    EXPECT_EQ((in_place ? 2 : 9) * count, this->blob_bottom_->asum_diff());
  }
}

// Values near the end of float's range, and a mean that dwarfs the deviation.
TYPED_TEST(BNLayerTest, TestHugeValues) {
  typedef typename TypeParam::Dtype Dtype;
  this->FillBottom(this->Shape(8, 2, 4));
  const int count = this->blob_bottom_->count();
  Dtype* data = this->blob_bottom_->mutable_cpu_data();
  for (int i = 0; i < count; ++i) {
    data[i] = this->Channel(i) ? Dtype(30000) + i % 3 : data[i] * Dtype(1e30);
  }
  BNLayer<Dtype> layer(this->layer_param_);
  layer.SetUp(this->bottom_, this->top_);
  this->ForwardBackward(&layer, this->bottom_, this->top_);
  vector<double> mean, variance;
  this->Moments(*this->blob_top_, &mean, &variance);
  for (int c = 0; c < 2; ++c) {
    EXPECT_NEAR(0, mean[c], 1e-5);
    EXPECT_NEAR(1, variance[c], 1e-4);
  }
  for (int i = 0; i < 4; ++i) {
    for (int c = 0; c < 2; ++c) {
      EXPECT_TRUE(std::isfinite(layer.blobs()[i]->cpu_data()[c]));
      EXPECT_TRUE(std::isfinite(layer.blobs()[i]->cpu_diff()[c]));
    }
  }
  EXPECT_TRUE(std::isfinite(this->blob_bottom_->asum_diff()));
}

// A snapshot's blobs, and what a solver leaves alone.
TYPED_TEST(BNLayerTest, TestSolver) {
  typedef typename TypeParam::Dtype Dtype;
  const string net =
      "layer { name: 'data' type: 'DummyData' top: 'x' top: 'target' "
      "  dummy_data_param { "
      "    shape { dim: 6 dim: 3 } shape { dim: 6 dim: 3 } "
      "    data_filler { type: 'gaussian' mean: 2 std: 3 } "
      "    data_filler { type: 'constant' value: 5 } } } "
      "layer { name: 'norm' type: 'BN' bottom: 'x' top: 'x' "
      "  bn_param { FROZEN } } "
      "layer { name: 'loss' type: 'EuclideanLoss' bottom: 'x' "
      "  bottom: 'target' } ";
  for (int frozen = 0; frozen < 2; ++frozen) {
    SolverParameter param;
    string text = net;
    text.replace(text.find("FROZEN"), 6,
        frozen ? "frozen: true" : "momentum: 0.5");
    ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(text,
        param.mutable_net_param()));
    param.set_base_lr(0.1);
    param.set_lr_policy("fixed");
    param.set_momentum(0.9);
    param.set_weight_decay(0.5);
    param.set_max_iter(4);
    param.set_random_seed(3);
    param.set_snapshot_after_train(false);
    param.set_solver_mode(Caffe::mode() == Caffe::GPU ?
        SolverParameter_SolverMode_GPU : SolverParameter_SolverMode_CPU);
    SGDSolver<Dtype> solver(param);
    solver.Step(4);
    const vector<shared_ptr<Blob<Dtype> > >& blobs =
        solver.net()->layer_by_name("norm")->blobs();
    const Dtype start[] = {1, 0, 0, 1};
    for (int i = 0; i < 4; ++i) {
      const Dtype value = blobs[i]->cpu_data()[0];
      EXPECT_TRUE(std::isfinite(value));
      if (frozen) {
        EXPECT_EQ(start[i], value) << "blob " << i;
      } else {
        EXPECT_NE(start[i], value) << "blob " << i;
      }
    }
    if (!frozen) {
      // Weight decay would have left far less of the mean.
      EXPECT_NEAR(2, blobs[2]->cpu_data()[0], 2.5);
      EXPECT_GT(blobs[3]->cpu_data()[0], 0.1);
    }
    NetParameter saved;
    solver.net()->ToProto(&saved);
    Net<Dtype> restored(param.net_param());
    restored.CopyTrainedLayersFrom(saved);
    for (int i = 0; i < 4; ++i) {
      this->ExpectSameData(*blobs[i],
          *restored.layer_by_name("norm")->blobs()[i]);
    }
  }
}

// Nets of two BN layers, one of them frozen, with `param` in both. The solver
// would move what the layers alone may move by what stands in there.
static NetParameter TwoBNLayers(const string& param) {
  string text =
      "layer { name: 'data' type: 'DummyData' top: 'x' top: 'target' "
      "  dummy_data_param { "
      "    shape { dim: 6 dim: 3 } shape { dim: 6 dim: 3 } "
      "    data_filler { type: 'gaussian' mean: 2 std: 3 } "
      "    data_filler { type: 'constant' value: 5 } } } "
      "layer { name: 'norm' type: 'BN' bottom: 'x' top: 'y' PARAM } "
      "layer { name: 'frozen' type: 'BN' bottom: 'y' top: 'z' PARAM "
      "  bn_param { frozen: true } } "
      "layer { name: 'loss' type: 'EuclideanLoss' bottom: 'z' "
      "  bottom: 'target' } ";
  for (int n = 0; n < 2; ++n) {
    text.replace(text.find("PARAM"), 5, param);
  }
  NetParameter net;
  CHECK(google::protobuf::TextFormat::ParseFromString(text, &net));
  return net;
}

// All blobs of the net after some iterations of a solver.
template <typename Dtype>
static vector<Dtype> Train(const string& type, const float clip_gradients,
    const NetParameter& net) {
  SolverParameter param;
  *param.mutable_net_param() = net;
  param.set_type(type);
  param.set_base_lr(0.01);
  param.set_lr_policy("fixed");
  if (type == "AdaGrad" || type == "RMSProp") {
    param.clear_momentum();
  } else {
    param.set_momentum(0.9);
  }
  if (type == "AdaDelta") {
    param.set_delta(1e-6);
  }
  param.set_weight_decay(0.05);
  param.set_clip_gradients(clip_gradients);
  param.set_random_seed(3);
  param.set_snapshot_after_train(false);
  param.set_solver_mode(Caffe::mode() == Caffe::GPU ?
      SolverParameter_SolverMode_GPU : SolverParameter_SolverMode_CPU);
  shared_ptr<Solver<Dtype> > solver(
      SolverRegistry<Dtype>::CreateSolver(param));
  solver->Step(20);
  vector<Dtype> values;
  for (int i = 0; i < solver->net()->params().size(); ++i) {
    const Blob<Dtype>& blob = *solver->net()->params()[i];
    values.insert(values.end(), blob.cpu_data(),
        blob.cpu_data() + blob.count());
  }
  return values;
}

// What the prototxt says of the moving values moves nothing, bit for bit.
TYPED_TEST(BNLayerTest, TestNoSolverMovesTheMovingValues) {
  typedef typename TypeParam::Dtype Dtype;
  const string own = "param { } param { } ";
  const string moves = "param { lr_mult: 3 decay_mult: 4 } ";
  const NetParameter plain = TwoBNLayers("");
  const NetParameter spoken = TwoBNLayers(own + moves + moves);
  // Both layers share one set of moving values.
  const string names[] = {"param { name: 'mean' } ", "param { name: 's' } "};
  const string moving_names[] = {
      "param { name: 'mean' lr_mult: 3 decay_mult: 4 } ",
      "param { name: 's' lr_mult: 3 decay_mult: 4 } "};
  const NetParameter plain_shared =
      TwoBNLayers(own + names[0] + names[1]);
  const NetParameter spoken_shared =
      TwoBNLayers(own + moving_names[0] + moving_names[1]);
  // A net as a .caffemodel has it, with the blobs in it.
  NetParameter plain_saved, spoken_saved;
  {
    Net<Dtype> net(plain);
    for (int i = 0; i < net.params().size(); ++i) {
      for (int c = 0; c < net.params()[i]->count(); ++c) {
        net.params()[i]->mutable_cpu_data()[c] += Dtype(0.25) * (c + i);
      }
    }
    net.ToProto(&plain_saved);
    spoken_saved.ParseFromString(plain_saved.SerializeAsString());
    for (int i = 0; i < spoken_saved.layer_size(); ++i) {
      LayerParameter* layer = spoken_saved.mutable_layer(i);
      plain_saved.mutable_layer(i)->clear_param();
      for (int j = 2; j < layer->param_size(); ++j) {
        layer->mutable_param(j)->set_lr_mult(3);
        layer->mutable_param(j)->set_decay_mult(4);
      }
    }
  }
  const NetParameter* nets[][2] = {{&plain, &spoken},
      {&plain_shared, &spoken_shared}, {&plain_saved, &spoken_saved}};
  const char* types[] = {"SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta",
      "Adam"};
  for (int t = 0; t < 6; ++t) {
    for (int clip = 0; clip < 2; ++clip) {
      for (int n = 0; n < 3; ++n) {
        SCOPED_TRACE(::testing::Message() << types[t]
            << (clip ? ", clipped" : "") << ", net " << n);
        const float clip_gradients = clip ? 0.5 : -1;
        const vector<Dtype> want =
            Train<Dtype>(types[t], clip_gradients, *nets[n][0]);
        const vector<Dtype> got =
            Train<Dtype>(types[t], clip_gradients, *nets[n][1]);
        ASSERT_EQ(want.size(), got.size());
        EXPECT_EQ(0, memcmp(&want[0], &got[0], want.size() * sizeof(Dtype)));
        // Training has moved what it should.
        EXPECT_NE(Dtype(1), want[0]);
        for (int i = 0; i < want.size(); ++i) {
          EXPECT_TRUE(std::isfinite(want[i])) << i;
        }
      }
    }
  }
}

template <typename Dtype>
class BNLayerDeathTest : public CPUDeviceTest<Dtype> {
 protected:
  BNLayerDeathTest() : bottom_(1, &bottom_blob_), top_(1, &top_blob_) {
    ::testing::FLAGS_gtest_death_test_style = "threadsafe";
    layer_param_.set_name("norm");
    bottom_blob_.Reshape(2, 3, 1, 1);
  }

  void SetUpLayer() {
    BNLayer<Dtype> layer(layer_param_);
    layer.SetUp(bottom_, top_);
  }

  void AddBlob(const int channels) {
    BlobProto* blob = layer_param_.add_blobs();
    blob->mutable_shape()->add_dim(1);
    blob->mutable_shape()->add_dim(channels);
    for (int c = 0; c < channels; ++c) {
      blob->add_data(0.5);
    }
  }

  Blob<Dtype> bottom_blob_;
  Blob<Dtype> top_blob_;
  vector<Blob<Dtype>*> bottom_;
  vector<Blob<Dtype>*> top_;
  LayerParameter layer_param_;
};

TYPED_TEST_CASE(BNLayerDeathTest, TestDtypes);

TYPED_TEST(BNLayerDeathTest, TestMomentum) {
  const float bad[] = {-0.5, 1.5, std::numeric_limits<float>::quiet_NaN()};
  const char* words[] = {"momentum: -0.5", "momentum: 1.5", "momentum: NaN"};
  for (int i = 0; i < 3; ++i) {
    this->layer_param_.mutable_bn_param()->set_momentum(bad[i]);
    EXPECT_DEATH(this->SetUpLayer(), string("BN layer 'norm': ") + words[i]);
  }
}

TYPED_TEST(BNLayerDeathTest, TestBackwardNeedsForward) {
  typedef TypeParam Dtype;
  BNLayer<Dtype> layer(this->layer_param_);
  layer.SetUp(this->bottom_, this->top_);
  const vector<bool> down(1, true);
  EXPECT_DEATH(layer.Backward(this->top_, down, this->bottom_),
      "BN layer 'norm': backward without a forward pass");
}

TYPED_TEST(BNLayerDeathTest, TestEps) {
  const float bad[] = {0, -1, std::numeric_limits<float>::infinity(),
      std::numeric_limits<float>::quiet_NaN()};
  const char* words[] = {"eps: 0", "eps: -1", "eps: inf", "eps: NaN"};
  for (int i = 0; i < 4; ++i) {
    this->layer_param_.mutable_bn_param()->set_eps(bad[i]);
    EXPECT_DEATH(this->SetUpLayer(), string("BN layer 'norm': ") + words[i]);
  }
}

TYPED_TEST(BNLayerDeathTest, TestAxes) {
  this->bottom_blob_.Reshape(vector<int>(1, 6));
  EXPECT_DEATH(this->SetUpLayer(), "BN layer 'norm': .*2 axes");
}

TYPED_TEST(BNLayerDeathTest, TestChannels) {
  BNLayer<TypeParam> layer(this->layer_param_);
  layer.SetUp(this->bottom_, this->top_);
  this->bottom_blob_.Reshape(2, 4, 1, 1);
  EXPECT_DEATH(layer.Reshape(this->bottom_, this->top_),
      "BN layer 'norm': .*4 channels .*for 3");
}

TYPED_TEST(BNLayerDeathTest, TestBlobs) {
  this->AddBlob(3);
  EXPECT_DEATH(this->SetUpLayer(), "BN layer 'norm': .*must be 4, not 1");
  this->AddBlob(3);
  this->AddBlob(2);
  this->AddBlob(3);
  EXPECT_DEATH(this->SetUpLayer(),
      "BN layer 'norm': .*moving mean must have shape 1 3 .*not 1 2");
}

TYPED_TEST(BNLayerDeathTest, TestBlobsThatFit) {
  for (int i = 0; i < 4; ++i) {
    this->AddBlob(3);
  }
  BNLayer<TypeParam> layer(this->layer_param_);
  layer.SetUp(this->bottom_, this->top_);
  EXPECT_EQ(TypeParam(0.5), layer.blobs()[3]->cpu_data()[2]);
}

}  // namespace caffe
