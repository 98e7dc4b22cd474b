//! The single system operations that set up a container or a process, as data.
//!
//! What is to be done is decided first, as a list of steps that tests can read; it is performed by a
//! [`Kernel`], often in a forked child, where nothing may allocate and an error is only a number.

use std::{
    ffi::{CStr, CString},
    fmt,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
};

use nix::{
    Result,
    errno::Errno,
    fcntl::{OFlag, open},
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::stat::{Mode, SFlag, makedev, mknod, umask},
    unistd::{
        Gid, Uid, chdir, chroot, mkdir, pivot_root, setgroups, setresgid, setresuid, setsid, symlinkat, write,
    },
};

use crate::sys;

/// One system operation.
#[derive(Debug)]
pub(crate) enum Step<'a> {
    /// mount(2).
    Mount(MountCall),
    /// umount2(2), lazily.
    Detach(CString),
    /// mkdir(2); an existing directory is as good.
    MakeDirectory { path: CString, mode: u32 },
    /// mknod(2) of a character device that everybody may use.
    MakeDevice { path: CString, major: u64, minor: u64 },
    /// symlink(2).
    Link { target: CString, path: CString },
    /// unshare(2).
    Unshare(CloneFlags),
    /// setns(2).
    EnterNamespace { namespace: BorrowedFd<'a>, kind: CloneFlags },
    /// Make a mounted directory the root and lose sight of the old one.
    EnterRoot(CString),
    /// Write to an existing file.
    WriteFile { path: CString, bytes: Vec<u8> },
    /// setsid(2).
    NewSession,
    /// Standard input becomes the controlling terminal.
    ControllingTerminal,
    /// A standard stream: 0, 1 or 2.
    Stdio { from: BorrowedFd<'a>, to: i32 },
    /// The standard streams belong to the user, so that /dev/stdout can be opened.
    OwnStdio { uid: u32 },
    /// Close everything from 3 up but one.
    CloseOthers { keep: RawFd },
    /// umask(2).
    Umask(u32),
    /// chdir(2); the parents, outermost first and the directory last, are made if it is missing.
    WorkingDirectory { path: CString, parents: Vec<CString> },
    /// Groups, then group, then user.
    Credentials { uid: Uid, gid: Gid, groups: Vec<Gid> },
    /// Default dispositions, nothing blocked.
    ResetSignals,
    /// A step that may fail.
    Try(Box<Step<'a>>),
}

/// The arguments of mount(2).
#[derive(Clone, Debug)]
pub(crate) struct MountCall {
    pub(crate) source: CString,
    pub(crate) target: CString,
    pub(crate) kind: CString,
    pub(crate) flags: MsFlags,
    pub(crate) data: CString,
}

impl MountCall {
    /// A mount of a file system without a device.
    pub(crate) fn of(kind: &CStr, target: CString, flags: MsFlags, data: &CStr) -> Self {
        Self { source: kind.into(), target, kind: kind.into(), flags, data: data.into() }
    }
}

/// Who performs steps: the real kernel, or a test's notebook.
pub(crate) trait Kernel {
    /// Performs one step. Must not allocate: it runs between fork and exec.
    fn perform(&mut self, step: &Step<'_>) -> Result<()>;
}

/// Performs steps in order; the index of the one that failed.
pub(crate) fn perform_all(
    kernel: &mut dyn Kernel,
    steps: &[Step<'_>],
) -> std::result::Result<(), (usize, Errno)> {
    steps
        .iter()
        .enumerate()
        .try_for_each(|(index, step)| kernel.perform(step).map_err(|errno| (index, errno)))
}

/// The kernel this process runs on.
pub(crate) struct Linux;

impl Kernel for Linux {
    fn perform(&mut self, step: &Step<'_>) -> Result<()> {
        match step {
            Step::Mount(call) => mount_call(call),
            Step::Detach(target) => umount2(target.as_c_str(), MntFlags::MNT_DETACH),
            Step::MakeDirectory { path, mode } => make_directory(path, *mode),
            Step::MakeDevice { path, major, minor } => make_device(path, *major, *minor),
            Step::Link { target, path } => {
                symlinkat(target.as_c_str(), nix::fcntl::AT_FDCWD, path.as_c_str())
            }
            Step::Unshare(flags) => unshare(*flags),
            Step::EnterNamespace { namespace, kind } => setns(namespace, *kind),
            Step::EnterRoot(path) => enter_root(path),
            Step::WriteFile { path, bytes } => write_file(path, bytes),
            Step::NewSession => setsid().map(drop),
            Step::ControllingTerminal => sys::take_controlling_terminal(),
            Step::Stdio { from, to } => sys::make_stdio(*from, *to),
            Step::OwnStdio { uid } => (0..3).try_for_each(|fd| sys::own_stdio(fd, *uid)),
            Step::CloseOthers { keep } => sys::close_others(*keep),
            Step::Umask(mask) => {
                umask(Mode::from_bits_truncate(*mask));
                Ok(())
            }
            Step::WorkingDirectory { path, parents } => working_directory(path, parents),
            Step::Credentials { uid, gid, groups } => {
                setgroups(groups)?;
                setresgid(*gid, *gid, *gid)?;
                setresuid(*uid, *uid, *uid)
            }
            Step::ResetSignals => sys::reset_signals(),
            Step::Try(step) => {
                let _ = self.perform(step);
                Ok(())
            }
        }
    }
}

fn mount_call(call: &MountCall) -> Result<()> {
    mount(
        Some(call.source.as_c_str()),
        call.target.as_c_str(),
        Some(call.kind.as_c_str()),
        call.flags,
        Some(call.data.as_c_str()),
    )
}

fn make_directory(path: &CStr, mode: u32) -> Result<()> {
    match mkdir(path, Mode::from_bits_truncate(mode)) {
        Err(Errno::EEXIST) => Ok(()),
        other => other,
    }
}

fn make_device(path: &CStr, major: u64, minor: u64) -> Result<()> {
    mknod(path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(major, minor))
}

/// pivot_root(2) leaves no trace of the old root. It is refused when that is the kernel's own rootfs
/// (an initramfs); then the new root is moved over it, which hides it just as well: a path cannot climb
/// out, because whatever is below the name space's root is covered by this mount.
fn enter_root(path: &CStr) -> Result<()> {
    chdir(path)?;
    match pivot_root(c".", c".") {
        Ok(()) => umount2(c".", MntFlags::MNT_DETACH)?,
        Err(Errno::EINVAL) => {
            mount(Some(c"."), c"/", None::<&CStr>, MsFlags::MS_MOVE, None::<&CStr>)?;
            chroot(c".")?;
        }
        Err(errno) => return Err(errno),
    }
    chdir(c"/")
}

fn write_file(path: &CStr, bytes: &[u8]) -> Result<()> {
    let file = open(path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    write(&file, bytes).map(drop)
}

fn working_directory(path: &CStr, parents: &[CString]) -> Result<()> {
    match chdir(path) {
        Err(Errno::ENOENT) => {
            parents.iter().try_for_each(|parent| make_directory(parent, 0o755))?;
            chdir(path)
        }
        other => other,
    }
}

impl fmt::Display for Step<'_> {
    /// The operation and its operand, as an error text names it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |text: &CString| text.to_string_lossy().into_owned();
        match self {
            Self::Mount(call) => write!(f, "cannot mount {} at {}", text(&call.kind), text(&call.target)),
            Self::Detach(target) => write!(f, "cannot unmount {}", text(target)),
            Self::MakeDirectory { path, .. } => write!(f, "cannot make directory {}", text(path)),
            Self::MakeDevice { path, .. } => write!(f, "cannot make device {}", text(path)),
            Self::Link { path, .. } => write!(f, "cannot make symbolic link {}", text(path)),
            Self::Unshare(flags) => write!(f, "cannot make name spaces {flags:?}"),
            Self::EnterNamespace { kind, .. } => write!(f, "cannot enter name space {kind:?}"),
            Self::EnterRoot(path) => write!(f, "cannot make {} the root", text(path)),
            Self::WriteFile { path, .. } => write!(f, "cannot write {}", text(path)),
            Self::NewSession => write!(f, "cannot start a session"),
            Self::ControllingTerminal => write!(f, "cannot take the controlling terminal"),
            Self::Stdio { from, to } => write!(f, "cannot make {} standard stream {to}", from.as_raw_fd()),
            Self::OwnStdio { uid } => write!(f, "cannot give the standard streams to user {uid}"),
            Self::CloseOthers { .. } => write!(f, "cannot close the agent's descriptors"),
            Self::Umask(_) => write!(f, "cannot set the umask"),
            Self::WorkingDirectory { path, .. } => write!(f, "cannot enter working directory {}", text(path)),
            Self::Credentials { uid, gid, .. } => write!(f, "cannot become user {uid} group {gid}"),
            Self::ResetSignals => write!(f, "cannot reset signals"),
            Self::Try(step) => step.fmt(f),
        }
    }
}
