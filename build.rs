//! Compiles the C++ half of the cxx bridge into the crate and, with the feature
//! `cuda`, the kernels into fat binaries that the crate embeds.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    cxx_build::bridge("src/bridge.rs")
        .include("include")
        .std("c++11")
        .warnings(true)
        .compile("lsoftmax-bridge");

    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/bridge.rs");
    println!("cargo::rerun-if-changed=include/lsoftmax/blas.hpp");

    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        compile_kernel("large_margin");
        compile_kernel("batch_norm");
    }
}

/// Compiles `src/cuda/NAME.cu` to `$OUT_DIR/NAME.fatbin`.
///
/// Caffe's build passes its own compiler in `LSOFTMAX_NVCC` and its own
/// architecture flags (`-gencode ...`) in `LSOFTMAX_NVCC_FLAGS`. Without them
/// the nvcc in PATH or in /usr/local/cuda compiles for every architecture that
/// it knows.
fn compile_kernel(name: &str) {
    println!("cargo::rerun-if-env-changed=LSOFTMAX_NVCC");
    println!("cargo::rerun-if-env-changed=LSOFTMAX_NVCC_FLAGS");
    let source = format!("src/cuda/{name}.cu");
    println!("cargo::rerun-if-changed={source}");

    let nvcc = env::var_os("LSOFTMAX_NVCC").map_or_else(default_nvcc, PathBuf::from);
    let flags = env::var("LSOFTMAX_NVCC_FLAGS").unwrap_or_else(|_| "-arch=all".to_string());
    let out = Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"))
        .join(format!("{name}.fatbin"));
    let status = Command::new(&nvcc)
        .args(["-fatbin", "-O3"])
        .args(flags.split_whitespace())
        .arg("-o")
        .args([out.as_os_str(), source.as_ref()])
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{} failed on {source}: {status}", nvcc.display()),
        Err(error) => panic!(
            "cannot run {} ({error}); the feature `cuda` needs CUDA's compiler: \
             set LSOFTMAX_NVCC to its path",
            nvcc.display()
        ),
    }
}

fn default_nvcc() -> PathBuf {
    let local = Path::new("/usr/local/cuda/bin/nvcc");
    let in_path = env::var_os("PATH")
        .is_some_and(|path| env::split_paths(&path).any(|dir| dir.join("nvcc").exists()));
    if in_path || !local.exists() {
        PathBuf::from("nvcc")
    } else {
        local.to_path_buf()
    }
}
