//! Caffe's BLAS behind the traits of [`crate::blas`].

use super::Element;
use super::ffi::{Blas, MatrixProduct};
use crate::blas::{DeviceGemm, Gemm, Op};
use crate::dtype::int;

/// The one that comes with a pass: on the host Caffe's BLAS, on the device
/// cuBLAS on Caffe's handle.
pub(super) struct CaffeBlas<'a>(pub(super) &'a Blas);

impl<T: Element> DeviceGemm<T> for CaffeBlas<'_> {
    unsafe fn gemm(
        &self,
        [m, n, k]: [i32; 3],
        (op_a, a): (Op, *const T),
        (op_b, b): (Op, *const T),
        beta: T,
        c: *mut T,
    ) {
        let product = MatrixProduct {
            dtype: T::DTYPE,
            transpose_a: op_a == Op::Transposed,
            transpose_b: op_b == Op::Transposed,
            m,
            n,
            k,
            a: a.cast(),
            b: b.cast(),
            beta: beta.into(),
            c: c.cast(),
        };
        // SAFETY: the caller's.
        unsafe { self.0.gemm(&product) }
    }
}

impl<T: Element> Gemm<T> for CaffeBlas<'_> {
    fn gemm(
        &self,
        [m, n, k]: [usize; 3],
        (op_a, a): (Op, &[T]),
        (op_b, b): (Op, &[T]),
        beta: T,
        c: &mut [T],
    ) {
        assert!(a.len() == m * k && b.len() == k * n && c.len() == m * n);
        let dims = [m, n, k].map(|size| int(size).expect("blobs hold at most i32::MAX elements"));
        let (a, b) = ((op_a, a.as_ptr()), (op_b, b.as_ptr()));
        // SAFETY: the slices are as long as the sizes say, and of the memory
        // that a BLAS works on which comes with slices.
        unsafe { DeviceGemm::gemm(self, dims, a, b, beta, c.as_mut_ptr()) }
    }
}
