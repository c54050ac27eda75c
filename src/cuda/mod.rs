//! Devices, kernels and launches over CUDA's driver API.
//!
//! Caffe talks to the GPU through the CUDA runtime. Its primary context and
//! its legacy default stream are used here too, so a kernel of ours runs
//! between Caffe's own in the order of the calls, and Caffe's device pointers
//! are ours. The driver library is opened when the first layer asks for a
//! device: a build with CUDA runs its CPU mode on a machine without a driver.

pub mod layout;
mod mailbox;

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError, result, sys};
use cudarc::nvrtc::Ptx;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
pub use mailbox::Mailbox;

/// The kernels of a layer, loaded on a GPU.
#[derive(Debug, Clone)]
pub struct Kernels {
    module: Arc<CudaModule>,
    context: Arc<CudaContext>,
}

/// What is loaded, by the device's number and the image's address. Modules are
/// never unloaded: Caffe's contexts live as long as the process.
static LOADED: Mutex<BTreeMap<(i32, usize), Kernels>> = Mutex::new(BTreeMap::new());

impl Kernels {
    /// Those of `image`, on the device that this thread's CUDA context is of,
    /// which is the one that `Caffe::SetDevice` chose.
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
        let mut number = -1;
        // SAFETY: number outlives the call, which only writes to it.
        unsafe { sys::cuCtxGetDevice(&mut number) }
            .result()
            .map_err(|e| failed("find the current device", e))?;

        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (number, image.as_ptr() as usize);
        if let Some(kernels) = loaded.get(&key) {
            return Ok(kernels.clone());
        }
        let context = CudaContext::new(number as usize)
            .map_err(|e| failed("use the primary context of the device", e))?;
        let module = context
            .load_module(Ptx::from_binary(image.to_vec()))
            .map_err(|e| {
                failed(
                    "load the kernels; was Caffe built for this GPU's architecture?",
                    e,
                )
            })?;
        let kernels = Kernels { module, context };
        loaded.insert(key, kernels.clone());
        Ok(kernels)
    }

    /// The kernel `name` for elements of type `T`.
    ///
    /// # Errors
    /// There is none.
    pub fn get<T: DeviceDtype>(&self, name: &str) -> Result<Kernel> {
        let name = format!("{name}_{}", T::SUFFIX);
        self.module
            .load_function(&name)
            .map(Kernel)
            .map_err(|e| failed(&format!("find the kernel {name}"), e))
    }

    /// An empty mailbox for these kernels.
    ///
    /// # Errors
    /// CUDA's.
    pub fn mailbox(&self) -> Result<Mailbox> {
        Mailbox::new(self.context.clone())
    }
}

/// A kernel, ready to launch.
#[derive(Debug, Clone)]
pub struct Kernel(CudaFunction);

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
                self.0.cu_function(),
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
