//! What is on record of a snapshot, and whether a machine can go on from it here.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use mvm_devices::virtio::DeviceSpec;
use mvm_devices::virtio::mem::STEP_MIB;
use mvm_devices::virtio::net::MacAddress;
use mvm_protocol::limits::MAX_ID;
use mvm_protocol::{VERSION as PROTOCOL, Version};
use mvm_vmm::config::{MachineId, MemSize, VcpuCount};
use mvm_vmm::launch::find_program;
use serde::{Deserialize, Serialize};

use super::slots::{SavedSlot, are_possible, lay};
use crate::agent::StdioSpec;
use crate::catalog::Format;
use crate::digest::{of_program, sha256};
use crate::failure::{Context, Failure};
use crate::machine::{Disk, Slot, Snapshot};
use crate::owner::Job;
use crate::template::processor;

/// The version of manifests that this build writes and reads.
pub const VERSION: u32 = 1;
/// Those that are read.
const FORMAT: Format = Format {
    what: "snapshots",
    version: VERSION,
    max_bytes: 4 << 20,
    help: Some("restore it with the mvm that saved it"),
};
/// Most disks and cards: places on a machine's bus.
const MAX_DEVICES: usize = 32;
/// CPUs and devices.
const STATE: &str = "state";
/// RAM.
const MEMORY: &str = "memory";

/// What a snapshot is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`VERSION`].
    pub version: u32,
    /// Its name.
    pub name: MachineId,
    /// When it was made, in seconds since the Unix epoch.
    pub created: u64,
    /// The container it is of.
    pub container: Of,
    /// The processor and the host's kernel it ran on.
    pub processor: String,
    /// SHA-256 of the program that was the machine.
    pub vmm_sha256: String,
    /// What ran.
    pub run: SavedRun,
}

/// A container by its names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Of {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
}

/// A snapshot whose memory is below another's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Its name.
    pub name: MachineId,
    /// What its state says is in it: no other snapshot's says the same.
    pub contents: String,
}

/// The same with its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseMemory {
    /// Which it is.
    pub base: Base,
    /// The file.
    pub file: PathBuf,
}

/// A container and the machine around it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedRun {
    /// What the container was run of.
    pub job: Job,
    /// Its first process, by the number its agent knows.
    pub process: u64,
    /// Its machine.
    pub machine: SavedMachine,
}

/// A machine that was saved with a container in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMachine {
    /// Virtual CPUs.
    pub cpus: VcpuCount,
    /// RAM.
    pub memory_mib: MemSize,
    /// What it could be given beyond that, if it ever was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub growth: Option<SavedGrowth>,
    /// What its state says is in it.
    pub contents: String,
    /// Disks and cards had been plugged into it.
    pub plugged: bool,
    /// Its places for disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub slots: Vec<SavedSlot>,
    /// What it has besides disks, cards and the vsock.
    pub devices: Vec<DeviceSpec>,
    /// Hardware addresses of its cards, in order.
    pub cards: Vec<MacAddress>,
    /// Its disks, in order.
    pub disks: Vec<SavedDisk>,
    /// The container's name in the guest.
    pub root: String,
    /// What the agent in it speaks.
    pub protocol: Version,
    /// The agent's version.
    pub agent_version: String,
    /// Release of the guest's kernel, as the agent said it.
    pub kernel_release: String,
    /// Bytes of RAM that are in the file; the rest of it is holes.
    pub memory_bytes: u64,
    /// The snapshot whose memory has the rest, if this one's is not whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
    /// Bytes of the state.
    pub state_bytes: u64,
    /// How long the machine was held, in milliseconds.
    pub held_ms: u64,
}

/// Memory beyond RAM of a machine that was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedGrowth {
    /// MiB that could be plugged at most.
    pub most_mib: u64,
    /// MiB of these that its guest could touch: as much is in the file of its memory.
    pub usable_mib: u64,
}

/// A disk that was saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedDisk {
    /// By which the guest finds it.
    pub serial: String,
    /// The guest may not write.
    pub read_only: bool,
    /// Its length in bytes.
    pub bytes: u64,
}

