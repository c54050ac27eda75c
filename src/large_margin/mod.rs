//! The LargeMarginInnerProduct layer.
//!
//! This module holds what CPU and GPU share: the checked parameters, the
//! shapes and the lambda descent, and the coefficients of one sample. The
//! data flows through [`cpu`], or, in GPU mode, `gpu`. What a pass tells of the
//! training is for [`diagnosis`].
//!
//! With features x_i, class weights w_j and label y the logits are
//! `f_ij = <w_j, x_i>`, but for the target logit, `j = y`, which becomes
//! (paper, section 5.1, with `c = cos(theta)` the cosine between x_i and w_y)
//!
//! ```text
//! (lambda f + |x_i||w_y| psi(c)) / (1 + lambda)
//! ```
//!
//! That is the inner product plus a correction of one entry a sample, and the
//! gradient is InnerProduct's, on a top gradient that is changed in one entry a
//! sample, plus a multiple of x_i or w_y. The layer never touches the other
//! M x (N - 1) logits.

mod correction;
pub mod cpu;
pub mod diagnosis;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod margin;
pub mod row;
pub mod schedule;

use crate::error::{Error, Result};
use crate::last::Last;
use crate::param::LargeMarginInnerProductParameter;
use margin::Margin;
use schedule::Schedule;

/// The sizes of the three matrices: features (M, K), class weights (N, K),
/// logits (M, N).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// M, samples.
    pub samples: usize,
    /// N, classes.
    pub classes: usize,
    /// K, features a sample.
    pub features: usize,
    /// Where the feature axes begin in the bottom's shape, never negative.
    pub axis: usize,
}

/// One layer: its parameters and what a backward pass needs of the forward
/// pass before it.
#[derive(Debug)]
pub struct LargeMarginInnerProduct {
    classes: usize,
    margin: Margin,
    schedule: Schedule,
    ignore_label: Option<i32>,
    axis: i32,
    first_pass: i64,
    passes: i64,
    lambda: f64,
    /// Forward passes from one diagnosis to the next; 0: there is none.
    log_every: i64,
    sizes: Option<Sizes>,
    last: Last,
    batch: cpu::Batch,
    #[cfg(feature = "cuda")]
    gpu: Option<gpu::State>,
}

impl LargeMarginInnerProduct {
    /// A layer as `param` describes it, before its first forward pass.
    ///
    /// # Errors
    /// A field out of its range, by name and value.
    pub fn new(param: &LargeMarginInnerProductParameter) -> Result<Self> {
        let classes = match param.num_output {
            // inner_product_param is left where InnerProduct only got our type.
            None => {
                return Err(Error::new(
                    "num_output is missing: the number of classes, in \
                     largemargin_inner_product_param",
                ));
            }
            Some(n) if n == 0 || n > i32::MAX as u32 => {
                return Err(Error::new(format!(
                    "num_output: {n} is outside [1, {}]",
                    i32::MAX
                )));
            }
            Some(n) => n as usize,
        };
        let iteration = param.iteration();
        if iteration < 0 {
            return Err(Error::new(format!("iteration: {iteration} is negative")));
        }
        if param.passes() < 0 {
            return Err(Error::new(format!(
                "passes: {} is negative",
                param.passes()
            )));
        }
        let passes = param.passes().max(i64::from(iteration));
        let schedule = Schedule::new(param)?;
        Ok(LargeMarginInnerProduct {
            classes,
            margin: Margin::new(param.angular_margin()?)?,
            lambda: schedule.lambda(passes.saturating_add(1)),
            schedule,
            ignore_label: param.ignore_label,
            axis: param.axis(),
            first_pass: passes,
            passes,
            log_every: 0,
            sizes: None,
            last: Last::None,
            batch: cpu::Batch::default(),
            #[cfg(feature = "cuda")]
            gpu: None,
        })
    }

