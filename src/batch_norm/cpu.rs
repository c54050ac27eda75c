//! Forward and backward on host memory.
//!
//! Passes over memory: forward reads x once for the statistics, then reads x
//! and writes y; backward reads g and x once for the two sums, then reads both
//! and writes dx. Only a layer in place, which overwrites its x, stores x_hat.
//!
//! The values are cut into chunks of whole samples or, where those are few, of
//! channels of one sample: contiguous, disjoint memory, so the threads share
//! it without unsafe code. The cut depends on the shape alone and chunks are
//! merged in order: results do not depend on the number of threads.
//!
//! A channel's S values of one sample lie together. Loops run along such
//! segments where they are long, else along the sample's row of several
//! channels, value by value with its own coefficients.
//!
//! Sums are f64 sums. A block's mean and M2 (the sum of squared distances from
//! the mean) take two passes over it in the L1 cache, and blocks merge by the
//! formula of Chan, Golub and LeVeque (1979): a mean far from zero costs no
//! digits, and f32 values of any size do not overflow.

use std::array;
use std::ops::Range;

use super::{BatchNorm, Shape, Statistics};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::pool;
use crate::vector::with_avx2;

/// Independent partial sums: four AVX2 registers of f64.
const LANES: usize = 16;
/// Values of a block: they stay in the L1 cache from one pass to the next.
const BLOCK: usize = 4096;
/// The same where loops run along rows; here they stay in the L2 cache.
const COLUMN_BLOCK: usize = 16 * 1024;
/// Positions from which on loops run along segments, not rows.
const SEGMENT: usize = 16;
/// Values of a row that are worked on together, where loops run along rows.
const TILE: usize = 256;
/// Values that are worth a thread's while: some 30 microseconds of work, where
/// waking a thread takes ten, and far more on a busy machine.
const CHUNK: usize = 128 * 1024;
/// More chunks than this would only add to the merge.
const MAX_CHUNKS: usize = 64;

/// Of one channel, the sums of a chunk: mean and M2, or sum g and sum g x_hat.
type Pair = [f64; 2];

/// The cut into chunks, and the chunks' sums.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    cut: Cut,
    /// (chunks, C), or (N, C) where a chunk is a part of a sample.
    sums: Vec<Pair>,
}

/// Chunks of `samples` whole samples; or of one sample's `channels` channels.
#[derive(Debug, Default, Clone, Copy)]
struct Cut {
    samples: usize,
    channels: usize,
    /// Values of a chunk; the last may have fewer.
    len: usize,
}

impl Cut {
    fn new(shape: Shape) -> Self {
        let wanted = (shape.count() / CHUNK).clamp(1, MAX_CHUNKS);
        let samples = shape.samples.div_ceil(wanted).max(1);
        let mut channels = shape.channels;
        if (1..wanted).contains(&shape.samples) {
            // Equal parts, so that all chunks are equally long.
            let least = channels.div_ceil(wanted.div_ceil(shape.samples));
            channels = (least..channels)
                .find(|part| shape.channels.is_multiple_of(*part))
                .unwrap_or(channels);
        }
        let len = samples * channels * shape.positions;
        Cut {
            samples,
            channels,
            len,
        }
    }

    /// The channels of chunk number `chunk`, of `all`.
    fn channels(self, chunk: usize, all: usize) -> Range<usize> {
        let first = chunk * self.channels % all;
        first..first + self.channels
    }

    /// Where chunk number `chunk`, `len` long, lies in the blob.
    fn values(self, chunk: usize, len: usize) -> Range<usize> {
        chunk * self.len..chunk * self.len + len
    }
}

impl Scratch {
    pub(super) fn reshape(&mut self, shape: Shape) {
        self.cut = Cut::new(shape);
        let sets = shape.samples.div_ceil(self.cut.samples).max(1);
        self.sums.resize(sets * shape.channels, Pair::default());
    }
}

/// The gradients that a backward pass may be asked for.
#[derive(Debug)]
pub struct Gradients<'a, T> {
    /// Shaped like the bottom; overwritten. None: not wanted.
    pub bottom: Option<&'a mut [T]>,
    /// (C); added to. None: not wanted.
    pub slope: Option<&'a mut [T]>,
    /// (C); added to. None: not wanted.
    pub bias: Option<&'a mut [T]>,
}

