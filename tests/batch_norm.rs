//! The BN layer against a plain f64 oracle, against numerical gradients, and
//! on input that is not what it should be.

use lsoftmax::batch_norm::BatchNorm;
use lsoftmax::batch_norm::cpu::{Backward, Forward, Moving};
use lsoftmax::dtype::Dtype;
use lsoftmax::param::BnParameter;
use proptest::prelude::*;

/// What normalises, and whether slope and bias learn.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mode {
    Train,
    Test,
    Frozen,
}

use Mode::{Frozen, Test, Train};

/// x and the gradient of y, of shape (N, C, S), and the rest of shape (C).
#[derive(Debug, Clone)]
struct Problem {
    dims: [usize; 3],
    x: Vec<f64>,
    g: Vec<f64>,
    slope: Vec<f64>,
    bias: Vec<f64>,
    mean: Vec<f64>,
    inv_std: Vec<f64>,
}

/// What a forward and a backward pass gave.
#[derive(Debug, Clone, PartialEq)]
struct Outcome<T> {
    y: Vec<T>,
    dx: Vec<T>,
    slope: Vec<T>,
    bias: Vec<T>,
    mean: Vec<T>,
    inv_std: Vec<T>,
}

/// `value` as f32 has it: the oracle gets the input that an f32 layer gets.
fn f32(value: f64) -> f64 {
    f64::from(value as f32)
}

/// A fixed sequence in [-1, 1].
fn noise(seed: u64, len: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            f32((state >> 11) as f64 / (1u64 << 52) as f64 - 1.0)
        })
        .collect()
}

fn cast<T: Dtype>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&v| T::from_f64(v)).collect()
}

fn param(mode: Mode) -> BnParameter {
    BnParameter {
        momentum: Some(0.75),
        eps: Some(EPS as f32),
        frozen: Some(mode == Frozen),
    }
}

/// Representable in f32, as the momentum above.
const EPS: f64 = 1.0 / 1024.0;

fn layer(mode: Mode, dims: [usize; 3]) -> BatchNorm {
    let mut layer = BatchNorm::new(&param(mode), mode != Test).unwrap();
    layer.reshape(&dims.map(|d| d as i32)).unwrap();
    layer
}

/// The moving statistics as the layer takes them.
fn moving<'a, T>(layer: &BatchNorm, mean: &'a mut [T], inv_std: &'a mut [T]) -> Moving<'a, T> {
    if layer.by_batch() {
        Moving::Update { mean, inv_std }
    } else {
        Moving::Read { mean, inv_std }
    }
}

/// A backward pass that asks for nothing yet.
fn no_gradients<'a, T>(top_diff: &'a [T], x: &'a [T], slope: &'a [T]) -> Backward<'a, T> {
    Backward {
        top_diff: Some(top_diff),
        x,
        slope,
        bottom_diff: None,
        slope_diff: None,
        bias_diff: None,
    }
}

impl Problem {
    /// Channels that differ in mean, deviation, slope and bias.
    fn random(seed: u64, dims: [usize; 3]) -> Self {
        let [n, c, s] = dims;
        let mut x = noise(seed, n * c * s);
        for (i, x) in x.iter_mut().enumerate() {
            let channel = (i / s % c) as f64;
            *x = f32(*x * (1.0 + 0.3 * channel) + 0.7 * channel - 1.0);
        }
        Problem {
            dims,
            x,
            g: noise(seed + 1, n * c * s)
                .iter()
                .map(|g| f32(g + 0.2))
                .collect(),
            slope: noise(seed + 2, c),
            bias: noise(seed + 3, c),
            mean: noise(seed + 4, c),
            inv_std: noise(seed + 5, c).iter().map(|s| f32(s + 1.5)).collect(),
        }
    }

    fn run<T: Dtype>(&self, mode: Mode) -> Outcome<T> {
        let mut layer = layer(mode, self.dims);
        let (x, g, slope) = (cast::<T>(&self.x), cast::<T>(&self.g), cast(&self.slope));
        let mut out = self.forward(&mut layer, &x);
        let pass = Backward {
            bottom_diff: Some(&mut out.dx[..]),
            slope_diff: Some(&mut out.slope[..]),
            bias_diff: Some(&mut out.bias[..]),
            ..no_gradients(&g, &x, &slope)
        };
        layer.backward(pass).unwrap();
        out
    }

