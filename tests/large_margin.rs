//! The margin layer against a plain f64 oracle, against numerical gradients,
//! and on input that is not what it should be.

mod common;

use std::f64::consts::PI;
use std::panic::{AssertUnwindSafe, catch_unwind};

use common::NaiveGemm;
use lsoftmax::blas::{Gemm, Op};
use lsoftmax::dtype::Dtype;
use lsoftmax::error::Result;
use lsoftmax::large_margin::LargeMarginInnerProduct;
use lsoftmax::large_margin::cpu::{Backward, Forward};
use lsoftmax::large_margin::diagnosis::{Diagnosis, Pass};
use lsoftmax::large_margin::margin::Margin;
use lsoftmax::param::LargeMarginInnerProductParameter;
use proptest::prelude::*;

/// Features (M, K), class weights (N, K), labels (M), top gradient (M, N).
#[derive(Debug, Clone)]
struct Problem {
    k: usize,
    n: usize,
    x: Vec<f64>,
    w: Vec<f64>,
    labels: Vec<f64>,
    g: Vec<f64>,
}

/// What a forward and a backward pass gave.
#[derive(Debug, Clone, PartialEq)]
struct Outcome<T> {
    top: Vec<T>,
    dx: Vec<T>,
    dw: Vec<T>,
}

fn param(n: usize, m: u32, lambda: f32) -> LargeMarginInnerProductParameter {
    LargeMarginInnerProductParameter {
        num_output: Some(n as u32),
        margin: Some(m),
        base: Some(lambda),
        ..Default::default()
    }
}

fn layer(param: &LargeMarginInnerProductParameter, m: usize, k: usize) -> LargeMarginInnerProduct {
    let mut layer = LargeMarginInnerProduct::new(param).unwrap();
    layer
        .reshape(&[m as i32, k as i32], Some(&[m as i32]))
        .unwrap();
    layer
}

/// A fixed sequence in [-1, 1).
fn noise(seed: u64, len: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .collect()
}

impl Problem {
    fn random(seed: u64, m: usize, n: usize, k: usize) -> Self {
        let labels = noise(seed + 3, m);
        Problem {
            k,
            n,
            x: noise(seed, m * k),
            w: noise(seed + 1, n * k),
            labels: labels
                .iter()
                .map(|v| ((v + 1.0) * 0.5 * n as f64).floor())
                .collect(),
            g: noise(seed + 2, m * n),
        }
    }

    /// One sample at each angle to the weights of its class, which repeat.
    fn at_angles(seed: u64, angles: &[f64], n: usize, k: usize) -> Self {
        let mut p = Self::random(seed, angles.len(), n, k);
        for (i, &theta) in angles.iter().enumerate() {
            let y = i % n;
            p.labels[i] = y as f64;
            let w = &p.w[y * k..][..k];
            let unit = |v: &[f64]| -> Vec<f64> {
                let norm = v.iter().map(|a| a * a).sum::<f64>().sqrt();
                v.iter().map(|a| a / norm).collect()
            };
            let along = unit(w);
            let x = &p.x[i * k..][..k];
            let dot: f64 = x.iter().zip(&along).map(|(a, b)| a * b).sum();
            let across: Vec<f64> = x.iter().zip(&along).map(|(a, b)| a - dot * b).collect();
            let across = unit(&across);
            let length = 1.0 + 0.1 * i as f64;
            for j in 0..k {
                p.x[i * k + j] = length * (theta.cos() * along[j] + theta.sin() * across[j]);
            }
        }
        p
    }

    fn run(&self, param: &LargeMarginInnerProductParameter) -> Outcome<f64> {
        let (x, w, labels, g) = (&self.x, &self.w, &self.labels, &self.g);
        run(param, (x, w, labels, g), self.k, self.n)
    }

    fn run_f32(&self, param: &LargeMarginInnerProductParameter) -> Outcome<f32> {
        let cast = |v: &[f64]| v.iter().map(|&a| a as f32).collect::<Vec<f32>>();
        let (x, w) = (cast(&self.x), cast(&self.w));
        let (labels, g) = (cast(&self.labels), cast(&self.g));
        run(param, (&x, &w, &labels, &g), self.k, self.n)
    }

    /// The layer's formulas in angles, as the paper has them, a loop an index.
    fn oracle(&self, m: u32, lambda: f64) -> Outcome<f64> {
        let (k, n) = (self.k, self.n);
        let gemm = |i: usize, j: usize| -> f64 {
            (0..k).map(|l| self.x[i * k + l] * self.w[j * k + l]).sum()
        };
        let samples = self.labels.len();
        let mut top = vec![0.0; samples * n];
        let (mut dx, mut dw) = (vec![0.0; samples * k], vec![0.0; n * k]);
        for i in 0..samples {
            for j in 0..n {
                top[i * n + j] = gemm(i, j);
                for l in 0..k {
                    dx[i * k + l] += self.g[i * n + j] * self.w[j * k + l];
                    dw[j * k + l] += self.g[i * n + j] * self.x[i * k + l];
                }
            }
            let y = self.labels[i] as usize;
            let norm = |v: &[f64]| v.iter().map(|a| a * a).sum::<f64>().sqrt();
            let (xn, wn) = (norm(&self.x[i * k..][..k]), norm(&self.w[y * k..][..k]));
            if xn * wn == 0.0 {
                continue;
            }
            let f = gemm(i, y);
            let theta = (f / (xn * wn)).clamp(-1.0, 1.0).acos();
            let mm = f64::from(m);
            let seg = (mm * theta / PI).floor().min(mm - 1.0);
            let sign = (-1f64).powf(seg);
            let psi = sign * (mm * theta).cos() - 2.0 * seg;
            // d psi / d cos(theta); sin(m theta) / sin(theta) tends to +-m.
            let ratio = if theta.sin() < 1e-9 {
                mm * if theta < 1.0 {
                    1.0
                } else {
                    (-1f64).powf(mm - 1.0)
                }
            } else {
                (mm * theta).sin() / theta.sin()
            };
            let dpsi = sign * mm * ratio;
            top[i * n + y] = (lambda * f + xn * wn * psi) / (1.0 + lambda);
            let g = self.g[i * n + y];
            let c = theta.cos();
            for l in 0..k {
                let (xl, wl) = (self.x[i * k + l], self.w[y * k + l]);
                // The gradient of |x||w| psi(c), less the plain one.
                let by_x = wn * psi * xl / xn + dpsi * (wl - c * wn * xl / xn) - wl;
                let by_w = xn * psi * wl / wn + dpsi * (xl - c * xn * wl / wn) - xl;
                dx[i * k + l] += g * by_x / (1.0 + lambda);
                dw[y * k + l] += g * by_w / (1.0 + lambda);
            }
        }
        Outcome { top, dx, dw }
    }
}

