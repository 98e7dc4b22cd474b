//! SHA-256 of files; a program's is remembered for as long as its file does not change.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::failure::Context;
use crate::hex::hex;
use crate::state::now;
use crate::whole_file::write_whole;

/// Bytes of a file that are digested at a time.
const CHUNK: usize = 256 * 1024;
/// Longest record that is read, in bytes.
const MAX_BYTES: u64 = 4096;
/// Seconds after which a file's time of change is another if the file is changed again.
const TICK: u64 = 2;

/// What is on record of a program.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Known {
    facts: String,
    sha256: String,
}

/// SHA-256 of a file's content, in hex.
pub(crate) fn sha256(path: &Path) -> io::Result<String> {
    let (mut file, mut digest, mut chunk) = (File::open(path)?, Sha256::new(), vec![0; CHUNK]);
    loop {
        match file.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => digest.update(chunk.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(hex(&digest.finalize()))
}

/// By which the file at `path` is known without being read: device, inode, size, times of change. Whoever replaces a
/// file or writes to it changes one of these: nobody can set the last.
pub(crate) fn facts(path: &Path) -> io::Result<String> {
    fs::metadata(path).map(|it| describe(&it))
}

fn describe(it: &Metadata) -> String {
    format!(
        "{:x}-{:x}-{:x}-{:x}.{:x}-{:x}.{:x}",
        it.dev(),
        it.ino(),
        it.size(),
        it.mtime(),
        it.mtime_nsec(),
        it.ctime(),
        it.ctime_nsec()
    )
}

/// SHA-256 of the program at `path`, in hex: what the file `record` has of this very file, or its content's, which
/// replaces what is on record.
pub(crate) fn of_program(path: &Path, record: &Path) -> io::Result<String> {
    at(now(), path, record)
}

/// The same at a time in seconds since the Unix epoch.
fn at(now: u64, path: &Path, record: &Path) -> io::Result<String> {
    let before = fs::metadata(path)?;
    let facts = describe(&before);
    if let Some(known) = read(record).filter(|known| known.facts == facts) {
        return Ok(known.sha256);
    }
    let sha256 = sha256(path)?;
    let is_old = u64::try_from(before.ctime()).is_ok_and(|changed| changed.saturating_add(TICK) <= now);
    if is_old && self::facts(path)? == facts {
        let text = serde_json::to_vec(&Known { facts, sha256: sha256.clone() })?;
        let written =
            write_whole(record, |mut file| file.write_all(&text).context(|| "cannot write".to_owned()));
        // The next time it is digested again.
        if let Err(failure) = written {
            log::debug!("{}", failure.report());
        }
    }
    Ok(sha256)
}

/// What is on record, if it can be understood.
fn read(record: &Path) -> Option<Known> {
    let mut text = Vec::new();
    File::open(record).ok()?.take(MAX_BYTES).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `abc`'s.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn a_program_is_read_once_and_again_when_its_file_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let (program, record) = (dir.path().join("program"), dir.path().join(".record"));
        fs::write(&program, "abc").unwrap();
        let later = now() + 10 * TICK;
        assert_eq!(at(later, &program, &record).unwrap(), ABC);
        let written = fs::read_to_string(&record).unwrap();
        assert!(written.contains(ABC), "{written}");
        // What is on record is believed: so it was not read.
        fs::write(&record, written.replace(ABC, "another")).unwrap();
        assert_eq!(at(later, &program, &record).unwrap(), "another");
        let copy = dir.path().join("copy");
        fs::write(&copy, "abc").unwrap();
        fs::rename(&copy, &program).unwrap();
        assert_eq!(at(later, &program, &record).unwrap(), ABC, "another file in its place");
        fs::write(&program, "abcd").unwrap();
        assert_ne!(at(later, &program, &record).unwrap(), ABC, "the same file with other bytes");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_was_changed_a_moment_ago_is_not_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let (program, record) = (dir.path().join("program"), dir.path().join(".record"));
        fs::write(&program, "abc").unwrap();
        let changed = u64::try_from(fs::metadata(&program).unwrap().ctime()).unwrap();
        assert_eq!(at(changed + TICK - 1, &program, &record).unwrap(), ABC);
        assert!(!record.exists());
    }

    #[test]
    fn a_record_that_is_damaged_or_cannot_be_written_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let (program, record) = (dir.path().join("program"), dir.path().join(".record"));
        fs::write(&program, "abc").unwrap();
        let later = now() + 10 * TICK;
        for text in ["", "{", r#"{"facts":""}"#] {
            fs::write(&record, text).unwrap();
            assert_eq!(at(later, &program, &record).unwrap(), ABC, "{text}");
        }
        assert_eq!(at(later, &program, &dir.path().join("none/record")).unwrap(), ABC);
        assert!(of_program(&dir.path().join("none"), &record).is_err());
    }
}
