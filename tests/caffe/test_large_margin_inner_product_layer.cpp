#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "boost/thread.hpp"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

#include "caffe/blob.hpp"
#include "caffe/common.hpp"
#include "caffe/filler.hpp"
#include "caffe/layer_factory.hpp"
#include "caffe/layers/inner_product_layer.hpp"
#include "caffe/layers/large_margin_inner_product_layer.hpp"
#include "caffe/sgd_solvers.hpp"
#include "caffe/util/format.hpp"

#include "caffe/test/test_caffe_main.hpp"
#include "caffe/test/test_gradient_check_util.hpp"

namespace caffe {

typedef LargeMarginInnerProductParameter_LargeMarginType LargeMarginType;

static const double kPi = 3.14159265358979323846;
static const int kMaxMargin = 8;

// The definition in the paper (eq. 4 to 8), by angles and in double.
static double TargetLogit(const int margin, const double lambda,
    const vector<double>& x, const vector<double>& w) {
  double f = 0, xx = 0, ww = 0;
  for (int j = 0; j < x.size(); ++j) {
    f += x[j] * w[j];
    xx += x[j] * x[j];
    ww += w[j] * w[j];
  }
  const double norms = sqrt(xx) * sqrt(ww);
  if (norms == 0) {
    return 0;
  }
  const double theta = acos(std::max(-1., std::min(1., f / norms)));
  const int k = std::min(margin - 1,
      static_cast<int>(floor(margin * theta / kPi)));
  const double psi = (k % 2 ? -1 : 1) * cos(margin * theta) - 2 * k;
  return (lambda * f + norms * psi) / (1 + lambda);
}

// The derivative of TargetLogit by x, or by w with x and w exchanged.
static vector<double> TargetLogitGradient(const int margin,
    const double lambda, const vector<double>& x, const vector<double>& w) {
  vector<double> gradient(x.size());
  for (int j = 0; j < x.size(); ++j) {
    const double step = 1e-6;
    vector<double> plus(x), minus(x);
    plus[j] += step;
    minus[j] -= step;
    gradient[j] = (TargetLogit(margin, lambda, plus, w)
        - TargetLogit(margin, lambda, minus, w)) / (2 * step);
  }
  return gradient;
}

template <typename Dtype>
static vector<double> Row(const Dtype* data, const int row, const int length) {
  return vector<double>(data + row * length, data + (row + 1) * length);
}

template <typename TypeParam>
class LargeMarginInnerProductLayerTest : public MultiDeviceTest<TypeParam> {
  typedef typename TypeParam::Dtype Dtype;

 protected:
  LargeMarginInnerProductLayerTest()
      : features_(new Blob<Dtype>()), labels_(new Blob<Dtype>()),
        logits_(new Blob<Dtype>()), lambda_(new Blob<Dtype>()),
        plain_(new Blob<Dtype>()) {
    Caffe::set_random_seed(1701);
    param_.set_name("lm");
    param_.set_type("LargeMarginInnerProduct");
    LargeMarginInnerProductParameter* param = LargeMargin();
    param->set_num_output(4);
    param->mutable_weight_filler()->set_type("gaussian");
    bottom_.push_back(features_.get());
    bottom_.push_back(labels_.get());
    top_.push_back(logits_.get());
  }

  LargeMarginInnerProductParameter* LargeMargin() {
    return param_.mutable_largemargin_inner_product_param();
  }

  // Gives the layer a constant lambda, so that a forward pass can be repeated.
  void SetMarginAndLambda(const int margin, const float lambda) {
    LargeMargin()->set_margin(margin);
    LargeMargin()->set_base(lambda);
    LargeMargin()->set_gamma(0);
  }

  void SetTops(const int number) {
    Blob<Dtype>* const all[] = {logits_.get(), lambda_.get(), plain_.get()};
    top_.assign(all, all + number);
  }

  static vector<int> Shape(const int a, const int b = -1, const int c = -1,
      const int d = -1) {
    const int dims[] = {a, b, c, d};
    return vector<int>(dims, std::find(dims, dims + 4, -1));
  }

  // Random features, labels that take turns.
  void FillBottom(const vector<int>& shape, const int samples) {
    features_->Reshape(shape);
    FillGaussian(features_->count(), features_->mutable_cpu_data());
    labels_->Reshape(Shape(samples));
    for (int i = 0; i < samples; ++i) {
      labels_->mutable_cpu_data()[i] = i % LargeMargin()->num_output();
    }
  }

  void FillGaussian(const int count, Dtype* data) {
    caffe_rng_gaussian<Dtype>(count, Dtype(0), Dtype(1), data);
  }

  shared_ptr<LargeMarginInnerProductLayer<Dtype> > SetUpLayer() {
    shared_ptr<LargeMarginInnerProductLayer<Dtype> > layer(
        new LargeMarginInnerProductLayer<Dtype>(param_));
    layer->SetUp(bottom_, top_);
    return layer;
  }

  // A layer whose samples lie in each of the margin's segments of [0, pi]: on
  // either side of its borders, in its middle, and at both ends.
  shared_ptr<LargeMarginInnerProductLayer<Dtype> > SetUpOnAllSegments(
      const int margin, const int feature_count = 5,
      const bool at_the_ends = true) {
    vector<double> angles;
    for (int k = 0; k < margin; ++k) {
      angles.push_back((k + 0.02) * kPi / margin);
      angles.push_back((k + 0.5) * kPi / margin);
      angles.push_back((k + 0.98) * kPi / margin);
    }
    if (at_the_ends) {
      angles.push_back(0);
      angles.push_back(kPi);
    }
    const int samples = angles.size();
    FillBottom(Shape(samples, feature_count), samples);
    shared_ptr<LargeMarginInnerProductLayer<Dtype> > layer = SetUpLayer();
    const Dtype* weights = layer->blobs()[0]->cpu_data();
    for (int i = 0; i < samples; ++i) {
      const vector<double> w = Row(weights,
          static_cast<int>(labels_->cpu_data()[i]), feature_count);
      Dtype* x = features_->mutable_cpu_data() + i * feature_count;
      PlaceAtAngle(angles[i], w, x);
      const vector<double> placed = Row(x, 0, feature_count);
      EXPECT_NEAR(angles[i], Angle(placed, w), 2e-3);
    }
    return layer;
  }

  static double Dot(const vector<double>& a, const vector<double>& b) {
    double sum = 0;
    for (int j = 0; j < a.size(); ++j) {
      sum += a[j] * b[j];
    }
    return sum;
  }

  static double Angle(const vector<double>& a, const vector<double>& b) {
    return acos(std::max(-1., std::min(1.,
        Dot(a, b) / sqrt(Dot(a, a) * Dot(b, b)))));
  }

  // Turns x to the angle from w, in the plane of the two, with norm 4.
  static void PlaceAtAngle(const double angle, const vector<double>& w,
      Dtype* x) {
    vector<double> across = Row(x, 0, w.size());
    const double along = Dot(across, w) / Dot(w, w);
    for (int j = 0; j < w.size(); ++j) {
      across[j] -= along * w[j];
    }
    const double norm_w = sqrt(Dot(w, w));
    const double norm_across = sqrt(Dot(across, across));
    for (int j = 0; j < w.size(); ++j) {
      x[j] = 4 * (cos(angle) * w[j] / norm_w
          + sin(angle) * across[j] / norm_across);
    }
  }

