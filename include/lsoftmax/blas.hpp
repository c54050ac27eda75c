#ifndef LSOFTMAX_BLAS_HPP_
#define LSOFTMAX_BLAS_HPP_

namespace lsoftmax {

/**
 * @brief The matrix product that the host program lends to the Rust layers.
 *
 * Caffe's build picks a BLAS (ATLAS, OpenBLAS, MKL, cuBLAS); a layer must use
 * that one to cost what Caffe's own layers cost. A class with virtual
 * functions, so that the Rust library refers to no symbol of Caffe and links
 * and tests without it.
 *
 * All matrices are row-major and dense. Computes
 * @f$ C = \mathrm{op}(A) \mathrm{op}(B) + \beta C @f$ with op(A) of shape
 * (m, k), op(B) of shape (k, n) and C of shape (m, n). The pointers are host
 * or device pointers, whichever the implementation works on.
 */
class Blas {
 public:
  virtual ~Blas() {}
  virtual void gemm_f32(bool transpose_a, bool transpose_b, int m, int n,
      int k, const float* a, const float* b, float beta, float* c) const = 0;
  virtual void gemm_f64(bool transpose_a, bool transpose_b, int m, int n,
      int k, const double* a, const double* b, double beta, double* c)
      const = 0;
};

}  // namespace lsoftmax

#endif  // LSOFTMAX_BLAS_HPP_