fn run<T: Dtype>(
    param: &LargeMarginInnerProductParameter,
    (x, w, labels, g): (&[T], &[T], &[T], &[T]),
    k: usize,
    n: usize,
) -> Outcome<T> {
    let m = labels.len();
    let mut layer = layer(param, m, k);
    let mut out = Outcome {
        // Written over, whatever was there.
        top: vec![T::from_f64(f64::NAN); m * n],
        dx: vec![T::from_f64(f64::NAN); m * k],
        dw: vec![T::default(); n * k],
    };
    forward(&mut layer, x, Some(labels), w, &mut out.top).unwrap();
    let mut diff = g.to_vec();
    let pass = Backward {
        features_diff: Some(&mut out.dx),
        weights_diff: Some(&mut out.dw),
        ..no_gradients(&mut diff, x, w)
    };
    layer.backward(&NaiveGemm, pass).unwrap();
    let bits = |v: &[T]| v.iter().map(|&v| bits(v)).collect::<Vec<u64>>();
    assert_eq!(bits(&diff), bits(g), "the gradient of the logits stays");
    out
}

/// The bits of a value, also of a NaN.
fn bits<T: Dtype>(value: T) -> u64 {
    let mut bits = [0; 8];
    // SAFETY: an f32 or f64, of 4 or 8 bytes.
    unsafe {
        let from = std::ptr::from_ref(&value).cast::<u8>();
        std::ptr::copy_nonoverlapping(from, bits.as_mut_ptr(), size_of::<T>());
    }
    u64::from_le_bytes(bits)
}

/// A forward pass without the plain logits.
fn forward<T: Dtype>(
    layer: &mut LargeMarginInnerProduct,
    features: &[T],
    labels: Option<&[T]>,
    weights: &[T],
    logits: &mut [T],
) -> Result<()> {
    let pass = Forward {
        features,
        labels,
        weights,
        logits,
        plain: None,
    };
    layer.forward(&NaiveGemm, pass)
}

/// A backward pass that asks for nothing yet.
fn no_gradients<'a, T>(
    logits_diff: &'a mut [T],
    features: &'a [T],
    weights: &'a [T],
) -> Backward<'a, T> {
    Backward {
        logits_diff,
        plain_diff: None,
        features,
        weights,
        features_diff: None,
        weights_diff: None,
    }
}

fn assert_close<T: Into<f64> + Copy>(got: &[T], want: &[f64], tolerance: f64, what: &str) {
    let scale = want.iter().fold(1e-30f64, |s, v| s.max(v.abs()));
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let g: f64 = g.into();
        assert!(
            (g - w).abs() <= tolerance * scale,
            "{what}[{i}]: {g} instead of {w}"
        );
    }
}

/// Angles inside every segment of [0, pi] for m, and next to every border.
fn angles(m: u32) -> Vec<f64> {
    let mut all = vec![0.0, PI];
    for j in 0..m {
        let (from, width) = (PI * f64::from(j) / f64::from(m), PI / f64::from(m));
        all.extend([0.1, 0.35, 0.5, 0.8].map(|t| from + t * width));
        if j > 0 {
            for d in [1e-3, 1e-5, 1e-6] {
                all.extend([from - d, from + d]);
            }
        }
    }
    all
}

#[test]
fn equals_the_oracle_over_every_segment() {
    for m in 1..=8 {
        for lambda in [0.0, 5.0, 1000.0] {
            let p = Problem::at_angles(u64::from(m), &angles(m), 3, 7);
            let want = p.oracle(m, lambda);
            let param = param(p.n, m, lambda as f32);
            let got = p.run(&param);
            assert_close(&got.top, &want.top, 1e-9, "top");
            assert_close(&got.dx, &want.dx, 1e-9, "dx");
            assert_close(&got.dw, &want.dw, 1e-9, "dw");
            let got = p.run_f32(&param);
            assert_close(&got.top, &want.top, 1e-5, "f32 top");
            assert_close(&got.dx, &want.dx, 1e-4, "f32 dx");
            assert_close(&got.dw, &want.dw, 1e-4, "f32 dw");
        }
    }
}

/// d/dt of `loss` by the five-point stencil.
fn slope(h: f64, loss: impl Fn(f64) -> f64) -> f64 {
    (loss(-2.0 * h) - 8.0 * loss(-h) + 8.0 * loss(h) - loss(2.0 * h)) / (12.0 * h)
}

#[test]
fn gradients_are_the_slopes_within_1e_6() {
    let (n, k) = (3, 5);
    let mut worst: f64 = 0.0;
    for m in 1..=8 {
        for (i, theta) in angles(m).into_iter().enumerate() {
            let p = Problem::at_angles(i as u64 + 100, &[theta], n, k);
            let param = param(n, m, 0.3);
            let loss = |p: &Problem| -> f64 {
                p.run(&param).top.iter().zip(&p.g).map(|(t, g)| t * g).sum()
            };
            let got = p.run(&param);
            // The stencil must stay in the sample's own segment.
            let to_border = (1..m)
                .map(|j| (theta - PI * f64::from(j) / f64::from(m)).abs())
                .fold(1.0, f64::min);
            let h = (to_border / 50.0).min(5e-4);
            for (of, analytic) in [(0, &got.dx), (1, &got.dw)] {
                let scale = analytic.iter().fold(0f64, |s, v| s.max(v.abs()));
                for (l, &analytic) in analytic.iter().enumerate() {
                    let numeric = slope(h, |step| {
                        let mut p = p.clone();
                        [&mut p.x, &mut p.w][of][l] += step;
                        loss(&p)
                    });
                    let error = (numeric - analytic).abs() / scale;
                    worst = worst.max(error);
                    assert!(
                        error < 1e-6,
                        "m {m} theta {theta}: {numeric} instead of {analytic}, off by {error:e}"
                    );
                }
            }
        }
    }
    println!("largest relative error of a gradient: {worst:e}");
}

#[test]
fn margin_1_is_the_inner_product_bit_for_bit() {
    let p = Problem::random(5, 9, 4, 6);
    let got = p.run_f32(&param(4, 1, 3.0));
    let cast = |v: &[f64]| v.iter().map(|&a| a as f32).collect::<Vec<f32>>();
    let (x, w, g) = (cast(&p.x), cast(&p.w), cast(&p.g));
    let mut want = Outcome {
        top: vec![0f32; 9 * 4],
        dx: vec![0f32; 9 * 6],
        dw: vec![0f32; 4 * 6],
    };
    let (plain, transposed) = (Op::Plain, Op::Transposed);
    NaiveGemm.gemm([9, 4, 6], (plain, &x), (transposed, &w), 0.0, &mut want.top);
    NaiveGemm.gemm([4, 6, 9], (transposed, &g), (plain, &x), 1.0, &mut want.dw);
    NaiveGemm.gemm([9, 6, 4], (plain, &g), (plain, &w), 0.0, &mut want.dx);
    assert_eq!(got, want);
}