  // What the first top must be by the paper, for features of shape (M, K).
  // The last argument is whether a sample has a margin.
  vector<double> ReferenceLogits(const Blob<Dtype>& weights, const int margin,
      const double lambda, const vector<bool>& has_margin) {
    const int classes = weights.shape(0);
    const int length = weights.shape(1);
    vector<double> logits;
    for (int i = 0; i < labels_->count(); ++i) {
      const vector<double> x = Row(features_->cpu_data(), i, length);
      for (int j = 0; j < classes; ++j) {
        const vector<double> w = Row(weights.cpu_data(), j, length);
        const bool target = has_margin[i] && labels_->cpu_data()[i] == j;
        logits.push_back(target ? TargetLogit(margin, lambda, x, w)
            : Dot(x, w));
      }
    }
    return logits;
  }

  vector<double> ReferenceLogits(const Blob<Dtype>& weights, const int margin,
      const double lambda) {
    return ReferenceLogits(weights, margin, lambda,
        vector<bool>(labels_->count(), true));
  }

  // The gradients of sum(top_diff * top) by the features and the weights.
  void ReferenceGradients(const Blob<Dtype>& weights, const int margin,
      const double lambda, const vector<bool>& has_margin,
      vector<double>* by_features, vector<double>* by_weights) {
    const int classes = weights.shape(0);
    const int length = weights.shape(1);
    by_features->assign(features_->count(), 0);
    by_weights->assign(weights.count(), 0);
    for (int i = 0; i < labels_->count(); ++i) {
      const vector<double> x = Row(features_->cpu_data(), i, length);
      for (int j = 0; j < classes; ++j) {
        const double g = logits_->cpu_diff()[i * classes + j];
        const vector<double> w = Row(weights.cpu_data(), j, length);
        const bool target = has_margin[i] && labels_->cpu_data()[i] == j;
        const vector<double> dx = target ?
            TargetLogitGradient(margin, lambda, x, w) : w;
        const vector<double> dw = target ?
            TargetLogitGradient(margin, lambda, w, x) : x;
        for (int l = 0; l < length; ++l) {
          (*by_features)[i * length + l] += g * dx[l];
          (*by_weights)[j * length + l] += g * dw[l];
        }
      }
    }
  }

  static void ExpectNear(const vector<double>& expected, const Dtype* actual,
      const double tolerance, const char* what) {
    for (int i = 0; i < expected.size(); ++i) {
      EXPECT_NEAR(expected[i], actual[i],
          tolerance * std::max(1., fabs(expected[i]))) << what << " " << i;
    }
  }

  static void ExpectSameBits(const int count, const Dtype* expected,
      const Dtype* actual, const char* what) {
    EXPECT_EQ(0, memcmp(expected, actual, count * sizeof(Dtype))) << what;
  }

  static void ExpectFinite(const int count, const Dtype* data,
      const char* what) {
    for (int i = 0; i < count; ++i) {
      EXPECT_TRUE(std::isfinite(data[i])) << what << " " << i << ": "
          << data[i];
    }
  }

  static Dtype Tolerance(const double of_float, const double of_double) {
    return sizeof(Dtype) == sizeof(float) ? of_float : of_double;
  }

  // {features, label}; nobody wants a gradient of the labels.
  static vector<bool> PropagateDown(const bool features) {
    vector<bool> propagate_down(2, false);
    propagate_down[0] = features;
    return propagate_down;
  }

  // An InnerProduct layer without bias that has the weights.
  shared_ptr<Layer<Dtype> > MakeInnerProduct(const Blob<Dtype>& weights,
      const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
    LayerParameter param;
    param.set_type("InnerProduct");
    param.mutable_inner_product_param()->set_num_output(weights.shape(0));
    param.mutable_inner_product_param()->set_bias_term(false);
    param.mutable_inner_product_param()->set_axis(LargeMargin()->axis());
    shared_ptr<Layer<Dtype> > layer(new InnerProductLayer<Dtype>(param));
    layer->SetUp(bottom, top);
    layer->blobs()[0]->CopyFrom(weights);
    return layer;
  }

  void CheckForward(const int margin, const float lambda) {
    SetMarginAndLambda(margin, lambda);
    SetTops(3);
    shared_ptr<Layer<Dtype> > layer = SetUpOnAllSegments(margin);
    layer->Forward(bottom_, top_);
    const Blob<Dtype>& weights = *layer->blobs()[0];
    ExpectNear(ReferenceLogits(weights, margin, lambda), logits_->cpu_data(),
        Tolerance(1e-4, 1e-9), "logit");
    EXPECT_EQ(Dtype(lambda), lambda_->cpu_data()[0]);

    Blob<Dtype> expected;
    vector<Blob<Dtype>*> bottom(1, features_.get()), top(1, &expected);
    MakeInnerProduct(weights, bottom, top)->Forward(bottom, top);
    ExpectSameBits(expected.count(), expected.cpu_data(), plain_->cpu_data(),
        "the plain logits");
  }

  void CheckBackward(const int margin, const float lambda) {
    SetMarginAndLambda(margin, lambda);
    shared_ptr<Layer<Dtype> > layer = SetUpOnAllSegments(margin);
    Blob<Dtype>* const weights = layer->blobs()[0].get();
    layer->Forward(bottom_, top_);
    FillGaussian(logits_->count(), logits_->mutable_cpu_diff());
    // The one is added to, the other overwritten.
    caffe_set(weights->count(), Dtype(3), weights->mutable_cpu_diff());
    caffe_set(features_->count(), Dtype(3), features_->mutable_cpu_diff());
    layer->Backward(top_, PropagateDown(true), bottom_);
    vector<double> by_features, by_weights;
    ReferenceGradients(*weights, margin, lambda,
        vector<bool>(labels_->count(), true), &by_features, &by_weights);
    for (int i = 0; i < by_weights.size(); ++i) {
      by_weights[i] += 3;
    }
    const double tolerance = Tolerance(2e-4, 1e-5);
    ExpectNear(by_features, features_->cpu_diff(), tolerance, "by feature");
    ExpectNear(by_weights, weights->cpu_diff(), tolerance, "by weight");
  }

  // Expects the layer as it is configured to have the right numerical
  // gradients. The angle at the ends of [0, pi] has a kink of the features.
  void CheckGradient(const int margin) {
    shared_ptr<Layer<Dtype> > layer = SetUpOnAllSegments(margin, 5, false);
    GradientChecker<Dtype> checker(Tolerance(1e-2, 1e-5),
        Tolerance(1e-2, 1e-6));
    checker.CheckGradientExhaustive(layer.get(), bottom_, top_, 0);
  }

