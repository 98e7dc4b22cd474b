//! A container's root: its mount name space, made once and entered by every process of it.
//!
//! A short-lived child enters the new root before it mounts anything in it, so that no link in an image
//! can lead a mount out of it. The agent keeps the name space by a descriptor.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use mvm_protocol::{Namespace, Surroundings, limits::MAX_ID};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sched::{CloneFlags, setns},
    sys::{
        stat::{Mode, SFlag, fstat},
        wait::{WaitStatus, waitpid},
    },
    unistd::{Pid, pipe2, sethostname},
};

use crate::{
    cgroup::Cgroup,
    error::{Context, Error, Result},
    spawn::{PidSpace, Place, fork_at},
    step::{Linux, Step, perform_all},
    surroundings::{self, Proc, Source},
    sys,
    user::open_in_root,
};

/// A container's root.
pub(crate) struct Root {
    /// What its processes enter.
    pub(crate) spaces: Spaces,
    /// Its root directory as seen from inside.
    pub(crate) directory: OwnedFd,
    /// The same file system without what is mounted in it, and writable where the root was made read-only.
    bare: OwnedFd,
    /// Its processes' cgroup, where the kernel has cgroups.
    pub(crate) cgroup: Option<Cgroup>,
    /// How its /proc is mounted for a PID name space.
    pub(crate) proc: Option<Proc>,
    /// Where it has mounts of its own.
    mounts: Vec<String>,
    /// A process has mounted /proc.
    pub(crate) has_proc: bool,
    /// It is being removed.
    pub(crate) leaving: bool,
    /// Text of the machine's id that was written into it.
    pub(crate) machine_id: Option<String>,
}

/// The name spaces of a container, or those it shares; without one it is in the guest's.
#[derive(Default)]
pub(crate) struct Spaces {
    pub(crate) ipc: Option<OwnedFd>,
    pub(crate) uts: Option<OwnedFd>,
    pub(crate) cgroup: Option<OwnedFd>,
    pub(crate) mount: Option<OwnedFd>,
}

impl Spaces {
    /// The steps of a process that enters them.
    pub(crate) fn enter(&self) -> Vec<Step<'_>> {
        let all = [
            (&self.ipc, CloneFlags::CLONE_NEWIPC),
            (&self.uts, CloneFlags::CLONE_NEWUTS),
            (&self.cgroup, CloneFlags::CLONE_NEWCGROUP),
            (&self.mount, CloneFlags::CLONE_NEWNS),
        ];
        all.into_iter()
            .filter_map(|(space, kind)| {
                Some(Step::EnterNamespace { namespace: space.as_ref()?.as_fd(), kind })
            })
            .collect()
    }
}

