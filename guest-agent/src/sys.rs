//! System calls that need `unsafe`, each behind a safe function. The only such files of the agent.
#![allow(unsafe_code)] // fork, exec, ioctls and signal dispositions have no safe form in nix

use std::{
    ffi::{CStr, CString, c_char, c_int},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

pub(crate) mod bpf;
pub(crate) mod confine;
pub(crate) mod trees;

use mvm_protocol::ExitStatus;
use nix::{
    Result,
    errno::Errno,
    fcntl::{OFlag, open},
    sys::stat::Mode,
    unistd::{ForkResult, Pid},
};

/// Strings in the form execve(2) wants them, made before a fork so that nothing is allocated after it.
pub(crate) struct StringArray {
    /// Null-terminated, pointing into `_strings`.
    pointers: Vec<*const c_char>,
    _strings: Vec<CString>,
}

impl StringArray {
    /// Keeps the strings and their addresses.
    pub(crate) fn new(strings: Vec<CString>) -> Self {
        let pointers = strings.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect();
        Self { pointers, _strings: strings }
    }
}

/// Forks; `None` in the child. The agent has one thread, so the child may do what it likes.
pub(crate) fn fork() -> Result<Option<Pid>> {
    // SAFETY: the agent never starts a thread, so no lock can be held by one that does not exist in the
    // child.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => Ok(None),
    }
}

/// Forks with the child in a cgroup from its first instruction; `None` in the child. Moving it there later
/// would wait for an RCU grace period, some 30 ms of every start.
pub(crate) fn fork_into(cgroup: BorrowedFd<'_>) -> Result<Option<Pid>> {
    let args = clone_args(0, Some(cgroup));
    // SAFETY: clone3 reads `args`; without CLONE_VM it is a fork, on the same stack in memory of its own,
    // and the agent has one thread, so that the child may go on with everything it finds there.
    let pid = Errno::result(unsafe { libc::syscall(libc::SYS_clone3, &args, size_of_val(&args)) })?;
    Ok(i32::try_from(pid).ok().filter(|pid| *pid != 0).map(Pid::from_raw))
}

fn clone_args(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> libc::clone_args {
    /// linux/sched.h; libc's constant is too narrow for it.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    // SAFETY: all zero is a valid value of this plain structure of integers.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags;
    args.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
    }
    args
}

/// Runs `child` in a child that shares this process's memory, on the free part of its stack, and that is in `cgroup`
/// from its first instruction. This process stands still until the child has become another program or has ended.
pub(crate) fn fork_sharing(cgroup: Option<BorrowedFd<'_>>, mut child: &mut dyn FnMut()) -> Result<Pid> {
    extern "C" fn enter(child: *mut &mut dyn FnMut()) -> ! {
        // SAFETY: it points to the argument of `fork_sharing`, which waits.
        unsafe { (*child)() };
        exit_now(127)
    }
    let flags = u64::from((libc::CLONE_VM | libc::CLONE_VFORK).unsigned_abs());
    let signal = u64::from(libc::SIGCHLD.unsigned_abs());
    let args = clone_args(flags, cgroup);
    // Hosts on which an agent is tried out may keep clone3 from it; it is needed for the cgroup alone.
    let (call, first, second) = match cgroup {
        Some(_) => (libc::SYS_clone3, &raw const args as u64, size_of_val(&args) as u64),
        None => (libc::SYS_clone, flags | signal, 0),
    };
    let result: i64;
    // SAFETY: with the stack pointer 0 the child goes on where this process does, with the same registers and on the
    // same stack. It calls `enter`, which never returns, so that it only writes below this frame, where nothing lives,
    // and to what `child` may change. This process runs on when the child is gone from its memory, and has no other
    // thread and no handler of a signal. The stack is aligned for a call, because the block may use it.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov rdi, r12",
            "call r13",
            "2:",
            inlateout("rax") call => result,
            in("rdi") first,
            in("rsi") second,
            in("rdx") 0,
            in("r10") 0,
            in("r8") 0,
            in("r12") &raw mut child,
            in("r13") enter as extern "C" fn(*mut &mut dyn FnMut()) -> !,
            out("rcx") _,
            out("r11") _,
        );
    }
    match i32::try_from(result) {
        Ok(pid @ 1..) => Ok(Pid::from_raw(pid)),
        Ok(errno) => Err(Errno::from_raw(errno.wrapping_neg())),
        Err(_) => Err(Errno::EOVERFLOW),
    }
}

