//! What a process gives up for good: capabilities, resources, system calls.
#![allow(unsafe_code)] // capset, seccomp, sched_setattr and ioprio_set have no form in nix

use mvm_protocol::{Capabilities, Rlimit, Scheduler};
use nix::{Result, errno::Errno};

/// setrlimit(2) with any resource's number.
pub(crate) fn limit_resource(limit: &Rlimit) -> Result<()> {
    let value = libc::rlimit { rlim_cur: limit.soft, rlim_max: limit.hard };
    // SAFETY: setrlimit reads one rlimit.
    Errno::result(unsafe { libc::setrlimit(limit.resource, &value) }).map(drop)
}

/// `struct sched_attr` as far as every kernel that has the call knows it (linux/sched/types.h).
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// sched_setattr(2).
pub(crate) fn schedule(scheduler: &Scheduler) -> Result<()> {
    let attr = SchedAttr {
        size: u32::try_from(size_of::<SchedAttr>()).map_err(|_| Errno::E2BIG)?,
        policy: scheduler.policy,
        flags: 0,
        nice: scheduler.nice,
        priority: scheduler.priority,
        runtime: 0,
        deadline: 0,
        period: 0,
    };
    // SAFETY: sched_setattr reads `size` bytes of `attr`.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &attr, 0) }).map(drop)
}

/// ioprio_set(2) for this process.
pub(crate) fn set_io_priority(priority: u32) -> Result<()> {
    /// `IOPRIO_WHO_PROCESS` of linux/ioprio.h.
    const PROCESS: i32 = 1;
    // SAFETY: ioprio_set touches no memory.
    Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_set, PROCESS, 0, priority) }).map(drop)
}

/// Drops from the bounding set every capability that is not in `keep`.
pub(crate) fn bound_capabilities(keep: u64) -> Result<()> {
    for capability in (0..64_u32).filter(|it| keep & (1 << it) == 0) {
        // SAFETY: PR_CAPBSET_DROP takes a number.
        match Errno::result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }) {
            Ok(_) => {}
            // Beyond the last capability this kernel has.
            Err(Errno::EINVAL) => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Sets this process's capabilities, the ambient ones last, which must be inheritable by then.
pub(crate) fn set_capabilities(sets: &Capabilities) -> Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3`: two halves of 32 bits.
    const VERSION: u32 = 0x2008_0522;
    let header: [u32; 2] = [VERSION, 0];
    let low = |set: u64| u32::try_from(set & u64::from(u32::MAX)).unwrap_or(0);
    let data: [u32; 6] = [
        low(sets.effective),
        low(sets.permitted),
        low(sets.inheritable),
        low(sets.effective >> 32),
        low(sets.permitted >> 32),
        low(sets.inheritable >> 32),
    ];
    // SAFETY: capset reads a header and, in version 3, two records of three words.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) })?;
    let clear = libc::PR_CAP_AMBIENT_CLEAR_ALL;
    // SAFETY: PR_CAP_AMBIENT takes numbers.
    Errno::result(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, clear, 0, 0, 0) })?;
    let raise = libc::PR_CAP_AMBIENT_RAISE;
    for capability in (0..64_u64).filter(|it| sets.ambient & (1 << it) != 0) {
        // SAFETY: PR_CAP_AMBIENT takes numbers.
        Errno::result(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, capability, 0, 0) })?;
    }
    Ok(())
}

/// Installs a seccomp filter: `struct sock_filter`, eight bytes each.
pub(crate) fn filter_system_calls(program: &[u64], flags: u64) -> Result<()> {
    /// `SECCOMP_SET_MODE_FILTER` of linux/seccomp.h.
    const SET_MODE_FILTER: u32 = 1;
    /// `struct sock_fprog` of linux/filter.h.
    #[repr(C)]
    struct Program {
        len: u16,
        filter: *const u64,
    }
    let len = u16::try_from(program.len()).map_err(|_| Errno::EINVAL)?;
    let program = Program { len, filter: program.as_ptr() };
    // SAFETY: seccomp reads `len` instructions of eight bytes from `filter`, which is that long.
    match Errno::result(unsafe { libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, flags, &program) })? {
        0 => Ok(()),
        // With TSYNC the number of a thread that could not follow; there is none beside this one.
        _ => Err(Errno::ESRCH),
    }
}
