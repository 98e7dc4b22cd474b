//! What the kernel makes of the filters and of the rest of the jail, tried by children that are thrown away.
#![allow(unsafe_code)] // forks, and calls that must not be made

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Uid, fork, getppid};

use super::*;

/// Says in the child's environment which thread it is to be like.
const LIKE: &str = "MVM_TEST_THREAD";

/// How a child ended that did `what`, or else exited with 0.
fn child(what: impl FnOnce()) -> WaitStatus {
    // SAFETY: the child makes system calls and uses the allocator, whose locks glibc keeps usable across a fork.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            what();
            // SAFETY: ends the child, and none of the parent's destructors run.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => waitpid(child, None).unwrap(),
    }
}

fn call(number: i64, arguments: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the process is thrown away, whatever this does to it.
    unsafe { libc::syscall(number, a, b, c, d, e, f) }
}

fn is_killed(status: WaitStatus) -> bool {
    matches!(status, WaitStatus::Signaled(_, Signal::SIGSYS, _))
}

/// How a child ends that is confined as `thread` and makes a call.
fn calling(program: &[sock_filter], number: i64, arguments: [u64; 6]) -> WaitStatus {
    child(|| {
        seccompiler::apply_filter(program).unwrap();
        call(number, arguments);
    })
}

#[test]
fn sec_02_what_the_table_allows_is_not_prevented() {
    // With such arguments these run anything; machines that are paused show that they may be made.
    const WILD: [i64; 2] = [libc::SYS_clone, libc::SYS_rt_sigreturn];
    for thread in THREADS {
        let program = program(thread);
        for row in rows(thread).filter(|row| !WILD.contains(&row.number)) {
            for arguments in good(row) {
                let status = calling(&program, row.number, arguments);
                assert!(!is_killed(status), "{thread:?} {row:?} {arguments:x?}: {status:?}");
            }
        }
    }
}

/// Calls that no thread of a machine has any business to make. SEC-04.
const FORBIDDEN: [i64; 68] = [
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_creat,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_setsockopt,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_chdir,
    libc::SYS_fchdir,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setresuid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_memfd_create,
    libc::SYS_mknod,
    libc::SYS_chmod,
    libc::SYS_fchmod,
    libc::SYS_chown,
    libc::SYS_link,
    libc::SYS_symlink,
    libc::SYS_rename,
    libc::SYS_unlink,
    libc::SYS_personality,
    libc::SYS_modify_ldt,
    libc::SYS_arch_prctl,
    libc::SYS_iopl,
    libc::SYS_open_by_handle_at,
    libc::SYS_seccomp,
    libc::SYS_kill,
    libc::SYS_pkey_mprotect,
    libc::SYS_remap_file_pages,
    libc::SYS_prlimit64,
    libc::SYS_rt_sigaction,
    libc::SYS_sendmmsg,
    libc::SYS_shmat,
];

#[test]
fn sec_04_what_no_machine_needs_ends_the_process() {
    for thread in THREADS {
        let program = program(thread);
        for number in FORBIDDEN {
            let status = calling(&program, number, [0; 6]);
            assert!(is_killed(status), "{thread:?} {number}: {status:?}");
        }
    }
}

#[test]
fn sec_05_06_arguments_are_held_to_the_table() {
    const KVM_CREATE_VM: u64 = 0xae01;
    const KVM_SET_SREGS: u64 = 0x4138_ae84;
    let (read, exec) = (libc::PROT_READ as u64, libc::PROT_EXEC as u64);
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let wrong = [
        (libc::SYS_mmap, [0, 4096, read | exec, anonymous, u64::MAX, 0]),
        (libc::SYS_mprotect, [0, 4096, read | exec, 0, 0, 0]),
        (libc::SYS_madvise, [0, 4096, libc::MADV_MERGEABLE as u64, 0, 0, 0]),
        (libc::SYS_ioctl, [0, libc::TIOCSTI, 0, 0, 0, 0]),
        (libc::SYS_ioctl, [0, libc::TUNSETIFF, 0, 0, 0, 0]),
        (libc::SYS_ioctl, [0, KVM_CREATE_VM, 0, 0, 0, 0]),
        (libc::SYS_ioctl, [0, KVM_SET_SREGS, 0, 0, 0, 0]),
        (libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0]),
        (libc::SYS_clone, [libc::CLONE_NEWUSER as u64, 0, 0, 0, 0, 0]),
        (libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0, 0]),
        (libc::SYS_fcntl, [0, libc::F_SETOWN as u64, 0, 0, 0, 0]),
        (libc::SYS_tgkill, [1, 1, libc::SIGKILL as u64, 0, 0, 0]),
        (libc::SYS_fallocate, [0, 0, 0, 4096, 0, 0]),
        (libc::SYS_sendto, [0, 0, 0, 0, 1 << 32, 16]),
        (libc::SYS_statx, [libc::AT_FDCWD as u64, 4096, 0, 0, 0, 0]),
    ];
    for thread in THREADS {
        for (number, arguments) in wrong {
            let status = calling(&program(thread), number, arguments);
            assert!(is_killed(status), "{thread:?} {number} {arguments:x?}: {status:?}");
        }
    }
}

#[test]
fn a_filter_that_only_logs_prevents_nothing() {
    let program = filter::program(Thread::Vcpu, &SeccompAction::Log).unwrap();
    let status = calling(&program, libc::SYS_getuid, [0; 6]);
    assert!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}");
}

