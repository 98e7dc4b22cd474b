//! Places for disks of a machine that was saved.

use serde::{Deserialize, Serialize};

use super::manifest::SavedDisk;
use crate::machine::{Disk, Slot};

/// A place for a disk that was saved, with or without one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedSlot {
    /// The guest may not write to what is in it.
    pub read_only: bool,
    /// The serial number of the disk in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
}

impl SavedSlot {
    /// As a machine is started with it.
    pub(crate) fn of(slot: &Slot) -> Self {
        Self { read_only: slot.read_only, serial: slot.disk.as_ref().map(|disk| disk.serial.clone()) }
    }
}

/// Whether what is said to be in each of `slots` is one of `disks`, and in no other.
pub(super) fn are_possible(slots: &[SavedSlot], disks: &[SavedDisk]) -> bool {
    let filled: Vec<_> = slots.iter().filter(|slot| slot.serial.is_some()).collect();
    let possible = |slot: &&SavedSlot| {
        let is_it =
            |disk: &SavedDisk| Some(&disk.serial) == slot.serial.as_ref() && disk.read_only == slot.read_only;
        disks.iter().any(is_it) && filled.iter().filter(|other| other.serial == slot.serial).count() == 1
    };
    filled.iter().all(possible)
}

/// `slots` with those of `disks` in them that were, and the others.
pub(super) fn lay(slots: &[SavedSlot], disks: &[Disk]) -> (Vec<Slot>, Vec<Disk>) {
    let of = |slot: &SavedSlot| {
        let disk = disks.iter().find(|disk| Some(&disk.serial) == slot.serial.as_ref());
        Slot { read_only: slot.read_only, disk: disk.cloned() }
    };
    let is_laid = |disk: &&Disk| slots.iter().any(|slot| slot.serial.as_ref() == Some(&disk.serial));
    (slots.iter().map(of).collect(), disks.iter().filter(|disk| !is_laid(disk)).cloned().collect())
}
