//! Forward and backward on device memory: the launches.
//!
//! Forward: InnerProduct's product on Caffe's cuBLAS handle and one kernel of
//! `kernels.cu`, which also sorts the samples by class; backward: InnerProduct's
//! products and one kernel behind them. Nothing waits for the device and
//! nothing is allocated; what one pass leaves to the other lies in device memory
//! that Caffe keeps ([`LargeMarginInnerProduct::device_bytes`]).

use super::{LargeMarginInnerProduct, Sizes};
use crate::blas::{DeviceGemm, Op};
use crate::cuda::layout::large_margin::{
    COEFFICIENTS, CUT, LOAD, LOADS, PLACES, TEAM, THREADS, TILE, WARP, WAYS,
};
use crate::cuda::{self, DeviceDtype, Kernel, Kernels, Mailbox, kernel_args};
use crate::dtype::int;
use crate::error::Result;
use crate::last::Last;

/// The kernels, compiled by build.rs for the architectures of Caffe's build.
static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/large_margin.fatbin"));

/// The kernels of the layer's device, and where they report bad labels.
#[derive(Debug)]
pub(super) struct State {
    forward: Kernel,
    merge: Kernel,
    backward: Kernel,
    bad_label: Mailbox,
    /// Whether the last forward pass had labels.
    labels: bool,
}

impl State {
    fn new<T: DeviceDtype>() -> Result<Self> {
        let kernels = Kernels::load(IMAGE)?;
        Ok(State {
            forward: kernels.get::<T>("large_margin_forward")?,
            merge: kernels.get::<T>("large_margin_merge")?,
            backward: kernels.get::<T>("large_margin_backward")?,
            bad_label: kernels.mailbox()?,
            labels: false,
        })
    }
}

/// The blobs of a forward pass, in device memory.
#[derive(Debug, Clone, Copy)]
pub struct Forward<T> {
    /// X, (M, K).
    pub features: *const T,
    /// (M). Null: no sample has a margin.
    pub labels: *const T,
    /// W, (N, K).
    pub weights: *const T,
    /// (M, N); overwritten.
    pub logits: *mut T,
    /// (M, N); overwritten by the logits without the margin. Null: not wanted.
    pub plain: *mut T,
    /// [`LargeMarginInnerProduct::device_bytes`] bytes, 16 byte aligned.
    pub scratch: *mut u8,
}

/// The blobs of a backward pass, in device memory.
#[derive(Debug, Clone, Copy)]
pub struct Backward<T> {
    /// (M, N), the gradient of the loss by the logits.
    pub logits_diff: *const T,
    /// (M, N), that by the logits without the margin. Null: there is none.
    pub plain_diff: *const T,
    /// X, (M, K), of the forward pass.
    pub features: *const T,
    /// W, (N, K), of the forward pass.
    pub weights: *const T,
    /// (M, K); overwritten. Null: not wanted.
    pub features_diff: *mut T,
    /// (N, K); added to. Null: not wanted.
    pub weights_diff: *mut T,
    /// What the forward pass got.
    pub scratch: *mut u8,
}

/// The kernels' `Labels`.
#[repr(C)]
struct Labels {
    classes: i32,
    has_ignore_label: i32,
    ignore_label: i32,
}

/// The kernels' `Team`: how many threads read a row of K values, and how many
/// rows a warp has.
#[repr(C)]
#[derive(Debug, PartialEq)]
struct Team {
    lanes: i32,
    rows: i32,
}
const _: () = assert!(size_of::<Team>() == TEAM);

/// Warps that keep a GPU's memory busy, with a batch of loads of two rows under
/// way in each thread: 4 KiB a warp. An H100 brings 3.35 TB/s some 0.7 us after
/// they are asked for, so 18 KiB have to be under way in each of its 132
/// multiprocessors: 600 warps. More samples than that are better left to one
/// warp, which computes the scalars of 32 in the time of one, and waits for no
/// other at a barrier.
const WARPS: usize = 1024;

