//! What the tests of the layers share.

use lsoftmax::blas::{Gemm, Op};
use lsoftmax::dtype::Dtype;

/// The definition of the product, with f64 sums.
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
        let beta: f64 = beta.into();
        for i in 0..m {
            for j in 0..n {
                let sum: f64 = (0..k).map(|l| at(i, l).into() * bt(l, j).into()).sum();
                let cell = &mut c[i * n + j];
                let old = if beta == 0.0 {
                    0.0
                } else {
                    beta * (*cell).into()
                };
                *cell = T::from_f64(old + sum);
            }
        }
    }
}
