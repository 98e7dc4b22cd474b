//! What surrounds a container's processes besides its root file system, and what confines each of them.
//!
//! The host has turned a container's specification into these messages: paths are absolute in the container,
//! options are numbers, a seccomp profile is its program. The agent interprets nothing.

use serde::{Deserialize, Serialize};

use crate::DiskFilesystem;

/// The surroundings of a container, made once, with its root.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Surroundings {
    /// Which name spaces are its own.
    pub namespaces: Namespaces,
    /// Host name in its own UTS name space; ignored in a shared one.
    pub hostname: Option<String>,
    /// NIS domain name in its own UTS name space.
    pub domainname: Option<String>,
    /// Mounts, in order. When there are none the agent makes its defaults: proc, dev, pts, shm, mqueue and
    /// sysfs.
    pub mounts: Vec<ContainerMount>,
    /// Device nodes besides the six every container has.
    pub devices: Vec<DeviceNode>,
    /// Which devices may be used: the last that fits decides, for each kind of access; what none fits is denied,
    /// but for the six devices every container has and its terminals. Empty allows those that exist.
    pub device_rules: Vec<DeviceRule>,
    /// Disks whose nodes it gets, and may use.
    pub disks: Vec<DiskNode>,
    /// Paths that read as empty.
    pub masked_paths: Vec<String>,
    /// Paths that cannot be written.
    pub read_only_paths: Vec<String>,
    /// The root file system cannot be written once everything is mounted in it.
    pub read_only_root: bool,
    /// Propagation of the root mount: `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED` or `MS_UNBINDABLE`, perhaps with
    /// `MS_REC`; 0 is recursively private.
    pub root_propagation: u64,
    /// Kernel parameters, `net.core.somaxconn` and its value.
    pub sysctls: Vec<(String, String)>,
    /// What its cgroup may use.
    pub limits: Limits,
}

/// Which name spaces a container has of its own. The mount name space always is its own, the network and user
/// name spaces always are the guest's; that of processes is chosen by each, see [`crate::PidNamespace`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespaces {
    /// System V IPC and POSIX message queues.
    pub ipc: Namespace,
    /// Host name.
    pub uts: Namespace,
    /// The view of cgroups.
    pub cgroup: Namespace,
}

/// Whose name space a container lives in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Namespace {
    /// The guest's, shared by all its containers that say so.
    #[default]
    Guest,
    /// Its own.
    Own,
    /// That of another container root, by id.
    Of(String),
}

/// One mount of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerMount {
    /// What is mounted.
    pub source: ContainerSource,
    /// Where in the container, absolute; made if it is missing, never through a link out of the root.
    pub target: String,
    /// `MS_*` of mount(2), without propagation.
    pub flags: u64,
    /// `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED`, `MS_UNBINDABLE`, perhaps with `MS_REC`; 0 leaves it.
    pub propagation: u64,
    /// Options of the file system.
    pub data: String,
}

/// What a container's mount shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerSource {
    /// A file system without a device: `proc`, `tmpfs`, `devpts`, `mqueue`, `sysfs`, `cgroup2`.
    Filesystem(String),
    /// A file or directory below `/run/mvm/` of the agent's name space, by its path from there, put there by
    /// [`crate::Request::Put`].
    Shared(String),
    /// A path of the container itself.
    Inside(String),
    /// The file system on a disk of this virtio serial.
    Disk {
        /// The disk's virtio serial.
        serial: String,
        /// What is on it.
        filesystem: DiskFilesystem,
    },
}

/// A device node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceNode {
    /// Where in the container.
    pub path: String,
    /// Which kind.
    pub kind: DeviceKind,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Kinds of device nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// Named pipe.
    Fifo,
}

/// The node of a disk, whose numbers only the guest knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskNode {
    /// Where in the container.
    pub path: String,
    /// The disk's virtio serial.
    pub serial: String,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// One rule about the use of devices (cgroup v2 device program).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRule {
    /// Allow or deny.
    pub allow: bool,
    /// Which kind; `None` is all.
    pub kind: Option<DeviceKind>,
    /// Major number; `None` is all.
    pub major: Option<u32>,
    /// Minor number; `None` is all.
    pub minor: Option<u32>,
    /// Any of `r`, `w`, `m`.
    pub access: String,
}

