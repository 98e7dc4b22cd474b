//! Numbers of the requests that ioctl(2) is made with: those of KVM, of taps, and of sockets.

use kvm_bindings::{
    KVMIO, kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_device_attr, kvm_ioeventfd, kvm_lapic_state,
    kvm_mp_state, kvm_msi, kvm_msr_list, kvm_msrs, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

pub(super) use libc::{FIONBIO, TUNGETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ};

const WRITE: u64 = 1 << 30;
const READ: u64 = 2 << 30;

/// A request of KVM's that moves a `T` in `direction`.
const fn kvm<T>(direction: u64, number: u64) -> u64 {
    direction | (size_of::<T>() as u64) << 16 | (KVMIO as u64) << 8 | number
}

pub(super) const KVM_GET_MSR_INDEX_LIST: u64 = kvm::<kvm_msr_list>(READ | WRITE, 0x02);
pub(super) const KVM_CHECK_EXTENSION: u64 = kvm::<()>(0, 0x03);
pub(super) const KVM_SET_USER_MEMORY_REGION: u64 = kvm::<kvm_userspace_memory_region>(WRITE, 0x46);
pub(super) const KVM_IOEVENTFD: u64 = kvm::<kvm_ioeventfd>(WRITE, 0x79);
pub(super) const KVM_GET_CLOCK: u64 = kvm::<kvm_clock_data>(READ, 0x7c);
pub(super) const KVM_RUN: u64 = kvm::<()>(0, 0x80);
pub(super) const KVM_GET_REGS: u64 = kvm::<kvm_regs>(READ, 0x81);
pub(super) const KVM_GET_SREGS: u64 = kvm::<kvm_sregs>(READ, 0x83);
pub(super) const KVM_GET_MSRS: u64 = kvm::<kvm_msrs>(READ | WRITE, 0x88);
pub(super) const KVM_GET_LAPIC: u64 = kvm::<kvm_lapic_state>(READ, 0x8e);
pub(super) const KVM_GET_CPUID2: u64 = kvm::<kvm_cpuid2>(READ | WRITE, 0x91);
pub(super) const KVM_GET_MP_STATE: u64 = kvm::<kvm_mp_state>(READ, 0x98);
pub(super) const KVM_GET_VCPU_EVENTS: u64 = kvm::<kvm_vcpu_events>(READ, 0x9f);
pub(super) const KVM_GET_DEBUGREGS: u64 = kvm::<kvm_debugregs>(READ, 0xa1);
pub(super) const KVM_GET_TSC_KHZ: u64 = kvm::<()>(0, 0xa3);
pub(super) const KVM_GET_XSAVE: u64 = kvm::<kvm_xsave>(READ, 0xa4);
pub(super) const KVM_SIGNAL_MSI: u64 = kvm::<kvm_msi>(WRITE, 0xa5);
pub(super) const KVM_GET_XCRS: u64 = kvm::<kvm_xcrs>(READ, 0xa6);
pub(super) const KVM_KVMCLOCK_CTRL: u64 = kvm::<()>(0, 0xad);
pub(super) const KVM_GET_XSAVE2: u64 = kvm::<kvm_xsave>(READ, 0xcf);
pub(super) const KVM_GET_DEVICE_ATTR: u64 = kvm::<kvm_device_attr>(WRITE, 0xe2);
