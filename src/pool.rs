//! The threads of the CPU layers.
//!
//! A rayon pool of our own, not the global one: a program that embeds Caffe
//! may use that for itself, and a process that forked (pycaffe under
//! multiprocessing) has none of its threads. The child's first pass makes a
//! new pool.
//!
//! As many threads as `RAYON_NUM_THREADS` says, else `OMP_NUM_THREADS`, else
//! the CPUs that the process may use. Results do not depend on the number.

use std::env;
use std::num::NonZero;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::thread;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// The pool of this process; null before its first use. Never freed once it is
/// here: other threads may be in it.
static POOL: AtomicPtr<ThreadPool> = AtomicPtr::new(ptr::null_mut());

/// Whether `forget` runs in children.
static WATCHES_FORKS: AtomicBool = AtomicBool::new(false);

/// Calls `f` for each of `items`, on the pool's threads; where there is only
/// one item, or one thread to be used, on the caller's.
pub fn for_each<I: Send>(items: Vec<I>, f: impl Fn(I) + Send + Sync) {
    if items.len() > 1
        && let Some(pool) = pool()
    {
        pool.install(|| items.into_par_iter().for_each(f));
    } else {
        items.into_iter().for_each(f);
    }
}

/// The pool; None where the caller's thread is all that is wanted, or all that
/// the system gives.
fn pool() -> Option<&'static ThreadPool> {
    let mut pool = POOL.load(Ordering::Acquire);
    if pool.is_null() {
        let threads = threads();
        if threads == 1 {
            return None;
        }
        watch_forks();
        let name = |i| format!("lsoftmax-{i}");
        let builder = ThreadPoolBuilder::new().num_threads(threads);
        let made = Box::into_raw(Box::new(builder.thread_name(name).build().ok()?));
        let none = ptr::null_mut();
        pool = match POOL.compare_exchange(none, made, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => made,
            Err(first) => {
                // SAFETY: made above, and shared with nobody.
                drop(unsafe { Box::from_raw(made) });
                first
            }
        };
    }
    // SAFETY: not null, made by Box::into_raw, and never freed.
    Some(unsafe { &*pool })
}

/// How many threads are wanted, at least 1.
fn threads() -> usize {
    let by_variable = |name| {
        let value = env::var(name).ok()?;
        // OpenMP takes a list, of which the first is the outermost level's.
        let first = value.split(',').next()?.trim().parse().ok()?;
        NonZero::new(first).map(NonZero::get)
    };
    by_variable("RAYON_NUM_THREADS")
        .or_else(|| by_variable("OMP_NUM_THREADS"))
        .unwrap_or_else(|| thread::available_parallelism().map_or(1, NonZero::get))
}

/// Makes children of this process forget its pool.
fn watch_forks() {
    // No lock: a child forked while another thread holds it would wait for
    // ever. Two threads may both come here; to forget twice does no harm.
    if !WATCHES_FORKS.load(Ordering::Acquire) {
        // SAFETY: the handler only stores to an atomic, which a child of a
        // process with many threads may do. Without memory for the handler
        // forks stay unwatched; nothing else is wrong then.
        unsafe { libc::pthread_atfork(None, None, Some(forget)) };
        WATCHES_FORKS.store(true, Ordering::Release);
    }
}

/// In a child: the pool's threads have stayed in the parent. What the pool
/// holds is left as it is, for some of it may have been in use at the fork.
unsafe extern "C" fn forget() {
    POOL.store(ptr::null_mut(), Ordering::Release);
}