  LayerParameter param_;
  shared_ptr<Blob<Dtype> > features_;
  shared_ptr<Blob<Dtype> > labels_;
  shared_ptr<Blob<Dtype> > logits_;
  shared_ptr<Blob<Dtype> > lambda_;
  shared_ptr<Blob<Dtype> > plain_;
  vector<Blob<Dtype>*> bottom_;
  vector<Blob<Dtype>*> top_;
};

TYPED_TEST_CASE(LargeMarginInnerProductLayerTest, TestDtypesAndDevices);

TYPED_TEST(LargeMarginInnerProductLayerTest, TestRegistered) {
  typedef typename TypeParam::Dtype Dtype;
  shared_ptr<Layer<Dtype> > layer =
      LayerRegistry<Dtype>::CreateLayer(this->param_);
  EXPECT_STREQ("LargeMarginInnerProduct", layer->type());
  EXPECT_FALSE(layer->AllowForceBackward(1));
  EXPECT_TRUE(layer->AllowForceBackward(0));
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestSetUp) {
  typedef typename TypeParam::Dtype Dtype;
  for (int tops = 1; tops <= 3; ++tops) {
    this->FillBottom(this->Shape(2, 3, 4, 5), 2);
    this->SetTops(tops);
    shared_ptr<Layer<Dtype> > layer = this->SetUpLayer();
    ASSERT_EQ(1, layer->blobs().size());
    EXPECT_EQ(this->Shape(4, 60), layer->blobs()[0]->shape());
    EXPECT_EQ(this->Shape(2, 4), this->logits_->shape());
    if (tops > 1) {
      EXPECT_EQ(this->Shape(1), this->lambda_->shape());
    }
    if (tops > 2) {
      EXPECT_EQ(this->Shape(2, 4), this->plain_->shape());
    }
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestSetUpAxis) {
  typedef typename TypeParam::Dtype Dtype;
  // axis, samples, features, and the logits' shape
  const int axes[] = {0, 1, 2, 3, -1, -2, -4};
  const int samples[] = {1, 2, 6, 24, 24, 6, 1};
  const int lengths[] = {120, 60, 20, 5, 5, 20, 120};
  for (int i = 0; i < 7; ++i) {
    this->LargeMargin()->set_axis(axes[i]);
    this->FillBottom(this->Shape(2, 3, 4, 5), samples[i]);
    shared_ptr<Layer<Dtype> > layer = this->SetUpLayer();
    EXPECT_EQ(this->Shape(4, lengths[i]), layer->blobs()[0]->shape());
    vector<int> logits = this->features_->shape();
    logits.resize(axes[i] < 0 ? axes[i] + 4 : axes[i]);
    logits.push_back(4);
    EXPECT_EQ(logits, this->logits_->shape());
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestLabelShapes) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(4, 0);
  shared_ptr<Layer<Dtype> > layer = this->SetUpOnAllSegments(4);
  layer->Forward(this->bottom_, this->top_);
  Blob<Dtype> expected;
  expected.CopyFrom(*this->logits_, false, true);
  const int samples = this->labels_->count();
  const vector<int> shapes[] = {this->Shape(samples, 1),
      this->Shape(samples, 1, 1, 1), this->Shape(1, samples)};
  for (int i = 0; i < 3; ++i) {
    this->labels_->Reshape(shapes[i]);
    layer->Forward(this->bottom_, this->top_);
    this->ExpectSameBits(expected.count(), expected.cpu_data(),
        this->logits_->cpu_data(), "logits");
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestForward) {
  for (int margin = 1; margin <= kMaxMargin; ++margin) {
    const float lambdas[] = {0, 0.5, 5, 1000};
    for (int i = 0; i < 4; ++i) {
      SCOPED_TRACE(::testing::Message() << "margin " << margin << " lambda "
          << lambdas[i]);
      this->CheckForward(margin, lambdas[i]);
    }
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestTypeIsMargin) {
  typedef typename TypeParam::Dtype Dtype;
  for (int type = 0; type < 4; ++type) {
    this->SetMarginAndLambda(type + 1, 0);
    this->LargeMargin()->clear_margin();
    this->LargeMargin()->set_type(static_cast<LargeMarginType>(type));
    shared_ptr<Layer<Dtype> > layer = this->SetUpOnAllSegments(type + 1);
    layer->Forward(this->bottom_, this->top_);
    this->ExpectNear(
        this->ReferenceLogits(*layer->blobs()[0], type + 1, 0),
        this->logits_->cpu_data(), this->Tolerance(1e-4, 1e-9), "logit");
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestMarginOverridesType) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(3, 0);
  this->LargeMargin()->set_type(
      LargeMarginInnerProductParameter_LargeMarginType_DOUBLE);
  shared_ptr<Layer<Dtype> > layer = this->SetUpOnAllSegments(3);
  layer->Forward(this->bottom_, this->top_);
  this->ExpectNear(this->ReferenceLogits(*layer->blobs()[0], 3, 0),
      this->logits_->cpu_data(), this->Tolerance(1e-4, 1e-9), "logit");
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestForwardAxis) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(4, 0);
  const int axes[] = {0, 1, 2, -1};
  const int samples[] = {1, 3, 6, 24};
  for (int i = 0; i < 4; ++i) {
    this->LargeMargin()->set_axis(axes[i]);
    this->FillBottom(this->Shape(3, 2, 4, 5), samples[i]);
    shared_ptr<Layer<Dtype> > layer = this->SetUpLayer();
    layer->Forward(this->bottom_, this->top_);
    this->ExpectNear(this->ReferenceLogits(*layer->blobs()[0], 4, 0),
        this->logits_->cpu_data(), this->Tolerance(1e-4, 1e-9), "logit");
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestForwardTestPhase) {
  typedef typename TypeParam::Dtype Dtype;
  this->param_.set_phase(TEST);
  this->SetMarginAndLambda(4, 1);
  this->SetTops(3);
  shared_ptr<Layer<Dtype> > layer = this->SetUpOnAllSegments(4);
  layer->Forward(this->bottom_, this->top_);
  this->ExpectNear(this->ReferenceLogits(*layer->blobs()[0], 4, 1),
      this->logits_->cpu_data(), this->Tolerance(1e-4, 1e-9), "logit");
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestBatchChanges) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(4, 0);
  this->FillBottom(this->Shape(3, 5), 3);
  shared_ptr<Layer<Dtype> > layer = this->SetUpLayer();
  const int samples[] = {7, 1, 12};
  for (int i = 0; i < 3; ++i) {
    this->FillBottom(this->Shape(samples[i], 5), samples[i]);
    layer->Forward(this->bottom_, this->top_);
    EXPECT_EQ(this->Shape(samples[i], 4), this->logits_->shape());
    this->ExpectNear(this->ReferenceLogits(*layer->blobs()[0], 4, 0),
        this->logits_->cpu_data(), this->Tolerance(1e-4, 1e-9), "logit");
  }
}

// A deploy net has no labels: the layer is an inner product.
TYPED_TEST(LargeMarginInnerProductLayerTest, TestOneBottom) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(4, 0);
  this->SetTops(3);
  this->FillBottom(this->Shape(37, 60), 37);
  this->bottom_.resize(1);
  shared_ptr<Layer<Dtype> > layer = this->SetUpLayer();
  layer->Forward(this->bottom_, this->top_);
  Blob<Dtype> expected;
  vector<Blob<Dtype>*> top(1, &expected);
  shared_ptr<Layer<Dtype> > inner_product = this->MakeInnerProduct(
      *layer->blobs()[0], this->bottom_, top);
  inner_product->Forward(this->bottom_, top);
  this->ExpectSameBits(expected.count(), expected.cpu_data(),
      this->logits_->cpu_data(), "logits");
  this->ExpectSameBits(expected.count(), expected.cpu_data(),
      this->plain_->cpu_data(), "plain logits");
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestMarginOneIsInnerProduct) {
  typedef typename TypeParam::Dtype Dtype;
  this->LargeMargin()->set_num_output(11);
  this->SetMarginAndLambda(1, 0);
  this->FillBottom(this->Shape(37, 3, 4, 5), 37);
  shared_ptr<Layer<Dtype> > layer = this->SetUpLayer();
  Blob<Dtype>* const weights = layer->blobs()[0].get();

  Blob<Dtype> features, logits;
  features.CopyFrom(*this->features_, false, true);
  vector<Blob<Dtype>*> bottom(1, &features), top(1, &logits);
  shared_ptr<Layer<Dtype> > inner_product =
      this->MakeInnerProduct(*weights, bottom, top);

  layer->Forward(this->bottom_, this->top_);
  inner_product->Forward(bottom, top);
  this->ExpectSameBits(logits.count(), logits.cpu_data(),
      this->logits_->cpu_data(), "logits");

  this->FillGaussian(logits.count(), logits.mutable_cpu_diff());
  this->logits_->CopyFrom(logits, true);
  caffe_set(weights->count(), Dtype(0.5), weights->mutable_cpu_diff());
  inner_product->blobs()[0]->CopyFrom(*weights, true);
  layer->Backward(this->top_, this->PropagateDown(true), this->bottom_);
  inner_product->Backward(top, vector<bool>(1, true), bottom);
  this->ExpectSameBits(features.count(), features.cpu_diff(),
      this->features_->cpu_diff(), "gradient by the features");
  this->ExpectSameBits(weights->count(),
      inner_product->blobs()[0]->cpu_diff(), weights->cpu_diff(),
      "gradient by the weights");
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestBackward) {
  for (int margin = 1; margin <= kMaxMargin; ++margin) {
    const float lambdas[] = {0, 5};
    for (int i = 0; i < 2; ++i) {
      SCOPED_TRACE(::testing::Message() << "margin " << margin << " lambda "
          << lambdas[i]);
      this->CheckBackward(margin, lambdas[i]);
    }
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestGradient) {
  for (int margin = 1; margin <= kMaxMargin; ++margin) {
    SCOPED_TRACE(::testing::Message() << "margin " << margin);
    this->SetMarginAndLambda(margin, 0);
    this->CheckGradient(margin);
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestGradientTypes) {
  for (int type = 0; type < 4; ++type) {
    SCOPED_TRACE(::testing::Message() << "type " << type);
    this->LargeMargin()->set_type(static_cast<LargeMarginType>(type));
    this->LargeMargin()->set_base(2);
    this->CheckGradient(type + 1);
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestGradientAxis) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(4, 0.5);
  const int axes[] = {0, 2, -1};
  const int samples[] = {1, 6, 12};
  for (int i = 0; i < 3; ++i) {
    this->LargeMargin()->set_axis(axes[i]);
    this->FillBottom(this->Shape(3, 2, 2, 5), samples[i]);
    shared_ptr<Layer<Dtype> > layer = this->SetUpLayer();
    GradientChecker<Dtype> checker(this->Tolerance(1e-2, 1e-5),
        this->Tolerance(2e-2, 1e-6));
    checker.CheckGradientExhaustive(layer.get(), this->bottom_, this->top_,
        0);
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestGradientOneBottom) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(4, 0);
  this->FillBottom(this->Shape(6, 5), 6);
  this->bottom_.resize(1);
  shared_ptr<Layer<Dtype> > layer = this->SetUpLayer();
  GradientChecker<Dtype> checker(1e-2, 1e-3);
  checker.CheckGradientExhaustive(layer.get(), this->bottom_, this->top_);
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestGradientIgnoreLabel) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(4, 0);
  this->LargeMargin()->set_ignore_label(2);
  this->CheckGradient(4);
  this->LargeMargin()->set_ignore_label(255);
  shared_ptr<Layer<Dtype> > layer =
      this->SetUpOnAllSegments(4, 5, false);
  for (int i = 1; i < this->labels_->count(); i += 3) {
    this->labels_->mutable_cpu_data()[i] = 255;
  }
  GradientChecker<Dtype> checker(this->Tolerance(1e-2, 1e-5),
      this->Tolerance(1e-2, 1e-6));
  checker.CheckGradientExhaustive(layer.get(), this->bottom_, this->top_, 0);
}

// All samples of one class: their gradients by its weights add up.
TYPED_TEST(LargeMarginInnerProductLayerTest, TestGradientRepeatedLabels) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(4, 0.5);
  this->FillBottom(this->Shape(9, 5), 9);
  caffe_set(9, Dtype(2), this->labels_->mutable_cpu_data());
  shared_ptr<Layer<Dtype> > layer = this->SetUpLayer();
  GradientChecker<Dtype> checker(this->Tolerance(1e-2, 1e-5),
      this->Tolerance(2e-2, 1e-6));
  checker.CheckGradientExhaustive(layer.get(), this->bottom_, this->top_, 0);
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestIgnoreLabel) {
  typedef typename TypeParam::Dtype Dtype;
  const int ignored[] = {2, -1, 255};
  for (int n = 0; n < 3; ++n) {
    this->SetMarginAndLambda(4, 0);
    this->LargeMargin()->set_ignore_label(ignored[n]);
    this->SetTops(3);
    shared_ptr<Layer<Dtype> > layer = this->SetUpOnAllSegments(4);
    const int samples = this->labels_->count();
    for (int i = 0; i < samples; i += 3) {
      this->labels_->mutable_cpu_data()[i] = ignored[n];
    }
    vector<bool> has_margin(samples);
    for (int i = 0; i < samples; ++i) {
      has_margin[i] = this->labels_->cpu_data()[i] != ignored[n];
    }
    Blob<Dtype>* const weights = layer->blobs()[0].get();
    layer->Forward(this->bottom_, this->top_);
    this->ExpectNear(this->ReferenceLogits(*weights, 4, 0, has_margin),
        this->logits_->cpu_data(), this->Tolerance(1e-4, 1e-9), "logit");
    this->FillGaussian(this->logits_->count(),
        this->logits_->mutable_cpu_diff());
    caffe_set(weights->count(), Dtype(0), weights->mutable_cpu_diff());
    layer->Backward(this->top_, this->PropagateDown(true), this->bottom_);
    vector<double> by_features, by_weights;
    this->ReferenceGradients(*weights, 4, 0, has_margin, &by_features,
        &by_weights);
    this->ExpectNear(by_features, this->features_->cpu_diff(),
        this->Tolerance(2e-4, 1e-5), "by feature");
    this->ExpectNear(by_weights, weights->cpu_diff(),
        this->Tolerance(2e-4, 1e-5), "by weight");
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestAllIgnored) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(4, 0);
  this->LargeMargin()->set_ignore_label(-1);
  this->SetTops(3);
  this->FillBottom(this->Shape(6, 5), 6);
  caffe_set(6, Dtype(-1), this->labels_->mutable_cpu_data());
  shared_ptr<Layer<Dtype> > layer = this->SetUpLayer();
  layer->Forward(this->bottom_, this->top_);
  this->ExpectSameBits(this->logits_->count(), this->plain_->cpu_data(),
      this->logits_->cpu_data(), "logits");
}

// Two identical backward passes add the same gradient, bit for bit.
TYPED_TEST(LargeMarginInnerProductLayerTest, TestDeterministic) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(4, 0);
  this->FillBottom(this->Shape(64, 60), 64);
  shared_ptr<Layer<Dtype> > layer = this->SetUpLayer();
  Blob<Dtype>* const weights = layer->blobs()[0].get();
  Blob<Dtype> diff, by_features, by_weights;
  for (int run = 0; run < 5; ++run) {
    layer->Forward(this->bottom_, this->top_);
    if (run == 0) {
      diff.ReshapeLike(*this->logits_);
      this->FillGaussian(diff.count(), diff.mutable_cpu_diff());
    }
    this->logits_->CopyFrom(diff, true);
    caffe_set(weights->count(), Dtype(0), weights->mutable_cpu_diff());
    layer->Backward(this->top_, this->PropagateDown(true), this->bottom_);
    if (run == 0) {
      by_features.CopyFrom(*this->features_, true, true);
      by_weights.CopyFrom(*weights, true, true);
    }
    this->ExpectSameBits(by_features.count(), by_features.cpu_diff(),
        this->features_->cpu_diff(), "gradient by the features");
    this->ExpectSameBits(by_weights.count(), by_weights.cpu_diff(),
        weights->cpu_diff(), "gradient by the weights");
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestWhatNobodyWants) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(4, 0);
  shared_ptr<Layer<Dtype> > layer = this->SetUpOnAllSegments(4);
  Blob<Dtype>* const weights = layer->blobs()[0].get();
  for (int wanted = 0; wanted < 4; ++wanted) {
    const bool by_features = wanted & 1, by_weights = wanted & 2;
    layer->set_param_propagate_down(0, by_weights);
    layer->Forward(this->bottom_, this->top_);
    caffe_set(this->logits_->count(), Dtype(1),
        this->logits_->mutable_cpu_diff());
    caffe_set(weights->count(), Dtype(7), weights->mutable_cpu_diff());
    caffe_set(this->features_->count(), Dtype(7),
        this->features_->mutable_cpu_diff());
    layer->Backward(this->top_, this->PropagateDown(by_features),
        this->bottom_);
    const Dtype* dw = weights->cpu_diff();
    const Dtype* dx = this->features_->cpu_diff();
    EXPECT_EQ(by_weights ? 0 : weights->count(),
        std::count(dw, dw + weights->count(), Dtype(7)));
    EXPECT_EQ(by_features ? 0 : this->features_->count(),
        std::count(dx, dx + this->features_->count(), Dtype(7)));
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestLambda) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetTops(2);
  this->FillBottom(this->Shape(3, 5), 3);
  LargeMarginInnerProductParameter* param = this->LargeMargin();
  param->set_margin(4);
  param->set_base(1000);
  param->set_gamma(0.125);
  param->set_power(2);
  param->set_lambda_min(5);
  param->set_iteration(40);
  shared_ptr<Layer<Dtype> > layer = this->SetUpLayer();
  bool reached_minimum = false;
  for (int forward = 1; forward <= 100; ++forward) {
    layer->Forward(this->bottom_, this->top_);
    const double descent = 1000 * pow(1 + 0.125 * (40 + forward), -2);
    const Dtype expected = std::max(5., descent);
    EXPECT_NEAR(expected, this->lambda_->cpu_data()[0], 1e-6 * expected);
    reached_minimum |= descent < 5;
  }
  EXPECT_TRUE(reached_minimum);
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestLambdaIsThatOfTheLogits) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetTops(2);
  LargeMarginInnerProductParameter* param = this->LargeMargin();
  param->set_margin(4);
  param->set_base(10);
  param->set_gamma(1);
  shared_ptr<Layer<Dtype> > layer = this->SetUpOnAllSegments(4);
  for (int forward = 1; forward <= 5; ++forward) {
    layer->Forward(this->bottom_, this->top_);
    this->ExpectNear(this->ReferenceLogits(*layer->blobs()[0], 4,
        10. / (1 + forward)), this->logits_->cpu_data(),
        this->Tolerance(1e-4, 1e-9), "logit");
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestBaseZeroIsNoLambda) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetTops(2);
  this->SetMarginAndLambda(4, 0);
  this->LargeMargin()->set_gamma(1e-5);
  this->LargeMargin()->set_power(45);
  this->LargeMargin()->set_iteration(0);
  shared_ptr<Layer<Dtype> > layer = this->SetUpOnAllSegments(4);
  layer->Forward(this->bottom_, this->top_);
  EXPECT_EQ(Dtype(0), this->lambda_->cpu_data()[0]);
  this->ExpectNear(this->ReferenceLogits(*layer->blobs()[0], 4, 0),
      this->logits_->cpu_data(), this->Tolerance(1e-4, 1e-9), "logit");
}

