//! The border to C++: error translation and views of blobs, no math.
//!
//! The C++ layers call the functions of [`ffi`]. Every error, and every panic,
//! arrives in C++ as a `rust::Error` whose message does not name the layer: the
//! caller adds that.

mod blas;
mod ffi;

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::batch_norm::{self, BatchNorm, cpu::Moving};
use crate::dtype::{Dtype, int};
use crate::error::{Error, Result};
use crate::large_margin::{self, LargeMarginInnerProduct};
use crate::param;
#[cfg(feature = "cuda")]
use blas::DeviceBlas;
use blas::HostBlas;

/// A [`Dtype`], and its name in C++.
trait Element: Dtype {
    const DTYPE: ffi::ElementType;
}

impl Element for f32 {
    const DTYPE: ffi::ElementType = ffi::ElementType::F32;
}

impl Element for f64 {
    const DTYPE: ffi::ElementType = ffi::ElementType::F64;
}

/// Evaluates `$body` with `$t` the type that `$dtype` names. A panic becomes an
/// error, since it may not cross into C++.
macro_rules! with_dtype {
    ($dtype:expr, $t:ident => $body:expr) => {
        guard(|| match $dtype {
            ffi::ElementType::F32 => {
                type $t = f32;
                $body
            }
            ffi::ElementType::F64 => {
                type $t = f64;
                $body
            }
            other => Err(Error::new(format!("element type {}", other.repr))),
        })
    };
}

/// The typed pass `$to`, from the pointers of the same names in `$from`.
#[cfg(feature = "cuda")]
macro_rules! device_pass {
    ($($to:ident)::+, $from:ident, $($field:ident),*) => {
        $($to)::+ { $($field: $from.$field.cast()),* }
    };
}

/// Runs `f`; a panic becomes an error.
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

/// The values that `bytes` are.
///
/// # Errors
/// A blob that is not aligned, or does not end, as its type asks.
fn values<T: Dtype>(bytes: &[u8]) -> Result<&[T]> {
    check::<T>(bytes)?;
    // SAFETY: aligned and as long as checked; any bytes are an f32 or f64, the
    // only types that are Dtype; the borrow stays.
    Ok(unsafe { std::slice::from_raw_parts(start(bytes), bytes.len() / size_of::<T>()) })
}

/// [`values`], to be written.
fn values_mut<T: Dtype>(bytes: &mut [u8]) -> Result<&mut [T]> {
    check::<T>(bytes)?;
    // SAFETY: as in values.
    Ok(unsafe {
        std::slice::from_raw_parts_mut(start::<T>(bytes).cast_mut(), bytes.len() / size_of::<T>())
    })
}

fn check<T: Dtype>(bytes: &[u8]) -> Result<()> {
    let (size, address) = (size_of::<T>(), start::<T>(bytes) as usize);
    if bytes.len().is_multiple_of(size) && address.is_multiple_of(align_of::<T>()) {
        return Ok(());
    }
    Err(Error::new(format!(
        "{} bytes at {address:#x} are no values of {size} bytes each",
        bytes.len()
    )))
}

/// Where `bytes` begin; without any, an address that is aligned.
fn start<T>(bytes: &[u8]) -> *const T {
    if bytes.is_empty() {
        return std::ptr::dangling();
    }
    bytes.as_ptr().cast()
}

/// [`values`], or None where there are none.
fn given<T: Dtype>(bytes: &[u8]) -> Result<Option<&[T]>> {
    Ok(Some(values(bytes)?).filter(|values| !values.is_empty()))
}

