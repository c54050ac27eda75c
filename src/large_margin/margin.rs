//! The angle margin psi and its derivative.
//!
//! The paper replaces `cos(theta)` of the target class by
//! `psi(theta) = (-1)^k cos(m theta) - 2k` for theta in
//! `[k pi/m, (k+1) pi/m]` (eq. 6), a function that falls from 1 to 1 - 2m as
//! theta goes from 0 to pi. As functions of `c = cos(theta)`:
//!
//! ```text
//! psi(c)  = (-1)^k T_m(c) - 2k      T_m: Chebyshev, first kind
//! psi'(c) = (-1)^k m U_{m-1}(c)     U_m: Chebyshev, second kind
//! ```
//!
//! Both come from the three-term recurrence, which serves every m and needs
//! neither acos nor sin near their singular ends. psi is continuously
//! differentiable in c, so a c rounded to the wrong side of a segment's
//! border changes nothing beyond the rounding itself.

use crate::error::{Error, Result};

/// psi for one margin m.
#[derive(Debug, Clone, PartialEq)]
pub struct Margin {
    m: u32,
    /// `cos(j pi / m)` for j = 1 .. m-1, falling: where k goes up by one.
    borders: Vec<f64>,
}

impl Margin {
    /// The largest m that [`Margin::new`] takes. psi costs O(m) a sample and
    /// spans 2m; no training uses more than a handful.
    pub const MAX: u32 = 1000;

    /// The margin m, which multiplies the angle between a sample and the
    /// weights of its class.
    ///
    /// # Errors
    /// m is 0 or above [`Margin::MAX`].
    pub fn new(m: u32) -> Result<Self> {
        if !(1..=Self::MAX).contains(&m) {
            return Err(Error::new(format!(
                "margin: {m} is outside [1, {}]",
                Self::MAX
            )));
        }
        let step = std::f64::consts::PI / f64::from(m);
        let borders = (1..m).map(|j| (f64::from(j) * step).cos()).collect();
        Ok(Margin { m, borders })
    }

    /// m.
    pub fn m(&self) -> u32 {
        self.m
    }

    /// k at the cosine `c`: the segment `[k pi/m, (k+1) pi/m]` of its angle.
    pub fn segment(&self, c: f64) -> usize {
        self.borders.partition_point(|&border| c <= border)
    }

    /// `(psi(c), psi'(c))` at the cosine `c` in [-1, 1]; the derivative is by
    /// c, not by theta.
    pub fn at(&self, c: f64) -> (f64, f64) {
        let k = self.segment(c);
        let (mut t_prev, mut t) = (1.0, c);
        let (mut u_prev, mut u) = (0.0, 1.0);
        for _ in 1..self.m {
            (t_prev, t) = (t, 2.0 * c * t - t_prev);
            (u_prev, u) = (u, 2.0 * c * u - u_prev);
        }
        let sign = if k.is_multiple_of(2) { 1.0 } else { -1.0 };
        (sign * t - 2.0 * k as f64, sign * f64::from(self.m) * u)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::f64::consts::PI;

    /// eq. 6 as the paper writes it, by angles.
    fn psi_of_angle(m: u32, theta: f64) -> f64 {
        let m = f64::from(m);
        let k = (m * theta / PI).floor().min(m - 1.0);
        (-1f64).powf(k) * (m * theta).cos() - 2.0 * k
    }

    /// Angles all over [0, pi], the borders and their neighbours included.
    fn angles(m: u32) -> Vec<f64> {
        let mut all: Vec<f64> = (0..=400).map(|i| PI * f64::from(i) / 400.0).collect();
        for j in 0..=m {
            let border = PI * f64::from(j) / f64::from(m);
            for d in [0.0, 1e-12, 1e-9, 1e-6, 1e-3] {
                all.extend([border - d, border + d]);
            }
        }
        all.retain(|t| (0.0..=PI).contains(t));
        all.sort_by(f64::total_cmp);
        all
    }

    #[test]
    fn equals_equation_6() {
        for m in 1..=8 {
            let margin = Margin::new(m).unwrap();
            for theta in angles(m) {
                let (psi, _) = margin.at(theta.cos());
                let want = psi_of_angle(m, theta);
                assert!(
                    (psi - want).abs() < 1e-10,
                    "m {m} theta {theta}: {psi} {want}"
                );
            }
        }
    }

    #[test]
    fn derivative_is_the_slope_on_every_segment_and_next_to_every_border() {
        for m in 1..=8 {
            let margin = Margin::new(m).unwrap();
            for theta in angles(m) {
                // Central differences, kept inside [-1, 1].
                let h = 1e-6;
                let c = theta.cos().clamp(-1.0 + h, 1.0 - h);
                let slope = (margin.at(c + h).0 - margin.at(c - h).0) / (2.0 * h);
                let (_, dpsi) = margin.at(c);
                let scale = f64::from(m * m);
                assert!(
                    (slope - dpsi).abs() < 1e-4 * scale,
                    "m {m} c {c}: {slope} {dpsi}"
                );
            }
        }
    }

    #[test]
    fn falls_strictly_from_1_to_1_minus_2m() {
        for m in 1..=8 {
            let margin = Margin::new(m).unwrap();
            assert_eq!(margin.at(1.0).0, 1.0);
            assert!((margin.at(-1.0).0 - (1.0 - 2.0 * f64::from(m))).abs() < 1e-12);
            let psi: Vec<f64> = angles(m).iter().map(|t| margin.at(t.cos()).0).collect();
            assert!(psi.windows(2).all(|p| p[1] <= p[0] + 1e-12), "m {m}");
        }
    }

    #[test]
    fn slope_at_the_ends_is_m_squared() {
        for m in [1, 2, 3, 4, 7, 100] {
            let margin = Margin::new(m).unwrap();
            let want = f64::from(m * m);
            assert_eq!(margin.at(1.0).1, want);
            assert_eq!(margin.at(-1.0).1, want);
        }
    }

    #[test]
    fn m_1_is_the_identity() {
        let margin = Margin::new(1).unwrap();
        for c in [-1.0, -0.3, 0.0, 0.7, 1.0] {
            assert_eq!(margin.at(c), (c, 1.0));
        }
    }

    #[test]
    fn absurd_margins_are_refused() {
        for m in [0, Margin::MAX + 1, u32::MAX] {
            let message = Margin::new(m).unwrap_err().to_string();
            assert!(message.contains(&m.to_string()), "{message}");
        }
        assert!(Margin::new(Margin::MAX).is_ok());
    }
}
