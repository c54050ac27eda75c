//! The BN layer: batch normalisation with a slope and a bias a channel.
//!
//! This module holds what CPU and GPU share: the checked parameters, the
//! shape and the statistics of the last forward pass. The data flows through
//! [`cpu`], or, in GPU mode, `gpu`.
//!
//! A bottom of shape (N, C, ...) holds m = N S values of each of its C
//! channels, S the product of the axes behind the second (Ioffe and Szegedy,
//! arXiv 1502.03167, section 3):
//!
//! ```text
//! x_hat = (x - mean) inv_std        y = slope x_hat + bias
//! ```
//!
//! In the TRAIN phase mean and `inv_std = (var + eps)^(-1/2)` are the batch's,
//! var divided by m, and `moving = momentum moving + (1 - momentum) batch` for
//! both. The TEST phase, and a frozen layer in any phase, use the moving ones.
//!
//! Backward, with g the gradient by y:
//!
//! ```text
//! dslope += sum g x_hat             dbias += sum g
//! dx = slope inv_std (g - sum(g)/m - x_hat sum(g x_hat)/m)     batch
//! dx = slope inv_std g                                         moving
//! ```

pub mod cpu;
mod cut;
#[cfg(feature = "cuda")]
pub mod gpu;
mod passes;
#[cfg(feature = "cuda")]
mod plan;
mod sums;
mod sweep;
mod x_hat;

use crate::error::{Error, Result};
use crate::last::Last;
use crate::param::BnParameter;

/// How a bottom's values lie: sample by sample, channel by channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// N, the first axis.
    pub samples: usize,
    /// C, the second axis.
    pub channels: usize,
    /// S, the product of all other axes.
    pub positions: usize,
}

impl Shape {
    /// N C S, the number of values.
    pub fn count(self) -> usize {
        self.samples * self.channels * self.positions
    }
}

/// What normalises one channel.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Statistics {
    mean: f64,
    inv_std: f64,
}

/// One layer: its parameters and what a backward pass needs of the forward
/// pass before it.
#[derive(Debug)]
pub struct BatchNorm {
    momentum: f64,
    eps: f64,
    frozen: bool,
    by_batch: bool,
    shape: Option<Shape>,
    /// Of the last forward pass, one a channel.
    statistics: Vec<Statistics>,
    scratch: cut::Scratch,
    last: Last,
    /// Whether the last forward pass was in place, and kept x_hat if anything.
    keeps_x_hat: bool,
    /// Of the last batch, a channel whose values were all the same.
    constant_channel: Option<usize>,
    #[cfg(feature = "cuda")]
    gpu: Option<gpu::State>,
}

impl BatchNorm {
    /// A layer as `param` describes it, in the TRAIN phase or, without
    /// `train`, in the TEST phase.
    ///
    /// # Errors
    /// A field out of its range, by name and value.
    pub fn new(param: &BnParameter, train: bool) -> Result<Self> {
        let (momentum, eps, frozen) = (param.momentum(), param.eps(), param.frozen());
        if !(0.0..=1.0).contains(&momentum) {
            return Err(Error::new(format!(
                "momentum: {momentum} is outside [0, 1]"
            )));
        }
        if !(eps > 0.0 && eps.is_finite()) {
            return Err(Error::new(format!(
                "eps: {eps} must be a finite number above 0"
            )));
        }
        Ok(BatchNorm {
            momentum: f64::from(momentum),
            eps: f64::from(eps),
            frozen,
            by_batch: train && !frozen,
            shape: None,
            statistics: Vec::new(),
            scratch: cut::Scratch::default(),
            last: Last::None,
            keeps_x_hat: false,
            constant_channel: None,
            #[cfg(feature = "cuda")]
            gpu: None,
        })
    }

    /// Takes the shape of the bottom.
    ///
    /// # Errors
    /// Fewer than 2 axes, no channel, more positions than an int holds, a
    /// number of channels other than at the first call (slope, bias and the
    /// moving statistics have it).
    pub fn reshape(&mut self, bottom: &[i32]) -> Result<Shape> {
        let &[samples, channels, ref positions @ ..] = bottom else {
            return Err(Error::new(format!(
                "bottom of shape {bottom:?}: BN needs 2 axes or more, samples and channels"
            )));
        };
        // Caffe lets any shape pass that has a 0 in front.
        let int = |size: Option<i32>| {
            size.and_then(|size| usize::try_from(size).ok())
                .ok_or_else(|| {
                    Error::new(format!(
                        "bottom of shape {bottom:?} is too large: a channel may have {} \
                         positions, the axes behind axis 1",
                        i32::MAX
                    ))
                })
        };
        let positions = positions.iter().try_fold(1i32, |n, &d| n.checked_mul(d));
        let shape = Shape {
            samples: int(Some(samples))?,
            channels: int(Some(channels))?,
            positions: int(positions)?,
        };
        if self.shape == Some(shape) {
            return Ok(shape);
        }
        if channels == 0 {
            return Err(Error::new(format!(
                "bottom of shape {bottom:?} has no channel (axis 1)"
            )));
        }
        if let Some(before) = self.shape.filter(|s| s.channels != shape.channels) {
            return Err(Error::new(format!(
                "bottom of shape {bottom:?} has {channels} channels (axis 1), \
                 but slope and bias were made for {}",
                before.channels
            )));
        }
        self.statistics
            .resize(shape.channels, Statistics::default());
        self.scratch.reshape(shape);
        self.last = Last::None;
        self.shape = Some(shape);
        Ok(shape)
    }

    /// Whether a forward pass normalises by the statistics of its batch and
    /// moves the moving ones on.
    pub fn by_batch(&self) -> bool {
        self.by_batch
    }

    /// Bytes of device memory that a pass uses and that forward leaves to
    /// backward: O(C). 0 in a build for the CPU alone.
    pub fn device_bytes(&self) -> usize {
        #[cfg(feature = "cuda")]
        if let Some(shape) = self.shape {
            return plan::scratch_bytes(shape);
        }
        0
    }

    /// Whether slope and bias stay as they are: they get no gradient.
    pub fn frozen(&self) -> bool {
        self.frozen
    }

    /// A channel whose values were all the same in a batch: there is nothing to
    /// normalise, and eps alone is left of its variance. On the GPU it is known
    /// some passes later.
    pub fn constant_channel(&self) -> Option<usize> {
        #[cfg(feature = "cuda")]
        if let Some(state) = &self.gpu
            && let Some(channel) = state.constant_channel()
        {
            return Some(channel);
        }
        self.constant_channel
    }

    fn begin_forward(&mut self) -> Result<Shape> {
        self.last = Last::None;
        self.shape()
    }

    fn shape(&self) -> Result<Shape> {
        self.shape
            .ok_or_else(|| Error::new("forward or backward before the first reshape"))
    }
}