#[test]
fn without_labels_and_in_the_third_top_there_is_no_margin() {
    let p = Problem::random(6, 5, 4, 6);
    let want = p.run(&param(4, 1, 0.0)).top;
    let mut deployed = layer(&param(4, 4, 0.0), 5, 6);
    let mut top = vec![0.0; 20];
    forward(&mut deployed, &p.x, None, &p.w, &mut top).unwrap();
    assert_eq!(top, want);

    let mut trained = layer(&param(4, 4, 0.0), 5, 6);
    let mut plain = vec![f64::NAN; 20];
    let pass = Forward {
        features: &p.x,
        labels: Some(&p.labels),
        weights: &p.w,
        logits: &mut top,
        plain: Some(&mut plain),
    };
    trained.forward(&NaiveGemm, pass).unwrap();
    assert_eq!(plain, want);
    assert_ne!(top, want);
}

#[test]
fn ignored_samples_get_the_plain_inner_product() {
    let mut p = Problem::random(7, 6, 4, 5);
    let with = |ignore| LargeMarginInnerProductParameter {
        ignore_label: Some(ignore),
        ..param(4, 3, 0.5)
    };
    let margin = p.run(&with(-1));
    p.labels[2] = 255.0;
    let got = p.run(&with(255));
    let plain = p.oracle_with_plain_sample(2, &margin);
    assert_eq!(got.top, plain.0);
    assert_eq!(got.dx, plain.1);
}

impl Problem {
    /// (top, dx) of `margin` with those of sample `i` as without a margin.
    fn oracle_with_plain_sample(&self, i: usize, margin: &Outcome<f64>) -> (Vec<f64>, Vec<f64>) {
        let mut labels = self.clone();
        labels.labels.fill(0.0);
        let plain = labels.run(&param(self.n, 1, 0.0));
        let (mut top, mut dx) = (margin.top.clone(), margin.dx.clone());
        let (n, k) = (self.n, self.k);
        top[i * n..][..n].copy_from_slice(&plain.top[i * n..][..n]);
        dx[i * k..][..k].copy_from_slice(&plain.dx[i * k..][..k]);
        (top, dx)
    }
}

#[test]
fn a_bad_label_names_sample_and_value_and_touches_no_logit() {
    let p = Problem::random(8, 4, 3, 2);
    for m in [1, 4] {
        for (bad, shown) in [
            (3.0, "3"),
            (-1.0, "-1"),
            (0.5, "0.5"),
            (f64::from(0.1_f32), "0.1"),
            (1e30, "1000000000000000000000000000000"),
            (f64::NAN, "NaN"),
            (f64::INFINITY, "inf"),
        ] {
            let mut labels = p.labels.clone();
            labels[2] = bad;
            let mut top = vec![7.0; 12];
            let mut layer = layer(&param(3, m, 0.0), 4, 2);
            let done = forward(&mut layer, &p.x, Some(&labels), &p.w, &mut top);
            let message = done.unwrap_err().to_string();
            assert_eq!(
                message,
                format!("sample 2: label {shown} is not an integer in [0, 3)")
            );
            assert_eq!(top, [7.0; 12]);
        }
    }
}

#[test]
fn zero_features_or_weights_give_the_plain_inner_product() {
    let mut p = Problem::random(9, 3, 3, 4);
    p.labels = vec![0.0, 1.0, 2.0];
    p.x[..4].fill(0.0);
    p.w[4..8].fill(0.0);
    let got = p.run(&param(3, 4, 0.0));
    let plain = p.run(&param(3, 1, 0.0));
    assert_eq!(got.top[0..2 * 3], plain.top[0..2 * 3]);
    assert_eq!(got.dx[0..2 * 4], plain.dx[0..2 * 4]);
    assert!(
        got.top
            .iter()
            .chain(&got.dx)
            .chain(&got.dw)
            .all(|v| v.is_finite())
    );
}

#[test]
fn huge_and_tiny_features_scale_as_the_formulas_do() {
    for (scale, single) in [
        (1e-40, true),
        (1e-30, true),
        (1e15, true),
        (1e30, true),
        (1e-310, false),
        (1e-150, false),
        (1e150, false),
    ] {
        let p = Problem::at_angles(11, &[0.2, 1.1, 2.0, 3.0], 2, 6);
        let want = p.run(&param(2, 4, 0.5));
        let mut scaled = p.clone();
        scaled.x.iter_mut().for_each(|v| *v *= scale);
        let got = scaled.run(&param(2, 4, 0.5));
        let back = |v: &[f64]| v.iter().map(|a| a / scale).collect::<Vec<f64>>();
        assert_close(&back(&got.top), &want.top, 1e-9, "top");
        assert_close(&got.dx, &want.dx, 1e-9, "dx");
        assert_close(&back(&got.dw), &want.dw, 1e-9, "dw");
        if single {
            let got = scaled.run_f32(&param(2, 4, 0.5));
            assert_close(&got.dx, &want.dx, 1e-4, "f32 dx");
        }
    }
}

#[test]
fn what_is_not_finite_flows_as_through_an_inner_product() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let mut p = Problem::random(12, 4, 3, 5);
        p.x[7] = bad;
        let got = p.run(&param(3, 4, 0.5));
        let plain = p.run(&param(3, 1, 0.5));
        let same = |a: &[f64], b: &[f64]| {
            a.iter()
                .zip(b)
                .all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()))
        };
        assert!(same(&got.top[3..6], &plain.top[3..6]), "{:?}", got.top);
        assert!(same(&got.dx[5..10], &plain.dx[5..10]));
        // The other samples do not see it.
        let others = got.top[..3].iter().chain(&got.top[6..]);
        assert!(others.chain(&got.dx[..5]).all(|v| v.is_finite()));
    }
}

#[test]
fn an_inner_product_that_overflows_flows_out_as_infinity() {
    let (x, w) = ([3e38f32; 4], [3e38f32; 4]);
    let got = run(&param(1, 4, 0.0), (&x, &w, &[0.0], &[1.0]), 4, 1);
    assert_eq!(got.top, [f32::INFINITY]);
    assert_eq!(got.dx, w);
}

#[test]
fn empty_batches_and_empty_features_are_no_error() {
    let param = param(3, 4, 1.0);
    let mut none = layer(&param, 0, 5);
    forward::<f32>(&mut none, &[], Some(&[]), &[0.5; 15], &mut []).unwrap();
    let mut dw = [2f32; 15];
    let pass = Backward {
        weights_diff: Some(&mut dw[..]),
        ..no_gradients(&mut [], &[], &[0.5; 15])
    };
    none.backward(&NaiveGemm, pass).unwrap();
    assert_eq!(dw, [2.0; 15]);

    let mut top = [9f32; 6];
    let mut layer = layer(&param, 2, 0);
    forward(&mut layer, &[], Some(&[0.0, 2.0]), &[], &mut top).unwrap();
    assert_eq!(top, [0.0; 6]);
}

#[test]
fn the_batch_may_change_but_not_the_features() {
    let mut layer = layer(&param(3, 4, 1.0), 4, 6);
    let sizes = layer.reshape(&[2, 3, 2], Some(&[2])).unwrap();
    assert_eq!((sizes.samples, sizes.features, sizes.axis), (2, 6, 1));
    let message = layer.reshape(&[2, 5], Some(&[2])).unwrap_err().to_string();
    assert!(
        message.contains("K = 5") && message.contains("K = 6"),
        "{message}"
    );
}

