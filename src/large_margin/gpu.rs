//! Forward and backward on device memory: the launches.
//!
//! Per direction the products of InnerProduct on Caffe's cuBLAS handle and one
//! kernel of `src/cuda/large_margin.cu`. Nothing waits for the device and
//! nothing is allocated; the per-sample coefficients lie in device memory that
//! Caffe keeps ([`LargeMarginInnerProduct::device_bytes`]).

use super::{LargeMarginInnerProduct, Sizes};
use crate::bridge::ffi::Blas;
use crate::cuda::{self, Device, DeviceDtype, Kernel, Mailbox, kernel_args};
use crate::error::{Error, Result};

/// Threads of a block, `THREADS` of the kernels.
const THREADS: u32 = 128;

/// Bytes of the kernels' `Coefficients`, and of the class beside them.
const COEFFICIENTS: usize = 4 * size_of::<f64>();
const CLASS: usize = size_of::<i32>();

/// The kernels of the layer's device, and where they report bad labels.
#[derive(Debug)]
pub(super) struct State {
    forward: Kernel,
    backward: Kernel,
    bad_label: Mailbox,
}

impl State {
    fn new<T: DeviceDtype>() -> Result<Self> {
        let device = Device::current()?;
        Ok(State {
            forward: device.large_margin_kernel::<T>("large_margin_forward")?,
            backward: device.large_margin_kernel::<T>("large_margin_backward")?,
            bad_label: Mailbox::new()?,
        })
    }
}

/// The sizes as kernels and cuBLAS take them.
fn ints(sizes: Sizes) -> [i32; 3] {
    let int = |size| i32::try_from(size).expect("blobs hold at most i32::MAX elements");
    [sizes.samples, sizes.classes, sizes.features].map(int)
}

impl LargeMarginInnerProduct {
    /// Bytes of device memory that forward leaves to backward: O(M).
    pub fn device_bytes(&self) -> usize {
        self.sizes.map_or(0, |s| s.samples * (COEFFICIENTS + CLASS))
    }

    /// [`forward`](Self::forward) on device memory; returns before the device
    /// is done.
    ///
    /// # Errors
    /// CUDA's errors, and bad labels that earlier passes met. Such a sample is
    /// treated as one without margin; the first call after the kernel has run
    /// finds out.
    ///
    /// # Safety
    /// All pointers are memory of the current device, as large as the last
    /// reshape says, `scratch` of [`device_bytes`](Self::device_bytes);
    /// `labels` and `plain` may be null. They stay valid until the device has
    /// done the work that is queued here.
    #[allow(clippy::too_many_arguments)] // one per blob, as in forward
    pub unsafe fn forward_gpu<T: DeviceDtype>(
        &mut self,
        blas: &Blas,
        features: *const T,
        labels: *const T,
        weights: *const T,
        logits: *mut T,
        plain: *mut T,
        scratch: *mut u8,
    ) -> Result<()> {
        let sizes = self.begin_forward()?;
        self.report_bad_label()?;
        if self.gpu.is_none() {
            self.gpu = Some(State::new::<T>()?);
        }
        let [m, n, k] = ints(sizes);
        if m == 0 {
            return Ok(());
        }
        // SAFETY: the caller's, for every call in this block; the arguments of
        // the kernel are those of large_margin_forward_*, in order.
        unsafe {
            if k == 0 {
                cuda::zero(logits, sizes.samples * sizes.classes)?;
            } else {
                let (x, w) = ((false, features), (true, weights));
                T::gemm(blas, [m, n, k], x, w, T::default(), logits);
            }
            if !plain.is_null() {
                cuda::copy(logits, plain, sizes.samples * sizes.classes)?;
            }
            if labels.is_null() {
                return Ok(());
            }
            let (coefficients, classes) = Self::split(scratch, sizes);
            let margin = self.margin.m() as i32;
            let has_ignore_label = i32::from(self.ignore_label.is_some());
            let ignore_label = self.ignore_label.unwrap_or(0);
            let state = self.gpu.as_ref().expect("made above");
            state.forward.launch(
                (m as u32, 1),
                THREADS,
                kernel_args![
                    n,
                    k,
                    margin,
                    self.lambda,
                    has_ignore_label,
                    ignore_label,
                    features,
                    labels,
                    weights,
                    logits,
                    coefficients,
                    classes,
                    state.bad_label.device_address(),
                ],
            )
        }
    }

    /// [`backward`](Self::backward) on device memory; `had_labels` says
    /// whether the forward pass had any.
    ///
    /// # Errors
    /// As [`forward_gpu`](Self::forward_gpu).
    ///
    /// # Safety
    /// As [`forward_gpu`](Self::forward_gpu), with the same `scratch`; a
    /// gradient that is not wanted is null.
    #[allow(clippy::too_many_arguments)] // one per blob, as in backward
    pub unsafe fn backward_gpu<T: DeviceDtype>(
        &self,
        blas: &Blas,
        logits_diff: *const T,
        had_labels: bool,
        features: *const T,
        weights: *const T,
        features_diff: *mut T,
        weights_diff: *mut T,
        scratch: *mut u8,
    ) -> Result<()> {
        let (Some(sizes), Some(state)) = (self.sizes, &self.gpu) else {
            return Err(Error::new("backward before the first forward"));
        };
        self.report_bad_label()?;
        let [m, n, k] = ints(sizes);
        if m == 0 || k == 0 {
            return Ok(());
        }
        // SAFETY: the caller's, for every call in this block; the arguments of
        // the kernel are those of large_margin_backward_*, in order.
        unsafe {
            if !weights_diff.is_null() {
                let (g, x) = ((true, logits_diff), (false, features));
                T::gemm(blas, [n, k, m], g, x, T::from_f64(1.0), weights_diff);
            }
            if !features_diff.is_null() {
                let (g, w) = ((false, logits_diff), (false, weights));
                T::gemm(blas, [m, k, n], g, w, T::default(), features_diff);
            }
            let none_wanted = features_diff.is_null() && weights_diff.is_null();
            if !had_labels || self.margin.m() == 1 || none_wanted {
                return Ok(());
            }
            let (coefficients, classes) = Self::split(scratch, sizes);
            state.backward.launch(
                (m as u32, 1),
                THREADS,
                kernel_args![
                    m,
                    n,
                    k,
                    logits_diff,
                    features,
                    weights,
                    coefficients,
                    classes,
                    features_diff,
                    weights_diff,
                ],
            )
        }
    }

    /// Where in the scratch memory the coefficients and the classes lie.
    fn split(scratch: *mut u8, sizes: Sizes) -> (*mut u8, *mut u8) {
        (scratch, scratch.wrapping_add(sizes.samples * COEFFICIENTS))
    }

    fn report_bad_label(&self) -> Result<()> {
        match self.gpu.as_ref().and_then(|s| s.bad_label.read()) {
            None => Ok(()),
            Some(word) => {
                let label = f32::from_bits(word as u32);
                Err(self.bad_label((word >> 32) as usize, f64::from(label)))
            }
        }
    }
}