// What a snapshot holds continues the descent of lambda.
TYPED_TEST(LargeMarginInnerProductLayerTest, TestToProto) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetTops(2);
  this->FillBottom(this->Shape(3, 5), 3);
  LargeMarginInnerProductParameter* param = this->LargeMargin();
  param->set_margin(4);
  param->set_base(1000);
  param->set_gamma(0.25);
  param->set_iteration(17);
  shared_ptr<Layer<Dtype> > layer = this->SetUpLayer();
  LayerParameter alone, before, after;
  // Of a net that nobody trains, the passes are no training's.
  layer->ToProto(&alone);
  EXPECT_FALSE(alone.largemargin_inner_product_param().has_passes());
  dynamic_cast<LargeMarginInnerProductLayer<Dtype>*>(layer.get())
      ->JoinSolver(false);
  layer->ToProto(&before);
  EXPECT_EQ(17, before.largemargin_inner_product_param().passes());
  for (int forward = 0; forward < 6; ++forward) {
    layer->Forward(this->bottom_, this->top_);
  }
  layer->ToProto(&after);
  EXPECT_EQ(23, after.largemargin_inner_product_param().passes());
  ASSERT_EQ(1, after.blobs_size());
  // Nothing but the passes differs from what the prototxt says.
  LayerParameter expected(this->param_);
  expected.mutable_largemargin_inner_product_param()->set_passes(23);
  after.clear_blobs();
  EXPECT_EQ(expected.SerializeAsString(), after.SerializeAsString());

  layer->Forward(this->bottom_, this->top_);
  const Dtype lambda = this->lambda_->cpu_data()[0];
  shared_ptr<Layer<Dtype> > next(
      new LargeMarginInnerProductLayer<Dtype>(after));
  next->SetUp(this->bottom_, this->top_);
  next->Forward(this->bottom_, this->top_);
  EXPECT_EQ(lambda, this->lambda_->cpu_data()[0]);
}