#[test]
fn axis_splits_samples_from_features() {
    let sizes = |axis, labels: Option<&[i32]>| {
        let param = LargeMarginInnerProductParameter {
            axis: Some(axis),
            ..param(3, 2, 0.0)
        };
        let mut layer = LargeMarginInnerProduct::new(&param).unwrap();
        layer
            .reshape(&[2, 3, 4, 5], labels)
            .map(|s| (s.samples, s.features, s.axis))
            .map_err(|e| e.to_string())
    };
    assert_eq!(sizes(1, Some(&[2])), Ok((2, 60, 1)));
    assert_eq!(sizes(2, Some(&[6])), Ok((6, 20, 2)));
    assert_eq!(sizes(-1, Some(&[24])), Ok((24, 5, 3)));
    assert_eq!(sizes(0, None), Ok((1, 120, 0)));
    for bad in [4, -5, i32::MIN, i32::MAX] {
        assert!(
            sizes(bad, None)
                .unwrap_err()
                .starts_with(&format!("axis: {bad} "))
        );
    }
    assert_eq!(sizes(2, Some(&[2, 3])), Ok((6, 20, 2)));
    assert_eq!(sizes(0, Some(&[])), Ok((1, 120, 0)));
    for (shape, number) in [(&[2][..], 2), (&[6, 2], 12), (&[], 1)] {
        let message = sizes(2, Some(shape)).unwrap_err();
        let words = format!("{number} labels of shape {shape:?} for 6 samples");
        assert!(message.starts_with(&words), "{message}");
        assert!(message.contains("[2, 3, 4, 5]") && message.contains("Slice"));
    }
}

#[test]
fn parameters_out_of_range_are_refused_by_name_and_value() {
    type Set = fn(&mut LargeMarginInnerProductParameter);
    let cases: [(Set, &str); 8] = [
        (|p| p.num_output = None, "num_output is missing"),
        (|p| p.num_output = Some(0), "num_output: 0"),
        (|p| p.num_output = Some(u32::MAX), "num_output: 4294967295"),
        (|p| p.margin = Some(0), "margin: 0"),
        (|p| p.iteration = Some(-3), "iteration: -3"),
        (|p| p.passes = Some(-3), "passes: -3"),
        (|p| p.gamma = Some(-0.5), "gamma: -0.5"),
        (|p| p.base = Some(f32::NAN), "base: NaN"),
    ];
    for (set, words) in cases {
        let mut p = param(3, 2, 1.0);
        set(&mut p);
        let message = LargeMarginInnerProduct::new(&p).unwrap_err().to_string();
        assert!(message.starts_with(words), "{message}");
    }
}

#[test]
fn lambda_descends_with_each_forward_pass_and_resumes() {
    let falling = |iteration| LargeMarginInnerProductParameter {
        gamma: Some(1.0),
        power: Some(1.0),
        iteration: Some(iteration),
        ..param(1, 2, 120.0)
    };
    let pass = |layer: &mut LargeMarginInnerProduct| {
        forward(layer, &[1.0], Some(&[0.0]), &[1.0], &mut [0.0]).unwrap();
        layer.lambda()
    };
    let mut whole = layer(&falling(0), 1, 1);
    assert_eq!((whole.passes(), whole.lambda()), (0, 60.0));
    let lambdas: Vec<f64> = (0..5).map(|_| pass(&mut whole)).collect();
    assert_eq!(lambdas, [60.0, 40.0, 30.0, 24.0, 20.0]);

    let mut resumed = layer(&falling(0), 1, 1);
    resumed.resume(3);
    assert_eq!((resumed.passes(), resumed.lambda()), (3, 24.0));
    assert_eq!(pass(&mut resumed), 24.0);
    assert_eq!(pass(&mut resumed), 20.0);

    // By hand, as with the original layer: the higher one wins.
    let mut by_hand = layer(&falling(4), 1, 1);
    by_hand.resume(2);
    assert_eq!(pass(&mut by_hand), 20.0);

    // The count is absolute: it is not added to the start.
    let mut counted = layer(&falling(1), 1, 1);
    counted.resume(2);
    assert_eq!((counted.passes(), pass(&mut counted)), (2, 30.0));

    // A snapshot's own layer, read as a net: the higher count is the start.
    for (iteration, passes) in [(0, 3), (3, 0), (1, 3), (3, 1)] {
        let param = LargeMarginInnerProductParameter {
            passes: Some(passes),
            ..falling(iteration)
        };
        let mut read = layer(&param, 1, 1);
        assert_eq!((read.passes(), read.lambda()), (3, 24.0));
        read.resume(2);
        assert_eq!((read.passes(), pass(&mut read)), (3, 24.0));
    }

    let mut last = layer(&falling(i32::MAX), 1, 1);
    assert!(pass(&mut last).is_finite());
    assert_eq!(last.passes(), i64::from(i32::MAX) + 1);
    last.resume(i64::MAX);
    assert!(pass(&mut last).is_finite());
    assert_eq!(last.passes(), i64::MAX);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_target_logit_never_rises_and_others_stay(
        seed in 0u64..1000, m in 1usize..9, margin in 1u32..9, lambda in 0f32..100.0,
    ) {
        let p = Problem::random(seed, m, 5, 7);
        let plain = p.run(&param(5, 1, 0.0)).top;
        let got = p.run(&param(5, margin, lambda)).top;
        for (i, (g, f)) in got.iter().zip(&plain).enumerate() {
            if i % 5 == p.labels[i / 5] as usize {
                prop_assert!(g <= &(f + 1e-12));
            } else {
                prop_assert_eq!(g, f);
            }
        }
    }

    #[test]
    fn equals_the_oracle_at_random(
        seed in 0u64..10_000, m in 1usize..20, n in 1usize..9, k in 1usize..40,
        margin in 1u32..12, lambda in 0f32..10.0,
    ) {
        let p = Problem::random(seed, m, n, k);
        let (got, want) = (p.run(&param(n, margin, lambda)), p.oracle(margin, f64::from(lambda)));
        assert_close(&got.top, &want.top, 1e-9, "top");
        assert_close(&got.dx, &want.dx, 1e-8, "dx");
        assert_close(&got.dw, &want.dw, 1e-8, "dw");
    }

    #[test]
    fn the_order_of_the_batch_does_not_matter(seed in 0u64..1000, turn in 0usize..6) {
        let p = Problem::random(seed, 6, 3, 4);
        let mut turned = p.clone();
        turned.x.rotate_left(turn * 4);
        turned.labels.rotate_left(turn);
        turned.g.rotate_left(turn * 3);
        let (mut want, got) = (p.run(&param(3, 4, 0.5)), turned.run(&param(3, 4, 0.5)));
        want.top.rotate_left(turn * 3);
        want.dx.rotate_left(turn * 4);
        prop_assert_eq!(got.top, want.top);
        prop_assert_eq!(got.dx, want.dx);
        assert_close(&got.dw, &want.dw, 1e-12, "dw");
    }

    #[test]
    fn any_bytes_make_a_layer_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
        let layer = lsoftmax::param::decode(&bytes).and_then(|p| LargeMarginInnerProduct::new(&p));
        if let Ok(mut layer) = layer {
            let _ = layer.reshape(&[2, 3], Some(&[2]));
            prop_assert!(layer.lambda().is_finite());
        }
    }
}