/// A descriptor of a process (pidfd_open(2)).
pub(crate) fn open_process(pid: Pid) -> Result<OwnedFd> {
    // SAFETY: pidfd_open touches no memory.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Ends a forked child without running anything of the parent's.
pub(crate) fn exit_now(code: c_int) -> ! {
    // SAFETY: _exit has no precondition.
    unsafe { libc::_exit(code) }
}

/// Becomes `program`; returns only the reason why not.
pub(crate) fn execve(program: &CStr, args: &StringArray, env: &StringArray) -> Errno {
    // SAFETY: `program` ends in NUL, and both arrays hold pointers to live strings and end in null, as
    // `StringArray::new` made them.
    unsafe { libc::execve(program.as_ptr(), args.pointers.as_ptr(), env.pointers.as_ptr()) };
    Errno::last()
}

/// Closes every descriptor from 3 up.
pub(crate) fn close_others() -> Result<()> {
    // SAFETY: only called in a child right before exec, whose Rust values that own these descriptors are never dropped;
    // the parent's table is another one.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) }).map(drop)
}

/// Makes `from` the standard stream `to` (0, 1 or 2), inherited by what is executed.
pub(crate) fn make_stdio(from: BorrowedFd<'_>, to: RawFd) -> Result<()> {
    // SAFETY: `to` is a standard stream, which no Rust value owns.
    Errno::result(unsafe { libc::dup2(from.as_raw_fd(), to) }).map(drop)
}

/// Gives the standard stream `fd` to a user, as far as its file allows that.
pub(crate) fn own_stdio(fd: RawFd, uid: u32) -> Result<()> {
    // SAFETY: fchown touches no memory.
    Errno::result(unsafe { libc::fchown(fd, uid, u32::MAX) }).map(drop)
}

/// Makes standard input the controlling terminal of the new session.
pub(crate) fn take_controlling_terminal() -> Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    Errno::result(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }).map(drop)
}

/// Opens the other side of a pseudo-terminal, whatever is mounted at /dev/pts.
pub(crate) fn open_terminal_peer(master: BorrowedFd<'_>) -> Result<OwnedFd> {
    let unlocked: c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &unlocked) })?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes the flags by value.
    let fd = Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets a terminal's size in characters.
pub(crate) fn set_window_size(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) }).map(drop)
}

/// Bytes that can be read from a pipe without waiting.
pub(crate) fn readable_bytes(pipe: BorrowedFd<'_>) -> Result<usize> {
    let mut bytes: c_int = 0;
    // SAFETY: FIONREAD writes one int.
    Errno::result(unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &mut bytes) })?;
    usize::try_from(bytes).map_err(|_| Errno::EIO)
}

/// `struct rand_pool_info` of linux/random.h with room for 32 bytes.
#[repr(C)]
struct PoolInfo {
    entropy_count: c_int,
    buf_size: c_int,
    buf: [u8; 32],
}

/// Adds 256 bits of the host's entropy to the pool and credits them.
pub(crate) fn credit_entropy(random: impl AsFd, bytes: [u8; 32]) -> Result<()> {
    /// `_IOW('R', 0x03, int[2])` of linux/random.h.
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    let info = PoolInfo { entropy_count: 256, buf_size: 32, buf: bytes };
    // SAFETY: RNDADDENTROPY reads the two counts and then `buf_size` bytes, all within `info`.
    Errno::result(unsafe { libc::ioctl(random.as_fd().as_raw_fd(), RNDADDENTROPY, &info) }).map(drop)
}

/// Seeds the kernel's generators anew from the pool.
pub(crate) fn reseed_generators(random: impl AsFd) -> Result<()> {
    /// `_IO('R', 0x07)` of linux/random.h.
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    Errno::result(unsafe { libc::ioctl(random.as_fd().as_raw_fd(), RNDRESEEDCRNG) }).map(drop)
}