// A loss on the third top trains as on an InnerProduct layer.
TYPED_TEST(LargeMarginInnerProductLayerTest, TestGradientPlainLogits) {
  for (int margin = 1; margin <= 4; margin += 3) {
    this->SetMarginAndLambda(margin, 0.5);
    this->SetTops(3);
    // The checker goes through all tops.
    this->CheckGradient(margin);
  }
}

// Nobody wrote the gradient of the third top: it takes no memory, and counts
// for nothing. Then somebody does.
TYPED_TEST(LargeMarginInnerProductLayerTest, TestPlainLogitsWithoutGradient) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(4, 0);
  this->SetTops(3);
  shared_ptr<Layer<Dtype> > layer = this->SetUpOnAllSegments(4);
  Blob<Dtype>* const weights = layer->blobs()[0].get();
  layer->Forward(this->bottom_, this->top_);
  this->FillGaussian(this->logits_->count(),
      this->logits_->mutable_cpu_diff());
  Blob<Dtype> diff;
  diff.CopyFrom(*this->logits_, true, true);
  caffe_set(weights->count(), Dtype(0), weights->mutable_cpu_diff());
  layer->Backward(this->top_, this->PropagateDown(true), this->bottom_);
  EXPECT_EQ(SyncedMemory::UNINITIALIZED, this->plain_->diff()->head());
  this->ExpectSameBits(diff.count(), diff.cpu_diff(),
      this->logits_->cpu_diff(), "gradient of the logits");
  Blob<Dtype> dw, dx;
  dw.CopyFrom(*weights, true, true);
  dx.CopyFrom(*this->features_, true, true);

  this->FillGaussian(this->plain_->count(), this->plain_->mutable_cpu_diff());
  Blob<Dtype> top_blob;
  vector<Blob<Dtype>*> bottom(1, this->features_.get()), top(1, &top_blob);
  shared_ptr<Layer<Dtype> > inner_product =
      this->MakeInnerProduct(*weights, bottom, top);
  inner_product->Forward(bottom, top);
  top_blob.CopyFrom(*this->plain_, true);
  Blob<Dtype>* const plain_weights = inner_product->blobs()[0].get();
  caffe_set(weights->count(), Dtype(0), plain_weights->mutable_cpu_diff());
  inner_product->Backward(top, vector<bool>(1, true), bottom);
  vector<double> by_weights(weights->count()), by_features(dx.count());
  for (int i = 0; i < weights->count(); ++i) {
    by_weights[i] = static_cast<double>(dw.cpu_diff()[i])
        + plain_weights->cpu_diff()[i];
  }
  for (int i = 0; i < dx.count(); ++i) {
    by_features[i] = static_cast<double>(dx.cpu_diff()[i])
        + this->features_->cpu_diff()[i];
  }
  caffe_set(weights->count(), Dtype(0), weights->mutable_cpu_diff());
  layer->Backward(this->top_, this->PropagateDown(true), this->bottom_);
  const double tolerance = this->Tolerance(2e-4, 1e-9);
  this->ExpectNear(by_weights, weights->cpu_diff(), tolerance, "by weight");
  this->ExpectNear(by_features, this->features_->cpu_diff(), tolerance,
      "by feature");
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestLossWeightOfPlainLogits) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetTops(3);
  this->param_.add_loss_weight(0);
  this->param_.add_loss_weight(0);
  this->param_.add_loss_weight(0.5);
  this->FillBottom(this->Shape(6, 5), 6);
  shared_ptr<Layer<Dtype> > layer = this->SetUpLayer();
  layer->Forward(this->bottom_, this->top_);
  Blob<Dtype>* const weights = layer->blobs()[0].get();
  caffe_set(weights->count(), Dtype(0), weights->mutable_cpu_diff());
  layer->Backward(this->top_, this->PropagateDown(true), this->bottom_);
  // Half the sum of all plain logits: each row of W gets half the sum of X.
  for (int j = 0; j < 5; ++j) {
    double sum = 0;
    for (int i = 0; i < 6; ++i) {
      sum += this->features_->cpu_data()[i * 5 + j];
    }
    EXPECT_NEAR(sum / 2, weights->cpu_diff()[j], 1e-5);
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestBackwardNeedsForward) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  this->FillBottom(this->Shape(6, 5), 6);
  shared_ptr<LargeMarginInnerProductLayer<typename TypeParam::Dtype> > layer =
      this->SetUpLayer();
  EXPECT_DEATH(layer->Backward(this->top_, this->PropagateDown(true),
      this->bottom_), "layer 'lm': backward without a forward pass");
  layer->Forward(this->bottom_, this->top_);
  this->FillBottom(this->Shape(7, 5), 7);
  layer->Reshape(this->bottom_, this->top_);
  EXPECT_DEATH(layer->Backward(this->top_, this->PropagateDown(true),
      this->bottom_), "layer 'lm': backward without a forward pass");
}