impl Team {
    /// For `samples` rows of `features` values of `size` bytes.
    fn new(samples: usize, features: usize, size: usize) -> Self {
        let bytes = features * size;
        let load = if bytes.is_multiple_of(LOAD) {
            LOAD
        } else {
            size
        };
        let wanted = bytes.div_ceil(LOADS * load).next_power_of_two();
        let (lanes, rows) = if wanted > WARP && samples < WARPS {
            (THREADS as usize, 1)
        } else {
            let lanes = wanted.min(WARP);
            let rows = 1 << (samples / WARPS).max(1).ilog2();
            (lanes, rows.clamp(WARP / lanes, WARP))
        };
        Team {
            lanes: lanes as i32,
            rows: rows as i32,
        }
    }

    /// Blocks that have all rows.
    fn blocks(&self, samples: usize) -> u32 {
        let of_a_block = match self.lanes as usize {
            lanes if lanes > WARP => 1,
            _ => THREADS as usize / WARP * self.rows as usize,
        };
        samples.div_ceil(of_a_block) as u32
    }
}

/// The kernels' `Cut`: how the rows of dW are shared out.
#[repr(C)]
#[derive(Debug, PartialEq)]
struct Cut {
    places: i32,
    lanes: i32,
    columns: i32,
    wide: i32,
}
const _: () = assert!(size_of::<Cut>() == CUT);

impl Cut {
    /// Sorted samples of a chunk: those that a thread reads at once, for many
    /// blocks with little to do one after the other, and more where there are
    /// blocks enough, for less sums of classes that chunks share. As the memory
    /// for these, it does not depend on how rows are read.
    fn places(sizes: Sizes) -> usize {
        let values = sizes.samples * sizes.features;
        (values >> 17).clamp(LOADS, 32).next_power_of_two()
    }

    fn chunks(sizes: Sizes) -> usize {
        sizes.samples.div_ceil(Self::places(sizes))
    }

    /// For rows of values of `size` bytes, which can be read by wide loads or
    /// by single values.
    fn new(sizes: Sizes, size: usize, wide: bool) -> Self {
        let places = Self::places(sizes);
        let loads = sizes.features / if wide { LOAD / size } else { 1 };
        // A block has no more chunks than PLACES allows.
        let least = (THREADS as usize * places).div_ceil(PLACES);
        let lanes = loads
            .next_power_of_two()
            .clamp(least.next_power_of_two(), THREADS as usize);
        Cut {
            places: places as i32,
            lanes: lanes as i32,
            columns: loads.div_ceil(lanes) as i32,
            wide: i32::from(wide),
        }
    }

    /// Blocks that have all rows of dW.
    fn blocks(&self, sizes: Sizes) -> usize {
        let chunks = THREADS as usize / self.lanes as usize;
        Self::chunks(sizes).div_ceil(chunks) * self.columns as usize
    }
}

/// Where in the scratch memory what lies.
pub(super) struct Scratch {
    coefficients: *mut u8,
    /// Classes and samples, sorted by tiles; and room to merge them in.
    keys: [*mut u64; 2],
    /// Sums of the classes that chunks share: of rows of X, and of numbers.
    partials: *mut u8,
    partial_terms: *mut f64,
    /// Of the chunks that are done with such a class.
    counters: *mut i32,
    /// Of the samples whose margin has an effect; others have none.
    classes: *mut i32,
}

impl Scratch {
    /// Sums that a chunk leaves to others: those of the class that began before
    /// it and of the one that goes on behind it.
    const SHARED: usize = 2;

    /// Counters, for rows that are read by single values: they take the most.
    fn counters(sizes: Sizes) -> usize {
        Cut::chunks(sizes) * Cut::new(sizes, 1, false).columns as usize
    }

    /// The memory for values of any type. What is aligned to 16 bytes comes
    /// first.
    fn sections(sizes: Sizes) -> [usize; 7] {
        let wide = size_of::<f64>();
        let counters = Self::counters(sizes);
        [
            sizes.samples * COEFFICIENTS,
            sizes.samples * size_of::<u64>(),
            sizes.samples * size_of::<u64>(),
            Self::SHARED * Cut::chunks(sizes) * sizes.features * wide,
            Self::SHARED * counters * size_of::<f64>(),
            counters * size_of::<i32>(),
            sizes.samples * size_of::<i32>(),
        ]
    }

