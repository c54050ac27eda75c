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
#include "lsoftmax/src/bridge.rs.h"
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
void Product(bool transpose_a, bool transpose_b, int m, int n, int k,
    const Dtype* a, const Dtype* b, Dtype beta, Dtype* c) {
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int l = 0; l < k; ++l) {
        sum += static_cast<double>(transpose_a ? a[l * m + i] : a[i * k + l])
            * (transpose_b ? b[j * k + l] : b[l * n + j]);
      }
      Dtype& out = c[i * n + j];
      out = static_cast<Dtype>(beta == 0 ? sum : beta * out + sum);
    }
  }
}

class CpuBlas : public lsoftmax::Blas {
 public:
  void gemm_f32(bool transpose_a, bool transpose_b, int m, int n, int k,
      const float* a, const float* b, float beta, float* c) const override {
    Product(transpose_a, transpose_b, m, n, k, a, b, beta, c);
  }
  void gemm_f64(bool transpose_a, bool transpose_b, int m, int n, int k,
      const double* a, const double* b, double beta, double* c)
      const override {
    Product(transpose_a, transpose_b, m, n, k, a, b, beta, c);
  }
};

// Queued in stream order, as cuBLAS does.
class DeviceBlas : public lsoftmax::Blas {
 public:
  void gemm_f32(bool transpose_a, bool transpose_b, int m, int n, int k,
      const float* a, const float* b, float beta, float* c) const override {
    Enqueue([=] { Product(transpose_a, transpose_b, m, n, k, a, b, beta, c); });
  }
  void gemm_f64(bool transpose_a, bool transpose_b, int m, int n, int k,
      const double* a, const double* b, double beta, double* c)
      const override {
    Enqueue([=] { Product(transpose_a, transpose_b, m, n, k, a, b, beta, c); });
  }

 private:
  static void Enqueue(std::function<void()> work) {
    STANDIN(standin_enqueue)([](void* data) {
      auto* const queued = static_cast<std::function<void()>*>(data);
      (*queued)();
      delete queued;
    }, new std::function<void()>(std::move(work)));
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
rust::Slice<const T> View(const std::vector<T>& v) {
  return {v.data(), v.size()};
}
template <typename T>
rust::Slice<T> MutableView(std::vector<T>& v) {
  return {v.data(), v.size()};
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
