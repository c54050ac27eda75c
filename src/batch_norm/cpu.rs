//! Forward and backward on host memory.
//!
//! Passes over memory: forward reads x once for the statistics, then reads x
//! and writes y; backward reads g and x once for the two sums, then reads both
//! and writes dx. Only a layer in place, which overwrites its x, stores x_hat.

use super::cut::Scratch;
use super::passes::{self, Normalize, PassDownByBatch, PassDownByMoving};
use super::sums::{self, Join, Pair};
use super::x_hat::Values;
use super::{BatchNorm, Shape, Statistics};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::last::Last;
use crate::pool;

/// The moving statistics, (C) each.
#[derive(Debug)]
pub enum Moving<'a, T> {
    /// They normalise.
    Read {
        /// The moving mean.
        mean: &'a [T],
        /// The moving inverse standard deviation.
        inv_std: &'a [T],
    },
    /// The batch's normalise, and move these on.
    Update {
        /// The moving mean.
        mean: &'a mut [T],
        /// The moving inverse standard deviation.
        inv_std: &'a mut [T],
    },
}

/// The blobs of a forward pass.
#[derive(Debug)]
pub struct Forward<'a, T> {
    /// x. None: the layer works in place, and `top` holds it.
    pub bottom: Option<&'a [T]>,
    /// (C).
    pub slope: &'a [T],
    /// (C).
    pub bias: &'a [T],
    /// Updated where the layer is [`BatchNorm::by_batch`], else read.
    pub moving: Moving<'a, T>,
    /// Shaped like x; overwritten by y.
    pub top: &'a mut [T],
    /// Shaped like x; in place, it gets what the backward pass needs. None:
    /// not wanted.
    pub x_hat: Option<&'a mut [T]>,
}

/// The blobs of a backward pass.
#[derive(Debug)]
pub struct Backward<'a, T> {
    /// The gradient of the loss by y. None: `bottom_diff` holds it.
    pub top_diff: Option<&'a [T]>,
    /// x or, where forward worked in place, the x_hat that it kept; empty will
    /// do where the pass was by moving statistics and neither slope nor bias
    /// want a gradient.
    pub x: &'a [T],
    /// (C), of the forward pass.
    pub slope: &'a [T],
    /// Shaped like x; overwritten. None: not wanted.
    pub bottom_diff: Option<&'a mut [T]>,
    /// (C); added to. None: not wanted.
    pub slope_diff: Option<&'a mut [T]>,
    /// (C); added to. None: not wanted.
    pub bias_diff: Option<&'a mut [T]>,
}

impl BatchNorm {
    /// One forward pass. Without a single value a channel the moving statistics
    /// stay as they are.
    ///
    /// # Errors
    /// No reshape came before.
    ///
    /// # Panics
    /// A slice whose length is not what the last reshape says; moving
    /// statistics for the other kind of pass.
    pub fn forward<T: Dtype>(&mut self, pass: Forward<'_, T>) -> Result<()> {
        let shape = self.begin_forward()?;
        let Forward {
            bottom,
            slope,
            bias,
            moving,
            top,
            x_hat,
        } = pass;
        assert_eq!(top.len(), shape.count(), "top");
        if let Some(bottom) = bottom {
            assert_eq!(bottom.len(), shape.count(), "bottom");
        }
        match moving {
            Moving::Update { mean, inv_std } => {
                assert!(self.by_batch, "batch statistics in the TEST phase");
                self.take_batch(shape, bottom.unwrap_or(top), mean, inv_std);
            }
            Moving::Read { mean, inv_std } => {
                assert!(!self.by_batch, "moving statistics in the TRAIN phase");
                self.take_moving(shape, mean, inv_std);
            }
        }
        assert_eq!(slope.len(), shape.channels, "slope");
        assert_eq!(bias.len(), shape.channels, "bias");
        if let Some(x_hat) = &x_hat {
            assert_eq!(x_hat.len(), shape.count(), "x_hat");
        }
        self.normalize(shape, slope, bias, bottom, top, x_hat);
        self.keeps_x_hat = bottom.is_none();
        self.last = Last::Cpu;
        Ok(())
    }

