//! What two places say, they say alike: the layer parameters in src/param.rs
//! and in the patch of caffe.proto; psi and the descent of lambda here and in
//! the Python tools, by tables that tests/examples/test_facts.py reads as well.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use lsoftmax::large_margin::margin::Margin;
use lsoftmax::large_margin::schedule::Schedule;
use lsoftmax::param::{LargeMarginInnerProductParameter, LargeMarginType};

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A field: its type, its number, its default.
type Field = (String, u32, Option<String>);

/// The fields of the one message that a patch adds, by name.
fn fields_of_patch(path: &str) -> BTreeMap<String, Field> {
    let patch = read(path);
    let added = patch.lines().filter_map(|line| line.strip_prefix('+'));
    let lines = added
        .skip_while(|line| !line.starts_with("message "))
        .filter_map(|line| line.trim().strip_prefix("optional "));
    let field = |line: &str| {
        let (head, tail) = line.split_once(" = ").unwrap();
        let (kind, name) = head.split_once(' ').unwrap();
        let tail = tail.trim_end_matches(';');
        let (number, default) = match tail.split_once(" [default = ") {
            Some((number, default)) => (number, Some(default.trim_end_matches(']').to_string())),
            None => (tail, None),
        };
        let number = number.parse().unwrap();
        (name.to_string(), (kind.to_string(), number, default))
    };
    lines.map(field).collect()
}

/// The fields of a struct of src/param.rs, by name.
fn fields_of_struct(name: &str) -> BTreeMap<String, Field> {
    let source = read("src/param.rs");
    let (_, body) = source.split_once(&format!("pub struct {name} {{")).unwrap();
    let (body, _) = body.split_once("\n}").unwrap();
    let field = |text: &str| {
        let (attribute, rest) = text.split_once(")]").unwrap();
        let (_, name) = rest.split_once("pub ").unwrap();
        let (name, _) = name.split_once(':').unwrap();
        let (mut kind, mut number, mut default) = (None, None, None);
        for part in attribute
            .split(',')
            .map(str::trim)
            .filter(|p| !p.is_empty())
        {
            match part.split_once(" = ") {
                None if part == "optional" => {}
                None => kind = Some(part.to_string()),
                Some((key, value)) => {
                    let value = value.trim_matches('"').to_string();
                    match key {
                        "enumeration" => kind = Some(value),
                        "tag" => number = Some(value.parse().unwrap()),
                        "default" => default = Some(value),
                        _ => panic!("{part}"),
                    }
                }
            }
        }
        let name = name.trim_start_matches("r#").to_string();
        (name, (kind.unwrap(), number.unwrap(), default))
    };
    body.split("#[prost(").skip(1).map(field).collect()
}

/// Both ways of writing a default: SINGLE and Single, and that of proto2 for a
/// field without one.
fn same_default(proto: Option<&str>, rust: Option<&str>, kind: &str) -> bool {
    let rust = match (proto, rust, kind) {
        // prost wants 0 written where a getter is wanted.
        (None, Some("0"), "int64") => None,
        _ => rust,
    };
    proto.map(str::to_lowercase) == rust.map(str::to_lowercase)
}

fn compare(patch: &str, name: &str, only_in_cpp: &[&str]) {
    let (proto, rust) = (fields_of_patch(patch), fields_of_struct(name));
    for (field, (kind, number, default)) in &rust {
        let (proto_kind, proto_number, proto_default) = proto
            .get(field)
            .unwrap_or_else(|| panic!("{patch} has no {field}"));
        assert_eq!((kind, number), (proto_kind, proto_number), "{field}");
        assert!(
            same_default(proto_default.as_deref(), default.as_deref(), kind),
            "{field}: {proto_default:?} in {patch}, {default:?} here"
        );
    }
    let missing: Vec<&String> = proto.keys().filter(|f| !rust.contains_key(*f)).collect();
    assert_eq!(missing, only_in_cpp, "fields that src/param.rs leaves out");
}

#[test]
fn parameters_are_those_of_the_patches() {
    compare(
        "caffe_patch/caffe_proto_large_margin.patch",
        "LargeMarginInnerProductParameter",
        &["weight_filler"],
    );
    compare(
        "caffe_patch/caffe_proto_bn.patch",
        "BnParameter",
        &["bias_filler", "engine", "slope_filler"],
    );
}

#[test]
fn margins_that_have_a_name_are_those_of_the_patch() {
    let patch = read("caffe_patch/caffe_proto_large_margin.patch");
    for (number, name) in ["SINGLE", "DOUBLE", "TRIPLE", "QUADRUPLE"]
        .iter()
        .enumerate()
    {
        assert!(
            patch.contains(&format!("+    {name} = {number};")),
            "{name}"
        );
        let kind = LargeMarginType::try_from(number as i32).unwrap();
        assert_eq!(format!("{kind:?}").to_uppercase(), *name);
    }
}

/// The rows of a table: numbers apart by blanks; lines with # are words.
fn table(path: &str) -> Vec<Vec<f64>> {
    let text = read(path);
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let numbers = |line: &str| line.split(' ').map(|n| n.parse().unwrap()).collect();
    lines.map(numbers).collect()
}

#[test]
fn psi_is_that_of_the_table() {
    let rows = table("tests/facts/psi.txt");
    assert!(rows.len() > 100);
    for row in rows {
        let (m, theta, want) = (row[0] as u32, row[1], row[2]);
        let (psi, _) = Margin::new(m).unwrap().at(theta.cos());
        assert!(
            (psi - want).abs() < 1e-9,
            "m {m}, theta {theta}: {psi}, not {want}"
        );
    }
}

#[test]
fn lambda_is_that_of_the_table() {
    let rows = table("tests/facts/lambda.txt");
    assert!(rows.len() > 100);
    for row in rows {
        let param = LargeMarginInnerProductParameter {
            base: Some(row[0] as f32),
            gamma: Some(row[1] as f32),
            power: Some(row[2] as f32),
            lambda_min: Some(row[3] as f32),
            ..Default::default()
        };
        let lambda = Schedule::new(&param).unwrap().lambda(row[4] as i64);
        // The parameters are floats, which the table's author has not.
        assert!(
            (lambda - row[5]).abs() <= 2e-5 * row[5],
            "{row:?}: {lambda}"
        );
    }
}
