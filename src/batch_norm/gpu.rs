//! Forward and backward on device memory: the launches.
//!
//! Forward: two kernels of `src/cuda/batch_norm.cu` for the statistics (parts,
//! then their join) and one to normalise; backward: two for the sums and one
//! for dx. Nothing waits for the device and nothing is allocated; partial sums
//! and statistics lie in device memory that Caffe keeps
//! ([`BatchNorm::device_bytes`]).

use std::ffi::c_void;

use super::{BatchNorm, Shape};
use crate::cuda::{Device, DeviceDtype, Kernel, kernel_args};
use crate::error::{Error, Result};

/// `THREADS`, `WARP` and `ROWS` of the kernels.
const THREADS: u32 = 256;
const WARP: usize = 32;
const ROWS: usize = THREADS as usize / WARP;

/// Bytes of the kernels' `Partial` and, at the most, of their `Channel`.
const PARTIAL: usize = 3 * size_of::<f64>();
const CHANNEL: usize = 5 * size_of::<f64>();

/// Positions from which on a block reduces segments of a channel; below, a
/// warp would read more than it uses.
const SEGMENT: usize = WARP;
/// Blocks that fill any GPU. Fixed, so that sums do not depend on the device.
const BLOCKS: usize = 1024;
/// Values that a thread should have, lest the parts cost more than they bring.
const VALUES: usize = 8;
/// `LOAD` of the kernels: bytes of the widest load, and what a thread has of
/// each blob in a pass over all values.
const LOAD: usize = 16;

/// The kernels' `Shape`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct KernelShape {
    samples: i32,
    channels: i32,
    positions: i32,
    parts: i32,
}

/// How the kernels go over a bottom.
#[derive(Debug, Clone, Copy)]
struct Plan {
    shape: KernelShape,
    /// Columns of a channel that the first stage leaves to the join.
    width: i32,
    reduce: (u32, u32),
    join: (u32, u32),
    all: (u32, u32),
    by_segment: bool,
    vectors: bool,
}

impl Plan {
    fn new<T: DeviceDtype>(shape: Shape) -> Self {
        let cut = Cut::new(shape);
        let int = |size| i32::try_from(size).expect("blobs hold at most i32::MAX elements");
        let lanes = LOAD / size_of::<T>();
        let blocks = shape.count().div_ceil(THREADS as usize * lanes);
        Plan {
            shape: KernelShape {
                samples: int(shape.samples),
                channels: int(shape.channels),
                positions: int(shape.positions),
                parts: int(cut.parts),
            },
            width: int(cut.width),
            reduce: (cut.blocks as u32, cut.parts as u32),
            join: (shape.channels.div_ceil(ROWS) as u32, 1),
            all: (blocks as u32, 1),
            by_segment: cut.by_segment,
            vectors: shape.positions.is_multiple_of(lanes),
        }
    }
}

/// The first stage of a reduction: `parts` times `blocks` blocks.
#[derive(Debug, Clone, Copy)]
struct Cut {
    by_segment: bool,
    blocks: usize,
    parts: usize,
    width: usize,
}

impl Cut {
    fn new(shape: Shape) -> Self {
        let by_segment = shape.positions >= SEGMENT;
        let (blocks, width, values) = if by_segment {
            let values = shape.samples * shape.positions / THREADS as usize;
            (shape.channels, 1, values)
        } else {
            let columns = shape.channels * shape.positions;
            (
                columns.div_ceil(WARP),
                shape.positions,
                shape.samples / ROWS,
            )
        };
        Cut {
            by_segment,
            blocks,
            parts: (BLOCKS / blocks.max(1)).min(values / VALUES).max(1),
            width,
        }
    }
}

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
}

impl State {
    fn new<T: DeviceDtype>() -> Result<Self> {
        let device = Device::current()?;
        let one = |name: &str| device.batch_norm_kernel::<T>(name);
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
        })
    }
}

/// The blobs of the parameters, (C) each, in device memory.
#[derive(Debug, Clone, Copy)]
pub struct DeviceParams<T> {
    /// Multiplies x_hat.
    pub slope: *const T,
    /// Added to it.
    pub bias: *const T,
    /// Read, or moved on.
    pub moving_mean: *mut T,
    /// Read, or moved on.
    pub moving_inv_std: *mut T,
}

/// The gradients in device memory; null: not wanted.
#[derive(Debug, Clone, Copy)]
pub struct DeviceGradients<T> {
    /// Shaped like the bottom; overwritten.
    pub bottom: *mut T,
    /// (C); added to.
    pub slope: *mut T,
    /// (C); added to.
    pub bias: *mut T,
}

impl BatchNorm {
    /// Bytes of device memory that a pass uses and that forward leaves to
    /// backward: O(C).
    pub fn device_bytes(&self) -> usize {
        self.shape.map_or(0, |shape| {
            let Cut { parts, width, .. } = Cut::new(shape);
            shape.channels * (CHANNEL + parts * width * PARTIAL)
        })
    }

