//! What C++ sees, in namespace `lsoftmax`; the generated header is
//! `lsoftmax/src/bridge/ffi.rs.h`.

pub(crate) use bridge::*;

#[cfg(feature = "cuda")]
use super::finish;
use super::{
    bn_backward, bn_forward, bn_reshape, constant_channel, diagnose, margin_backward,
    margin_forward, margin_reshape, new_batch_norm, new_large_margin, version,
};
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

    /// Where the blobs of a pass lie.
    enum Memory {
        Host,
        Device,
    }

    /// A blob's values, of the pass's type; null where it has none or is not
    /// there.
    #[derive(Clone, Copy)]
    struct View {
        values: *const u8,
        count: usize,
    }

    /// The same, to be written.
    #[derive(Clone, Copy)]
    struct MutableView {
        values: *mut u8,
        count: usize,
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
        /// Of the device memory that passes there get as `scratch`.
        device_bytes: usize,
    }

    /// Forward of large_margin::cpu and of large_margin::gpu.
    struct MarginForward {
        memory: Memory,
        dtype: ElementType,
        features: View,
        labels: View,
        weights: View,
        logits: MutableView,
        plain: MutableView,
        scratch: MutableView,
    }

    /// Backward of the two.
    struct MarginBackward {
        memory: Memory,
        dtype: ElementType,
        logits_diff: MutableView,
        plain_diff: View,
        features: View,
        weights: View,
        features_diff: MutableView,
        weights_diff: MutableView,
        scratch: MutableView,
    }

    /// A forward pass that is over, on the host; large_margin::diagnosis::Pass.
    struct MarginDiagnosis {
        dtype: ElementType,
        features: View,
        labels: View,
        weights: View,
        logits: View,
    }

    /// What a BN layer's bottom makes of it.
    struct BnSizes {
        channels: i32,
        /// As for MarginSizes.
        device_bytes: usize,
    }

    /// Forward of batch_norm::cpu and of batch_norm::gpu; in place, bottom is
    /// top. Either the moving statistics are there or those to update.
    struct BnForward {
        memory: Memory,
        dtype: ElementType,
        bottom: View,
        slope: View,
        bias: View,
        moving_mean: View,
        moving_inv_std: View,
        update_mean: MutableView,
        update_inv_std: MutableView,
        top: MutableView,
        x_hat: MutableView,
        scratch: MutableView,
    }

    /// Backward of the two; in place, top_diff is bottom_diff where that is
    /// there.
    struct BnBackward {
        memory: Memory,
        dtype: ElementType,
        top_diff: View,
        x: View,
        slope: View,
        bottom_diff: MutableView,
        slope_diff: MutableView,
        bias_diff: MutableView,
        scratch: MutableView,
    }

    unsafe extern "C++" {
        include!("lsoftmax/blas.hpp");

        type Blas;

        /// # Safety
        /// The pointers must be valid for the shapes that the sizes give, in
        /// the memory, host or device, that the implementation works on.
        unsafe fn gemm(self: &Blas, product: &MatrixProduct);
    }

    // Methods are the layers' own, and described there. Passes are unsafe: their
    // views must be of memory that is theirs until they are done, on the device
    // until it is, and blas must work on that memory.
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
        fn margin(self: &LargeMarginInnerProduct) -> u32;
        fn passes(self: &LargeMarginInnerProduct) -> i64;
        fn lambda(self: &LargeMarginInnerProduct) -> f64;
        fn resume(self: &mut LargeMarginInnerProduct, passes: i64);
        #[cxx_name = "forward"]
        unsafe fn margin_forward(
            layer: &mut LargeMarginInnerProduct,
            blas: &Blas,
            pass: &MarginForward,
        ) -> Result<()>;
        #[cxx_name = "backward"]
        unsafe fn margin_backward(
            layer: &LargeMarginInnerProduct,
            blas: &Blas,
            pass: &MarginBackward,
        ) -> Result<()>;
        fn log_every(self: &mut LargeMarginInnerProduct, value: &str) -> Result<()>;
        fn diagnosis_is_due(self: &LargeMarginInnerProduct) -> bool;
        /// The line for the log.
        unsafe fn diagnose(
            layer: &LargeMarginInnerProduct,
            pass: &MarginDiagnosis,
        ) -> Result<String>;
        /// Waits for the device, and reports a bad label of the last batch.
        #[cfg(feature = "cuda")]
        fn finish(layer: &LargeMarginInnerProduct) -> Result<()>;

        type BatchNorm;

        /// A layer from its serialized BNParameter; `train`: the TRAIN phase.
        fn new_batch_norm(param: &[u8], train: bool) -> Result<Box<BatchNorm>>;
        /// Takes the bottom's shape.
        #[cxx_name = "reshape"]
        fn bn_reshape(layer: &mut BatchNorm, bottom: &[i32]) -> Result<BnSizes>;
        fn by_batch(self: &BatchNorm) -> bool;
        fn frozen(self: &BatchNorm) -> bool;
        /// A channel that was constant in a batch, else -1.
        fn constant_channel(layer: &BatchNorm) -> i32;
        #[cxx_name = "forward"]
        unsafe fn bn_forward(layer: &mut BatchNorm, pass: &BnForward) -> Result<()>;
        #[cxx_name = "backward"]
        unsafe fn bn_backward(layer: &mut BatchNorm, pass: &BnBackward) -> Result<()>;
    }
}
