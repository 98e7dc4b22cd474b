//! The system calls that the threads of a machine's process make while its guest runs: which, with what arguments,
//! and what for.
//!
//! One table. A call that is not in it for the thread that makes it ends the process, so it is better to have a row for a
//! rare path than to lose a machine; what a row is for says whether it may go.

use libc::c_long;

use super::requests::*;

/// Who makes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Thread {
    /// Serves the control socket, saves the machine, attaches devices. Those it starts to hold devices and to end
    /// them have what it has.
    Main,
    /// Serves devices. Those it starts serve further ones.
    Io,
    /// Runs the guest, and does what it asks of registers.
    Vcpu,
    /// Ends the machine with whoever brings its memory.
    Memory,
}

/// What must hold of a call's arguments, which are numbered from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Only {
    /// They may be anything.
    Any,
    /// The lower half of this one, which is all that is looked at, is one of these.
    OneOf(u8, &'static [u64]),
    /// This one has these bits.
    With(u8, u32),
    /// This one has none of these bits.
    Without(u8, u32),
    /// This one is no address.
    Null(u8),
}

/// A call that threads may make. Several rows of one call are alternatives.
#[derive(Debug)]
pub(super) struct Row {
    pub number: c_long,
    pub threads: &'static [Thread],
    pub only: Only,
    /// Its name, and what it is made for.
    #[cfg(test)]
    pub reason: (&'static str, &'static str),
}

macro_rules! table {
    ($($call:ident $threads:ident $only:expr, $why:literal;)*) => {
        &[$(Row {
            number: libc::$call,
            threads: $threads,
            only: $only,
            #[cfg(test)]
            reason: (stringify!($call), $why),
        }),*]
    };
}

use Only::{Any, Null, OneOf, With, Without};
use Thread::{Io, Main, Memory, Vcpu};

const ALL: &[Thread] = &[Main, Io, Vcpu, Memory];
const MAIN: &[Thread] = &[Main];
const IO: &[Thread] = &[Io];
const VCPU: &[Thread] = &[Vcpu];
const MEMORY: &[Thread] = &[Memory];
/// Those that start threads.
const STARTERS: &[Thread] = &[Main, Io];
/// Those that read events, and log.
const SERVERS: &[Thread] = &[Main, Io, Vcpu];
/// Those that wait for files.
const WAITERS: &[Thread] = &[Main, Io, Memory];

const EXEC: u32 = libc::PROT_EXEC as u32;
/// What the C library starts a thread with: nothing that makes a process, or another name space.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;
/// Linux 6.13; the crate does not have it yet.
const MADV_GUARD_INSTALL: u64 = 102;
/// What makes a virtual CPU leave the guest: the signal that [`crate::vcpu::kick_signal`] is with this C library.
const KICK: u64 = 34;