    /// The statistics and `top`, on device memory; returns before the device
    /// is done. `bottom` and `top` may be the same; `x_hat`, unless null, gets
    /// what [`backward_gpu`](Self::backward_gpu) then needs.
    ///
    /// # Errors
    /// CUDA's errors.
    ///
    /// # Safety
    /// All pointers are memory of the current device, as large as the last
    /// reshape says, `scratch` of [`device_bytes`](Self::device_bytes), and
    /// stay valid until the device has done the work that is queued here.
    pub unsafe fn forward_gpu<T: DeviceDtype>(
        &mut self,
        bottom: *const T,
        params: DeviceParams<T>,
        top: *mut T,
        x_hat: *mut T,
        scratch: *mut u8,
    ) -> Result<()> {
        let shape = self.shape()?;
        if self.gpu.is_none() {
            self.gpu = Some(State::new::<T>()?);
        }
        if shape.count() == 0 {
            return Ok(());
        }
        let state = self.gpu.as_ref().expect("made above");
        let plan = Plan::new::<T>(shape);
        let (channels, partials) = split(scratch, shape);
        let DeviceParams {
            slope,
            bias,
            moving_mean,
            moving_inv_std,
        } = params;
        // SAFETY: the caller's, for every launch in this block; the arguments
        // of each kernel are those that it declares, in order.
        unsafe {
            if self.by_batch {
                let moments = if plan.by_segment {
                    state.segment_moments.pick(plan.vectors)
                } else {
                    &state.column_moments
                };
                launch(
                    moments,
                    plan.reduce,
                    kernel_args![plan.shape, bottom, partials],
                )?;
                launch(
                    &state.finish_moments,
                    plan.join,
                    kernel_args![
                        plan.shape,
                        plan.width,
                        self.momentum,
                        self.eps,
                        partials,
                        moving_mean,
                        moving_inv_std,
                        channels
                    ],
                )?;
            } else {
                launch(
                    &state.take_moving,
                    (shape.channels.div_ceil(THREADS as usize) as u32, 1),
                    kernel_args![plan.shape.channels, moving_mean, moving_inv_std, channels],
                )?;
            }
            launch(
                state.normalize.pick(plan.vectors),
                plan.all,
                kernel_args![plan.shape, channels, slope, bias, bottom, top, x_hat],
            )
        }
    }

    /// The gradients of the last forward pass on device memory, with `top`,
    /// the gradient by the top; returns before the device is done. `x` is the
    /// bottom or, with `x_is_hat`, what forward wrote to `x_hat`. `top` and the
    /// gradient by the bottom may be the same.
    ///
    /// # Errors
    /// CUDA's errors.
    ///
    /// # Safety
    /// As [`forward_gpu`](Self::forward_gpu), with the same `scratch`. `x` is
    /// read only for sums and where the statistics are the batch's.
    pub unsafe fn backward_gpu<T: DeviceDtype>(
        &self,
        top: *const T,
        x: *const T,
        x_is_hat: bool,
        slope: *const T,
        gradients: DeviceGradients<T>,
        scratch: *mut u8,
    ) -> Result<()> {
        let shape = self.shape()?;
        let Some(state) = &self.gpu else {
            return Err(Error::new("backward before the first forward"));
        };
        if shape.count() == 0 {
            return Ok(());
        }
        let plan = Plan::new::<T>(shape);
        let (channels, partials) = split(scratch, shape);
        let x_is_hat = i32::from(x_is_hat);
        let by_batch = i32::from(self.by_batch);
        let params_wanted = !gradients.slope.is_null() || !gradients.bias.is_null();
        // SAFETY: the caller's, for every launch in this block; the arguments
        // of each kernel are those that it declares, in order.
        unsafe {
            if params_wanted || self.by_batch && !gradients.bottom.is_null() {
                let sums = if plan.by_segment {
                    state.segment_gradients.pick(plan.vectors)
                } else {
                    &state.column_gradients
                };
                launch(
                    sums,
                    plan.reduce,
                    kernel_args![plan.shape, top, x, x_is_hat, channels, partials],
                )?;
                launch(
                    &state.finish_gradients,
                    plan.join,
                    kernel_args![
                        plan.shape,
                        plan.width,
                        partials,
                        gradients.slope,
                        gradients.bias,
                        channels
                    ],
                )?;
            }
            if gradients.bottom.is_null() {
                return Ok(());
            }
            launch(
                state.pass_down.pick(plan.vectors),
                plan.all,
                kernel_args![
                    plan.shape,
                    channels,
                    slope,
                    top,
                    x,
                    x_is_hat,
                    by_batch,
                    gradients.bottom
                ],
            )
        }
    }
}

/// Where in the scratch memory the channels and the partial sums lie.
fn split(scratch: *mut u8, shape: Shape) -> (*mut u8, *mut u8) {
    (scratch, scratch.wrapping_add(shape.channels * CHANNEL))
}

/// # Safety
/// As [`Kernel::launch`].
unsafe fn launch(kernel: &Kernel, grid: (u32, u32), args: &mut [*mut c_void]) -> Result<()> {
    // SAFETY: the caller's.
    unsafe { kernel.launch(grid, THREADS, args) }
}