impl Root {
    /// Makes the surroundings of the root file system mounted at `path`. The name spaces of other containers
    /// that it shares are in `joined`, what its mounts show in `sources`.
    pub(crate) fn make(
        path: &str,
        surroundings: &Surroundings,
        joined: Spaces,
        sources: &[Option<Source>],
        cgroup: Option<Cgroup>,
    ) -> Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let bare = open(path, flags, Mode::empty()).context(|| format!("cannot open {path}"))?;
        let proc = surroundings::proc(surroundings)?;
        let steps = surroundings::steps(path, surroundings, &joined, sources)?;
        let (ready, report) = pipe2(OFlag::O_CLOEXEC).context(|| "cannot make a pipe".into())?;
        let (wait, go) = pipe2(OFlag::O_CLOEXEC).context(|| "cannot make a pipe".into())?;
        // A /proc that is mounted here must not show the agent, whose root is another.
        let pids = if surroundings::mounts_proc(surroundings) { PidSpace::New } else { PidSpace::Agent };
        let own_cgroup = (surroundings.namespaces.cgroup == Namespace::Own).then_some(cgroup.as_ref());
        let place = Place { pids, cgroup: own_cgroup.flatten().map(|cgroup| cgroup.directory.as_fd()) };
        let Some(pid) = fork_at(&place)? else {
            drop((ready, go));
            build(&steps, report, wait);
        };
        drop((report, wait));
        let opened = receive(ready, &steps).and_then(|()| open_spaces(pid, surroundings));
        drop(go);
        let _ = waitpid(pid, None);
        drop(steps);
        let (own, directory) = opened?;
        let spaces = Spaces {
            ipc: own.ipc.or(joined.ipc),
            uts: own.uts.or(joined.uts),
            cgroup: own.cgroup.or(joined.cgroup),
            mount: own.mount,
        };
        let mounts = surroundings.mounts.iter().map(|mount| mount.target.clone()).collect();
        Ok(Self {
            spaces,
            directory,
            bare,
            cgroup,
            proc,
            mounts,
            has_proc: false,
            leaving: false,
            machine_id: None,
        })
    }

    /// Writes a small file of the root file system, replacing what is there. One that the container has mounted
    /// something over stays as it is: it could not be seen, and to replace it would take the mount away.
    pub(crate) fn write_file(&self, path: &str, text: &str) -> Result<()> {
        if self.covers(path) {
            return Ok(());
        }
        write_in_root(self.bare.as_fd(), path, text).context(|| format!("cannot write /{path} in the root"))
    }

    /// The same, but a file that says something is left as it is; whether it was written.
    pub(crate) fn write_if_blank(&self, path: &str, text: &str) -> Result<bool> {
        if says_something(self.bare.as_fd(), path) {
            return Ok(false);
        }
        self.write_file(path, text).map(|()| true)
    }

    /// Whether a file of the root file system says just this.
    pub(crate) fn says(&self, path: &str, text: &str) -> bool {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let Ok(file) = open_in_root(self.bare.as_fd(), path, flags) else { return false };
        let mut bytes = Vec::new();
        let most = (text.len() as u64).saturating_add(1);
        File::from(file).take(most).read_to_end(&mut bytes).is_ok() && bytes == text.as_bytes()
    }

    /// Gives the host of its own name space another name; in a shared one that is not its to do.
    pub(crate) fn rename_host(&self, name: &str) -> Result<()> {
        let Some(uts) = &self.spaces.uts else { return Ok(()) };
        let failed = || format!("cannot set the container's host name to {name}");
        // A child enters the name space: the agent stays in its own.
        let Some(pid) = sys::fork().context(failed)? else {
            let named = setns(uts, CloneFlags::CLONE_NEWUTS).and_then(|()| sethostname(name));
            sys::exit_now(named.map_or_else(|errno| errno as i32, |()| 0));
        };
        match waitpid(pid, None).context(failed)? {
            WaitStatus::Exited(_, 0) => Ok(()),
            WaitStatus::Exited(_, errno) => Err(Errno::from_raw(errno)).context(failed),
            _ => Err(Errno::EINTR).context(failed),
        }
    }

    /// Whether the container has mounted something over it.
    fn covers(&self, path: &str) -> bool {
        let below = format!("/{path}/");
        self.mounts.iter().any(|target| {
            below.strip_prefix(target.trim_end_matches('/')).is_some_and(|rest| rest.starts_with('/'))
        })
    }
}

/// An id that can be a directory's name.
pub(crate) fn check_id(id: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if id.is_empty() || id.len() > MAX_ID || id.starts_with('.') || !id.bytes().all(plain) {
        return Err(Error::Invalid(format!("{id:?} is not an id")));
    }
    Ok(())
}

