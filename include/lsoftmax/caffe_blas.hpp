#ifndef LSOFTMAX_CAFFE_BLAS_HPP_
#define LSOFTMAX_CAFFE_BLAS_HPP_

#include "caffe/util/math_functions.hpp"
#include "lsoftmax/src/bridge/ffi.rs.h"

// The BLAS of this Caffe, for the Rust library.
namespace lsoftmax {

inline CBLAS_TRANSPOSE Transpose(bool transpose) {
  return transpose ? CblasTrans : CblasNoTrans;
}

// The one that Caffe is built with.
class CpuBlas : public Blas {
 public:
  virtual void gemm(const MatrixProduct& p) const {
    p.dtype == ElementType::F32 ? Gemm<float>(p) : Gemm<double>(p);
  }

 private:
  template <typename Dtype>
  static void Gemm(const MatrixProduct& p) {
    caffe::caffe_cpu_gemm<Dtype>(Transpose(p.transpose_a),
        Transpose(p.transpose_b), p.m, p.n, p.k, Dtype(1),
        reinterpret_cast<const Dtype*>(p.a),
        reinterpret_cast<const Dtype*>(p.b), static_cast<Dtype>(p.beta),
        reinterpret_cast<Dtype*>(p.c));
  }
};

#ifndef CPU_ONLY
// cuBLAS, on Caffe's handle.
class GpuBlas : public Blas {
 public:
  virtual void gemm(const MatrixProduct& p) const {
    p.dtype == ElementType::F32 ? Gemm<float>(p) : Gemm<double>(p);
  }

 private:
  template <typename Dtype>
  static void Gemm(const MatrixProduct& p) {
    caffe::caffe_gpu_gemm<Dtype>(Transpose(p.transpose_a),
        Transpose(p.transpose_b), p.m, p.n, p.k, Dtype(1),
        reinterpret_cast<const Dtype*>(p.a),
        reinterpret_cast<const Dtype*>(p.b), static_cast<Dtype>(p.beta),
        reinterpret_cast<Dtype*>(p.c));
  }
};
#endif  // CPU_ONLY

}  // namespace lsoftmax

#endif  // LSOFTMAX_CAFFE_BLAS_HPP_