#ifndef CPU_ONLY
TYPED_TEST(LargeMarginInnerProductLayerTest, TestModesDoNotMix) {
  int devices = 0;  // of which a build with CUDA may have none
  if (cudaGetDeviceCount(&devices) != cudaSuccess || !devices) { return; }
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  const Caffe::Brew mode = Caffe::mode();
  this->FillBottom(this->Shape(6, 5), 6);
  shared_ptr<LargeMarginInnerProductLayer<typename TypeParam::Dtype> > layer =
      this->SetUpLayer();
  layer->Forward(this->bottom_, this->top_);
  Caffe::set_mode(mode == Caffe::CPU ? Caffe::GPU : Caffe::CPU);
  EXPECT_DEATH(layer->Backward(this->top_, this->PropagateDown(true),
      this->bottom_), "layer 'lm': backward in .PU mode after a forward pass");
  Caffe::set_mode(mode);
}
#endif  // CPU_ONLY

TYPED_TEST(LargeMarginInnerProductLayerTest, TestWeightsOfAnotherShape) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  this->FillBottom(this->Shape(6, 5), 6);
  shared_ptr<LargeMarginInnerProductLayer<typename TypeParam::Dtype> > layer =
      this->SetUpLayer();
  layer->blobs()[0]->Reshape(this->Shape(1, 1));
  EXPECT_DEATH(layer->Forward(this->bottom_, this->top_),
      "layer 'lm': class weights of shape 1 1 .1., not 4 5 .20.: another");
}

// A top that no longer has the layer's shape makes the Rust side panic: a
// defect, but one that must end as errors of Caffe do.
TYPED_TEST(LargeMarginInnerProductLayerTest, TestPanicIsFatalAndNamesTheLayer) {
  if (Caffe::mode() != Caffe::CPU) { return; }
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  this->FillBottom(this->Shape(6, 5), 6);
  shared_ptr<LargeMarginInnerProductLayer<typename TypeParam::Dtype> > layer =
      this->SetUpLayer();
  layer->Forward(this->bottom_, this->top_);
  this->logits_->Reshape(this->Shape(1, 1));
  EXPECT_DEATH(layer->Backward(this->top_, this->PropagateDown(true),
      this->bottom_),
      "LargeMarginInnerProduct layer 'lm': internal error, please report it");
}