    /// Takes the shapes of the bottoms and returns the sizes they give.
    /// `labels` is the labels' shape, None where there is no label bottom.
    ///
    /// # Errors
    /// `axis` outside the features' shape, an M or K beyond what an int holds,
    /// a K other than at the first call (the class weights have it), a number
    /// of labels other than M.
    pub fn reshape(&mut self, features: &[i32], labels: Option<&[i32]>) -> Result<Sizes> {
        let axes = features.len();
        let axis = match self.axis {
            a if a >= 0 && (a as usize) < axes => a as usize,
            a if a < 0 && a.unsigned_abs() as usize <= axes => axes - a.unsigned_abs() as usize,
            a => {
                return Err(Error::new(format!(
                    "axis: {a} is out of range for features of {axes} axes, shape {features:?}"
                )));
            }
        };
        // Caffe lets any shape pass that has a 0 in front.
        let count = |dims: &[i32]| {
            dims.iter()
                .try_fold(1i32, |count, &d| count.checked_mul(d))
                .and_then(|count| usize::try_from(count).ok())
                .ok_or_else(|| {
                    Error::new(format!(
                        "features of shape {features:?} are too many: there may be {} \
                         samples, the positions before axis {axis}, and values of each",
                        i32::MAX
                    ))
                })
        };
        let sizes = Sizes {
            samples: count(&features[..axis])?,
            classes: self.classes,
            features: count(&features[axis..])?,
            axis,
        };
        if let Some(before) = self.sizes.filter(|s| s.features != sizes.features) {
            return Err(Error::new(format!(
                "features of shape {features:?} have K = {} from axis {axis} on, \
                 but the class weights were made for K = {}",
                sizes.features, before.features
            )));
        }
        if let Some(labels) = labels {
            let number: i64 = labels.iter().map(|&d| i64::from(d)).product();
            if usize::try_from(number) != Ok(sizes.samples) {
                return Err(Error::new(format!(
                    "{number} labels of shape {labels:?} for {} samples: features of shape \
                     {features:?} hold one sample for each position before axis {axis}. \
                     Several labels a sample are cut by a Slice layer, for a layer like this \
                     one each; where every position has its label, axis begins the features \
                     behind the positions",
                    sizes.samples
                )));
            }
        }
        if self.sizes != Some(sizes) {
            self.last = Last::None;
        }
        self.sizes = Some(sizes);
        Ok(sizes)
    }

    /// Bytes of device memory that a pass uses and that forward leaves to
    /// backward: some 60 a sample and, for sums over classes of many samples, up
    /// to 2.5 MiB or an eighth of X in float, whichever is more. 0 in a build for
    /// the CPU alone.
    pub fn device_bytes(&self) -> usize {
        #[cfg(feature = "cuda")]
        if let Some(sizes) = self.sizes {
            return gpu::Scratch::bytes(sizes);
        }
        0
    }

    /// The margin m.
    pub fn margin(&self) -> u32 {
        self.margin.m()
    }

    /// The forward passes behind this layer, those that its parameter named at
    /// the start and those of the run it resumes included. A snapshot keeps it
    /// as the parameter `passes`.
    pub fn passes(&self) -> i64 {
        self.passes
    }

    /// lambda of the last forward pass; before the first since the start or a
    /// resume, of the one to come.
    pub fn lambda(&self) -> f64 {
        self.lambda
    }

    /// Goes on from `passes` forward passes in all, or from those that the
    /// layer's parameter names (the higher of `iteration` and `passes`) where
    /// they are more: the original layer is resumed by hand that way. The two
    /// are never added.
    pub fn resume(&mut self, passes: i64) {
        self.passes = passes.max(self.first_pass);
        self.lambda = self.schedule.lambda(self.passes.saturating_add(1));
    }

    /// Counts a forward pass; the count goes up before it is used.
    fn begin_forward(&mut self) -> Result<Sizes> {
        let sizes = self.sizes()?;
        self.last = Last::None;
        self.passes = self.passes.saturating_add(1);
        self.lambda = self.schedule.lambda(self.passes);
        Ok(sizes)
    }

    fn sizes(&self) -> Result<Sizes> {
        self.sizes
            .ok_or_else(|| Error::new("forward or backward before the first reshape"))
    }

    /// The class that `label` names; None where it is `ignore_label`. Kernels
    /// decide it as this does.
    ///
    /// # Errors
    /// It is neither that nor an integer in [0, N).
    fn class_of(&self, sample: usize, label: f64) -> Result<Option<u32>> {
        if self.ignore_label.is_some_and(|i| f64::from(i) == label) {
            return Ok(None);
        }
        if label >= 0.0 && label < self.classes as f64 && label.fract() == 0.0 {
            // N is at most i32::MAX.
            return Ok(Some(label as u32));
        }
        Err(self.bad_label(sample, label))
    }

    fn bad_label(&self, sample: usize, value: f64) -> Error {
        let ignored = match self.ignore_label {
            Some(i) => format!(" and not ignore_label ({i})"),
            None => String::new(),
        };
        Error::new(format!(
            "sample {sample}: label {} is not an integer in [0, {}){ignored}",
            shortest(value),
            self.classes
        ))
    }
}

/// `value`, with no more decimals than tell it from other floats if it is one.
fn shortest(value: f64) -> String {
    let float = value as f32;
    if f64::from(float) == value && value.fract() != 0.0 {
        float.to_string()
    } else {
        value.to_string()
    }
}