    fn run_in_place<T: Dtype>(&self, mode: Mode) -> Outcome<T> {
        let mut layer = layer(mode, self.dims);
        let (slope, bias) = (cast::<T>(&self.slope), cast::<T>(&self.bias));
        let mut out = self.before_passes(&cast::<T>(&self.x));
        out.y = cast(&self.x);
        out.dx = cast(&self.g);
        let mut x_hat = if mode == Frozen {
            vec![]
        } else {
            out.y.clone()
        };
        let pass = Forward {
            bottom: None,
            slope: &slope,
            bias: &bias,
            moving: moving(&layer, &mut out.mean, &mut out.inv_std),
            top: &mut out.y,
            x_hat: (mode != Frozen).then_some(&mut x_hat[..]),
        };
        layer.forward(pass).unwrap();
        let pass = Backward {
            top_diff: None,
            bottom_diff: Some(&mut out.dx[..]),
            slope_diff: Some(&mut out.slope[..]),
            bias_diff: Some(&mut out.bias[..]),
            x: &x_hat,
            slope: &slope,
        };
        layer.backward(pass).unwrap();
        out
    }

    /// A forward pass; dx, the gradients of slope and bias are not there yet.
    fn forward<T: Dtype>(&self, layer: &mut BatchNorm, x: &[T]) -> Outcome<T> {
        let mut out = self.before_passes(x);
        let pass = Forward {
            bottom: Some(x),
            slope: &cast::<T>(&self.slope),
            bias: &cast::<T>(&self.bias),
            moving: moving(layer, &mut out.mean, &mut out.inv_std),
            top: &mut out.y,
            x_hat: None,
        };
        layer.forward(pass).unwrap();
        out
    }

    fn before_passes<T: Dtype>(&self, x: &[T]) -> Outcome<T> {
        Outcome {
            y: vec![T::from_f64(f64::NAN); x.len()],
            dx: vec![T::from_f64(f64::NAN); x.len()],
            slope: vec![T::default(); self.mean.len()],
            bias: vec![T::default(); self.mean.len()],
            mean: cast(&self.mean),
            inv_std: cast(&self.inv_std),
        }
    }

    /// The formulas, channel by channel, a loop a sum.
    fn oracle(&self, mode: Mode) -> Outcome<f64> {
        let [n, channels, s] = self.dims;
        let m = (n * s) as f64;
        let mut out = Outcome {
            y: vec![0.0; self.x.len()],
            dx: vec![0.0; self.x.len()],
            slope: vec![0.0; channels],
            bias: vec![0.0; channels],
            mean: self.mean.clone(),
            inv_std: self.inv_std.clone(),
        };
        for c in 0..channels {
            let at: Vec<usize> = (0..n)
                .flat_map(|i| (0..s).map(move |p| (i * channels + c) * s + p))
                .collect();
            let sum = |f: &dyn Fn(usize) -> f64| at.iter().map(|&i| f(i)).sum::<f64>();
            let (mut mean, mut inv_std) = (self.mean[c], self.inv_std[c]);
            if mode == Train {
                // Of small numbers: an oracle must not round its mean.
                let near = self.x[at[0]];
                mean = near + sum(&|i| self.x[i] - near) / m;
                inv_std = 1.0 / (sum(&|i| (self.x[i] - mean).powi(2)) / m + EPS).sqrt();
                out.mean[c] = 0.75 * self.mean[c] + 0.25 * mean;
                out.inv_std[c] = 0.75 * self.inv_std[c] + 0.25 * inv_std;
            }
            let x_hat = |i: usize| (self.x[i] - mean) * inv_std;
            let (g, g_x_hat) = (sum(&|i| self.g[i]), sum(&|i| self.g[i] * x_hat(i)));
            if mode != Frozen {
                (out.bias[c], out.slope[c]) = (g, g_x_hat);
            }
            for &i in &at {
                out.y[i] = self.slope[c] * x_hat(i) + self.bias[c];
                let inner = match mode {
                    Train => self.g[i] - g / m - x_hat(i) * g_x_hat / m,
                    Test | Frozen => self.g[i],
                };
                out.dx[i] = self.slope[c] * inv_std * inner;
            }
        }
        out
    }
}

