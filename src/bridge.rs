//! The border to C++: signatures and error translation, no math.
//!
//! The C++ layers call the functions of `ffi`; the generated header is
//! `lsoftmax/src/bridge.rs.h`. A slice that is empty stands for a blob that is
//! not there. Every error, and every panic, arrives in C++ as a `rust::Error`
//! whose message does not name the layer: the caller adds that.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::batch_norm::{self, BatchNorm};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::gemm::{Gemm, Op};
use crate::large_margin::cpu::Gradients;
use crate::large_margin::{LargeMarginInnerProduct, Sizes};
use crate::param;

/// What C++ sees, in namespace `lsoftmax`.
// BLAS takes the arguments that it takes.
#[allow(clippy::too_many_arguments)]
#[cxx::bridge(namespace = "lsoftmax")]
pub(crate) mod ffi {
    /// The shape (N, K) of the class weights, and the axis.
    #[derive(Debug)]
    struct MatrixSizes {
        /// N
        classes: i32,
        /// K
        features: i32,
        /// Where the feature axes begin in the bottom's shape, never negative.
        axis: i32,
    }

    unsafe extern "C++" {
        include!("lsoftmax/blas.hpp");

        type Blas;

        /// `c = op(a) op(b) + beta c`, row-major.
        ///
        /// # Safety
        /// The pointers must be valid for the shapes that the sizes give, in
        /// the memory, host or device, that the implementation works on.
        unsafe fn gemm_f32(
            self: &Blas,
            transpose_a: bool,
            transpose_b: bool,
            m: i32,
            n: i32,
            k: i32,
            a: *const f32,
            b: *const f32,
            beta: f32,
            c: *mut f32,
        );
        /// The same for f64.
        ///
        /// # Safety
        /// As for `gemm_f32`.
        unsafe fn gemm_f64(
            self: &Blas,
            transpose_a: bool,
            transpose_b: bool,
            m: i32,
            n: i32,
            k: i32,
            a: *const f64,
            b: *const f64,
            beta: f64,
            c: *mut f64,
        );
    }