/// The child: performs the steps, reports, and lives until the agent has the name space.
fn build(steps: &[Step<'_>], report: OwnedFd, wait: OwnedFd) -> ! {
    let (index, errno) = match perform_all(&mut Linux, steps) {
        Ok(()) => (0, 0),
        Err((index, errno)) => (index, errno as i32),
    };
    let mut record = [0; 8];
    record[..4].copy_from_slice(&u32::try_from(index).unwrap_or(0).to_ne_bytes());
    record[4..].copy_from_slice(&errno.to_ne_bytes());
    let _ = File::from(report).write_all(&record);
    let _ = File::from(wait).read(&mut [0]);
    sys::exit_now(0)
}

fn receive(ready: OwnedFd, steps: &[Step<'_>]) -> Result<()> {
    let mut record = [0; 8];
    File::from(ready).read_exact(&mut record).context(|| "cannot make the container's root".into())?;
    let [a, b, c, d, e, f, g, h] = record;
    let errno = i32::from_ne_bytes([e, f, g, h]);
    if errno == 0 {
        return Ok(());
    }
    let index = usize::try_from(u32::from_ne_bytes([a, b, c, d])).unwrap_or(0);
    let what = steps.get(index).map_or_else(String::new, ToString::to_string);
    Err(Error::System { what, errno: Errno::from_raw(errno) })
}

/// What the child has made, before it goes.
fn open_spaces(pid: Pid, surroundings: &Surroundings) -> Result<(Spaces, OwnedFd)> {
    let open_proc = |name: &str, flags| {
        open(format!("/proc/{pid}/{name}").as_str(), flags | OFlag::O_CLOEXEC, Mode::empty())
            .context(|| format!("cannot open {name} of the container's root"))
    };
    let space = |name: &str, wanted: bool| wanted.then(|| open_proc(name, OFlag::O_RDONLY)).transpose();
    let own = |namespace: &Namespace| *namespace == Namespace::Own;
    let spaces = Spaces {
        ipc: space("ns/ipc", own(&surroundings.namespaces.ipc))?,
        uts: space("ns/uts", own(&surroundings.namespaces.uts))?,
        cgroup: space("ns/cgroup", own(&surroundings.namespaces.cgroup))?,
        mount: space("ns/mnt", true)?,
    };
    Ok((spaces, open_proc("root", OFlag::O_PATH | OFlag::O_DIRECTORY)?))
}

/// Whether a file of the root is there and not empty. What is no file is not to be replaced.
fn says_something(root: BorrowedFd<'_>, path: &str) -> bool {
    let found = open_in_root(root, path, OFlag::O_PATH | OFlag::O_NOFOLLOW).and_then(fstat);
    found.is_ok_and(|it| it.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() || it.st_size > 0)
}

fn write_in_root(root: BorrowedFd<'_>, path: &str, text: &str) -> nix::Result<()> {
    let (directory, name) = path.rsplit_once('/').unwrap_or((".", path));
    if directory != "." {
        let _ = nix::sys::stat::mkdirat(root, directory, Mode::from_bits_truncate(0o755));
    }
    let directory = open_in_root(root, directory, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
    // A link there would decide where the text goes; the file itself is what is wanted.
    let _ = nix::unistd::unlinkat(&directory, name, nix::unistd::UnlinkatFlags::NoRemoveDir);
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let file = nix::fcntl::openat(&directory, name, flags, Mode::from_bits_truncate(0o644))?;
    File::from(file).write_all(text.as_bytes()).map_err(|_| Errno::last())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn ids_are_plain_names() {
        for good in ["a", "c1-x_y.z", &"x".repeat(64)] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", ".a", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(check_id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_a_file_that_is_missing_or_empty_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        let root = File::open(dir.path()).unwrap();
        let says = || says_something(root.as_fd(), "etc/machine-id");
        assert!(!says());
        let file = dir.path().join("etc/machine-id");
        fs::write(&file, "").unwrap();
        assert!(!says());
        fs::write(&file, "0123\n").unwrap();
        assert!(says());
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("nowhere", &file).unwrap();
        assert!(says(), "a link is the image's own choice");
    }

    #[test]
    fn a_file_replaces_a_link_and_stays_in_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        fs::create_dir(&root).unwrap();
        fs::write(&outside, "untouched").unwrap();
        fs::create_dir(root.join("etc")).unwrap();
        std::os::unix::fs::symlink(&outside, root.join("etc/hosts")).unwrap();
        let fd = File::open(&root).unwrap();
        write_in_root(fd.as_fd(), "etc/hosts", "127.0.0.1 localhost\n").unwrap();
        assert_eq!(fs::read_to_string(&outside).unwrap(), "untouched");
        assert_eq!(fs::read_to_string(root.join("etc/hosts")).unwrap(), "127.0.0.1 localhost\n");
        write_in_root(fd.as_fd(), "etc/hosts", "again\n").unwrap();
        assert_eq!(fs::read_to_string(root.join("etc/hosts")).unwrap(), "again\n");
    }
}