/// `got` is `want` within `tolerance` of the largest value of its blob.
fn assert_close<T: Dtype>(got: &Outcome<T>, want: &Outcome<f64>, tolerance: f64, what: &str) {
    let blobs = [
        ("y", &got.y, &want.y),
        ("dx", &got.dx, &want.dx),
        ("slope", &got.slope, &want.slope),
        ("bias", &got.bias, &want.bias),
        ("moving mean", &got.mean, &want.mean),
        ("moving inv_std", &got.inv_std, &want.inv_std),
    ];
    for (name, got, want) in blobs {
        assert_eq!(got.len(), want.len(), "{name}, {what}");
        let scale = want.iter().fold(1.0, |big: f64, v| big.max(v.abs()));
        for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
            let got: f64 = got.into();
            let error = (got - want).abs() / scale;
            assert!(
                error <= tolerance,
                "{name}[{i}] is {got}, not {want}: {what}"
            );
        }
    }
}

/// Rows and segments, whole tiles and rests, several blocks and chunks, ones.
const SHAPES: [[usize; 3]; 19] = [
    [1, 1, 1],
    [1, 1, 37],
    [1, 5, 1],
    [2, 1, 1],
    [7, 1, 3],
    [5, 3, 1],
    [16, 7, 1],
    [6, 5, 12],
    [3, 4, 15],
    [3, 4, 16],
    [3, 2, 17],
    [2, 3, 49],
    [4, 3, 100],
    [9, 300, 1],
    [3, 90, 5],
    [2, 2, 4099],
    [13, 5, 7001],
    [1201, 251, 1],
    [1, 12, 30011],
];

#[test]
fn agrees_with_the_oracle() {
    for (seed, dims) in SHAPES.into_iter().enumerate() {
        let p = Problem::random(seed as u64, dims);
        for mode in [Train, Test, Frozen] {
            let what = format!("{dims:?} {mode:?}");
            let want = p.oracle(mode);
            assert_close(&p.run::<f64>(mode), &want, 1e-12, &what);
            assert_close(&p.run::<f32>(mode), &want, 5e-6, &what);
        }
    }
}

