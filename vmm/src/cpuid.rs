//! The CPUID a virtual CPU shows: what KVM offers, corrected for this machine's topology and clock.
//!
//! One socket, one core per virtual CPU, one thread per core; APIC identifiers are 0, 1, …

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::error::{Error, Result};

/// Leaf 1, ECX: x2APIC.
const X2APIC: u32 = 1 << 21;
/// Leaf 1, ECX: the local APIC's timer has a deadline mode. Without it Linux calibrates for 200 ms.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, ECX: MONITOR and MWAIT, which would keep a host CPU busy.
const MONITOR: u32 = 1 << 3;
/// Leaf 1, EDX: leaf 1, EBX counts logical processors.
const HTT: u32 = 1 << 28;
/// Leaf 6, EAX: the local APIC's timer runs in every idle state.
const ARAT: u32 = 1 << 2;
/// Leaf 0x80000001, ECX: the logical processors of a socket are cores.
const CMP_LEGACY: u32 = 1 << 1;
/// First leaf of KVM's own.
const KVM_BASE: u32 = 0x4000_0000;
/// Leaf that gives a guest the frequencies of TSC and local APIC, in kHz.
const KVM_TIMING: u32 = 0x4000_0010;
/// Frequency of KVM's local APIC bus, in kHz.
const APIC_KHZ: u32 = 1_000_000;

/// What the corrections depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Topology {
    /// Virtual CPUs.
    pub cpus: u8,
    /// Frequency of the TSC in kHz, 0 if KVM does not say.
    pub tsc_khz: u32,
    /// Whether the local APIC's timer has a deadline mode.
    pub tsc_deadline: bool,
}

/// CPUID of virtual CPU `id`, from what KVM supports.
pub(crate) fn for_vcpu(supported: &CpuId, topology: Topology, id: u8) -> Result<CpuId> {
    let mut leaves = Leaves(supported.as_slice().to_vec());
    leaves.complete(topology);
    for leaf in &mut leaves.0 {
        correct(leaf, topology, id);
    }
    CpuId::from_entries(&leaves.0).map_err(|_| Error::KvmLacks("room for the CPU's features"))
}

struct Leaves(Vec<kvm_cpuid_entry2>);

impl Leaves {
    /// Adds the leaves this machine needs and KVM left out.
    fn complete(&mut self, topology: Topology) {
        self.0.retain(|leaf| !matches!(leaf.function, 0xb | 0x1f));
        let extended = self.0.iter().any(|leaf| leaf.function == 0 && leaf.eax >= 0x1f);
        for function in if extended { &[0xb, 0x1f][..] } else { &[0xb] } {
            for index in 0..2 {
                self.0.push(indexed(*function, index));
            }
        }
        if topology.tsc_khz != 0 && self.0.iter().any(|leaf| leaf.function == KVM_BASE) {
            self.0.retain(|leaf| leaf.function != KVM_TIMING);
            let timing = kvm_cpuid_entry2 {
                function: KVM_TIMING,
                eax: topology.tsc_khz,
                ebx: APIC_KHZ,
                ..Default::default()
            };
            self.0.push(timing);
        }
    }
}

fn indexed(function: u32, index: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, index, flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX, ..Default::default() }
}

