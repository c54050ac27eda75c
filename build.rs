//! Compiles the C++ half of the cxx bridge into the crate and, with the feature
//! `cuda`, the kernels into fat binaries that the crate embeds; with the feature
//! `emulated`, the kernels for the CPU, into stand-ins for CUDA's driver.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

#[allow(dead_code)] // the crate uses the rest
#[path = "src/cuda/layout.rs"]
mod layout;

/// The layers that have kernels, with the macros of these.
const KERNELS: [(&str, &[(&str, usize)]); 2] = [
    ("large_margin", layout::large_margin::MACROS),
    ("batch_norm", layout::batch_norm::MACROS),
];

/// What a fat binary begins with.
const FAT_BINARY: u32 = 0xba55_ed50;

fn main() {
    cxx_build::bridge("src/bridge/ffi.rs")
        .include("include")
        .std("c++11")
        .warnings(true)
        .compile("lsoftmax-bridge");

    for input in ["build.rs", "src/bridge/ffi.rs", "src/cuda/layout.rs"] {
        println!("cargo::rerun-if-changed={input}");
    }
    println!("cargo::rerun-if-changed=include/lsoftmax/blas.hpp");

    let emulated = env::var_os("CARGO_FEATURE_EMULATED").is_some();
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        let compiler = compiler();
        for (layer, macros) in KERNELS {
            println!("cargo::rerun-if-changed=src/{layer}/kernels.cu");
            let image = out_dir().join(format!("{layer}.fatbin"));
            println!("cargo::rerun-if-env-changed=LSOFTMAX_NVCC");
            match env::var_os("LSOFTMAX_NVCC") {
                // The stand-ins look at no more of an image.
                None if emulated => {
                    fs::write(image, FAT_BINARY.to_le_bytes()).expect("OUT_DIR can be written to")
                }
                nvcc => compile_kernels(
                    &nvcc.map_or_else(default_nvcc, PathBuf::from),
                    &compiler,
                    layer,
                    macros,
                    &image,
                ),
            }
        }
        if emulated {
            emulate(&compiler);
        }
    }
}

fn out_dir() -> PathBuf {
    PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"))
}

/// The C++ compiler that cc finds, or that CXX names.
fn compiler() -> PathBuf {
    let tool = cc::Build::new().cpp(true).get_compiler();
    tool.path().to_path_buf()
}

