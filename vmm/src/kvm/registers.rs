//! The state in which the first virtual CPU enters the guest.

use kvm_bindings::{Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use crate::boot::Entry;
use crate::error::{Error, Result};
use crate::layout;

/// Protected mode, extension type, numeric errors.
const CR0: u64 = 1 | 1 << 4 | 1 << 5;
/// Paging.
const CR0_PG: u64 = 1 << 31;
/// Physical address extension.
const CR4_PAE: u64 = 1 << 5;
/// Long mode enabled and active.
const EFER_LONG: u64 = 1 << 8 | 1 << 10;
/// The one bit of RFLAGS that is always set.
const RFLAGS: u64 = 2;
/// Fast string operations.
const MSR_MISC_ENABLE: u32 = 0x1a0;
/// Memory type range registers: the default type, and that they are on. Off, Linux disables PAT.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;

/// Sets model-specific registers, the same on every virtual CPU.
pub(crate) fn set_msrs(vcpu: &VcpuFd) -> Result<()> {
    let entries = [(MSR_MISC_ENABLE, 1), (MSR_MTRR_DEF_TYPE, MTRR_ON_WRITE_BACK)]
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).map_err(|_| Error::KvmLacks("room for two registers"))?;
    let set = vcpu.set_msrs(&msrs).map_err(Error::kvm("set model-specific registers"))?;
    if set == entries.len() { Ok(()) } else { Err(Error::KvmLacks("MSR_MISC_ENABLE or MSR_MTRR_DEF_TYPE")) }
}

/// Points the first virtual CPU at `entry`. The others wait for INIT and SIPI in KVM.
pub(crate) fn set_entry(vcpu: &VcpuFd, entry: Entry) -> Result<()> {
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("read special registers"))?;
    let (code, data, regs) = match entry {
        Entry::Long { rip } => {
            sregs.cr0 = CR0 | CR0_PG;
            sregs.cr3 = layout::PML4;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LONG;
            sregs.gdt = kvm_dtable { base: layout::GDT, limit: 5 * 8 - 1, ..Default::default() };
            (segment(0x10, 0xb, true), segment(0x18, 0x3, false), long_registers(rip))
        }
        Entry::Protected { eip } => {
            sregs.cr0 = CR0;
            let code = kvm_segment { l: 0, db: 1, ..segment(0x10, 0xb, true) };
            (code, segment(0x18, 0x3, false), protected_registers(eip))
        }
    };
    sregs.cs = code;
    for register in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *register = data;
    }
    sregs.tr = kvm_segment { s: 0, g: 0, db: 0, limit: 0x67, ..segment(0x20, 0xb, false) };
    vcpu.set_sregs(&sregs).map_err(Error::kvm("set special registers"))?;
    vcpu.set_regs(&regs).map_err(Error::kvm("set registers"))
}

fn long_registers(rip: u64) -> kvm_regs {
    kvm_regs { rip, rsi: layout::BOOT_PARAMS, rflags: RFLAGS, ..Default::default() }
}

fn protected_registers(eip: u64) -> kvm_regs {
    kvm_regs { rip: eip, rbx: layout::BOOT_PARAMS, rflags: RFLAGS, ..Default::default() }
}

/// A flat segment.
fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}
