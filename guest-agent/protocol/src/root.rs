//! File systems: mounts of the agent's own and the root of a container.

use serde::{Deserialize, Serialize};

use crate::Surroundings;

/// One mount in the agent's name space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// What is mounted.
    pub source: MountSource,
    /// Where: an absolute path below `/run/mvm/`, made if it is missing.
    pub target: String,
    /// Refuse writes.
    pub read_only: bool,
}

/// What a mount shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountSource {
    /// The file system on a disk.
    Disk {
        /// The disk's virtio serial, at most 20 bytes (virtio 1.2 §5.2.6.1).
        serial: String,
        /// What is on it.
        filesystem: DiskFilesystem,
    },
    /// A fresh tmpfs.
    Tmpfs {
        /// Most it may hold, in bytes; 0 is the kernel's default of half the memory.
        size: u64,
    },
    /// Directories laid over one another.
    Overlay {
        /// Read-only directories, the topmost first.
        lower: Vec<String>,
        /// Where changes go, and the directory the file system works in beside it.
        upper: Option<(String, String)>,
    },
}

/// A file system that lives on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskFilesystem {
    /// Read-only image of a layer or a whole root.
    Erofs,
    /// A writable disk.
    Ext4,
}

/// A container's root file system and mount name space, under an id that [`crate::Start`] names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetupRoot {
    /// 1 to 64 letters, digits, `-`, `_`, `.`; it does not begin with a dot.
    pub id: String,
    /// Read-only layers, the topmost first: at least one, but none below [`Writable::Whole`].
    pub lower: Vec<Lower>,
    /// Where the container's writes go.
    pub writable: Writable,
    /// What surrounds its processes.
    pub surroundings: Surroundings,
}

/// One read-only layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lower {
    /// The file system on a disk.
    Disk {
        /// The disk's virtio serial.
        serial: String,
        /// What is on it.
        filesystem: DiskFilesystem,
    },
    /// A directory of the agent's name space.
    Directory(String),
}

/// Where a container's writes go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Writable {
    /// Nowhere: the root is read-only.
    No,
    /// Into memory.
    Tmpfs {
        /// Most they may take, in bytes; 0 is the kernel's default of half the memory.
        size: u64,
    },
    /// Onto an ext4 disk, in directories `upper` and `work` of it.
    Disk {
        /// The disk's virtio serial.
        serial: String,
    },
    /// Onto an ext4 disk that is the root itself, as block snapshotters make them; nothing lies below it.
    Whole {
        /// The disk's virtio serial.
        serial: String,
    },
}