impl BatchNorm {
    /// Begins a forward pass that normalises by the batch: takes the
    /// statistics of `bottom` and moves the `moving` ones, each (C), on.
    /// Without a single value a channel they stay.
    ///
    /// # Panics
    /// A slice whose length is not what the last reshape says; a layer that
    /// is not [`BatchNorm::by_batch`].
    pub fn take_batch_statistics<T: Dtype>(
        &mut self,
        bottom: &[T],
        moving_mean: &mut [T],
        moving_inv_std: &mut [T],
    ) -> Result<()> {
        let shape = self.shape()?;
        assert!(self.by_batch, "batch statistics in the TEST phase");
        assert_eq!(bottom.len(), shape.count(), "bottom");
        assert_eq!(moving_mean.len(), shape.channels, "moving mean");
        assert_eq!(moving_inv_std.len(), shape.channels, "moving inv_std");
        if bottom.is_empty() {
            return Ok(());
        }

        let Scratch { cut, sums } = &mut self.scratch;
        let chunks = bottom
            .chunks(cut.len)
            .zip(sums.chunks_mut(cut.channels))
            .collect();
        pool::for_each(chunks, |(x, sums)| moments(x, shape.positions, sums));

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
        for (c, &[mean, m2]) in total.iter().enumerate() {
            let inv_std = 1.0 / (m2 / of_all + self.eps).sqrt();
            moving_mean[c] = moved(moving_mean[c], mean);
            moving_inv_std[c] = moved(moving_inv_std[c], inv_std);
            self.statistics[c] = Statistics { mean, inv_std };
        }
        Ok(())
    }

    /// Begins a forward pass that normalises by the moving statistics, (C).
    ///
    /// # Panics
    /// A slice whose length is not what the last reshape says; a layer that
    /// is [`BatchNorm::by_batch`].
    pub fn take_moving_statistics<T: Dtype>(
        &mut self,
        moving_mean: &[T],
        moving_inv_std: &[T],
    ) -> Result<()> {
        let shape = self.shape()?;
        assert!(!self.by_batch, "moving statistics in the TRAIN phase");
        assert_eq!(moving_mean.len(), shape.channels, "moving mean");
        assert_eq!(moving_inv_std.len(), shape.channels, "moving inv_std");
        let moving = moving_mean.iter().zip(moving_inv_std);
        for (statistics, (&mean, &inv_std)) in self.statistics.iter_mut().zip(moving) {
            *statistics = Statistics {
                mean: mean.into(),
                inv_std: inv_std.into(),
            };
        }
        Ok(())
    }

    /// `top` from `bottom` by the statistics taken before, `slope` and `bias`,
    /// each (C).
    ///
    /// # Panics
    /// A slice whose length is not what the last reshape says.
    pub fn normalize<T: Dtype>(
        &self,
        bottom: &[T],
        slope: &[T],
        bias: &[T],
        top: &mut [T],
    ) -> Result<()> {
        let shape = self.shape()?;
        assert_eq!(bottom.len(), shape.count(), "bottom");
        assert_eq!(top.len(), shape.count(), "top");
        self.forward(shape, slope, bias, Some(bottom), top, None);
        Ok(())
    }

    /// The same with bottom and top in one place, `data`. Where given, `x_hat`,
    /// shaped alike, gets what [`BatchNorm::backward_in_place`] needs.
    ///
    /// # Panics
    /// A slice whose length is not what the last reshape says.
    pub fn normalize_in_place<T: Dtype>(
        &self,
        slope: &[T],
        bias: &[T],
        data: &mut [T],
        x_hat: Option<&mut [T]>,
    ) -> Result<()> {
        let shape = self.shape()?;
        assert_eq!(data.len(), shape.count(), "data");
        if let Some(x_hat) = &x_hat {
            assert_eq!(x_hat.len(), shape.count(), "x_hat");
        }
        self.forward(shape, slope, bias, None, data, x_hat);
        Ok(())
    }