    extern "Rust" {
        type LargeMarginInnerProduct;

        /// A layer from its serialized LargeMarginInnerProductParameter.
        fn new_large_margin(param: &[u8]) -> Result<Box<LargeMarginInnerProduct>>;
        /// Takes the bottoms' shapes; `labels` < 0: there is no label bottom.
        fn reshape(
            layer: &mut LargeMarginInnerProduct,
            features: &[i32],
            labels: i32,
        ) -> Result<MatrixSizes>;
        /// The forward passes behind the layer, all that ever were.
        fn passes(self: &LargeMarginInnerProduct) -> i64;
        /// lambda of the last forward pass; before the first, of the next.
        fn lambda(self: &LargeMarginInnerProduct) -> f64;
        /// Goes on from a count of all forward passes, or from the start that
        /// the parameter names where that is higher.
        fn resume(self: &mut LargeMarginInnerProduct, passes: i64);

        /// One forward pass; `labels` and `plain_logits` may be empty.
        #[cxx_name = "forward"]
        fn large_margin_forward_f32(
            layer: &mut LargeMarginInnerProduct,
            blas: &Blas,
            features: &[f32],
            labels: &[f32],
            weights: &[f32],
            logits: &mut [f32],
            plain_logits: &mut [f32],
        ) -> Result<()>;
        /// The same for f64.
        #[cxx_name = "forward"]
        fn large_margin_forward_f64(
            layer: &mut LargeMarginInnerProduct,
            blas: &Blas,
            features: &[f64],
            labels: &[f64],
            weights: &[f64],
            logits: &mut [f64],
            plain_logits: &mut [f64],
        ) -> Result<()>;
        /// The backward pass; a gradient that is not wanted is empty.
        #[cxx_name = "backward"]
        fn large_margin_backward_f32(
            layer: &LargeMarginInnerProduct,
            blas: &Blas,
            logits_diff: &[f32],
            features: &[f32],
            weights: &[f32],
            features_diff: &mut [f32],
            weights_diff: &mut [f32],
        ) -> Result<()>;
        /// The same for f64.
        #[cxx_name = "backward"]
        fn large_margin_backward_f64(
            layer: &LargeMarginInnerProduct,
            blas: &Blas,
            logits_diff: &[f64],
            features: &[f64],
            weights: &[f64],
            features_diff: &mut [f64],
            weights_diff: &mut [f64],
        ) -> Result<()>;

        /// Bytes of device memory that forward_gpu leaves to backward_gpu.
        #[cfg(feature = "cuda")]
        fn device_bytes(self: &LargeMarginInnerProduct) -> usize;
        /// `forward` on device memory; what is not there is null.
        ///
        /// # Safety
        /// All pointers are memory of the current device, as large as the last
        /// reshape says, `scratch` of `device_bytes`.
        #[cfg(feature = "cuda")]
        #[cxx_name = "forward_gpu"]
        unsafe fn large_margin_forward_gpu_f32(
            layer: &mut LargeMarginInnerProduct,
            blas: &Blas,
            features: *const f32,
            labels: *const f32,
            weights: *const f32,
            logits: *mut f32,
            plain_logits: *mut f32,
            scratch: *mut u8,
        ) -> Result<()>;
        /// The same for f64.
        ///
        /// # Safety
        /// As for f32.
        #[cfg(feature = "cuda")]
        #[cxx_name = "forward_gpu"]
        unsafe fn large_margin_forward_gpu_f64(
            layer: &mut LargeMarginInnerProduct,
            blas: &Blas,
            features: *const f64,
            labels: *const f64,
            weights: *const f64,
            logits: *mut f64,
            plain_logits: *mut f64,
            scratch: *mut u8,
        ) -> Result<()>;
        /// `backward` on device memory; a gradient that is not wanted is null.
        ///
        /// # Safety
        /// As for `forward_gpu`.
        #[cfg(feature = "cuda")]
        #[cxx_name = "backward_gpu"]
        unsafe fn large_margin_backward_gpu_f32(
            layer: &LargeMarginInnerProduct,
            blas: &Blas,
            logits_diff: *const f32,
            had_labels: bool,
            features: *const f32,
            weights: *const f32,
            features_diff: *mut f32,
            weights_diff: *mut f32,
            scratch: *mut u8,
        ) -> Result<()>;
        /// The same for f64.
        ///
        /// # Safety
        /// As for f32.
        #[cfg(feature = "cuda")]
        #[cxx_name = "backward_gpu"]
        unsafe fn large_margin_backward_gpu_f64(
            layer: &LargeMarginInnerProduct,
            blas: &Blas,
            logits_diff: *const f64,
            had_labels: bool,
            features: *const f64,
            weights: *const f64,
            features_diff: *mut f64,
            weights_diff: *mut f64,
            scratch: *mut u8,
        ) -> Result<()>;
    }

