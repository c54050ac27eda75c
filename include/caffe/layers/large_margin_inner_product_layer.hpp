#ifndef CAFFE_LARGE_MARGIN_INNER_PRODUCT_LAYER_HPP_
#define CAFFE_LARGE_MARGIN_INNER_PRODUCT_LAYER_HPP_

#include <string>
#include <vector>

#include "caffe/blob.hpp"
#include "caffe/layer.hpp"
#include "caffe/proto/caffe.pb.h"

namespace caffe {

/**
 * @brief An inner product with an angular margin on the target class:
 *        followed by SoftmaxWithLoss it is the large-margin softmax (L-Softmax)
 *        of Liu, Wen, Yu and Yang, ICML 2016, arXiv 1612.02295.
 *
 * The logit of sample @f$ i @f$ and class @f$ j @f$ is the inner product
 * @f$ f_{ij} = w_j^\top x_i @f$, except for the sample's own class
 * @f$ y @f$. There, with @f$ \theta @f$ the angle between @f$ x_i @f$ and
 * @f$ w_y @f$, it is
 * @f$ \frac{\lambda f_{iy} + \|w_y\| \|x_i\| \psi(\theta)}{1 + \lambda} @f$
 * with
 * @f$ \psi(\theta) = (-1)^k \cos(m\theta) - 2k @f$ for @f$ \theta \in
 * [\frac{k\pi}{m}, \frac{(k+1)\pi}{m}] @f$.
 *
 * @f$ \lambda = \max(\lambda_{min},
 *     base \cdot (1 + gamma \cdot iteration)^{-power}) @f$, where iteration
 * counts the forward passes, this one included. `caffe train --snapshot`
 * continues the count.
 *
 * @param param provides LargeMarginInnerProductParameter
 *        largemargin_inner_product_param, with
 *  - num_output. The number of classes @f$ N @f$.
 *  - type (\b optional, default SINGLE). The margin @f$ m @f$: SINGLE,
 *    DOUBLE, TRIPLE and QUADRUPLE for 1 to 4.
 *  - margin (\b optional). Any @f$ m \ge 1 @f$; overrides type.
 *  - weight_filler (\b optional). The FillerParameter of the class weights.
 *  - axis (\b optional, default 1). The first axis of the features.
 *  - base (\b optional, default 1), gamma (\b optional, default 0), power
 *    (\b optional, default 1), iteration (\b optional, default 0),
 *    lambda_min (\b optional, default 0). The descent of lambda.
 *  - ignore_label (\b optional). Samples of this label get no margin.
 *
 * Where the environment has LSOFTMAX_LOG_EVERY=N, a layer with labels of the
 * TRAIN phase logs a line (INFO) in each N-th forward pass, the first included:
 *  - lambda, and how many samples the rest is of, were ignored (ignore_label),
 *    are without an angle because features or weights are zero, or not finite;
 *  - angle_mean, angle_p95 and angle_deciles. The mean, the 95th percentile and
 *    the deciles (least and largest included) of @f$ \theta @f$ in degrees;
 *  - segments. The shares of samples with @f$ k = 0, \dots, m - 1 @f$;
 *  - feature_norm and weight_norm. The means of @f$ \|x_i\| @f$ over the
 *    samples and of @f$ \|w_y\| @f$ over their classes;
 *  - holds. The share of samples whose margin holds: with all of the margin,
 *    whatever @f$ \lambda @f$ is, the target logit is still the greatest,
 *    @f$ \|w_y\| \|x_i\| \psi(\theta) \ge \max_{j \ne y} f_{ij} @f$.
 *
 * In GPU mode, features, labels, weights and logits are copied to the host in
 * those passes. Without the variable, or with 0, nothing is computed.
 *
 * The one learnable blob holds the class weights @f$ w @f$, of shape
 * @f$ (N \times K) @f$: that of an InnerProduct layer without bias, with which
 * trained models interchange.
 */
template <typename Dtype>
class LargeMarginInnerProductLayer : public Layer<Dtype> {
 public:
  explicit LargeMarginInnerProductLayer(const LayerParameter& param)
      : Layer<Dtype>(param) {}
  virtual ~LargeMarginInnerProductLayer();
  virtual void LayerSetUp(const vector<Blob<Dtype>*>& bottom,
      const vector<Blob<Dtype>*>& top);
  virtual void Reshape(const vector<Blob<Dtype>*>& bottom,
      const vector<Blob<Dtype>*>& top);