#[test]
fn a_backward_pass_needs_a_forward_pass_of_its_shape() {
    let p = Problem::random(13, 4, 3, 5);
    let backward = |layer: &LargeMarginInnerProduct, m: usize| {
        let (mut g, mut dw) = (vec![0.5; m * 3], vec![0.0; 15]);
        let pass = Backward {
            weights_diff: Some(&mut dw),
            ..no_gradients(&mut g, &p.x[..m * 5], &p.w)
        };
        layer.backward(&NaiveGemm, pass).map_err(|e| e.to_string())
    };
    let refused = |layer: &LargeMarginInnerProduct, m| {
        let message = backward(layer, m).unwrap_err();
        assert!(
            message.starts_with("backward without a forward"),
            "{message}"
        );
    };
    let mut layer = layer(&param(3, 4, 1.0), 4, 5);
    refused(&layer, 4);
    forward(&mut layer, &p.x, Some(&p.labels), &p.w, &mut [0.0; 12]).unwrap();
    assert_eq!(backward(&layer, 4), Ok(()));
    // Caffe reshapes before each forward pass, mostly to the same shape.
    layer.reshape(&[4, 5], Some(&[4])).unwrap();
    assert_eq!(backward(&layer, 4), Ok(()));
    layer.reshape(&[2, 5], Some(&[2])).unwrap();
    refused(&layer, 2);
    layer.reshape(&[4, 5], Some(&[4])).unwrap();
    refused(&layer, 4);
    forward(&mut layer, &p.x, Some(&p.labels), &p.w, &mut [0.0; 12]).unwrap();
    // A pass that failed leaves nothing to build on.
    let bad = [0.0, 3.0, 0.0, 0.0];
    forward(&mut layer, &p.x, Some(&bad), &p.w, &mut [0.0; 12]).unwrap_err();
    refused(&layer, 4);
}

#[test]
fn a_gradient_by_the_plain_logits_is_the_inner_products() {
    let p = Problem::random(14, 7, 4, 6);
    let plain_diff = noise(99, 28);
    for m in [1, 4] {
        let param = param(4, m, 0.5);
        let mut want = p.run(&param);
        // That of InnerProduct, on top.
        let plain = Problem {
            g: plain_diff.clone(),
            ..p.clone()
        };
        let plain = plain.run(&self::param(4, 1, 0.0));
        let add = |a: &mut [f64], b: &[f64]| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        add(&mut want.dx, &plain.dx);
        add(&mut want.dw, &plain.dw);

        let mut layer = layer(&param, 7, 6);
        forward(&mut layer, &p.x, Some(&p.labels), &p.w, &mut [0.0; 28]).unwrap();
        let (mut g, mut dx, mut dw) = (p.g.clone(), vec![f64::NAN; 42], vec![0.0; 24]);
        let pass = Backward {
            plain_diff: Some(&plain_diff),
            features_diff: Some(&mut dx),
            weights_diff: Some(&mut dw),
            ..no_gradients(&mut g, &p.x, &p.w)
        };
        layer.backward(&NaiveGemm, pass).unwrap();
        assert_close(&dx, &want.dx, 1e-14, "dx");
        assert_close(&dw, &want.dw, 1e-14, "dw");
        assert_eq!(g, p.g);
    }
}

/// A BLAS that breaks down.
struct Broken;

impl<T: Dtype> Gemm<T> for Broken {
    fn gemm(&self, _: [usize; 3], _: (Op, &[T]), _: (Op, &[T]), _: T, _: &mut [T]) {
        panic!("no product today");
    }
}

