//! One machine in KVM: memory first, then local APICs, then CPUs. There is no PIC, IOAPIC or PIT.
//!
//! The order matters: on recent hosts a memory slot may wait a clock tick or two for a grace period, a first one set
//! before anything else least likely. So RAM comes first, and what can wait comes when the guest runs.
#![allow(unsafe_code)] // handing memory to KVM

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use mvm_devices::memory::{GuestMemoryBackend, GuestMemoryRegion, Memory};

use crate::ecam::Ecam;
use crate::error::{Error, Result};
use crate::{layout, memory};

/// A virtual machine in KVM.
#[derive(Debug)]
pub(crate) struct Vm {
    kvm: Arc<Kvm>,
    fd: Arc<VmFd>,
    memory: Arc<Memory>,
    /// Number of the next memory slot, after those of regions and of the configuration space.
    next_slot: AtomicU32,
}

impl Vm {
    /// Makes a machine that has `memory`.
    pub(crate) fn new(kvm: Arc<Kvm>, memory: Memory) -> Result<Self> {
        let fd = Arc::new(kvm.create_vm().map_err(Error::kvm("create a virtual machine"))?);
        let next_slot = AtomicU32::new(config_space_slot(&memory).saturating_add(1));
        let vm = Self { kvm, fd, memory: Arc::new(memory), next_slot };
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

    /// Makes virtual CPU `id`, whose TSC runs as the host's does.
    ///
    /// KVM gives it the frequency that the host knew when KVM was loaded. Linux measures its TSC once more about a
    /// second after it has started. Where that came later, and the first measurement was more than 250 ppm short, KVM
    /// on a host without scaling of the TSC finds its own default unfit and leaves the ratio of both counters at 0:
    /// it takes the deadlines of the guest's timers for as far ahead as the host is up. 0 asks for what is known now.
    pub(crate) fn create_vcpu(&self, id: u8) -> Result<VcpuFd> {
        let fd = self.fd.create_vcpu(id.into()).map_err(Error::kvm("create a virtual CPU"))?;
        if let Err(error) = fd.set_tsc_khz(0) {
            log::debug!("virtual CPU {id} keeps the TSC frequency KVM gave it: {error}");
        }
        Ok(fd)
    }

    /// Model-specific registers that are part of a virtual CPU's state.
    pub(crate) fn registers(&self) -> Result<Vec<u32>> {
        let list = self.kvm.get_msr_index_list().map_err(Error::kvm("list model-specific registers"))?;
        Ok(list.as_slice().to_vec())
    }

    /// Bytes of a virtual CPU's extended state; 0 if KVM does not say.
    pub(crate) fn extended_state(&self) -> usize {
        usize::try_from(self.fd.check_extension_int(Cap::Xsave2)).unwrap_or(0)
    }

    /// What this KVM can show its guests' CPUs.
    pub(crate) fn supported_cpuid(&self) -> Result<CpuId> {
        let supported = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        supported.map_err(Error::kvm("ask KVM for the CPU's features"))
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
        // None for a region of which nothing is shown yet.
        for (slot, region) in (0..).zip(regions).filter(|(_, region)| region.memory_size > 0) {
            self.set_slot(kvm_userspace_memory_region { slot, ..region })?;
        }
        Ok(())
    }

    /// Shows the guest the first `bytes` of the last region, if that is more than before. Nobody else may do so at
    /// the same time.
    pub(crate) fn show(&self, bytes: u64) -> Result<()> {
        let Some(region) = self.memory.iter().last() else { return Ok(()) };
        let (shown, bytes) = (region.len(), bytes.min(region.mapped()));
        if bytes <= shown {
            return Ok(());
        }
        memory::open(region, bytes).map_err(Error::system("open pluggable memory"))?;
        self.set_slot(kvm_userspace_memory_region {
            slot: self.next_slot.fetch_add(1, Ordering::Relaxed),
            guest_phys_addr: region.start_addr().0.saturating_add(shown),
            memory_size: bytes - shown,
            userspace_addr: (region.as_ptr() as u64).saturating_add(shown),
            ..Default::default()
        })?;
        region.show(bytes);
        Ok(())
    }

    /// Lets the guest read PCI configuration space without exits.
    ///
    /// Until then its reads exit and are answered by the bus. A further slot waits for a grace period. Where a guest
    /// boots it delays nobody once the guest runs; one that goes on may be preempted in the middle of a fault, and
    /// there are many: on a host with a single CPU the wait then takes all of the time up to its next tick.
    pub(crate) fn add_config_space(&self, ecam: &Ecam) -> Result<()> {
        let slot = config_space_slot(&self.memory);
        self.set_slot(kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: layout::ECAM,
            memory_size: layout::ECAM_SIZE,
            userspace_addr: ecam.host_address(),
        })
    }

    fn set_slot(&self, region: kvm_userspace_memory_region) -> Result<()> {
        // SAFETY: the range is either a region of `self.memory`, or part of one, which lives as long as `self` and is
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

/// The slot after those of the regions.
fn config_space_slot(memory: &Memory) -> u32 {
    u32::try_from(memory.num_regions()).unwrap_or(u32::MAX)
}
