//! What one pass tells of the training: the angles between the samples and
//! the weights of their classes, the norms, and whether the margin holds.
//!
//! The layer logs it every so many forward passes where its user asks for that
//! (`LSOFTMAX_LOG_EVERY`). It is computed from the blobs on the host and
//! leaves the pass alone: where it is off nothing is read, kept or waited for.

use std::collections::BTreeMap;
use std::fmt;

use super::row::{dot, norm};
use super::{LargeMarginInnerProduct, Sizes};
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// The blobs of a forward pass that is over, in host memory.
#[derive(Debug)]
pub struct Pass<'a, T> {
    /// X, (M, K).
    pub features: &'a [T],
    /// (M).
    pub labels: &'a [T],
    /// W, (N, K).
    pub weights: &'a [T],
    /// (M, N), as the pass left them.
    pub logits: &'a [T],
}

/// What a forward pass tells of the training.
///
/// Its text is one line for a log, `key = value` parted by commas: `lambda`,
/// the four counts, and, unless `samples` is 0, `angle_mean`, `angle_p95`,
/// `feature_norm`, `weight_norm`, `holds`, `segments` (m shares, from k = 0 on)
/// and `angle_deciles` (11 angles). Lists are parted by blanks.
#[derive(Debug, Clone, PartialEq)]
pub struct Diagnosis {
    /// The forward passes behind the layer, this one included.
    pub passes: i64,
    /// lambda of the pass.
    pub lambda: f64,
    /// Samples that all other values are of: those that are none of the three
    /// counts below.
    pub samples: usize,
    /// Samples whose label is `ignore_label`.
    pub ignored: usize,
    /// Samples without an angle: their features, or the weights of their
    /// class, are all zero.
    pub zero: usize,
    /// Samples whose features, class weights or inner product are infinite or
    /// NaN.
    pub not_finite: usize,
    /// The angles theta_y to the weights of the own class in degrees, rising.
    pub angles: Vec<f64>,
    /// Samples in each segment `[k pi/m, (k+1) pi/m]` of psi, for k from 0 to
    /// m - 1.
    pub segments: Vec<usize>,
    /// The mean of `|x|` over the samples.
    pub feature_norm: f64,
    /// The mean of `|w_y|` over the classes that the samples are of.
    pub weight_norm: f64,
    /// Samples whose margin holds: with all of the margin, whatever lambda is,
    /// the target logit is still the greatest,
    /// `|x||w_y| psi(theta_y) >= max over j != y of f_j`. For m = 1 these are
    /// the samples that are classified right.
    pub holds: usize,
}

impl LargeMarginInnerProduct {
    /// Has a diagnosis due in each `value`-th forward pass, the first of a
    /// fresh layer included; in none where the value is 0 or empty.
    ///
    /// # Errors
    /// `value` is no such number.
    pub fn log_every(&mut self, value: &str) -> Result<()> {
        self.log_every = match value.trim() {
            "" => 0,
            number => number.parse().ok().filter(|&n| n >= 0).ok_or_else(|| {
                Error::new(format!(
                    "LSOFTMAX_LOG_EVERY: '{value}' is no number of forward passes: \
                     it logs every N of them for an N of 1 or more, and nothing for 0"
                ))
            })?,
        };
        Ok(())
    }

    /// Whether [`diagnose`](Self::diagnose) is due for the last forward pass.
    pub fn diagnosis_is_due(&self) -> bool {
        // Pass 1 is iteration 0 of the solver, the first that Caffe displays.
        self.log_every > 0 && self.passes > 0 && (self.passes - 1) % self.log_every == 0
    }