#[test]
fn the_gradient_of_the_logits_is_whole_again_after_a_panic() {
    let mut p = Problem::random(15, 7, 4, 6);
    // What a conversion to f64 and back would not keep.
    let mut g: Vec<f32> = p.g.iter().map(|&g| g as f32).collect();
    g[p.labels[0] as usize] = f32::from_bits(0x7f80_0001);
    p.labels[1] = p.labels[0];
    let cast = |v: &[f64]| v.iter().map(|&v| v as f32).collect::<Vec<f32>>();
    let (x, w, labels) = (cast(&p.x), cast(&p.w), cast(&p.labels));
    let mut layer = layer(&param(4, 4, 0.0), 7, 6);
    forward(&mut layer, &x, Some(&labels), &w, &mut [0.0; 28]).unwrap();
    let mut diff = g.clone();
    for (dx, dw) in [(true, false), (false, true), (true, true)] {
        let (mut dx_blob, mut dw_blob) = ([0f32; 42], [0f32; 24]);
        let pass = Backward {
            features_diff: dx.then_some(&mut dx_blob[..]),
            weights_diff: dw.then_some(&mut dw_blob[..]),
            ..no_gradients(&mut diff, &x, &w)
        };
        let panic = catch_unwind(AssertUnwindSafe(|| layer.backward(&Broken, pass)));
        assert!(panic.is_err());
        assert!(diff.iter().zip(&g).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}

/// Gradients of a problem whose norms are at the ends of the type's range.
fn extremes<T: Dtype>(sizes: &[f64]) {
    for &x_size in sizes {
        for &w_size in sizes {
            let mut p = Problem::at_angles(16, &[0.1, 1.0, 1.6, 2.4, 3.1, 0.9], 2, 4);
            // Zeros beside values: 0 times what has overflowed is 0.
            for row in p.x.chunks_mut(4).chain(p.w.chunks_mut(4)) {
                row[3] = 0.0;
            }
            p.g.iter_mut().for_each(|g| *g *= 1e-3);
            let sized = |v: &[f64], size: f64| -> Vec<T> {
                let largest = v.iter().fold(0f64, |a, b| a.max(b.abs()));
                v.iter().map(|v| T::from_f64(v / largest * size)).collect()
            };
            let (x, w) = (sized(&p.x, x_size), sized(&p.w, w_size));
            let cast = |v: &[f64]| v.iter().map(|&v| T::from_f64(v)).collect::<Vec<T>>();
            let (labels, g) = (cast(&p.labels), cast(&p.g));
            for (m, lambda) in [(2, 0.0), (4, 0.0), (4, 1000.0)] {
                let param = param(2, m, lambda);
                let got = run(&param, (&x, &w, &labels, &g), 4, 2);
                for value in got.dx.iter().chain(&got.dw) {
                    let value: f64 = (*value).into();
                    assert!(
                        value.is_finite(),
                        "|x| {x_size:e}, |w| {w_size:e}, m {m}: {value}"
                    );
                }
            }
        }
    }
}

#[test]
fn gradients_are_finite_from_the_smallest_denormal_to_the_largest_float() {
    let largest = f64::from(f32::MAX) / 2.0;
    extremes::<f32>(&[1.5e-45, 1e-41, 1.2e-38, 1e-20, 1.0, 1e20, largest]);
    extremes::<f64>(&[5e-324, 1e-310, 2.3e-308, 1e-160, 1.0, 1e160, f64::MAX / 2.0]);
}

/// An angle in [0, pi] and a margin, for the properties of psi.
fn margins_and_cosines() -> impl Strategy<Value = (u32, f64)> {
    // Cosines by angle, so that they crowd at both ends as psi's segments do;
    // some are those of a border between segments, or next to one.
    (1u32..=Margin::MAX).prop_flat_map(|m| {
        let border = (0..=m).prop_map(move |j| f64::from(j) / f64::from(m));
        let near =
            (border.clone(), -1e-9..1e-9).prop_map(|(b, d): (f64, f64)| (b + d).clamp(0.0, 1.0));
        let angle = prop_oneof![0.0..=1.0, border, near];
        (Just(m), angle.prop_map(|t: f64| (PI * t).cos()))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn psi_falls_and_has_no_jump((m, c) in margins_and_cosines(), step in 1e-12..1e-3f64) {
        let margin = Margin::new(m).unwrap();
        let (psi, dpsi) = margin.at(c);
        let mm = f64::from(m);
        // The rounding of c, by the steepest slopes: m^2 of psi, m^4 of psi'.
        let rounding = 1e-15 * mm * mm;
        prop_assert!(psi <= 1.0 + rounding && psi >= 1.0 - 2.0 * mm - rounding);
        let around = rounding * mm * mm;
        prop_assert!((-around..=mm * mm + around).contains(&dpsi), "{dpsi}");
        let lower = (c - step).max(-1.0);
        let (below, _) = margin.at(lower);
        // It falls with c, by no more than its steepest slope, m^2.
        prop_assert!(below <= psi + rounding, "{below} above {psi}");
        prop_assert!(psi - below <= mm * mm * (c - lower) * (1.0 + 1e-9) + rounding);
    }

    #[test]
    fn psi_at_the_angle_is_equation_6((m, c) in margins_and_cosines()) {
        let (psi, _) = Margin::new(m).unwrap().at(c);
        let (mm, theta) = (f64::from(m), c.acos());
        let k = (mm * theta / PI).floor().min(mm - 1.0);
        let want = (-1f64).powf(k) * (mm * theta).cos() - 2.0 * k;
        prop_assert!((psi - want).abs() < 1e-13 * mm * mm + 1e-12, "{psi} {want}");
    }

    #[test]
    fn the_derivative_of_psi_is_its_slope((m, c) in margins_and_cosines()) {
        let margin = Margin::new(m).unwrap();
        let mm = f64::from(m);
        // |psi''| is at most m^2 (m^2 - 1) / 3, which bounds the error of a
        // difference over h; rounding in psi, the one that h divides.
        let h = 1e-6 / (mm * mm);
        let c = c.clamp(h - 1.0, 1.0 - h);
        let slope = (margin.at(c + h).0 - margin.at(c - h).0) / (2.0 * h);
        let (_, dpsi) = margin.at(c);
        let bound = mm.powi(4) / 3.0 * h + 1e-15 * mm * mm / h;
        prop_assert!((slope - dpsi).abs() <= bound, "{slope} {dpsi}, bound {bound}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    #[test]
    fn the_margin_sees_angles_alone(
        seed in 0u64..10_000, margin in 1u32..12, lambda in 0f32..10.0, by in -40i32..40,
    ) {
        // A power of 2 scales without rounding: logits and gradients follow to
        // the last bit.
        let scale = f64::from(by).exp2();
        let p = Problem::random(seed, 7, 4, 6);
        let param = param(4, margin, lambda);
        let plain = p.run(&param);
        let times = |v: &[f64]| v.iter().map(|a| a * scale).collect::<Vec<f64>>();

        let mut far = p.clone();
        far.x = times(&p.x);
        let got = far.run(&param);
        prop_assert_eq!(&got.top, &times(&plain.top));
        prop_assert_eq!(&got.dx, &plain.dx);
        prop_assert_eq!(&got.dw, &times(&plain.dw));

        let mut long = p.clone();
        long.w = times(&p.w);
        let got = long.run(&param);
        prop_assert_eq!(&got.top, &times(&plain.top));
        prop_assert_eq!(&got.dx, &times(&plain.dx));
        prop_assert_eq!(&got.dw, &plain.dw);
    }

    #[test]
    fn a_class_alone_scaled_changes_its_own_logits_alone(
        seed in 0u64..10_000, margin in 1u32..12, class in 0usize..4, scale in 1e-3..1e3f64,
    ) {
        let p = Problem::random(seed, 7, 4, 6);
        let mut scaled = p.clone();
        scaled.w[class * 6..][..6].iter_mut().for_each(|w| *w *= scale);
        let (got, plain) = (scaled.run(&param(4, margin, 0.5)), p.run(&param(4, margin, 0.5)));
        for (i, (got, want)) in got.top.iter().zip(&plain.top).enumerate() {
            if i % 4 == class {
                prop_assert!((got - want * scale).abs() <= 1e-9 * scale);
            } else {
                prop_assert_eq!(got, want);
            }
        }
    }

    #[test]
    fn f32_keeps_to_f64_within_its_rounding(
        seed in 0u64..10_000, m in 1usize..20, n in 1usize..9, k in 1usize..200,
        margin in 1u32..9, lambda in 0f32..100.0,
    ) {
        let mut p = Problem::random(seed, m, n, k);
        // Both get the values that f32 has.
        for v in p.x.iter_mut().chain(&mut p.w).chain(&mut p.g) {
            *v = f64::from(*v as f32);
        }
        let param = param(n, margin, lambda);
        let (got, want) = (p.run_f32(&param), p.run(&param));
        // The cosine has f32's rounding; psi is up to m^2 steeper than it,
        // its derivative m^4, and near theta = 0 by its whole size.
        let steep = f64::from(margin).powi(2);
        assert_close(&got.top, &want.top, 2e-7 * steep, "top");
        assert_close(&got.dx, &want.dx, 4e-7 * steep * steep, "dx");
        assert_close(&got.dw, &want.dw, 4e-7 * steep * steep, "dw");
    }

    #[test]
    fn any_order_of_the_batch_gives_the_same(
        (p, order) in (0u64..10_000, 1usize..12).prop_flat_map(|(seed, m)| {
            let order = Just((0..m).collect::<Vec<usize>>()).prop_shuffle();
            (Just(Problem::random(seed, m, 3, 5)), order)
        }),
        margin in 1u32..9,
    ) {
        let pick = |v: &[f64], width: usize| -> Vec<f64> {
            order.iter().flat_map(|&i| v[i * width..][..width].to_vec()).collect()
        };
        let shuffled = Problem {
            x: pick(&p.x, 5),
            labels: pick(&p.labels, 1),
            g: pick(&p.g, 3),
            ..p.clone()
        };
        let param = param(3, margin, 0.5);
        let (want, got) = (p.run(&param), shuffled.run(&param));
        prop_assert_eq!(got.top, pick(&want.top, 3));
        prop_assert_eq!(got.dx, pick(&want.dx, 5));
        assert_close(&got.dw, &want.dw, 1e-12, "dw");
    }

    #[test]
    fn any_finite_features_of_f32_give_no_nan(
        x in proptest::collection::vec(any::<f32>(), 6),
        w in proptest::collection::vec(any::<f32>(), 6),
        margin in 1u32..9, lambda in 0f32..10.0,
    ) {
        // Sums that overflow in the plain product are its own affair.
        let (x, w): (Vec<f32>, Vec<f32>) = (
            x.iter().map(|v| v.clamp(-1e18, 1e18)).collect(),
            w.iter().map(|v| v.clamp(-1e18, 1e18)).collect(),
        );
        prop_assume!(x.iter().chain(&w).all(|v| v.is_finite()));
        let got = run(&param(3, margin, lambda), (&x, &w, &[0.0, 2.0, 1.0], &[1.0; 9]), 2, 3);
        prop_assert!(got.top.iter().chain(&got.dx).chain(&got.dw).all(|v| v.is_finite()), "{got:?}");
    }
}

/// A message of LargeMarginInnerProductParameter's fields with any values, so
/// that more than a few arbitrary bytes get past the decoding.
fn any_message() -> impl Strategy<Value = Vec<u8>> {
    let float = prop_oneof![
        any::<f32>(),
        Just(f32::NAN),
        Just(f32::INFINITY),
        0f32..10.0
    ];
    let varint = prop_oneof![0u64..20, any::<u64>(), Just(u64::MAX), Just(1 << 31)];
    let field = (1u64..13, float, varint).prop_map(|(tag, float, number)| {
        let mut bytes = Vec::new();
        let varint = |bytes: &mut Vec<u8>, mut v: u64| {
            while v >= 128 {
                bytes.push(v as u8 | 128);
                v >>= 7;
            }
            bytes.push(v as u8);
        };
        match tag {
            5 | 6 | 7 | 9 => {
                varint(&mut bytes, tag << 3 | 5);
                bytes.extend(float.to_le_bytes());
            }
            _ => {
                varint(&mut bytes, tag << 3);
                varint(&mut bytes, number);
            }
        }
        bytes
    });
    proptest::collection::vec(field, 0..12).prop_map(|fields| fields.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_parameters_make_a_layer_that_works_or_an_error(
        bytes in prop_oneof![any_message(), proptest::collection::vec(any::<u8>(), 0..64)],
        shape in proptest::collection::vec(prop_oneof![0..5i32, any::<i32>()], 0..6),
        labels in proptest::collection::vec(prop_oneof![(0..4i32).prop_map(f64::from), any::<f64>()], 4),
        resume in any::<i64>(),
    ) {
        let create =
            || lsoftmax::param::decode(&bytes).and_then(|p| LargeMarginInnerProduct::new(&p));
        let Ok(mut layer) = create() else {
            return Ok(());
        };
        layer.resume(resume);
        prop_assert!(layer.passes() >= 0);
        prop_assert!(layer.lambda() >= 0.0 && layer.lambda().is_finite());
        if let Ok(sizes) = layer.reshape(&shape, None) {
            prop_assert!(sizes.samples.max(sizes.features) <= i32::MAX as usize);
        }

        let mut layer = create().unwrap();
        let Ok(sizes) = layer.reshape(&[4, 3], Some(&[4])) else {
            return Ok(());
        };
        // Memory is what num_output asks for.
        prop_assume!(sizes.classes <= 1000);
        let (x, w) = (noise(1, 12), noise(2, sizes.classes * 3));
        let mut top = vec![0.0; 4 * sizes.classes];
        let done = forward(&mut layer, &x, Some(&labels), &w, &mut top);
        prop_assert!(done.is_err() || top.iter().all(|v| v.is_finite()), "{top:?}");
    }
}

// ---- The diagnosis ----

/// A forward pass and what it tells.
fn diagnose<T: Dtype>(
    layer: &mut LargeMarginInnerProduct,
    (x, w, labels): (&[T], &[T], &[T]),
    n: usize,
) -> Diagnosis {
    let mut logits = vec![T::default(); labels.len() * n];
    forward(layer, x, Some(labels), w, &mut logits).unwrap();
    let pass = Pass {
        features: x,
        labels,
        weights: w,
        logits: &logits,
    };
    layer.diagnose(pass).unwrap()
}

impl Problem {
    fn diagnose(&self, param: &LargeMarginInnerProductParameter) -> Diagnosis {
        let mut layer = layer(param, self.labels.len(), self.k);
        diagnose(&mut layer, (&self.x, &self.w, &self.labels), self.n)
    }

    /// Samples that are right by the logits of an oracle without lambda.
    fn holds(&self, m: u32) -> usize {
        let top = self.oracle(m, 0.0).top;
        let holds = |(i, &y): (usize, &f64)| {
            let row = &top[i * self.n..][..self.n];
            row.iter().all(|&f| row[y as usize] >= f)
        };
        self.labels
            .iter()
            .enumerate()
            .filter(|&at| holds(at))
            .count()
    }
}

#[test]
fn the_diagnosis_has_the_angles_norms_and_segments_that_went_in() {
    for m in [1, 2, 4] {
        // In degrees: 0, 3, ..., 177, none of them at a border.
        let degrees: Vec<f64> = (0..60).map(|i| f64::from(3 * i)).collect();
        let radians: Vec<f64> = degrees.iter().map(|d| (d + 1.0).to_radians()).collect();
        let p = Problem::at_angles(1, &radians, 3, 7);
        let found = p.diagnose(&param(p.n, m, 5.0));
        assert_eq!((found.passes, found.lambda, found.samples), (1, 5.0, 60));
        assert_eq!((found.ignored, found.zero, found.not_finite), (0, 0, 0));
        let got: Vec<f64> = found.angles.iter().map(|angle| angle - 1.0).collect();
        assert_close(&got, &degrees, 1e-9, "angles");
        assert!((found.mean_angle() - 89.5).abs() < 1e-9);
        assert!((found.percentile(0.95) - (1.0 + 0.95 * 177.0)).abs() < 1e-9);
        assert!((found.percentile(1.0) - 178.0).abs() < 1e-6);
        assert_eq!(found.segments, vec![60 / m as usize; m as usize]);
        // at_angles makes them 1, 1.1, 1.2 ... long.
        assert!((found.feature_norm - (1.0 + 0.1 * 59.0 / 2.0)).abs() < 1e-9);
        let norm = |w: &[f64]| w.iter().map(|v| v * v).sum::<f64>().sqrt();
        let norms: f64 = p.w.chunks(p.k).map(norm).sum();
        assert!((found.weight_norm - norms / 3.0).abs() < 1e-12);
        assert_eq!(found.holds, p.holds(m), "m {m}");
    }
}

#[test]
fn the_margin_that_must_hold_is_the_whole_one_whatever_lambda() {
    let p = Problem::random(3, 200, 4, 3);
    let held: Vec<usize> = [1, 2, 3, 4].map(|m| p.holds(m)).to_vec();
    assert!(
        held[0] > held[1] && held[1] > held[3] && held[3] > 0,
        "{held:?}"
    );
    for lambda in [0.0, 1000.0] {
        let got = [1, 2, 3, 4].map(|m| p.diagnose(&param(p.n, m, lambda)).holds);
        assert_eq!(got.to_vec(), held);
    }
}

#[test]
fn the_diagnosis_leaves_out_ignored_and_unusable_samples() {
    let mut p = Problem::random(1, 8, 4, 3);
    p.labels = vec![0.0, 0.0, 1.0, -7.0, 1.0, 2.0, 3.0, 0.0];
    p.x[3..6].fill(0.0);
    p.x[12] = f64::NAN;
    p.x[15] = f64::INFINITY;
    p.w[3 * 3..][..3].fill(0.0);
    // Of class 2, whose one sample is not finite: no part of the mean.
    p.w[2 * 3..][..3].fill(9.0);
    let param = LargeMarginInnerProductParameter {
        ignore_label: Some(-7),
        ..param(p.n, 2, 0.0)
    };
    let found = p.diagnose(&param);
    assert_eq!((found.samples, found.ignored), (3, 1));
    assert_eq!((found.zero, found.not_finite), (2, 2));
    let norm = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>().sqrt();
    let row = |i: usize| norm(&p.x[i * 3..][..3]);
    assert!((found.feature_norm - (row(0) + row(2) + row(7)) / 3.0).abs() < 1e-12);
    let weights = (norm(&p.w[..3]) + norm(&p.w[3..6])) / 2.0;
    assert!((found.weight_norm - weights).abs() < 1e-12);
    assert_eq!(found.segments.iter().sum::<usize>(), 3);
}

#[test]
fn a_logit_that_is_not_a_number_is_not_beaten() {
    let p = Problem::at_angles(1, &[0.0, 0.0], 2, 3);
    let mut layer = layer(&param(2, 1, 0.0), 2, 3);
    let mut logits = vec![0.0; 4];
    forward(&mut layer, &p.x, Some(&p.labels), &p.w, &mut logits).unwrap();
    for (other, holds) in [(f64::NAN, 0), (f64::INFINITY, 0), (-f64::INFINITY, 1)] {
        (logits[1], logits[2]) = (other, f64::NAN);
        let pass = Pass {
            features: &p.x,
            labels: &p.labels,
            weights: &p.w,
            logits: &logits,
        };
        assert_eq!(layer.diagnose(pass).unwrap().holds, holds, "{other}");
    }
}

#[test]
fn a_batch_without_a_usable_sample_is_said_in_one_line() {
    let mut p = Problem::random(1, 4, 3, 5);
    p.x.fill(f64::NAN);
    let found = p.diagnose(&param(p.n, 4, 2.5));
    assert_eq!(
        found.to_string(),
        "pass 1, lambda = 2.5, samples = 0, ignored = 0, zero = 0, not_finite = 4"
    );
    assert!(found.percentile(0.5).is_nan() && found.mean_angle().is_nan());
    let none = Problem::random(1, 0, 3, 5).diagnose(&param(3, 4, 0.0));
    assert!(none.to_string().contains("samples = 0, "), "{none}");
}

#[test]
fn the_line_of_the_diagnosis_holds_all_of_it() {
    let radians: Vec<f64> = (0..21).map(|i| f64::from(4 * i).to_radians()).collect();
    let p = Problem::at_angles(1, &radians, 1, 2);
    let unit = |i: usize, angle: f64| {
        let angle = angle + (4f64).atan2(3.0);
        let length = 1.0 + i as f64;
        [length * angle.cos(), length * angle.sin()]
    };
    let x = radians
        .iter()
        .enumerate()
        .flat_map(|(i, &angle)| unit(i, angle));
    let (x, w) = (x.collect(), vec![3.0, 4.0]);
    let p = Problem { x, w, ..p };
    let line = p.diagnose(&param(1, 4, 1234.5678)).to_string();
    assert_eq!(
        line,
        "pass 1, lambda = 1234.57, samples = 21, ignored = 0, zero = 0, not_finite = 0, \
         angle_mean = 40, angle_p95 = 76, feature_norm = 11, weight_norm = 5, holds = 1, \
         segments = 0.571429 0.428571 0 0, \
         angle_deciles = 0 8 16 24 32 40 48 56 64 72 80"
    );
}

#[test]
fn the_diagnosis_of_f32_is_that_of_f64_within_its_rounding() {
    let p = Problem::random(5, 50, 6, 17);
    let want = p.diagnose(&param(p.n, 3, 1.0));
    let cast = |v: &[f64]| v.iter().map(|&a| a as f32).collect::<Vec<f32>>();
    let mut layer = layer(&param(p.n, 3, 1.0), 50, p.k);
    let (x, w, labels) = (cast(&p.x), cast(&p.w), cast(&p.labels));
    let got = diagnose(&mut layer, (&x, &w, &labels), p.n);
    assert_close(&got.angles, &want.angles, 1e-5, "angles");
    assert_eq!((got.holds, got.segments), (want.holds, want.segments));
}

#[test]
fn the_diagnosis_is_due_every_so_many_passes_where_it_is_asked_for() {
    let due = |value: &str, iteration: i32| -> Vec<i64> {
        let param = LargeMarginInnerProductParameter {
            iteration: Some(iteration),
            ..param(3, 2, 1.0)
        };
        let p = Problem::random(1, 2, 3, 4);
        let mut layer = layer(&param, 2, 4);
        layer.log_every(value).unwrap();
        assert!(iteration > 0 || !layer.diagnosis_is_due(), "before a pass");
        let mut pass = || {
            let mut logits = [0.0; 6];
            forward(&mut layer, &p.x, Some(&p.labels), &p.w, &mut logits).unwrap();
            layer.diagnosis_is_due().then(|| layer.passes())
        };
        (0..7).filter_map(|_| pass()).collect()
    };
    assert_eq!(due("3", 0), [1, 4, 7]);
    assert_eq!(due(" 3 ", 0), [1, 4, 7]);
    assert_eq!(due("3", 99), [100, 103, 106]);
    assert_eq!(due("1", 0), [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(due("100", 0), [1]);
    assert_eq!(due("0", 0), [0; 0]);
    assert_eq!(due("", 0), [0; 0]);
}

#[test]
fn a_bad_number_of_passes_is_refused_by_its_value() {
    for bad in [
        "-1",
        "1.5",
        "1e3",
        "every",
        "100 200",
        "99999999999999999999",
    ] {
        let mut layer = layer(&param(3, 2, 1.0), 2, 4);
        let message = layer.log_every(bad).unwrap_err().to_string();
        assert!(
            message.starts_with(&format!("LSOFTMAX_LOG_EVERY: '{bad}' is no number")),
            "{message}"
        );
    }
}
