//! Checks whether this host can run machines, and says what to do where it cannot.

mod density;
mod host;
mod kvm;

use serde::Serialize;

use crate::guest;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Works, but something is missing or unwise.
    Warn,
    /// Machines cannot run until this is mended.
    Fail,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// What was looked at.
    pub check: &'static str,
    /// How it came out.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do about it; empty when nothing needs to be done.
    pub remedy: String,
}

impl Row {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, status: Status::Ok, found: found.into(), remedy: String::new() }
    }

    fn warn(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, status: Status::Warn, found: found.into(), remedy: remedy.into() }
    }

    fn fail(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, status: Status::Fail, found: found.into(), remedy: remedy.into() }
    }
}

/// Looks at everything, and at what `containers` at once would want. Takes a few milliseconds, changes nothing.
pub fn examine(containers: Option<u64>) -> Vec<Row> {
    let mut rows = kvm::rows();
    rows.push(guest_files());
    rows.extend(host::rows());
    rows.extend(containers.map(density::rows).unwrap_or_default());
    rows
}

fn guest_files() -> Row {
    match guest::GuestFiles::find() {
        Ok(files) => Row::ok("guest", format!("{} and {}", files.kernel.display(), files.agent.display())),
        Err(failure) => {
            let remedy = failure.remedy().unwrap_or("make build").to_owned();
            Row::fail("guest", failure.to_string(), remedy)
        }
    }
}
