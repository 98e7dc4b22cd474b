//! `mvm doctor`: the host's report, for people or programs.

use std::io::Write;

use mvm_runtime::doctor::{Row, Status, examine};
use mvm_runtime::failure::{Context, Failure};

use crate::UNFIT;
use crate::args::Doctor;
use crate::words::Format;

pub(crate) fn doctor(options: &Doctor) -> Result<u8, Failure> {
    let rows = examine(options.density);
    let text = match options.format {
        Format::Json => {
            serde_json::to_string_pretty(&rows).context(|| "cannot print the report".to_owned())?
        }
        Format::Text => table(&rows),
    };
    writeln!(std::io::stdout().lock(), "{text}").context(|| "cannot print the report".to_owned())?;
    Ok(if rows.iter().any(|row| row.status == Status::Fail) { UNFIT } else { 0 })
}

fn table(rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.check.len()).max().unwrap_or(0);
    let mut lines = Vec::new();
    for row in rows {
        let status = match row.status {
            Status::Ok => "ok  ",
            Status::Warn => "warn",
            Status::Fail => "FAIL",
        };
        lines.push(format!("{status}  {:width$}  {}", row.check, row.found));
        if !row.remedy.is_empty() {
            lines.push(format!("      {:width$}  -> {}", "", row.remedy));
        }
    }
    lines.join("\n")
}
