//! A container's output on disk: one JSON object a line, as docker keeps it, capped.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Bytes a log may have before it is put aside; one older is kept, so that twice as much is there at most.
pub const MAX_LOG: u64 = 16 << 20;
/// Longest line that is kept whole, in bytes; a longer one is cut into several.
const MAX_LINE: usize = 16 * 1024;

/// One line of output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Nanoseconds since 1970.
    pub at: u64,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// The text, with its line end if it had one.
    pub text: String,
}

/// Writes a log.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    most: u64,
    /// Its pumps take turns for a line.
    file: Mutex<Option<(File, u64)>>,
}

impl Log {
    /// The log at `path`, continued if it is there.
    pub fn new(path: impl Into<PathBuf>, most: u64) -> Self {
        Self { path: path.into(), most, file: Mutex::new(None) }
    }

    /// Copies a stream into the log until it ends. A log that cannot be written loses lines, never the container.
    pub fn copy(&self, name: &str, from: impl Read) {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        loop {
            line.clear();
            let most = u64::try_from(MAX_LINE).unwrap_or(u64::MAX);
            match (&mut from).take(most).read_until(b'\n', &mut line) {
                Ok(1..) => drop(self.write(name, &line)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// Adds one line.
    fn write(&self, name: &str, text: &[u8]) -> io::Result<()> {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let line = Line {
            at: u64::try_from(at).unwrap_or(u64::MAX),
            stream: name.to_owned(),
            text: String::from_utf8_lossy(text).into_owned(),
        };
        let mut bytes = serde_json::to_vec(&line)?;
        bytes.push(b'\n');
        let mut open = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if open.as_ref().is_some_and(|(_, length)| *length >= self.most) {
            fs::rename(&self.path, older(&self.path))?;
            *open = None;
        }
        let (file, length) = match &mut *open {
            Some(open) => open,
            None => {
                let file = File::options().create(true).append(true).mode(0o600).open(&self.path)?;
                let length = file.metadata()?.len();
                open.insert((file, length))
            }
        };
        file.write_all(&bytes)?;
        *length = length.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        Ok(())
    }
}

/// Where what no longer fits is kept.
fn older(path: &Path) -> PathBuf {
    path.with_extension("1")
}

/// The lines of a log, oldest first. A line that was cut short by a crash is passed over.
///
/// # Errors
/// The host's reason; no log is no lines.
pub fn read(path: &Path) -> io::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for path in [older(path), path.to_owned()] {
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        for line in BufReader::new(file).split(b'\n') {
            lines.extend(serde_json::from_slice::<Line>(&line?).ok());
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(path: &Path) -> Vec<String> {
        read(path).unwrap().into_iter().map(|line| line.text).collect()
    }

    #[test]
    fn lines_are_read_as_they_came() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        assert!(texts(&path).is_empty());
        let log = Log::new(&path, MAX_LOG);
        log.copy("stdout", &b"one\ntwo \xff\nno end"[..]);
        log.copy("stderr", &b"three\n"[..]);
        assert_eq!(texts(&path), ["one\n", "two \u{fffd}\n", "no end", "three\n"]);
        assert_eq!(read(&path).unwrap()[3].stream, "stderr");
    }

    #[test]
    fn a_log_never_takes_more_than_twice_its_most_and_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = Log::new(&path, 1000);
        for _ in 0..50 {
            log.copy("stdout", &b"0123456789\n"[..]);
        }
        let size: u64 = [older(&path), path.clone()].iter().map(|path| path.metadata().unwrap().len()).sum();
        assert!((1000..2200).contains(&size), "{size}");
        assert!(!texts(&path).is_empty());
    }

    #[test]
    fn a_line_without_end_does_not_grow_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        Log::new(&path, MAX_LOG).copy("stdout", &vec![b'x'; 3 * MAX_LINE + 1][..]);
        assert_eq!(
            texts(&path).iter().map(String::len).collect::<Vec<_>>(),
            [MAX_LINE, MAX_LINE, MAX_LINE, 1]
        );
    }

    #[test]
    fn a_torn_line_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, "{\"at\":1,\"stre").unwrap();
        assert!(texts(&path).is_empty());
    }
}
