//! Whether a saved CPU can go on here: its model, and what it was told it can do.

use std::arch::x86_64::{__cpuid_count, CpuidResult};

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use mvm_devices::bounded;
use serde::{Deserialize, Serialize};

use super::Error;

/// Leaves of the host's CPUID that tell what KVM can offer. Few: each costs microseconds if the host is a machine
/// itself.
const TELLING: [(u32, u32); 5] = [(1, 0), (7, 0), (7, 1), (0xd, 1), (0x8000_0001, 0)];

/// Words of a guest's CPUID whose bits are features: leaf, index, register (EAX to EDX are 0 to 3).
const FEATURES: [(u32, u32, usize); 13] = [
    (1, 0, 2),
    (1, 0, 3),
    (7, 0, 1),
    (7, 0, 2),
    (7, 0, 3),
    (7, 1, 0),
    (0xd, 0, 0),
    (0xd, 1, 0),
    (0x4000_0001, 0, 0),
    (0x8000_0001, 0, 2),
    (0x8000_0001, 0, 3),
    (0x8000_0008, 0, 1),
    (0x8000_000a, 0, 3),
];

/// Leaf 1, ECX: x2APIC, TSC deadline, XSAVE in use, hypervisor. EDX: more than one processor. The machine or its
/// guest sets these.
const OWN: [(u32, u32, usize, u32); 2] =
    [(1, 0, 2, 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31), (1, 0, 3, 1 << 28)];

/// The host a machine was saved on, as far as it decides where the machine can go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostFacts {
    /// Vendor's name.
    vendor: String,
    /// Family, model and stepping: leaf 1, EAX.
    signature: u32,
    /// What [`TELLING`] leaves say, without what differs between the host's own CPUs.
    #[serde(deserialize_with = "bounded::list::<_, _, { TELLING.len() }>")]
    telling: Vec<[u32; 4]>,
    /// Its kernel, by release and build.
    kernel: String,
}

impl HostFacts {
    /// This host.
    pub(crate) fn here() -> Self {
        let words = |CpuidResult { eax, ebx, ecx, edx }| [eax, ebx, ecx, edx];
        let mut telling: Vec<_> =
            TELLING.iter().map(|(leaf, index)| words(__cpuid_count(*leaf, *index))).collect();
        let mut signature = 0;
        if let Some([eax, ebx, ..]) = telling.first_mut() {
            signature = *eax;
            // The number of the CPU that was asked.
            *ebx &= 0x00ff_ffff;
        }
        let CpuidResult { ebx, ecx, edx, .. } = __cpuid_count(0, 0);
        let vendor = [ebx, edx, ecx].map(u32::to_le_bytes).concat();
        let kernel = nix::sys::utsname::uname().map_or_else(
            |_| String::new(),
            |name| format!("{} {}", name.release().to_string_lossy(), name.version().to_string_lossy()),
        );
        Self { vendor: String::from_utf8_lossy(&vendor).into_owned(), signature, telling, kernel }
    }

    /// Whether KVM offers a guest here all that `self` showed its guest.
    ///
    /// The same CPU under the same kernel does; what another can is asked of `supported`.
    ///
    /// # Errors
    /// The model is another, or a feature is missing: which.
    pub(crate) fn admits(
        &self,
        here: &HostFacts,
        shown: &[kvm_cpuid_entry2],
        supported: impl FnOnce() -> crate::error::Result<CpuId>,
    ) -> crate::error::Result<()> {
        if self == here {
            return Ok(());
        }
        if (&self.vendor, self.signature) != (&here.vendor, here.signature) {
            return Err(Error::CpuModel { saved: self.model(), here: here.model() }.into());
        }
        Ok(compare(shown, supported()?.as_slice())?)
    }

    fn model(&self) -> String {
        let part = |shift: u32, mask: u32| (self.signature >> shift) & mask;
        let (family, model) = (part(8, 0xf), part(4, 0xf));
        // The extended fields count where the short ones are full.
        let long = if matches!(family, 6 | 15) { part(16, 0xf) << 4 } else { 0 };
        let family = if family == 15 { family + part(20, 0xff) } else { family };
        format!("{} family {family} model {} stepping {}", self.vendor, long | model, part(0, 0xf))
    }
}

/// Whether every feature in `shown` is in `supported`.
fn compare(shown: &[kvm_cpuid_entry2], supported: &[kvm_cpuid_entry2]) -> Result<(), Error> {
    for (leaf, index, register) in FEATURES {
        let own = OWN.iter().find(|own| (own.0, own.1, own.2) == (leaf, index, register));
        let ignored = own.map_or(0, |own| own.3);
        let missing = word(shown, leaf, index, register) & !word(supported, leaf, index, register) & !ignored;
        if missing != 0 {
            let register = ["EAX", "EBX", "ECX", "EDX"].get(register).copied().unwrap_or_default();
            return Err(Error::CpuFeatures { leaf, register, missing });
        }
    }
    Ok(())
}

/// A register of a leaf; 0 if there is no such leaf.
fn word(leaves: &[kvm_cpuid_entry2], function: u32, index: u32, register: usize) -> u32 {
    let found = leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index));
    found.and_then(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx].get(register).copied()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error;

    fn leaf(function: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ecx, ..Default::default() }
    }

    fn unasked() -> error::Result<CpuId> {
        panic!("KVM was asked")
    }

    fn offers(ecx: u32) -> error::Result<CpuId> {
        Ok(CpuId::from_entries(&[leaf(1, ecx)]).unwrap())
    }

    #[test]
    fn the_same_host_admits_without_asking() {
        let here = HostFacts::here();
        assert_eq!(here, HostFacts::here());
        assert_eq!(here.vendor.len(), 12);
        here.admits(&HostFacts::here(), &[leaf(1, u32::MAX)], unasked).unwrap();
    }

    #[test]
    fn another_model_is_refused_by_name() {
        let saved = HostFacts { vendor: "GenuineIntel".into(), signature: 0x000a_06f1, ..HostFacts::here() };
        let here = HostFacts { signature: 0x00a2_0f10, vendor: "AuthenticAMD".into(), ..saved.clone() };
        let error = saved.admits(&here, &[], unasked).unwrap_err();
        let because = error::causes(&error).join("; ");
        assert!(because.contains("GenuineIntel family 6 model 175 stepping 1"), "{because}");
        assert!(because.contains("AuthenticAMD family 25 model 33 stepping 0"), "{because}");
    }

    #[test]
    fn under_another_kernel_each_feature_shown_must_be_offered() {
        let here = HostFacts::here();
        let saved = HostFacts { kernel: "another".into(), ..here.clone() };
        saved.admits(&here, &[leaf(1, 0b101 | 1 << 31)], || offers(0b111)).unwrap();
        let error = saved.admits(&here, &[leaf(1, 0b1101)], || offers(0b101)).unwrap_err();
        let because = error::causes(&error).join("; ");
        assert!(because.contains("leaf 0x1, ECX: 0x8"), "{because}");
    }
}