    extern "Rust" {
        type BatchNorm;

        /// A layer from its serialized BNParameter; `train`: the TRAIN phase.
        fn new_batch_norm(param: &[u8], train: bool) -> Result<Box<BatchNorm>>;
        /// Takes the bottom's shape and returns its channels, C.
        #[cxx_name = "reshape"]
        fn batch_norm_reshape(layer: &mut BatchNorm, bottom: &[i32]) -> Result<i32>;
        /// Whether a forward pass begins with the batch's statistics.
        fn by_batch(self: &BatchNorm) -> bool;
        /// Whether slope and bias get no gradient.
        fn frozen(self: &BatchNorm) -> bool;

        /// Begins a forward pass by the batch; the moving values move on.
        #[cxx_name = "take_batch_statistics"]
        fn take_batch_statistics_f32(
            layer: &mut BatchNorm,
            bottom: &[f32],
            moving_mean: &mut [f32],
            moving_inv_std: &mut [f32],
        ) -> Result<()>;
        /// The same for f64.
        #[cxx_name = "take_batch_statistics"]
        fn take_batch_statistics_f64(
            layer: &mut BatchNorm,
            bottom: &[f64],
            moving_mean: &mut [f64],
            moving_inv_std: &mut [f64],
        ) -> Result<()>;
        /// Begins a forward pass by the moving values.
        #[cxx_name = "take_moving_statistics"]
        fn take_moving_statistics_f32(
            layer: &mut BatchNorm,
            moving_mean: &[f32],
            moving_inv_std: &[f32],
        ) -> Result<()>;
        /// The same for f64.
        #[cxx_name = "take_moving_statistics"]
        fn take_moving_statistics_f64(
            layer: &mut BatchNorm,
            moving_mean: &[f64],
            moving_inv_std: &[f64],
        ) -> Result<()>;
        /// Ends a forward pass.
        #[cxx_name = "normalize"]
        fn batch_norm_normalize_f32(
            layer: &BatchNorm,
            bottom: &[f32],
            slope: &[f32],
            bias: &[f32],
            top: &mut [f32],
        ) -> Result<()>;
        /// The same for f64.
        #[cxx_name = "normalize"]
        fn batch_norm_normalize_f64(
            layer: &BatchNorm,
            bottom: &[f64],
            slope: &[f64],
            bias: &[f64],
            top: &mut [f64],
        ) -> Result<()>;
        /// Ends a forward pass in place; `x_hat`, for the backward pass, may be
        /// empty.
        #[cxx_name = "normalize_in_place"]
        fn batch_norm_normalize_in_place_f32(
            layer: &BatchNorm,
            slope: &[f32],
            bias: &[f32],
            data: &mut [f32],
            x_hat: &mut [f32],
        ) -> Result<()>;
        /// The same for f64.
        #[cxx_name = "normalize_in_place"]
        fn batch_norm_normalize_in_place_f64(
            layer: &BatchNorm,
            slope: &[f64],
            bias: &[f64],
            data: &mut [f64],
            x_hat: &mut [f64],
        ) -> Result<()>;
        /// The backward pass; a gradient that is not wanted is empty.
        #[cxx_name = "backward"]
        fn batch_norm_backward_f32(
            layer: &mut BatchNorm,
            top_diff: &[f32],
            bottom: &[f32],
            slope: &[f32],
            bottom_diff: &mut [f32],
            slope_diff: &mut [f32],
            bias_diff: &mut [f32],
        ) -> Result<()>;
        /// The same for f64.
        #[cxx_name = "backward"]
        fn batch_norm_backward_f64(
            layer: &mut BatchNorm,
            top_diff: &[f64],
            bottom: &[f64],
            slope: &[f64],
            bottom_diff: &mut [f64],
            slope_diff: &mut [f64],
            bias_diff: &mut [f64],
        ) -> Result<()>;
        /// The same in place: `diff` is the top's gradient and, where
        /// `propagate_down`, becomes the bottom's.
        #[cxx_name = "backward_in_place"]
        fn batch_norm_backward_in_place_f32(
            layer: &mut BatchNorm,
            x_hat: &[f32],
            slope: &[f32],
            diff: &mut [f32],
            propagate_down: bool,
            slope_diff: &mut [f32],
            bias_diff: &mut [f32],
        ) -> Result<()>;
        /// The same for f64.
        #[cxx_name = "backward_in_place"]
        fn batch_norm_backward_in_place_f64(
            layer: &mut BatchNorm,
            x_hat: &[f64],
            slope: &[f64],
            diff: &mut [f64],
            propagate_down: bool,
            slope_diff: &mut [f64],
            bias_diff: &mut [f64],
        ) -> Result<()>;

        /// Bytes of device memory that a pass uses.
        #[cfg(feature = "cuda")]
        fn device_bytes(self: &BatchNorm) -> usize;
        /// The whole forward pass on device memory. bottom and top may be the
        /// same; `x_hat`, for the backward pass in place, may be null.
        ///
        /// # Safety
        /// All pointers are memory of the current device, as large as the last
        /// reshape says, `scratch` of `device_bytes`.
        #[cfg(feature = "cuda")]
        #[cxx_name = "forward_gpu"]
        unsafe fn batch_norm_forward_gpu_f32(
            layer: &mut BatchNorm,
            bottom: *const f32,
            slope: *const f32,
            bias: *const f32,
            moving_mean: *mut f32,
            moving_inv_std: *mut f32,
            top: *mut f32,
            x_hat: *mut f32,
            scratch: *mut u8,
        ) -> Result<()>;
        /// The same for f64.
        ///
        /// # Safety
        /// As for f32.
        #[cfg(feature = "cuda")]
        #[cxx_name = "forward_gpu"]
        unsafe fn batch_norm_forward_gpu_f64(
            layer: &mut BatchNorm,
            bottom: *const f64,
            slope: *const f64,
            bias: *const f64,
            moving_mean: *mut f64,
            moving_inv_std: *mut f64,
            top: *mut f64,
            x_hat: *mut f64,
            scratch: *mut u8,
        ) -> Result<()>;
        /// The backward pass on device memory; a gradient that is not wanted
        /// is null. `x` is the bottom or, with `x_is_hat`, what forward kept.
        ///
        /// # Safety
        /// As for `forward_gpu`.
        #[cfg(feature = "cuda")]
        #[cxx_name = "backward_gpu"]
        unsafe fn batch_norm_backward_gpu_f32(
            layer: &BatchNorm,
            top_diff: *const f32,
            x: *const f32,
            x_is_hat: bool,
            slope: *const f32,
            bottom_diff: *mut f32,
            slope_diff: *mut f32,
            bias_diff: *mut f32,
            scratch: *mut u8,
        ) -> Result<()>;
        /// The same for f64.
        ///
        /// # Safety
        /// As for f32.
        #[cfg(feature = "cuda")]
        #[cxx_name = "backward_gpu"]
        unsafe fn batch_norm_backward_gpu_f64(
            layer: &BatchNorm,
            top_diff: *const f64,
            x: *const f64,
            x_is_hat: bool,
            slope: *const f64,
            bottom_diff: *mut f64,
            slope_diff: *mut f64,
            bias_diff: *mut f64,
            scratch: *mut u8,
        ) -> Result<()>;
    }
}

