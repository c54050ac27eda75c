//! News of kernels.

use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::{result, sys};

use super::{Context, failed};
use crate::error::Result;

/// A word of host memory that kernels write and the host reads without waiting
/// for them: where a kernel leaves the news of bad input.
#[derive(Debug)]
pub struct Mailbox {
    word: *mut u64,
    /// Of the kernels that write to it.
    context: Context,
}

// SAFETY: the word belongs to the one Mailbox and is freed with it; CUDA's
// calls on it may come from any thread.
unsafe impl Send for Mailbox {}
// SAFETY: a shared Mailbox only loads the word, atomically.
unsafe impl Sync for Mailbox {}

impl Mailbox {
    /// What an empty mailbox holds.
    const EMPTY: u64 = u64::MAX;

    /// An empty mailbox for the kernels of a context, which is current.
    ///
    /// # Errors
    /// CUDA's.
    pub(super) fn new(context: Context) -> Result<Self> {
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: a plain allocation; the word is written before it is read.
        let word = unsafe { result::malloc_host(size_of::<u64>(), flags) }
            .map_err(|e| failed("allocate host memory", e))?
            .cast::<u64>();
        // SAFETY: fresh memory of that size, aligned to a page.
        unsafe { word.write(Self::EMPTY) };
        Ok(Mailbox { word, context })
    }

    /// The address under which kernels know the word: with unified addressing,
    /// which every supported GPU has, the host's own.
    pub fn device_address(&self) -> u64 {
        self.word as u64
    }

    /// What a kernel that has run so far left here.
    pub fn read(&self) -> Option<u64> {
        // SAFETY: the word lives as long as self and is aligned; a device may
        // write it at any time, all 8 bytes at once.
        let word = unsafe { AtomicU64::from_ptr(self.word) }.load(Ordering::Relaxed);
        (word != Self::EMPTY).then_some(word)
    }

    /// Waits until all kernels that have been launched so far have run.
    ///
    /// # Errors
    /// CUDA's, also the late news of an earlier kernel.
    pub fn wait(&self) -> Result<()> {
        let wait = || {
            let before = result::ctx::get_current()?;
            // SAFETY: a context that is gone is refused.
            unsafe { result::ctx::set_current(self.context.0) }?;
            // SAFETY: the null stream is the legacy default stream of the
            // current context.
            let done = unsafe { result::stream::synchronize(std::ptr::null_mut()) };
            // SAFETY: it was current a moment ago.
            unsafe { result::ctx::set_current(before.unwrap_or(std::ptr::null_mut())) }?;
            done
        };
        wait().map_err(|e| failed("wait for the kernels of the layer", e))
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        // A kernel may still write to it. Where one cannot wait for that (the
        // driver may be gone already, at the process's end) the word stays.
        if self.wait().is_ok() {
            // SAFETY: allocated in new, freed once, and no kernel that knows it
            // is left. An error leaves the word to the process's end.
            let _ = unsafe { result::free_host(self.word.cast()) };
        }
    }
}
