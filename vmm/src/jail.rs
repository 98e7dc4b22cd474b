//! What the machine's process gives up before it does anything a guest could see.
//!
//! Everything it needs is open by then: it opens nothing by name, connects to nothing and starts no program. So it
//! keeps no right to. What follows each holds alone, should another have a hole:
//!
//! * a user of its own, that no other process has, and no group;
//! * no capability, and no way to get one: programs give none any more, and there is no program;
//! * a directory that was removed as its root: nothing is in it, and nothing can be made in it;
//! * where the kernel has Landlock, no file of any path, no socket by name, no port;
//! * nobody but root may look into the memory of one that root started, and there is no core dump;
//! * each thread makes the system calls that `calls` lists for it, and any other ends the process (seccomp). A thread has
//!   its filter before it does anything for the guest; the main thread, which the guest cannot reach, before it serves
//!   its first event, so that what makes a machine is in no filter.

mod calls;
mod filter;
mod requests;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetError, Scope};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, chroot, fchdir, getpid, setgroups, setresgid, setresuid};
use seccompiler::SeccompAction;

pub(crate) use self::calls::Thread;
use crate::error::{Error, Result};

/// User of the process with number 0; each has the user of its number. No distribution gives these out, and numbers of
/// processes end at 2^22.
const FIRST_USER: u32 = 0x7000_0000;

/// Whether calls that are not allowed are told to the kernel's log and made all the same.
static LOG_ONLY: AtomicBool = AtomicBool::new(false);

/// Has calls that are not allowed told to the kernel's log, not prevented: to find out what a change makes necessary. To be
/// called before there are threads.
pub(crate) fn log_only() {
    LOG_ONLY.store(true, Ordering::Relaxed);
}

/// From here on the calling thread, and those it starts, make the calls of `thread` alone.
///
/// # Errors
/// The kernel refuses; it then makes any.
pub(crate) fn confine(thread: Thread) -> io::Result<()> {
    let denied =
        if LOG_ONLY.load(Ordering::Relaxed) { SeccompAction::Log } else { SeccompAction::KillProcess };
    seccompiler::apply_filter(&filter::program(thread, &denied)?).map_err(io::Error::other)
}

/// Gives everything up; with `root` also user, groups and root directory, which takes root to do. To be called before
/// there are threads.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn enter(root: Option<OwnedFd>) -> Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(Error::system("switch core dumps off"))?;
    if let Some(root) = root {
        fchdir(root.as_fd()).and_then(|()| chroot(".")).map_err(Error::system("leave the host's files"))?;
        let user = FIRST_USER.saturating_add(getpid().as_raw().unsigned_abs());
        become_user(user).map_err(Error::system("become a user of its own"))?;
        // Whoever started it as another user may look into it as into anything of his.
        prctl::set_dumpable(false).map_err(Error::system("hide its memory"))?;
    }
    prctl::set_no_new_privs().map_err(Error::system("give up privileges of programs"))?;
    lock_paths().map_err(Error::system("give up files"))
}

/// Leaves no capability either: those go with the last identity that is root's.
fn become_user(user: u32) -> nix::Result<()> {
    let (user, group) = (Uid::from_raw(user), Gid::from_raw(user));
    setgroups(&[])?;
    setresgid(group, group, group)?;
    setresuid(user, user, user)
}

/// Has the kernel refuse every file, socket and port that is named, as far as it can.
fn lock_paths() -> io::Result<()> {
    let abi = ABI::V6;
    let locked = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(abi)))
        .and_then(|rules| rules.scope(Scope::from_all(abi)))
        .and_then(|rules| rules.create())
        .and_then(|rules| rules.restrict_self());
    locked.map(drop).map_err(|error: RulesetError| io::Error::other(error))
}