    /// What the last forward pass tells; `pass` has its blobs. It reads X and
    /// the logits once, and the weights of the classes that occur.
    ///
    /// # Errors
    /// A label that is neither an integer in [0, N) nor `ignore_label`; no
    /// reshape came before.
    ///
    /// # Panics
    /// A slice whose length is not what the last reshape says.
    pub fn diagnose<T: Dtype>(&self, pass: Pass<'_, T>) -> Result<Diagnosis> {
        let Sizes {
            samples: m,
            classes: n,
            features: k,
            ..
        } = self.sizes()?;
        assert_eq!(pass.features.len(), m * k, "features");
        assert_eq!(pass.labels.len(), m, "labels");
        assert_eq!(pass.weights.len(), n * k, "class weights");
        assert_eq!(pass.logits.len(), m * n, "logits");
        let mut found = Diagnosis {
            passes: self.passes,
            lambda: self.lambda,
            samples: 0,
            ignored: 0,
            zero: 0,
            not_finite: 0,
            angles: Vec::with_capacity(m),
            segments: vec![0; self.margin.m() as usize],
            feature_norm: 0.0,
            weight_norm: 0.0,
            holds: 0,
        };
        let mut weight_norms = BTreeMap::new();
        let mut of_samples = BTreeMap::new();
        for (i, &label) in pass.labels.iter().enumerate() {
            let Some(class) = self.class_of(i, label.into())? else {
                found.ignored += 1;
                continue;
            };
            let y = class as usize;
            let features = &pass.features[i * k..][..k];
            let weights = &pass.weights[y * k..][..k];
            let x = norm(features);
            let w = *weight_norms.entry(y).or_insert_with(|| norm(weights));
            // Not the logit: that has the margin on it.
            let f = dot(features, weights);
            if !(x.is_finite() && w.is_finite() && f.is_finite()) {
                found.not_finite += 1;
                continue;
            }
            if x == 0.0 || w == 0.0 {
                found.zero += 1;
                continue;
            }
            let c = (f / x / w).clamp(-1.0, 1.0);
            let (psi, _) = self.margin.at(c);
            let (before, rest) = pass.logits[i * n..][..n].split_at(y);
            let other = [before, &rest[1..]].map(greatest);
            let other = greatest(&other);
            // Not x w psi: of an f64 net it might overflow.
            let holds = psi >= other / x / w;
            found.samples += 1;
            found.angles.push(c.acos().to_degrees());
            found.segments[self.margin.segment(c)] += 1;
            found.feature_norm += x;
            found.holds += usize::from(holds);
            of_samples.insert(y, w);
        }
        found.angles.sort_unstable_by(f64::total_cmp);
        found.feature_norm /= found.samples as f64;
        found.weight_norm = of_samples.values().sum::<f64>() / of_samples.len() as f64;
        Ok(found)
    }
}

impl Diagnosis {
    /// The angle in degrees that a share of the samples, in [0, 1], does not
    /// exceed; between two of them it is interpolated. NaN without samples.
    pub fn percentile(&self, share: f64) -> f64 {
        let Some(last) = self.angles.len().checked_sub(1) else {
            return f64::NAN;
        };
        let place = share * last as f64;
        let below = (place as usize).min(last);
        let (low, high) = (self.angles[below], self.angles[last.min(below + 1)]);
        low + (high - low) * (place - below as f64)
    }

    /// The mean angle in degrees. NaN without samples.
    pub fn mean_angle(&self) -> f64 {
        self.angles.iter().sum::<f64>() / self.angles.len() as f64
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pass {}, lambda = {}", self.passes, brief(self.lambda))?;
        write!(
            f,
            ", samples = {}, ignored = {}",
            self.samples, self.ignored
        )?;
        write!(
            f,
            ", zero = {}, not_finite = {}",
            self.zero, self.not_finite
        )?;
        if self.samples == 0 {
            return Ok(());
        }
        let share = |count: usize| count as f64 / self.samples as f64;
        let list = |values: Vec<f64>| values.into_iter().map(brief).collect::<Vec<_>>().join(" ");
        for (key, value) in [
            ("angle_mean", self.mean_angle()),
            ("angle_p95", self.percentile(0.95)),
            ("feature_norm", self.feature_norm),
            ("weight_norm", self.weight_norm),
            ("holds", share(self.holds)),
        ] {
            write!(f, ", {key} = {}", brief(value))?;
        }
        let segments = self.segments.iter().map(|&count| share(count)).collect();
        let deciles = (0..=10).map(|i| self.percentile(f64::from(i) / 10.0));
        write!(f, ", segments = {}", list(segments))?;
        write!(f, ", angle_deciles = {}", list(deciles.collect()))
    }
}

/// The greatest of the values, or NaN where one is. Without any, -infinity.
fn greatest<T: Dtype>(values: &[T]) -> f64 {
    values.iter().fold(f64::NEG_INFINITY, |greatest, &value| {
        let value: f64 = value.into();
        if value > greatest || value.is_nan() {
            value
        } else {
            greatest
        }
    })
}

/// Six digits, as Caffe logs numbers.
fn brief(value: f64) -> String {
    let rounded: f64 = format!("{value:.5e}").parse().unwrap_or(value);
    if rounded == 0.0 || !rounded.is_finite() || (1e-4..1e7).contains(&rounded.abs()) {
        rounded.to_string()
    } else {
        format!("{rounded:e}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_six_digits() {
        for (value, text) in [
            (0.0, "0"),
            (-0.5, "-0.5"),
            (123.456789, "123.457"),
            (43.0, "43"),
            (1e6, "1000000"),
            (1.0 / 3.0, "0.333333"),
            (1.25e-5, "1.25e-5"),
            (1.23456789e300, "1.23457e300"),
            (f64::INFINITY, "inf"),
            (f64::NAN, "NaN"),
        ] {
            assert_eq!(brief(value), text);
        }
    }
}
