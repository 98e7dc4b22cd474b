//! A machine that is saved, and goes on elsewhere.
//!
//! A snapshot is two files. The state holds CPUs, devices and what must be the same where the machine goes on; it is
//! read as if it came from an enemy. The memory holds the RAM at the offsets the regions have one after another, with
//! holes for pages of zeroes, and a page at its end that names the state it belongs to. It is mapped privately, so
//! that any number of machines share what they do not write, and nothing of it is read beforehand. Above another
//! snapshot's memory, its base, it may have the pages alone that differ from that.
//!
//! What is behind devices is not saved: connections, frames and keystrokes under way are lost as on a host that
//! crashed, and guests are told of it where virtio has a way to.

pub(crate) mod base;
mod changes;
mod format;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub(crate) mod host;
mod huge;
pub(crate) mod pages;
pub(crate) mod source;
#[cfg(test)]
mod tests;
mod tsc;
pub(crate) mod vcpu;
mod working;

use std::fs::File;
use std::io;

use mvm_devices::virtio::DeviceState;
use mvm_devices::{bounded, serial};
use serde::{Deserialize, Serialize};

use crate::config::{MachineConfig, VcpuCount};
use crate::pci_bus::MAX_DEVICES;
use crate::pci_bus::saved::SavedFunction;
use host::HostFacts;
pub use huge::gather;
use vcpu::VcpuState;
pub(crate) use working::WorkingSet;
pub use working::{Needed, Recorded, record};

/// Most bytes of the text that says what is in a machine.
pub const MAX_CONTENTS: usize = 1024;

/// Most virtual CPUs, as a saved list counts.
const VCPUS: usize = VcpuCount::MAX as usize;

/// Names a snapshot: what its two files have in common.
pub(crate) type SnapshotId = [u8; 16];

