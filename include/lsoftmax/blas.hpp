#ifndef LSOFTMAX_BLAS_HPP_
#define LSOFTMAX_BLAS_HPP_

namespace lsoftmax {

// Of the generated header: shapes, operations and pointers of one product.
struct MatrixProduct;

/**
 * @brief The matrix product that the host program lends to the Rust layers.
 *
 * Caffe's build picks a BLAS (ATLAS, OpenBLAS, MKL, cuBLAS); a layer must use
 * that one to cost what Caffe's own layers cost. A class with a virtual
 * function, so that the Rust library refers to no symbol of Caffe and links
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
  virtual void gemm(const MatrixProduct& product) const = 0;
};

}  // namespace lsoftmax

#endif  // LSOFTMAX_BLAS_HPP_
