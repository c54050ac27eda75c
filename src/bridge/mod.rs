//! The border to C++: error translation and views of blobs, no math.
//!
//! The C++ layers call the functions of [`ffi`]. An error, and a panic of what
//! can fail, arrives in C++ as a `rust::Error` whose message does not name the
//! layer: the caller adds that.

mod blas;
mod ffi;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;

use crate::batch_norm::{self, BatchNorm, cpu::Moving};
use crate::dtype::{Dtype, int};
use crate::error::{Error, Result};
use crate::large_margin::{self, LargeMarginInnerProduct};
use crate::param;
use blas::CaffeBlas;
use ffi::{ElementType, Memory, MutableView, View};

/// A [`Dtype`], and its name in C++.
trait Element: Dtype {
    const DTYPE: ElementType;
}

impl Element for f32 {
    const DTYPE: ElementType = ElementType::F32;
}

impl Element for f64 {
    const DTYPE: ElementType = ElementType::F64;
}

/// Runs `f`; a panic becomes an error, since it may not cross into C++.
fn guard<R>(f: impl FnOnce() -> Result<R>) -> Result<R> {
    // Unwind safe: after an error the caller ends the process.
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(Error::new(format!(
            "internal error, please report it: {message}"
        )))
    })
}

/// Evaluates `$body`, guarded, with `$t` the type that `$dtype` names.
macro_rules! with_dtype {
    ($dtype:expr, $t:ident => $body:expr) => {
        guard(|| match $dtype {
            ElementType::F32 => {
                type $t = f32;
                $body
            }
            ElementType::F64 => {
                type $t = f64;
                $body
            }
            other => panic!("element type {}", other.repr),
        })
    };
}

/// Likewise `$host` or `$device`, by where the blobs of `$pass` lie.
macro_rules! run {
    ($pass:ident, $t:ident => $host:expr, $device:expr) => {
        with_dtype!($pass.dtype, $t => match $pass.memory {
            Memory::Host => $host,
            #[cfg(feature = "cuda")]
            Memory::Device => $device,
            other => panic!("memory {}", other.repr),
        })
    };
}

/// The pass `$to` in device memory, from the views of the same names in `$pass`.
#[cfg(feature = "cuda")]
macro_rules! device_pass {
    ($($to:ident)::+, $pass:ident, $($field:ident),*) => {
        $($to)::+ { $($field: $pass.$field.values.cast()),* }
    };
}

/// The values of a view on the host; None where there are none.
///
/// # Safety
/// The view is of memory that nobody writes while the values are in use.
unsafe fn given<'a, T: Dtype>(view: View) -> Option<&'a [T]> {
    let values: *const T = view.values.cast();
    assert!(values.is_aligned(), "values at {values:?}");
    // SAFETY: the caller's; any bytes are an f32 or f64, which Dtype is.
    (!values.is_null()).then(|| unsafe { slice::from_raw_parts(values, view.count) })
}

/// [`given`], to be written.
///
/// # Safety
/// The view is of memory that nobody else touches while the values are in use.
unsafe fn given_mut<'a, T: Dtype>(view: MutableView) -> Option<&'a mut [T]> {
    let values: *mut T = view.values.cast();
    assert!(values.is_aligned(), "values at {values:?}");
    // SAFETY: as for given.
    (!values.is_null()).then(|| unsafe { slice::from_raw_parts_mut(values, view.count) })
}

/// [`given`], or an empty slice.
///
/// # Safety
/// As [`given`].
unsafe fn values<'a, T: Dtype>(view: View) -> &'a [T] {
    // SAFETY: the caller's.
    unsafe { given(view) }.unwrap_or_default()
}

/// [`given_mut`], or an empty slice.
///
/// # Safety
/// As [`given_mut`].
unsafe fn values_mut<'a, T: Dtype>(view: MutableView) -> &'a mut [T] {
    // SAFETY: the caller's.
    unsafe { given_mut(view) }.unwrap_or_default()
}

fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

// ---- LargeMarginInnerProduct ----

fn new_large_margin(bytes: &[u8]) -> Result<Box<LargeMarginInnerProduct>> {
    guard(|| LargeMarginInnerProduct::new(&param::decode(bytes)?).map(Box::new))
}

fn margin_reshape(
    layer: &mut LargeMarginInnerProduct,
    features: &[i32],
    has_labels: bool,
    labels: &[i32],
) -> Result<ffi::MarginSizes> {
    guard(|| {
        let sizes = layer.reshape(features, has_labels.then_some(labels))?;
        Ok(ffi::MarginSizes {
            classes: int(sizes.classes)?,
            features: int(sizes.features)?,
            axis: int(sizes.axis)?,
            device_bytes: layer.device_bytes(),
        })
    })
}

unsafe fn margin_forward(
    layer: &mut LargeMarginInnerProduct,
    blas: &ffi::Blas,
    pass: &ffi::MarginForward,
) -> Result<()> {
    let blas = &CaffeBlas(blas);
    // SAFETY: the caller's.
    unsafe {
        run!(pass, T =>
            layer.forward::<T>(blas, large_margin::cpu::Forward {
                features: values(pass.features), labels: given(pass.labels),
                weights: values(pass.weights),
                logits: values_mut(pass.logits), plain: given_mut(pass.plain),
            }),
            layer.forward_gpu::<T>(blas, device_pass!(
                large_margin::gpu::Forward, pass, features, labels, weights, logits, plain, scratch
            ))
        )
    }
}