    /// Bytes of all of it.
    pub(super) fn bytes(sizes: Sizes) -> usize {
        Self::sections(sizes).iter().sum()
    }

    fn new(start: *mut u8, sizes: Sizes) -> Self {
        let mut end = start;
        let [
            coefficients,
            keys,
            merged,
            partials,
            terms,
            counters,
            classes,
        ] = Self::sections(sizes).map(|bytes| {
            let section = end;
            end = end.wrapping_add(bytes);
            section
        });
        Scratch {
            coefficients,
            keys: [keys.cast(), merged.cast()],
            partials,
            partial_terms: terms.cast(),
            counters: counters.cast(),
            classes: classes.cast(),
        }
    }
}

impl LargeMarginInnerProduct {
    /// [`forward`](Self::forward) on device memory; returns before the device
    /// is done.
    ///
    /// # Errors
    /// CUDA's errors, and bad labels that earlier passes met. Such a sample is
    /// treated as one without margin; the first call after the kernel has run
    /// finds out, or [`finish`](Self::finish).
    ///
    /// # Safety
    /// All pointers but `labels` and `plain`, which may be null, are memory of
    /// the current device, as large as the last reshape says and aligned as
    /// their types ask. They stay valid until the device has done the work that
    /// is queued here.
    pub unsafe fn forward_gpu<T: DeviceDtype>(
        &mut self,
        gemm: &impl DeviceGemm<T>,
        pass: Forward<T>,
    ) -> Result<()> {
        let sizes = self.begin_forward()?;
        self.report_bad_label()?;
        if self.gpu.is_none() {
            self.gpu = Some(State::new::<T>()?);
        }
        let state = self.gpu.as_mut().expect("made above");
        state.labels = !pass.labels.is_null();
        let [m, n, k] = ints(sizes)?;
        let cells = sizes.samples * sizes.classes;
        let scratch = Scratch::new(pass.scratch, sizes);
        // SAFETY: the caller's, for every call in this block; the arguments of
        // the kernel are those of large_margin_forward_*, in order.
        unsafe {
            if m != 0 && k != 0 {
                let (x, w) = ((Op::Plain, pass.features), (Op::Transposed, pass.weights));
                gemm.gemm([m, n, k], x, w, T::default(), pass.logits);
            } else if m != 0 {
                cuda::zero(pass.logits, cells)?;
            }
            if m != 0 && !pass.plain.is_null() {
                cuda::copy(pass.logits, pass.plain, cells)?;
            }
            if m != 0 && state.labels {
                let labels = Labels {
                    classes: n,
                    has_ignore_label: i32::from(self.ignore_label.is_some()),
                    ignore_label: self.ignore_label.unwrap_or(0),
                };
                // Without a margin, labels are checked alone.
                let (sorts, counters) = match self.margin.m() {
                    1 => (0, 0),
                    _ => (
                        int(sizes.samples.div_ceil(THREADS as usize))?,
                        int(Scratch::counters(sizes))?,
                    ),
                };
                let team = Team::new(sizes.samples, sizes.features, size_of::<T>());
                state.forward.launch(
                    (sorts as u32 + team.blocks(sizes.samples), 1),
                    THREADS,
                    kernel_args![
                        m,
                        sorts,
                        team,
                        labels,
                        k,
                        self.margin.m() as i32,
                        1.0 / (1.0 + self.lambda),
                        pass.features,
                        pass.labels,
                        pass.weights,
                        pass.logits,
                        scratch.coefficients,
                        scratch.classes,
                        scratch.keys[0],
                        counters,
                        scratch.counters,
                        state.bad_label.device_address(),
                    ],
                )?;
            }
        }
        self.last = Last::Gpu;
        Ok(())
    }