    fn forward<T: Dtype>(
        &self,
        shape: Shape,
        slope: &[T],
        bias: &[T],
        from: Option<&[T]>,
        data: &mut [T],
        x_hat: Option<&mut [T]>,
    ) {
        assert_eq!(slope.len(), shape.channels, "slope");
        assert_eq!(bias.len(), shape.channels, "bias");
        if data.is_empty() {
            return;
        }
        let cut = self.scratch.cut;
        let mut kept = x_hat.map(|x_hat| x_hat.chunks_mut(cut.len));
        let chunks = data
            .chunks_mut(cut.len)
            .enumerate()
            .map(|(i, data)| (i, data, kept.as_mut().and_then(Iterator::next)))
            .collect();
        pool::for_each(chunks, |(i, data, x_hat): (usize, &mut [T], _)| {
            let c = cut.channels(i, shape.channels);
            let pass = Normalize {
                statistics: &self.statistics[c.clone()],
                slope: &slope[c.clone()],
                bias: &bias[c],
                from: from.map(|from| &from[cut.values(i, data.len())]),
                data,
                x_hat,
            };
            normalize(pass, shape.positions);
        });
    }

    /// The backward pass of the last forward pass, on the same `bottom` and
    /// `slope`, with the gradient `top` of the loss.
    ///
    /// # Panics
    /// A slice whose length is not what the last reshape says.
    pub fn backward<T: Dtype>(
        &mut self,
        top: &[T],
        bottom: &[T],
        slope: &[T],
        gradients: Gradients<'_, T>,
    ) -> Result<()> {
        let shape = self.shape()?;
        assert_eq!(top.len(), shape.count(), "top gradient");
        assert_eq!(bottom.len(), shape.count(), "bottom");
        let Gradients {
            bottom: diff,
            slope: slope_diff,
            bias: bias_diff,
        } = gradients;
        if let Some(diff) = &diff {
            assert_eq!(diff.len(), shape.count(), "bottom gradient");
        }
        let x = Values::Bottom(bottom);
        self.add_parameter_gradients(shape, top, x, slope_diff, bias_diff, diff.is_some());
        if let Some(diff) = diff {
            self.pass_down(shape, slope, x, Some(top), diff);
        }
        Ok(())
    }

    /// The same in place: `diff` holds the gradient `top` of the loss and,
    /// where `propagate_down` says so, is overwritten by the bottom's. `x_hat`
    /// is that of the forward pass; empty will do where the pass was by moving
    /// statistics and neither slope nor bias want a gradient.
    ///
    /// # Panics
    /// A slice whose length is not what the last reshape says.
    pub fn backward_in_place<T: Dtype>(
        &mut self,
        x_hat: &[T],
        slope: &[T],
        diff: &mut [T],
        propagate_down: bool,
        slope_diff: Option<&mut [T]>,
        bias_diff: Option<&mut [T]>,
    ) -> Result<()> {
        let shape = self.shape()?;
        assert_eq!(diff.len(), shape.count(), "gradient");
        let x = Values::Normalized(x_hat);
        self.add_parameter_gradients(shape, diff, x, slope_diff, bias_diff, propagate_down);
        if propagate_down {
            self.pass_down(shape, slope, x, None, diff);
        }
        Ok(())
    }