  virtual inline const char* type() const { return "LargeMarginInnerProduct"; }
  // The features; the labels, which a deployed net has not.
  virtual inline int MinBottomBlobs() const { return 1; }
  virtual inline int MaxBottomBlobs() const { return 2; }
  // The logits; lambda; the logits without margin.
  virtual inline int MinTopBlobs() const { return 1; }
  virtual inline int MaxTopBlobs() const { return 3; }
  virtual inline bool AllowForceBackward(const int bottom_index) const {
    return bottom_index != 1;
  }

  /// @brief Writes the layer, that of a solver's training net with the passes
  ///        behind it, for Resume. What its user wrote in iteration stays.
  virtual void ToProto(LayerParameter* param, bool write_diff = false);

  /**
   * @brief Says that the layer is in the training net of a solver, and whether
   *        what is written to the gradient of its third top is one.
   *
   * A layer of other nets takes it for one.
   */
  void JoinSolver(bool takes_plain_diff);
  /**
   * @brief Continues the descent of lambda after `passes` forward passes in
   *        all; after those of the layer's parameter where they are more.
   */
  void Resume(int64_t passes);
  /// @brief The forward passes behind the layer, all that ever were.
  int64_t passes() const;
  /// @brief Whether the layer has labels, and a margin above 1 for them.
  bool has_margin() const;
  /// @brief lambda of the last forward pass; before the first, of the next.
  double lambda() const;

 protected:
  /**
   * @param bottom input Blob vector (length 1-2)
   *   -# @f$ (M \times K) @f$ the features @f$ x @f$; all axes before axis
   *      count samples, all others features
   *   -# @f$ (M) @f$ the labels, integers in @f$ [0, N) @f$ or ignore_label.
   *      Without them the layer is a plain inner product.
   * @param top output Blob vector (length 1-3)
   *   -# @f$ (M \times N) @f$ the logits, with margin where there are labels
   *   -# @f$ (1) @f$ lambda of this pass
   *   -# @f$ (M \times N) @f$ the logits without margin, for an Accuracy layer
   *      that is to judge as a deployed net does. A loss on it trains as on an
   *      InnerProduct layer.
   */
  virtual void Forward_cpu(const vector<Blob<Dtype>*>& bottom,
      const vector<Blob<Dtype>*>& top);
  /**
   * @brief Computes the gradients by the features and by the class weights.
   *
   * @f$ \frac{\partial E}{\partial x_i} = \sum_j g_{ij} w_j +
   *     g_{iy} (a w_y + b \frac{\|w_y\|}{\|x_i\|} x_i) @f$
   * and the like with @f$ x @f$ and @f$ w @f$ exchanged, where @f$ g @f$ is
   * the gradient by the first top and, by the cosine @f$ c @f$,
   * @f$ a = \frac{\psi' - 1}{1 + \lambda} @f$,
   * @f$ b = \frac{\psi - c \psi'}{1 + \lambda} @f$.
   * Where the third top has a gradient, InnerProduct's of that is added. On the
   * way @f$ g_{iy} (1 + a) @f$ stands for @f$ g_{iy} @f$ in the first top's; at
   * the end it is bit by bit what it was.
   */
  virtual void Backward_cpu(const vector<Blob<Dtype>*>& top,
      const vector<bool>& propagate_down, const vector<Blob<Dtype>*>& bottom);
  // The same on the GPU, where a bad label is found out only by a later call:
  // to ask at once would make the host wait for the device.
  virtual void Forward_gpu(const vector<Blob<Dtype>*>& bottom,
      const vector<Blob<Dtype>*>& top);
  virtual void Backward_gpu(const vector<Blob<Dtype>*>& top,
      const vector<bool>& propagate_down, const vector<Blob<Dtype>*>& bottom);

 private:
  // The Rust layer. Defined in the .cpp file, which keeps the headers of the
  // bridge out of this one.
  struct State;
  shared_ptr<State> state_;

  // The passes, where Memory is: on the host, or on the device.
  template <class Memory>
  void ForwardIn(const vector<Blob<Dtype>*>& bottom,
      const vector<Blob<Dtype>*>& top);
  template <class Memory>
  void BackwardIn(const vector<Blob<Dtype>*>& top,
      const vector<bool>& propagate_down, const vector<Blob<Dtype>*>& bottom);
  void Warn(bool labels, bool plain_logits) const;
  void WriteLambda(const vector<Blob<Dtype>*>& top) const;
  void LogDiagnosis(const vector<Blob<Dtype>*>& bottom,
      const vector<Blob<Dtype>*>& top) const;
};

}  // namespace caffe

#endif  // CAFFE_LARGE_MARGIN_INNER_PRODUCT_LAYER_HPP_
