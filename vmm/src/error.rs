//! What can go wrong while a machine is built, and what a person can do about it.

use std::io;

use crate::boot;
use crate::config::Invalid;
use crate::snapshot;

/// A machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration could not be read.
    #[error("cannot read the configuration from file descriptor 3")]
    ReadConfig(#[source] io::Error),
    /// The configuration is not valid.
    #[error("the configuration is not valid")]
    ParseConfig(#[source] serde_json::Error),
    /// A value of the configuration is not valid.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// A slot of the configuration has no file descriptor, or is named twice.
    #[error("cannot use slot {slot}, named for the {purpose}")]
    Slot {
        /// Its number.
        slot: u32,
        /// What it is for.
        purpose: &'static str,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// Guest memory could not be had.
    #[error("cannot allocate {mib} MiB of guest memory")]
    Memory {
        /// The size asked for.
        mib: u64,
        /// Why not.
        #[source]
        source: mvm_devices::memory::NoMemory,
    },
    /// Memory that is missing cannot be reported.
    #[error("cannot have memory that is elsewhere reported as it is touched (userfaultfd)")]
    Userfault(#[source] io::Error),
    /// Whoever has the memory does not take what it needs to bring it.
    #[error("cannot tell whoever has the memory what to bring")]
    MemorySource(#[source] io::Error),
    /// The kernel could not be loaded.
    #[error("cannot load the kernel")]
    Boot(#[from] boot::Error),
    /// KVM lacks something this machine needs.
    #[error("this host's KVM lacks {0}")]
    KvmLacks(&'static str),
    /// A call to KVM failed.
    #[error("cannot {operation}")]
    Kvm {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A system call failed.
    #[error("cannot {operation}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A device could not be built.
    #[error(transparent)]
    Device(Box<dyn std::error::Error + Send + Sync>),
    /// A device of the configuration could not be attached.
    #[error("cannot attach device {index} of the configuration")]
    Configured {
        /// Its place in the configuration, from 0.
        index: usize,
        /// Why not.
        #[source]
        source: Box<Error>,
    },
    /// The bus has no room for another function.
    #[error("the PCI bus is full: at most {0} functions")]
    BusFull(usize),
    /// The BAR window has no room for another BAR.
    #[error("the PCI window has no room for a BAR of {0} bytes")]
    WindowFull(u64),
    /// A saved machine cannot go on here, or could not be saved.
    #[error("cannot go on from the snapshot")]
    Snapshot(#[from] snapshot::Error),
    /// A virtual CPU cannot be saved where it is.
    #[error("virtual CPU {0} is in the middle of an instruction that does not end")]
    Unfinished(u8),
    /// The guest has machines of its own, whose state KVM keeps apart.
    #[error("the guest uses virtualisation itself, which cannot be saved")]
    Nested,
    /// The machine ended while it was being saved.
    #[error("the machine has ended")]
    Ended,
    /// A second machine in one process.
    #[error("this process has a machine already")]
    SecondMachine,
}

impl Error {
    /// What a person can do about it.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Error::Boot(error) => return error.hint(),
            Error::KvmLacks(_) => {
                "mvm needs Linux 4.20 or newer with KVM; `mvm doctor` shows what this host has"
            }
            Error::Snapshot(error) => error.hint(),
            Error::Configured { source, .. } => return source.hint(),
            Error::Userfault(_) => {
                "it takes Linux 5.10 with CONFIG_USERFAULTFD, and root, access to /dev/userfaultfd (Linux 6.1), or sysctl vm.unprivileged_userfaultfd=1"
            }
            Error::MemorySource(_) => "see what became of whoever listens on that socket",
            Error::Memory { .. } => "give the machine less memory, or free some on this host",
            _ => return None,
        };
        Some(text.to_owned())
    }

    /// Wraps a failed KVM call.
    pub(crate) fn kvm(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
        move |error| Error::Kvm { operation, source: io::Error::from_raw_os_error(error.errno()) }
    }

    /// Wraps a failed system call.
    pub(crate) fn system<E: Into<io::Error>>(operation: &'static str) -> impl Fn(E) -> Error {
        move |error| Error::System { operation, source: error.into() }
    }
}

/// Result of building a machine.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// The texts of `error`'s sources, outermost first.
pub(crate) fn causes(error: &dyn std::error::Error) -> Vec<String> {
    std::iter::successors(error.source(), |error| error.source()).map(ToString::to_string).collect()
}