    /// Takes the two sums a channel where anything needs them, and adds them
    /// to the gradients of slope and bias.
    fn add_parameter_gradients<T: Dtype>(
        &mut self,
        shape: Shape,
        top: &[T],
        x: Values<'_, T>,
        slope: Option<&mut [T]>,
        bias: Option<&mut [T]>,
        propagate_down: bool,
    ) {
        let (slope, bias) = if self.frozen {
            (None, None)
        } else {
            (slope, bias)
        };
        let needed = slope.is_some() || bias.is_some() || self.by_batch && propagate_down;
        if top.is_empty() || !needed {
            return;
        }
        assert_eq!(x.slice().len(), shape.count(), "x_hat");

        let Scratch { cut, sums } = &mut self.scratch;
        let statistics = &self.statistics;
        let chunks = top
            .chunks(cut.len)
            .zip(sums.chunks_mut(cut.channels))
            .enumerate()
            .collect();
        pool::for_each(chunks, |(i, (top, sums)): (usize, (&[T], &mut [Pair]))| {
            let statistics = &statistics[cut.channels(i, shape.channels)];
            let x = x.part(cut.values(i, top.len()));
            gradient_sums(top, x, statistics, shape.positions, sums);
        });

        let (total, rest) = sums.split_at_mut(shape.channels);
        for set in rest.chunks(shape.channels) {
            for (total, pair) in total.iter_mut().zip(set) {
                add(total, *pair);
            }
        }
        for (diff, which) in [(bias, 0), (slope, 1)] {
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
        assert_eq!(slope.len(), shape.channels, "slope");
        if diff.is_empty() {
            return;
        }
        let Scratch { cut, sums } = &self.scratch;
        let chunks = diff.chunks_mut(cut.len).enumerate().collect();
        pool::for_each(chunks, |(i, diff): (usize, &mut [T])| {
            let c = cut.channels(i, shape.channels);
            let values = cut.values(i, diff.len());
            let from = from.map(|from| &from[values.clone()]);
            let (statistics, slope) = (&self.statistics[c.clone()], &slope[c.clone()]);
            if self.by_batch {
                let pass = PassDown {
                    statistics,
                    slope,
                    sums: &sums[c],
                    share: 1.0 / (shape.samples * shape.positions) as f64,
                    x: x.part(values),
                    from,
                    diff,
                };
                pass_down_by_batch(pass, shape.positions);
            } else {
                let pass = Scale {
                    statistics,
                    slope,
                    from,
                    diff,
                };
                pass_down_by_moving(pass, shape.positions);
            }
        });
    }
}

/// What a backward pass knows of x.
#[derive(Clone, Copy)]
enum Values<'a, T> {
    /// x itself.
    Bottom(&'a [T]),
    /// x_hat.
    Normalized(&'a [T]),
}

impl<'a, T: Dtype> Values<'a, T> {
    #[inline(always)]
    fn slice(self) -> &'a [T] {
        match self {
            Values::Bottom(x) | Values::Normalized(x) => x,
        }
    }

    fn part(self, values: Range<usize>) -> Self {
        match self {
            Values::Bottom(x) => Values::Bottom(&x[values]),
            Values::Normalized(x) => Values::Normalized(&x[values]),
        }
    }

    #[inline(always)]
    fn whitening(self, statistics: Statistics) -> [T; 3] {
        match self {
            Values::Bottom(_) => whitening(statistics),
            Values::Normalized(_) => [T::default(), T::from_f64(1.0), T::default()],
        }
    }
}

/// What [`x_hat`] takes of one channel: mean, inv_std, and what the mean lost
/// when it was rounded to T, in units of x_hat.
#[inline(always)]
fn whitening<T: Dtype>(statistics: Statistics) -> [T; 3] {
    let Statistics { mean, inv_std } = statistics;
    let rounded = T::from_f64(mean);
    let rest = (rounded.into() - mean) * inv_std;
    [rounded, T::from_f64(inv_std), T::from_f64(rest)]
}

/// The one formula of x_hat, so that a layer in place and its twin agree bit
/// by bit. The difference comes first: it is exact where x is near the mean.
#[inline(always)]
fn x_hat<T: Dtype>(x: T, [mean, inv_std, rest]: [T; 3]) -> T {
    (x - mean) * inv_std + rest
}

/// A pass over a chunk that computes value by value, with K coefficients of
/// the value's channel.
trait Pass<T: Dtype, const K: usize> {
    /// Those of a channel, counted from the chunk's first.
    fn coefficients(&self, channel: usize) -> [T; K];