/// SEC-09, SEC-11: allocates, logs, then panics as the release does. Runs in a process of its own.
#[test]
fn like_a_thread() {
    let Ok(like) = std::env::var(LIKE) else { return };
    let thread = THREADS.into_iter().find(|thread| format!("{thread:?}") == like).unwrap();
    crate::log::to_stderr(true);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        hook(info);
        std::process::abort();
    }));
    confine(thread).unwrap();
    let mut large: Vec<u8> = Vec::new();
    for _ in 0..8 {
        large.extend(vec![1; 1 << 20]);
        drop(vec![2; 1 << 19]);
    }
    if thread != Thread::Memory {
        log::warn!("{} bytes at {:?}", large.len(), Instant::now());
    }
    std::thread::yield_now();
    panic!("the end of {thread:?}");
}

#[test]
fn sec_09_a_panic_says_so_and_ends_in_an_abort_whatever_the_filter() {
    for thread in THREADS {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "jail::tests::kernel::like_a_thread", "--nocapture"])
            .env(LIKE, format!("{thread:?}"))
            .env_remove("RUST_BACKTRACE")
            // As the program has it.
            .env("MALLOC_ARENA_MAX", "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let logged = said.contains("warn: 8388608 bytes");
        assert_eq!(logged, thread != Thread::Memory, "{thread:?} {:?} {said}", output.status);
        assert!(said.contains(&format!("the end of {thread:?}")), "{said}");
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{thread:?} {said}");
    }
}

/// JAIL-02, JAIL-08: what is tried fails without any filter too.
#[test]
fn jail_08_whoever_is_in_the_jail_gets_nowhere() {
    if !Uid::effective().is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let root = File::open(directory.path()).unwrap();
    drop(directory);
    let status = child(|| {
        let parent = u64::try_from(getppid().as_raw()).unwrap();
        enter(Some(root.into())).unwrap();
        let path = |path: &'static std::ffi::CStr| path.as_ptr() as u64;
        let at = libc::AT_FDCWD as u64;
        let (create, directory) = ((libc::O_CREAT | libc::O_RDWR) as u64, libc::O_DIRECTORY as u64);
        let tries = [
            ("a file of the host", libc::SYS_openat, [at, path(c"/etc/passwd"), 0, 0, 0, 0]),
            ("the root's parent", libc::SYS_openat, [at, path(c"../../../etc/passwd"), 0, 0, 0, 0]),
            ("the root itself", libc::SYS_openat, [at, path(c"/"), directory, 0, 0, 0]),
            ("a file of its own", libc::SYS_openat, [at, path(c"/file"), create, 0o600, 0, 0]),
            ("a directory", libc::SYS_mkdir, [path(c"/directory"), 0o700, 0, 0, 0, 0]),
            ("a device", libc::SYS_mknod, [path(c"/mem"), (libc::S_IFCHR | 0o600) as u64, 0x101, 0, 0, 0]),
            ("a program", libc::SYS_execve, [path(c"/bin/sh"), 0, 0, 0, 0, 0]),
            ("another root", libc::SYS_chroot, [path(c"."), 0, 0, 0, 0, 0]),
            ("a mount", libc::SYS_mount, [0, path(c"/"), path(c"tmpfs"), 0, 0, 0]),
            ("root's identity", libc::SYS_setuid, [0; 6]),
            ("root's group", libc::SYS_setgroups, [0; 6]),
            ("a name space of users", libc::SYS_unshare, [libc::CLONE_NEWUSER as u64, 0, 0, 0, 0, 0]),
            ("whoever started it", libc::SYS_kill, [parent, 0, 0, 0, 0, 0]),
            ("its memory", libc::SYS_ptrace, [u64::from(libc::PTRACE_ATTACH), parent, 0, 0, 0, 0]),
            ("a raw socket", libc::SYS_socket, [libc::AF_PACKET as u64, libc::SOCK_RAW as u64, 0, 0, 0, 0]),
            ("ports of the processor", libc::SYS_iopl, [3, 0, 0, 0, 0, 0]),
            ("a module", libc::SYS_init_module, [0, 0, path(c""), 0, 0, 0]),
        ];
        for (place, (what, number, arguments)) in tries.into_iter().enumerate() {
            if call(number, arguments) != -1 {
                eprintln!("the jail lets {what} be had");
                // SAFETY: ends the child.
                unsafe { libc::_exit(i32::try_from(place + 1).unwrap()) }
            }
        }
    });
    assert!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}: that try, from 1, succeeded");
}

/// What confining costs a thread, of which the kernel's part is most: it asks the program about every call there is.
#[test]
#[ignore = "takes times, for people to read"]
fn cost_of_a_filter() {
    const TIMES: usize = 51;
    let median = |mut times: Vec<Duration>| {
        times.sort_unstable();
        times[TIMES / 2]
    };
    for thread in THREADS {
        let compile = (0..TIMES).map(|_| {
            let begun = Instant::now();
            std::hint::black_box(program(thread));
            begun.elapsed()
        });
        let logging = filter::program(thread, &SeccompAction::Log).unwrap();
        let install = (0..TIMES).map(|_| {
            let program = logging.clone();
            let confined = std::thread::spawn(move || {
                let begun = Instant::now();
                seccompiler::apply_filter(&program).unwrap();
                begun.elapsed()
            });
            confined.join().unwrap()
        });
        let (compile, install) = (median(compile.collect()), median(install.collect()));
        println!("{thread:?}: {} instructions, made in {compile:?}, installed in {install:?}", logging.len());
    }
}