    /// [`backward`](Self::backward) on device memory.
    ///
    /// # Errors
    /// As [`forward_gpu`](Self::forward_gpu); and no forward pass on device
    /// memory came before.
    ///
    /// # Safety
    /// As [`forward_gpu`](Self::forward_gpu), with the same scratch memory; the
    /// gradients may be null.
    pub unsafe fn backward_gpu<T: DeviceDtype>(
        &self,
        gemm: &impl DeviceGemm<T>,
        pass: Backward<T>,
    ) -> Result<()> {
        self.last.allows(Last::Gpu)?;
        self.report_bad_label()?;
        let sizes = self.sizes()?;
        let state = self.gpu.as_ref().expect("made by the forward pass");
        let [m, n, k] = ints(sizes)?;
        let (dx, dw) = (pass.features_diff, pass.weights_diff);
        if m == 0 || k == 0 || dx.is_null() && dw.is_null() {
            return Ok(());
        }
        let scratch = Scratch::new(pass.scratch, sizes);
        let has_targets = state.labels && self.margin.m() > 1;
        let (zero, one) = (T::default(), T::from_f64(1.0));
        // SAFETY: the caller's, for every call in this block.
        unsafe {
            let diffs = [pass.logits_diff, pass.plain_diff];
            let diffs = || diffs.into_iter().filter(|diff| !diff.is_null());
            if !dw.is_null() {
                for diff in diffs() {
                    let x = (Op::Plain, pass.features);
                    gemm.gemm([n, k, m], (Op::Transposed, diff), x, one, dw);
                }
            }
            if !dx.is_null() {
                for (diff, beta) in diffs().zip([zero, one]) {
                    let w = (Op::Plain, pass.weights);
                    gemm.gemm([m, k, n], (Op::Plain, diff), w, beta, dx);
                }
            }
            if !has_targets {
                return Ok(());
            }
            let wide = (sizes.features * size_of::<T>()).is_multiple_of(LOAD)
                && [pass.features, pass.weights, dw.cast_const()]
                    .iter()
                    .all(|blob| blob.addr().is_multiple_of(LOAD));
            let cut = Cut::new(sizes, size_of::<T>(), wide);
            let team = Team::new(sizes.samples, sizes.features, size_of::<T>());
            let (mut keys, mut class_blocks, mut sample_blocks) = (scratch.keys[0], 0, 0);
            if !dw.is_null() {
                keys = Self::merge(state, m, &scratch)?;
                class_blocks = int(cut.blocks(sizes))?;
            }
            if !dx.is_null() {
                sample_blocks = team.blocks(sizes.samples);
            }
            state.backward.launch(
                (class_blocks as u32 + sample_blocks, 1),
                THREADS,
                kernel_args![
                    m,
                    n,
                    k,
                    class_blocks,
                    team,
                    cut,
                    pass.features,
                    pass.weights,
                    scratch.coefficients,
                    scratch.classes,
                    keys,
                    pass.logits_diff,
                    dx,
                    dw,
                    scratch.partials,
                    scratch.partial_terms,
                    scratch.counters,
                ],
            )
        }
    }

    /// Merges the sorted tiles of keys, and returns where all are sorted then.
    /// A second backward pass finds longer runs there, which are tiles as well.
    ///
    /// # Safety
    /// As [`forward_gpu`](Self::forward_gpu).
    unsafe fn merge(state: &State, m: i32, scratch: &Scratch) -> Result<*mut u64> {
        let samples = m as usize;
        let [mut from, mut to] = scratch.keys;
        let mut run = TILE;
        while run < samples {
            let blocks = samples.div_ceil(THREADS as usize);
            let length = int(run)?;
            // SAFETY: the caller's; the arguments are those of
            // large_margin_merge_*, in order.
            unsafe {
                let args = kernel_args![m, length, from, to];
                state.merge.launch((blocks as u32, 1), THREADS, args)?;
            }
            (from, to) = (to, from);
            run *= WAYS;
        }
        Ok(from)
    }

    /// Waits for the kernels that may report a bad label, for the layer's last
    /// batch: no later call would.
    ///
    /// # Errors
    /// A bad label. None where the device cannot be waited for: at the process's
    /// end, or after a reset, it may be gone, and the mailbox's memory with it.
    pub fn finish(&self) -> Result<()> {
        match &self.gpu {
            Some(state) if state.bad_label.wait().is_ok() => self.report_bad_label(),
            _ => Ok(()),
        }
    }