    /// Works on the chunk's `values`; `at` gives the coefficients of each,
    /// counted from the first of them.
    fn run(&mut self, values: Range<usize>, at: impl Fn(usize) -> [T; K]);
}

/// Runs `pass` over the `len` values of a chunk.
#[inline(always)]
fn sweep<T: Dtype, const K: usize>(
    pass: &mut impl Pass<T, K>,
    len: usize,
    channels: usize,
    positions: usize,
) {
    if positions >= SEGMENT {
        for sample in (0..len).step_by(channels * positions) {
            for c in 0..channels {
                let coefficients = pass.coefficients(c);
                let first = sample + c * positions;
                pass.run(first..first + positions, |_| coefficients);
            }
        }
        return;
    }
    let mut tile = [[T::default(); TILE]; K];
    for Columns { channels: c, range } in tiles(channels, positions) {
        spread(&mut tile, positions, c.map(|c| pass.coefficients(c)));
        let tile = tile.each_ref().map(|row| &row[..range.len()]);
        for sample in (0..len).step_by(channels * positions) {
            let first = sample + range.start;
            pass.run(first..first + range.len(), |i| tile.map(|row| row[i]));
        }
    }
}

/// Neighbouring channels of a row, and their values in it.
struct Columns {
    channels: Range<usize>,
    range: Range<usize>,
}

/// Cuts a row into parts of at most [`TILE`] values.
fn tiles(channels: usize, positions: usize) -> impl Iterator<Item = Columns> {
    let width = TILE / positions;
    (0..channels).step_by(width).map(move |first| {
        let end = channels.min(first + width);
        Columns {
            channels: first..end,
            range: first * positions..end * positions,
        }
    })
}

/// Gives each of a channel's `positions` columns the channel's coefficients.
#[inline(always)]
fn spread<T: Dtype, const K: usize>(
    tile: &mut [[T; TILE]; K],
    positions: usize,
    channels: impl Iterator<Item = [T; K]>,
) {
    for (coefficients, first) in channels.zip((0..TILE).step_by(positions)) {
        for column in first..TILE.min(first + positions) {
            for (row, value) in tile.iter_mut().zip(coefficients) {
                row[column] = value;
            }
        }
    }
}

/// `out = f(i, from)`, or `out = f(i, out)` without `from`.
#[inline(always)]
fn update<T: Dtype>(out: &mut [T], from: Option<&[T]>, f: impl Fn(usize, T) -> T) {
    match from {
        Some(from) => {
            for (i, (out, &from)) in out.iter_mut().zip(from).enumerate() {
                *out = f(i, from);
            }
        }
        None => {
            for (i, out) in out.iter_mut().enumerate() {
                *out = f(i, *out);
            }
        }
    }
}

/// y from x, and x_hat where it is kept: then x is y's old value.
struct Normalize<'a, T> {
    statistics: &'a [Statistics],
    slope: &'a [T],
    bias: &'a [T],
    from: Option<&'a [T]>,
    data: &'a mut [T],
    x_hat: Option<&'a mut [T]>,
}

fn normalize<T: Dtype>(pass: Normalize<'_, T>, positions: usize) {
    with_avx2!(normalize_body<T>(pass: Normalize<'_, T>, positions: usize))
}

#[inline(always)]
fn normalize_body<T: Dtype>(mut pass: Normalize<'_, T>, positions: usize) {
    let (len, channels) = (pass.data.len(), pass.slope.len());
    sweep(&mut pass, len, channels, positions);
}

impl<T: Dtype> Pass<T, 5> for Normalize<'_, T> {
    #[inline(always)]
    fn coefficients(&self, channel: usize) -> [T; 5] {
        let [mean, inv_std, rest] = whitening(self.statistics[channel]);
        [mean, inv_std, rest, self.slope[channel], self.bias[channel]]
    }

    #[inline(always)]
    fn run(&mut self, values: Range<usize>, at: impl Fn(usize) -> [T; 5]) {
        let data = &mut self.data[values.clone()];
        if let Some(kept) = &mut self.x_hat {
            let kept = &mut kept[values];
            for (i, (data, kept)) in data.iter_mut().zip(kept).enumerate() {
                let [mean, inv_std, rest, slope, bias] = at(i);
                *kept = x_hat(*data, [mean, inv_std, rest]);
                *data = *kept * slope + bias;
            }
            return;
        }
        update(data, self.from.map(|from| &from[values]), |i, x| {
            let [mean, inv_std, rest, slope, bias] = at(i);
            x_hat(x, [mean, inv_std, rest]) * slope + bias
        });
    }
}

/// dx where the statistics are the batch's.
struct PassDown<'a, T> {
    statistics: &'a [Statistics],
    slope: &'a [T],
    sums: &'a [Pair],
    /// 1 / m.
    share: f64,
    x: Values<'a, T>,
    from: Option<&'a [T]>,
    diff: &'a mut [T],
}

