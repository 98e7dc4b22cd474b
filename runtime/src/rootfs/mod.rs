//! A container's root file system becomes disks.
//!
//! What an engine's snapshotter hands out are mounts of the host. [`prepare`] turns them into disks of the machine
//! and into what the agent is told to make of these: read-only layers as EROFS images, and one ext4 disk that takes
//! the writes. Directories are converted; block files, devices and images that are there already go straight through.
//!
//! Nothing is mounted on the host, and nothing of a snapshot is changed but for the disk of writes that is laid
//! beside it, so that whoever removes the snapshot removes the writes too.

mod layers;
mod mounts;
mod serial;
mod template;
mod upper;

use std::path::{Path, PathBuf};

use mvm_protocol::{Lower, Writable};

use crate::failure::Failure;
use crate::image::{Progress, Rootfs};
use crate::machine::Disk;
use crate::sandbox::RootfsMount;

pub use layers::{CACHE_BYTES, cache};
pub use mounts::upper_disk;
use mounts::{Layer, Parts, Writes};
use serial::Serials;
pub(crate) use upper::copy_sparse;

/// Most layers of a container that become a disk each, unless [`Request::layer_disks`] says otherwise; more are
/// merged into one. Layers of their own are shared by images, but a machine's bus has 32 places for all disks of all
/// its containers, and each disk takes time at boot.
pub const LAYER_DISKS: usize = 4;

/// Size of the disk that takes a container's writes, in bytes. It is sparse: it costs what is written.
pub const UPPER_BYTES: u64 = 8 << 30;

/// What a view's mount points may take, in bytes: they are made in memory.
const VIEW_BYTES: u64 = 16 << 20;

/// A container's root file system as its engine describes it.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The container's id. Serials of its disks are made from it, so that no two containers share one.
    pub container: &'a str,
    /// What the snapshotter gave; empty if `root` is to be used.
    pub mounts: &'a [RootfsMount],
    /// The bundle's own root directory, absolute.
    pub root: Option<&'a Path>,
    /// Where writes go, if the snapshotter has no disk for them.
    pub upper: Upper,
    /// A directory that lives as long as the container does: what cannot be shared is built there.
    pub directory: &'a Path,
    /// Most layers that become a disk each, at least 1.
    pub layer_disks: usize,
}

/// Where a container's writes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upper {
    /// Onto a disk of this size in bytes, kept with the snapshot: a container that is made of the same snapshot
    /// again finds them.
    Disk {
        /// Its size in bytes; [`UPPER_BYTES`] is the usual one. One that is there keeps the size it has.
        bytes: u64,
    },
    /// Into the guest's memory, gone with the container.
    Memory {
        /// Most they may take in bytes, 0 for half the guest's memory.
        bytes: u64,
    },
    /// Nowhere: the root is read-only from the start, and mount points that are missing cannot be made.
    Nowhere,
}

impl Default for Upper {
    fn default() -> Self {
        Self::Disk { bytes: UPPER_BYTES }
    }
}

/// A root file system in terms of a machine. To be kept while the container lives: shared images are not removed
/// from the cache as long as it is.
#[derive(Debug)]
pub struct Prepared {
    /// Disks to attach.
    pub disks: Vec<Disk>,
    /// What the agent lays the root over, the topmost first.
    pub lower: Vec<Lower>,
    /// Where the agent puts writes.
    pub writable: Writable,
    /// The snapshotter gave a view, or a mount that cannot be written: the container's root must be made read-only
    /// ([`mvm_protocol::Surroundings::read_only_root`]) even if its specification does not ask for it.
    pub read_only: bool,
    /// Images from the cache.
    #[expect(dead_code, reason = "held for their locks")]
    held: Vec<Rootfs>,
}

impl Prepared {
    /// That of a container that goes on: its disks are there, and the guest knows what they are.
    pub(crate) fn of(disks: Vec<Disk>) -> Self {
        let (lower, held) = (Vec::new(), Vec::new());
        Self { disks, lower, writable: Writable::No, read_only: false, held }
    }
}

/// Turns a container's root file system into disks; `state` is [`crate::container::state_dir`].
///
/// # Errors
/// Mounts that cannot be understood, or an image that cannot be made.
pub fn prepare(
    request: &Request<'_>,
    state: &Path,
    progress: &mut dyn Progress,
) -> Result<Prepared, Failure> {
    let Parts { mut layers, writes } = match (request.mounts, request.root) {
        ([], Some(root)) => {
            Parts { layers: vec![Layer::Root(root.to_owned())], writes: Writes::For(root.to_owned()) }
        }
        (mounts, _) => mounts::understand(mounts)?,
    };
    if layers.is_empty() && !matches!(writes, Writes::Whole(_)) {
        layers.push(layers::empty(request.directory)?);
    }
    let mut serials = Serials::of(request.container);
    let laid = layers::lay(layers, request, state, &mut serials, progress)?;
    let read_only = writes == Writes::View;
    let (disk, writable) = writing(writes, request.upper, state, &mut serials)?;
    let mut disks = laid.disks;
    disks.extend(disk);
    Ok(Prepared { disks, lower: laid.lower, writable, read_only, held: laid.held })
}

/// Where the agent puts writes, and the disk for them if they go to one.
fn writing(
    writes: Writes,
    upper: Upper,
    state: &Path,
    serials: &mut Serials,
) -> Result<(Option<Disk>, Writable), Failure> {
    let path = match (writes, upper) {
        (Writes::Whole(path), _) => {
            layers::check(&path)?;
            let disk = writable_disk(path, serials);
            let serial = disk.serial.clone();
            return Ok((Some(disk), Writable::Whole { serial }));
        }
        (Writes::Disk(path, size), _) => {
            if let Some(bytes) = size {
                upper::disk(&path, bytes, state)?;
            }
            layers::check(&path)?;
            path
        }
        (_, Upper::Nowhere) => return Ok((None, Writable::No)),
        (_, Upper::Memory { bytes }) => return Ok((None, Writable::Tmpfs { size: bytes })),
        (Writes::View, Upper::Disk { .. }) => return Ok((None, Writable::Tmpfs { size: VIEW_BYTES })),
        (Writes::Beside(path), Upper::Disk { bytes }) => {
            upper::disk(&path, bytes, state)?;
            path
        }
        (Writes::For(directory), Upper::Disk { bytes }) => upper::disk_for(&directory, bytes, state)?,
    };
    let disk = writable_disk(path, serials);
    let serial = disk.serial.clone();
    Ok((Some(disk), Writable::Disk { serial }))
}

fn writable_disk(path: PathBuf, serials: &mut Serials) -> Disk {
    Disk { path, read_only: false, serial: serials.next(), throwaway: false }
}