fn correct(leaf: &mut kvm_cpuid_entry2, topology: Topology, id: u8) {
    let cpus = u32::from(topology.cpus);
    let id = u32::from(id);
    match leaf.function {
        0 => leaf.eax = leaf.eax.max(0xb),
        1 => {
            leaf.ebx = (leaf.ebx & 0xff00) | (cpus << 16) | (id << 24);
            leaf.ecx = (leaf.ecx | X2APIC | HYPERVISOR) & !MONITOR;
            set(&mut leaf.ecx, TSC_DEADLINE, topology.tsc_deadline);
            set(&mut leaf.edx, HTT, cpus > 1);
        }
        4 if leaf.eax & 0x1f != 0 => {
            leaf.eax = (leaf.eax & 0x3fff) | (sharers(leaf.eax, cpus) << 14) | ((cpus - 1) << 26);
        }
        6 => leaf.eax |= ARAT,
        0xb | 0x1f => correct_topology(leaf, cpus, id),
        KVM_BASE if topology.tsc_khz != 0 => leaf.eax = leaf.eax.max(KVM_TIMING),
        0x8000_0001 => leaf.ecx &= if cpus > 1 { u32::MAX } else { !CMP_LEGACY },
        0x8000_0008 => leaf.ecx = (leaf.ecx & !0xf0ff) | (cpus - 1) | (id_bits(cpus) << 12),
        0x8000_001d if leaf.eax & 0x1f != 0 => {
            leaf.eax = (leaf.eax & 0x3fff) | (sharers(leaf.eax, cpus) << 14);
        }
        0x8000_001e => {
            leaf.eax = id;
            leaf.ebx = id; // core identifier; one thread per core
            leaf.ecx = 0; // one node
        }
        _ => {}
    }
}

/// Leaves 0xb and 0x1f: level 0 is the thread, level 1 the core.
fn correct_topology(leaf: &mut kvm_cpuid_entry2, cpus: u32, id: u32) {
    let (shift, count, kind) = match leaf.index {
        0 => (0, 1, 1),
        1 => (id_bits(cpus), cpus, 2),
        _ => (0, 0, 0),
    };
    leaf.eax = shift;
    leaf.ebx = count;
    leaf.ecx = leaf.index | (kind << 8);
    leaf.edx = id;
}

/// Bits that tell `cpus` processors apart.
fn id_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

/// Processors that share a cache, less one: all of them from level 3 on.
fn sharers(eax: u32, cpus: u32) -> u32 {
    let level = (eax >> 5) & 0x7;
    if level >= 3 { cpus - 1 } else { 0 }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ..Default::default() }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|leaf| leaf.function == function && leaf.index == index).unwrap()
    }

    fn shown(cpus: u8, id: u8) -> CpuId {
        let entries = [0, 1, 6, 0x8000_0008].map(|function| entry(function, 7));
        let supported =
            CpuId::from_entries(&[&entries[..], &[entry(KVM_BASE, KVM_BASE + 1)]].concat()).unwrap();
        for_vcpu(&supported, Topology { cpus, tsc_khz: 3_000_000, tsc_deadline: true }, id).unwrap()
    }

    #[test]
    fn the_guest_never_has_to_calibrate() {
        let cpuid = shown(1, 0);
        assert_ne!(find(&cpuid, 1, 0).ecx & TSC_DEADLINE, 0);
        assert_ne!(find(&cpuid, 6, 0).eax & ARAT, 0);
        assert_eq!(find(&cpuid, KVM_BASE, 0).eax, KVM_TIMING);
        assert_eq!(find(&cpuid, KVM_TIMING, 0).eax, 3_000_000);
    }

    #[test]
    fn all_topology_leaves_agree() {
        for cpus in 1..=32u8 {
            for id in 0..cpus {
                let cpuid = shown(cpus, id);
                let one = find(&cpuid, 1, 0);
                assert_eq!((one.ebx >> 24, (one.ebx >> 16) & 0xff), (id.into(), cpus.into()));
                let core = find(&cpuid, 0xb, 1);
                assert_eq!((core.edx, core.ebx), (id.into(), cpus.into()));
                assert!(u32::from(id) >> core.eax == 0, "one socket");
                assert_eq!(find(&cpuid, 0xb, 0).ebx, 1);
                assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx & 0xff, u32::from(cpus) - 1);
            }
        }
    }

    #[test]
    fn the_basic_range_reaches_the_topology_leaf() {
        assert_eq!(find(&shown(1, 0), 0, 0).eax, 0xb);
    }
}
