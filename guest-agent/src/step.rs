//! The single system operations that set up a container or a process, as data.
//!
//! What is to be done is decided first, as a list of steps that tests can read; it is performed by a
//! [`Kernel`], often in a forked child, where nothing may allocate and an error is only a number.

use std::{
    ffi::{CStr, CString, OsStr},
    fmt,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
        unix::ffi::OsStrExt,
    },
};

use nix::{
    Result,
    errno::Errno,
    fcntl::{OFlag, open},
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl::{set_keepcaps, set_no_new_privs},
        signal::SigSet,
        stat::{Mode, SFlag, fstat, lstat, makedev, mknod, stat, umask},
    },
    unistd::{
        Gid, Uid, chdir, chown, chroot, mkdir, pivot_root, setgroups, setresgid, setresuid, setsid,
        symlinkat, write,
    },
};

use mvm_protocol::{Capabilities, Rlimit, Scheduler};

use crate::{
    clock,
    surroundings::{Target, make_target, replace_below},
    sys::{
        self, confine,
        trees::{self, Attributes},
    },
};

/// One system operation.
#[derive(Debug)]
pub(crate) enum Step<'a> {
    /// mount(2).
    Mount(MountCall),
    /// How far ahead of its readers a block device is read, in sectors of 512 bytes.
    ReadAhead { device: CString, sectors: u32 },
    /// mkdir(2); an existing directory is as good.
    MakeDirectory { path: CString, mode: u32 },
    /// mknod(2) and its owner; a device of the same numbers is as good.
    MakeDevice(Device),
    /// A file or directory something is mounted on, made if it is missing.
    MakeTarget { target: Target, directory: bool },
    /// A copied tree of mounts becomes visible.
    Attach { tree: BorrowedFd<'a>, target: CString, attributes: Attributes },
    /// What is at one path becomes visible at another one, which is made if it is missing.
    Bind { source: CString, target: Target, recursive: bool, attributes: Attributes },
    /// What is at a path reads as empty; nothing there is as good.
    Mask(CString),
    /// What is at a path cannot be written; nothing there is as good.
    Protect(CString),
    /// A fresh mount in the place of another, below what is mounted on that.
    Replace { call: MountCall, above: Vec<CString> },
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
    /// A standard stream belongs to the user, so that /dev/stdout can be opened.
    OwnStdio { fd: RawFd, uid: u32 },
    /// Close everything from 3 up.
    CloseOthers,
    /// umask(2).
    Umask(u32),
    /// chdir(2); the parents, outermost first and the directory last, are made if it is missing.
    WorkingDirectory { path: CString, parents: Vec<CString> },
    /// Groups, then group, then user.
    Credentials { uid: Uid, gid: Gid, groups: Vec<Gid> },
    /// Nothing blocked. The dispositions are the agent's, who has none but the default ones.
    UnblockSignals,
    /// setrlimit(2).
    LimitResource(Rlimit),
    /// sched_setattr(2).
    Schedule(Scheduler),
    /// ioprio_set(2).
    IoPriority(u32),
    /// Executing a program gives no privilege from now on.
    NoNewPrivileges,
    /// seccomp(2): eight bytes for each instruction.
    FilterSystemCalls { program: Vec<u64>, flags: u64 },
    /// The bounding set loses all capabilities but these.
    BoundCapabilities(u64),
    /// Whether a change of user keeps the permitted capabilities.
    KeepCapabilities(bool),
    /// capset(2), then the ambient ones.
    Capabilities(Capabilities),
    /// sethostname(2).
    HostName(CString),
    /// Bytes into the pool of randomness, and new seeds from it for whatever gives some out.
    Reseed([u8; 32]),
    /// clock_settime(2), unless the wall clock is right within a tolerance, in nanoseconds.
    WallClock { ns: u64, tolerance_ns: u64 },
    /// A step that may fail.
    Try(Box<Step<'a>>),
}

/// The arguments of mknod(2) and chown(2).
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub(crate) path: CString,
    pub(crate) kind: SFlag,
    pub(crate) major: u64,
    pub(crate) minor: u64,
    pub(crate) mode: u32,
    pub(crate) owner: (Uid, Gid),
}

