#ifndef LSOFTMAX_BLOBS_HPP_
#define LSOFTMAX_BLOBS_HPP_

#include <algorithm>
#include <string>

#include "caffe/blob.hpp"
#include "caffe/layer.hpp"
#include "caffe/syncedmem.hpp"
#include "lsoftmax/src/bridge/ffi.rs.h"
#include "rust/cxx.h"

// What the layers need to talk to the Rust library. For their .cpp files only:
// the bridge's headers are not for Caffe's public ones.
namespace lsoftmax {

template <typename Dtype> struct TypeOf;
template <> struct TypeOf<float> {
  static const ElementType value = ElementType::F32;
};
template <> struct TypeOf<double> {
  static const ElementType value = ElementType::F64;
};

// Views of blobs, as bytes. An empty blob has no memory to ask for.
typedef rust::Slice<const uint8_t> Bytes;
typedef rust::Slice<uint8_t> MutableBytes;

template <typename Dtype>
Bytes View(const Dtype* data, int count) {
  return Bytes(reinterpret_cast<const uint8_t*>(data), count * sizeof(Dtype));
}

template <typename Dtype>
MutableBytes MutableView(Dtype* data, int count) {
  return MutableBytes(reinterpret_cast<uint8_t*>(data), count * sizeof(Dtype));
}

template <typename Dtype>
Bytes Data(const caffe::Blob<Dtype>* blob) {
  if (blob->count() == 0) { return Bytes(); }
  return View(blob->cpu_data(), blob->count());
}

template <typename Dtype>
MutableBytes MutableData(caffe::Blob<Dtype>* blob) {
  if (blob->count() == 0) { return MutableBytes(); }
  return MutableView(blob->mutable_cpu_data(), blob->count());
}

template <typename Dtype>
Bytes Diff(const caffe::Blob<Dtype>* blob) {
  if (blob->count() == 0) { return Bytes(); }
  return View(blob->cpu_diff(), blob->count());
}

template <typename Dtype>
MutableBytes MutableDiff(caffe::Blob<Dtype>* blob) {
  if (blob->count() == 0) { return MutableBytes(); }
  return MutableView(blob->mutable_cpu_diff(), blob->count());
}

// Whether a layer above, or a loss_weight, has ever written the gradient.
template <typename Dtype>
bool HasDiff(const caffe::Blob<Dtype>* blob) {
  return blob->count() > 0
      && blob->diff()->head() != caffe::SyncedMemory::UNINITIALIZED;
}

#ifndef CPU_ONLY
// The same in device memory, null for an empty blob.
template <typename Dtype>
const uint8_t* GpuData(const caffe::Blob<Dtype>* blob) {
  return blob->count() == 0 ? NULL
      : reinterpret_cast<const uint8_t*>(blob->gpu_data());
}

template <typename Dtype>
uint8_t* MutableGpuData(caffe::Blob<Dtype>* blob) {
  return blob->count() == 0 ? NULL
      : reinterpret_cast<uint8_t*>(blob->mutable_gpu_data());
}

template <typename Dtype>
const uint8_t* GpuDiff(const caffe::Blob<Dtype>* blob) {
  return blob->count() == 0 ? NULL
      : reinterpret_cast<const uint8_t*>(blob->gpu_diff());
}

template <typename Dtype>
uint8_t* MutableGpuDiff(caffe::Blob<Dtype>* blob) {
  return blob->count() == 0 ? NULL
      : reinterpret_cast<uint8_t*>(blob->mutable_gpu_diff());
}

// Device memory that a layer's passes share. It grows and never shrinks.
class Scratch {
 public:
  Scratch() : bytes_(0) {}
  // Takes no memory before it is asked for.
  void Reshape(size_t bytes) { bytes_ = std::max(bytes_, bytes); }
  uint8_t* gpu_data() {
    if (!memory_ || memory_->size() < bytes_) {
      // One byte at least, so that there is an address.
      memory_.reset(new caffe::SyncedMemory(std::max<size_t>(bytes_, 1)));
    }
    return static_cast<uint8_t*>(memory_->mutable_gpu_data());
  }

 private:
  size_t bytes_;
  caffe::shared_ptr<caffe::SyncedMemory> memory_;
};
#endif  // CPU_ONLY

// Says once a process which version of the layers runs.
inline void LogVersion() {
  static const bool logged = (LOG(INFO) << "L-Softmax layers, version "
      << std::string(version()), true);
  (void)logged;
}

// Ends the process, as CHECK does, with the layer's name before the message.
template <typename Dtype>
void Fail(const caffe::Layer<Dtype>& layer, const std::string& message) {
  LOG(FATAL) << layer.type() << " layer '" << layer.layer_param().name()
      << "': " << message;
}

// Ends the process where a blob of the layer has lost its shape: net surgery
// can do that, and in old Caffes a model in HDF5 of another net.
template <typename Dtype>
void CheckShape(const caffe::Layer<Dtype>& layer, const std::string& name,
    const caffe::Blob<Dtype>& blob, const std::vector<int>& shape) {
  if (blob.shape() != shape) {
    Fail(layer, name + " of shape " + blob.shape_string() + ", not "
        + caffe::Blob<Dtype>(shape).shape_string()
        + ": another net's model was loaded, or the blob was reshaped");
  }
}

}  // namespace lsoftmax

#endif  // LSOFTMAX_BLOBS_HPP_