/// Sets the wall clock forward or back, at once and in one go: between reading a clock and setting it anything may
/// come.
pub(crate) fn adjust_wall_clock(by_ns: i64) -> Result<()> {
    // SAFETY: all zero is a valid value of this plain structure of integers.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
    // The fraction is never negative; with ADJ_NANO it is in nanoseconds.
    change.time.tv_sec = by_ns.div_euclid(1_000_000_000);
    change.time.tv_usec = by_ns.rem_euclid(1_000_000_000);
    // SAFETY: clock_adjtime reads and writes one timex.
    Errno::result(unsafe { libc::clock_adjtime(libc::CLOCK_REALTIME, &mut change) }).map(drop)
}

/// How many sectors of 512 bytes a block device is read ahead of those who read files of it.
pub(crate) fn set_read_ahead(device: &CStr, sectors: u32) -> Result<()> {
    /// `_IO(0x12, 98)` of linux/fs.h.
    const BLKRASET: libc::c_ulong = 0x1262;
    let device = open(device, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    // SAFETY: BLKRASET takes its argument by value.
    Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), BLKRASET, libc::c_ulong::from(sectors)) })
        .map(drop)
}

/// Nothing is written to the file system of `directory` from now on; whoever tries waits. What was written before is
/// on its disk.
pub(crate) fn freeze_filesystem(directory: BorrowedFd<'_>) -> Result<()> {
    /// `_IOWR('X', 119, int)` of linux/fs.h.
    const FIFREEZE: libc::c_ulong = 0xc004_5877;
    // SAFETY: FIFREEZE reads and writes nothing, whatever its number says.
    Errno::result(unsafe { libc::ioctl(directory.as_raw_fd(), FIFREEZE, 0) }).map(drop)
}

/// Ends that.
pub(crate) fn thaw_filesystem(directory: BorrowedFd<'_>) -> Result<()> {
    /// `_IOWR('X', 120, int)` of linux/fs.h.
    const FITHAW: libc::c_ulong = 0xc004_5878;
    // SAFETY: FITHAW reads and writes nothing, whatever its number says.
    Errno::result(unsafe { libc::ioctl(directory.as_raw_fd(), FITHAW, 0) }).map(drop)
}

/// Gives every signal its default disposition. By the system call itself, because the C library keeps its hands on two
/// signals that may have been inherited as ignored.
pub(crate) fn reset_signals() -> Result<()> {
    /// The kernel's `struct sigaction`: handler, flags, restorer, mask. All zero is the default.
    const DEFAULT: [u64; 4] = [0; 4];
    for signal in (1..=64).filter(|signal| !matches!(*signal, libc::SIGKILL | libc::SIGSTOP)) {
        let (none, size) = (ptr::null_mut::<u64>(), size_of::<u64>());
        // SAFETY: the kernel reads one sigaction from `DEFAULT`, and writes no old one.
        Errno::result(unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, &DEFAULT, none, size) })?;
    }
    Ok(())
}

/// Reaps one child that has ended, if there is one; nix would lose those killed by a real-time signal.
pub(crate) fn reap() -> Result<Option<(Pid, ExitStatus)>> {
    let mut status: c_int = 0;
    // SAFETY: waitpid writes one int.
    let pid = Errno::result(unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) })?;
    if pid == 0 {
        return Ok(None);
    }
    let byte = |value: c_int| u8::try_from(value & 0xff).unwrap_or(u8::MAX);
    let status = match libc::WIFSIGNALED(status) {
        true => ExitStatus::Signal(byte(libc::WTERMSIG(status))),
        false => ExitStatus::Code(byte(libc::WEXITSTATUS(status))),
    };
    Ok(Some((Pid::from_raw(pid), status)))
}

/// kill(2) with any signal number, real-time ones too.
pub(crate) fn kill(pid: Pid, signal: c_int) -> Result<()> {
    // SAFETY: kill touches no memory.
    Errno::result(unsafe { libc::kill(pid.as_raw(), signal) }).map(drop)
}

/// `ECHILD` when there are no children left, whether they run or wait to be reaped.
pub(crate) fn has_children() -> Result<()> {
    let (any, flags) = (libc::P_ALL, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT);
    // SAFETY: a null pointer means that no record is wanted.
    Errno::result(unsafe { libc::waitid(any, 0, ptr::null_mut(), flags) }).map(drop)
}