/// Compiles a layer's kernels with `nvcc` to `image`.
///
/// Caffe's build passes its own nvcc in `LSOFTMAX_NVCC`, its own architecture
/// flags (`-gencode ...`) in `LSOFTMAX_NVCC_FLAGS` and its host compiler in
/// `NVCC_CCBIN`. Without them the nvcc in PATH or in /usr/local/cuda compiles
/// for every architecture that it knows, with the compiler of the bridge.
fn compile_kernels(
    nvcc: &Path,
    compiler: &Path,
    layer: &str,
    macros: &[(&str, usize)],
    image: &Path,
) {
    println!("cargo::rerun-if-env-changed=LSOFTMAX_NVCC_FLAGS");
    println!("cargo::rerun-if-env-changed=NVCC_CCBIN");
    let flags = env::var("LSOFTMAX_NVCC_FLAGS").unwrap_or_else(|_| "-arch=all".to_string());
    let source = format!("src/{layer}/kernels.cu");
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-O3"]).args(definitions(macros));
    if env::var_os("NVCC_CCBIN").is_none() {
        command.arg("-ccbin").arg(compiler);
    }
    let status = command
        .args(flags.split_whitespace())
        .arg("-o")
        .args([image.as_os_str(), source.as_ref()])
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

/// The numbers of layout.rs, for a compiler.
fn definitions(macros: &[(&str, usize)]) -> Vec<String> {
    let definition = |(name, value): &(&str, usize)| format!("-D{name}={value}");
    macros.iter().map(definition).collect()
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

// ---- The feature `emulated` ----

/// Builds `$OUT_DIR/emulated/NAME/libcuda.so.1`, stand-ins for the driver that
/// run the kernels on the CPU, for tests/emulated.rs: `thread` and `address`
/// for the two sanitizers, and `no_barriers`, where a test must find races.
fn emulate(compiler: &Path) {
    println!("cargo::rerun-if-changed=tests/cuda");
    println!("cargo::rustc-env=LSOFTMAX_CXX={}", compiler.display());
    let folder = out_dir().join("emulated");
    let sources = KERNELS.map(|(layer, macros)| prepare(compiler, &folder, layer, macros));
    thread::scope(|scope| {
        for (name, flags, definition) in [
            ("thread", THREAD, None),
            ("address", ADDRESS, None),
            ("no_barriers", THREAD, Some("-DEMULATE_UNORDERED_BARRIERS")),
        ] {
            let sources = &sources;
            let to = folder.join(name);
            scope.spawn(move || {
                fs::create_dir_all(&to).expect("OUT_DIR can be written to");
                let mut command = Command::new(compiler);
                command
                    .args(["-std=c++20", "-O1", "-g", "-fno-omit-frame-pointer"])
                    .args(["-Wall", "-Wextra", "-Werror", "-Itests/cuda"])
                    .args(flags)
                    .args(definition)
                    .args(["-fPIC", "-shared", "-pthread", "-Wl,-soname,libcuda.so.1"])
                    .arg("-o")
                    .arg(to.join("libcuda.so.1"))
                    .arg("tests/cuda/libcuda.cpp")
                    .args(sources);
                run(&mut command);
            });
        }
    });
}

/// tests/cuda/emulate.hpp says why the parameter.
const THREAD: &[&str] = &[
    "-fsanitize=thread",
    "--param",
    "tsan-distinguish-volatile=1",
];
const ADDRESS: &[&str] = &["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];

/// Writes a source file that compiles a layer's kernels for the CPU and tells
/// the stand-in their names.
fn prepare(compiler: &Path, folder: &Path, layer: &str, macros: &[(&str, usize)]) -> PathBuf {
    fs::create_dir_all(folder).expect("OUT_DIR can be written to");
    let source = folder.join(format!("{layer}.cpp"));
    let kernels = fs::read_to_string(format!("src/{layer}/kernels.cu"))
        .expect("the kernels are in their layer's folder");
    let definitions: String = macros
        .iter()
        .map(|(name, value)| format!("#define {name} {value}\n"))
        .collect();
    let mut text = format!("#include \"emulate.hpp\"\n#include \"standin.hpp\"\n{definitions}");
    text.push_str(&kernels);
    fs::write(&source, &text).expect("OUT_DIR can be written to");

    // Macros make the kernels; the preprocessor shows which.
    let mut command = Command::new(compiler);
    command
        .args(["-std=c++20", "-E", "-P", "-Itests/cuda"])
        .arg(&source);
    let expanded = command.output().expect("the C++ compiler runs");
    assert!(expanded.status.success(), "{command:?} failed");
    let expanded = String::from_utf8_lossy(&expanded.stdout).into_owned();
    let names = expanded
        .split("extern \"C\"")
        .filter_map(|rest| rest.split_once('(')?.0.trim().strip_prefix("void "))
        .map(str::trim)
        .filter(|name| name.ends_with("_f32") || name.ends_with("_f64"));
    let registered: String = names
        .map(|name| format!("STANDIN_KERNEL({name})\n"))
        .collect();
    assert!(!registered.is_empty(), "no kernel in {}", source.display());
    fs::write(&source, text + &registered).expect("OUT_DIR can be written to");
    source
}

fn run(command: &mut Command) {
    let output = command.output().expect("the C++ compiler runs");
    assert!(
        output.status.success(),
        "{:?} failed: {}",
        command.get_args().collect::<Vec<&OsStr>>(),
        String::from_utf8_lossy(&output.stderr)
    );
}
