//! Runs the tests that the conformance tables name, and prints how each row stands (`make conformance`).
//!
//! Ends with `conformance: N rows, N checked, N not applicable, N missing`, and with code 1 if a row is missing: it
//! names no test, or one that there is not, or one that failed.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::collections::BTreeSet;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use mvm_devices::testing::conformance::{Row, Verdict, read};

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let tables = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance"))?;
    let named: BTreeSet<&String> = tables.values().flatten().flat_map(|row| &row.tests).collect();
    let passed = run(&test_program()?, &named)?;
    let [mut checked, mut not_applicable, mut missing] = [0, 0, 0];
    for (name, rows) in &tables {
        println!("\n{name}");
        for row in rows {
            let verdict = row.verdict(&passed);
            show(row, &verdict);
            *match verdict {
                Verdict::Checked => &mut checked,
                Verdict::NotApplicable => &mut not_applicable,
                Verdict::Missing(_) => &mut missing,
            } += 1;
        }
    }
    let rows = checked + not_applicable + missing;
    println!(
        "\nconformance: {rows} rows, {checked} checked, {not_applicable} not applicable, {missing} missing"
    );
    Ok(if missing == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn show(row: &Row, verdict: &Verdict) {
    let (mark, note) = match verdict {
        Verdict::Checked => ("checked", String::new()),
        Verdict::NotApplicable => {
            ("n/a", format!(" ({})", row.not_applicable.as_deref().unwrap_or_default()))
        }
        Verdict::Missing(why) => ("MISSING", format!(" ({why})")),
    };
    println!("{:<7} {:<14} {mark:<8} {}{note}", row.id, row.section, row.rule);
}

/// Builds this crate's unit tests; where they are.
fn test_program() -> Result<PathBuf, Box<dyn Error>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments =
        ["test", "--quiet", "--package", "mvm-devices", "--features", "testing", "--lib", "--no-run"];
    let output = Command::new(cargo)
        .args(arguments)
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err("the tests cannot be built".into());
    }
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        if message["target"]["name"] == "mvm_devices"
            && let Some(program) = message["executable"].as_str()
        {
            return Ok(program.into());
        }
    }
    Err("cargo does not say where the tests are".into())
}

/// Runs exactly these tests, as far as there are such; those that passed.
fn run(program: &Path, named: &BTreeSet<&String>) -> Result<BTreeSet<String>, Box<dyn Error>> {
    let output = Command::new(program).arg("--exact").args(named).stderr(Stdio::inherit()).output()?;
    let text = String::from_utf8(output.stdout)?;
    let results = text.lines().filter_map(|line| line.strip_prefix("test ")?.split_once(" ... "));
    let mut passed = BTreeSet::new();
    for (name, result) in results {
        if result == "ok" {
            passed.insert(name.to_owned());
        }
    }
    if !output.status.success() {
        eprintln!("{text}");
    }
    Ok(passed)
}
