//! Log lines to standard error, limited per call site: what a guest can cause it must not be able to flood.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{LevelFilter, Log, Metadata, Record};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Lines a call site may write per [`PERIOD`].
const LINES: u32 = 10;
/// See [`LINES`].
const PERIOD: Duration = Duration::from_secs(5);
/// Longest line; the rest is cut.
const MAX_LINE_BYTES: usize = 1024;

static SUPPRESSED: AtomicU64 = AtomicU64::new(0);

/// Installs the log. Lines below `level` are not even formatted.
pub(crate) fn install(level: LevelFilter) {
    let sink = Box::new(Sink { sites: Mutex::new(BTreeMap::new()) });
    // Fails only if there is a log already, which then stays.
    if log::set_boxed_logger(sink).is_ok() {
        log::set_max_level(level);
    }
}

/// Installs the log of a program that people call: warnings, or with `verbose` all lines.
pub fn to_stderr(verbose: bool) {
    install(if verbose { LevelFilter::Debug } else { LevelFilter::Warn });
}

/// Lines suppressed so far.
pub(crate) fn suppressed() -> u64 {
    SUPPRESSED.load(Ordering::Relaxed)
}

/// A place in the source that logs.
type Site = (&'static str, u32);

struct Sink {
    /// Call sites are finite, so this is bounded by the program's size.
    sites: Mutex<BTreeMap<Site, Budget>>,
}

impl Log for Sink {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let site = (record.file_static().unwrap_or("?"), record.line().unwrap_or(0));
        let now = Instant::now();
        let mut sites = self.sites.lock().unwrap_or_else(PoisonError::into_inner);
        let suppressed = match sites.entry(site).or_insert_with(|| Budget::new(now)).take(now) {
            Verdict::Write { suppressed } => suppressed,
            Verdict::Suppress => {
                SUPPRESSED.fetch_add(1, Ordering::Relaxed);
                return;
            }
        };
        drop(sites);
        let mut line = format!("{}: {}", record.level().as_str().to_ascii_lowercase(), record.args());
        cut(&mut line, MAX_LINE_BYTES);
        if suppressed > 0 {
            line.push_str(&format!(" ({suppressed} more like this were suppressed)"));
        }
        line.push('\n');
        if !write_if_room(std::io::stderr().as_fd(), line.as_bytes()) {
            SUPPRESSED.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

/// Writes a line, unless its reader is behind: a guest brings lines about, and must not bring its machine's
/// threads to wait for a reader that never comes. Tells whether there was room.
fn write_if_room(to: BorrowedFd<'_>, line: &[u8]) -> bool {
    let mut ready = [PollFd::new(to, PollFlags::POLLOUT)];
    if poll(&mut ready, PollTimeout::ZERO) != Ok(1) {
        return false;
    }
    // One write, so that lines of several machines do not mix. A pipe with room takes a page, which is more.
    nix::unistd::write(to, line).is_ok()
}

/// Cuts `line` to `max` bytes, or a little less rather than inside a character.
fn cut(line: &mut String, max: usize) {
    if let Some(end) = (0..=max.min(line.len())).rev().find(|end| line.is_char_boundary(*end)) {
        line.truncate(end);
    }
}

/// What a call site may still write in this period.
#[derive(Debug)]
struct Budget {
    since: Instant,
    used: u32,
    suppressed: u64,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Write { suppressed: u64 },
    Suppress,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self { since: now, used: 0, suppressed: 0 }
    }

    fn take(&mut self, now: Instant) -> Verdict {
        if now.saturating_duration_since(self.since) >= PERIOD {
            self.since = now;
            self.used = 0;
        }
        if self.used >= LINES {
            self.suppressed += 1;
            return Verdict::Suppress;
        }
        self.used += 1;
        Verdict::Write { suppressed: std::mem::take(&mut self.suppressed) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_reader_that_does_not_come_costs_lines_and_no_time() {
        let (reader, writer) = std::io::pipe().unwrap();
        let line = [b'x'; MAX_LINE_BYTES];
        let written = (0..10_000).take_while(|_| write_if_room(writer.as_fd(), &line)).count();
        assert!((1..10_000).contains(&written), "{written}");
        drop(reader);
    }

    proptest! {
        #[test]
        fn a_site_writes_at_most_ten_lines_per_period_and_counts_the_rest(
            steps in proptest::collection::vec(0u64..2_000, 1..200),
        ) {
            let start = Instant::now();
            let mut budget = Budget::new(start);
            let (mut millis, mut written, mut told, mut suppressed) = (0, 0u64, 0, 0);
            for step in steps {
                millis += step;
                match budget.take(start + Duration::from_millis(millis)) {
                    Verdict::Write { suppressed } => { written += 1; told += suppressed; }
                    Verdict::Suppress => suppressed += 1,
                }
                prop_assert!(written <= u64::from(LINES) * (1 + millis / 5_000));
                prop_assert_eq!(told + budget.suppressed, suppressed);
            }
        }
    }
}