#[test]
fn in_place_is_the_same_bit_by_bit() {
    for (seed, dims) in SHAPES.into_iter().enumerate() {
        let p = Problem::random(100 + seed as u64, dims);
        for mode in [Train, Test, Frozen] {
            let what = format!("{dims:?} {mode:?}");
            assert_eq!(p.run_in_place::<f32>(mode), p.run::<f32>(mode), "{what}");
            assert_eq!(p.run_in_place::<f64>(mode), p.run::<f64>(mode), "{what}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_bytes_and_any_shape_make_a_layer_or_an_error(
        bytes in proptest::collection::vec(any::<u8>(), 0..30),
        // Larger ones would only test the allocator.
        shape in proptest::collection::vec(0i32..40, 0..5),
        train in any::<bool>(),
    ) {
        let layer = lsoftmax::param::decode(&bytes).and_then(|p| BatchNorm::new(&p, train));
        if let Ok(mut layer) = layer {
            let valid = shape.len() >= 2 && shape[1] > 0;
            prop_assert!(!layer.reshape(&shape).is_ok_and(|_| !valid));
        }
    }

    #[test]
    fn agrees_with_the_oracle_for_any_shape(
        seed in 0u64..1000,
        n in 1usize..20,
        c in 1usize..40,
        s in 1usize..70,
        test in any::<bool>(),
    ) {
        let p = Problem::random(seed, [n, c, s]);
        let mode = if test { Test } else { Train };
        assert_close(&p.run::<f64>(mode), &p.oracle(mode), 1e-12, "f64");
        assert_close(&p.run_in_place::<f32>(mode), &p.oracle(mode), 5e-6, "f32");
    }
}

/// The derivative of `sum g y` by every value of one blob, in f64.
fn numerical(p: &Problem, mode: Mode, blob: impl Fn(&mut Problem) -> &mut Vec<f64>) -> Vec<f64> {
    let loss = |p: &Problem| -> f64 {
        p.run::<f64>(mode)
            .y
            .iter()
            .zip(&p.g)
            .map(|(y, g)| y * g)
            .sum()
    };
    (0..blob(&mut p.clone()).len())
        .map(|i| {
            // Five points: the error is of order step^4.
            let step = 1e-3;
            let at = |k: f64| {
                let mut p = p.clone();
                blob(&mut p)[i] += k * step;
                loss(&p)
            };
            (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * step)
        })
        .collect()
}

#[test]
fn gradients_are_the_numerical_ones() {
    for dims in [[4, 3, 1], [5, 2, 6], [3, 2, 16], [2, 3, 19]] {
        let p = Problem::random(7, dims);
        for mode in [Train, Test, Frozen] {
            let mut got = p.run::<f64>(mode);
            let mut want = got.clone();
            want.dx = numerical(&p, mode, |p| &mut p.x);
            want.slope = numerical(&p, mode, |p| &mut p.slope);
            want.bias = numerical(&p, mode, |p| &mut p.bias);
            if mode == Frozen {
                got.slope.clone_from(&want.slope);
                got.bias.clone_from(&want.bias);
            }
            assert_close(&got, &want, 1e-9, &format!("{dims:?} {mode:?}"));
        }
    }
}

#[test]
fn only_gradients_that_are_wanted_are_touched() {
    let p = Problem::random(3, [5, 3, 20]);
    let (x, g, slope) = (&p.x, &p.g, &p.slope);
    for mode in [Train, Test, Frozen] {
        let want = p.run::<f64>(mode);
        let mut layer = layer(mode, p.dims);
        p.forward(&mut layer, x);

        let mut dx = vec![0.0; x.len()];
        let pass = Backward {
            bottom_diff: Some(&mut dx[..]),
            ..no_gradients(g, x, slope)
        };
        layer.backward(pass).unwrap();
        assert_eq!(dx, want.dx);

        let (mut ds, mut db) = (vec![10.0; 3], vec![20.0; 3]);
        let pass = Backward {
            slope_diff: Some(&mut ds[..]),
            ..no_gradients(g, x, slope)
        };
        layer.backward(pass).unwrap();
        let pass = Backward {
            bias_diff: Some(&mut db[..]),
            ..no_gradients(g, x, slope)
        };
        layer.backward(pass).unwrap();
        for c in 0..3 {
            // Added to what was there.
            assert!((ds[c] - 10.0 - want.slope[c]).abs() < 1e-13);
            assert!((db[c] - 20.0 - want.bias[c]).abs() < 1e-13);
        }
    }
}

#[test]
fn a_mean_that_dwarfs_the_deviation_costs_no_accuracy() {
    for dims in [[50, 2, 1], [50, 2, 9], [20, 2, 100], [3, 2, 20_000]] {
        let mut p = Problem::random(5, dims);
        for x in &mut p.x {
            // Multiples of 1/64 around 2^16: representable in f32.
            *x = 65536.0 + (*x * 64.0).round() / 64.0;
        }
        let want = p.oracle(Train);
        // Half a unit in the mean's last place, 2^-38, times sum g.
        assert_close(&p.run::<f64>(Train), &want, 1e-8, &format!("{dims:?} f64"));
        assert_close(&p.run::<f32>(Train), &want, 1e-5, &format!("{dims:?} f32"));
    }
}

#[test]
fn huge_and_tiny_values_give_what_small_ones_give() {
    for dims in [[50, 2, 1], [9, 3, 40]] {
        let p = Problem::random(6, dims);
        let scaled = |factor: f64| {
            let mut p = p.clone();
            p.x.iter_mut().for_each(|x| *x *= factor);
            p
        };
        // y of x without eps: what a large x tends to.
        let unit = {
            let mut p = scaled(1e6);
            p.g.iter_mut().for_each(|g| *g *= 1e6);
            p.oracle(Train)
        };
        for (factor, f64_only) in [(1e30, false), (1e37, false), (1e150, true)] {
            let mut p = scaled(factor);
            let (y, mean) = (p.run::<f64>(Train).y, p.run::<f64>(Train).mean);
            assert!(mean.iter().all(|m| m.is_finite()));
            for (got, want) in y.iter().zip(&unit.y) {
                assert!((got - want).abs() < 1e-9, "{factor}: {got} {want}");
            }
            if f64_only {
                continue;
            }
            p.g.iter_mut().for_each(|g| *g *= factor);
            let got = p.run::<f32>(Train);
            let finite = |v: &[f32]| v.iter().all(|v| v.is_finite());
            assert!(finite(&got.mean) && finite(&got.inv_std), "{factor}");
            for (got, want) in got.y.iter().zip(&unit.y) {
                assert!((f64::from(*got) - want).abs() < 1e-5, "{got} {want}");
            }
            for (got, want) in got.dx.iter().zip(&unit.dx) {
                assert!((f64::from(*got) - want).abs() < 1e-4, "{got} {want}");
            }
        }
        // eps alone is left of the variance.
        let tiny = scaled(1e-40).run::<f32>(Train);
        for (c, inv_std) in tiny.inv_std.iter().enumerate() {
            let want = 0.75 * p.inv_std[c] + 0.25 / EPS.sqrt();
            assert!((f64::from(*inv_std) - want).abs() < 1e-5);
        }
    }
    // A sum that f64 cannot hold, of a mean that it can.
    let constant = Problem {
        x: vec![1e308; 3 * 2 * 20],
        ..Problem::random(1, [3, 2, 20])
    };
    let got = constant.run::<f64>(Train);
    assert_eq!(got.y[..20], [constant.bias[0]; 20]);
    assert!(got.mean.iter().all(|m| (m / 2.5e307 - 1.0).abs() < 1e-12));
}

#[test]
fn what_is_not_finite_stays_in_its_channel() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let mut p = Problem::random(2, [40, 3, 17]);
        let clean = p.run::<f32>(Train);
        p.x[17 + 4] = bad;
        let got = p.run::<f32>(Train);
        assert!(!got.mean[1].is_finite());
        for c in [0, 2] {
            assert_eq!(got.mean[c], clean.mean[c]);
            assert_eq!(got.y[c * 17..][..17], clean.y[c * 17..][..17]);
        }
    }
}

