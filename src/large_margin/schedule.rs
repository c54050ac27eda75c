//! The descent of lambda, the weight of the plain logit.

use crate::error::Result;
use crate::param::{LargeMarginInnerProductParameter, finite_non_negative};

/// lambda as a function of the iteration.
///
/// The paper (section 5.1) trains with the target logit
/// `(lambda |w||x| cos(theta) + |w||x| psi(theta)) / (1 + lambda)` and starts
/// from a large lambda, plain softmax, which falls as training goes on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    base: f64,
    gamma: f64,
    power: f64,
    lambda_min: f64,
}

impl Schedule {
    /// The schedule that `param` describes.
    ///
    /// # Errors
    /// `base`, `gamma`, `power` or `lambda_min` negative, infinite or NaN.
    pub fn new(param: &LargeMarginInnerProductParameter) -> Result<Self> {
        Ok(Schedule {
            base: finite_non_negative("base", param.base())?,
            gamma: finite_non_negative("gamma", param.gamma())?,
            power: finite_non_negative("power", param.power())?,
            lambda_min: finite_non_negative("lambda_min", param.lambda_min())?,
        })
    }

    /// lambda of the forward pass number `iteration`; the first is number 1.
    ///
    /// `max(lambda_min, base * (1 + gamma * iteration)^(-power))`, at least 0
    /// and finite.
    pub fn lambda(&self, iteration: i64) -> f64 {
        let decay = (1.0 + self.gamma * iteration as f64).powf(-self.power);
        (self.base * decay).max(self.lambda_min)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(base: f32, gamma: f32, power: f32, lambda_min: f32) -> Result<Schedule> {
        Schedule::new(&LargeMarginInnerProductParameter {
            base: Some(base),
            gamma: Some(gamma),
            power: Some(power),
            lambda_min: Some(lambda_min),
            ..Default::default()
        })
    }

    #[test]
    fn falls_as_the_formula_says_and_stops_at_lambda_min() {
        let s = schedule(1000.0, 0.5, 2.0, 3.0).unwrap();
        assert_eq!(s.lambda(0), 1000.0);
        assert_eq!(s.lambda(2), 250.0);
        assert_eq!(s.lambda(6), 62.5);
        assert_eq!(s.lambda(i64::MAX), 3.0);
    }

    #[test]
    fn base_0_removes_lambda() {
        assert_eq!(schedule(0.0, 0.1, 45.0, 0.0).unwrap().lambda(9), 0.0);
    }

    #[test]
    fn extreme_parameters_stay_finite() {
        let s = schedule(f32::MAX, f32::MAX, f32::MAX, 0.0).unwrap();
        assert_eq!(s.lambda(i64::MAX), 0.0);
        assert_eq!(s.lambda(0), f64::from(f32::MAX));
    }

    #[test]
    fn each_field_is_refused_by_name_and_value() {
        for bad in [-1.0, f32::NAN, f32::INFINITY] {
            for (i, field) in ["base", "gamma", "power", "lambda_min"].iter().enumerate() {
                let mut v = [1.0; 4];
                v[i] = bad;
                let message = schedule(v[0], v[1], v[2], v[3]).unwrap_err().to_string();
                assert!(message.contains(&format!("{field}: {bad}")), "{message}");
            }
        }
    }
}