    /// The backward pass of the last forward pass.
    ///
    /// # Errors
    /// No forward pass on host memory came before.
    ///
    /// # Panics
    /// A slice whose length is not what the last reshape says; no gradient at
    /// all.
    pub fn backward<T: Dtype>(&mut self, pass: Backward<'_, T>) -> Result<()> {
        self.last.allows(Last::Cpu)?;
        let shape = self.shape()?;
        let Backward {
            top_diff,
            x,
            slope,
            mut bottom_diff,
            slope_diff,
            bias_diff,
        } = pass;
        if shape.count() == 0 {
            return Ok(());
        }
        let top = top_diff
            .or(bottom_diff.as_deref())
            .expect("a gradient by the top");
        assert_eq!(top.len(), shape.count(), "top gradient");
        assert_eq!(slope.len(), shape.channels, "slope");
        if let Some(diff) = &bottom_diff {
            assert_eq!(diff.len(), shape.count(), "bottom gradient");
        }
        let x = if self.keeps_x_hat {
            Values::Normalized(x)
        } else {
            Values::Bottom(x)
        };
        let diffs = [bias_diff, slope_diff];
        self.add_parameter_gradients(shape, top, x, diffs, bottom_diff.is_some());
        if let Some(diff) = &mut bottom_diff {
            self.pass_down(shape, slope, x, top_diff, diff);
        }
        Ok(())
    }

    /// Takes the statistics of the batch, and moves the moving ones on.
    fn take_batch<T: Dtype>(
        &mut self,
        shape: Shape,
        x: &[T],
        moving_mean: &mut [T],
        moving_inv_std: &mut [T],
    ) {
        assert_eq!(moving_mean.len(), shape.channels, "moving mean");
        assert_eq!(moving_inv_std.len(), shape.channels, "moving inv_std");
        if x.is_empty() {
            return;
        }
        let Scratch { cut, sums } = &mut self.scratch;
        let chunks = x.chunks(cut.len).zip(sums.chunks_mut(cut.channels));
        pool::for_each(chunks.collect(), |(x, sums)| {
            sums::moments(x, shape.positions, sums);
        });

        let (total, rest) = sums.split_at_mut(shape.channels);
        let of_set = (cut.samples * shape.positions) as f64;
        let of_all = (shape.samples * shape.positions) as f64;
        let mut before = of_set.min(of_all);
        for set in rest.chunks(shape.channels) {
            let here = of_set.min(of_all - before);
            let join = Join::new(before, here);
            for (total, &pair) in total.iter_mut().zip(set) {
                join.merge(total, pair);
            }
            before += here;
        }

        let moved = |old: T, new: f64| {
            T::from_f64(self.momentum * old.into() + (1.0 - self.momentum) * new)
        };
        self.constant_channel = total.iter().position(|&[_, m2]| m2 == 0.0);
        for (c, &[mean, m2]) in total.iter().enumerate() {
            let inv_std = 1.0 / (m2 / of_all + self.eps).sqrt();
            moving_mean[c] = moved(moving_mean[c], mean);
            moving_inv_std[c] = moved(moving_inv_std[c], inv_std);
            self.statistics[c] = Statistics { mean, inv_std };
        }
    }

    /// Takes the moving statistics.
    fn take_moving<T: Dtype>(&mut self, shape: Shape, mean: &[T], inv_std: &[T]) {
        assert_eq!(mean.len(), shape.channels, "moving mean");
        assert_eq!(inv_std.len(), shape.channels, "moving inv_std");
        let moving = mean.iter().zip(inv_std);
        for (statistics, (&mean, &inv_std)) in self.statistics.iter_mut().zip(moving) {
            *statistics = Statistics {
                mean: mean.into(),
                inv_std: inv_std.into(),
            };
        }
    }