fn pass_down_by_batch<T: Dtype>(pass: PassDown<'_, T>, positions: usize) {
    with_avx2!(pass_down_by_batch_body<T>(pass: PassDown<'_, T>, positions: usize))
}

#[inline(always)]
fn pass_down_by_batch_body<T: Dtype>(mut pass: PassDown<'_, T>, positions: usize) {
    let (len, channels) = (pass.diff.len(), pass.slope.len());
    sweep(&mut pass, len, channels, positions);
}

impl<T: Dtype> Pass<T, 6> for PassDown<'_, T> {
    #[inline(always)]
    fn coefficients(&self, channel: usize) -> [T; 6] {
        let statistics = self.statistics[channel];
        let [mean, inv_std, rest] = self.x.whitening(statistics);
        let [g, g_x_hat] = self.sums[channel].map(|sum| T::from_f64(sum * self.share));
        let factor = T::from_f64(self.slope[channel].into() * statistics.inv_std);
        [mean, inv_std, rest, factor, g, g_x_hat]
    }

    #[inline(always)]
    fn run(&mut self, values: Range<usize>, at: impl Fn(usize) -> [T; 6]) {
        let x = &self.x.slice()[values.clone()];
        let from = self.from.map(|from| &from[values.clone()]);
        update(&mut self.diff[values], from, |i, top| {
            let [mean, inv_std, rest, factor, g, g_x_hat] = at(i);
            let x_hat = x_hat(x[i], [mean, inv_std, rest]);
            factor * ((top - g) - x_hat * g_x_hat)
        });
    }
}

/// dx where the statistics are the moving ones.
struct Scale<'a, T> {
    statistics: &'a [Statistics],
    slope: &'a [T],
    from: Option<&'a [T]>,
    diff: &'a mut [T],
}

