//! Files of the host that were copied into the guest are copied again when they change.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use super::shares::Shares;
use super::stage::Stages;
use crate::failure::{Context, Failure};

/// Files change in several steps: what has changed is read once nothing did for this long, in milliseconds.
const QUIET: u16 = 50;
/// What never is quiet is read after so many times that.
const RESTLESS: u32 = 20;
/// What may change what a copy holds.
const CHANGES: AddWatchFlags = AddWatchFlags::IN_MODIFY
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_CREATE)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MOVE);

/// Watches what is copied, until it is dropped.
#[derive(Debug)]
pub(super) struct Updates {
    watching: Arc<Watching>,
    /// Its reader wakes up when this is closed.
    _stop: PipeWriter,
}

#[derive(Debug)]
struct Watching {
    inotify: Inotify,
    /// What a watch is about.
    sources: Mutex<BTreeMap<WatchDescriptor, PathBuf>>,
}

impl Updates {
    /// Starts the thread that watches for `shares`.
    pub(super) fn start(shares: Weak<Mutex<Shares>>, stages: Arc<Stages>) -> Result<Self, Failure> {
        let failed = || "cannot watch files for changes".to_owned();
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context(failed)?;
        let (wake, stop) = io::pipe().context(failed)?;
        let watching = Arc::new(Watching { inotify, sources: Mutex::default() });
        let on_thread = Arc::clone(&watching);
        std::thread::Builder::new()
            .name("volumes".to_owned())
            .spawn(move || {
                let result = on_thread.run(&wake, |source| on_thread.update(source, &shares, &stages));
                if let Err(error) = result {
                    log::warn!("volumes are no longer watched for changes: {error}");
                }
            })
            .context(failed)?;
        Ok(Self { watching, _stop: stop })
    }

    /// Watches `source`; to be called before it is read.
    pub(super) fn watch(&self, source: &Path) {
        self.watching.add(source, source);
    }
}

impl Watching {
    /// Watches a file, or a directory and those in it. What cannot be watched stays as it is in the guest.
    fn add(&self, source: &Path, at: &Path) {
        let Ok(watch) = self.inotify.add_watch(at, CHANGES) else { return };
        self.sources().insert(watch, source.to_path_buf());
        for entry in std::fs::read_dir(at).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.add(source, &entry.path());
            }
        }
    }

    fn sources(&self) -> std::sync::MutexGuard<'_, BTreeMap<WatchDescriptor, PathBuf>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `changed` with each source that has changed and is quiet again, until `wake` is closed.
    fn run(&self, wake: &PipeReader, mut changed: impl FnMut(&Path)) -> io::Result<()> {
        let (mut dirty, mut patience) = (BTreeSet::new(), RESTLESS);
        loop {
            let timeout = if dirty.is_empty() { PollTimeout::NONE } else { PollTimeout::from(QUIET) };
            let mut ready = [
                PollFd::new(wake.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN),
            ];
            let count = match poll(&mut ready, timeout) {
                Err(Errno::EINTR) => continue,
                count => count?,
            };
            if ready.first().is_some_and(|wake| wake.any().unwrap_or(true)) {
                return Ok(());
            }
            if count > 0 {
                self.read(&mut dirty)?;
                patience = patience.saturating_sub(1);
            }
            if count == 0 || patience == 0 {
                std::mem::take(&mut dirty).iter().for_each(|source: &PathBuf| changed(source));
                patience = RESTLESS;
            }
        }
    }

    fn read(&self, dirty: &mut BTreeSet<PathBuf>) -> io::Result<()> {
        let events = match self.inotify.read_events() {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
            events => events?,
        };
        let mut sources = self.sources();
        for event in events {
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                dirty.extend(sources.values().cloned());
            } else if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                sources.remove(&event.wd);
            } else {
                dirty.extend(sources.get(&event.wd).cloned());
            }
        }
        Ok(())
    }

    /// Has the guest see what is at `source` now.
    fn update(&self, source: &Path, shares: &Weak<Mutex<Shares>>, stages: &Stages) {
        let (Some(shares), Some(live)) = (shares.upgrade(), stages.live()) else { return };
        let mut shares = shares.lock().unwrap_or_else(PoisonError::into_inner);
        if !shares.copies(source) {
            return;
        }
        // Directories may be new, and a file that was replaced is another one.
        self.add(source, source);
        if let Err(failure) = shares.update(&live.agent, source) {
            log::warn!("{}", failure.report());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// Longest a test waits for word of a change.
    const PATIENCE: Duration = Duration::from_secs(20);

    /// Reports of changes below `source`, until the writer is dropped.
    fn reports(source: &Path) -> (mpsc::Receiver<PathBuf>, PipeWriter) {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).unwrap();
        let (wake, stop) = io::pipe().unwrap();
        let (heard, report) = mpsc::channel();
        let watching = Watching { inotify, sources: Mutex::default() };
        watching.add(source, source);
        std::thread::spawn(move || {
            watching.run(&wake, |source| drop(heard.send(source.to_path_buf()))).unwrap();
        });
        (report, stop)
    }

    #[test]
    fn a_change_anywhere_below_is_told_once_it_is_quiet() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        let (report, stop) = reports(dir.path());
        for (n, path) in ["new", "sub/deep"].into_iter().enumerate() {
            fs::write(dir.path().join(path), "1").unwrap();
            fs::write(dir.path().join(path), "2").unwrap();
            assert_eq!(report.recv_timeout(PATIENCE).unwrap(), dir.path(), "{n}");
        }
        drop(stop);
        assert!(report.recv_timeout(PATIENCE).is_err(), "its thread has ended");
    }

    #[test]
    fn a_file_that_never_is_quiet_is_told_of_all_the_same() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (report, _stop) = reports(file.path());
        let end = std::time::Instant::now() + PATIENCE;
        while report.try_recv().is_err() {
            assert!(std::time::Instant::now() < end, "nothing was told");
            fs::write(file.path(), "x").unwrap();
        }
    }
}
