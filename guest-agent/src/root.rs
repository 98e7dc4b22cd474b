//! A container's root: its mount name space, made once and entered by every process of it.
//!
//! A short-lived child enters the new root before it mounts anything in it, so that no link in an image
//! can lead a mount out of it. The agent keeps the name space by a descriptor.

use std::{
    ffi::CString,
    fs::File,
    io::{Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use mvm_protocol::limits::MAX_ID;
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    mount::MsFlags,
    sched::CloneFlags,
    sys::{stat::Mode, wait::waitpid},
    unistd::{Pid, pipe2},
};

use crate::{
    cgroup::Cgroup,
    error::{Context, Error, Result},
    spawn::c_string,
    step::{Linux, MountCall, Step, perform_all},
    sys,
    user::open_in_root,
};

/// A container's root.
pub(crate) struct Root {
    /// What its processes enter.
    pub(crate) mount_namespace: OwnedFd,
    /// Its root directory as seen from inside.
    pub(crate) directory: OwnedFd,
    /// Its processes' cgroup, where the kernel has cgroups.
    pub(crate) cgroup: Option<Cgroup>,
    /// A process has mounted /proc.
    pub(crate) has_proc: bool,
}

impl Root {
    /// Makes the mount name space of the root file system mounted at `path`.
    pub(crate) fn enter(path: &str, cgroup: Option<Cgroup>) -> Result<Self> {
        let steps = steps(c_string(path)?);
        let (ready, report) = pipe2(OFlag::O_CLOEXEC).context(|| "cannot make a pipe".into())?;
        let (wait, go) = pipe2(OFlag::O_CLOEXEC).context(|| "cannot make a pipe".into())?;
        let Some(pid) = sys::fork().context(|| "cannot fork".into())? else {
            drop((ready, go));
            build(&steps, report, wait);
        };
        drop((report, wait));
        let opened = receive(ready, &steps).and_then(|()| open_namespace(pid));
        drop(go);
        let _ = waitpid(pid, None);
        let (mount_namespace, directory) = opened?;
        Ok(Self { mount_namespace, directory, cgroup, has_proc: false })
    }

    /// Writes a small file, replacing what is there, as a process in the root would.
    pub(crate) fn write_file(&self, path: &str, text: &str) -> Result<()> {
        write_in_root(self.directory.as_fd(), path, text)
            .context(|| format!("cannot write /{path} in the root"))
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

fn open_namespace(pid: Pid) -> Result<(OwnedFd, OwnedFd)> {
    let open_proc = |name: &str, flags| {
        open(format!("/proc/{pid}/{name}").as_str(), flags | OFlag::O_CLOEXEC, Mode::empty())
            .context(|| format!("cannot open {name} of the container's root"))
    };
    Ok((open_proc("ns/mnt", OFlag::O_RDONLY)?, open_proc("root", OFlag::O_PATH | OFlag::O_DIRECTORY)?))
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

/// What the child does: a name space of its own, then inside it what every container expects.
fn steps<'a>(path: CString) -> Vec<Step<'a>> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let mount = |kind, target: &str, flags, data| {
        Step::Mount(MountCall::of(kind, CString::new(target).unwrap_or_default(), flags, data))
    };
    let private = MountCall {
        source: c"none".into(),
        target: c"/".into(),
        kind: c"none".into(),
        flags: MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        data: c"".into(),
    };
    let mut steps = vec![
        Step::Unshare(CloneFlags::CLONE_NEWNS),
        Step::Mount(private),
        Step::EnterRoot(path),
        Step::Umask(0),
    ];
    steps.extend([c"/proc", c"/sys", c"/dev"].map(|path| Step::Try(Box::new(directory(path.into())))));
    let read_only = plain | MsFlags::MS_NODEV | MsFlags::MS_RDONLY;
    steps.push(Step::Try(Box::new(mount(c"sysfs", "/sys", read_only, c""))));
    steps.push(mount(c"tmpfs", "/dev", plain, c"mode=0755,size=64k"));
    steps.extend([c"/dev/pts", c"/dev/shm", c"/dev/mqueue"].map(|path| directory(path.into())));
    steps.push(mount(c"devpts", "/dev/pts", plain, c"newinstance,ptmxmode=0666,mode=0620,gid=5"));
    steps.push(mount(c"tmpfs", "/dev/shm", plain | MsFlags::MS_NODEV, c"mode=1777,size=64m"));
    steps.push(Step::Try(Box::new(mount(c"mqueue", "/dev/mqueue", plain | MsFlags::MS_NODEV, c""))));
    steps.extend(DEVICES.map(|(path, major, minor)| Step::MakeDevice { path: path.into(), major, minor }));
    steps.extend(LINKS.map(|(path, target)| Step::Link { target: target.into(), path: path.into() }));
    steps
}

/// The devices every container has (OCI runtime specification, Linux, default devices).
const DEVICES: [(&std::ffi::CStr, u64, u64); 6] = [
    (c"/dev/null", 1, 3),
    (c"/dev/zero", 1, 5),
    (c"/dev/full", 1, 7),
    (c"/dev/random", 1, 8),
    (c"/dev/urandom", 1, 9),
    (c"/dev/tty", 5, 0),
];

/// The links beside them.
const LINKS: [(&std::ffi::CStr, &std::ffi::CStr); 5] = [
    (c"/dev/fd", c"/proc/self/fd"),
    (c"/dev/stdin", c"/proc/self/fd/0"),
    (c"/dev/stdout", c"/proc/self/fd/1"),
    (c"/dev/stderr", c"/proc/self/fd/2"),
    (c"/dev/ptmx", c"pts/ptmx"),
];

fn directory<'a>(path: CString) -> Step<'a> {
    Step::MakeDirectory { path, mode: 0o755 }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_root_is_entered_before_anything_is_mounted_in_it() {
        let steps = steps(c"/run/mvm/root/c1".into());
        let entered = steps.iter().position(|step| matches!(step, Step::EnterRoot(_))).unwrap();
        let private =
            steps.iter().position(|step| matches!(step, Step::Mount(it) if it.target == *c"/")).unwrap();
        assert!(private < entered);
        let in_root = |step: &Step<'_>| step.to_string().contains("/dev");
        assert!(!steps[..entered].iter().any(in_root));
        assert_eq!(steps.iter().filter(|step| matches!(step, Step::MakeDevice { .. })).count(), 6);
    }

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
