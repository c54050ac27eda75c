//! Forward and backward on host memory.
//!
//! Passes over memory beyond InnerProduct's own: forward reads X once and
//! each class weight row that occurs once; backward reads X once more, to begin
//! each row of dX as a multiple of its own x, and adds a multiple of its own w
//! to each row of dW that occurs. Samples are visited class by class, in batch
//! order within a class: the row w_y and its norm serve all samples of a class,
//! and gradients of repeated labels add up in a fixed order.

use super::correction::Correction;
use super::row::{Factor, add_scaled, norm, set_scaled};
use super::{LargeMarginInnerProduct, Sizes};
use crate::blas::{Gemm, Op};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::last::Last;

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

impl Target {
    /// Where the row of a matrix with a row a class lies, `k` long.
    fn class_row(&self, k: usize) -> std::ops::Range<usize> {
        self.class as usize * k..(self.class as usize + 1) * k
    }

    /// Where the row of a matrix with a row a sample lies.
    fn sample_row(&self, k: usize) -> std::ops::Range<usize> {
        self.sample as usize * k..(self.sample as usize + 1) * k
    }

    /// Where the target entry of a matrix (M, N) lies.
    fn entry(&self, classes: usize) -> usize {
        self.sample as usize * classes + self.class as usize
    }
}

/// The blobs of a forward pass.
#[derive(Debug)]
pub struct Forward<'a, T> {
    /// X, (M, K).
    pub features: &'a [T],
    /// (M). None: no sample has a margin.
    pub labels: Option<&'a [T]>,
    /// W, (N, K).
    pub weights: &'a [T],
    /// (M, N); overwritten.
    pub logits: &'a mut [T],
    /// (M, N); overwritten by the logits without the margin. None: not wanted.
    pub plain: Option<&'a mut [T]>,
}

/// The blobs of a backward pass.
#[derive(Debug)]
pub struct Backward<'a, T> {
    /// (M, N), the gradient of the loss by the logits. Changed on the way, and
    /// after the pass what it was before, bit by bit.
    pub logits_diff: &'a mut [T],
    /// (M, N), that by the logits without the margin. None: there is none.
    pub plain_diff: Option<&'a [T]>,
    /// X, (M, K), of the forward pass.
    pub features: &'a [T],
    /// W, (N, K), of the forward pass.
    pub weights: &'a [T],
    /// (M, K); overwritten. None: not wanted.
    pub features_diff: Option<&'a mut [T]>,
    /// (N, K); added to. None: not wanted.
    pub weights_diff: Option<&'a mut [T]>,
}