/// Runs `f`; a panic becomes an error, since it may not cross into C++.
fn guard<R>(f: impl FnOnce() -> Result<R>) -> Result<R> {
    // Unwind safe: after an error the caller ends the process.
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(Error::new(format!(
            "internal error, please report it: {message}"
        )))
    })
}

/// `slice`, or None where it is empty.
fn given<T>(slice: &mut [T]) -> Option<&mut [T]> {
    (!slice.is_empty()).then_some(slice)
}

/// `size` as BLAS and Caffe count.
fn blas_int(size: usize) -> Result<i32> {
    i32::try_from(size).map_err(|_| Error::new(format!("size {size} is more than an int holds")))
}

/// Caffe's BLAS on host memory.
struct HostBlas<'a>(&'a ffi::Blas);

macro_rules! impl_host_blas {
    ($t:ty, $gemm:ident) => {
        impl Gemm<$t> for HostBlas<'_> {
            fn gemm(
                &self,
                [m, n, k]: [usize; 3],
                (op_a, a): (Op, &[$t]),
                (op_b, b): (Op, &[$t]),
                beta: $t,
                c: &mut [$t],
            ) {
                let int = |size| i32::try_from(size).expect("blobs hold at most i32::MAX elements");
                assert!(a.len() == m * k && b.len() == k * n && c.len() == m * n);
                // SAFETY: the slices are as long as the sizes say.
                unsafe {
                    self.0.$gemm(
                        op_a == Op::Transposed,
                        op_b == Op::Transposed,
                        int(m),
                        int(n),
                        int(k),
                        a.as_ptr(),
                        b.as_ptr(),
                        beta,
                        c.as_mut_ptr(),
                    );
                }
            }
        }
    };
}

impl_host_blas!(f32, gemm_f32);
impl_host_blas!(f64, gemm_f64);

fn new_large_margin(bytes: &[u8]) -> Result<Box<LargeMarginInnerProduct>> {
    guard(|| LargeMarginInnerProduct::new(&param::decode(bytes)?).map(Box::new))
}

fn reshape(
    layer: &mut LargeMarginInnerProduct,
    features: &[i32],
    labels: i32,
) -> Result<ffi::MatrixSizes> {
    guard(|| {
        let labels = usize::try_from(labels).ok();
        let Sizes {
            classes,
            features,
            axis,
            ..
        } = layer.reshape(features, labels)?;
        Ok(ffi::MatrixSizes {
            classes: blas_int(classes)?,
            features: blas_int(features)?,
            axis: blas_int(axis)?,
        })
    })
}

