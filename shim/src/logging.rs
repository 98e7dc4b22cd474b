//! The shim's log: lines in logfmt on the bundle's `log` fifo, from where they reach containerd's own log.
//!
//! Nobody may be reading. A line that does not fit into the fifo is dropped, and the next that fits says how many were.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use log::{LevelFilter, Log, Metadata, Record};
use nix::libc::O_NONBLOCK;

/// Longest line, in bytes; what a fifo takes whole or not at all (`PIPE_BUF`).
const MAX_LINE: usize = 4096;

/// Writes to one fifo.
#[derive(Debug)]
pub(crate) struct FifoLog {
    fifo: File,
    id: String,
    dropped: AtomicU64,
}

impl FifoLog {
    /// Opens a fifo. Reading and writing: it can be opened before containerd reads, and goes on after it.
    pub(crate) fn open(path: &Path, id: &str) -> std::io::Result<Self> {
        let fifo = OpenOptions::new().read(true).write(true).custom_flags(O_NONBLOCK).open(path)?;
        Ok(Self { fifo, id: id.to_owned(), dropped: AtomicU64::new(0) })
    }

    fn write(&self, level: &str, text: &str) {
        let dropped = self.dropped.load(Ordering::Relaxed);
        let line = line(SystemTime::now(), level, &self.id, text, dropped);
        if (&self.fifo).write(&line).is_ok() {
            self.dropped.fetch_sub(dropped, Ordering::Relaxed);
        } else {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Log for FifoLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The libraries' own chatter is about connections that come and go.
        metadata.target().starts_with("mvm") || metadata.target().starts_with("containerd_shim_mvm")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_ascii_lowercase().replace("warn", "warning");
            self.write(&level, &record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// Sends everything that is logged to the bundle's fifo, panics too. Without a fifo nothing is logged.
pub(crate) fn install(bundle: &Path, id: &str, debug: bool) {
    let Ok(log) = FifoLog::open(&bundle.join("log"), id) else { return };
    if log::set_boxed_logger(Box::new(log)).is_ok() {
        log::set_max_level(if debug { LevelFilter::Debug } else { LevelFilter::Info });
        std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
    }
}

/// One line of logfmt, no longer than a fifo takes at once.
fn line(at: SystemTime, level: &str, id: &str, text: &str, dropped: u64) -> Vec<u8> {
    let mut line = format!("time=\"{}\" level={level} id={id}", rfc3339(at));
    if dropped > 0 {
        line.push_str(&format!(" dropped={dropped}"));
    }
    line.push_str(" msg=\"");
    for char in text.chars() {
        let escaped = match char {
            '"' | '\\' => format!("\\{char}"),
            char if char.is_control() => char.escape_default().to_string(),
            char => char.to_string(),
        };
        if line.len() + escaped.len() + 2 > MAX_LINE {
            break;
        }
        line.push_str(&escaped);
    }
    line.push_str("\"\n");
    line.into_bytes()
}

/// A time as containerd writes it, in UTC (RFC 3339).
fn rfc3339(at: SystemTime) -> String {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let nanos = since.subsec_nanos();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

/// The day this many days after 1 January 1970.
fn date(mut days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::time::Duration;

    #[test]
    fn a_line_is_logfmt_whatever_the_text() {
        let at = SystemTime::UNIX_EPOCH + Duration::new(1_709_210_096, 5);
        let text = "a \"b\" \\ c\nd";
        assert_eq!(
            String::from_utf8(line(at, "info", "c1", text, 0)).unwrap(),
            "time=\"2024-02-29T12:34:56.000000005Z\" level=info id=c1 msg=\"a \\\"b\\\" \\\\ c\\nd\"\n"
        );
        let long = line(at, "warning", "c1", &"\u{e9}\n".repeat(4000), 7);
        assert!(long.len() <= MAX_LINE && long.ends_with(b"\"\n"), "{}", long.len());
        assert!(String::from_utf8(long).unwrap().contains(" dropped=7 msg="));
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (days, expected) in [
            (0, (1970, 1, 1)),
            (58, (1970, 2, 28)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (20_453, (2025, 12, 31)),
        ] {
            assert_eq!(date(days), expected);
        }
    }

    #[test]
    fn a_fifo_nobody_reads_costs_lines_and_never_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let log = FifoLog::open(&path, "c1").unwrap();
        let text = "x".repeat(1000);
        for _ in 0..200 {
            log.write("info", &text);
        }
        let dropped = log.dropped.load(Ordering::Relaxed);
        assert!(dropped > 100, "{dropped}");
        let mut read = vec![0; 1 << 20];
        let count = (&log.fifo).read(&mut read).unwrap();
        assert!(count <= 65_536);
        log.write("info", "after");
        let count = (&log.fifo).read(&mut read).unwrap();
        let line = String::from_utf8_lossy(&read[..count]).into_owned();
        assert!(line.contains(&format!("dropped={dropped} msg=\"after\"")), "{line}");
        assert_eq!(log.dropped.load(Ordering::Relaxed), 0);
    }
}