fn pass_down_by_moving<T: Dtype>(pass: Scale<'_, T>, positions: usize) {
    with_avx2!(pass_down_by_moving_body<T>(pass: Scale<'_, T>, positions: usize))
}

#[inline(always)]
fn pass_down_by_moving_body<T: Dtype>(mut pass: Scale<'_, T>, positions: usize) {
    let (len, channels) = (pass.diff.len(), pass.slope.len());
    sweep(&mut pass, len, channels, positions);
}

impl<T: Dtype> Pass<T, 1> for Scale<'_, T> {
    #[inline(always)]
    fn coefficients(&self, channel: usize) -> [T; 1] {
        let inv_std = self.statistics[channel].inv_std;
        [T::from_f64(self.slope[channel].into() * inv_std)]
    }

    #[inline(always)]
    fn run(&mut self, values: Range<usize>, at: impl Fn(usize) -> [T; 1]) {
        let from = self.from.map(|from| &from[values.clone()]);
        update(&mut self.diff[values], from, |i, top| {
            let [factor] = at(i);
            top * factor
        });
    }
}

/// Mean and M2 of each channel of a chunk.
fn moments<T: Dtype>(x: &[T], positions: usize, sums: &mut [Pair]) {
    with_avx2!(moments_body<T>(x: &[T], positions: usize, sums: &mut [Pair]))
}

#[inline(always)]
fn moments_body<T: Dtype>(x: &[T], positions: usize, sums: &mut [Pair]) {
    let row = sums.len() * positions;
    if positions >= SEGMENT {
        let mut before = 0.0;
        for sample in x.chunks_exact(row) {
            for first in (0..positions).step_by(BLOCK) {
                let count = BLOCK.min(positions - first);
                let join = Join::new(before, count as f64);
                for (segment, sum) in sample.chunks_exact(positions).zip(&mut *sums) {
                    join.merge(sum, block_moments(&segment[first..first + count]));
                }
                before += count as f64;
            }
        }
        return;
    }
    for Columns { channels, range } in tiles(sums.len(), positions) {
        let samples = (COLUMN_BLOCK / range.len()).max(1);
        let mut before = 0.0;
        for block in x.chunks(samples * row) {
            let here = (block.len() / row) as f64;
            let rows = block.chunks_exact(row).map(|sample| &sample[range.clone()]);
            let [means, m2s] = column_moments(rows, here);
            for position in 0..positions {
                let join = Join::new(before, here);
                let means = means[position..].iter().step_by(positions);
                let m2s = m2s[position..].iter().step_by(positions);
                for (sum, (&mean, &m2)) in sums[channels.clone()].iter_mut().zip(means.zip(m2s)) {
                    join.merge(sum, [mean, m2]);
                }
                before += here;
            }
        }
    }
}

/// Mean and M2 of a block, which is not empty.
#[inline(always)]
fn block_moments<T: Dtype>(x: &[T]) -> Pair {
    // Differences from a value of the block: where the mean is far from zero
    // their sum is small and keeps its digits.
    let pivot: f64 = x[0].into();
    let sum = lane_sum(x, x, |v, _| wide(v).map(|v| v - pivot));
    let mean = pivot + sum / x.len() as f64;
    let m2 = lane_sum(x, x, |v, _| wide(v).map(|v| (v - mean) * (v - mean)));
    [mean, m2]
}

/// Means and M2 of the columns of `count` rows, at least one.
#[inline(always)]
fn column_moments<'a, T: Dtype>(
    mut rows: impl Iterator<Item = &'a [T]> + Clone,
    count: f64,
) -> [[f64; TILE]; 2] {
    let [mut means, mut sums, mut m2s] = [[0.0; TILE]; 3];
    let all = rows.clone();
    for (mean, &pivot) in means.iter_mut().zip(rows.next().into_iter().flatten()) {
        *mean = pivot.into();
    }
    for row in rows {
        for ((sum, &pivot), &v) in sums.iter_mut().zip(&means).zip(row) {
            *sum += v.into() - pivot;
        }
    }
    for (mean, sum) in means.iter_mut().zip(sums) {
        *mean += sum / count;
    }
    for row in all {
        for ((m2, &mean), &v) in m2s.iter_mut().zip(&means).zip(row) {
            let distance = v.into() - mean;
            *m2 += distance * distance;
        }
    }
    [means, m2s]
}

/// How the moments of some values join those of others.
#[derive(Clone, Copy)]
struct Join {
    first: bool,
    /// The joined values' share of all.
    share: f64,
    /// What the squared distance of the means weighs in M2.
    weight: f64,
}

impl Join {
    /// For `count` values that join `before` others.
    #[inline(always)]
    fn new(before: f64, count: f64) -> Self {
        let share = count / (before + count);
        Join {
            first: before == 0.0,
            share,
            weight: before * share,
        }
    }

    #[inline(always)]
    fn merge(self, [mean, m2]: &mut Pair, more: Pair) {
        if self.first {
            [*mean, *m2] = more;
            return;
        }
        let distance = more[0] - *mean;
        *mean += distance * self.share;
        *m2 += more[1] + distance * distance * self.weight;
    }
}

/// Sum g and sum g x_hat of each channel of a chunk.
fn gradient_sums<T: Dtype>(
    top: &[T],
    x: Values<'_, T>,
    statistics: &[Statistics],
    positions: usize,
    sums: &mut [Pair],
) {
    with_avx2!(gradient_sums_body<T>(
        top: &[T],
        x: Values<'_, T>,
        statistics: &[Statistics],
        positions: usize,
        sums: &mut [Pair]
    ))
}

