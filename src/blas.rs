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
/// what it costs in InnerProduct.
pub trait Gemm<T: Dtype> {
    /// `c = op(a) op(b) + beta c` with op(a) of shape (m, k), op(b) of shape
    /// (k, n) and c of shape (m, n), `dims = [m, n, k]`. A beta of 0 overwrites
    /// c whatever it held.
    fn gemm(&self, dims: [usize; 3], a: (Op, &[T]), b: (Op, &[T]), beta: T, c: &mut [T]);
}

/// The same on device memory, in the order of Caffe's stream; in Caffe, cuBLAS.
pub trait DeviceGemm<T: Dtype> {
    /// As [`Gemm::gemm`]; returns before the device is done.
    ///
    /// # Safety
    /// The pointers are memory of the current device, as large as `dims` says,
    /// and stay valid until the device has done the work.
    unsafe fn gemm(&self, dims: [i32; 3], a: (Op, *const T), b: (Op, *const T), beta: T, c: *mut T);
}
