//! The console's output: limited in rate, in what waits for a slow reader, and in what a file holds.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use crate::chain::Cursor;
use crate::counter::Counter;
use crate::error::Error;
use crate::rate::Bucket;
use crate::sys;

/// Bytes that may go through at once, and per second after that, unless unlimited.
pub(super) const BURST: u32 = 64 * 1024;
pub(super) const RATE: u32 = 64 * 1024;
/// Bytes that wait for a reader that is slow.
pub(super) const BACKLOG: usize = 64 * 1024;
/// Bytes of one chain that are looked at; drivers post a page.
pub(super) const MAX_CHAIN: u32 = 64 * 1024;
/// Bytes a regular file may reach before it begins anew.
pub(super) const FILE_SIZE: u64 = 1024 * 1024;

/// What time it is.
pub(super) type Clock = Box<dyn Fn() -> Instant + Send>;

/// A sink that takes what it can and counts what it could not.
pub(super) struct Output {
    file: File,
    /// Bytes in the file, if it is a regular one.
    length: Option<u64>,
    bucket: Option<Bucket>,
    clock: Clock,
    backlog: VecDeque<u8>,
    watched: bool,
    written: Arc<Counter>,
    dropped: Arc<Counter>,
}

/// How to go on after a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Write more.
    More,
    /// Wait for the reader.
    Wait,
    /// Nothing can be written.
    Lost,
}

impl Output {
    pub(super) fn new(file: File, unlimited: bool, clock: Clock) -> Self {
        let regular = file.metadata().ok().filter(std::fs::Metadata::is_file);
        Self {
            length: regular.map(|metadata| metadata.len()),
            file,
            bucket: (!unlimited).then(|| Bucket::new(BURST, RATE, clock())),
            clock,
            backlog: VecDeque::new(),
            watched: false,
            written: Counter::new("output_bytes"),
            dropped: Counter::new("output_bytes_dropped"),
        }
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn counters(&self) -> Vec<Arc<Counter>> {
        vec![Arc::clone(&self.written), Arc::clone(&self.dropped)]
    }

    /// Takes all bytes of `from`: to the file, to the backlog, or to nowhere.
    pub(super) fn write(&mut self, from: &mut Cursor<'_>) -> Result<(), Error> {
        let total = from.remaining();
        let allowed = match &mut self.bucket {
            Some(bucket) => bucket.take(total.min(MAX_CHAIN), (self.clock)()),
            None => total.min(MAX_CHAIN),
        };
        let mut part = from.split_to(allowed)?;
        let mut next = self.flush();
        while next == Next::More && part.remaining() > 0 {
            self.begin_anew_if_full();
            let result = sys::write_some(self.file.as_fd(), &mut part, u32::MAX);
            next = self.wrote(result.map(u64::from));
        }
        if next == Next::Wait {
            self.keep(&mut part)?;
        }
        self.dropped.add(total.saturating_sub(allowed).saturating_add(part.remaining()).into());
        Ok(())
    }

    /// Moves the backlog on, as far as the reader lets it.
    pub(super) fn flush(&mut self) -> Next {
        let mut next = Next::More;
        while next == Next::More && !self.backlog.is_empty() {
            self.begin_anew_if_full();
            let (front, _) = self.backlog.as_slices();
            let result = self.file.write(front);
            if let Ok(n) = result {
                self.backlog.drain(..n.min(self.backlog.len()));
            }
            next = self.wrote(result.map(|n| u64::try_from(n).unwrap_or(0)));
        }
        next
    }

    /// Whether to begin (`true`) or to end (`false`) watching for the reader to take more.
    pub(super) fn wants_watch(&mut self) -> Option<bool> {
        let wanted = !self.backlog.is_empty();
        let changed = wanted != self.watched;
        self.watched = wanted;
        changed.then_some(wanted)
    }

    /// The loop has forgotten the file.
    pub(super) fn unwatched(&mut self) {
        self.watched = false;
    }

    /// Counts what a write did, and says how to go on.
    fn wrote(&mut self, result: io::Result<u64>) -> Next {
        match result {
            Ok(n) if n > 0 => {
                self.written.add(n);
                self.length = self.length.map(|length| length.saturating_add(n));
                Next::More
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Next::More,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Next::Wait,
            // No reader, a full disk: the output up to here is lost; the next may fare better.
            Ok(_) | Err(_) => {
                self.dropped.add(u64::try_from(self.backlog.len()).unwrap_or(0));
                self.backlog.clear();
                Next::Lost
            }
        }
    }

    /// Copies into the backlog what fits.
    fn keep(&mut self, part: &mut Cursor<'_>) -> Result<(), Error> {
        let room = u32::try_from(BACKLOG.saturating_sub(self.backlog.len())).unwrap_or(0);
        let mut bytes = vec![0; usize::try_from(part.remaining().min(room)).unwrap_or(0)];
        part.read(&mut bytes)?;
        self.backlog.extend(bytes);
        Ok(())
    }

    /// A log holds the newest output: older output goes when there is a mebibyte of it.
    fn begin_anew_if_full(&mut self) {
        if self.length.is_some_and(|length| length >= FILE_SIZE)
            && self.file.set_len(0).and_then(|()| self.file.rewind()).is_ok()
        {
            self.length = Some(0);
        }
    }
}
