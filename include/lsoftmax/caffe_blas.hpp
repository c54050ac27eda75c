#ifndef LSOFTMAX_CAFFE_BLAS_HPP_
#define LSOFTMAX_CAFFE_BLAS_HPP_

#include "caffe/util/math_functions.hpp"
#include "lsoftmax/src/bridge/ffi.rs.h"

// The BLAS of this Caffe, for the Rust library.
namespace lsoftmax {

inline CBLAS_TRANSPOSE Transpose(bool transpose) {
  return transpose ? CblasTrans : CblasNoTrans;
}

template <typename Dtype>
struct CaffeGemm {
  typedef void Type(CBLAS_TRANSPOSE, CBLAS_TRANSPOSE, int, int, int, Dtype,
                    const Dtype*, const Dtype*, Dtype, Dtype*);
};

template <CaffeGemm<float>::Type float_gemm,
          CaffeGemm<double>::Type double_gemm>
class CaffeBlas : public Blas {
 public:
  virtual void gemm(const MatrixProduct& p) const {
    p.dtype == ElementType::F32 ? Call<float>(float_gemm, p)
                                : Call<double>(double_gemm, p);
  }

 private:
  template <typename Dtype>
  static void Call(typename CaffeGemm<Dtype>::Type* gemm,
                   const MatrixProduct& p) {
    gemm(Transpose(p.transpose_a), Transpose(p.transpose_b), p.m, p.n, p.k,
         Dtype(1), reinterpret_cast<const Dtype*>(p.a),
         reinterpret_cast<const Dtype*>(p.b), static_cast<Dtype>(p.beta),
         reinterpret_cast<Dtype*>(p.c));
  }
};

// The one that Caffe is built with.
typedef CaffeBlas<caffe::caffe_cpu_gemm<float>,
                  caffe::caffe_cpu_gemm<double> > CpuBlas;
#ifndef CPU_ONLY
// cuBLAS, on Caffe's handle.
typedef CaffeBlas<caffe::caffe_gpu_gemm<float>,
                  caffe::caffe_gpu_gemm<double> > GpuBlas;
#endif  // CPU_ONLY

}  // namespace lsoftmax

#endif  // LSOFTMAX_CAFFE_BLAS_HPP_
