//! `floor`: the least a program must do to have a guest execute an instruction under KVM; the benches' yardstick.
//!
//! Opens `/dev/kvm`, makes a machine with one memory slot, a split interrupt controller and one CPU in 64-bit
//! mode, runs it to its first instruction (an `OUT` to the port the VMM's flat guest uses), prints the moment
//! on CLOCK_MONOTONIC in nanoseconds, then keeps the machine until standard input ends. No device, no kernel,
//! no configuration: what a VMM adds to this is its own doing.
#![allow(unsafe_code)]

use std::io::{self, Read, Write};
use std::process::ExitCode;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

/// Guest RAM in bytes, as the machines it is compared with have.
const RAM: usize = 128 << 20;
/// Guest addresses of the page tables (three pages) and the code.
const TABLES: u64 = 0x1000;
const CODE: u64 = 0x8000;
/// `mov dx, 0x3f0; xor eax, eax; out dx, al; hlt; jmp $-1`.
const PROGRAM: [u8; 10] = [0x66, 0xba, 0xf0, 0x03, 0x31, 0xc0, 0xee, 0xf4, 0xeb, 0xfd];

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "floor: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let ram = map_ram()?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: RAM as u64,
        userspace_addr: ram as u64,
    };
    // SAFETY: the mapping is RAM bytes long and is never unmapped.
    unsafe { vm.set_user_memory_region(region)? };
    let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    split.args[0] = 0;
    vm.enable_cap(&split)?;
    load(ram);
    let mut vcpu = vcpu(&kvm, &vm)?;
    match vcpu.run()? {
        VcpuExit::IoOut(0x3f0, _) => {}
        other => return Err(io::Error::other(format!("unexpected exit {other:?}"))),
    }
    let now = now();
    writeln!(io::stdout(), "{now}")?;
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn map_ram() -> io::Result<*mut u8> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh anonymous mapping touches nothing that exists.
    let ram =
        unsafe { libc::mmap(std::ptr::null_mut(), RAM, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if ram == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(ram.cast()) }
}

/// Identity page tables for the first 2 MiB, and the program.
fn load(ram: *mut u8) {
    let entries = [(TABLES, TABLES + 0x1003), (TABLES + 0x1000, TABLES + 0x2003), (TABLES + 0x2000, 0x83)];
    for (at, value) in entries {
        // SAFETY: `at` is far below RAM.
        let entry = unsafe { ram.add(at as usize) };
        // SAFETY: RAM is page-aligned, `at` a multiple of 8, and nothing else refers to it.
        unsafe { entry.cast::<u64>().write(value) };
    }
    // SAFETY: CODE is far below RAM.
    let code = unsafe { ram.add(CODE as usize) };
    // SAFETY: as above; the program is ten bytes.
    unsafe { code.copy_from_nonoverlapping(PROGRAM.as_ptr(), PROGRAM.len()) };
}

fn vcpu(kvm: &Kvm, vm: &VmFd) -> io::Result<VcpuFd> {
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut sregs = vcpu.get_sregs()?;
    sregs.cr3 = TABLES;
    sregs.cr4 = 0x20; // PAE
    sregs.cr0 = 0x8000_0033; // PG, NE, ET, MP, PE
    sregs.efer = 0x500; // LMA, LME
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        (segment.base, segment.limit, segment.selector) = (0, 0xffff_ffff, 16);
        (segment.type_, segment.present, segment.s, segment.db, segment.g) = (3, 1, 1, 1, 1);
    }
    sregs.cs = sregs.ds;
    (sregs.cs.selector, sregs.cs.type_, sregs.cs.l, sregs.cs.db) = (8, 11, 1, 0);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rsp, regs.rflags) = (CODE, 0x7000, 2);
    vcpu.set_regs(&regs)?;
    Ok(vcpu)
}

/// CLOCK_MONOTONIC in nanoseconds.
fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}
