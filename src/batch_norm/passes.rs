//! The passes that read and write a value each.

use std::ops::Range;

use super::Statistics;
use super::sums::Pair;
use super::sweep::{Pass, sweep, update};
use super::x_hat::{Values, whitening, x_hat};
use crate::dtype::Dtype;
use crate::simd::with_avx2;

/// y from x, and x_hat where it is kept: then x is y's old value.
pub(super) struct Normalize<'a, T> {
    pub(super) statistics: &'a [Statistics],
    pub(super) slope: &'a [T],
    pub(super) bias: &'a [T],
    pub(super) from: Option<&'a [T]>,
    pub(super) data: &'a mut [T],
    pub(super) x_hat: Option<&'a mut [T]>,
}

pub(super) fn normalize<T: Dtype>(pass: Normalize<'_, T>, positions: usize) {
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
pub(super) struct PassDownByBatch<'a, T> {
    pub(super) statistics: &'a [Statistics],
    pub(super) slope: &'a [T],
    pub(super) sums: &'a [Pair],
    /// 1 / m.
    pub(super) share: f64,
    pub(super) x: Values<'a, T>,
    pub(super) from: Option<&'a [T]>,
    pub(super) diff: &'a mut [T],
}

pub(super) fn pass_down_by_batch<T: Dtype>(pass: PassDownByBatch<'_, T>, positions: usize) {
    with_avx2!(pass_down_by_batch_body<T>(pass: PassDownByBatch<'_, T>, positions: usize))
}

#[inline(always)]
fn pass_down_by_batch_body<T: Dtype>(mut pass: PassDownByBatch<'_, T>, positions: usize) {
    let (len, channels) = (pass.diff.len(), pass.slope.len());
    sweep(&mut pass, len, channels, positions);
}

impl<T: Dtype> Pass<T, 6> for PassDownByBatch<'_, T> {
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
pub(super) struct PassDownByMoving<'a, T> {
    pub(super) statistics: &'a [Statistics],
    pub(super) slope: &'a [T],
    pub(super) from: Option<&'a [T]>,
    pub(super) diff: &'a mut [T],
}

pub(super) fn pass_down_by_moving<T: Dtype>(pass: PassDownByMoving<'_, T>, positions: usize) {
    with_avx2!(pass_down_by_moving_body<T>(pass: PassDownByMoving<'_, T>, positions: usize))
}

#[inline(always)]
fn pass_down_by_moving_body<T: Dtype>(mut pass: PassDownByMoving<'_, T>, positions: usize) {
    let (len, channels) = (pass.diff.len(), pass.slope.len());
    sweep(&mut pass, len, channels, positions);
}

impl<T: Dtype> Pass<T, 1> for PassDownByMoving<'_, T> {
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