/// A machine could not be saved, or a saved one cannot go on here.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("cannot {operation}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The state has another magic.
    #[error("the state is no saved machine")]
    NotASnapshot,
    /// The state has another format.
    #[error("the state has format {found}, and this program reads format {known}")]
    Format {
        /// The state's.
        found: u32,
        /// This program's.
        known: u32,
    },
    /// The state is not as it was written.
    #[error("the state is damaged: {0}")]
    Damaged(&'static str),
    /// The state cannot be understood.
    #[error("the state is damaged")]
    Decode(#[source] postcard::Error),
    /// The state cannot be written.
    #[error("cannot write the state")]
    Encode(#[source] postcard::Error),
    /// The state is larger than what is read again.
    #[error("the state has {0} bytes, and at most {max} are read again", max = format::MAX_BYTES)]
    TooLarge(usize),
    /// The state says something impossible.
    #[error("the state makes no sense: {0}")]
    Nonsense(&'static str),
    /// Another version of this program saved it.
    #[error("mvm-vmm {saved} saved it, and this is {here}")]
    Program {
        /// Who saved it.
        saved: String,
        /// This program.
        here: &'static str,
    },
    /// Something else is in it.
    #[error("in it is {saved:?}, and {wanted:?} is wanted")]
    Contents {
        /// What is in it.
        saved: String,
        /// What the configuration says.
        wanted: String,
    },
    /// The text that says what is in it is too long.
    #[error("the contents are described in {0} bytes, and at most {MAX_CONTENTS} are accepted")]
    LongContents(usize),
    /// The machine's size is another.
    #[error("it has {saved_cpus} CPUs and {saved_mib} MiB, and {cpus} CPUs and {mib} MiB are wanted")]
    Size {
        /// Saved CPUs.
        saved_cpus: usize,
        /// Saved memory.
        saved_mib: u64,
        /// Configured CPUs.
        cpus: u8,
        /// Configured memory.
        mib: u64,
    },
    /// Less can be plugged than is.
    #[error("{saved_mib} MiB could be plugged into it so far, and at most {mib} are configured")]
    Pluggable {
        /// What could be plugged so far.
        saved_mib: u64,
        /// Configured at most.
        mib: u64,
    },
    /// The CPU is another.
    #[error("it ran on {saved}, and this host's CPU is {here}")]
    CpuModel {
        /// Its CPU.
        saved: String,
        /// This host's.
        here: String,
    },
    /// The CPU has less, or KVM offers less of it.
    #[error(
        "its CPU has features that KVM does not offer here (CPUID leaf {leaf:#x}, {register}: {missing:#x})"
    )]
    CpuFeatures {
        /// CPUID's leaf.
        leaf: u32,
        /// The register in it.
        register: &'static str,
        /// The bits.
        missing: u32,
    },
    /// The clock is another, and this CPU cannot scale it.
    #[error("its time stamp counter runs at {saved} kHz, this host's at {here} kHz and cannot be scaled")]
    TscFrequency {
        /// Its frequency.
        saved: u32,
        /// This host's.
        here: u32,
    },
    /// KVM refuses a register's value.
    #[error("KVM does not take {value:#x} for register {index:#x}")]
    Register {
        /// The model-specific register.
        index: u32,
        /// Its saved value.
        value: u64,
    },
    /// The memory is not of this machine.
    #[error("the memory does not fit the state: {0}")]
    Memory(&'static str),
    /// The memory is changes to another's than this.
    #[error("the base does not fit the memory: {0}")]
    Base(&'static str),
    /// The pages that are to be brought in beforehand are not this snapshot's, or cannot be recorded.
    #[error("the working set is of no use: {0}")]
    WorkingSet(&'static str),
    /// There are more or fewer devices.
    #[error("it has {saved} devices, and {configured} are configured")]
    DeviceCount {
        /// Saved.
        saved: usize,
        /// Configured.
        configured: usize,
    },
    /// A device is of another kind.
    #[error("its device {place} is a {saved}, and a {configured} is configured for it")]
    DeviceKind {
        /// The device's number.
        place: u8,
        /// Saved.
        saved: String,
        /// Configured.
        configured: &'static str,
    },
    /// A device does not take its state.
    #[error("cannot restore device {place}, a {kind}")]
    Device {
        /// The device's number.
        place: u8,
        /// What it is.
        kind: &'static str,
        /// Why not.
        #[source]
        source: mvm_devices::transport::TransportError,
    },
    /// One has a serial port and the other does not.
    #[error("a serial port must be there before and after, or neither")]
    SerialPort,
}

impl Error {
    /// The same of the file that is the base.
    fn of_base(self) -> Self {
        match self {
            Self::Memory(_) => Self::Base("it is no whole memory of the same size"),
            other => other,
        }
    }

    /// What a person can do about it.
    pub(crate) fn hint(&self) -> &'static str {
        match self {
            Error::Format { .. } | Error::Program { .. } => {
                "go on with the mvm-vmm that saved it, or boot the machine and save it again with this one"
            }
            Error::Contents { .. } => "boot the machine instead, and save one with what is wanted in it",
            Error::Size { .. } => {
                "configure as many CPUs and as much memory as it has, or boot the machine instead"
            }
            Error::Pluggable { .. } => {
                "configure the device `mem` as it was saved, or boot the machine instead"
            }
            Error::CpuModel { .. }
            | Error::CpuFeatures { .. }
            | Error::TscFrequency { .. }
            | Error::Register { .. } => {
                "go on on a host like the one it ran on, or boot the machine and save it again here"
            }
            Error::Memory(_) => "give the two files that were saved together",
            Error::Base(_) => "give the memory of the snapshot that was the base when it was saved",
            Error::DeviceCount { .. }
            | Error::DeviceKind { .. }
            | Error::Device { .. }
            | Error::SerialPort => {
                "configure the devices it was saved with, in the order of their places; others can be attached once it runs"
            }
            Error::WorkingSet(_) => {
                "remove the file `working-set` beside the saved memory, and it is recorded anew"
            }
            Error::LongContents(_) => "describe the contents by a digest",
            Error::File { .. }
            | Error::NotASnapshot
            | Error::Damaged(_)
            | Error::Decode(_)
            | Error::Encode(_)
            | Error::TooLarge(_)
            | Error::Nonsense(_) => "boot the machine instead, and save it again here",
        }
    }
}

/// Everything of a machine but its RAM.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MachineState {
    /// Its name, which its memory's last page has as well.
    pub id: SnapshotId,
    /// Version of the program that saved it.
    pub program: String,
    /// What is in it, in the words of whoever had it saved.
    pub contents: String,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Where it ran.
    pub host: HostFacts,
    /// By number.
    #[serde(deserialize_with = "bounded::list::<_, _, VCPUS>")]
    pub vcpus: Vec<VcpuState>,
    /// The virtio functions on its bus, by place.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_DEVICES>")]
    pub functions: Vec<SavedFunction>,
    /// The serial port, if it has one.
    pub serial: Option<serial::State>,
}

impl MachineState {
    /// The version of this program, as it stands in a state.
    pub(crate) const PROGRAM: &str = env!("CARGO_PKG_VERSION");

    /// Replaces what is in `file`. Returns how many bytes it has.
    pub(crate) fn write(&self, file: &File) -> Result<u64, Error> {
        format::write(file, self)
    }

    /// The state in `file`, if it is one that the machine of `config` can go on from, as far as that can be told
    /// without KVM.
    pub(crate) fn read(file: &File, config: &MachineConfig, contents: &str) -> Result<Self, Error> {
        let state: Self = format::read(file)?;
        if state.program != Self::PROGRAM {
            return Err(Error::Program { saved: state.program, here: Self::PROGRAM });
        }
        if state.contents != contents {
            return Err(Error::Contents { saved: state.contents, wanted: contents.to_owned() });
        }
        let (cpus, mib) = (config.cpus.get(), config.memory.mib());
        if state.vcpus.len() != usize::from(cpus) || state.memory_mib != mib {
            let (saved_cpus, saved_mib) = (state.vcpus.len(), state.memory_mib);
            return Err(Error::Size { saved_cpus, saved_mib, cpus, mib });
        }
        let pluggable = config.pluggable().unwrap_or(0);
        if state.shown() > pluggable {
            return Err(Error::Pluggable { saved_mib: state.shown() >> 20, mib: pluggable >> 20 });
        }
        if state.functions.len() != config.devices.len() {
            let (saved, configured) = (state.functions.len(), config.devices.len());
            return Err(Error::DeviceCount { saved, configured });
        }
        if state.serial.is_some() != config.serial.is_some() {
            return Err(Error::SerialPort);
        }
        Ok(state)
    }
}

impl MachineState {
    /// Bytes that the guest may have plugged, by its device's own word.
    pub(crate) fn shown(&self) -> u64 {
        let mut devices = self.functions.iter().map(|function| function.state.device());
        devices
            .find_map(|device| match device {
                DeviceState::Mem(mem) => Some(mem.usable),
                _ => None,
            })
            .unwrap_or(0)
    }
}

/// A vCPU's number as an index.
pub(crate) fn number(id: usize) -> u8 {
    u8::try_from(id).unwrap_or(VcpuCount::MAX)
}
