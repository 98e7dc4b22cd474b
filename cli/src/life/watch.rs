//! Waiting for something to change in a directory.

use std::path::Path;

use mvm_runtime::failure::{Context, Failure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// What can happen to a directory that somebody waits for.
const CHANGES: AddWatchFlags = AddWatchFlags::IN_MODIFY
    .union(AddWatchFlags::IN_CREATE)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MOVED_TO)
    .union(AddWatchFlags::IN_CLOSE_WRITE)
    .union(AddWatchFlags::IN_DELETE_SELF);
/// A lock that is dropped is no change of a directory, so it is looked at again after this time, in milliseconds.
const LOOK_AGAIN: u16 = 250;

/// A watch on a directory. What changes after it was made is not missed.
pub(super) struct Watch(Inotify);

impl Watch {
    /// Watches a directory.
    pub(super) fn new(directory: &Path) -> Result<Self, Failure> {
        let failed = || format!("cannot watch {}", directory.display());
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context(failed)?;
        match inotify.add_watch(directory, CHANGES) {
            // It is gone: that is the change.
            Ok(_) | Err(nix::errno::Errno::ENOENT) => Ok(Self(inotify)),
            Err(error) => Err(error).context(failed),
        }
    }

    /// Waits for a change since the last call, or a little.
    pub(super) fn wait(&self) -> Result<(), Failure> {
        let mut ready = [PollFd::new(std::os::fd::AsFd::as_fd(&self.0), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::from(LOOK_AGAIN)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(Failure::because("cannot wait for a change", error)),
        }
        let _ = self.0.read_events();
        Ok(())
    }
}

/// Waits for a change in a directory, or a little.
pub(super) fn until_changed(directory: &Path) -> Result<(), Failure> {
    Watch::new(directory)?.wait()
}