    /// Writes y to `data`, from `from` or, without it, from what `data` holds.
    fn normalize<T: Dtype>(
        &self,
        shape: Shape,
        slope: &[T],
        bias: &[T],
        from: Option<&[T]>,
        data: &mut [T],
        x_hat: Option<&mut [T]>,
    ) {
        let cut = self.scratch.cut;
        if data.is_empty() {
            return;
        }
        let mut kept = x_hat.map(|x_hat| x_hat.chunks_mut(cut.len));
        let chunks = data.chunks_mut(cut.len).enumerate();
        let chunks = chunks.map(|(i, data)| (i, data, kept.as_mut().and_then(Iterator::next)));
        pool::for_each(
            chunks.collect(),
            |(i, data, x_hat): (usize, &mut [T], _)| {
                let c = cut.of_channels(i, shape.channels);
                let pass = Normalize {
                    statistics: &self.statistics[c.clone()],
                    slope: &slope[c.clone()],
                    bias: &bias[c],
                    from: from.map(|from| &from[cut.values(i, data.len())]),
                    data,
                    x_hat,
                };
                passes::normalize(pass, shape.positions);
            },
        );
    }

    /// Takes the two sums a channel where anything needs them, and adds them
    /// to the gradients of bias and slope.
    fn add_parameter_gradients<T: Dtype>(
        &mut self,
        shape: Shape,
        top: &[T],
        x: Values<'_, T>,
        diffs: [Option<&mut [T]>; 2],
        propagate_down: bool,
    ) {
        let diffs = if self.frozen { [None, None] } else { diffs };
        let needed = diffs.iter().any(Option::is_some) || self.by_batch && propagate_down;
        if top.is_empty() || !needed {
            return;
        }
        assert_eq!(x.slice().len(), shape.count(), "x or x_hat");

        let Scratch { cut, sums } = &mut self.scratch;
        let statistics = &self.statistics;
        let chunks = top.chunks(cut.len).zip(sums.chunks_mut(cut.channels));
        pool::for_each(
            chunks.enumerate().collect(),
            |(i, (top, sums)): (usize, (&[T], &mut [Pair]))| {
                let statistics = &statistics[cut.of_channels(i, shape.channels)];
                let x = x.part(cut.values(i, top.len()));
                sums::gradient_sums(top, x, statistics, shape.positions, sums);
            },
        );

        let (total, rest) = sums.split_at_mut(shape.channels);
        for set in rest.chunks(shape.channels) {
            for (total, pair) in total.iter_mut().zip(set) {
                sums::add(total, *pair);
            }
        }
        for (which, diff) in diffs.into_iter().enumerate() {
            let Some(diff) = diff else { continue };
            assert_eq!(diff.len(), shape.channels, "parameter gradient");
            for (diff, pair) in diff.iter_mut().zip(total.iter()) {
                *diff += T::from_f64(pair[which]);
            }
        }
    }

    /// Writes the bottom's gradient to `diff`, from `from` or, without it,
    /// from what `diff` holds.
    fn pass_down<T: Dtype>(
        &self,
        shape: Shape,
        slope: &[T],
        x: Values<'_, T>,
        from: Option<&[T]>,
        diff: &mut [T],
    ) {
        if diff.is_empty() {
            return;
        }
        let Scratch { cut, sums } = &self.scratch;
        let chunks = diff.chunks_mut(cut.len).enumerate();
        pool::for_each(chunks.collect(), |(i, diff): (usize, &mut [T])| {
            let c = cut.of_channels(i, shape.channels);
            let values = cut.values(i, diff.len());
            let from = from.map(|from| &from[values.clone()]);
            let (statistics, slope) = (&self.statistics[c.clone()], &slope[c.clone()]);
            if self.by_batch {
                let pass = PassDownByBatch {
                    statistics,
                    slope,
                    sums: &sums[c],
                    share: 1.0 / (shape.samples * shape.positions) as f64,
                    x: x.part(values),
                    from,
                    diff,
                };
                passes::pass_down_by_batch(pass, shape.positions);
            } else {
                let pass = PassDownByMoving {
                    statistics,
                    slope,
                    from,
                    diff,
                };
                passes::pass_down_by_moving(pass, shape.positions);
            }
        });
    }
}
