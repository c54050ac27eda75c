#ifndef LSOFTMAX_BLOBS_HPP_
#define LSOFTMAX_BLOBS_HPP_

#include <algorithm>
#include <string>

#include "caffe/blob.hpp"
#include "caffe/layer.hpp"
#include "caffe/syncedmem.hpp"
#include "lsoftmax/caffe_blas.hpp"
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

// A blob as a pass takes it, by the function of Blob that gives its values: an
// empty blob has no memory to ask for.
template <typename Dtype>
View ViewOf(const caffe::Blob<Dtype>* blob,
    const Dtype* (caffe::Blob<Dtype>::*values)() const) {
  View view = View();
  if (blob->count() > 0) {
    view.values = reinterpret_cast<const uint8_t*>((blob->*values)());
    view.count = blob->count();
  }
  return view;
}

template <typename Dtype>
MutableView ViewOf(caffe::Blob<Dtype>* blob,
    Dtype* (caffe::Blob<Dtype>::*values)()) {
  MutableView view = MutableView();
  if (blob->count() > 0) {
    view.values = reinterpret_cast<uint8_t*>((blob->*values)());
    view.count = blob->count();
  }
  return view;
}

// Device memory that a layer's passes share. It grows and never shrinks.
class Scratch {
 public:
  Scratch() : bytes_(0) {}
  // Takes no memory before it is asked for.
  void Reshape(size_t bytes) { bytes_ = std::max(bytes_, bytes); }
  MutableView gpu_data() {
    if (!memory_ || memory_->size() < bytes_) {
      // One byte at least, so that there is an address.
      memory_.reset(new caffe::SyncedMemory(std::max<size_t>(bytes_, 1)));
    }
    MutableView view = MutableView();
    view.values = static_cast<uint8_t*>(memory_->mutable_gpu_data());
    view.count = memory_->size();
    return view;
  }

 private:
  size_t bytes_;
  caffe::shared_ptr<caffe::SyncedMemory> memory_;
};

// Where a pass works, and the blobs as it takes them there.
struct HostMemory {
  typedef CpuBlas Blas;
  static const Memory value = Memory::Host;

  template <typename Dtype>
  static View Data(const caffe::Blob<Dtype>* blob) {
    return ViewOf(blob, &caffe::Blob<Dtype>::cpu_data);
  }
  template <typename Dtype>
  static View Diff(const caffe::Blob<Dtype>* blob) {
    return ViewOf(blob, &caffe::Blob<Dtype>::cpu_diff);
  }
  template <typename Dtype>
  static MutableView MutableData(caffe::Blob<Dtype>* blob) {
    return ViewOf(blob, &caffe::Blob<Dtype>::mutable_cpu_data);
  }
  template <typename Dtype>
  static MutableView MutableDiff(caffe::Blob<Dtype>* blob) {
    return ViewOf(blob, &caffe::Blob<Dtype>::mutable_cpu_diff);
  }
  static MutableView Of(Scratch*) { return MutableView(); }
};

#ifndef CPU_ONLY
struct DeviceMemory {
  typedef GpuBlas Blas;
  static const Memory value = Memory::Device;

  template <typename Dtype>
  static View Data(const caffe::Blob<Dtype>* blob) {
    return ViewOf(blob, &caffe::Blob<Dtype>::gpu_data);
  }
  template <typename Dtype>
  static View Diff(const caffe::Blob<Dtype>* blob) {
    return ViewOf(blob, &caffe::Blob<Dtype>::gpu_diff);
  }
  template <typename Dtype>
  static MutableView MutableData(caffe::Blob<Dtype>* blob) {
    return ViewOf(blob, &caffe::Blob<Dtype>::mutable_gpu_data);
  }
  template <typename Dtype>
  static MutableView MutableDiff(caffe::Blob<Dtype>* blob) {
    return ViewOf(blob, &caffe::Blob<Dtype>::mutable_gpu_diff);
  }
  static MutableView Of(Scratch* scratch) { return scratch->gpu_data(); }
};
#endif  // CPU_ONLY

// Whether anybody has ever asked for the gradient, as a layer above or a
// loss_weight does that writes one.
template <typename Dtype>
bool HasDiff(const caffe::Blob<Dtype>* blob) {
  return blob->count() > 0
      && blob->diff()->head() != caffe::SyncedMemory::UNINITIALIZED;
}

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
