//! What C++ sees, in namespace `lsoftmax`; the generated header is
//! `lsoftmax/src/bridge/ffi.rs.h`.
//!
//! Blobs cross as bytes and as pointers to bytes, with their type beside them.
//! A slice that is empty, and a pointer that is null, stands for a blob that is
//! not there.

pub(crate) use bridge::*;

use super::{
    bn_backward, bn_forward, bn_reshape, constant_channel, diagnose, margin_backward,
    margin_forward, margin_reshape, new_batch_norm, new_large_margin, version,
};
#[cfg(feature = "cuda")]
use super::{bn_backward_gpu, bn_forward_gpu, finish, margin_backward_gpu, margin_forward_gpu};
use crate::batch_norm::BatchNorm;
use crate::large_margin::LargeMarginInnerProduct;

#[cxx::bridge(namespace = "lsoftmax")]
#[allow(missing_docs, clippy::module_inception)] // the structs say it, for C++
mod bridge {
    /// Caffe's Dtype.
    enum ElementType {
        F32,
        F64,
    }

    /// `c = op(a) op(b) + beta c`, row-major: op(a) is (m, k), op(b) (k, n).
    struct MatrixProduct {
        dtype: ElementType,
        transpose_a: bool,
        transpose_b: bool,
        m: i32,
        n: i32,
        k: i32,
        a: *const u8,
        b: *const u8,
        beta: f64,
        c: *mut u8,
    }

    /// What a margin layer's bottoms make of it.
    struct MarginSizes {
        /// N and K: the shape of the class weights.
        classes: i32,
        features: i32,
        /// Where the feature axes begin in the bottom's shape, never negative.
        axis: i32,
        /// Of the device memory that passes in GPU mode get as `scratch`.
        device_bytes: usize,
    }

