//! What is made around a container's processes once, as steps of the child that makes its root.
//!
//! What needs the agent's own /proc comes first, then the child enters the root and loses sight of everything
//! else; from there on no link in an image can lead a mount, a directory or a device out of it.

use std::{
    ffi::{CStr, CString},
    os::fd::{AsFd, OwnedFd},
};

use mvm_protocol::{ContainerMount, ContainerSource, DeviceKind, Namespace, Surroundings, limits};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    mount::MsFlags,
    sched::CloneFlags,
    sys::stat::{Mode, SFlag, stat},
    unistd::{Gid, Uid, mkdir},
};

use crate::{
    cgroup,
    error::{Error, Result},
    root::Spaces,
    spawn::c_string,
    step::{Device, MountCall, Step},
    sys::trees::{self, Attributes},
};

/// Flags that say how a mount spreads.
const PROPAGATION: MsFlags =
    MsFlags::MS_PRIVATE.union(MsFlags::MS_SLAVE).union(MsFlags::MS_SHARED).union(MsFlags::MS_UNBINDABLE);

/// A place for a mount, as its container names it.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) path: CString,
    /// The directories above it, outermost first.
    parents: Vec<CString>,
}

impl Target {
    fn new(path: &str) -> Result<Self> {
        let trimmed = path.trim_end_matches('/');
        if !trimmed.starts_with('/') {
            return Err(Error::Invalid(format!("{path:?} is no place in a container")));
        }
        let ends = trimmed.match_indices('/').map(|(at, _)| at).skip(1);
        let parents = ends.filter_map(|end| trimmed.get(..end)).map(c_string).collect::<Result<_>>()?;
        Ok(Self { path: c_string(trimmed)?, parents })
    }
}

/// Makes what something is to be mounted on, if it is missing.
pub(crate) fn make_target(target: &Target, directory: bool) -> nix::Result<()> {
    let made = |result| match result {
        Err(Errno::EEXIST) => Ok(()),
        other => other,
    };
    let path = target.path.as_c_str();
    match stat(path) {
        Err(Errno::ENOENT) => {}
        other => return other.map(drop),
    }
    let mode = Mode::from_bits_truncate(0o755);
    target.parents.iter().try_for_each(|parent| made(mkdir(parent.as_c_str(), mode)))?;
    if directory {
        return made(mkdir(path, mode));
    }
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    open(path, flags, Mode::from_bits_truncate(0o644)).map(drop)
}

/// Performs `mount` with everything that is mounted at the paths `above` lifted off, and puts that back. What
/// is not there, before or after, is left out.
pub(crate) fn replace_below(
    above: &[CString],
    mount: &mut dyn FnMut() -> nix::Result<()>,
) -> nix::Result<()> {
    let Some((last, rest)) = above.split_last() else {
        return mount();
    };
    let tree = match trees::copy(last, true) {
        Err(Errno::ENOENT) => None,
        tree => Some(tree?),
    };
    replace_below(rest, mount)?;
    match tree.map(|tree| trees::attach(tree.as_fd(), last)) {
        None | Some(Err(Errno::ENOENT)) => Ok(()),
        Some(attached) => attached,
    }
}

/// What a mount shows that is not of the container, opened by the agent.
pub(crate) struct Source {
    pub(crate) tree: OwnedFd,
    pub(crate) is_directory: bool,
}

/// The mount of /proc of a container: it shows a PID name space, which only comes with the first process.
#[derive(Clone, Debug)]
pub(crate) struct Proc {
    pub(crate) call: MountCall,
    /// What is mounted on it.
    pub(crate) above: Vec<CString>,
}

/// Whether the child mounts a /proc of its own.
pub(crate) fn mounts_proc(surroundings: &Surroundings) -> bool {
    !surroundings.mounts.is_empty() || needs_proc(surroundings)
}

/// Whether anything is to be made that can only be made on a /proc.
fn needs_proc(surroundings: &Surroundings) -> bool {
    let below = |path: &String| path.starts_with("/proc/");
    surroundings.masked_paths.iter().chain(&surroundings.read_only_paths).any(below)
}

