//! The modules of the crate use those below them, never one above: read from
//! the sources, so that a circle cannot come back unseen.

use std::fs;
use std::path::{Path, PathBuf};

/// The crate's modules, from the top. A module uses those of later lines.
const CRATE: &[&[&str]] = &[
    &["bridge"],
    &["large_margin", "batch_norm"],
    &["param", "cuda", "blas", "simd", "pool", "last"],
    &["dtype"],
    &["error"],
];

/// Likewise of a layer's files, by `use super::`. What `mod.rs` itself defines,
/// the layer, all may use.
const LARGE_MARGIN: &[&[&str]] = &[
    &["cpu", "gpu", "diagnosis"],
    &["correction", "row", "schedule"],
    &["margin"],
];
const BATCH_NORM: &[&[&str]] = &[
    &["cpu", "gpu"],
    &["plan", "passes", "cut"],
    &["sums"],
    &["sweep", "x_hat"],
];

/// The modules that `source` names behind `prefix`, as in `use crate::a::b;` or
/// `use crate::{a, b::c};`, in comments or not: those point the same way.
fn named(source: &str, prefix: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in source.match_indices(prefix) {
        let rest = &source[at + prefix.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            found.extend(word(rest));
            continue;
        };
        let (mut depth, mut start) = (0, true);
        for (i, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => start = true,
                c if start && !c.is_whitespace() => {
                    found.extend(word(&group[i..]));
                    start = false;
                }
                _ => {}
            }
        }
    }
    found
}

fn word(text: &str) -> Option<String> {
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_'));
    let word = &text[..end.unwrap_or(text.len())];
    (!word.is_empty()).then(|| word.to_string())
}

fn rank(order: &[&[&str]], module: &str) -> Option<usize> {
    order.iter().position(|rank| rank.contains(&module))
}

/// What is wrong with the uses of `module` in `source`.
fn faults(order: &[&[&str]], module: &str, source: &str, prefix: &str) -> Vec<String> {
    let Some(own) = rank(order, module) else {
        return vec![format!("{module} has no place in the order of modules")];
    };
    let up = |used: &String| used != module && rank(order, used).is_some_and(|used| used <= own);
    let uses = named(source, prefix).into_iter().filter(up);
    uses.map(|used| format!("{module} uses {used}")).collect()
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut all: Vec<PathBuf> = entries
        .flat_map(|path| {
            if path.is_dir() {
                sources(&path)
            } else {
                vec![path]
            }
        })
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .collect();
    all.sort();
    all
}

#[test]
fn no_module_uses_one_above_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut all, mut seen) = (Vec::new(), 0);
    for path in sources(&src) {
        let inside = path.strip_prefix(&src).unwrap();
        let top = inside.components().next().unwrap().as_os_str();
        let module = Path::new(top).file_stem().unwrap().to_str().unwrap();
        if module == "lib" {
            continue;
        }
        seen += 1;
        let source = fs::read_to_string(&path).unwrap();
        all.extend(faults(CRATE, module, &source, "crate::"));
        let file = path.file_stem().unwrap().to_str().unwrap();
        match module {
            "large_margin" if file != "mod" => {
                all.extend(faults(LARGE_MARGIN, file, &source, "super::"));
            }
            "batch_norm" if file != "mod" => {
                all.extend(faults(BATCH_NORM, file, &source, "super::"));
            }
            _ => {}
        }
    }
    assert!(all.is_empty(), "{all:?}");
    assert!(seen > 20, "{seen} sources in {}", src.display());
}

#[test]
fn an_arrow_that_runs_up_is_found() {
    let of = |module, source| faults(CRATE, module, source, "crate::");
    assert_eq!(of("cuda", "use crate::dtype::Dtype;"), [""; 0]);
    assert_eq!(
        of("cuda", "use crate::bridge::ffi::Blas;"),
        ["cuda uses bridge"]
    );
    assert_eq!(
        of(
            "simd",
            "use crate::{dtype::{A, B}, batch_norm::sums,\n  pool};"
        ),
        ["simd uses batch_norm", "simd uses pool"]
    );
    assert_eq!(
        of("batch_norm", "crate::large_margin::row::norm(x)").len(),
        1
    );
    assert_eq!(of("news", "").len(), 1);
    assert_eq!(
        faults(
            BATCH_NORM,
            "sums",
            "use super::passes::Normalize;",
            "super::"
        ),
        ["sums uses passes"]
    );
}
