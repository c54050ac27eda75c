//! How the kernels go over a bottom.

use super::Shape;
use crate::cuda::layout::batch_norm::{
    COLUMN_ROUND, LOAD, MEANS, PAIR, PASS, SEGMENT_ROUND, STATISTICS, THREADS, WARP,
};
use crate::dtype::{Dtype, int};
use crate::error::Result;

/// Channels that a block joins, a warp each.
const JOINED: usize = THREADS as usize / WARP;
/// Positions from which on a block reduces segments of a channel; below, a
/// warp would read more than it uses.
const SEGMENT: usize = WARP;
/// Blocks that fill any GPU. Fixed, so that sums do not depend on the device.
const BLOCKS: usize = 1024;

/// The kernels' `Divisor`: `n / divisor` is the upper half of `n * magic`,
/// shifted.
///
/// With `2^(b-1) < divisor <= 2^b`, the magic number is `2^(31+b) / divisor`
/// rounded up, that is, too large by less than 1: the quotient is too large by
/// less than `n / 2^(31+b)`, which is below `1 / divisor` for every n below
/// 2^31 and so never reaches the next integer.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Divisor {
    divisor: u32,
    magic: u32,
    shift: u32,
}

impl Divisor {
    /// Of a number from 1 to `i32::MAX`; the kernels divide by 1 themselves.
    fn new(divisor: usize) -> Self {
        let bits = divisor.next_power_of_two().trailing_zeros();
        let magic = (1u64 << (31 + bits)).div_ceil(divisor as u64);
        Divisor {
            divisor: divisor as u32,
            magic: magic as u32,
            shift: bits.saturating_sub(1),
        }
    }
}

/// The kernels' `Shape`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct KernelShape {
    samples: i32,
    pub(super) channels: i32,
    positions: i32,
    width: i32,
    parts: i32,
    part: i32,
    last: i32,
    by_length: Divisor,
    by_channels: Divisor,
}

/// How the kernels go over a bottom.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) shape: KernelShape,
    pub(super) reduce: (u32, u32),
    pub(super) join: (u32, u32),
    pub(super) all: (u32, u32),
    pub(super) by_segment: bool,
    pub(super) vectors: bool,
}

impl Plan {
    /// For blobs of `T`, of which each is `aligned` to [`LOAD`] bytes or some
    /// are not; `shape` has values.
    pub(super) fn new<T: Dtype>(shape: Shape, aligned: bool) -> Result<Self> {
        let cut = Reduction::new(shape);
        let lanes = LOAD / size_of::<T>();
        let vectors = aligned && shape.positions.is_multiple_of(lanes);
        let length = shape.positions / if vectors { lanes } else { 1 };
        let values = THREADS as usize * PASS / size_of::<T>();
        Ok(Plan {
            shape: KernelShape {
                samples: int(shape.samples)?,
                channels: int(shape.channels)?,
                positions: int(shape.positions)?,
                width: int(cut.width)?,
                parts: int(cut.parts)?,
                part: int(cut.part)?,
                last: int(cut.last)?,
                by_length: Divisor::new(length),
                by_channels: Divisor::new(shape.channels),
            },
            reduce: (cut.blocks as u32, cut.parts as u32),
            join: (shape.channels.div_ceil(JOINED) as u32, 1),
            all: (shape.count().div_ceil(values) as u32, 1),
            by_segment: cut.by_segment,
            vectors,
        })
    }
}

/// The first stage of a reduction: `parts` times `blocks` blocks. A block has
/// `part` values of a channel, or of each of its columns; `last` in the last
/// part.
#[derive(Debug, Clone, Copy)]
struct Reduction {
    by_segment: bool,
    blocks: usize,
    parts: usize,
    part: usize,
    last: usize,
    /// Columns of a channel that the first stage leaves to the join.
    width: usize,
}

impl Reduction {
    fn new(shape: Shape) -> Self {
        let by_segment = shape.positions >= SEGMENT;
        let columns = shape.channels * shape.positions;
        let (blocks, width, all, round) = if by_segment {
            let all = shape.samples * shape.positions;
            (shape.channels, 1, all, SEGMENT_ROUND)
        } else {
            let blocks = columns.div_ceil(WARP);
            (blocks, shape.positions, shape.samples, COLUMN_ROUND)
        };
        // Whole rounds a part, and no part that costs more than it brings.
        let wanted = (BLOCKS / blocks.max(1)).max(1);
        let part = (all + wanted * round / 2) / (wanted * round);
        let part = part.max(1) * round;
        let parts = all.div_ceil(part).max(1);
        Reduction {
            by_segment,
            blocks,
            parts,
            part,
            last: all - (parts - 1) * part,
            width,
        }
    }
}

/// Bytes of the statistics and of the partial sums of a pass.
pub(super) fn scratch_bytes(shape: Shape) -> usize {
    let Reduction { parts, width, .. } = Reduction::new(shape);
    partials(shape) + shape.channels * parts * width * PAIR
}

/// Where in the scratch memory the channels' means lie.
pub(super) fn means(shape: Shape) -> usize {
    shape.channels * STATISTICS * size_of::<f64>()
}

/// Where the partial sums do.
pub(super) fn partials(shape: Shape) -> usize {
    means(shape) + shape.channels * MEANS * size_of::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernels' `Divide`.
    fn divide(n: u32, by: Divisor) -> u32 {
        if by.divisor == 1 {
            return n;
        }
        ((u64::from(n) * u64::from(by.magic)) >> 32) as u32 >> by.shift
    }

    #[test]
    fn magic_numbers_divide() {
        let most = i32::MAX as u32;
        let powers = (0..31).map(|b| 1u32 << b);
        let around = powers.flat_map(|p| [p.saturating_sub(1), p, p + 1]);
        let divisors = (1..300).chain(around).chain([most - 1, most]);
        for d in divisors.filter(|&d| d > 0 && d <= most) {
            let by = Divisor::new(d as usize);
            let multiples = [1, 2, 3, most / d / 2, most / d];
            let dividends = multiples.into_iter().flat_map(|q| {
                let n = d.saturating_mul(q).min(most);
                [n.saturating_sub(1), n, n + 1]
            });
            for n in dividends.chain([0, 1, most]).filter(|&n| n <= most) {
                assert_eq!(divide(n, by), n / d, "{n} / {d}");
            }
        }
    }

    #[test]
    fn parts_are_all_of_a_channel() {
        for samples in [1, 2, 31, 64, 65, 128, 1000, 100_000] {
            for channels in [1, 3, 64, 1000, 5000] {
                for positions in [1, 2, 31, 32, 49, 784, 3000] {
                    let shape = Shape {
                        samples,
                        channels,
                        positions,
                    };
                    let cut = Reduction::new(shape);
                    let all = samples * if cut.by_segment { positions } else { 1 };
                    assert_eq!((cut.parts - 1) * cut.part + cut.last, all, "{shape:?}");
                    assert!((1..=cut.part).contains(&cut.last), "{shape:?}");
                    assert!(cut.parts <= 2 * BLOCKS, "{shape:?}");
                }
            }
        }
    }
}
