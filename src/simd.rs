//! What lets the compiler use vector registers.
//!
//! A function that [`with_avx2`] calls is compiled twice, and sums are split
//! over [`LANES`] accumulators, so that nothing has to be reordered. The order
//! of the additions is fixed; results do not depend on the instruction set.

use std::array;

use crate::dtype::Dtype;

/// Independent partial sums: four AVX2 registers of f64.
pub(crate) const LANES: usize = 16;

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
///
/// One sum, and arrays of all lanes: the compiler turns those into vectors.
/// Two sums at a time it would pair lane by lane instead.
#[inline(always)]
pub(crate) fn lane_sum<T: Dtype>(
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
pub(crate) fn wide<T: Dtype>(values: &[T; LANES]) -> [f64; LANES] {
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