unsafe fn margin_backward(
    layer: &LargeMarginInnerProduct,
    blas: &ffi::Blas,
    pass: &ffi::MarginBackward,
) -> Result<()> {
    let blas = &CaffeBlas(blas);
    // SAFETY: the caller's.
    unsafe {
        run!(pass, T =>
            layer.backward::<T>(blas, large_margin::cpu::Backward {
                logits_diff: values_mut(pass.logits_diff), plain_diff: given(pass.plain_diff),
                features: values(pass.features), weights: values(pass.weights),
                features_diff: given_mut(pass.features_diff),
                weights_diff: given_mut(pass.weights_diff),
            }),
            layer.backward_gpu::<T>(blas, device_pass!(
                large_margin::gpu::Backward, pass, logits_diff, plain_diff, features, weights,
                features_diff, weights_diff, scratch
            ))
        )
    }
}

unsafe fn diagnose(layer: &LargeMarginInnerProduct, pass: &ffi::MarginDiagnosis) -> Result<String> {
    // SAFETY: the caller's.
    with_dtype!(pass.dtype, T => unsafe {
        Ok(layer.diagnose::<T>(large_margin::diagnosis::Pass {
            features: values(pass.features), labels: values(pass.labels),
            weights: values(pass.weights), logits: values(pass.logits),
        })?.to_string())
    })
}

#[cfg(feature = "cuda")]
fn finish(layer: &LargeMarginInnerProduct) -> Result<()> {
    guard(|| layer.finish())
}

// ---- BN ----

fn new_batch_norm(bytes: &[u8], train: bool) -> Result<Box<BatchNorm>> {
    guard(|| BatchNorm::new(&param::decode(bytes)?, train).map(Box::new))
}

fn bn_reshape(layer: &mut BatchNorm, bottom: &[i32]) -> Result<ffi::BnSizes> {
    guard(|| {
        Ok(ffi::BnSizes {
            channels: int(layer.reshape(bottom)?.channels)?,
            device_bytes: layer.device_bytes(),
        })
    })
}

fn constant_channel(layer: &BatchNorm) -> i32 {
    let channel = layer.constant_channel().and_then(|c| int(c).ok());
    channel.unwrap_or(-1)
}

unsafe fn bn_forward(layer: &mut BatchNorm, pass: &ffi::BnForward) -> Result<()> {
    // SAFETY: the caller's; in place, bottom and top are one, and top alone is
    // taken.
    unsafe {
        run!(pass, T =>
            layer.forward::<T>(batch_norm::cpu::Forward {
                bottom: given(pass.bottom).filter(|_| pass.bottom.values != pass.top.values),
                slope: values(pass.slope), bias: values(pass.bias),
                moving: match given_mut(pass.update_mean) {
                    Some(mean) => Moving::Update { mean, inv_std: values_mut(pass.update_inv_std) },
                    None => Moving::Read {
                        mean: values(pass.moving_mean), inv_std: values(pass.moving_inv_std),
                    },
                },
                top: values_mut(pass.top), x_hat: given_mut(pass.x_hat),
            }),
            layer.forward_gpu::<T>(device_pass!(
                batch_norm::gpu::Forward, pass, bottom, slope, bias, moving_mean, moving_inv_std,
                update_mean, update_inv_std, top, x_hat, scratch
            ))
        )
    }
}

unsafe fn bn_backward(layer: &mut BatchNorm, pass: &ffi::BnBackward) -> Result<()> {
    // SAFETY: the caller's; in place likewise.
    unsafe {
        run!(pass, T =>
            layer.backward::<T>(batch_norm::cpu::Backward {
                top_diff: given(pass.top_diff)
                    .filter(|_| pass.top_diff.values != pass.bottom_diff.values),
                x: values(pass.x), slope: values(pass.slope),
                bottom_diff: given_mut(pass.bottom_diff),
                slope_diff: given_mut(pass.slope_diff), bias_diff: given_mut(pass.bias_diff),
            }),
            layer.backward_gpu::<T>(device_pass!(
                batch_norm::gpu::Backward, pass, top_diff, x, slope, bottom_diff, slope_diff,
                bias_diff, scratch
            ))
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_that_carries_its_words() {
        for panic in [
            guard::<()>(|| panic!("index {} of {}", 7, 3)),
            guard::<()>(|| panic!("index 7 of 3")),
        ] {
            let message = panic.unwrap_err().to_string();
            assert_eq!(message, "internal error, please report it: index 7 of 3");
        }
        let other = guard::<()>(|| std::panic::panic_any(5)).unwrap_err();
        assert!(other.to_string().ends_with("no message"));
    }

    #[test]
    fn a_view_of_nothing_is_empty_and_one_out_of_line_is_refused() {
        let memory = [1f32, 2.0, 3.0];
        let view = |bytes: usize, count| View {
            values: memory.as_ptr().cast::<u8>().wrapping_add(bytes),
            count,
        };
        let values = std::ptr::null();
        let nothing = View { values, count: 0 };
        // SAFETY: views of an array, which nobody writes, and of nothing.
        unsafe {
            assert_eq!(super::values::<f32>(view(4, 2)), [2.0, 3.0]);
            assert_eq!(given::<f32>(view(0, 3)), Some(&memory[..]));
            assert_eq!(super::values::<f32>(nothing), [0.0; 0]);
            assert_eq!(given::<f64>(nothing), None);
            let refused = guard(|| Ok(given::<f32>(view(2, 1)).is_some())).unwrap_err();
            assert!(refused.to_string().contains("values at 0x"), "{refused}");
        }
    }
}