/// [`values_mut`], or None where there are none.
fn given_mut<T: Dtype>(bytes: &mut [u8]) -> Result<Option<&mut [T]>> {
    Ok(Some(values_mut(bytes)?).filter(|values| !values.is_empty()))
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

fn margin_forward(
    layer: &mut LargeMarginInnerProduct,
    blas: &ffi::Blas,
    pass: ffi::MarginForward<'_>,
) -> Result<()> {
    with_dtype!(pass.dtype, T => layer.forward::<T>(&HostBlas(blas), large_margin::cpu::Forward {
        features: values(pass.features)?, labels: given(pass.labels)?,
        weights: values(pass.weights)?,
        logits: values_mut(pass.logits)?, plain: given_mut(pass.plain)?,
    }))
}

fn margin_backward(
    layer: &LargeMarginInnerProduct,
    blas: &ffi::Blas,
    pass: ffi::MarginBackward<'_>,
) -> Result<()> {
    with_dtype!(pass.dtype, T => layer.backward::<T>(&HostBlas(blas), large_margin::cpu::Backward {
        logits_diff: values_mut(pass.logits_diff)?, plain_diff: given(pass.plain_diff)?,
        features: values(pass.features)?, weights: values(pass.weights)?,
        features_diff: given_mut(pass.features_diff)?,
        weights_diff: given_mut(pass.weights_diff)?,
    }))
}

fn diagnose(layer: &LargeMarginInnerProduct, pass: ffi::MarginDiagnosis<'_>) -> Result<String> {
    with_dtype!(pass.dtype, T => Ok(layer.diagnose::<T>(large_margin::diagnosis::Pass {
        features: values(pass.features)?, labels: values(pass.labels)?,
        weights: values(pass.weights)?, logits: values(pass.logits)?,
    })?.to_string()))
}

#[cfg(feature = "cuda")]
unsafe fn margin_forward_gpu(
    layer: &mut LargeMarginInnerProduct,
    blas: &ffi::Blas,
    pass: ffi::DeviceMarginForward,
) -> Result<()> {
    // SAFETY: the caller's.
    with_dtype!(pass.dtype, T => unsafe {
        layer.forward_gpu::<T>(&DeviceBlas(blas), device_pass!(
            large_margin::gpu::Forward, pass, features, labels, weights, logits, plain, scratch
        ))
    })
}

#[cfg(feature = "cuda")]
unsafe fn margin_backward_gpu(
    layer: &LargeMarginInnerProduct,
    blas: &ffi::Blas,
    pass: ffi::DeviceMarginBackward,
) -> Result<()> {
    // SAFETY: the caller's.
    with_dtype!(pass.dtype, T => unsafe {
        layer.backward_gpu::<T>(&DeviceBlas(blas), device_pass!(
            large_margin::gpu::Backward, pass, logits_diff, plain_diff, features, weights,
            features_diff, weights_diff, scratch
        ))
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

fn bn_forward(layer: &mut BatchNorm, pass: ffi::BnForward<'_>) -> Result<()> {
    with_dtype!(pass.dtype, T => layer.forward::<T>(batch_norm::cpu::Forward {
        bottom: given(pass.bottom)?, slope: values(pass.slope)?, bias: values(pass.bias)?,
        moving: match given_mut(pass.update_mean)? {
            Some(mean) => Moving::Update { mean, inv_std: values_mut(pass.update_inv_std)? },
            None => Moving::Read {
                mean: values(pass.moving_mean)?, inv_std: values(pass.moving_inv_std)?,
            },
        },
        top: values_mut(pass.top)?, x_hat: given_mut(pass.x_hat)?,
    }))
}

fn bn_backward(layer: &mut BatchNorm, pass: ffi::BnBackward<'_>) -> Result<()> {
    with_dtype!(pass.dtype, T => layer.backward::<T>(batch_norm::cpu::Backward {
        top_diff: given(pass.top_diff)?, x: values(pass.x)?, slope: values(pass.slope)?,
        bottom_diff: given_mut(pass.bottom_diff)?,
        slope_diff: given_mut(pass.slope_diff)?, bias_diff: given_mut(pass.bias_diff)?,
    }))
}

#[cfg(feature = "cuda")]
unsafe fn bn_forward_gpu(layer: &mut BatchNorm, pass: ffi::DeviceBnForward) -> Result<()> {
    // SAFETY: the caller's.
    with_dtype!(pass.dtype, T => unsafe {
        layer.forward_gpu::<T>(device_pass!(
            batch_norm::gpu::Forward, pass, bottom, slope, bias, moving_mean, moving_inv_std,
            update_mean, update_inv_std, top, x_hat, scratch
        ))
    })
}

#[cfg(feature = "cuda")]
unsafe fn bn_backward_gpu(layer: &BatchNorm, pass: ffi::DeviceBnBackward) -> Result<()> {
    // SAFETY: the caller's.
    with_dtype!(pass.dtype, T => unsafe {
        layer.backward_gpu::<T>(device_pass!(
            batch_norm::gpu::Backward, pass, top_diff, x, slope, bottom_diff, slope_diff,
            bias_diff, scratch
        ))
    })
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
    fn bytes_are_values_where_they_are_aligned_and_whole() {
        let memory = [0x3f80_0000_3f80_0000u64; 3];
        // SAFETY: the memory of an array, as bytes.
        let bytes: &[u8] = unsafe { std::slice::from_raw_parts(memory.as_ptr().cast(), 24) };
        assert_eq!(values::<f32>(bytes).unwrap(), [1.0; 6]);
        assert_eq!(values::<f64>(bytes).unwrap().len(), 3);
        assert_eq!(values::<f32>(&bytes[4..12]).unwrap(), [1.0; 2]);
        assert_eq!(values::<f64>(&bytes[1..1]).unwrap(), [0.0; 0]);
        for bad in [&bytes[..23], &bytes[4..12], &bytes[1..9]] {
            let message = values::<f64>(bad).unwrap_err().to_string();
            assert!(
                message.contains(&format!("{} bytes at 0x", bad.len())),
                "{message}"
            );
        }
        assert!(given::<f32>(&[]).unwrap().is_none());
        assert!(given_mut::<f32>(&mut []).unwrap().is_none());
    }
}
