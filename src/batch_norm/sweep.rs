//! How loops run over the values of a chunk.
//!
//! A channel's S values of one sample lie together. Loops run along such
//! segments where they are long, else along the sample's row of several
//! channels, value by value with its own coefficients.

use std::ops::Range;

use crate::dtype::Dtype;

/// Positions from which on loops run along segments, not rows.
pub(super) const SEGMENT: usize = 16;
/// Values of a row that are worked on together, where loops run along rows.
pub(super) const TILE: usize = 256;

/// A pass over a chunk that computes value by value, with K coefficients of
/// the value's channel.
pub(super) trait Pass<T: Dtype, const K: usize> {
    /// Those of a channel, counted from the chunk's first.
    fn coefficients(&self, channel: usize) -> [T; K];

    /// Works on the chunk's `values`; `at` gives the coefficients of each,
    /// counted from the first of them.
    fn run(&mut self, values: Range<usize>, at: impl Fn(usize) -> [T; K]);
}

/// Runs `pass` over the `len` values of a chunk.
#[inline(always)]
pub(super) fn sweep<T: Dtype, const K: usize>(
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
pub(super) struct Columns {
    pub(super) channels: Range<usize>,
    pub(super) range: Range<usize>,
}

/// Cuts a row into parts of at most [`TILE`] values.
pub(super) fn tiles(channels: usize, positions: usize) -> impl Iterator<Item = Columns> {
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
pub(super) fn spread<T: Dtype, const K: usize>(
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
pub(super) fn update<T: Dtype>(out: &mut [T], from: Option<&[T]>, f: impl Fn(usize, T) -> T) {
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
