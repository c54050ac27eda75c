//! The threads of BN on the CPU: how many, that results do not depend on it,
//! and that a forked child has its own.
//!
//! Each case runs in a process of its own, this test program started once
//! more: the variables are read once a process.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::process::Command;
use std::thread;

use lsoftmax::batch_norm::BatchNorm;
use lsoftmax::batch_norm::cpu::{Backward, Forward, Moving};
use lsoftmax::dtype::Dtype;
use lsoftmax::param::BnParameter;

/// What tells a process that it is to run one of the two cases below.
const CASE: &str = "LSOFTMAX_THREADS_TEST";

/// A hash of all that passes over some shapes give, bit by bit.
fn passes() -> u64 {
    let mut hash = DefaultHasher::new();
    // Chunks of some samples; of a part of a sample; columns; one chunk.
    pass::<f32>([64, 48, 100], &mut hash);
    pass::<f32>([1, 24, 12000], &mut hash);
    pass::<f64>([1000, 300, 1], &mut hash);
    pass::<f64>([5, 4, 3], &mut hash);
    hash.finish()
}

fn pass<T: Dtype>([n, c, s]: [usize; 3], hash: &mut DefaultHasher) {
    let values = |seed: f64| -> Vec<T> {
        (0..n * c * s)
            .map(|i| T::from_f64((seed + i as f64 * 0.7).sin()))
            .collect()
    };
    let (x, g) = (values(0.1), values(0.2));
    let slope: Vec<T> = (0..c).map(|i| T::from_f64(1.0 + i as f64)).collect();
    let [mut mean, mut inv_std, mut dslope, mut dbias] = [0; 4].map(|_| vec![T::from_f64(0.5); c]);
    let mut layer = BatchNorm::new(&BnParameter::default(), true).unwrap();
    layer.reshape(&[n as i32, c as i32, s as i32]).unwrap();

    for in_place in [false, true] {
        let (mut y, mut dx, mut x_hat) = (x.clone(), g.clone(), x.clone());
        let pass = Forward {
            bottom: (!in_place).then_some(&x[..]),
            slope: &slope,
            bias: &slope,
            moving: Moving::Update {
                mean: &mut mean,
                inv_std: &mut inv_std,
            },
            top: &mut y,
            x_hat: in_place.then_some(&mut x_hat[..]),
        };
        layer.forward(pass).unwrap();
        let pass = Backward {
            top_diff: (!in_place).then_some(&g[..]),
            x: &x_hat,
            slope: &slope,
            bottom_diff: Some(&mut dx),
            slope_diff: Some(&mut dslope),
            bias_diff: Some(&mut dbias),
        };
        layer.backward(pass).unwrap();
        for value in [&y, &dx, &x_hat, &mean, &inv_std, &dslope, &dbias]
            .into_iter()
            .flatten()
        {
            let value: f64 = (*value).into();
            value.to_bits().hash(hash);
        }
    }
}

/// The numbers of the pool's threads in this process.
fn pool_threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).ok();
    tasks
        .filter_map(|task| name(task.unwrap()))
        .filter(|name| name.starts_with("lsoftmax-"))
        .count()
}

/// What a case prints, from a process with these variables.
fn run(case: &str, variables: &[(&str, &str)]) -> Vec<u64> {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "case", "--nocapture"])
        .env_remove("RAYON_NUM_THREADS")
        .env_remove("OMP_NUM_THREADS")
        .env(CASE, case)
        // Where the tests run under ThreadSanitizer: it ends forked children
        // that start threads.
        .env("TSAN_OPTIONS", "die_after_fork=0")
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{case} {variables:?}: {text}");
    let numbers = text.lines().filter_map(|line| line.strip_prefix("case: "));
    numbers.map(|number| number.parse().unwrap()).collect()
}

/// What the other tests start; by itself it does nothing.
#[test]
fn case() {
    // On a line of its own: the test runner leaves one open.
    println!();
    match env::var(CASE).as_deref() {
        Ok("count") => println!("case: {}\ncase: {}", passes(), pool_threads()),
        Ok("fork") => {
            println!("case: {}", passes());
            println!("case: {}\ncase: {}", in_child(false), in_child(true));
            // The parent goes on with the pool that it has.
            println!("case: {}\ncase: {}", passes(), pool_threads());
        }
        _ => {}
    }
}

/// [`passes`] in a forked child or, `again`, in that child's child.
fn in_child(again: bool) -> u64 {
    let mut ends = [0; 2];
    // SAFETY: two fresh descriptors, each owned by one File.
    let (mut read, mut write) = unsafe {
        assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
        (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1]))
    };
    // SAFETY: the child touches nothing that another thread may hold but the
    // allocator, which the C library keeps usable, and ends without return.
    match unsafe { libc::fork() } {
        0 => {
            // A child that hangs is killed.
            // SAFETY: no memory is involved.
            unsafe { libc::alarm(60) };
            let hash = if again {
                passes();
                in_child(false)
            } else {
                passes()
            };
            let done = write.write_all(&hash.to_ne_bytes()).is_ok();
            // SAFETY: ends the process.
            unsafe { libc::_exit(i32::from(!done)) }
        }
        child => {
            drop(write);
            let mut hash = [0; 8];
            let got = read.read_exact(&mut hash);
            // SAFETY: a null pointer stands for a status that is not wanted.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
            got.expect("the child ended without a result");
            u64::from_ne_bytes(hash)
        }
    }
}

#[test]
fn the_variables_say_how_many_and_the_number_changes_nothing() {
    let cpus = thread::available_parallelism().unwrap().to_string();
    let cases: [(&[(&str, &str)], &str); 9] = [
        (&[], &cpus),
        (&[("OMP_NUM_THREADS", "1")], "1"),
        (&[("OMP_NUM_THREADS", "3")], "3"),
        (&[("OMP_NUM_THREADS", "5,2")], "5"),
        (&[("RAYON_NUM_THREADS", "1")], "1"),
        (&[("RAYON_NUM_THREADS", "8")], "8"),
        (&[("RAYON_NUM_THREADS", "2"), ("OMP_NUM_THREADS", "1")], "2"),
        (&[("RAYON_NUM_THREADS", "0"), ("OMP_NUM_THREADS", "4")], "4"),
        (
            &[("RAYON_NUM_THREADS", "many"), ("OMP_NUM_THREADS", "")],
            &cpus,
        ),
    ];
    let mut results = BTreeSet::new();
    for (variables, threads) in cases {
        let got = run("count", variables);
        // The caller's thread needs no pool.
        let wanted = threads.parse::<u64>().unwrap();
        let pool = if wanted == 1 { 0 } else { wanted };
        assert_eq!(got[1], pool, "threads with {variables:?}");
        results.insert(got[0]);
    }
    assert_eq!(results.len(), 1, "results depend on the number of threads");
}

#[test]
fn a_forked_child_and_its_child_give_what_the_parent_gives() {
    for threads in ["1", "3"] {
        let got = run("fork", &[("RAYON_NUM_THREADS", threads)]);
        assert_eq!(got[..4], [got[0]; 4], "parent, child, grandchild, parent");
        assert_eq!(got[4], if threads == "1" { 0 } else { 3 });
    }
}
