//! Which system calls change what is left on a host, and what one of them is about, to name it by.

use std::fs;

use libc::{c_long, pid_t};

use super::tracer::text_at;

/// A system call that is about to be made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) number: c_long,
    pub(super) arguments: [u64; 6],
}

/// Longest name of a file in the name of a call; numbers in it are different in each run.
const LONGEST: usize = 60;

/// The name of the call, with what it is about, if it changes anything.
pub(super) fn name(tid: pid_t, call: &Call) -> Option<String> {
    let [first, second, third, fourth, ..] = call.arguments;
    let path = |address| shortened(&text_at(tid, address));
    let file = |number: u64| {
        let link = fs::read_link(format!("/proc/{tid}/fd/{number}")).unwrap_or_default();
        shortened(&link.to_string_lossy())
    };
    Some(match call.number {
        libc::SYS_mkdir => format!("mkdir {}", path(first)),
        libc::SYS_mkdirat => format!("mkdir {}", path(second)),
        libc::SYS_rmdir => format!("rmdir {}", path(first)),
        libc::SYS_unlink => format!("unlink {}", path(first)),
        libc::SYS_unlinkat => format!("unlink {}", path(second)),
        libc::SYS_rename => format!("rename {}", path(second)),
        libc::SYS_renameat | libc::SYS_renameat2 => format!("rename {}", path(fourth)),
        libc::SYS_link => format!("link {}", path(second)),
        libc::SYS_linkat => format!("link {}", path(fourth)),
        libc::SYS_symlink => format!("symlink {}", path(second)),
        libc::SYS_symlinkat => format!("symlink {}", path(third)),
        libc::SYS_mknod => format!("mknod {}", path(first)),
        libc::SYS_mknodat => format!("mknod {}", path(second)),
        libc::SYS_chmod => format!("chmod {}", path(first)),
        libc::SYS_fchmod => format!("chmod {}", file(first)),
        libc::SYS_mount => format!("mount {}", path(second)),
        libc::SYS_umount2 => format!("umount {}", path(first)),
        libc::SYS_move_mount => format!("move_mount {}", path(fourth)),
        libc::SYS_setns => "setns".to_owned(),
        libc::SYS_unshare => "unshare".to_owned(),
        libc::SYS_setsid => "setsid".to_owned(),
        libc::SYS_bind => format!("bind {}", file(first)),
        libc::SYS_listen => "listen".to_owned(),
        libc::SYS_memfd_create => "memfd_create".to_owned(),
        libc::SYS_open if creates(second) => format!("create {}", path(first)),
        libc::SYS_openat if creates(third) => format!("create {}", path(second)),
        libc::SYS_ftruncate => format!("truncate {}", file(first)),
        libc::SYS_fallocate => format!("allocate {}", file(first)),
        libc::SYS_fsync | libc::SYS_fdatasync => format!("sync {}", file(first)),
        libc::SYS_write | libc::SYS_pwrite64 | libc::SYS_writev | libc::SYS_copy_file_range => {
            let number = if call.number == libc::SYS_copy_file_range { third } else { first };
            let file = file(number);
            // Pipes, sockets and counters are no state; /dev is terminals and the like.
            let kept = file.starts_with('/') && !file.starts_with("/dev") && !file.starts_with("/memfd");
            return kept.then(|| format!("write {file}"));
        }
        libc::SYS_sendto | libc::SYS_sendmsg => {
            let family = socket_family(tid, first)?;
            return (family == "NETLINK").then(|| "netlink".to_owned());
        }
        libc::SYS_ioctl => match second {
            TUNSETIFF => "tap".to_owned(),
            TUNSETPERSIST => "tap kept".to_owned(),
            _ => return None,
        },
        libc::SYS_fork | libc::SYS_vfork => "fork".to_owned(),
        libc::SYS_clone if first & (libc::CLONE_THREAD as u64) == 0 => "fork".to_owned(),
        libc::SYS_clone3 if !makes_a_thread(tid, first) => "fork".to_owned(),
        libc::SYS_kill | libc::SYS_pidfd_send_signal => "kill".to_owned(),
        libc::SYS_exit_group => "exit".to_owned(),
        _ => return None,
    })
}

/// `_IOW('T', 202, int)` and `_IOW('T', 203, int)` (linux/if_tun.h).
const TUNSETIFF: u64 = 0x4004_54ca;
const TUNSETPERSIST: u64 = 0x4004_54cb;

fn creates(flags: u64) -> bool {
    flags & (libc::O_CREAT as u64) != 0
}

/// Whether `clone3` is asked for a thread: its flags are the first word of its argument.
fn makes_a_thread(tid: pid_t, address: u64) -> bool {
    super::tracer::word_at(tid, address).is_some_and(|flags| flags & (libc::CLONE_THREAD as u64) != 0)
}

/// The family of a socket, as `/proc` tells it apart: netlink sockets are listed by their inode.
fn socket_family(tid: pid_t, number: u64) -> Option<&'static str> {
    let link = fs::read_link(format!("/proc/{tid}/fd/{number}")).ok()?;
    let link = link.to_string_lossy().into_owned();
    let inode = link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned();
    let table = fs::read_to_string(format!("/proc/{tid}/net/netlink")).ok()?;
    let netlink = table.lines().any(|line| line.split_whitespace().last() == Some(&inode));
    Some(if netlink { "NETLINK" } else { "other" })
}

/// A path without what differs from run to run: digits and hexadecimal words become `N`.
fn shortened(path: &str) -> String {
    let word = |part: &str| {
        let hex = part.len() >= 8 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        if hex { "ID".to_owned() } else { digits(part) }
    };
    let path = path.split('/').map(word).collect::<Vec<_>>().join("/");
    let from = path.char_indices().rev().nth(LONGEST).map_or(0, |(at, _)| at);
    path[from..].to_owned()
}

fn digits(part: &str) -> String {
    let mut out = String::new();
    for character in part.chars() {
        if !character.is_ascii_digit() {
            out.push(character);
        } else if !out.ends_with('N') {
            out.push('N');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_in_every_run() {
        assert_eq!(shortened("/run/mvm/containers/0123456789ab/lock"), "/run/mvm/containers/ID/lock");
        assert_eq!(shortened("socket:[4711]"), "socket:[N]");
        assert!(shortened(&"x/".repeat(100)).len() <= LONGEST + 1);
    }
}
