//! What to tell a person when KVM cannot go on.
#![allow(unsafe_code)] // reading a union that KVM filled

use kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
use kvm_ioctls::VcpuFd;

use crate::exit::Exit;

/// KVM could not enter the guest.
pub(crate) fn entry(reason: u64) -> Exit {
    Exit::InternalError { detail: format!("the CPU refused to enter the guest: reason {reason:#x}") }
}

/// The guest reached memory that KVM could not back.
pub(crate) fn memory(address: u64) -> Exit {
    Exit::InternalError { detail: format!("this host could not provide guest memory at {address:#x}") }
}

/// KVM_EXIT_INTERNAL_ERROR, with the instruction pointer and, where known, a remedy.
pub(crate) fn internal(vcpu: &mut VcpuFd) -> Exit {
    let at =
        vcpu.get_regs().map_or_else(|_| "an unknown address".to_owned(), |regs| format!("{:#x}", regs.rip));
    // SAFETY: KVM fills `internal` on KVM_EXIT_INTERNAL_ERROR, which is why this is called; every bit pattern
    // is a valid value.
    let suberror = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
    let detail = if suberror == KVM_INTERNAL_ERROR_EMULATION {
        format!("KVM_EXIT_INTERNAL_ERROR: KVM could not emulate an instruction at {at}; {}", remedy())
    } else {
        format!("KVM_EXIT_INTERNAL_ERROR: suberror {suberror} at {at}")
    };
    Exit::InternalError { detail }
}

/// Why an instruction had to be emulated at all.
fn remedy() -> &'static str {
    if has_hardware_virtualisation() {
        "this host's KVM met a state it cannot run natively (`mvm doctor` shows its back end)"
    } else {
        "this host's KVM has no hardware virtualisation (back end PVM), which cannot run an unmodified Linux \
         kernel: use a host with VT-x or AMD-V, or the lab (`make lab`)"
    }
}

/// CPUID's own word, because a machine's process can open no file.
fn has_hardware_virtualisation() -> bool {
    use std::arch::x86_64::__cpuid;
    let intel = __cpuid(1).ecx & (1 << 5) != 0;
    let amd = __cpuid(0x8000_0000).eax >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & (1 << 2) != 0;
    intel || amd
}