fn large_margin_forward<'a, T: Dtype>(
    layer: &mut LargeMarginInnerProduct,
    blas: &'a ffi::Blas,
    features: &[T],
    labels: &[T],
    weights: &[T],
    logits: &mut [T],
    plain_logits: &mut [T],
) -> Result<()>
where
    HostBlas<'a>: Gemm<T>,
{
    guard(|| {
        let labels = (!labels.is_empty()).then_some(labels);
        let plain = given(plain_logits);
        layer.forward(&HostBlas(blas), features, labels, weights, logits, plain)
    })
}

fn large_margin_backward<'a, T: Dtype>(
    layer: &LargeMarginInnerProduct,
    blas: &'a ffi::Blas,
    logits_diff: &[T],
    features: &[T],
    weights: &[T],
    features_diff: &mut [T],
    weights_diff: &mut [T],
) -> Result<()>
where
    HostBlas<'a>: Gemm<T>,
{
    guard(|| {
        let gradients = Gradients {
            features: given(features_diff),
            weights: given(weights_diff),
        };
        layer.backward(&HostBlas(blas), logits_diff, features, weights, gradients)
    })
}

#[cfg(feature = "cuda")]
use device::{
    batch_norm_backward as batch_norm_backward_gpu_f32,
    batch_norm_backward as batch_norm_backward_gpu_f64,
    batch_norm_forward as batch_norm_forward_gpu_f32,
    batch_norm_forward as batch_norm_forward_gpu_f64,
    large_margin_backward as large_margin_backward_gpu_f32,
    large_margin_backward as large_margin_backward_gpu_f64,
    large_margin_forward as large_margin_forward_gpu_f32,
    large_margin_forward as large_margin_forward_gpu_f64,
};

/// The functions on device memory. Their safety is what [`ffi`] says of each.
#[cfg(feature = "cuda")]
#[allow(clippy::too_many_arguments)]
mod device {
    use super::{BatchNorm, LargeMarginInnerProduct, Result, ffi::Blas, guard};
    use crate::batch_norm::gpu::{DeviceGradients, DeviceParams};
    use crate::cuda::DeviceDtype;

    pub(super) unsafe fn large_margin_forward<T: DeviceDtype>(
        layer: &mut LargeMarginInnerProduct,
        blas: &Blas,
        features: *const T,
        labels: *const T,
        weights: *const T,
        logits: *mut T,
        plain_logits: *mut T,
        scratch: *mut u8,
    ) -> Result<()> {
        // SAFETY: the caller's.
        guard(|| unsafe {
            layer.forward_gpu(
                blas,
                features,
                labels,
                weights,
                logits,
                plain_logits,
                scratch,
            )
        })
    }

    pub(super) unsafe fn large_margin_backward<T: DeviceDtype>(
        layer: &LargeMarginInnerProduct,
        blas: &Blas,
        logits_diff: *const T,
        had_labels: bool,
        features: *const T,
        weights: *const T,
        features_diff: *mut T,
        weights_diff: *mut T,
        scratch: *mut u8,
    ) -> Result<()> {
        // SAFETY: the caller's.
        guard(|| unsafe {
            layer.backward_gpu(
                blas,
                logits_diff,
                had_labels,
                features,
                weights,
                features_diff,
                weights_diff,
                scratch,
            )
        })
    }

    pub(super) unsafe fn batch_norm_forward<T: DeviceDtype>(
        layer: &mut BatchNorm,
        bottom: *const T,
        slope: *const T,
        bias: *const T,
        moving_mean: *mut T,
        moving_inv_std: *mut T,
        top: *mut T,
        x_hat: *mut T,
        scratch: *mut u8,
    ) -> Result<()> {
        let params = DeviceParams {
            slope,
            bias,
            moving_mean,
            moving_inv_std,
        };
        // SAFETY: the caller's.
        guard(|| unsafe { layer.forward_gpu(bottom, params, top, x_hat, scratch) })
    }

    pub(super) unsafe fn batch_norm_backward<T: DeviceDtype>(
        layer: &BatchNorm,
        top_diff: *const T,
        x: *const T,
        x_is_hat: bool,
        slope: *const T,
        bottom_diff: *mut T,
        slope_diff: *mut T,
        bias_diff: *mut T,
        scratch: *mut u8,
    ) -> Result<()> {
        let gradients = DeviceGradients {
            bottom: bottom_diff,
            slope: slope_diff,
            bias: bias_diff,
        };
        // SAFETY: the caller's.
        guard(|| unsafe { layer.backward_gpu(top_diff, x, x_is_hat, slope, gradients, scratch) })
    }
}