impl Device {
    /// A character device that everybody may use.
    pub(crate) fn open_to_all(path: &CStr, major: u64, minor: u64) -> Self {
        let owner = (Uid::from_raw(0), Gid::from_raw(0));
        Self { path: path.into(), kind: SFlag::S_IFCHR, major, minor, mode: 0o666, owner }
    }
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
    /// Performs one step. Must not allocate: it runs between fork and exec, and what it takes is never given back.
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
            Step::ReadAhead { device, sectors } => sys::set_read_ahead(device, *sectors),
            Step::MakeDirectory { path, mode } => make_directory(path, *mode),
            Step::MakeDevice(device) => make_device(device),
            Step::MakeTarget { target, directory } => make_target(target, *directory),
            Step::Attach { tree, target, attributes } => {
                trees::change(*tree, *attributes)?;
                trees::attach(*tree, target)
            }
            Step::Bind { source, target, recursive, attributes } => {
                bind(source, target, *recursive, *attributes)
            }
            Step::Mask(path) => mask(path),
            Step::Protect(path) => protect(path),
            Step::Replace { call, above } => replace_below(above, &mut || {
                let _ = umount2(call.target.as_c_str(), MntFlags::MNT_DETACH);
                mount_call(call)
            }),
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
            Step::OwnStdio { fd, uid } => sys::own_stdio(*fd, *uid),
            Step::CloseOthers => sys::close_others(),
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
            Step::UnblockSignals => SigSet::empty().thread_set_mask(),
            Step::LimitResource(limit) => confine::limit_resource(limit),
            Step::Schedule(scheduler) => confine::schedule(scheduler),
            Step::IoPriority(priority) => confine::set_io_priority(*priority),
            Step::NoNewPrivileges => set_no_new_privs(),
            Step::FilterSystemCalls { program, flags } => confine::filter_system_calls(program, *flags),
            Step::BoundCapabilities(keep) => confine::bound_capabilities(*keep),
            Step::KeepCapabilities(keep) => set_keepcaps(*keep),
            Step::Capabilities(sets) => confine::set_capabilities(sets),
            Step::HostName(name) => nix::unistd::sethostname(OsStr::from_bytes(name.to_bytes())),
            Step::Reseed(entropy) => reseed(*entropy),
            Step::WallClock { ns, tolerance_ns } => clock::set_wall_clock(*ns, *tolerance_ns),
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

fn make_device(device: &Device) -> Result<()> {
    let Device { path, kind, major, minor, mode, owner: (uid, gid) } = device;
    let number = makedev(*major, *minor);
    match mknod(path.as_c_str(), *kind, Mode::from_bits_truncate(*mode), number) {
        Err(Errno::EEXIST) => {
            let there = lstat(path.as_c_str())?;
            let same = there.st_mode & SFlag::S_IFMT.bits() == kind.bits() && there.st_rdev == number;
            if same { Ok(()) } else { Err(Errno::EEXIST) }
        }
        Err(errno) => Err(errno),
        Ok(()) if uid.is_root() && gid.as_raw() == 0 => Ok(()),
        Ok(()) => chown(path.as_c_str(), Some(*uid), Some(*gid)),
    }
}

fn bind(source: &CStr, target: &Target, recursive: bool, attributes: Attributes) -> Result<()> {
    let is_directory = stat(source)?.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits();
    let tree = trees::copy(source, recursive)?;
    make_target(target, is_directory)?;
    trees::change(tree.as_fd(), attributes)?;
    trees::attach(tree.as_fd(), &target.path)
}

/// A directory is covered by an empty one, anything else by the null device, which is looked at first: an
/// image could have put something else in its place.
fn mask(path: &CStr) -> Result<()> {
    let there = match stat(path) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
        there => there?,
    };
    if there.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits() {
        let call = MountCall::of(c"tmpfs", path.into(), MsFlags::MS_RDONLY, c"size=0,mode=0555");
        return mount_call(&call);
    }
    let null = open(c"/dev/null", OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
    let found = fstat(&null)?;
    if found.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFCHR.bits() || found.st_rdev != makedev(1, 3) {
        return Err(Errno::ENODEV);
    }
    let tree = trees::copy_from(null.as_fd(), false)?;
    trees::attach(tree.as_fd(), path)
}

fn protect(path: &CStr) -> Result<()> {
    let tree = match trees::copy(path, true) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
        tree => tree?,
    };
    trees::change(tree.as_fd(), Attributes::READ_ONLY)?;
    trees::attach(tree.as_fd(), path)
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

/// Generators are seeded from the pool now and then only: without the second call what they give out next
/// would still be that of the machine this one is a clone of.
fn reseed(entropy: [u8; 32]) -> Result<()> {
    let pool = open(c"/dev/urandom", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    sys::credit_entropy(&pool, entropy)?;
    sys::reseed_generators(&pool)
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
            Self::ReadAhead { device, .. } => write!(f, "cannot set the read-ahead of {}", text(device)),
            Self::MakeDirectory { path, .. } => write!(f, "cannot make directory {}", text(path)),
            Self::MakeDevice(device) => write!(f, "cannot make device {}", text(&device.path)),
            Self::MakeTarget { target, .. } => {
                write!(f, "cannot make {} to mount something on", text(&target.path))
            }
            Self::Attach { target, .. } => write!(f, "cannot mount at {}", text(target)),
            Self::Bind { source, target, .. } => {
                write!(f, "cannot mount {} at {}", text(source), text(&target.path))
            }
            Self::Mask(path) => write!(f, "cannot mask {}", text(path)),
            Self::Protect(path) => write!(f, "cannot make {} read-only", text(path)),
            Self::Replace { call, .. } => {
                write!(f, "cannot mount {} anew at {}", text(&call.kind), text(&call.target))
            }
            Self::Link { path, .. } => write!(f, "cannot make symbolic link {}", text(path)),
            Self::Unshare(flags) => write!(f, "cannot make name spaces {flags:?}"),
            Self::EnterNamespace { kind, .. } => write!(f, "cannot enter name space {kind:?}"),
            Self::EnterRoot(path) => write!(f, "cannot make {} the root", text(path)),
            Self::WriteFile { path, .. } => write!(f, "cannot write {}", text(path)),
            Self::NewSession => write!(f, "cannot start a session"),
            Self::ControllingTerminal => write!(f, "cannot take the controlling terminal"),
            Self::Stdio { from, to } => write!(f, "cannot make {} standard stream {to}", from.as_raw_fd()),
            Self::OwnStdio { fd, uid } => write!(f, "cannot give standard stream {fd} to user {uid}"),
            Self::CloseOthers => write!(f, "cannot close the agent's descriptors"),
            Self::Umask(_) => write!(f, "cannot set the umask"),
            Self::WorkingDirectory { path, .. } => write!(f, "cannot enter working directory {}", text(path)),
            Self::Credentials { uid, gid, .. } => write!(f, "cannot become user {uid} group {gid}"),
            Self::UnblockSignals => write!(f, "cannot unblock signals"),
            Self::LimitResource(limit) => write!(f, "cannot set resource limit {}", limit.resource),
            Self::Schedule(it) => write!(f, "cannot set scheduling policy {} nice {}", it.policy, it.nice),
            Self::IoPriority(priority) => write!(f, "cannot set I/O priority {priority:#x}"),
            Self::NoNewPrivileges => write!(f, "cannot forbid new privileges"),
            Self::FilterSystemCalls { .. } => write!(f, "cannot install the system call filter"),
            Self::BoundCapabilities(_) => write!(f, "cannot drop capabilities from the bounding set"),
            Self::KeepCapabilities(_) => write!(f, "cannot keep capabilities over a change of user"),
            Self::Capabilities(_) => write!(f, "cannot set the capabilities"),
            Self::HostName(name) => write!(f, "cannot set the host name to {}", text(name)),
            Self::Reseed(_) => write!(f, "cannot add the host's entropy"),
            Self::WallClock { .. } => write!(f, "cannot set the clock"),
            Self::Try(step) => step.fmt(f),
        }
    }
}
