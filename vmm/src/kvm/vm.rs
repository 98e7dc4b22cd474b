//! One machine in KVM: memory first, then local APICs, then CPUs. There is no PIC, IOAPIC or PIT.
//!
//! The order matters: on recent hosts a memory slot may wait a clock tick or two for a grace period, a first one set
//! before anything else least likely. So RAM comes first, and what can wait comes when the guest runs.
#![allow(unsafe_code)] // handing memory to KVM

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_MEM_READONLY, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use mvm_devices::memory::{GuestMemoryBackend, GuestMemoryRegion, Memory};

use crate::ecam::Ecam;
use crate::error::{Error, Result};
use crate::layout;

/// A virtual machine in KVM.
#[derive(Debug)]
pub(crate) struct Vm {
    kvm: Arc<Kvm>,
    fd: Arc<VmFd>,
    memory: Arc<Memory>,
}

impl Vm {
    /// Makes a machine that has `memory`.
    pub(crate) fn new(kvm: Arc<Kvm>, memory: Memory) -> Result<Self> {
        let fd = Arc::new(kvm.create_vm().map_err(Error::kvm("create a virtual machine"))?);
        let vm = Self { kvm, fd, memory: Arc::new(memory) };
        vm.add_memory()?;
        vm.add_local_apics()?;
        Ok(vm)
    }

    /// The machine's descriptor, for interrupts and events.
    pub(crate) fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// The machine's memory.
    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Whether the local APIC's timer has a deadline mode.
    pub(crate) fn has_tsc_deadline_timer(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// Makes virtual CPU `id`.
    pub(crate) fn create_vcpu(&self, id: u8) -> Result<VcpuFd> {
        self.fd.create_vcpu(id.into()).map_err(Error::kvm("create a virtual CPU"))
    }

    fn add_memory(&self) -> Result<()> {
        let tss = usize::try_from(layout::KVM_TSS).unwrap_or(usize::MAX);
        self.fd.set_tss_address(tss).map_err(Error::kvm("place the TSS"))?;
        let regions = self.memory.iter().map(|region| kvm_userspace_memory_region {
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            ..Default::default()
        });
        for (slot, region) in (0..).zip(regions) {
            self.set_slot(kvm_userspace_memory_region { slot, ..region })?;
        }
        Ok(())
    }

    /// Lets the guest read PCI configuration space without exits.
    ///
    /// To be called when the guest runs: until then its reads exit and are answered by the bus, and the grace
    /// period that a further slot may wait for delays nobody.
    pub(crate) fn add_config_space(&self, ecam: &Ecam) -> Result<()> {
        let slot = u32::try_from(self.memory.num_regions()).unwrap_or(u32::MAX);
        self.set_slot(kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: layout::ECAM,
            memory_size: layout::ECAM_SIZE,
            userspace_addr: ecam.host_address(),
        })
    }

    fn set_slot(&self, region: kvm_userspace_memory_region) -> Result<()> {
        // SAFETY: the range is either a region of `self.memory`, which lives as long as `self` and is
        // only accessed volatilely, or the configuration space, which is static and read-only to the guest.
        let set = unsafe { self.fd.set_user_memory_region(region) };
        set.map_err(Error::kvm("give KVM the guest's memory"))
    }

    /// Local APICs in the kernel and nothing else: no pins, so no IOAPIC routes to serve.
    fn add_local_apics(&self) -> Result<()> {
        let split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        self.fd.enable_cap(&split).map_err(Error::kvm("create local APICs"))?;
        let mut x2apic = kvm_enable_cap { cap: KVM_CAP_X2APIC_API, ..Default::default() };
        x2apic.args[0] = u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK);
        self.fd.enable_cap(&x2apic).map_err(Error::kvm("use 32-bit APIC identifiers"))
    }
}