pub(super) const CALLS: &[Row] = table! {
    // Running the guest: first, because it is made most.
    SYS_ioctl VCPU OneOf(1, &[
        KVM_RUN,
        KVM_SIGNAL_MSI,
        KVM_IOEVENTFD,
        KVM_KVMCLOCK_CTRL,
        KVM_GET_CLOCK,
        KVM_GET_CPUID2,
        KVM_GET_DEBUGREGS,
        KVM_GET_DEVICE_ATTR,
        KVM_GET_LAPIC,
        KVM_GET_MP_STATE,
        KVM_GET_MSRS,
        KVM_GET_REGS,
        KVM_GET_SREGS,
        KVM_GET_TSC_KHZ,
        KVM_GET_VCPU_EVENTS,
        KVM_GET_XCRS,
        KVM_GET_XSAVE,
        KVM_GET_XSAVE2,
    ]), "enters the guest; unmasks a vector, moves doorbells, resumes the clock; says what its CPU is, to be saved";
    SYS_ioctl IO OneOf(1, &[KVM_SIGNAL_MSI, TUNSETVNETHDRSZ, TUNSETOFFLOAD]),
        "interrupts the guest; sets a tap up for what its driver can do";
    SYS_ioctl MAIN OneOf(1, &[
        FIONBIO,
        KVM_SIGNAL_MSI,
        KVM_IOEVENTFD,
        KVM_SET_USER_MEMORY_REGION,
        KVM_CHECK_EXTENSION,
        KVM_GET_MSR_INDEX_LIST,
        TUNGETIFF,
        TUNSETOFFLOAD,
    ]), "serves a client; tells a driver of a change; attaches a device; plugs memory; lists what is to be saved";

    // Waiting, telling others, and time.
    SYS_futex ALL Any, "locks, channels, and the end of threads";
    SYS_epoll_wait WAITERS Any, "the loop";
    SYS_epoll_ctl WAITERS Any, "clients, callers and devices come and go";
    SYS_read SERVERS Any, "events, timers, signals, input";
    SYS_write ALL Any, "events, the status stream, the log, serial output";
    SYS_close ALL Any, "clients, callers and devices end";
    SYS_fcntl ALL OneOf(1, &[
        libc::F_DUPFD_CLOEXEC as u64,
        libc::F_GETFD as u64,
        libc::F_GETFL as u64,
        libc::F_SETFL as u64,
        libc::F_OFD_SETLK as u64,
    ]), "copies of doorbells' events; checks and locks a disk; without optimisation std looks before it closes";
    SYS_poll SERVERS Any, "whether the log has room for a line";
    SYS_clock_gettime ALL Any, "the time, where the host's clock can not be read without a call";
    SYS_clock_nanosleep MAIN Any, "tries again whether a device is free";
    SYS_sched_yield ALL Any, "std's channels, where two threads meet in one";
    SYS_restart_syscall ALL Any, "goes on with a wait after the process was stopped and continued";
    SYS_timerfd_create STARTERS Any, "a balloon or a vsock is attached; a disk or a card is held by its limits";
    SYS_timerfd_settime IO Any, "deadlines";
    SYS_eventfd2 STARTERS Any, "a device is attached, and a loop for it";
    SYS_epoll_create1 WAITERS Any, "a loop; whether an input can be waited for";

    // Memory: none of it may ever be executed.
    SYS_brk ALL Any, "malloc";
    SYS_mmap ALL Without(2, EXEC), "malloc; stacks of threads";
    SYS_mprotect STARTERS Without(2, EXEC), "guard pages of stacks; opens memory that is plugged";
    SYS_munmap ALL Any, "malloc; stacks of threads that have ended";
    SYS_mremap ALL Any, "malloc";
    SYS_madvise ALL OneOf(2, &[libc::MADV_DONTNEED as u64]), "a thread's stack when it ends; what a balloon took";
    SYS_madvise IO OneOf(2, &[libc::MADV_REMOVE as u64]), "what a balloon took of memory that is shared";
    SYS_madvise STARTERS OneOf(2, &[MADV_GUARD_INSTALL]), "guard pages of stacks, in C libraries from 2.42 on";
    SYS_mincore MAIN Any, "which pages are to be saved";

    // Devices.
    SYS_readv IO Any, "frames, and terminal input";
    SYS_writev ALL Any, "frames and terminal output; what the C library says before it aborts";
    SYS_preadv IO Any, "a disk is read";
    SYS_pwritev IO Any, "a disk is written";
    SYS_pwrite64 STARTERS Any, "zeroes where a file system cannot make them; a machine is saved";
    SYS_pread64 MAIN Any, "the base that a machine is saved above";
    SYS_fdatasync IO Any, "a disk is flushed";
    SYS_fallocate IO OneOf(1, &[
        (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u64,
        (libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE) as u64,
    ]), "a disk is trimmed and zeroed";
    SYS_lseek STARTERS Any, "size of a disk; a log begins anew; where a file has holes";
    SYS_ftruncate STARTERS Any, "a log begins anew; a machine is saved";
    SYS_statx MAIN With(2, libc::AT_EMPTY_PATH as u32), "what a file is that came with a request";
    SYS_statx MAIN Null(1), "how std finds out, after an error, whether the call is there";
    SYS_getrandom STARTERS Any, "what the guest asks of it; names of snapshots, keys of hash maps";
    SYS_sysinfo MAIN Any, "whether the host has swapped anything out";
    SYS_uname MAIN Any, "the host a machine is saved on";

    // Sockets that are there: none is made, and none sends to anybody by name.
    SYS_accept4 STARTERS Any, "a client of the control socket, a caller of the guest";
    SYS_recvmsg STARTERS Any, "a client's request with its files, a stream's bytes";
    SYS_recvfrom IO Any, "the port that a caller of the guest names";
    SYS_recvfrom MEMORY Any, "whether whoever brings memory has gone";
    SYS_sendmsg IO Any, "the guest's bytes; asks for a stream";
    SYS_sendto STARTERS Null(4), "a reply; the first line of a stream";
    SYS_shutdown IO Any, "the guest has said its last on a stream";
    SYS_getsockname MAIN Any, "checks a socket that a vsock is attached with";
    SYS_getpeername MAIN Any, "checks a socket that a vsock is attached with";
    SYS_getsockopt MAIN Any, "checks a socket that a vsock is attached with";

    // Threads, and the end of them and of the process.
    SYS_clone STARTERS OneOf(0, &[THREAD]), "a thread";
    SYS_set_robust_list STARTERS Any, "a thread begins";
    SYS_rseq STARTERS Any, "a thread begins";
    SYS_prctl STARTERS OneOf(0, &[libc::PR_SET_NAME as u64]), "a thread is named";
    SYS_rt_sigprocmask ALL Any, "around the start, the end and the signalling of threads";
    SYS_rt_sigreturn VCPU Any, "the kick has been handled";
    SYS_getpid ALL Any, "the C library signals a thread";
    SYS_gettid ALL Any, "the C library signals its own thread";
    SYS_tgkill ALL OneOf(2, &[libc::SIGABRT as u64]), "a panic ends the process";
    SYS_tgkill MAIN OneOf(2, &[KICK]), "makes a virtual CPU leave the guest";
    SYS_exit ALL Any, "a thread ends";
    SYS_exit_group ALL Any, "the process ends";
};
