//! Holds the documents to the tree: dependency direction, the list of unsafe files, named paths and tests, file sizes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Lines a source file may have. Longer ones must be split: one idea, one place.
const MAX_LINES: usize = 400;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// The lines of the fenced block of ARCHITECTURE.md with this label.
fn block(label: &str) -> Vec<String> {
    let text = read("ARCHITECTURE.md");
    let fence = format!("```{label}\n");
    let start = text.find(&fence).unwrap_or_else(|| panic!("no block {label}"));
    let body = &text[start + fence.len()..];
    body[..body.find("```").unwrap()].lines().map(str::to_owned).collect()
}

/// Files of the tree as git sees them: tracked, or new and not ignored.
fn files(suffix: &str) -> Vec<String> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .expect("git is there");
    assert!(output.status.success(), "git ls-files failed");
    let mut list: Vec<_> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .filter(|path| path.ends_with(suffix) && root().join(path).exists())
        .map(str::to_owned)
        .collect();
    list.sort();
    assert!(!list.is_empty(), "no file ends in {suffix}");
    list
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn crates_depend_only_on_what_the_architecture_allows() {
    let allowed: BTreeMap<String, BTreeSet<String>> = block("dependencies")
        .iter()
        .map(|line| {
            let (name, uses) = line.split_once(':').expect("name: crates");
            (name.to_owned(), uses.split_whitespace().map(str::to_owned).collect())
        })
        .collect();
    let mut seen = BTreeSet::new();
    for manifest in files("Cargo.toml") {
        let text = read(&manifest);
        let Some(name) = text.lines().find_map(|line| line.strip_prefix("name = ")) else { continue };
        let name = name.trim_matches('"').to_owned();
        if !name.starts_with("mvm-") {
            continue;
        }
        let rules = allowed.get(&name).unwrap_or_else(|| panic!("{name} is not in ARCHITECTURE.md"));
        let section = text.split("[dependencies]").nth(1).unwrap_or("");
        let section = section.split("\n[").next().unwrap();
        for used in section.lines().filter_map(|line| line.split([' ', '.', '=']).next()) {
            if used.starts_with("mvm-") {
                assert!(rules.contains(used), "{name} must not depend on {used}");
            }
        }
        seen.insert(name);
    }
    assert_eq!(seen, allowed.into_keys().collect(), "crates of the tree and of ARCHITECTURE.md differ");
}

#[test]
fn unsafe_code_is_only_in_the_listed_files() {
    let listed: BTreeSet<String> = block("unsafe").into_iter().collect();
    let found: BTreeSet<String> = files(".rs")
        .into_iter()
        .filter(|path| !path.starts_with("integration/"))
        .filter(|path| read(path).lines().any(has_unsafe))
        .collect();
    assert_eq!(found, listed, "left: files with unsafe code; right: files ARCHITECTURE.md lists");
}

/// Whether a line of source begins something unsafe. Comments do not.
fn has_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    ["unsafe {", "unsafe impl", "unsafe fn", "unsafe extern", "#[unsafe("]
        .iter()
        .any(|words| code.contains(words))
}

#[test]
fn every_path_the_documents_name_exists() {
    for document in ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md", "SECURITY.md"] {
        for quoted in read(document).split('`').skip(1).step_by(2) {
            let is_path = quoted.contains('/') && !quoted.contains([' ', '{', '<', '$', ':']);
            let ours =
                quoted.split('/').next().is_some_and(|top| !top.is_empty() && root().join(top).is_dir());
            if is_path && ours && !quoted.starts_with("target/") && !quoted.contains("toy") {
                assert!(root().join(quoted).exists(), "{document} names {quoted}, which does not exist");
            }
        }
    }
}

#[test]
fn source_files_stay_small() {
    let long: Vec<_> = files(".rs")
        .into_iter()
        .map(|path| (read(&path).lines().count(), path))
        .filter(|(lines, _)| *lines > MAX_LINES)
        .collect();
    assert!(long.is_empty(), "files over {MAX_LINES} lines: {long:?}");
}

#[test]
fn every_source_file_opens_with_a_sentence() {
    for path in files(".rs") {
        assert!(read(&path).starts_with("//! "), "{path} does not say what it is in its first line");
    }
}

/// What holds a promise is told by the name of a test or of a fuzz target, which are functions and texts in the source.
#[test]
fn every_test_that_holds_a_promise_exists() {
    let source: String = files(".rs").iter().map(|path| read(path)).collect();
    let text = read("SECURITY.md");
    let (_, promises) = text.split_once("## Promise by promise").expect("the section");
    let promises = promises.split("\n## ").next().expect("it has an end");
    let is_name =
        |word: &&str| word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    let names: Vec<&str> = promises.split('`').skip(1).step_by(2).filter(is_name).collect();
    assert!(names.len() > 70, "{names:?}");
    let exists =
        |name: &str| source.contains(&format!("fn {name}(")) || source.contains(&format!("\"{name}\""));
    let missing: Vec<_> = names.into_iter().filter(|name| !exists(name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
