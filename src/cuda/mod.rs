//! Devices, kernels and launches over CUDA's driver API.
//!
//! Caffe talks to the GPU through the CUDA runtime, which works in the context
//! that is current in a thread: a device's primary one or, where another library
//! of the program (PyCUDA, TensorRT) has made one, that. The same context and its
//! legacy default stream are used here too, so a kernel of ours runs between
//! Caffe's own in the order of the calls, and Caffe's device pointers are ours.
//! The driver library is opened when the first layer asks for a device: a build
//! with CUDA runs its CPU mode on a machine without a driver.

pub mod layout;
mod mailbox;

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, PoisonError};

use cudarc::driver::{DriverError, result, sys};

use crate::dtype::Dtype;
use crate::error::{Error, Result};
pub use mailbox::Mailbox;

/// A context of the driver's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Context(sys::CUcontext);

// SAFETY: a handle, which any thread may give to the driver.
unsafe impl Send for Context {}

impl Context {
    /// That of this thread.
    fn current() -> Result<Self> {
        result::ctx::get_current()
            .map_err(|e| failed("find the current context", e))?
            .map(Context)
            .ok_or_else(|| {
                // Caffe has one, so that is what the runtime's library knows.
                Error::new(
                    "CUDA: cannot find the context of Caffe: the driver library libcuda.so \
                     knows of none in this thread; is it the driver's own?",
                )
            })
    }
}

/// The kernels of a layer, loaded into a context.
#[derive(Debug, Clone, Copy)]
pub struct Kernels {
    module: sys::CUmodule,
    context: Context,
}

// SAFETY: handles, which any thread may give to the driver.
unsafe impl Send for Kernels {}

/// What is loaded, by the context and the image's address. Modules are never
/// unloaded: Caffe's contexts live as long as the process.
static LOADED: Mutex<BTreeMap<(Context, usize), Kernels>> = Mutex::new(BTreeMap::new());

impl Kernels {
    /// Those of `image`, in this thread's context: on the device that
    /// `Caffe::SetDevice` chose.
    ///
    /// # Errors
    /// No CUDA driver, no context yet, or kernels that the device cannot run.
    pub fn load(image: &'static [u8]) -> Result<Kernels> {
        // SAFETY: opens the driver library and nothing else.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::new(
                "GPU mode needs the CUDA driver library (libcuda), and there is none; \
                 install the driver of the GPU or set solver_mode: CPU",
            ));
        }
        result::init().map_err(|e| failed("start the CUDA driver", e))?;
        let context = Context::current()?;
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (context, image.as_ptr() as usize);
        if let Some(kernels) = loaded.get(&key) {
            return Ok(*kernels);
        }
        // A copy is aligned, as the compiler's sections of them are.
        let copy = image.to_vec();
        // SAFETY: a whole fat binary, which the driver copies.
        let module = unsafe { result::module::load_data(copy.as_ptr().cast()) }.map_err(|e| {
            failed(
                "load the kernels; was Caffe built for this GPU's architecture?",
                e,
            )
        })?;
        let kernels = Kernels { module, context };
        loaded.insert(key, kernels);
        Ok(kernels)
    }

    /// The kernel `name` for elements of type `T`.
    ///
    /// # Errors
    /// There is none.
    pub fn get<T: DeviceDtype>(&self, name: &str) -> Result<Kernel> {
        let name = format!("{name}_{}", T::SUFFIX);
        let symbol = CString::new(name.as_str()).expect("names of kernels have no NUL");
        // SAFETY: modules are never unloaded.
        unsafe { result::module::get_function(self.module, symbol) }
            .map(Kernel)
            .map_err(|e| failed(&format!("find the kernel {name}"), e))
    }

    /// An empty mailbox for these kernels.
    ///
    /// # Errors
    /// CUDA's.
    pub fn mailbox(&self) -> Result<Mailbox> {
        Mailbox::new(self.context)
    }
}

/// A kernel, ready to launch.
#[derive(Debug, Clone, Copy)]
pub struct Kernel(sys::CUfunction);

// SAFETY: a handle, which any thread may give to the driver.
unsafe impl Send for Kernel {}
// SAFETY: the same.
unsafe impl Sync for Kernel {}

impl Kernel {
    /// Launches on the legacy default stream, without waiting for it.
    ///
    /// # Errors
    /// What CUDA says, which may be the late news of an earlier kernel.
    ///
    /// # Safety
    /// `args` are pointers to the kernel's parameters, each of the type that
    /// the kernel declares, and the kernel stays within the memory they name.
    pub unsafe fn launch(
        &self,
        grid: (u32, u32),
        threads: u32,
        args: &mut [*mut c_void],
    ) -> Result<()> {
        // SAFETY: the caller vouches for the arguments; the null stream is
        // the legacy default stream.
        unsafe {
            result::launch_kernel(
                self.0,
                (grid.0, grid.1, 1),
                (threads, 1, 1),
                0,
                std::ptr::null_mut(),
                args,
            )
        }
        .map_err(|e| failed("launch a kernel", e))
    }
}

/// The parameters of a kernel as CUDA takes them: a pointer to each.
macro_rules! kernel_args {
    ($($arg:expr),* $(,)?) => {
        &mut [$(std::ptr::from_ref(&$arg).cast_mut().cast::<std::ffi::c_void>()),*]
    };
}
pub(crate) use kernel_args;

/// A [`Dtype`] that kernels are compiled for.
pub trait DeviceDtype: Dtype {
    /// What the names of its kernels end with.
    const SUFFIX: &'static str;
}

impl DeviceDtype for f32 {
    const SUFFIX: &'static str = "f32";
}

impl DeviceDtype for f64 {
    const SUFFIX: &'static str = "f64";
}

/// Copies `len` elements within device memory, in stream order.
///
/// # Safety
/// Both are device memory of `len` elements and do not overlap.
pub unsafe fn copy<T: DeviceDtype>(from: *const T, to: *mut T, len: usize) -> Result<()> {
    let bytes = len * size_of::<T>();
    // SAFETY: the caller's; the null stream is the legacy default stream.
    unsafe { result::memcpy_dtod_async(to as u64, from as u64, bytes, std::ptr::null_mut()) }
        .map_err(|e| failed("copy on the device", e))
}

/// Zeroes `len` elements of device memory, in stream order.
///
/// # Safety
/// `to` is device memory of `len` elements.
pub unsafe fn zero<T: DeviceDtype>(to: *mut T, len: usize) -> Result<()> {
    let bytes = len * size_of::<T>();
    // SAFETY: the caller's; the null stream is the legacy default stream.
    unsafe { result::memset_d8_async(to as u64, 0, bytes, std::ptr::null_mut()) }
        .map_err(|e| failed("zero device memory", e))
}

fn failed(what: &str, error: DriverError) -> Error {
    Error::new(format!("CUDA: cannot {what}: {error}"))
}