/// The name spaces the child makes for itself.
fn own_spaces(surroundings: &Surroundings) -> CloneFlags {
    let spaces = &surroundings.namespaces;
    [
        (&spaces.ipc, CloneFlags::CLONE_NEWIPC),
        (&spaces.uts, CloneFlags::CLONE_NEWUTS),
        (&spaces.cgroup, CloneFlags::CLONE_NEWCGROUP),
    ]
    .into_iter()
    .filter(|(space, _)| **space == Namespace::Own)
    .fold(CloneFlags::CLONE_NEWNS, |all, (_, flag)| all | flag)
}

/// Refuses what is too much.
pub(crate) fn check(surroundings: &Surroundings) -> Result<()> {
    let counts = [
        surroundings.mounts.len(),
        surroundings.devices.len(),
        surroundings.disks.len(),
        surroundings.masked_paths.len(),
        surroundings.read_only_paths.len(),
        surroundings.sysctls.len(),
        surroundings.limits.files.len(),
    ];
    match counts.into_iter().max() {
        Some(most) if most > limits::MAX_SURROUNDINGS => {
            Err(Error::Invalid(format!("a container's surroundings have a list of {most} entries")))
        }
        _ => Ok(()),
    }
}

/// Everything the child does, from its name spaces to the last mount. `sources` has what the agent has opened
/// for each of the mounts.
pub(crate) fn steps<'a>(
    path: &str,
    surroundings: &Surroundings,
    joined: &'a Spaces,
    sources: &'a [Option<Source>],
) -> Result<Vec<Step<'a>>> {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    let mut steps = joined.enter();
    steps.extend([Step::Unshare(own_spaces(surroundings)), propagate(c"/", private)]);
    steps.extend(names(surroundings)?);
    for (name, value) in &surroundings.sysctls {
        steps.push(Step::WriteFile { path: sysctl(name)?, bytes: value.clone().into_bytes() });
    }
    steps.extend([Step::EnterRoot(c_string(path)?), Step::Umask(0)]);
    if surroundings.mounts.is_empty() {
        steps.extend(default_mounts(needs_proc(surroundings)));
    } else {
        for (mount, source) in surroundings.mounts.iter().zip(sources) {
            steps.extend(mount_steps(mount, source.as_ref())?);
        }
    }
    steps.extend(default_devices(surroundings));
    for device in &surroundings.devices {
        steps.extend(device_steps(device)?);
    }
    for path in &surroundings.read_only_paths {
        steps.push(Step::Protect(Target::new(path)?.path));
    }
    for path in &surroundings.masked_paths {
        steps.push(Step::Mask(Target::new(path)?.path));
    }
    if surroundings.root_propagation != 0 {
        steps.push(propagate(c"/", MsFlags::from_bits_retain(surroundings.root_propagation)));
    }
    if surroundings.read_only_root {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        steps.push(propagate(c"/", flags));
    }
    Ok(steps)
}

/// A mount(2) that changes an existing mount.
fn propagate<'a>(target: &CStr, flags: MsFlags) -> Step<'a> {
    Step::Mount(MountCall::of(c"none", target.into(), flags, c""))
}

/// The names of an UTS name space, through the agent's own /proc, which shows those of whoever looks.
fn names<'a>(surroundings: &Surroundings) -> Result<Vec<Step<'a>>> {
    if surroundings.namespaces.uts != Namespace::Own {
        return Ok(Vec::new());
    }
    let write =
        |path: &CStr, name: &String| Step::WriteFile { path: path.into(), bytes: name.clone().into() };
    let host = surroundings.hostname.iter().map(|name| write(c"/proc/sys/kernel/hostname", name));
    let domain = surroundings.domainname.iter().map(|name| write(c"/proc/sys/kernel/domainname", name));
    Ok(host.chain(domain).collect())
}