// Sets a variable of the environment while it lives, and keeps what is logged.
class Logged {
 public:
  Logged(const char* name, const char* value) : name_(name),
      to_stderr_(FLAGS_logtostderr), level_(FLAGS_minloglevel) {
    FLAGS_logtostderr = true;
    FLAGS_minloglevel = 0;
    setenv(name, value, 1);
    ::testing::internal::CaptureStderr();
  }
  ~Logged() { Lines(""); }
  // The lines with some text, from behind it on.
  vector<string> Lines(const string& text) {
    if (name_) {
      unsetenv(name_);
      name_ = NULL;
      FLAGS_logtostderr = to_stderr_;
      FLAGS_minloglevel = level_;
      all_ = ::testing::internal::GetCapturedStderr();
    }
    vector<string> found;
    for (size_t at = 0; !text.empty(); ++at) {
      at = all_.find(text, at);
      if (at == string::npos) { break; }
      at += text.size();
      found.push_back(all_.substr(at, all_.find('\n', at) - at));
    }
    return found;
  }

 private:
  const char* name_;
  bool to_stderr_;
  int level_;
  string all_;
};

static const char kLogEvery[] = "LSOFTMAX_LOG_EVERY";
static const char kDiagnosis[] = "] LargeMarginInnerProduct layer 'lm': pass ";

TYPED_TEST(LargeMarginInnerProductLayerTest, TestLogEvery) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(2, 5);
  Logged log(kLogEvery, "3");
  // Of each segment two angles beside its ends and the middle, and the ends.
  shared_ptr<Layer<Dtype> > layer = this->SetUpOnAllSegments(2);
  for (int i = 0; i < 7; ++i) {
    layer->Forward(this->bottom_, this->top_);
    layer->Backward(this->top_, this->PropagateDown(true), this->bottom_);
  }
  const vector<string> lines = log.Lines(kDiagnosis);
  ASSERT_EQ(3, lines.size());
  for (int i = 0; i < 3; ++i) {
    const string head = format_int(1 + 3 * i) + ", lambda = 5, samples = 8, "
        "ignored = 0, zero = 0, not_finite = 0, angle_mean = ";
    ASSERT_EQ(head, lines[i].substr(0, head.size()));
    EXPECT_NEAR(90, atof(lines[i].c_str() + head.size()), 0.1);
    const string norm = "feature_norm = ";
    ASSERT_NE(string::npos, lines[i].find(norm));
    EXPECT_NEAR(4, atof(lines[i].c_str() + lines[i].find(norm)
        + norm.size()), 1e-3);
    EXPECT_NE(string::npos, lines[i].find(", segments = 0.5 0.5, "));
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestLogEveryChangesNothing) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(4, 1);
  this->FillBottom(this->Shape(9, 5), 9);
  Blob<Dtype> diff(this->Shape(9, 4)), logits, by_features, by_weights;
  this->FillGaussian(diff.count(), diff.mutable_cpu_data());
  Blob<Dtype> weights(this->Shape(4, 5));
  this->FillGaussian(weights.count(), weights.mutable_cpu_data());
  for (int logs = 0; logs < 2; ++logs) {
    Logged log(kLogEvery, logs ? "1" : "0");
    shared_ptr<Layer<Dtype> > layer = this->SetUpLayer();
    layer->blobs()[0]->CopyFrom(weights);
    caffe_set(20, Dtype(0), layer->blobs()[0]->mutable_cpu_diff());
    layer->Forward(this->bottom_, this->top_);
    memcpy(this->logits_->mutable_cpu_diff(), diff.cpu_data(),
        diff.count() * sizeof(Dtype));
    layer->Backward(this->top_, this->PropagateDown(true), this->bottom_);
    EXPECT_EQ(logs, log.Lines(kDiagnosis).size());
    if (!logs) {
      logits.CopyFrom(*this->logits_, false, true);
      by_features.CopyFrom(*this->features_, true, true);
      by_weights.CopyFrom(*layer->blobs()[0], true, true);
      continue;
    }
    this->ExpectSameBits(36, logits.cpu_data(), this->logits_->cpu_data(),
        "logits");
    this->ExpectSameBits(45, by_features.cpu_diff(),
        this->features_->cpu_diff(), "by features");
    this->ExpectSameBits(20, by_weights.cpu_diff(),
        layer->blobs()[0]->cpu_diff(), "by weights");
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestOnlyTrainingIsLogged) {
  typedef typename TypeParam::Dtype Dtype;
  this->FillBottom(this->Shape(6, 5), 6);
  Logged log(kLogEvery, "1");
  this->param_.set_phase(TEST);
  this->SetUpLayer()->Forward(this->bottom_, this->top_);
  this->param_.set_phase(TRAIN);
  vector<Blob<Dtype>*> features(1, this->bottom_[0]);
  LargeMarginInnerProductLayer<Dtype> deployed(this->param_);
  deployed.SetUp(features, this->top_);
  deployed.Forward(features, this->top_);
  EXPECT_EQ(0, log.Lines(kDiagnosis).size());
}

// The angle to a zero vector is undefined: such a sample has no margin.
TYPED_TEST(LargeMarginInnerProductLayerTest, TestZeros) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(4, 0);
  this->SetTops(3);
  shared_ptr<Layer<Dtype> > layer = this->SetUpOnAllSegments(4);
  Blob<Dtype>* const weights = layer->blobs()[0].get();
  const int length = weights->shape(1);
  caffe_set(length, Dtype(0), this->features_->mutable_cpu_data() + length);
  caffe_set(length, Dtype(0), weights->mutable_cpu_data() + 2 * length);
  layer->Forward(this->bottom_, this->top_);
  this->ExpectNear(this->ReferenceLogits(*weights, 4, 0),
      this->logits_->cpu_data(), this->Tolerance(1e-4, 1e-9), "logit");
  caffe_set(this->logits_->count(), Dtype(1),
      this->logits_->mutable_cpu_diff());
  caffe_set(weights->count(), Dtype(0), weights->mutable_cpu_diff());
  layer->Backward(this->top_, this->PropagateDown(true), this->bottom_);
  this->ExpectFinite(this->features_->count(), this->features_->cpu_diff(),
      "gradient by feature");
  this->ExpectFinite(weights->count(), weights->cpu_diff(),
      "gradient by weight");
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestLargeAndSmallFeatures) {
  typedef typename TypeParam::Dtype Dtype;
  this->SetMarginAndLambda(4, 0);
  shared_ptr<Layer<Dtype> > layer = this->SetUpOnAllSegments(4);
  Blob<Dtype>* const weights = layer->blobs()[0].get();
  const Dtype scales[] = {Dtype(1e30), Dtype(1e-30),
      4 * std::numeric_limits<Dtype>::denorm_min()};
  Blob<Dtype> features;
  features.CopyFrom(*this->features_, false, true);
  for (int n = 0; n < 3; ++n) {
    SCOPED_TRACE(::testing::Message() << "features times " << scales[n]);
    caffe_cpu_scale(features.count(), scales[n], features.cpu_data(),
        this->features_->mutable_cpu_data());
    layer->Forward(this->bottom_, this->top_);
    caffe_set(this->logits_->count(), Dtype(1),
        this->logits_->mutable_cpu_diff());
    caffe_set(weights->count(), Dtype(0), weights->mutable_cpu_diff());
    layer->Backward(this->top_, this->PropagateDown(true), this->bottom_);
    this->ExpectFinite(this->logits_->count(), this->logits_->cpu_data(),
        "logit");
    this->ExpectFinite(this->features_->count(),
        this->features_->cpu_diff(), "gradient by feature");
    this->ExpectFinite(weights->count(), weights->cpu_diff(),
        "gradient by weight");
  }
}

