//! Loading a program that decides about a cgroup's devices.
#![allow(unsafe_code)] // bpf(2) has no form in nix or the C library

use std::{
    ffi::CStr,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{Result, errno::Errno};

/// linux/bpf.h.
const BPF_PROG_LOAD: u32 = 5;
const BPF_PROG_ATTACH: u32 = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const LICENSE: &CStr = c"Apache-2.0";

/// The first members of `union bpf_attr` for `BPF_PROG_LOAD`; the kernel takes the rest as zero.
#[repr(C)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: *const u64,
    license: *const libc::c_char,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
}

/// The same for `BPF_PROG_ATTACH`.
#[repr(C)]
struct Attach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

/// Lets a program, eight bytes for each instruction, decide about devices of the processes in a cgroup. The
/// program lives as long as the cgroup.
pub(crate) fn guard_devices(cgroup: BorrowedFd<'_>, program: &[u64]) -> Result<()> {
    let load = Load {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(program.len()).map_err(|_| Errno::E2BIG)?,
        insns: program.as_ptr(),
        license: LICENSE.as_ptr(),
        log_level: 0,
        log_size: 0,
        log_buf: 0,
    };
    let size = size_of::<Load>();
    // SAFETY: the kernel reads `size` bytes of `load`, and what it points to: `insn_cnt` instructions and a
    // text that ends in NUL.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &load, size) })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let loaded = unsafe { OwnedFd::from_raw_fd(fd) };
    let attach = Attach {
        target_fd: cgroup.as_raw_fd().unsigned_abs(),
        attach_bpf_fd: loaded.as_raw_fd().unsigned_abs(),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: 0,
    };
    let size = size_of::<Attach>();
    // SAFETY: the kernel reads `size` bytes of `attach`.
    Errno::result(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &attach, size) }).map(drop)
}