    /// A forward pass of the margin layer; large_margin::cpu::Forward.
    struct MarginForward<'a> {
        dtype: ElementType,
        features: &'a [u8],
        labels: &'a [u8],
        weights: &'a [u8],
        logits: &'a mut [u8],
        plain: &'a mut [u8],
    }

    /// A backward pass of the margin layer; large_margin::cpu::Backward.
    struct MarginBackward<'a> {
        dtype: ElementType,
        logits_diff: &'a mut [u8],
        plain_diff: &'a [u8],
        features: &'a [u8],
        weights: &'a [u8],
        features_diff: &'a mut [u8],
        weights_diff: &'a mut [u8],
    }

    /// A forward pass that is over, on the host; large_margin::diagnosis::Pass.
    struct MarginDiagnosis<'a> {
        dtype: ElementType,
        features: &'a [u8],
        labels: &'a [u8],
        weights: &'a [u8],
        logits: &'a [u8],
    }

    /// What a BN layer's bottom makes of it.
    struct BnSizes {
        channels: i32,
        /// As for MarginSizes.
        device_bytes: usize,
    }

    /// A forward pass of BN; batch_norm::cpu::Forward. In place, bottom is
    /// empty. Either the moving statistics are there or those to update.
    struct BnForward<'a> {
        dtype: ElementType,
        bottom: &'a [u8],
        slope: &'a [u8],
        bias: &'a [u8],
        moving_mean: &'a [u8],
        moving_inv_std: &'a [u8],
        update_mean: &'a mut [u8],
        update_inv_std: &'a mut [u8],
        top: &'a mut [u8],
        x_hat: &'a mut [u8],
    }

    /// A backward pass of BN; batch_norm::cpu::Backward. In place, and where
    /// the bottom's gradient is wanted, top_diff is empty.
    struct BnBackward<'a> {
        dtype: ElementType,
        top_diff: &'a [u8],
        x: &'a [u8],
        slope: &'a [u8],
        bottom_diff: &'a mut [u8],
        slope_diff: &'a mut [u8],
        bias_diff: &'a mut [u8],
    }

    /// large_margin::gpu::Forward.
    #[cfg(feature = "cuda")]
    struct DeviceMarginForward {
        dtype: ElementType,
        features: *const u8,
        labels: *const u8,
        weights: *const u8,
        logits: *mut u8,
        plain: *mut u8,
        scratch: *mut u8,
    }

    /// large_margin::gpu::Backward.
    #[cfg(feature = "cuda")]
    struct DeviceMarginBackward {
        dtype: ElementType,
        logits_diff: *mut u8,
        plain_diff: *const u8,
        features: *const u8,
        weights: *const u8,
        features_diff: *mut u8,
        weights_diff: *mut u8,
        scratch: *mut u8,
    }

    /// batch_norm::gpu::Forward; in place, bottom is top.
    #[cfg(feature = "cuda")]
    struct DeviceBnForward {
        dtype: ElementType,
        bottom: *const u8,
        slope: *const u8,
        bias: *const u8,
        moving_mean: *const u8,
        moving_inv_std: *const u8,
        update_mean: *mut u8,
        update_inv_std: *mut u8,
        top: *mut u8,
        x_hat: *mut u8,
        scratch: *mut u8,
    }

    /// batch_norm::gpu::Backward.
    #[cfg(feature = "cuda")]
    struct DeviceBnBackward {
        dtype: ElementType,
        top_diff: *const u8,
        x: *const u8,
        slope: *const u8,
        bottom_diff: *mut u8,
        slope_diff: *mut u8,
        bias_diff: *mut u8,
        scratch: *mut u8,
    }

    unsafe extern "C++" {
        include!("lsoftmax/blas.hpp");

        type Blas;

        /// # Safety
        /// The pointers must be valid for the shapes that the sizes give, in
        /// the memory, host or device, that the implementation works on.
        unsafe fn gemm(self: &Blas, product: &MatrixProduct);
    }

    extern "Rust" {
        /// The version of the layers.
        fn version() -> &'static str;

        type LargeMarginInnerProduct;

        /// A layer from its serialized LargeMarginInnerProductParameter.
        fn new_large_margin(param: &[u8]) -> Result<Box<LargeMarginInnerProduct>>;
        /// Takes the bottoms' shapes; the labels' counts where there are any.
        #[cxx_name = "reshape"]
        fn margin_reshape(
            layer: &mut LargeMarginInnerProduct,
            features: &[i32],
            has_labels: bool,
            labels: &[i32],
        ) -> Result<MarginSizes>;
        /// The margin m, whichever parameter gives it.
        fn margin(self: &LargeMarginInnerProduct) -> u32;
        /// The forward passes behind the layer, all that ever were.
        fn passes(self: &LargeMarginInnerProduct) -> i64;
        /// lambda of the last forward pass; before the first, of the next.
        fn lambda(self: &LargeMarginInnerProduct) -> f64;
        /// Goes on from a count of all forward passes, or from the start that
        /// the parameter names where that is higher.
        fn resume(self: &mut LargeMarginInnerProduct, passes: i64);
        /// Takes the value of LSOFTMAX_LOG_EVERY.
        fn log_every(self: &mut LargeMarginInnerProduct, value: &str) -> Result<()>;
        /// Whether the last forward pass is one to diagnose.
        fn diagnosis_is_due(self: &LargeMarginInnerProduct) -> bool;
        /// The line for the log.
        fn diagnose(layer: &LargeMarginInnerProduct, pass: MarginDiagnosis<'_>) -> Result<String>;
        #[cxx_name = "forward"]
        fn margin_forward(
            layer: &mut LargeMarginInnerProduct,
            blas: &Blas,
            pass: MarginForward<'_>,
        ) -> Result<()>;
        #[cxx_name = "backward"]
        fn margin_backward(
            layer: &LargeMarginInnerProduct,
            blas: &Blas,
            pass: MarginBackward<'_>,
        ) -> Result<()>;
        /// # Safety
        /// That of LargeMarginInnerProduct::forward_gpu.
        #[cfg(feature = "cuda")]
        #[cxx_name = "forward_gpu"]
        unsafe fn margin_forward_gpu(
            layer: &mut LargeMarginInnerProduct,
            blas: &Blas,
            pass: DeviceMarginForward,
        ) -> Result<()>;
        /// # Safety
        /// That of LargeMarginInnerProduct::backward_gpu.
        #[cfg(feature = "cuda")]
        #[cxx_name = "backward_gpu"]
        unsafe fn margin_backward_gpu(
            layer: &LargeMarginInnerProduct,
            blas: &Blas,
            pass: DeviceMarginBackward,
        ) -> Result<()>;
        /// Waits for the device, and reports a bad label of the last batch.
        #[cfg(feature = "cuda")]
        fn finish(layer: &LargeMarginInnerProduct) -> Result<()>;

        type BatchNorm;

        /// A layer from its serialized BNParameter; `train`: the TRAIN phase.
        fn new_batch_norm(param: &[u8], train: bool) -> Result<Box<BatchNorm>>;
        /// Takes the bottom's shape.
        #[cxx_name = "reshape"]
        fn bn_reshape(layer: &mut BatchNorm, bottom: &[i32]) -> Result<BnSizes>;
        /// Whether a forward pass is by the batch's statistics.
        fn by_batch(self: &BatchNorm) -> bool;
        /// Whether slope and bias get no gradient.
        fn frozen(self: &BatchNorm) -> bool;
        /// A channel that was constant in a batch, else -1.
        fn constant_channel(layer: &BatchNorm) -> i32;
        #[cxx_name = "forward"]
        fn bn_forward(layer: &mut BatchNorm, pass: BnForward<'_>) -> Result<()>;
        #[cxx_name = "backward"]
        fn bn_backward(layer: &mut BatchNorm, pass: BnBackward<'_>) -> Result<()>;
        /// # Safety
        /// That of BatchNorm::forward_gpu.
        #[cfg(feature = "cuda")]
        #[cxx_name = "forward_gpu"]
        unsafe fn bn_forward_gpu(layer: &mut BatchNorm, pass: DeviceBnForward) -> Result<()>;
        /// # Safety
        /// That of BatchNorm::backward_gpu.
        #[cfg(feature = "cuda")]
        #[cxx_name = "backward_gpu"]
        unsafe fn bn_backward_gpu(layer: &BatchNorm, pass: DeviceBnBackward) -> Result<()>;
    }
}
