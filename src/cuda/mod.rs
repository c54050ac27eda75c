//! Devices, kernels and launches over CUDA's driver API.
//!
//! Caffe talks to the GPU through the CUDA runtime. Its primary context and
//! its legacy default stream are used here too, so a kernel of ours runs
//! between Caffe's own in the order of the calls, and Caffe's device pointers
//! are ours. The driver library is opened when the first layer asks for a
//! device: a build with CUDA runs its CPU mode on a machine without a driver.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError, result, sys};
use cudarc::nvrtc::Ptx;

use crate::bridge::ffi::Blas;
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// The kernels, compiled by build.rs for the architectures of Caffe's build.
static LARGE_MARGIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/large_margin.fatbin"));
static BATCH_NORM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/batch_norm.fatbin"));

/// A GPU with the kernels loaded.
#[derive(Debug)]
pub struct Device {
    large_margin: Arc<CudaModule>,
    batch_norm: Arc<CudaModule>,
}

/// The devices in use, by number. Modules are never unloaded: Caffe's contexts
/// live as long as the process.
static DEVICES: Mutex<BTreeMap<i32, Arc<Device>>> = Mutex::new(BTreeMap::new());

impl Device {
    /// The device that this thread's CUDA context is of, which is the one that
    /// `Caffe::SetDevice` chose.
    ///
    /// # Errors
    /// No CUDA driver, no context yet, or kernels that the device cannot run.
    pub fn current() -> Result<Arc<Device>> {
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

        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = devices.get(&number) {
            return Ok(device.clone());
        }
        let context = CudaContext::new(number as usize)
            .map_err(|e| failed("use the primary context of the device", e))?;
        let load = |image: &[u8]| {
            context
                .load_module(Ptx::from_binary(image.to_vec()))
                .map_err(|e| {
                    failed(
                        "load the kernels; was Caffe built for this GPU's architecture?",
                        e,
                    )
                })
        };
        let device = Arc::new(Device {
            large_margin: load(LARGE_MARGIN)?,
            batch_norm: load(BATCH_NORM)?,
        });
        devices.insert(number, device.clone());
        Ok(device)
    }

    /// The kernel `name` of the margin layer for elements of type `T`.
    pub fn large_margin_kernel<T: DeviceDtype>(&self, name: &str) -> Result<Kernel> {
        Kernel::new::<T>(&self.large_margin, name)
    }

    /// The kernel `name` of the BN layer for elements of type `T`.
    pub fn batch_norm_kernel<T: DeviceDtype>(&self, name: &str) -> Result<Kernel> {
        Kernel::new::<T>(&self.batch_norm, name)
    }
}

/// A kernel, ready to launch.
#[derive(Debug, Clone)]
pub struct Kernel(CudaFunction);

impl Kernel {
    fn new<T: DeviceDtype>(module: &Arc<CudaModule>, name: &str) -> Result<Self> {
        let name = format!("{name}_{}", T::SUFFIX);
        module
            .load_function(&name)
            .map(Kernel)
            .map_err(|e| failed(&format!("find the kernel {name}"), e))
    }

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

/// A [`Dtype`] on the device: its kernels and its cuBLAS product.
pub trait DeviceDtype: Dtype {
    /// What the names of its kernels end with.
    const SUFFIX: &'static str;

    /// [`Gemm::gemm`](crate::gemm::Gemm::gemm) on device memory.
    ///
    /// # Safety
    /// The pointers are device memory of the sizes that `dims` give.
    unsafe fn gemm(
        blas: &Blas,
        dims: [i32; 3],
        a: (bool, *const Self),
        b: (bool, *const Self),
        beta: Self,
        c: *mut Self,
    );
}

macro_rules! impl_device_dtype {
    ($t:ty, $suffix:literal, $gemm:ident) => {
        impl DeviceDtype for $t {
            const SUFFIX: &'static str = $suffix;

            unsafe fn gemm(
                blas: &Blas,
                [m, n, k]: [i32; 3],
                (transpose_a, a): (bool, *const Self),
                (transpose_b, b): (bool, *const Self),
                beta: Self,
                c: *mut Self,
            ) {
                // SAFETY: the caller's.
                unsafe { blas.$gemm(transpose_a, transpose_b, m, n, k, a, b, beta, c) }
            }
        }
    };
}

impl_device_dtype!(f32, "f32", gemm_f32);
impl_device_dtype!(f64, "f64", gemm_f64);

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

/// A word of host memory that kernels write and the host reads without
/// waiting for them: where a kernel leaves the news of bad input.
#[derive(Debug)]
pub struct Mailbox(*mut u64);

// SAFETY: the word belongs to the one Mailbox and is freed with it; CUDA's
// calls on it may come from any thread.
unsafe impl Send for Mailbox {}

impl Mailbox {
    /// What an empty mailbox holds.
    const EMPTY: u64 = u64::MAX;

    /// An empty mailbox that every device can write to.
    pub fn new() -> Result<Self> {
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: a plain allocation; the word is written before it is read.
        let word = unsafe { result::malloc_host(size_of::<u64>(), flags) }
            .map_err(|e| failed("allocate host memory", e))?
            .cast::<u64>();
        // SAFETY: fresh memory of that size, aligned to a page.
        unsafe { word.write_volatile(Self::EMPTY) };
        Ok(Mailbox(word))
    }

    /// The address under which kernels know the word: with unified addressing,
    /// which every supported GPU has, the host's own.
    pub fn device_address(&self) -> u64 {
        self.0 as u64
    }

    /// What a kernel that has run so far left here.
    pub fn read(&self) -> Option<u64> {
        // SAFETY: the word lives as long as self; a device may write it at any
        // time, hence volatile; 8 aligned bytes are written at once.
        let word = unsafe { self.0.read_volatile() };
        (word != Self::EMPTY).then_some(word)
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        // SAFETY: allocated in new, freed once. The free waits for kernels that
        // may still write. An error leaves the word to the process's end.
        let _ = unsafe { result::free_host(self.0.cast()) };
    }
}

fn failed(what: &str, error: DriverError) -> Error {
    Error::new(format!("CUDA: cannot {what}: {error}"))
}
