//! x_hat, the normalised value.

use std::ops::Range;

use super::Statistics;
use crate::dtype::Dtype;

/// What a backward pass knows of x.
#[derive(Clone, Copy)]
pub(super) enum Values<'a, T> {
    /// x itself.
    Bottom(&'a [T]),
    /// x_hat.
    Normalized(&'a [T]),
}

impl<'a, T: Dtype> Values<'a, T> {
    #[inline(always)]
    pub(super) fn slice(self) -> &'a [T] {
        match self {
            Values::Bottom(x) | Values::Normalized(x) => x,
        }
    }

    pub(super) fn part(self, values: Range<usize>) -> Self {
        match self {
            Values::Bottom(x) => Values::Bottom(&x[values]),
            Values::Normalized(x) => Values::Normalized(&x[values]),
        }
    }

    #[inline(always)]
    pub(super) fn whitening(self, statistics: Statistics) -> [T; 3] {
        match self {
            Values::Bottom(_) => whitening(statistics),
            Values::Normalized(_) => [T::default(), T::from_f64(1.0), T::default()],
        }
    }
}

/// What [`x_hat`] takes of one channel: mean, inv_std, and what the mean lost
/// when it was rounded to T, in units of x_hat.
#[inline(always)]
pub(super) fn whitening<T: Dtype>(statistics: Statistics) -> [T; 3] {
    let Statistics { mean, inv_std } = statistics;
    let rounded = T::from_f64(mean);
    let rest = (rounded.into() - mean) * inv_std;
    [rounded, T::from_f64(inv_std), T::from_f64(rest)]
}

/// The one formula of x_hat, so that a layer in place and its twin agree bit
/// by bit. The difference comes first: it is exact where x is near the mean.
#[inline(always)]
pub(super) fn x_hat<T: Dtype>(x: T, [mean, inv_std, rest]: [T; 3]) -> T {
    (x - mean) * inv_std + rest
}