/// A machine that is to go on.
#[derive(Clone, Debug)]
pub struct Going {
    /// What was saved.
    pub machine: SavedMachine,
    /// CPUs, devices and RAM.
    pub snapshot: Snapshot,
    /// Its disks, in order.
    pub disks: Vec<Disk>,
    /// The container's first process.
    pub process: u64,
    /// The streams of that, to be opened anew.
    pub stdio: StdioSpec,
    /// The name of the container's host, if it is another than before.
    pub hostname: Option<String>,
    /// Where it is recorded which of its memory the machine needs until the container's processes run, if it is.
    pub record: Option<PathBuf>,
}

/// The file of a machine's state in a snapshot's directory.
pub(crate) fn state_file(directory: &Path) -> PathBuf {
    directory.join(STATE)
}

/// The file of its RAM.
pub(crate) fn memory_file(directory: &Path) -> PathBuf {
    directory.join(MEMORY)
}

/// The file of its disk of this number.
pub(crate) fn disk_file(directory: &Path, number: usize) -> PathBuf {
    directory.join(format!("disk-{number}"))
}

impl Manifest {
    /// Reads one.
    ///
    /// # Errors
    /// It is not there, too long, not understood, of another version, or says what cannot be.
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let manifest: Self = FORMAT.read(path)?;
        manifest.run.machine.check().context(|| format!("cannot read {}", path.display()))?;
        Ok(manifest)
    }

    /// Whether a machine can go on from it on this host, as far as can be told without trying. `known_program` is where the
    /// digest of the machine's program is on record.
    ///
    /// # Errors
    /// What does not fit, and the way out.
    pub(super) fn check_host(&self, known_program: &Path) -> Result<(), Failure> {
        let failed = || format!("cannot restore snapshot {}", self.name);
        let (processor, vmm) = here(Some(known_program))?;
        self.fits(&processor, &vmm).map_err(|why| Failure::because(failed(), why))
    }

    fn fits(&self, processor: &str, vmm_sha256: &str) -> Result<(), Failure> {
        let ran = Ran { processor: &self.processor, vmm_sha256: &self.vmm_sha256 };
        ran.fits(self.run.machine.protocol, &Ran { processor, vmm_sha256 })
    }
}

/// This host's processor, and the SHA-256 of the program that is its machines, which may be on record at `known`.
pub(super) fn here(known: Option<&Path>) -> Result<(String, String), Failure> {
    let processor = processor().context(|| "cannot tell the host's processor".to_owned())?;
    let program = find_program().context(|| "cannot find the machine's program".to_owned())?;
    let vmm = known.map_or_else(|| sha256(&program), |record| of_program(&program, record));
    let vmm = vmm.context(|| format!("cannot digest {}", program.display()))?;
    Ok((processor, vmm))
}

/// What a machine ran on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ran<'a> {
    /// The processor and the host's kernel.
    pub(super) processor: &'a str,
    /// SHA-256 of the program that was the machine.
    pub(super) vmm_sha256: &'a str,
}

impl Ran<'_> {
    /// Whether a machine that ran on this, with an agent of this protocol, can go on `here`.
    pub(super) fn fits(&self, protocol: Version, here: &Ran<'_>) -> Result<(), Failure> {
        if self.processor != here.processor {
            let (saved, here) = (self.processor, here.processor);
            return Err(Failure::new(format!("it ran on {saved}, and this host is {here}")).help(
                "restore it on a host of the same processor, microcode and kernel, or run the image anew",
            ));
        }
        if self.vmm_sha256 != here.vmm_sha256 {
            return Err(Failure::new("another mvm-vmm saved it than the one installed here").help(
                "restore it with the mvm that saved it (MVM_VMM names a program), or run the image anew",
            ));
        }
        let Version { major, minor } = protocol;
        if major != PROTOCOL.major || minor > PROTOCOL.minor {
            let here = format!("{}.{}", PROTOCOL.major, PROTOCOL.minor);
            return Err(Failure::new(format!("its agent speaks protocol {major}.{minor}, this mvm {here}"))
                .help("restore it with the mvm that saved it, or run the image anew"));
        }
        Ok(())
    }
}

