#ifndef CAFFE_BN_LAYER_HPP_
#define CAFFE_BN_LAYER_HPP_

#include <vector>

#include "caffe/blob.hpp"
#include "caffe/layer.hpp"
#include "caffe/proto/caffe.pb.h"

namespace caffe {

/**
 * @brief Batch normalization (Ioffe and Szegedy, arXiv 1502.03167) with a
 *        learned slope and bias for each channel: what BatchNorm and Scale do
 *        together, in one layer.
 *
 * For each channel (axis 1), over all other axes,
 * @f$ y = slope \cdot \hat{x} + bias @f$ with
 * @f$ \hat{x} = (x - \mu) \cdot s @f$.
 *
 * In the TRAIN phase @f$ \mu @f$ is the mean of the batch and
 * @f$ s = (\sigma^2 + eps)^{-1/2} @f$ the inverse of its standard deviation,
 * @f$ \sigma^2 @f$ the variance divided by the number of values. Each forward
 * pass moves two averages of them on:
 * @f$ moving \leftarrow momentum \cdot moving +
 *     (1 - momentum) \cdot batch @f$.
 * In the TEST phase, and in a frozen layer, @f$ \mu @f$ and @f$ s @f$ are these
 * averages.
 *
 * @param param provides BNParameter bn_param, with
 *  - slope_filler (\b optional, default constant 1), bias_filler
 *    (\b optional, default constant 0). The FillerParameters of slope and bias.
 *  - momentum (\b optional, default 0.9). The weight of the old value in the
 *    moving averages, from 0 to 1.
 *  - eps (\b optional, default 1e-5). Added to the variance, above 0.
 *  - frozen (\b optional, default false). Use the moving averages in the TRAIN
 *    phase too, and leave them, slope and bias as they are.
 *  - engine (\b optional). Accepted, and of no effect.
 *
 * The four blobs, each of shape @f$ (1 \times C) @f$, are the slope, the bias,
 * the moving mean and the moving inverse standard deviation. The latter two
 * get lr_mult 0 and decay_mult 0 whatever the prototxt says, and so do slope
 * and bias of a frozen layer. Caffe's Net decides by the prototxt alone where
 * the backward pass may end: layers below a frozen one are left out of it only
 * where the frozen one has param { lr_mult: 0 } written out, four times.
 */
template <typename Dtype>
class BNLayer : public Layer<Dtype> {
 public:
  explicit BNLayer(const LayerParameter& param)
      : Layer<Dtype>(param) {}
  virtual void LayerSetUp(const vector<Blob<Dtype>*>& bottom,
      const vector<Blob<Dtype>*>& top);
  virtual void Reshape(const vector<Blob<Dtype>*>& bottom,
      const vector<Blob<Dtype>*>& top);

  virtual inline const char* type() const { return "BN"; }
  virtual inline int ExactNumBottomBlobs() const { return 1; }
  virtual inline int ExactNumTopBlobs() const { return 1; }

 protected:
  /**
   * @param bottom input Blob vector (length 1)
   *   -# @f$ (N \times C \times ...) @f$, 2 axes or more
   *      the inputs @f$ x @f$
   * @param top output Blob vector (length 1), may be the bottom
   *   -# @f$ (N \times C \times ...) @f$
   *      the outputs @f$ y = slope \cdot \hat{x} + bias @f$
   */
  virtual void Forward_cpu(const vector<Blob<Dtype>*>& bottom,
      const vector<Blob<Dtype>*>& top);
  /**
   * @brief Computes the gradients by the inputs, the slope and the bias.
   *
   * With @f$ g = \frac{\partial E}{\partial y} @f$ and, for each channel, the
   * sums and the number @f$ m @f$ of its values:
   * @f$ \frac{\partial E}{\partial slope} = \sum g \hat{x} @f$,
   * @f$ \frac{\partial E}{\partial bias} = \sum g @f$, and
   * @f$ \frac{\partial E}{\partial x} = slope \cdot s \cdot (g -
   *     \frac{1}{m} \sum g - \frac{\hat{x}}{m} \sum g \hat{x}) @f$,
   * or, where the moving averages normalize,
   * @f$ \frac{\partial E}{\partial x} = slope \cdot s \cdot g @f$.
   * A frozen layer has no gradients by slope and bias.
   */
  virtual void Backward_cpu(const vector<Blob<Dtype>*>& top,
      const vector<bool>& propagate_down, const vector<Blob<Dtype>*>& bottom);
  virtual void Forward_gpu(const vector<Blob<Dtype>*>& bottom,
      const vector<Blob<Dtype>*>& top);
  virtual void Backward_gpu(const vector<Blob<Dtype>*>& top,
      const vector<bool>& propagate_down, const vector<Blob<Dtype>*>& bottom);

 private:
  // The passes, where Memory is: on the host, or on the device.
  template <class Memory>
  void ForwardIn(const vector<Blob<Dtype>*>& bottom,
      const vector<Blob<Dtype>*>& top);
  template <class Memory>
  void BackwardIn(const vector<Blob<Dtype>*>& top,
      const vector<bool>& propagate_down, const vector<Blob<Dtype>*>& bottom);
  // Whether a forward pass in place has to keep x_hat_ for the backward pass.
  bool KeepsXHat() const;

  // The Rust layer. Defined in the .cpp file, which keeps the headers of the
  // bridge out of this one.
  struct State;
  shared_ptr<State> state_;
  // The inputs, normalized: in place, nothing else is left of them.
  Blob<Dtype> x_hat_;
};

}  // namespace caffe

#endif  // CAFFE_BN_LAYER_HPP_
