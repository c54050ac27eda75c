//! The cut of a bottom into chunks, for threads to share.
//!
//! Chunks are whole samples or, where those are few, some channels of one
//! sample: contiguous, disjoint memory, so the threads share it without unsafe
//! code. The cut depends on the shape alone and chunks are merged in order:
//! results do not depend on the number of threads.

use std::ops::Range;

use super::Shape;
use super::sums::Pair;

/// Values that are worth a thread's while: some 30 microseconds of work, where
/// waking a thread takes ten, and far more on a busy machine.
const CHUNK: usize = 128 * 1024;
/// More chunks than this would only add to the merge.
const MAX_CHUNKS: usize = 64;

/// The cut into chunks, and the chunks' sums.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) cut: Cut,
    /// (chunks, C), or (N, C) where a chunk is a part of a sample.
    pub(super) sums: Vec<Pair>,
}

/// Chunks of `samples` whole samples; or of one sample's `channels` channels.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Cut {
    pub(super) samples: usize,
    pub(super) channels: usize,
    /// Values of a chunk; the last may have fewer.
    pub(super) len: usize,
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
    pub(super) fn of_channels(self, chunk: usize, all: usize) -> Range<usize> {
        let first = chunk * self.channels % all;
        first..first + self.channels
    }

    /// Where chunk number `chunk`, `len` long, lies in the blob.
    pub(super) fn values(self, chunk: usize, len: usize) -> Range<usize> {
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
