//! The matrix product, lent by the host program.

use crate::dtype::Dtype;

/// Whether a product reads a matrix as it lies or transposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// As it lies.
    Plain,
    /// Transposed.
    Transposed,
}

/// Dense row-major matrix products on host memory.
///
/// In Caffe it is the BLAS that Caffe was built with, so that a product costs
/// what it costs in InnerProduct; in tests it is [`NaiveGemm`].
pub trait Gemm<T: Dtype> {
    /// `c = op(a) op(b) + beta c` with op(a) of shape (m, k), op(b) of shape
    /// (k, n) and c of shape (m, n), `dims = [m, n, k]`. A beta of 0 overwrites
    /// c whatever it held.
    fn gemm(&self, dims: [usize; 3], a: (Op, &[T]), b: (Op, &[T]), beta: T, c: &mut [T]);
}

/// The definition of the product, with f64 sums: an oracle for tests.
#[derive(Debug, Clone, Copy, Default)]
pub struct NaiveGemm;

impl<T: Dtype> Gemm<T> for NaiveGemm {
    fn gemm(
        &self,
        [m, n, k]: [usize; 3],
        (op_a, a): (Op, &[T]),
        (op_b, b): (Op, &[T]),
        beta: T,
        c: &mut [T],
    ) {
        let at = |i: usize, l: usize| match op_a {
            Op::Plain => a[i * k + l],
            Op::Transposed => a[l * m + i],
        };
        let bt = |l: usize, j: usize| match op_b {
            Op::Plain => b[l * n + j],
            Op::Transposed => b[j * k + l],
        };
        for i in 0..m {
            for j in 0..n {
                let sum: f64 = (0..k).map(|l| at(i, l).into() * bt(l, j).into()).sum();
                let cell = &mut c[i * n + j];
                let old = if beta == T::default() {
                    0.0
                } else {
                    beta.into() * (*cell).into()
                };
                *cell = T::from_f64(old + sum);
            }
        }
    }
}
