//! The sums over each channel of a chunk.
//!
//! Sums are f64 sums. A block's mean and M2 (the sum of squared distances from
//! the mean) take two passes over it in the L1 cache, and blocks merge by the
//! formula of Chan, Golub and LeVeque (1979): a mean far from zero costs no
//! digits, and f32 values of any size do not overflow.

use std::array;

use super::Statistics;
use super::sweep::{Columns, SEGMENT, TILE, spread, tiles};
use super::x_hat::{Values, x_hat};
use crate::dtype::Dtype;
use crate::simd::{lane_sum, wide, with_avx2};

/// Values of a block: they stay in the L1 cache from one pass to the next.
const BLOCK: usize = 4096;
/// The same where loops run along rows; here they stay in the L2 cache.
const COLUMN_BLOCK: usize = 16 * 1024;

/// Of one channel, the sums of a chunk: mean and M2, or sum g and sum g x_hat.
pub(super) type Pair = [f64; 2];

/// Mean and M2 of each channel of a chunk.
pub(super) fn moments<T: Dtype>(x: &[T], positions: usize, sums: &mut [Pair]) {
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
pub(super) struct Join {
    first: bool,
    /// The joined values' share of all.
    share: f64,
    /// What the squared distance of the means weighs in M2.
    weight: f64,
}

impl Join {
    /// For `count` values that join `before` others.
    #[inline(always)]
    pub(super) fn new(before: f64, count: f64) -> Self {
        let share = count / (before + count);
        Join {
            first: before == 0.0,
            share,
            weight: before * share,
        }
    }

    #[inline(always)]
    pub(super) fn merge(self, [mean, m2]: &mut Pair, more: Pair) {
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
pub(super) fn gradient_sums<T: Dtype>(
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
pub(super) fn add(sum: &mut Pair, more: Pair) {
    sum[0] += more[0];
    sum[1] += more[1];
}