#[inline(always)]
fn gradient_sums_body<T: Dtype>(
    top: &[T],
    x: Values<'_, T>,
    statistics: &[Statistics],
    positions: usize,
    sums: &mut [Pair],
) {
    let row = sums.len() * positions;
    let samples = || top.chunks_exact(row).zip(x.slice().chunks_exact(row));
    sums.fill(Pair::default());
    if positions >= SEGMENT {
        for (top, values) in samples() {
            let segments = top
                .chunks_exact(positions)
                .zip(values.chunks_exact(positions));
            for ((sum, &statistics), (top, values)) in sums.iter_mut().zip(statistics).zip(segments)
            {
                let whitening = x.whitening(statistics);
                for (top, values) in top.chunks(BLOCK).zip(values.chunks(BLOCK)) {
                    add(sum, block_sums(top, values, whitening));
                }
            }
        }
        return;
    }
    let mut tile = [[T::default(); TILE]; 3];
    for Columns { channels, range } in tiles(sums.len(), positions) {
        let of_channels = statistics[channels.clone()].iter();
        spread(&mut tile, positions, of_channels.map(|&s| x.whitening(s)));
        let [mean, inv_std, rest] = tile.each_ref().map(|row| &row[..range.len()]);
        let mut columns = [[0.0; TILE]; 2];
        let [gs, g_x_hats] = columns.each_mut().map(|row| &mut row[..range.len()]);
        for (top, values) in samples() {
            let (top, values) = (&top[range.clone()], &values[range.clone()]);
            for i in 0..range.len() {
                let x_hat = x_hat(values[i], [mean[i], inv_std[i], rest[i]]);
                gs[i] += top[i].into();
                g_x_hats[i] += top[i].into() * x_hat.into();
            }
        }
        let columns = gs
            .chunks_exact(positions)
            .zip(g_x_hats.chunks_exact(positions));
        for (sum, (gs, g_x_hats)) in sums[channels].iter_mut().zip(columns) {
            *sum = [gs.iter().sum(), g_x_hats.iter().sum()];
        }
    }
}

/// Sum g and sum g x_hat of a block.
#[inline(always)]
fn block_sums<T: Dtype>(top: &[T], values: &[T], whitening: [T; 3]) -> Pair {
    let g = lane_sum(top, top, |g, _| wide(g));
    let g_x_hat = lane_sum(top, values, |g, x| {
        let (g, x_hat) = (wide(g), wide(&x.map(|x| x_hat(x, whitening))));
        array::from_fn(|i| g[i] * x_hat[i])
    });
    [g, g_x_hat]
}

#[inline(always)]
fn add(sum: &mut Pair, more: Pair) {
    sum[0] += more[0];
    sum[1] += more[1];
}

/// The sum of what `term` makes of the values of two slices, side by side.
///
/// One sum, and arrays of all lanes: the compiler turns those into vectors.
/// Two sums at a time it would pair lane by lane instead.
#[inline(always)]
fn lane_sum<T: Dtype>(
    a: &[T],
    b: &[T],
    term: impl Fn(&[T; LANES], &[T; LANES]) -> [f64; LANES],
) -> f64 {
    let mut sums = [0.0; LANES];
    let mut add = |terms: [f64; LANES]| {
        for (sum, term) in sums.iter_mut().zip(terms) {
            *sum += term;
        }
    };
    let (a_chunks, a_rest) = a.as_chunks();
    let (b_chunks, _) = b.as_chunks();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        add(term(a, b));
    }
    if !a_rest.is_empty() {
        let old = LANES - a_rest.len();
        let terms = term(&last_lanes(a), &last_lanes(b));
        add(array::from_fn(|i| if i < old { 0.0 } else { terms[i] }));
    }
    let fold = |i: usize| (sums[i] + sums[i + 4]) + (sums[i + 8] + sums[i + 12]);
    let [a, b, c, d] = array::from_fn(fold);
    (a + c) + (b + d)
}

#[inline(always)]
fn wide<T: Dtype>(values: &[T; LANES]) -> [f64; LANES] {
    values.map(Into::into)
}

/// The last of `values`, in front of them zeros where there are too few.
#[inline(always)]
fn last_lanes<T: Dtype>(values: &[T]) -> [T; LANES] {
    values.last_chunk().copied().unwrap_or_else(|| {
        let mut all = [T::default(); LANES];
        all[LANES - values.len()..].copy_from_slice(values);
        all
    })
}