impl SavedMachine {
    /// Whether it can be what a machine was.
    pub(super) fn check(&self) -> Result<(), Failure> {
        let wrong = |what: &str| Err(Failure::new(format!("it makes no sense: {what}")));
        if self.disks.len() > MAX_DEVICES || self.cards.len() > MAX_DEVICES {
            return wrong("more devices than a machine has");
        }
        if !self.devices.iter().all(|device| matches!(device, DeviceSpec::Balloon(_) | DeviceSpec::Rng(_))) {
            return wrong("a device that needs a file of the host");
        }
        let room = MemSize::MAX_MIB.saturating_sub(self.memory_mib.mib());
        if self.growth.is_some_and(|it| {
            it.most_mib > room || !it.most_mib.is_multiple_of(STEP_MIB) || it.usable_mib > it.most_mib
        }) {
            return wrong("more memory than a machine can have");
        }
        if self.disks.iter().filter(|disk| !disk.read_only).count() > 1 {
            return wrong("several disks that are written");
        }
        if self.slots.len() > MAX_DEVICES || !are_possible(&self.slots, &self.disks) {
            return wrong("a place for a disk that it does not have");
        }
        if self.disks.iter().any(|disk| disk.serial.len() > 20) {
            return wrong("a serial number that no disk has");
        }
        // It is a name on the host as well, where no path may be made of it.
        let leads_out = self.root.contains('/') || self.root.starts_with('.');
        if self.root.is_empty() || self.root.len() > MAX_ID || leads_out {
            return wrong("a container of an impossible name");
        }
        Ok(())
    }

    /// Its places for disks with those of `disks` in them that were, and the others.
    pub(crate) fn lay(&self, disks: &[Disk]) -> (Vec<Slot>, Vec<Disk>) {
        lay(&self.slots, disks)
    }

    /// What the machine goes on from, once all of it is there: its disk of writes is at `writes` by then. A layer that
    /// still is the image at `cached` is called so: it has that name for longer than the snapshot may.
    ///
    /// # Errors
    /// A file is missing or is not what was saved.
    pub(super) fn files(
        &self,
        directory: &Path,
        base: Option<PathBuf>,
        (writes, cached): (&Path, &Path),
    ) -> Result<(Snapshot, Vec<Disk>), Failure> {
        let (state, memory) = (state_file(directory), memory_file(directory));
        check_file(&state, self.state_bytes)?;
        let mut disks = Vec::with_capacity(self.disks.len());
        for (number, SavedDisk { serial, read_only, bytes }) in self.disks.iter().enumerate() {
            let saved = disk_file(directory, number);
            check_file(&saved, *bytes)?;
            let path = match read_only {
                false => writes.to_owned(),
                true if is_same(&saved, cached) => cached.to_owned(),
                true => saved,
            };
            disks.push(Disk { path, read_only: *read_only, serial: serial.clone(), throwaway: false });
        }
        Ok((
            Snapshot {
                state,
                memory,
                source: None,
                base,
                working_set: None,
                contents: self.contents.clone(),
            },
            disks,
        ))
    }

    /// Bytes of memory that are in its file, zeroes or not.
    pub(super) fn bytes(&self) -> u64 {
        let usable_mib = self.growth.map_or(0, |growth| growth.usable_mib);
        self.memory_mib.mib().saturating_add(usable_mib).saturating_mul(1 << 20)
    }

    /// The number of the disk that the container's writes are on.
    pub(super) fn written(&self) -> Option<usize> {
        self.disks.iter().position(|disk| !disk.read_only)
    }
}

/// Whether two paths lead to one file.
fn is_same(one: &Path, other: &Path) -> bool {
    let place = |path: &Path| fs::metadata(path).ok().map(|it| (it.dev(), it.ino()));
    place(one).is_some_and(|one| place(other) == Some(one))
}

/// A regular file, of this length unless that is 0.
pub(super) fn check_file(path: &Path, bytes: u64) -> Result<(), Failure> {
    let facts = fs::symlink_metadata(path).context(|| format!("cannot look at {}", path.display()))?;
    if !facts.is_file() {
        return Err(Failure::new(format!("{} is no file", path.display())));
    }
    if bytes != 0 && facts.len() != bytes {
        let (path, there) = (path.display(), facts.len());
        return Err(Failure::new(format!("{path} has {there} bytes, and {bytes} were saved"))
            .help("the snapshot is damaged: remove it, and make another"));
    }
    Ok(())
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
pub(super) mod tests;