use large_margin_backward as large_margin_backward_f32;
use large_margin_backward as large_margin_backward_f64;
use large_margin_forward as large_margin_forward_f32;
use large_margin_forward as large_margin_forward_f64;

fn new_batch_norm(bytes: &[u8], train: bool) -> Result<Box<BatchNorm>> {
    guard(|| BatchNorm::new(&param::decode(bytes)?, train).map(Box::new))
}

fn batch_norm_reshape(layer: &mut BatchNorm, bottom: &[i32]) -> Result<i32> {
    guard(|| blas_int(layer.reshape(bottom)?.channels))
}

fn take_batch_statistics<T: Dtype>(
    layer: &mut BatchNorm,
    bottom: &[T],
    moving_mean: &mut [T],
    moving_inv_std: &mut [T],
) -> Result<()> {
    guard(|| layer.take_batch_statistics(bottom, moving_mean, moving_inv_std))
}

fn take_moving_statistics<T: Dtype>(
    layer: &mut BatchNorm,
    moving_mean: &[T],
    moving_inv_std: &[T],
) -> Result<()> {
    guard(|| layer.take_moving_statistics(moving_mean, moving_inv_std))
}

fn batch_norm_normalize<T: Dtype>(
    layer: &BatchNorm,
    bottom: &[T],
    slope: &[T],
    bias: &[T],
    top: &mut [T],
) -> Result<()> {
    guard(|| layer.normalize(bottom, slope, bias, top))
}

fn batch_norm_normalize_in_place<T: Dtype>(
    layer: &BatchNorm,
    slope: &[T],
    bias: &[T],
    data: &mut [T],
    x_hat: &mut [T],
) -> Result<()> {
    guard(|| layer.normalize_in_place(slope, bias, data, given(x_hat)))
}

fn batch_norm_backward<T: Dtype>(
    layer: &mut BatchNorm,
    top_diff: &[T],
    bottom: &[T],
    slope: &[T],
    bottom_diff: &mut [T],
    slope_diff: &mut [T],
    bias_diff: &mut [T],
) -> Result<()> {
    guard(|| {
        let gradients = batch_norm::cpu::Gradients {
            bottom: given(bottom_diff),
            slope: given(slope_diff),
            bias: given(bias_diff),
        };
        layer.backward(top_diff, bottom, slope, gradients)
    })
}

fn batch_norm_backward_in_place<T: Dtype>(
    layer: &mut BatchNorm,
    x_hat: &[T],
    slope: &[T],
    diff: &mut [T],
    propagate_down: bool,
    slope_diff: &mut [T],
    bias_diff: &mut [T],
) -> Result<()> {
    guard(|| {
        let (slope_diff, bias_diff) = (given(slope_diff), given(bias_diff));
        layer.backward_in_place(x_hat, slope, diff, propagate_down, slope_diff, bias_diff)
    })
}

use batch_norm_backward as batch_norm_backward_f32;
use batch_norm_backward as batch_norm_backward_f64;
use batch_norm_backward_in_place as batch_norm_backward_in_place_f32;
use batch_norm_backward_in_place as batch_norm_backward_in_place_f64;
use batch_norm_normalize as batch_norm_normalize_f32;
use batch_norm_normalize as batch_norm_normalize_f64;
use batch_norm_normalize_in_place as batch_norm_normalize_in_place_f32;
use batch_norm_normalize_in_place as batch_norm_normalize_in_place_f64;
use take_batch_statistics as take_batch_statistics_f32;
use take_batch_statistics as take_batch_statistics_f64;
use take_moving_statistics as take_moving_statistics_f32;
use take_moving_statistics as take_moving_statistics_f64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_that_carries_its_words() {
        for panic in [
            guard::<()>(|| panic!("index {} of {}", 7, 3)),
            guard::<()>(|| panic!("index 7 of 3")),
        ] {
            let message = panic.unwrap_err().to_string();
            assert_eq!(message, "internal error, please report it: index 7 of 3");
        }
        let other = guard::<()>(|| std::panic::panic_any(5)).unwrap_err();
        assert!(other.to_string().ends_with("no message"));
    }
}