#[test]
fn a_channel_of_one_value_is_its_bias() {
    let p = Problem::random(9, [1, 5, 1]);
    let got = p.run::<f32>(Train);
    assert_eq!(got.y, cast::<f32>(&p.bias));
    assert_eq!(got.dx, [0.0; 5]);
    assert_eq!(got.slope, [0.0; 5]);
    assert_eq!(got.bias, cast::<f32>(&p.g));
}

#[test]
fn nothing_happens_without_values() {
    for dims in [[0, 3, 1], [0, 3, 30], [4, 3, 0]] {
        let p = Problem::random(1, dims);
        for mode in [Train, Test, Frozen] {
            for got in [p.run::<f32>(mode), p.run_in_place::<f32>(mode)] {
                assert_eq!(got.mean, cast::<f32>(&p.mean));
                assert_eq!(got.inv_std, cast::<f32>(&p.inv_std));
                assert_eq!((got.slope, got.bias), (vec![0.0; 3], vec![0.0; 3]));
            }
        }
    }
}

#[test]
fn batches_may_change_in_size() {
    let mut layer = layer(Train, [2, 3, 4]);
    for dims in [[40, 3, 300], [1, 3, 1], [0, 3, 5], [7, 3, 20]] {
        let p = Problem::random(4, dims);
        layer.reshape(&dims.map(|d| d as i32)).unwrap();
        let out = p.forward(&mut layer, &p.x);
        assert_eq!(out.y, p.run::<f64>(Train).y, "{dims:?}");
    }
}

