#ifndef LSOFTMAX_BLOBS_HPP_
#define LSOFTMAX_BLOBS_HPP_

#include <algorithm>
#include <string>

#include "caffe/blob.hpp"
#include "caffe/layer.hpp"
#include "caffe/syncedmem.hpp"
#include "rust/cxx.h"

// What the layers need to talk to the Rust library. For their .cpp files only:
// cxx.h is not for Caffe's public headers.
namespace lsoftmax {

// Views of blobs. An empty blob has no memory to ask for.
template <typename Dtype>
rust::Slice<const Dtype> Data(const caffe::Blob<Dtype>* blob) {
  if (blob->count() == 0) { return rust::Slice<const Dtype>(); }
  return rust::Slice<const Dtype>(blob->cpu_data(), blob->count());
}

template <typename Dtype>
rust::Slice<Dtype> MutableData(caffe::Blob<Dtype>* blob) {
  if (blob->count() == 0) { return rust::Slice<Dtype>(); }
  return rust::Slice<Dtype>(blob->mutable_cpu_data(), blob->count());
}

template <typename Dtype>
rust::Slice<const Dtype> Diff(const caffe::Blob<Dtype>* blob) {
  if (blob->count() == 0) { return rust::Slice<const Dtype>(); }
  return rust::Slice<const Dtype>(blob->cpu_diff(), blob->count());
}

template <typename Dtype>
rust::Slice<Dtype> MutableDiff(caffe::Blob<Dtype>* blob) {
  if (blob->count() == 0) { return rust::Slice<Dtype>(); }
  return rust::Slice<Dtype>(blob->mutable_cpu_diff(), blob->count());
}

#ifndef CPU_ONLY
// The same in device memory, null for an empty blob.
template <typename Dtype>
const Dtype* GpuData(const caffe::Blob<Dtype>* blob) {
  return blob->count() == 0 ? NULL : blob->gpu_data();
}

template <typename Dtype>
Dtype* MutableGpuData(caffe::Blob<Dtype>* blob) {
  return blob->count() == 0 ? NULL : blob->mutable_gpu_data();
}

template <typename Dtype>
const Dtype* GpuDiff(const caffe::Blob<Dtype>* blob) {
  return blob->count() == 0 ? NULL : blob->gpu_diff();
}

template <typename Dtype>
Dtype* MutableGpuDiff(caffe::Blob<Dtype>* blob) {
  return blob->count() == 0 ? NULL : blob->mutable_gpu_diff();
}

// Device memory that a layer's passes share. It grows and never shrinks.
class Scratch {
 public:
  uint8_t* Get(size_t bytes) {
    if (!memory_ || memory_->size() < bytes) {
      // One byte at least, so that there is an address.
      memory_.reset(new caffe::SyncedMemory(std::max<size_t>(bytes, 1)));
    }
    return static_cast<uint8_t*>(memory_->mutable_gpu_data());
  }

 private:
  caffe::shared_ptr<caffe::SyncedMemory> memory_;
};
#endif  // CPU_ONLY

// Ends the process, as CHECK does, with the layer's name before the message.
template <typename Dtype>
void Fail(const caffe::Layer<Dtype>& layer, const std::string& message) {
  LOG(FATAL) << layer.type() << " layer '" << layer.layer_param().name()
      << "': " << message;
}

}  // namespace lsoftmax

#endif  // LSOFTMAX_BLOBS_HPP_
