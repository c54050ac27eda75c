//! Forward and backward on device memory: the launches.
//!
//! Forward: two kernels of `kernels.cu` for the statistics (parts, then their
//! join) and one to normalise; backward: two for the sums and one for dx.
//! Nothing waits for the device and nothing is allocated; partial sums and
//! statistics lie in device memory that Caffe keeps
//! ([`BatchNorm::device_bytes`]).

use std::ffi::c_void;

use super::plan::{self, Plan};
use super::{BatchNorm, Shape};
use crate::cuda::layout::batch_norm::{LOAD, THREADS};
use crate::cuda::{DeviceDtype, Kernel, Kernels, Mailbox, kernel_args};
use crate::error::Result;
use crate::last::Last;

/// The kernels, compiled by build.rs for the architectures of Caffe's build.
static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/batch_norm.fatbin"));

/// A kernel in its version for single values and its version for vectors.
#[derive(Debug)]
struct Versions([Kernel; 2]);

impl Versions {
    fn pick(&self, vectors: bool) -> &Kernel {
        &self.0[usize::from(vectors)]
    }
}

/// The kernels of the layer's device.
#[derive(Debug)]
pub(super) struct State {
    segment_moments: Versions,
    segment_gradients: Versions,
    column_moments: Kernel,
    column_gradients: Kernel,
    finish_moments: Kernel,
    finish_gradients: Kernel,
    take_moving: Kernel,
    normalize: Versions,
    pass_down: Versions,
    constant_channel: Mailbox,
}

impl State {
    fn new<T: DeviceDtype>() -> Result<Self> {
        let kernels = Kernels::load(IMAGE)?;
        let one = |name: &str| kernels.get::<T>(name);
        let two = |name: &str| -> Result<Versions> {
            Ok(Versions([one(name)?, one(&format!("{name}_vec"))?]))
        };
        Ok(State {
            segment_moments: two("bn_segment_moments")?,
            segment_gradients: two("bn_segment_gradients")?,
            column_moments: one("bn_column_moments")?,
            column_gradients: one("bn_column_gradients")?,
            finish_moments: one("bn_finish_moments")?,
            finish_gradients: one("bn_finish_gradients")?,
            take_moving: one("bn_take_moving")?,
            normalize: two("bn_normalize")?,
            pass_down: two("bn_pass_down")?,
            constant_channel: kernels.mailbox()?,
        })
    }

    /// A channel that was constant in a batch, by now.
    pub(super) fn constant_channel(&self) -> Option<usize> {
        self.constant_channel.read().map(|channel| channel as usize)
    }
}

/// The blobs of a forward pass, in device memory.
#[derive(Debug, Clone, Copy)]
pub struct Forward<T> {
    /// x.
    pub bottom: *const T,
    /// (C).
    pub slope: *const T,
    /// (C).
    pub bias: *const T,
    /// (C). Not read where the layer is [`BatchNorm::by_batch`].
    pub moving_mean: *const T,
    /// (C). Not read where the layer is [`BatchNorm::by_batch`].
    pub moving_inv_std: *const T,
    /// (C), the moving mean where the layer is [`BatchNorm::by_batch`]; else
    /// not touched.
    pub update_mean: *mut T,
    /// (C), the moving inverse standard deviation, likewise.
    pub update_inv_std: *mut T,
    /// Shaped like x; overwritten by y. May be `bottom`.
    pub top: *mut T,
    /// Shaped like x; in place, it gets what the backward pass needs. Null:
    /// not wanted.
    pub x_hat: *mut T,
    /// [`BatchNorm::device_bytes`] bytes.
    pub scratch: *mut u8,
}

/// The blobs of a backward pass, in device memory.
#[derive(Debug, Clone, Copy)]
pub struct Backward<T> {
    /// The gradient of the loss by y. May be `bottom_diff`.
    pub top_diff: *const T,
    /// The x_hat that forward kept or, where it kept none, x. Read only for
    /// sums and where the statistics are the batch's.
    pub x: *const T,
    /// (C), of the forward pass.
    pub slope: *const T,
    /// Shaped like x; overwritten. Null: not wanted.
    pub bottom_diff: *mut T,
    /// (C); added to. Null: not wanted.
    pub slope_diff: *mut T,
    /// (C); added to. Null: not wanted.
    pub bias_diff: *mut T,
    /// What the forward pass got.
    pub scratch: *mut u8,
}