/// The file of a kernel parameter. As sysctl(8) has it, a slash stands for a dot within a name that is
/// separated by dots.
fn sysctl(name: &str) -> Result<CString> {
    let path = match name.find(['.', '/']).and_then(|at| name.get(at..)) {
        Some(rest) if rest.starts_with('/') => name.to_owned(),
        _ => name
            .chars()
            .map(|it| match it {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
    };
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(Error::Invalid(format!("{name:?} is no kernel parameter")));
    }
    c_string(&format!("/proc/sys/{path}"))
}

fn mount_steps<'a>(mount: &ContainerMount, source: Option<&'a Source>) -> Result<Vec<Step<'a>>> {
    let target = Target::new(&mount.target)?;
    let flags = MsFlags::from_bits_retain(mount.flags);
    let recursive = flags.contains(MsFlags::MS_REC);
    let attributes = Attributes::of(flags);
    let path = target.path.clone();
    let mut steps = match (&mount.source, source) {
        (ContainerSource::Filesystem(kind), _) => {
            let flags = flags - (MsFlags::MS_REC | MsFlags::MS_BIND) - PROPAGATION;
            let data = match kind.as_str() {
                "cgroup2" => cgroup::OPTIONS.to_owned(),
                _ => c_string(&mount.data)?,
            };
            let call = MountCall::of(&c_string(kind)?, path.clone(), flags, &data);
            vec![Step::MakeTarget { target, directory: true }, Step::Mount(call)]
        }
        (ContainerSource::Inside(from), _) => {
            let source = Target::new(from)?.path;
            vec![Step::Bind { source, target, recursive, attributes }]
        }
        (_, Some(source)) => {
            let tree = source.tree.as_fd();
            let made = Step::MakeTarget { target, directory: source.is_directory };
            vec![made, Step::Attach { tree, target: path.clone(), attributes }]
        }
        (_, None) => return Err(Error::Invalid(format!("nothing to mount at {}", mount.target))),
    };
    if mount.propagation != 0 {
        steps.push(propagate(&path, MsFlags::from_bits_retain(mount.propagation)));
    }
    Ok(steps)
}

/// What a container gets that does not say what it wants.
fn default_mounts<'a>(with_proc: bool) -> Vec<Step<'a>> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let no_device = plain | MsFlags::MS_NODEV;
    let directory = |path: &CStr| Step::MakeDirectory { path: path.into(), mode: 0o755 };
    let mount =
        |kind, target: &CStr, flags, data| Step::Mount(MountCall::of(kind, target.into(), flags, data));
    let mut steps: Vec<Step<'a>> =
        [c"/proc", c"/sys", c"/dev"].map(|path| Step::Try(Box::new(directory(path)))).into();
    if with_proc {
        steps.push(mount(c"proc", c"/proc", no_device, c""));
    }
    let sysfs = mount(c"sysfs", c"/sys", no_device | MsFlags::MS_RDONLY, c"");
    steps.push(Step::Try(Box::new(sysfs)));
    steps.push(mount(c"tmpfs", c"/dev", plain, c"mode=0755,size=64k"));
    steps.extend([c"/dev/pts", c"/dev/shm", c"/dev/mqueue"].map(directory));
    steps.push(mount(c"devpts", c"/dev/pts", plain, c"newinstance,ptmxmode=0666,mode=0620,gid=5"));
    steps.push(mount(c"tmpfs", c"/dev/shm", no_device, c"mode=1777,size=64m"));
    steps.push(Step::Try(Box::new(mount(c"mqueue", c"/dev/mqueue", no_device, c""))));
    steps
}

/// The devices every container has (OCI runtime specification, Linux, default devices).
const DEVICES: [(&CStr, u64, u64); 6] = [
    (c"/dev/null", 1, 3),
    (c"/dev/zero", 1, 5),
    (c"/dev/full", 1, 7),
    (c"/dev/random", 1, 8),
    (c"/dev/urandom", 1, 9),
    (c"/dev/tty", 5, 0),
];

/// The links beside them.
const LINKS: [(&CStr, &CStr); 5] = [
    (c"/dev/fd", c"/proc/self/fd"),
    (c"/dev/stdin", c"/proc/self/fd/0"),
    (c"/dev/stdout", c"/proc/self/fd/1"),
    (c"/dev/stderr", c"/proc/self/fd/2"),
    (c"/dev/ptmx", c"pts/ptmx"),
];

