//! Cleaning up after owners that died.

use std::io::ErrorKind;
use std::path::Path;

use serde::Serialize;

use super::record::{Condition, now};
use super::{Home, Owned};
use crate::failure::Failure;

/// What became of one container whose owner had died.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cleaned {
    /// Its id.
    pub id: String,
    /// Its record is gone too; otherwise it is kept for `mvm ps -a`, `logs` and `rm`.
    pub removed: bool,
    /// What could not be undone.
    pub problem: Option<String>,
}

/// Settles the ledgers of all containers whose owners died, and nothing else. Twice is once.
///
/// # Errors
/// The home cannot be read; what goes wrong with one container is told in its line.
pub fn collect(home: &Home) -> Result<Vec<Cleaned>, Failure> {
    let mut cleaned = Vec::new();
    for directory in home.directories()? {
        let Some(owned) = take(home, &directory) else { continue };
        let id = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let record = owned.read().ok();
        let ended = record.as_ref().is_some_and(|record| record.condition.has_ended());
        let keep = record.as_ref().is_some_and(|record| !record.remove);
        let entries = owned.ledger().and_then(|ledger| ledger.entries());
        if ended && keep && entries.is_ok_and(|entries| entries.is_empty()) {
            continue;
        }
        let settled = owned.ledger().and_then(|ledger| ledger.settle());
        let result = match (settled, record) {
            (Err(failure), _) => Err(failure),
            (Ok(()), Some(_)) if ended && keep => Ok(()),
            (Ok(()), Some(mut record)) if keep => {
                record.condition = Condition::Lost { at: now() };
                record.machine = None;
                owned.write(&record)
            }
            (Ok(()), _) => owned
                .remove()
                .map_err(|error| Failure::because(format!("cannot remove {}", directory.display()), error)),
        };
        let problem = result.err().map(|failure| failure.report());
        cleaned.push(Cleaned { id, removed: problem.is_none() && !keep, problem });
    }
    Ok(cleaned)
}

/// Takes over what nobody owns: `None` if it is somebody's, or was removed meanwhile.
fn take(home: &Home, directory: &Path) -> Option<Owned> {
    // What is being made is nobody's for a moment.
    let _admitting = home.admitting().ok()?;
    match Owned::take(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            // Whoever made it died before it was theirs: there is nothing in it.
            let _ = std::fs::remove_dir(directory);
            None
        }
        owned => owned.ok()?,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Record, Resource};
    use super::*;

    fn make(home: &Home, id: &str, remove: bool, condition: Condition) -> Owned {
        let owned = home.create(id).unwrap();
        owned.write(&Record { id: id.into(), remove, condition, ..Record::default() }).unwrap();
        owned
    }

    #[test]
    fn only_what_dead_owners_left_is_cleaned_and_twice_is_once() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        let litter = dir.path().join("litter");
        std::fs::write(&litter, "").unwrap();
        let alive = make(&home, "alive", true, Condition::Running);
        let crashed = make(&home, "crashed", false, Condition::Running);
        crashed.ledger().unwrap().note(&Resource::File { path: litter.clone() }).unwrap();
        drop(crashed);
        drop(make(&home, "crashed-rm", true, Condition::Running));
        drop(make(&home, "ended", false, Condition::Exited { code: 0, at: 1 }));
        let untidy = make(&home, "untidy", false, Condition::Exited { code: 0, at: 1 });
        let socket = dir.path().join("socket");
        std::fs::write(&socket, "").unwrap();
        untidy.ledger().unwrap().note(&Resource::File { path: socket.clone() }).unwrap();
        drop(untidy);
        drop(home.create("half-made").unwrap());

        let mut cleaned = collect(&home).unwrap();
        cleaned.sort_by(|a, b| a.id.cmp(&b.id));
        let told: Vec<_> = cleaned.iter().map(|it| (it.id.as_str(), it.removed)).collect();
        let all = [("crashed", false), ("crashed-rm", true), ("half-made", true), ("untidy", false)];
        assert_eq!(told, all);
        assert!(!litter.exists() && !socket.exists());
        assert!(matches!(home.find("crashed").unwrap().record.condition, Condition::Lost { .. }));
        assert!(matches!(home.find("ended").unwrap().record.condition, Condition::Exited { .. }));
        assert!(home.find("alive").unwrap().owned);
        assert_eq!(collect(&home).unwrap(), []);
        drop(alive);
    }
}