impl LargeMarginInnerProduct {
    /// One forward pass. Counts it, so that lambda moves on.
    ///
    /// # Errors
    /// A label that is neither an integer in [0, N) nor `ignore_label`; the
    /// logits are then not touched.
    ///
    /// # Panics
    /// A slice whose length is not what the last reshape says.
    pub fn forward<T: Dtype>(&mut self, gemm: &impl Gemm<T>, pass: Forward<'_, T>) -> Result<()> {
        let Forward {
            features,
            labels,
            weights,
            logits,
            plain,
        } = pass;
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
            let w = norm(&weights[group[0].class_row(k)]);
            for target in group {
                let x = norm(&features[target.sample_row(k)]);
                let logit = &mut logits[target.entry(n)];
                let f = (*logit).into();
                target.correction = Correction::new(&self.margin, self.lambda, x, w, f);
                if target.correction.applies() {
                    *logit = T::from_f64(f + target.correction.logit);
                }
            }
        }
        self.batch.targets.retain(|t| t.correction.applies());
        self.last = Last::Cpu;
        Ok(())
    }

    /// The backward pass of the last forward pass. With g the target entry of
    /// a sample's gradient:
    ///
    /// ```text
    /// dx_i  = sum_j g'_ij w_j  +  g b |w_y|/|x_i| x_i
    /// dw_j += sum_i g'_ij x_i  +  sum over its samples of g b |x_i|/|w_j| w_j
    /// g'    = the gradient, with g (1 + a) for g
    /// ```
    ///
    /// # Errors
    /// No forward pass on host memory came before.
    ///
    /// # Panics
    /// A slice whose length is not what the last reshape says.
    pub fn backward<T: Dtype>(&self, gemm: &impl Gemm<T>, pass: Backward<'_, T>) -> Result<()> {
        let Backward {
            logits_diff,
            plain_diff,
            features,
            weights,
            features_diff,
            weights_diff,
        } = pass;
        self.last.allows(Last::Cpu)?;
        let Sizes {
            samples: m,
            classes: n,
            features: k,
            ..
        } = self.sizes()?;
        assert_eq!(logits_diff.len(), m * n, "gradient of the logits");
        assert_eq!(features.len(), m * k, "features");
        assert_eq!(weights.len(), n * k, "class weights");
        if m * k == 0 {
            return Ok(());
        }
        let (zero, one) = (T::default(), T::from_f64(1.0));
        let folded = Folded::new(logits_diff, &self.batch.targets, n);
        let targets = folded.targets();
        if let Some(dw) = weights_diff {
            let x = (Op::Plain, features);
            gemm.gemm([n, k, m], (Op::Transposed, folded.diff), x, one, dw);
            if let Some(plain) = plain_diff {
                gemm.gemm([n, k, m], (Op::Transposed, plain), x, one, dw);
            }
            for class in targets.chunk_by(|(a, _), (b, _)| a.class == b.class) {
                let own = class
                    .iter()
                    .map(|(t, g)| g * t.correction.b * t.correction.x);
                let (first, _) = class[0];
                let factor = Factor {
                    value: own.sum(),
                    numerator: 1.0,
                    denominator: first.correction.w,
                };
                let row = first.class_row(k);
                add_scaled(&mut dw[row.clone()], factor, &weights[row]);
            }
        }
        if let Some(dx) = features_diff {
            let w = (Op::Plain, weights);
            // The multiples of x first, which the product then adds to: BLAS
            // would else fill dx with zeros, and dx be read once more.
            let beta = if targets.is_empty() { zero } else { one };
            if (1..m).contains(&targets.len()) {
                dx.fill(zero);
            }
            for (target, g) in targets {
                let factor = Factor {
                    value: g * target.correction.b,
                    numerator: target.correction.w,
                    denominator: target.correction.x,
                };
                let row = target.sample_row(k);
                set_scaled(&mut dx[row.clone()], factor, &features[row]);
            }
            gemm.gemm([m, k, n], (Op::Plain, folded.diff), w, beta, dx);
            if let Some(plain) = plain_diff {
                gemm.gemm([m, k, n], (Op::Plain, plain), w, one, dx);
            }
        }
        Ok(())
    }

    /// Checks every label, and lists the targets unless m = 1, which corrects
    /// nothing.
    fn find_targets<T: Dtype>(&mut self, labels: &[T]) -> Result<()> {
        for (sample, &label) in labels.iter().enumerate() {
            let value: f64 = label.into();
            if let Some(class) = self.class_of(sample, value)?
                && self.margin.m() > 1
            {
                self.batch.targets.push(Target {
                    class,
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

/// A top gradient with a of each target folded in: the products on it bring the
/// cross terms along. Dropped, it is again what it was, whatever came between.
struct Folded<'a, T: Dtype> {
    diff: &'a mut [T],
    classes: usize,
    targets: &'a [Target],
    /// What the targets' entries were, in the same order.
    entries: Vec<T>,
}

impl<'a, T: Dtype> Folded<'a, T> {
    fn new(diff: &'a mut [T], targets: &'a [Target], classes: usize) -> Self {
        let fold = |target: &Target| {
            let entry = &mut diff[target.entry(classes)];
            let old = *entry;
            *entry = T::from_f64(old.into() * (1.0 + target.correction.a));
            old
        };
        let entries = targets.iter().map(fold).collect();
        Folded {
            diff,
            classes,
            targets,
            entries,
        }
    }

    /// The targets, each with g.
    fn targets(&self) -> Vec<(&'a Target, f64)> {
        let g = self.entries.iter().map(|&g| g.into());
        self.targets.iter().zip(g).collect()
    }
}

impl<T: Dtype> Drop for Folded<'_, T> {
    fn drop(&mut self) {
        for (target, &old) in self.targets.iter().zip(&self.entries) {
            self.diff[target.entry(self.classes)] = old;
        }
    }
}