/// Devices and links go into whatever is at /dev. Where that is the image's own directory they may be there,
/// or may not be made; then the image is as it is.
fn default_devices<'a>(surroundings: &Surroundings) -> Vec<Step<'a>> {
    let mounts = &surroundings.mounts;
    let fresh = mounts.is_empty() || mounts.iter().any(|it| it.target.trim_end_matches('/') == "/dev");
    let directory = Step::Try(Box::new(Step::MakeDirectory { path: c"/dev".into(), mode: 0o755 }));
    let devices =
        DEVICES.map(|(path, major, minor)| Step::MakeDevice(Device::open_to_all(path, major, minor)));
    let links = LINKS.map(|(path, target)| Step::Link { target: target.into(), path: path.into() });
    let links = links.map(|step| Step::Try(Box::new(step)));
    let devices = devices.map(|step| if fresh { step } else { Step::Try(Box::new(step)) });
    std::iter::once(directory).filter(|_| !fresh).chain(devices).chain(links).collect()
}

fn device_steps<'a>(device: &mvm_protocol::DeviceNode) -> Result<Vec<Step<'a>>> {
    let target = Target::new(&device.path)?;
    let kind = match device.kind {
        DeviceKind::Char => SFlag::S_IFCHR,
        DeviceKind::Block => SFlag::S_IFBLK,
        DeviceKind::Fifo => SFlag::S_IFIFO,
    };
    let number = |it: u32| if device.kind == DeviceKind::Fifo { 0 } else { u64::from(it) };
    let parents =
        target.parents.into_iter().map(|path| Step::MakeDirectory { path, mode: 0o755 }).collect::<Vec<_>>();
    let made = Step::MakeDevice(Device {
        path: target.path,
        kind,
        major: number(device.major),
        minor: number(device.minor),
        mode: device.mode & 0o7777,
        owner: (Uid::from_raw(device.uid), Gid::from_raw(device.gid)),
    });
    Ok(parents.into_iter().chain([made]).collect())
}

/// The mount of /proc that the first process makes anew, if there is one that can be seen.
pub(crate) fn proc(surroundings: &Surroundings) -> Result<Option<Proc>> {
    let is_proc = |mount: &&ContainerMount| mount.source == ContainerSource::Filesystem("proc".to_owned());
    let (path, mut flags, data) = match surroundings.mounts.iter().rfind(is_proc) {
        Some(mount) => {
            let flags = MsFlags::from_bits_retain(mount.flags) - PROPAGATION;
            (mount.target.as_str(), flags, mount.data.as_str())
        }
        None if surroundings.mounts.is_empty() => {
            ("/proc", MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, "")
        }
        None => return Ok(None),
    };
    let target = Target::new(path)?.path;
    let plain = |path: &String| path.trim_end_matches('/').as_bytes() == target.as_bytes();
    if surroundings.masked_paths.iter().any(plain) {
        return Ok(None);
    }
    if surroundings.read_only_paths.iter().any(plain) {
        flags |= MsFlags::MS_RDONLY;
    }
    let above = outermost_below(&target, surroundings)?;
    Ok(Some(Proc { call: MountCall::of(c"proc", target, flags, &c_string(data)?), above }))
}

/// The places below a mount that have mounts of their own, without those below another such place.
fn outermost_below(target: &CStr, surroundings: &Surroundings) -> Result<Vec<CString>> {
    let below = |path: &CStr, top: &CStr| {
        path.to_bytes().strip_prefix(top.to_bytes()).is_some_and(|rest| rest.starts_with(b"/"))
    };
    let mounts = surroundings.mounts.iter().map(|mount| &mount.target);
    let paths = mounts.chain(&surroundings.read_only_paths).chain(&surroundings.masked_paths);
    let mut found: Vec<CString> = Vec::new();
    for path in paths {
        let path = Target::new(path)?.path;
        let known = found.iter().any(|it| *it == path || below(&path, it));
        if below(&path, target) && !known {
            found.retain(|it| !below(it, &path));
            found.push(path);
        }
    }
    Ok(found)
}

#[cfg(test)]
#[path = "surroundings_tests.rs"]
mod tests;
