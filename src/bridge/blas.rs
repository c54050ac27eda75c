//! Caffe's BLAS, on host and device.

use super::Element;
use super::ffi::{Blas, MatrixProduct};
use crate::blas::{Gemm, Op};
use crate::dtype::int;

/// Caffe's BLAS on host memory.
pub(super) struct HostBlas<'a>(pub(super) &'a Blas);

/// cuBLAS on Caffe's handle.
#[cfg(feature = "cuda")]
pub(super) struct DeviceBlas<'a>(pub(super) &'a Blas);

/// The product as C++ takes it.
fn product<T: Element>(
    [m, n, k]: [i32; 3],
    (op_a, a): (Op, *const T),
    (op_b, b): (Op, *const T),
    beta: T,
    c: *mut T,
) -> MatrixProduct {
    MatrixProduct {
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
    }
}

impl<T: Element> Gemm<T> for HostBlas<'_> {
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
        // SAFETY: the slices are as long as the sizes say.
        unsafe { self.0.gemm(&product(dims, a, b, beta, c.as_mut_ptr())) }
    }
}

#[cfg(feature = "cuda")]
impl<T: Element> crate::blas::DeviceGemm<T> for DeviceBlas<'_> {
    unsafe fn gemm(
        &self,
        dims: [i32; 3],
        a: (Op, *const T),
        b: (Op, *const T),
        beta: T,
        c: *mut T,
    ) {
        // SAFETY: the caller's.
        unsafe { self.0.gemm(&product(dims, a, b, beta, c)) }
    }
}
