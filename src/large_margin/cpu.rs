//! Forward and backward on host memory.
//!
//! Passes over memory beyond InnerProduct's own: forward reads X once and
//! each class weight row that occurs once; backward reads and writes dX and
//! the dW rows that occur once. Samples are visited class by class, in batch
//! order within a class: the row w_y and its norm serve all samples of a
//! class, and gradients of repeated labels add up in a fixed order.

use super::{Correction, LargeMarginInnerProduct, Sizes};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::gemm::{Gemm, Op};
use crate::vector::{Scale, add_scaled, norm};

/// What a backward pass needs of the last forward pass: O(M).
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// The samples that have a margin, sorted by class, then by number.
    targets: Vec<Target>,
}

/// A sample, its class, and its correction.
#[derive(Debug, Clone, Copy)]
struct Target {
    class: u32,
    sample: u32,
    correction: Correction,
}

/// The gradients that a backward pass may be asked for.
#[derive(Debug)]
pub struct Gradients<'a, T> {
    /// (M, K); overwritten. None: not wanted.
    pub features: Option<&'a mut [T]>,
    /// (N, K); added to. None: not wanted.
    pub weights: Option<&'a mut [T]>,
}

impl LargeMarginInnerProduct {
    /// One forward pass: `logits` (M, N) from `features` (M, K) and `weights`
    /// (N, K), with the margin on the target logits where there are `labels`
    /// (M). `plain`, where given, gets the logits without the margin.
    ///
    /// Counts the pass, so that lambda moves on.
    ///
    /// # Errors
    /// A label that is neither an integer in [0, N) nor `ignore_label`; the
    /// logits are then not touched.
    ///
    /// # Panics
    /// A slice whose length is not what the last reshape says.
    pub fn forward<T: Dtype>(
        &mut self,
        gemm: &impl Gemm<T>,
        features: &[T],
        labels: Option<&[T]>,
        weights: &[T],
        logits: &mut [T],
        plain: Option<&mut [T]>,
    ) -> Result<()> {
        let sizes = self.begin_forward()?;
        let Sizes {
            samples: m,
            classes: n,
            features: k,
            ..
        } = sizes;
        assert_eq!(features.len(), m * k, "features");
        assert_eq!(weights.len(), n * k, "class weights");
        assert_eq!(logits.len(), m * n, "logits");

        self.batch.targets.clear();
        if let Some(labels) = labels {
            assert_eq!(labels.len(), m, "labels");
            self.find_targets(labels)?;
        }

        if m * k == 0 {
            // An empty sum, and BLAS refuses a leading dimension of 0.
            logits.fill(T::default());
        } else {
            let (x, w) = ((Op::Plain, features), (Op::Transposed, weights));
            gemm.gemm([m, n, k], x, w, T::default(), logits);
        }
        if let Some(plain) = plain {
            plain.copy_from_slice(logits);
        }

        for group in self.batch.targets.chunk_by_mut(|a, b| a.class == b.class) {
            let class = group[0].class as usize;
            let w = norm(&weights[class * k..][..k]);
            for target in group {
                let sample = target.sample as usize;
                let x = norm(&features[sample * k..][..k]);
                let logit = &mut logits[sample * n + class];
                let f = (*logit).into();
                target.correction = Correction::new(&self.margin, self.lambda, x, w, f);
                if target.correction.applies() {
                    *logit = T::from_f64(f + target.correction.logit);
                }
            }
        }
        Ok(())
    }

    /// The backward pass of the last forward pass, on the same `features` and
    /// `weights`, with the gradient `logits` (M, N) of the loss.
    ///
    /// ```text
    /// dx_i  = sum_j g_ij w_j  +  g_iy (a w_y + b |w_y|/|x_i| x_i)
    /// dw_j += sum_i g_ij x_i  +  the same with x and w exchanged, for j = y
    /// ```
    ///
    /// # Panics
    /// A slice whose length is not what the last reshape says.
    pub fn backward<T: Dtype>(
        &self,
        gemm: &impl Gemm<T>,
        logits: &[T],
        features: &[T],
        weights: &[T],
        gradients: Gradients<'_, T>,
    ) -> Result<()> {
        let Sizes {
            samples: m,
            classes: n,
            features: k,
            ..
        } = self
            .sizes
            .ok_or_else(|| Error::new("backward before the first forward"))?;
        assert_eq!(logits.len(), m * n, "logits");
        assert_eq!(features.len(), m * k, "features");
        assert_eq!(weights.len(), n * k, "class weights");
        if m * k == 0 {
            return Ok(());
        }
        if let Some(dw) = gradients.weights {
            let (g, x) = ((Op::Transposed, logits), (Op::Plain, features));
            gemm.gemm([n, k, m], g, x, T::from_f64(1.0), dw);
            for (t, g) in self.targets_with_gradient(logits) {
                let row = t.class as usize * k..(t.class as usize + 1) * k;
                let x = &features[t.sample as usize * k..][..k];
                let own = Scale {
                    value: g * t.correction.b,
                    numerator: t.correction.x,
                    denominator: t.correction.w,
                };
                let w = &weights[row.clone()];
                add_scaled(&mut dw[row], g * t.correction.a, x, own, w);
            }
        }
        if let Some(dx) = gradients.features {
            let (g, w) = ((Op::Plain, logits), (Op::Plain, weights));
            gemm.gemm([m, k, n], g, w, T::default(), dx);
            for (t, g) in self.targets_with_gradient(logits) {
                let row = t.sample as usize * k..(t.sample as usize + 1) * k;
                let w = &weights[t.class as usize * k..][..k];
                let own = Scale {
                    value: g * t.correction.b,
                    numerator: t.correction.w,
                    denominator: t.correction.x,
                };
                let x = &features[row.clone()];
                add_scaled(&mut dx[row], g * t.correction.a, w, own, x);
            }
        }
        Ok(())
    }

    /// The targets with something to correct, each with its top gradient g.
    fn targets_with_gradient<T: Dtype>(
        &self,
        logits: &[T],
    ) -> impl Iterator<Item = (&Target, f64)> {
        self.batch.targets.iter().filter_map(|t| {
            let g: f64 = logits[t.sample as usize * self.classes + t.class as usize].into();
            (t.correction.applies() && g != 0.0).then_some((t, g))
        })
    }

    /// Checks every label, and lists the targets unless m = 1, which corrects
    /// nothing.
    fn find_targets<T: Dtype>(&mut self, labels: &[T]) -> Result<()> {
        for (sample, &label) in labels.iter().enumerate() {
            let value: f64 = label.into();
            if self.ignore_label.is_some_and(|i| f64::from(i) == value) {
                continue;
            }
            if !(value >= 0.0 && value < self.classes as f64 && value.fract() == 0.0) {
                return Err(self.bad_label(sample, value));
            }
            if self.margin.m() > 1 {
                self.batch.targets.push(Target {
                    class: value as u32,
                    sample: sample as u32,
                    correction: Correction::default(),
                });
            }
        }
        self.batch
            .targets
            .sort_unstable_by_key(|t| (t.class, t.sample));
        Ok(())
    }
}
