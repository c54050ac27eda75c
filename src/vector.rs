//! Loops over one row of features, K long.
//!
//! They stand here because they are all that the margin costs beyond
//! InnerProduct: compiled a second time for AVX2, with sums split over
//! 16 accumulators so that the compiler may use vector registers
//! without reordering anything itself. The order of the additions is fixed;
//! results do not depend on the instruction set.

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

/// The Euclidean norm of `x`, as accurate as f64 allows for any finite `x`.
pub fn norm<T: Dtype>(x: &[T]) -> f64 {
    let sum = sum_squares(x);
    // Squares of f32 values neither overflow nor vanish in f64. Those of f64
    // values can, at sizes that no training reaches: scale only then.
    if sum.is_finite() && sum > f64::MIN_POSITIVE / f64::EPSILON {
        return sum.sqrt();
    }
    let largest = x.iter().fold(0.0, |big: f64, &v| {
        let v: f64 = v.into();
        // f64::max would hide a NaN.
        if v.abs() > big || v.is_nan() {
            v.abs()
        } else {
            big
        }
    });
    if largest == 0.0 || !largest.is_finite() {
        return largest;
    }
    let squares = x.iter().map(|&v| {
        let v = v.into() / largest;
        v * v
    });
    largest * squares.sum::<f64>().sqrt()
}

/// The sum of squares of `x` in f64.
fn sum_squares<T: Dtype>(x: &[T]) -> f64 {
    with_avx2!(sum_squares_body<T>(x: &[T]) -> f64)
}

#[inline(always)]
fn sum_squares_body<T: Dtype>(x: &[T]) -> f64 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            let v: f64 = v.into();
            *lane += v * v;
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        let v: f64 = v.into();
        *lane += v * v;
    }
    lanes.iter().sum()
}

/// A factor `value * (numerator / denominator)`, kept apart because the ratio
/// of two norms may leave the range of the type that it scales.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// What the ratio is multiplied by.
    pub value: f64,
    /// Finite.
    pub numerator: f64,
    /// Finite and not 0.
    pub denominator: f64,
}

/// `y += a u + b v`, element by element.
///
/// # Panics
/// The three differ in length.
pub fn add_scaled<T: Dtype>(y: &mut [T], a: f64, u: &[T], b: Scale, v: &[T]) {
    let factor = T::from_f64(b.value * (b.numerator / b.denominator));
    if factor.is_normal() || b.value == 0.0 {
        return add_scaled_by(y, T::from_f64(a), u, factor, v);
    }
    // Of denormal features, say: v / denominator is of ordinary size still.
    let b_value = b.value * b.numerator;
    for ((y, &u), &v) in y.iter_mut().zip(u).zip(v) {
        *y += T::from_f64(a * u.into() + b_value * (v.into() / b.denominator));
    }
}

fn add_scaled_by<T: Dtype>(y: &mut [T], a: T, u: &[T], b: T, v: &[T]) {
    with_avx2!(add_scaled_body<T>(y: &mut [T], a: T, u: &[T], b: T, v: &[T]))
}

#[inline(always)]
fn add_scaled_body<T: Dtype>(y: &mut [T], a: T, u: &[T], b: T, v: &[T]) {
    assert!(y.len() == u.len() && y.len() == v.len());
    for ((y, &u), &v) in y.iter_mut().zip(u).zip(v) {
        *y += a * u + b * v;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37).sin() * 3.0).collect()
    }

    #[test]
    fn norm_is_the_plain_sum_for_every_length() {
        for n in 0..100 {
            let x = ramp(n);
            let want: f64 = x.iter().map(|&v| f64::from(v).powi(2)).sum();
            assert!((norm(&x) - want.sqrt()).abs() <= 1e-14 * want, "n {n}");
        }
    }

    #[test]
    fn norm_neither_overflows_nor_vanishes() {
        for scale in [1e-310, 1e-160, 1e-30, 1e30, 1e155, 1e300] {
            let n = norm(&[3.0 * scale, -4.0 * scale]);
            assert!((n / (5.0 * scale) - 1.0).abs() < 1e-12, "{scale}: {n}");
        }
        assert_eq!(norm(&[f32::MAX; 4]), 2.0 * f64::from(f32::MAX));
        assert_eq!(norm::<f32>(&[1e-45]), f64::from(1e-45f32));
        assert_eq!(norm::<f64>(&[0.0, 0.0]), 0.0);
    }

    #[test]
    fn norm_of_what_is_not_finite_is_not_finite() {
        assert_eq!(norm(&[1.0, f64::NEG_INFINITY]), f64::INFINITY);
        assert!(norm(&[1.0, f64::NAN, 2.0]).is_nan());
        assert!(norm(&[f32::NAN, 2.0]).is_nan());
        assert!(!norm(&[f64::NAN, f64::INFINITY]).is_finite());
    }

    const MINUS_HALF: Scale = Scale {
        value: 2.0,
        numerator: -1.0,
        denominator: 4.0,
    };

    #[test]
    fn add_scaled_is_its_formula() {
        for n in 0..40 {
            let (u, v) = (ramp(n), ramp(2 * n)[n..].to_vec());
            let mut y = ramp(n);
            let want: Vec<f32> = (0..n).map(|i| y[i] + (2.5 * u[i] + -0.5 * v[i])).collect();
            add_scaled(&mut y, 2.5, &u, MINUS_HALF, &v);
            assert_eq!(y, want);
        }
    }

    #[test]
    fn add_scaled_survives_a_ratio_beyond_the_type() {
        for norm in [1e-40f32, 1e-44, 3e38] {
            let (mut y, norm64) = ([1f32], f64::from(norm));
            let ratio = Scale {
                value: 3.0,
                numerator: 2.0,
                denominator: norm64,
            };
            add_scaled(&mut y, 1.0, &[0.5], ratio, &[norm]);
            assert_eq!(y, [7.5], "{norm}");
        }
        let tiny = Scale {
            value: 3.0,
            numerator: 2.0,
            denominator: 1e-320,
        };
        let mut y = [1f64];
        add_scaled(&mut y, 1.0, &[0.5], tiny, &[1e-320]);
        assert_eq!(y, [7.5]);
    }
}
