//! How the kernels go over a bottom.

use super::Shape;
use crate::cuda::layout::batch_norm::{CHANNEL, LOAD, PARTIAL, THREADS, WARP};
use crate::dtype::{Dtype, int};
use crate::error::Result;

/// Rows of a block that reduces columns.
const ROWS: usize = THREADS as usize / WARP;
/// Positions from which on a block reduces segments of a channel; below, a
/// warp would read more than it uses.
const SEGMENT: usize = WARP;
/// Blocks that fill any GPU. Fixed, so that sums do not depend on the device.
const BLOCKS: usize = 1024;
/// Values that a thread should have, lest the parts cost more than they bring.
const VALUES: usize = 8;

/// The kernels' `Shape`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct KernelShape {
    pub(super) samples: i32,
    pub(super) channels: i32,
    pub(super) positions: i32,
    pub(super) parts: i32,
}

/// How the kernels go over a bottom.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) shape: KernelShape,
    /// Columns of a channel that the first stage leaves to the join.
    pub(super) width: i32,
    pub(super) reduce: (u32, u32),
    pub(super) join: (u32, u32),
    pub(super) all: (u32, u32),
    pub(super) by_segment: bool,
    pub(super) vectors: bool,
}

impl Plan {
    pub(super) fn new<T: Dtype>(shape: Shape) -> Result<Self> {
        let cut = Reduction::new(shape);
        let lanes = LOAD / size_of::<T>();
        let blocks = shape.count().div_ceil(THREADS as usize * lanes);
        Ok(Plan {
            shape: KernelShape {
                samples: int(shape.samples)?,
                channels: int(shape.channels)?,
                positions: int(shape.positions)?,
                parts: int(cut.parts)?,
            },
            width: int(cut.width)?,
            reduce: (cut.blocks as u32, cut.parts as u32),
            join: (shape.channels.div_ceil(ROWS) as u32, 1),
            all: (blocks as u32, 1),
            by_segment: cut.by_segment,
            vectors: shape.positions.is_multiple_of(lanes),
        })
    }
}

/// The first stage of a reduction: `parts` times `blocks` blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reduction {
    pub(super) by_segment: bool,
    pub(super) blocks: usize,
    pub(super) parts: usize,
    pub(super) width: usize,
}

impl Reduction {
    pub(super) fn new(shape: Shape) -> Self {
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
        Reduction {
            by_segment,
            blocks,
            parts: (BLOCKS / blocks.max(1)).min(values / VALUES).max(1),
            width,
        }
    }
}

/// Bytes of the statistics and of the partial sums of a pass.
pub(super) fn scratch_bytes(shape: Shape) -> usize {
    let Reduction { parts, width, .. } = Reduction::new(shape);
    let channel = CHANNEL * size_of::<f64>();
    shape.channels * (channel + parts * width * PARTIAL)
}
