//! Ways in for the fuzz targets: what is on record about containers.

use std::fs;

use super::ledger::Ledger;
use super::record::Record;
use crate::snapshot::fuzzing::at_a_path;

/// A record: what can be one is one again when it is written.
///
/// # Panics
/// It is not.
pub fn record(bytes: &[u8]) -> bool {
    let Ok(Ok(record)) = at_a_path(bytes, Record::read) else { return false };
    let again = serde_json::to_vec(&record).unwrap_or_default();
    assert_eq!(at_a_path(&again, Record::read).ok().and_then(Result::ok), Some(record));
    true
}

/// How many entries a ledger of these bytes has. Nothing of them is undone.
pub fn ledger(bytes: &[u8]) -> std::io::Result<usize> {
    let directory = tempfile::tempdir()?;
    fs::write(directory.path().join(super::ledger::NAME), bytes)?;
    let entries = Ledger::of(directory.path()).and_then(|ledger| ledger.entries());
    Ok(entries.map_or(0, |entries| entries.len()))
}
