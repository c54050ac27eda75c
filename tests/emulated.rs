//! The GPU path without a GPU: from the bridge to the kernels, which build.rs
//! has compiled for the CPU into stand-ins for CUDA's driver.
//!
//! `cargo test --features emulated --test emulated`. Each program of tests/cuda
//! compares the layers' GPU path with their CPU path, under ThreadSanitizer and
//! under AddressSanitizer and UBSan; on kernels without their barriers
//! ThreadSanitizer must object.
#![cfg(feature = "emulated")]

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Once;

const PROGRAMS: [&str; 2] = ["large_margin_test", "batch_norm_test"];

const THREAD: &[&str] = &[
    "-fsanitize=thread",
    "--param",
    "tsan-distinguish-volatile=1",
];
const ADDRESS: &[&str] = &["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];

/// Where build.rs left the stand-ins; the programs go beside them.
fn folder() -> PathBuf {
    Path::new(env!("OUT_DIR")).join("emulated")
}

/// Cargo's target folder.
fn target() -> PathBuf {
    let test = env::current_exe().unwrap();
    test.ancestors().nth(3).unwrap().to_path_buf()
}

/// The library for C++, which cargo leaves where tests do not look.
fn library() -> PathBuf {
    static BUILT: Once = Once::new();
    BUILT.call_once(|| {
        let output = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()))
            .args([
                "build",
                "--locked",
                "--features",
                "emulated",
                "--target-dir",
            ])
            .arg(target())
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", text(&output));
    });
    target().join("debug/liblsoftmax.a")
}

fn text(output: &Output) -> String {
    let all = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&all).into_owned();
    // The first lines tell; a broken kernel fails everything after.
    text.lines().take(60).collect::<Vec<_>>().join("\n")
}

/// Compiles a program of tests/cuda with a sanitizer.
fn build(program: &str, sanitizer: &str, flags: &[&str]) -> PathBuf {
    let to = folder().join(format!("{program}_{sanitizer}"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let library = library();
    let output = Command::new(env!("LSOFTMAX_CXX"))
        .args(["-std=c++20", "-O1", "-g", "-fno-omit-frame-pointer"])
        .args(["-Wall", "-Wextra", "-Werror"])
        .args(flags)
        .arg("-I")
        .arg(root.join("include"))
        .arg("-I")
        .arg(Path::new(env!("OUT_DIR")).join("cxxbridge/include"))
        .arg("-o")
        .arg(&to)
        .arg(root.join("tests/cuda").join(program).with_extension("cpp"))
        .arg(library)
        .args(["-ldl", "-pthread"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{program}: {}", text(&output));
    to
}

/// Runs a program, with the stand-in of that name for a driver.
fn run(program: &Path, standin: Option<&str>) -> Output {
    // Where the C library is loaded at random, old ThreadSanitizers may not
    // start.
    let fixed = ["-R", "true"];
    let setarch = Command::new("setarch").args(fixed).output();
    let mut command = match setarch {
        Ok(output) if output.status.success() => {
            let mut command = Command::new("setarch");
            command.arg("-R").arg(program);
            command
        }
        _ => Command::new(program),
    };
    match standin {
        Some(name) => command.env("LD_LIBRARY_PATH", folder().join(name)),
        None => command
            .arg("--without-driver")
            .env_remove("LD_LIBRARY_PATH"),
    };
    command
        .env("TSAN_OPTIONS", "halt_on_error=1")
        .env("UBSAN_OPTIONS", "print_stacktrace=1")
        .output()
        .unwrap()
}

fn passes(sanitizer: &str, flags: &[&str]) {
    for name in PROGRAMS {
        let program = build(name, sanitizer, flags);
        let output = run(&program, Some(sanitizer));
        assert!(output.status.success(), "{name}: {}", text(&output));
    }
}

#[test]
fn the_gpu_path_is_the_cpu_path_and_has_no_race() {
    passes("thread", THREAD);
    // The tests can fail: without barriers there are races.
    for name in PROGRAMS {
        let output = run(
            &folder().join(format!("{name}_thread")),
            Some("no_barriers"),
        );
        let text = text(&output);
        assert!(!output.status.success(), "{name} finds no fault");
        assert!(
            text.contains("ThreadSanitizer: data race"),
            "{name}: {text}"
        );
    }
}

#[test]
fn the_gpu_path_accesses_no_memory_but_its_own() {
    passes("address", ADDRESS);
    for name in PROGRAMS {
        let output = run(&folder().join(format!("{name}_address")), None);
        assert!(output.status.success(), "{name}: {}", text(&output));
    }
}

#[test]
fn the_stand_ins_are_there() {
    for name in ["thread", "address", "no_barriers"] {
        assert!(fs::metadata(folder().join(name).join("libcuda.so.1")).is_ok());
    }
}