impl BatchNorm {
    /// [`forward`](Self::forward) on device memory; returns before the device
    /// is done.
    ///
    /// # Errors
    /// CUDA's errors.
    ///
    /// # Safety
    /// All pointers that may not be null are memory of the current device, as
    /// large as the last reshape says and aligned as their types ask; `scratch`
    /// is aligned to 16 bytes. All stay valid until the device has done the work
    /// that is queued here.
    pub unsafe fn forward_gpu<T: DeviceDtype>(&mut self, pass: Forward<T>) -> Result<()> {
        let shape = self.begin_forward()?;
        if self.gpu.is_none() {
            self.gpu = Some(State::new::<T>()?);
        }
        self.keeps_x_hat = !pass.x_hat.is_null();
        self.last = Last::Gpu;
        if shape.count() == 0 {
            return Ok(());
        }
        let state = self.gpu.as_ref().expect("made above");
        let aligned = aligned([pass.bottom, pass.top, pass.x_hat]);
        let plan = Plan::new::<T>(shape, aligned)?;
        let Scratch {
            statistics,
            partials,
            ..
        } = Scratch::new(pass.scratch, shape);
        // SAFETY: the caller's, for every launch in this block; the arguments
        // of each kernel are those that it declares, in order.
        unsafe {
            if self.by_batch {
                let moments = if plan.by_segment {
                    state.segment_moments.pick(plan.vectors)
                } else {
                    &state.column_moments
                };
                let args = kernel_args![plan.shape, pass.bottom, partials];
                launch(moments, plan.reduce, args)?;
                launch(
                    &state.finish_moments,
                    plan.join,
                    kernel_args![
                        plan.shape,
                        self.momentum,
                        self.eps,
                        partials,
                        pass.update_mean,
                        pass.update_inv_std,
                        statistics,
                        state.constant_channel.device_address(),
                    ],
                )?;
            } else {
                launch(
                    &state.take_moving,
                    (shape.channels.div_ceil(THREADS as usize) as u32, 1),
                    kernel_args![
                        plan.shape.channels,
                        pass.moving_mean,
                        pass.moving_inv_std,
                        statistics
                    ],
                )?;
            }
            launch(
                state.normalize.pick(plan.vectors),
                plan.all,
                kernel_args![
                    plan.shape,
                    statistics,
                    pass.slope,
                    pass.bias,
                    pass.bottom,
                    pass.top,
                    pass.x_hat,
                ],
            )
        }
    }

    /// [`backward`](Self::backward) on device memory; returns before the device
    /// is done.
    ///
    /// # Errors
    /// CUDA's errors; no forward pass on device memory came before.
    ///
    /// # Safety
    /// As [`forward_gpu`](Self::forward_gpu), with the same scratch memory.
    pub unsafe fn backward_gpu<T: DeviceDtype>(&self, pass: Backward<T>) -> Result<()> {
        self.last.allows(Last::Gpu)?;
        let shape = self.shape()?;
        let state = self.gpu.as_ref().expect("made by the forward pass");
        if shape.count() == 0 {
            return Ok(());
        }
        let aligned = aligned([pass.top_diff, pass.x, pass.bottom_diff]);
        let plan = Plan::new::<T>(shape, aligned)?;
        let Scratch {
            statistics,
            means,
            partials,
        } = Scratch::new(pass.scratch, shape);
        let x_is_hat = i32::from(self.keeps_x_hat);
        let by_batch = i32::from(self.by_batch);
        let Backward {
            top_diff,
            x,
            slope,
            bottom_diff,
            ..
        } = pass;
        let [slope_diff, bias_diff] = if self.frozen {
            [std::ptr::null_mut(); 2]
        } else {
            [pass.slope_diff, pass.bias_diff]
        };
        let params_wanted = !slope_diff.is_null() || !bias_diff.is_null();
        // SAFETY: the caller's, for every launch in this block; the arguments
        // of each kernel are those that it declares, in order.
        unsafe {
            if params_wanted || self.by_batch && !bottom_diff.is_null() {
                let sums = if plan.by_segment {
                    state.segment_gradients.pick(plan.vectors)
                } else {
                    &state.column_gradients
                };
                launch(
                    sums,
                    plan.reduce,
                    kernel_args![plan.shape, top_diff, x, x_is_hat, statistics, partials],
                )?;
                launch(
                    &state.finish_gradients,
                    plan.join,
                    kernel_args![plan.shape, partials, slope_diff, bias_diff, means],
                )?;
            }
            if bottom_diff.is_null() {
                return Ok(());
            }
            launch(
                state.pass_down.pick(plan.vectors),
                plan.all,
                kernel_args![
                    plan.shape,
                    statistics,
                    means,
                    slope,
                    top_diff,
                    x,
                    x_is_hat,
                    by_batch,
                    bottom_diff
                ],
            )
        }
    }
}

/// Where in the scratch memory what lies.
struct Scratch {
    statistics: *mut u8,
    means: *mut u8,
    partials: *mut u8,
}

impl Scratch {
    fn new(start: *mut u8, shape: Shape) -> Self {
        Scratch {
            statistics: start,
            means: start.wrapping_add(plan::means(shape)),
            partials: start.wrapping_add(plan::partials(shape)),
        }
    }
}

/// Whether the kernels can read and write these, which may be null, by vectors.
/// Caffe's own blobs always are, as the allocations that they begin.
fn aligned<T>(blobs: [*const T; 3]) -> bool {
    blobs.iter().all(|blob| blob.addr().is_multiple_of(LOAD))
}

/// # Safety
/// As [`Kernel::launch`].
unsafe fn launch(kernel: &Kernel, grid: (u32, u32), args: &mut [*mut c_void]) -> Result<()> {
    // SAFETY: the caller's.
    unsafe { kernel.launch(grid, THREADS, args) }
}
