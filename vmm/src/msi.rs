//! Message-signalled interrupts into KVM.
//!
//! A message is injected by KVM_SIGNAL_MSI rather than by an eventfd with a route: a route table must be
//! replaced, behind a grace period, each time the guest masks or moves a vector, and a driver does so several
//! times per vector while it starts. Delivering costs one system call either way.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use mvm_devices::pci::{Msi, MsiSink};

/// The vectors of one function.
#[derive(Debug)]
pub(crate) struct KvmMsi {
    vm: Arc<VmFd>,
    /// Written by vCPUs when the guest programs the table, read by I/O loops; never held across a call but the
    /// injection itself.
    vectors: Vec<Mutex<Option<Msi>>>,
}

impl KvmMsi {
    /// `count` vectors, all masked.
    pub(crate) fn new(vm: Arc<VmFd>, count: u16) -> Self {
        Self { vm, vectors: (0..count).map(|_| Mutex::new(None)).collect() }
    }
}

impl MsiSink for KvmMsi {
    fn route(&self, vector: u16, msi: Option<Msi>) {
        if let Some(slot) = self.vectors.get(usize::from(vector)) {
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = msi;
        }
    }

    fn signal(&self, vector: u16) {
        let Some(slot) = self.vectors.get(usize::from(vector)) else { return };
        let Some(msi) = *slot.lock().unwrap_or_else(PoisonError::into_inner) else { return };
        let [a, b, c, d, e, f, g, h] = msi.address.to_le_bytes();
        let message = kvm_msi {
            address_lo: u32::from_le_bytes([a, b, c, d]),
            address_hi: u32::from_le_bytes([e, f, g, h]),
            data: msi.data,
            ..Default::default()
        };
        // A message that names no CPU is the guest's own doing and is lost, as on a real bus.
        if let Err(error) = self.vm.signal_msi(message) {
            log::warn!("the guest's interrupt message {msi:x?} was not delivered: {error}");
        }
    }
}
