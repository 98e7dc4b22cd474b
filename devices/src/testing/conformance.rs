//! What VIRTIO asks of these devices, row by row, and which test shows that they do it: the tables in
//! `devices/conformance/`.
//!
//! A row is checked by tests of this crate, or does not apply for a reason; there is nothing between. The tables are
//! TOML, of which only what they use is read: `[id]`, `key = "text"`, and a list of texts.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;

/// One requirement.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Its name, as in `C-001`.
    pub id: String,
    /// Section of VIRTIO 1.2, unless another version is named.
    pub section: String,
    /// What is asked of the device, in a few words. `(driver)` begins what is asked of drivers: then the device
    /// is to survive one that does not do it.
    pub rule: String,
    /// The tests that fail if it does not do it: paths within this crate.
    pub tests: Vec<String>,
    /// Why there is nothing to test.
    pub not_applicable: Option<String>,
}

/// How a row stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All its tests passed.
    Checked,
    /// There is nothing to test.
    NotApplicable,
    /// It is not shown, for this reason.
    Missing(String),
}

impl Row {
    /// How the row stands, if exactly the tests of `passed` passed.
    pub fn verdict(&self, passed: &BTreeSet<String>) -> Verdict {
        let missing = |why: &str| Verdict::Missing(why.to_owned());
        if self.section.is_empty() || self.rule.is_empty() {
            return missing("it has no section or no rule");
        }
        match (&self.not_applicable, self.tests.as_slice()) {
            (Some(why), []) if !why.is_empty() => Verdict::NotApplicable,
            (Some(_), _) => missing("it does not apply without a reason, or has tests all the same"),
            (None, []) => missing("it names no test"),
            (None, tests) => match tests.iter().find(|test| !passed.contains(*test)) {
                Some(test) => Verdict::Missing(format!("no such test passed: {test}")),
                None => Verdict::Checked,
            },
        }
    }
}

/// All tables of a directory, by the names of their files.
///
/// # Errors
/// The host's reason, or the line that is no part of a table; or a row that is there twice.
pub fn read(directory: &Path) -> io::Result<BTreeMap<String, Vec<Row>>> {
    let (mut tables, mut ids) = (BTreeMap::new(), BTreeSet::new());
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let rows = parse(&std::fs::read_to_string(&path)?)
            .map_err(|error| io::Error::other(format!("{}: {error}", path.display())))?;
        if let Some(row) = rows.iter().find(|row| !ids.insert(row.id.clone())) {
            return Err(io::Error::other(format!("{}: {} is there twice", path.display(), row.id)));
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        tables.insert(name, rows);
    }
    Ok(tables)
}

/// The rows of one table.
///
/// # Errors
/// The number of the line that is no part of a table, and what is wrong with it.
pub fn parse(table: &str) -> Result<Vec<Row>, String> {
    let mut rows: Vec<Row> = Vec::new();
    let mut in_list = false;
    for (number, line) in (1..).zip(table.lines().map(str::trim)) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let id = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let good = match (id.filter(|_| !in_list), rows.last_mut()) {
            (Some(id), _) => {
                rows.push(Row { id: id.to_owned(), ..Row::default() });
                true
            }
            (None, Some(row)) => row.take(line, &mut in_list).is_some(),
            (None, None) => false,
        };
        if !good {
            return Err(format!("line {number} is no part of a table: {line}"));
        }
    }
    if in_list { Err("a list does not end".to_owned()) } else { Ok(rows) }
}

impl Row {
    /// Takes over one line. `None` if it says nothing of a row, or again what was said.
    fn take(&mut self, line: &str, in_list: &mut bool) -> Option<()> {
        let rest = match line.split_once(" = ") {
            _ if *in_list => line,
            Some(("tests", value)) if self.tests.is_empty() => value.strip_prefix('[')?,
            Some((key, value)) => {
                let field = match key {
                    "section" => &mut self.section,
                    "rule" => &mut self.rule,
                    "not_applicable" => self.not_applicable.get_or_insert_default(),
                    _ => return None,
                };
                let new = text(value)?;
                return field.is_empty().then(|| new.clone_into(field));
            }
            None => return None,
        };
        *in_list = !list(rest, &mut self.tests)?;
        Some(())
    }
}

/// What stands between quotation marks.
fn text(value: &str) -> Option<&str> {
    let text = value.strip_prefix('"')?.strip_suffix('"')?;
    (!text.contains(['"', '\\'])).then_some(text)
}

/// Adds the texts of one line of a list. Whether the list ends there; `None` if it is no list.
fn list(line: &str, texts: &mut Vec<String>) -> Option<bool> {
    let (items, ends) = match line.strip_suffix(']') {
        Some(items) => (items, true),
        None => (line, false),
    };
    for item in items.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        texts.push(text(item)?.to_owned());
    }
    Some(ends)
}
