//! What lets the compiler use vector registers.
//!
//! A function that [`with_avx2`] calls is compiled twice, and sums are split
//! over [`LANES`] accumulators, so that nothing has to be reordered. The order
//! of the additions is fixed; results do not depend on the instruction set.

use crate::dtype::Dtype;

/// Independent partial sums: four AVX2 registers of f64.
const LANES: usize = 16;

/// Calls `$body` as compiled for AVX2 where the processor has it.
macro_rules! with_avx2 {
    ($body:ident<$t:ident>($($arg:ident: $ty:ty),*) $(-> $ret:ty)?) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2")]
            fn avx2<$t: Dtype>($($arg: $ty),*) $(-> $ret)? {
                $body($($arg),*)
            }
            if std::arch::is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has AVX2, the only feature asked for.
                return unsafe { avx2($($arg),*) };
            }
        }
        $body($($arg),*)
    }};
}
pub(crate) use with_avx2;

/// The sum of what `term` makes of the values of two slices, side by side.
#[inline(always)]
pub(crate) fn lane_sum<T: Dtype>(a: &[T], b: &[T], term: impl Fn(T, T) -> f64) -> f64 {
    let mut sums = [0.0; LANES];
    let mut add = |a: &[T], b: &[T]| {
        for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
            *sum += term(a, b);
        }
    };
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        add(a, b);
    }
    add(a_rest, b_rest);
    // By halves: four additions wait for one another, not LANES.
    let mut lanes = LANES;
    while lanes > 1 {
        lanes /= 2;
        let (low, high) = sums.split_at_mut(lanes);
        for (low, high) in low.iter_mut().zip(high) {
            *low += *high;
        }
    }
    sums[0]
}
