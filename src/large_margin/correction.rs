//! What the margin changes for one sample.

use super::margin::Margin;

/// What the margin adds for one sample, up to the factor of its top gradient.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Correction {
    /// To the target logit: `(|x||w| psi - f) / (1 + lambda)`.
    pub(super) logit: f64,
    /// a: what the target entry of the top gradient grows by, times itself.
    pub(super) a: f64,
    /// b: times `|w|/|x|` of x in dx, times `|x|/|w|` of w in dw.
    pub(super) b: f64,
    /// `|x|`; 0 where there is nothing to correct.
    pub(super) x: f64,
    /// `|w|`; 0 where there is nothing to correct.
    pub(super) w: f64,
}

impl Correction {
    /// Of a sample with norm `x`, class weights of norm `w` and inner product
    /// `f`; with `c = f / (x w)`
    ///
    /// ```text
    /// a = (psi'(c) - 1) / (1 + lambda)
    /// b = (psi(c) - c psi'(c)) / (1 + lambda)
    /// ```
    ///
    /// Empty where x or w is zero (the angle is undefined; the plain logit, 0,
    /// is the limit) or anything is not finite (InnerProduct's value stands).
    #[inline]
    pub(super) fn new(margin: &Margin, lambda: f64, x: f64, w: f64, f: f64) -> Self {
        let usable = |v: f64| v > 0.0 && v.is_finite();
        if !(usable(x) && usable(w) && f.is_finite()) {
            return Correction::default();
        }
        // Divided one by one: x w may overflow where f does not.
        let c = (f / x / w).clamp(-1.0, 1.0);
        let (psi, dpsi) = margin.at(c);
        let share = 1.0 / (1.0 + lambda);
        let mut margin_logit = x * w * psi;
        if !margin_logit.is_finite() {
            // A psi of 0 must not meet a product that has overflowed.
            margin_logit = x.min(w) * psi * x.max(w);
        }
        Correction {
            logit: (margin_logit - f) * share,
            a: (dpsi - 1.0) * share,
            b: (psi - c * dpsi) * share,
            x,
            w,
        }
    }

    /// Whether it changes anything. A correction of zero is left out, not
    /// added: 0 times an infinite feature would be NaN.
    pub(super) fn applies(&self) -> bool {
        self.x != 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_whose_product_overflows_make_no_nan() {
        let margin = Margin::new(2).unwrap();
        // psi is 0 at the cosine of pi/4.
        let c = (0..100)
            .map(|i| f64::from_bits(0.5f64.sqrt().to_bits() - 50 + i))
            .chain([0.0, 1.0]);
        for c in c {
            for (x, w) in [(1e200, 1e200), (1e308, 10.0), (10.0, 1e308)] {
                let correction = Correction::new(&margin, 0.0, x, w, c * x * w.min(1e100));
                assert!(!correction.logit.is_nan(), "{c} {x} {w}");
            }
        }
        let zero = Correction::new(&Margin::new(3).unwrap(), 0.0, 1e200, 1e200, 0.0);
        assert!(zero.logit.is_infinite() || zero.logit == 0.0);
    }
}