// What a thread works on, its own copy of everything.
template <typename Dtype>
struct Training {
  LayerParameter param;
  Blob<Dtype> features, labels, initial_weights, trained_weights;
};

// Gradient descent on the squared logits, several times over: layers come and
// go while other threads work.
template <typename Dtype>
static void Train(const Caffe::Brew mode, Training<Dtype>* training) {
  Caffe::set_mode(mode);
  for (int life = 0; life < 5; ++life) {
    Blob<Dtype> logits, lambda;
    vector<Blob<Dtype>*> bottom, top;
    bottom.push_back(&training->features);
    bottom.push_back(&training->labels);
    top.push_back(&logits);
    top.push_back(&lambda);
    shared_ptr<Layer<Dtype> > layer =
        LayerRegistry<Dtype>::CreateLayer(training->param);
    layer->SetUp(bottom, top);
    Blob<Dtype>* const weights = layer->blobs()[0].get();
    weights->CopyFrom(training->initial_weights);
    vector<bool> propagate_down(2, false);
    propagate_down[0] = true;
    for (int iteration = 0; iteration < 40; ++iteration) {
      layer->Forward(bottom, top);
      caffe_copy(logits.count(), logits.cpu_data(),
          logits.mutable_cpu_diff());
      caffe_set(weights->count(), Dtype(0), weights->mutable_cpu_diff());
      layer->Backward(top, propagate_down, bottom);
      caffe_axpy(weights->count(), Dtype(-1e-4), weights->cpu_diff(),
          weights->mutable_cpu_data());
    }
    training->trained_weights.CopyFrom(*weights, false, true);
  }
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestThreads) {
  typedef typename TypeParam::Dtype Dtype;
  const int threads = 6;
  this->LargeMargin()->set_base(10);
  this->LargeMargin()->set_gamma(0.1);
  this->FillBottom(this->Shape(32, 20), 32);
  vector<shared_ptr<Training<Dtype> > > alone, together;
  for (int i = 0; i < threads; ++i) {
    Blob<Dtype> weights(this->Shape(4, 20));
    this->FillGaussian(weights.count(), weights.mutable_cpu_data());
    this->LargeMargin()->set_margin(i + 1);
    for (int n = 0; n < 2; ++n) {
      shared_ptr<Training<Dtype> > training(new Training<Dtype>());
      training->param = this->param_;
      training->features.CopyFrom(*this->features_, false, true);
      training->labels.CopyFrom(*this->labels_, false, true);
      training->initial_weights.CopyFrom(weights, false, true);
      (n == 0 ? alone : together).push_back(training);
    }
    Train(Caffe::mode(), alone[i].get());
  }
  boost::thread_group group;
  for (int i = 0; i < threads; ++i) {
    group.add_thread(new boost::thread(&Train<Dtype>, Caffe::mode(),
        together[i].get()));
  }
  group.join_all();
  for (int i = 0; i < threads; ++i) {
    const Blob<Dtype>& expected = alone[i]->trained_weights;
    this->ExpectFinite(expected.count(), expected.cpu_data(), "weight");
    this->ExpectSameBits(expected.count(), expected.cpu_data(),
        together[i]->trained_weights.cpu_data(), "weights");
  }
}

// A solver of its own, on random data of its own.
template <typename Dtype>
static void Solve(const Caffe::Brew mode, const int seed,
    Blob<Dtype>* weights, Blob<Dtype>* lambda) {
  // Caffe's cuDNN softmax needs a GPU even in CPU mode.
  static const char text[] =
      "base_lr: 0.01 lr_policy: 'fixed' snapshot_after_train: false "
      "net_param { "
      "layer { name: 'x' type: 'DummyData' top: 'x' top: 'y0' top: 'y1' "
      "  dummy_data_param { shape { dim: 12 dim: 10 } "
      "    shape { dim: 6 } shape { dim: 6 } data_filler { type: 'gaussian' } "
      "    data_filler { type: 'constant' value: 1 } "
      "    data_filler { type: 'constant' value: 2 } } } "
      "layer { name: 'y' type: 'Concat' bottom: 'y0' bottom: 'y1' top: 'y' "
      "  concat_param { axis: 0 } } "
      "layer { name: 'lm' type: 'LargeMarginInnerProduct' bottom: 'x' "
      "  bottom: 'y' top: 'lm' top: 'lambda' "
      "  largemargin_inner_product_param { num_output: 3 type: QUADRUPLE "
      "    base: 100 gamma: 0.5 weight_filler { type: 'xavier' } } } "
      "layer { name: 'loss' type: 'SoftmaxWithLoss' bottom: 'lm' bottom: 'y' "
      "  top: 'loss' softmax_param { engine: CAFFE } } }";
  Caffe::set_mode(mode);
  SolverParameter param;
  CHECK(google::protobuf::TextFormat::ParseFromString(text, &param));
  param.set_random_seed(seed);
  SGDSolver<Dtype> solver(param);
  solver.Step(50);
  weights->CopyFrom(*solver.net()->learnable_params()[0], false, true);
  lambda->CopyFrom(*solver.net()->blob_by_name("lambda"), false, true);
}

TYPED_TEST(LargeMarginInnerProductLayerTest, TestSolverThreads) {
  typedef typename TypeParam::Dtype Dtype;
  const int threads = 4;
  Blob<Dtype> alone[threads], together[threads], lambdas[threads], lambda;
  for (int i = 0; i < threads; ++i) {
    Solve(Caffe::mode(), 1701 + i, &alone[i], &lambda);
  }
  boost::thread_group group;
  for (int i = 0; i < threads; ++i) {
    group.add_thread(new boost::thread(&Solve<Dtype>, Caffe::mode(),
        1701 + i, &together[i], &lambdas[i]));
  }
  group.join_all();
  for (int i = 0; i < threads; ++i) {
    this->ExpectSameBits(alone[i].count(), alone[i].cpu_data(),
        together[i].cpu_data(), "weights");
    EXPECT_NEAR(100. / (1 + 0.5 * 50), lambdas[i].cpu_data()[0], 1e-5);
  }
  // The seeds, and so what the threads compute, differ.
  EXPECT_NE(0, memcmp(alone[0].cpu_data(), alone[1].cpu_data(),
      alone[0].count() * sizeof(Dtype)));
}

}  // namespace caffe
