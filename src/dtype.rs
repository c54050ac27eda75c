//! The element types that Caffe instantiates its layers for.

use std::ops::{Add, AddAssign, Mul, Sub};

use crate::error::{Error, Result};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// Caffe's `Dtype`: `float` or `double`. Sealed, since the bridge relies on any
/// bytes being a value.
pub trait Dtype:
    sealed::Sealed
    + Copy
    + Default
    + Send
    + Sync
    + Into<f64>
    + Add<Output = Self>
    + AddAssign
    + Sub<Output = Self>
    + Mul<Output = Self>
    + 'static
{
    /// The value nearest to `value`; beyond the type's range, infinity.
    fn from_f64(value: f64) -> Self;

    /// Neither zero, nor denormal, infinite or NaN.
    fn is_normal(self) -> bool;
}

impl Dtype for f32 {
    fn is_normal(self) -> bool {
        f32::is_normal(self)
    }

    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl Dtype for f64 {
    fn is_normal(self) -> bool {
        f64::is_normal(self)
    }

    fn from_f64(value: f64) -> Self {
        value
    }
}

/// `size` as Caffe, BLAS and the kernels count.
pub(crate) fn int(size: usize) -> Result<i32> {
    i32::try_from(size).map_err(|_| Error::new(format!("size {size} is more than an int holds")))
}
