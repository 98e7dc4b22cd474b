//! The host's KVM, before there is a machine: what it must have, and what its CPUs can do.
#![allow(unsafe_code)] // handing an inherited descriptor to kvm-ioctls

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use crate::error::{Error, Result};

/// The API version that has been stable since 2007.
const API_VERSION: i32 = 12;
/// Stack of the thread that asks for the CPU's features: the same as a vCPU's, which gets this one's memory.
const STACK_SIZE: usize = 128 * 1024;

/// What this crate cannot do without, with its name for messages.
pub(super) const REQUIRED: [(Cap, &str); 7] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (
        Cap::SplitIrqchip,
        "KVM_CAP_SPLIT_IRQCHIP (local APICs without the rest of a PC's interrupt controllers)",
    ),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM (PCI configuration space without exits)"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::X2ApicApi, "KVM_CAP_X2APIC_API"),
];

/// Takes over `/dev/kvm`, and checks that it is that and can do what is needed.
pub(crate) fn open(kvm: OwnedFd) -> Result<Arc<Kvm>> {
    // SAFETY: `into_raw_fd` gives up ownership of an open descriptor, which `Kvm` takes. If it is not
    // /dev/kvm the version check below fails.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    if kvm.get_api_version() != API_VERSION {
        return Err(Error::KvmLacks("API version 12, or the file passed is not /dev/kvm"));
    }
    match REQUIRED.iter().find(|(capability, _)| !kvm.check_extension(*capability)) {
        Some((_, name)) => Err(Error::KvmLacks(name)),
        None => Ok(Arc::new(kvm)),
    }
}

/// The answer to what a guest's CPUID instruction can be given.
///
/// KVM executes CPUID some seventy times for it, which takes as long as making the machine if the host is a machine
/// itself. So it is asked for on a thread of its own, as early as possible.
#[derive(Debug)]
pub(crate) struct SupportedCpuid(JoinHandle<Result<CpuId, kvm_ioctls::Error>>);

impl SupportedCpuid {
    /// Begins to ask.
    pub(crate) fn ask(kvm: &Arc<Kvm>) -> Result<Self> {
        let kvm = Arc::clone(kvm);
        thread::Builder::new()
            .stack_size(STACK_SIZE)
            .spawn(move || kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))
            .map(Self)
            .map_err(Error::system("start a thread"))
    }

    /// Waits for the answer.
    pub(crate) fn answer(self) -> Result<CpuId> {
        // A panic of the thread has ended the process.
        let answer = self.0.join().unwrap_or_else(|_| Err(kvm_ioctls::Error::new(libc::ECANCELED)));
        answer.map_err(Error::kvm("ask KVM for the CPU's features"))
    }
}