    fn report_bad_label(&self) -> Result<()> {
        match self.gpu.as_ref().and_then(|s| s.bad_label.read()) {
            None => Ok(()),
            Some(word) => {
                let label = f32::from_bits(word as u32);
                Err(self.bad_label((word >> 32) as usize, f64::from(label)))
            }
        }
    }
}

/// M, N and K as kernels and cuBLAS take them.
fn ints(sizes: Sizes) -> Result<[i32; 3]> {
    Ok([
        int(sizes.samples)?,
        int(sizes.classes)?,
        int(sizes.features)?,
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn teams_are_as_the_kernels_ask() {
        for samples in [1, 31, 33, 1023, 1024, 5000, 65536, 1 << 20] {
            for features in [0, 1, 16, 17, 100, 512, 516, 4096, 25088] {
                for size in [4, 8] {
                    let team = Team::new(samples, features, size);
                    let [lanes, rows] = [team.lanes, team.rows].map(|n| n as usize);
                    let of_a_block = if lanes == THREADS as usize {
                        assert!(rows == 1 && samples < WARPS, "{team:?}");
                        1
                    } else {
                        assert!(lanes.is_power_of_two() && lanes <= WARP, "{team:?}");
                        assert!(rows.is_power_of_two() && rows <= WARP, "{team:?}");
                        assert!(rows * lanes >= WARP, "{team:?}");
                        rows * (THREADS as usize / WARP)
                    };
                    let blocks = team.blocks(samples) as usize;
                    assert!(blocks * of_a_block >= samples && (blocks - 1) * of_a_block < samples);
                }
            }
        }
    }

    #[test]
    fn cuts_are_as_the_kernels_ask() {
        for samples in [1, 5, 1000, 65536, 1 << 20] {
            for features in [1, 2, 17, 64, 512, 516, 4096, 25088] {
                let sizes = Sizes {
                    samples,
                    features,
                    classes: 3,
                    axis: 1,
                };
                for (size, wide) in [(4, false), (8, false), (4, true), (8, true)] {
                    if wide && !(features * size).is_multiple_of(LOAD) {
                        continue;
                    }
                    let cut = Cut::new(sizes, size, wide);
                    let [places, lanes, columns] =
                        [cut.places, cut.lanes, cut.columns].map(|n| n as usize);
                    let of_a_block = THREADS as usize / lanes;
                    assert!(places.is_power_of_two() && places.is_multiple_of(LOADS));
                    assert!(lanes.is_power_of_two() && lanes <= THREADS as usize);
                    assert!(of_a_block * places <= PLACES, "{cut:?}");
                    let loads = features / if wide { LOAD / size } else { 1 };
                    assert!(columns * lanes >= loads && (columns - 1) * lanes < loads);
                    assert!(columns * Cut::chunks(sizes) <= Scratch::counters(sizes));
                    assert_eq!(cut.blocks(sizes) % columns, 0);
                    assert!(cut.blocks(sizes) / columns * of_a_block * places >= samples);
                }
                let values = samples.next_multiple_of(32) * features;
                let most = 62 * samples + (5 << 19).max(values / 2) * 102 / 100;
                assert!(Scratch::bytes(sizes) <= most, "{sizes:?}");
            }
        }
    }

    #[test]
    fn teams_fill_a_gpu() {
        let team = |samples, features| {
            let team = Team::new(samples, features, 4);
            (team.lanes, team.rows, team.blocks(samples))
        };
        assert_eq!(team(128, 512), (32, 1, 32), "one batch of loads a lane");
        assert_eq!(team(128, 513), (128, 1, 128), "loads of single values");
        assert_eq!(team(128, 25088), (128, 1, 128), "too few samples for warps");
        assert_eq!(team(1024, 25088), (32, 1, 256));
        assert_eq!(team(65536, 64), (4, 32, 512), "a dense head");
        assert_eq!(team(60000, 2), (1, 32, 469));
    }
}