/// What a container's cgroup may use: files of cgroup v2 and the text to write, in order, such as
/// `("memory.max", "67108864")`. The host has translated them; the agent refuses names with a `/`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// File and text.
    pub files: Vec<(String, String)>,
}

/// What confines one process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// Its capabilities; `None` keeps all.
    pub capabilities: Option<Capabilities>,
    /// Executing a program gives no privilege.
    pub no_new_privileges: bool,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// File mode creation mask; `None` is 0o022.
    pub umask: Option<u32>,
    /// A seccomp filter: `struct sock_filter` in the guest's byte order, eight bytes each. Empty is none.
    pub seccomp: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_TSYNC`, `_LOG`, `_SPEC_ALLOW`; those that give a listener are refused.
    pub seccomp_flags: u64,
    /// I/O priority as ioprio_set(2) takes it.
    pub io_priority: Option<u32>,
    /// Scheduling policy, nice value and priority.
    pub scheduler: Option<Scheduler>,
}

/// Capability sets, a bit for each capability's number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Bounding set.
    pub bounding: u64,
    /// Effective set.
    pub effective: u64,
    /// Inheritable set.
    pub inheritable: u64,
    /// Permitted set.
    pub permitted: u64,
    /// Ambient set.
    pub ambient: u64,
}

/// One resource limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// `RLIMIT_*`.
    pub resource: u32,
    /// Soft limit.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// How a process is scheduled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduler {
    /// `SCHED_*`.
    pub policy: u32,
    /// Nice value.
    pub nice: i32,
    /// Real-time priority.
    pub priority: u32,
}

/// Files given to the guest: copied volumes, and files copied into a running container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Put {
    /// Where the paths of `entries` begin.
    pub place: Place,
    /// What is made there, in order.
    pub entries: Vec<PutEntry>,
}

/// A tree that files are put into or taken from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// `/run/mvm/NAME` of the agent's name space, which [`ContainerSource::Shared`] names.
    Shared(String),
    /// A container, by its root's id, as its processes see it.
    Root(String),
}

/// One file, directory or link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PutEntry {
    /// Relative to the place, without `..`; empty is the place itself.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// What it is.
    pub content: PutContent,
}

/// The content of what is put.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PutContent {
    /// A directory.
    Directory,
    /// Part of a file. The first part begins a new file under another name; the last one gives it its name, so
    /// that a reader sees the old or the new file, never half of one.
    File {
        /// Where the part begins.
        offset: u64,
        /// Its bytes.
        bytes: Vec<u8>,
        /// There are no more.
        last: bool,
    },
    /// A symbolic link.
    Link(String),
    /// Whatever is there goes away, directories with all in them.
    Remove,
}

/// A part of a file, or a directory's list, to be read from the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Get {
    /// Where the path begins.
    pub place: Place,
    /// Relative to the place.
    pub path: String,
    /// Where to begin, in a file's bytes or a directory's entries.
    pub offset: u64,
}

/// What [`crate::Request::Get`] found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Got {
    /// `st_mode`, type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size of a file in bytes.
    pub size: u64,
    /// Part of it.
    pub content: GotContent,
}

/// Content by type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GotContent {
    /// Bytes of a file from the offset; empty at its end.
    File(Vec<u8>),
    /// Names in a directory from the offset; empty at its end.
    Directory(Vec<String>),
    /// Target of a link.
    Link(String),
    /// Something else, which has no content.
    Other,
}

/// The use of a container's resources: text of cgroup v2 files, as far as the kernel has them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootStats {
    /// File name and its text, such as `memory.stat`; each at most [`crate::limits::MAX_STAT_TEXT`] bytes.
    pub files: Vec<(String, String)>,
    /// Process numbers in the guest's first PID name space.
    pub pids: Vec<u32>,
}
