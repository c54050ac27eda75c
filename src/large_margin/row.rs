//! Loops over one row of features or class weights, K long: all that the
//! margin costs beyond InnerProduct.

use crate::dtype::Dtype;
use crate::simd::{lane_sum, with_avx2};

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

/// The inner product of two rows in f64.
///
/// # Panics
/// The two differ in length.
pub fn dot<T: Dtype>(x: &[T], w: &[T]) -> f64 {
    assert_eq!(x.len(), w.len());
    with_avx2!(dot_body<T>(x: &[T], w: &[T]) -> f64)
}

#[inline(always)]
fn dot_body<T: Dtype>(x: &[T], w: &[T]) -> f64 {
    lane_sum(x, w, |x, w| x.into() * w.into())
}

/// The sum of squares of `x` in f64.
fn sum_squares<T: Dtype>(x: &[T]) -> f64 {
    with_avx2!(sum_squares_body<T>(x: &[T]) -> f64)
}

#[inline(always)]
fn sum_squares_body<T: Dtype>(x: &[T]) -> f64 {
    lane_sum(x, x, |v, _| {
        let v: f64 = v.into();
        v * v
    })
}

/// A factor `value * (numerator / denominator)` of a row whose norm is
/// `denominator`, kept apart because the ratio of two norms may leave the range
/// of the type that it scales.
#[derive(Debug, Clone, Copy)]
pub struct Factor {
    /// What the ratio is multiplied by.
    pub value: f64,
    /// Finite.
    pub numerator: f64,
    /// Finite and not 0.
    pub denominator: f64,
}

impl Factor {
    /// The factor as one number, where that is of ordinary size.
    fn product<T: Dtype>(self) -> Option<T> {
        let ratio = self.numerator / self.denominator;
        let product = T::from_f64(self.value * ratio);
        (ratio.is_normal() && product.is_normal()).then_some(product)
    }

    /// Its product with an element of the row where that number is not: of
    /// denormal features, say. v / denominator is of ordinary size still, and
    /// in this order only what the product itself would overflow by does.
    fn times<T: Dtype>(self, v: T) -> T {
        let v: f64 = v.into();
        // 0 stays 0 where value or numerator have overflowed.
        if v == 0.0 {
            return T::default();
        }
        T::from_f64(v / self.denominator * self.value * self.numerator)
    }
}

/// `y += factor v`, element by element, for a `v` whose norm is the factor's
/// denominator.
///
/// # Panics
/// The two differ in length.
pub fn add_scaled<T: Dtype>(y: &mut [T], factor: Factor, v: &[T]) {
    assert_eq!(y.len(), v.len());
    if factor.value == 0.0 {
        return;
    }
    match factor.product() {
        Some(product) => add_product(y, product, v),
        None => y
            .iter_mut()
            .zip(v)
            .for_each(|(y, &v)| *y += factor.times(v)),
    }
}

/// `y = factor v`; otherwise [`add_scaled`].
///
/// # Panics
/// The two differ in length.
pub fn set_scaled<T: Dtype>(y: &mut [T], factor: Factor, v: &[T]) {
    assert_eq!(y.len(), v.len());
    if factor.value == 0.0 {
        return y.fill(T::default());
    }
    match factor.product() {
        Some(product) => set_product(y, product, v),
        None => y.iter_mut().zip(v).for_each(|(y, &v)| *y = factor.times(v)),
    }
}

fn add_product<T: Dtype>(y: &mut [T], factor: T, v: &[T]) {
    with_avx2!(add_product_body<T>(y: &mut [T], factor: T, v: &[T]))
}

#[inline(always)]
fn add_product_body<T: Dtype>(y: &mut [T], factor: T, v: &[T]) {
    for (y, &v) in y.iter_mut().zip(v) {
        *y += factor * v;
    }
}

fn set_product<T: Dtype>(y: &mut [T], factor: T, v: &[T]) {
    with_avx2!(set_product_body<T>(y: &mut [T], factor: T, v: &[T]))
}

#[inline(always)]
fn set_product_body<T: Dtype>(y: &mut [T], factor: T, v: &[T]) {
    for (y, &v) in y.iter_mut().zip(v) {
        *y = factor * v;
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

    #[test]
    fn add_scaled_is_its_formula() {
        let minus_half = Factor {
            value: 2.0,
            numerator: -1.0,
            denominator: 4.0,
        };
        for n in 0..40 {
            let (v, mut y) = (ramp(2 * n)[n..].to_vec(), ramp(n));
            let want: Vec<f32> = (0..n).map(|i| y[i] + -0.5 * v[i]).collect();
            add_scaled(&mut y, minus_half, &v);
            assert_eq!(y, want);
            set_scaled(&mut y, minus_half, &v);
            assert!(y.iter().zip(&v).all(|(y, v)| *y == -0.5 * v));
        }
    }

    #[test]
    fn add_scaled_survives_a_ratio_beyond_the_type() {
        for norm in [1e-40f32, 1e-44, 1e-45, 3e38, f32::MAX] {
            let mut y = [1f32, 2.0];
            let factor = Factor {
                value: 3.0,
                numerator: 2.0,
                denominator: f64::from(norm),
            };
            add_scaled(&mut y, factor, &[norm, 0.0]);
            assert!((y[0] - 7.0).abs() < 1e-6 && y[1] == 2.0, "{norm}: {y:?}");
            set_scaled(&mut y, factor, &[norm, 0.0]);
            assert!((y[0] - 6.0).abs() < 1e-6 && y[1] == 0.0, "{norm}: {y:?}");
        }
        for norm in [1e-320, 5e-324, 1e308, f64::MAX] {
            let mut y = [1f64, 2.0];
            let factor = Factor {
                value: 3.0,
                numerator: 2.0,
                denominator: norm,
            };
            add_scaled(&mut y, factor, &[norm, 0.0]);
            assert!((y[0] - 7.0).abs() < 1e-14 && y[1] == 2.0, "{norm}: {y:?}");
        }
    }

    #[test]
    fn zero_times_what_overflowed_is_zero() {
        // The ratio of these norms is beyond f64.
        let factor = |value| Factor {
            value,
            numerator: 1e300,
            denominator: 5e-324,
        };
        let mut y = [1f64, 2.0];
        add_scaled(&mut y, factor(0.0), &[5e-324, 0.0]);
        assert_eq!(y, [1.0, 2.0]);
        add_scaled(&mut y, factor(1e-300), &[5e-324, 0.0]);
        assert_eq!(y, [2.0, 2.0]);
        set_scaled(&mut y, factor(0.0), &[5e-324, f64::INFINITY]);
        assert_eq!(y, [0.0, 0.0]);
    }
}
