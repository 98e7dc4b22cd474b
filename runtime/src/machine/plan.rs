//! What is asked of a machine, in terms of the host's files: the step before anything is opened.

use std::path::PathBuf;
use std::str::FromStr;

use mvm_devices::throttle::Limit;
use mvm_devices::virtio::DeviceSpec;
use mvm_vmm::config::{MachineId, MemSize, VcpuCount};

use super::source::MemorySource;
use crate::net::Netns;
pub use crate::net::{Net, OpenTap, TapNet};

/// A machine to be started.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its name.
    pub id: MachineId,
    /// Virtual CPUs.
    pub cpus: VcpuCount,
    /// RAM.
    pub memory: MemSize,
    /// MiB beyond that which it can be given while it runs.
    pub pluggable_mib: u64,
    /// MiB that a device can plug which is there from the beginning, behind all else on the bus: a machine that goes on
    /// has it if it had it.
    pub plugs_mib: Option<u64>,
    /// What it starts from.
    pub origin: Origin,
    /// Disks, in the order the guest finds them.
    pub disks: Vec<Disk>,
    /// Places for disks behind all that every machine of its kind has.
    pub slots: Vec<Slot>,
    /// Network interfaces.
    pub nets: Vec<Net>,
    /// Network name space the machine's process lives in, and in which taps are opened by name; this process's
    /// unless given.
    pub netns: Option<Netns>,
    /// The terminal, if one is connected.
    pub console: Option<ConsoleKind>,
    /// Whether there is a vsock device; an agent needs one.
    pub vsock: bool,
    /// Further devices, as configured.
    pub devices: Vec<DeviceSpec>,
    /// Cards, and disks after them, come behind all else on the bus, as in a machine that they were plugged into.
    pub plugged: bool,
    /// Directory for the machine's sockets.
    pub sockets: Option<PathBuf>,
    /// How fast it may use its disks and its network; `None` if it is never to be limited.
    pub limits: Option<Vec<Limit>>,
}

/// What a machine starts from.
#[derive(Clone, Debug)]
pub enum Origin {
    /// It boots.
    Kernel(Kernel),
    /// It goes on. CPUs, memory and kinds of devices must be what was saved.
    Saved(Snapshot),
}

/// A kernel, and what it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its image.
    pub image: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub cmdline: String,
}

/// A saved machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The file of its CPUs and devices.
    pub state: PathBuf,
    /// The file of its RAM.
    pub memory: PathBuf,
    /// Whoever has its RAM instead of that file, which then need not be there.
    pub source: Option<MemorySource>,
    /// The file of the RAM that this is changes to, if it is not whole.
    pub base: Option<PathBuf>,
    /// The file of the pages that are brought in before it goes on, if any are.
    pub working_set: Option<PathBuf>,
    /// What must be in it, as given when it was made.
    pub contents: String,
}

impl Plan {
    /// A machine of the default size that has a vsock and nothing else.
    pub fn new(id: MachineId, origin: Origin) -> Self {
        Self {
            id,
            cpus: VcpuCount::default(),
            memory: MemSize::default(),
            pluggable_mib: 0,
            plugs_mib: None,
            origin,
            disks: Vec::new(),
            slots: Vec::new(),
            nets: Vec::new(),
            netns: None,
            console: None,
            vsock: true,
            devices: Vec::new(),
            plugged: false,
            sockets: None,
            limits: None,
        }
    }
}

/// Which device carries the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConsoleKind {
    /// virtio console, `hvc0`.
    Virtio,
    /// First serial port, `ttyS0`.
    Serial,
}

impl ConsoleKind {
    /// The guest's name of the terminal.
    pub fn terminal(self) -> &'static str {
        match self {
            Self::Virtio => "hvc0",
            Self::Serial => "ttyS0",
        }
    }
}

/// A disk image or block device, raw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The file.
    pub path: PathBuf,
    /// The guest may not write.
    pub read_only: bool,
    /// By which the guest finds it; at most 20 bytes.
    pub serial: String,
    /// Its content need not survive the host: flushes are skipped.
    pub throwaway: bool,
}

/// A place for a disk, on the bus whether there is a disk in it or not. A machine that goes on may have another disk in it
/// than the one that was saved, or one where there was none: its driver is told of the new size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The guest may not write to what is in it.
    pub read_only: bool,
    /// What is in it.
    pub disk: Option<Disk>,
}

impl Slot {
    /// One without a disk.
    pub fn empty(read_only: bool) -> Self {
        Self { read_only, disk: None }
    }

    /// Puts each of `disks` into the first of `slots` that is for such a disk and has none; those that find none.
    pub fn fill(slots: &mut [Self], disks: &[Disk]) -> Vec<Disk> {
        let mut others = Vec::new();
        for disk in disks {
            // What a flush is worth is agreed upon with a driver when it is started.
            let fits = |slot: &&mut Self| slot.read_only == disk.read_only && slot.disk.is_none();
            match slots.iter_mut().find(fits).filter(|_| !disk.throwaway) {
                Some(slot) => slot.disk = Some(disk.clone()),
                None => others.push(disk.clone()),
            }
        }
        others
    }
}

/// Text that names no disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a disk: PATH[,ro][,serial=NAME], the name of at most 20 letters, digits, - or _")]
pub struct NotADisk(String);

impl FromStr for Disk {
    type Err = NotADisk;

    fn from_str(text: &str) -> Result<Self, NotADisk> {
        let wrong = || NotADisk(text.to_owned());
        let mut parts = text.split(',');
        let path = parts.next().filter(|path| !path.is_empty()).ok_or_else(wrong)?;
        let mut disk = Self { path: path.into(), read_only: false, serial: String::new(), throwaway: false };
        for part in parts {
            match part.split_once('=') {
                None if part == "ro" => disk.read_only = true,
                Some(("serial", name)) if is_serial(name) => disk.serial = name.to_owned(),
                _ => return Err(wrong()),
            }
        }
        Ok(disk)
    }
}

fn is_serial(name: &str) -> bool {
    let fits = (1..=20).contains(&name.len());
    fits && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_path_with_options() {
        let disk: Disk = "/a/b.img,ro,serial=root".parse().unwrap();
        assert_eq!(
            (disk.path.to_str().unwrap(), disk.read_only, disk.serial.as_str()),
            ("/a/b.img", true, "root")
        );
        assert!(!"x.img".parse::<Disk>().unwrap().read_only);
    }

    #[test]
    fn disks_go_into_slots_of_their_kind_and_what_finds_none_is_left() {
        let disk = |text: &str| text.parse::<Disk>().unwrap();
        let throwaway = Disk { throwaway: true, ..disk("t") };
        let disks = [throwaway.clone(), disk("a,ro"), disk("b,ro"), disk("c"), disk("d")];
        let mut slots = [Slot::empty(false), Slot::empty(true), Slot::empty(true)];
        let others = Slot::fill(&mut slots, &disks);
        assert_eq!(others, [throwaway, disk("d")]);
        assert_eq!(slots.map(|slot| slot.disk), [Some(disk("c")), Some(disk("a,ro")), Some(disk("b,ro"))]);
    }

    #[test]
    fn unknown_options_and_bad_serials_are_refused() {
        for text in ["", ",ro", "a,rw", "a,serial=", "a,serial=has space", "a,serial=123456789012345678901"] {
            assert!(text.parse::<Disk>().is_err(), "{text}");
        }
    }
}
