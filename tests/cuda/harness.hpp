// What the tests of the layers on the stand-in device share.
#ifndef TESTS_CUDA_HARNESS_HPP_
#define TESTS_CUDA_HARNESS_HPP_

#include <dlfcn.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "lsoftmax/blas.hpp"
#include "lsoftmax/src/bridge/ffi.rs.h"
#include "rust/cxx.h"
#include "standin.hpp"

inline std::atomic<int> failures{0};

// Reports a failed check. The first ones tell; a broken kernel fails them all.
inline void Check(bool passed, const std::string& what) {
  if (passed) { return; }
  if (++failures <= 20) { std::printf("FAILED: %s\n", what.c_str()); }
}

inline std::string Text(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", value);
  return text;
}

inline void CheckSays(const std::string& message,
    const std::vector<std::string>& words) {
  for (const std::string& word : words) {
    Check(message.find(word) != std::string::npos,
        "'" + word + "' is not in the error '" + message + "'");
  }
}

// The error of `f`, empty where there is none.
inline std::string ErrorOf(const std::function<void()>& f) {
  try {
    f();
  } catch (const rust::Error& error) {
    return error.what();
  }
  return "";
}

// The stand-in, by the name under which the Rust code opens the driver.
inline void* Driver() {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW);
  return library;
}

template <typename F>
F* InDriver(const char* name) {
  F* const function = reinterpret_cast<F*>(dlsym(Driver(), name));
  if (!function) {
    std::printf("FAILED: no stand-in driver on LD_LIBRARY_PATH: %s\n",
        dlerror());
    std::exit(1);
  }
  return function;
}

#define STANDIN(function) InDriver<decltype(function)>(#function)

// Does what cudaSetDevice and a first allocation do to the calling thread.
inline void UseDevice(int device) {
  void* context;
  InDriver<int(unsigned)>("cuInit")(0);
  InDriver<int(void**, int)>("cuDevicePrimaryCtxRetain")(&context, device);
  InDriver<int(void*)>("cuCtxSetCurrent")(context);
}

inline void Synchronize() { STANDIN(standin_synchronize)(); }

// The driver calls of `f`.
inline std::string CallsOf(const std::function<void()>& f) {
  STANDIN(standin_clear_log)();
  f();
  return STANDIN(standin_log)();
}

// The definition of the product.
template <typename Dtype>
void Multiply(const lsoftmax::MatrixProduct& p) {
  const Dtype* const a = reinterpret_cast<const Dtype*>(p.a);
  const Dtype* const b = reinterpret_cast<const Dtype*>(p.b);
  Dtype* const c = reinterpret_cast<Dtype*>(p.c);
  for (int i = 0; i < p.m; ++i) {
    for (int j = 0; j < p.n; ++j) {
      double sum = 0;
      for (int l = 0; l < p.k; ++l) {
        sum += static_cast<double>(p.transpose_a ? a[l * p.m + i]
                : a[i * p.k + l])
            * (p.transpose_b ? b[j * p.k + l] : b[l * p.n + j]);
      }
      Dtype& out = c[i * p.n + j];
      out = static_cast<Dtype>(p.beta == 0 ? sum : p.beta * out + sum);
    }
  }
}

class CpuBlas : public lsoftmax::Blas {
 public:
  void gemm(const lsoftmax::MatrixProduct& product) const override {
    if (product.dtype == lsoftmax::ElementType::F32) {
      Multiply<float>(product);
    } else {
      Multiply<double>(product);
    }
  }
};

// Queued in stream order, as cuBLAS does.
class DeviceBlas : public lsoftmax::Blas {
 public:
  void gemm(const lsoftmax::MatrixProduct& product) const override {
    STANDIN(standin_enqueue)([](void* data) {
      auto* const queued = static_cast<lsoftmax::MatrixProduct*>(data);
      CpuBlas().gemm(*queued);
      delete queued;
    }, new lsoftmax::MatrixProduct(product));
  }
};

// A fixed sequence in [-1, 1).
class Noise {
 public:
  explicit Noise(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u | 1) {}
  double operator()() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<double>(state_ >> 11) / (1ull << 52) - 1;
  }
  template <typename Dtype>
  std::vector<Dtype> Vector(size_t size) {
    std::vector<Dtype> v(size);
    for (Dtype& value : v) { value = static_cast<Dtype>((*this)()); }
    return v;
  }

 private:
  uint64_t state_;
};

// Whether two results agree up to `tolerance`; both NaN or the same infinity
// agree as well.
inline bool Agree(double a, double b, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) { return std::isnan(a) && std::isnan(b); }
  return a == b || std::fabs(a - b) <= tolerance;
}

// The wire format of the layers' parameters (protobuf).
class Param {
 public:
  Param& Int(int field, int64_t value) {
    Varint(static_cast<uint64_t>(field) << 3);
    Varint(static_cast<uint64_t>(value));
    return *this;
  }
  Param& Float(int field, float value) {
    Varint(static_cast<uint64_t>(field) << 3 | 5);
    const char* const bytes = reinterpret_cast<const char*>(&value);
    bytes_.append(bytes, sizeof(value));
    return *this;
  }
  rust::Slice<const uint8_t> Bytes() const {
    return {reinterpret_cast<const uint8_t*>(bytes_.data()), bytes_.size()};
  }

 private:
  void Varint(uint64_t value) {
    for (; value > 0x7f; value >>= 7) {
      bytes_.push_back(static_cast<char>(value | 0x80));
    }
    bytes_.push_back(static_cast<char>(value));
  }
  std::string bytes_;
};

template <typename T>
constexpr lsoftmax::ElementType TypeOf() {
  return sizeof(T) == 4 ? lsoftmax::ElementType::F32
      : lsoftmax::ElementType::F64;
}

// Blobs as the bridge takes them, which may begin `off` bytes behind where
// their memory does.
template <typename T>
lsoftmax::View View(const std::vector<T>& v, size_t off = 0) {
  lsoftmax::View view{};
  if (!v.empty()) {
    view.values = reinterpret_cast<const uint8_t*>(v.data()) + off;
    view.count = v.size() - off / sizeof(T);
  }
  return view;
}
template <typename T>
lsoftmax::MutableView MutableView(std::vector<T>& v, size_t off = 0) {
  lsoftmax::MutableView view{};
  if (!v.empty()) {
    view.values = reinterpret_cast<uint8_t*>(v.data()) + off;
    view.count = v.size() - off / sizeof(T);
  }
  return view;
}

// `--without-driver`: the test is for a machine that has none.
inline int Main(int argc, char** argv,
    const std::function<void()>& without_driver,
    const std::function<void()>& with_device) {
  if (argc > 1 && std::string(argv[1]) == "--without-driver") {
    if (Driver()) {
      std::printf("not tested, this machine has one\n");
      return 0;
    }
    without_driver();
    if (!failures) {
      std::printf("CPU mode works, GPU mode says what to do\n");
    }
  } else {
    UseDevice(0);
    with_device();
  }
  if (failures) { std::printf("%d checks FAILED\n", failures.load()); }
  return failures != 0;
}

#endif  // TESTS_CUDA_HARNESS_HPP_