#[test]
fn axes_are_samples_channels_and_positions() {
    let mut layer = BatchNorm::new(&BnParameter::default(), true).unwrap();
    for (bottom, positions) in [(&[4, 6][..], 1), (&[4, 6, 5], 5), (&[4, 6, 2, 3, 5], 30)] {
        let shape = layer.reshape(bottom).unwrap();
        assert_eq!(
            (shape.samples, shape.channels, shape.positions),
            (4, 6, positions)
        );
    }
}

#[test]
fn bad_parameters_are_refused_by_name_and_value() {
    let refuse = |momentum: f32, eps: f32, words: &str| {
        let param = BnParameter {
            momentum: Some(momentum),
            eps: Some(eps),
            frozen: None,
        };
        let message = BatchNorm::new(&param, true).unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    };
    refuse(-0.1, 1e-5, "momentum: -0.1");
    refuse(1.5, 1e-5, "momentum: 1.5");
    refuse(f32::NAN, 1e-5, "momentum: NaN");
    refuse(0.9, 0.0, "eps: 0");
    refuse(0.9, -1.0, "eps: -1");
    refuse(0.9, f32::NAN, "eps: NaN");
    refuse(0.9, f32::INFINITY, "eps: inf");
}

#[test]
fn bad_shapes_are_refused() {
    let mut layer = BatchNorm::new(&BnParameter::default(), true).unwrap();
    let mut refuse = |bottom: &[i32], words: &[&str]| {
        let message = layer.reshape(bottom).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "{message}");
        }
    };
    refuse(&[], &["[]", "2 axes"]);
    refuse(&[7], &["[7]", "2 axes"]);
    refuse(&[7, 0, 2], &["[7, 0, 2]", "no channel"]);
    layer.reshape(&[7, 3]).unwrap();
    let message = layer.reshape(&[7, 4, 2]).unwrap_err().to_string();
    assert!(message.contains("[7, 4, 2] has 4 channels") && message.contains("for 3"));
}

#[test]
fn a_backward_pass_needs_a_forward_pass_of_its_shape() {
    let p = Problem::random(8, [4, 3, 5]);
    let refused = |layer: &mut BatchNorm, count: usize| {
        let (g, mut dx) = (vec![0.5; count], vec![0.0; count]);
        let pass = Backward {
            bottom_diff: Some(&mut dx[..]),
            ..no_gradients(&g, &p.x[..count], &p.slope)
        };
        let message = layer.backward(pass).err().map(|e| e.to_string());
        message.is_some_and(|m| m.starts_with("backward without a forward"))
    };
    let mut layer = layer(Train, p.dims);
    assert!(refused(&mut layer, 60));
    p.forward(&mut layer, &p.x);
    assert!(!refused(&mut layer, 60));
    // Caffe reshapes before each forward pass, mostly to the same shape.
    layer.reshape(&[4, 3, 5]).unwrap();
    assert!(!refused(&mut layer, 60));
    layer.reshape(&[2, 3, 5]).unwrap();
    assert!(refused(&mut layer, 30));
    layer.reshape(&[4, 3, 5]).unwrap();
    assert!(refused(&mut layer, 60));
}

#[test]
fn a_channel_without_variance_is_named() {
    let mut p = Problem::random(8, [4, 3, 5]);
    let mut layer = layer(Train, p.dims);
    p.forward(&mut layer, &p.x);
    assert_eq!(layer.constant_channel(), None);
    for sample in p.x.chunks_mut(15) {
        sample[10..].fill(0.1);
    }
    p.forward(&mut layer, &p.x);
    assert_eq!(layer.constant_channel(), Some(2));
    // One value a channel.
    let p = Problem::random(9, [1, 5, 1]);
    let mut layer = self::layer(Train, p.dims);
    p.forward(&mut layer, &p.x);
    assert_eq!(layer.constant_channel(), Some(0));
}

#[test]
fn a_pass_before_the_first_reshape_is_an_error() {
    let mut layer = BatchNorm::new(&BnParameter::default(), false).unwrap();
    let pass = Forward::<f32> {
        bottom: Some(&[]),
        slope: &[],
        bias: &[],
        moving: Moving::Read {
            mean: &[],
            inv_std: &[],
        },
        top: &mut [],
        x_hat: None,
    };
    assert!(layer.forward(pass).is_err());
}
