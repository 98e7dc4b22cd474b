//! Snapshots: a container's machine that was saved while it ran, with its disks, to go on from there later.
//!
//! Below the state directory:
//!
//! ```text
//! snapshots/<name>/manifest.json what it is; written last
//! snapshots/<name>/state         CPUs and devices
//! snapshots/<name>/memory        RAM, with holes, or what of it differs from that of a base
//! snapshots/<name>/working-set   which of the RAM is needed first, once somebody wanted to know
//! snapshots/<name>/disk-<n>      disks in the order the machine has them; layers are links to the cached images
//! snapshots/.new-*               one being made, locked by its maker
//! ```
//!
//! A snapshot appears whole, by a rename, and may be removed while machines live that were made of it, but not while
//! others have it as their base. A base is whole itself: no more than two files make a memory. It may come
//! from anywhere: what is read of it is bounded and checked, and no path in it is followed but those above.
//!
//! What an engine keeps of a container is a checkpoint: the same in a directory of the engine's, packed, and without
//! the layers of the image.

mod checkpoint;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod make;
mod manifest;
mod packed;
mod slots;
mod store;

#[cfg(test)]
pub(crate) use checkpoint::tests::checkpoint_of;
pub(crate) use checkpoint::{Checkpoint, Opened, Piece};
pub use make::make;
pub use manifest::{
    Base, BaseMemory, Going, Manifest, Of, SavedDisk, SavedGrowth, SavedMachine, SavedRun, VERSION,
};
pub(crate) use manifest::{disk_file, memory_file, state_file};
pub use slots::SavedSlot;
pub use store::{Entry, Memory, Snapshots};
