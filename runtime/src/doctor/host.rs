//! What the host offers besides KVM: rights, devices, control groups, limits, memory.

use std::fs;
use std::io;

use nix::sys::resource::{Resource, getrlimit};

use super::Row;

/// Open files a host should allow one process: a machine uses about a dozen, a shim one set per machine.
const WANTED_FILES: u64 = 1024;
/// Processes a host should allow: three threads a machine.
const WANTED_PIDS: u64 = 32_768;
/// Memory mappings a process may have.
const WANTED_MAPS: u64 = 65_530;
/// Least memory to start anything, in MiB.
const WANTED_MEMORY_MIB: u64 = 256;

pub(super) fn rows() -> Vec<Row> {
    vec![rights(), tun(), cgroups(), files(), pids(), maps(), memory(), page_merging()]
}

fn rights() -> Row {
    let uid = nix::unistd::geteuid();
    if uid.is_root() {
        return Row::ok("rights", "root");
    }
    Row::warn(
        "rights",
        format!("uid {uid}, not root"),
        "machines run; making networks and reading other users' images needs root",
    )
}

fn tun() -> Row {
    match fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Row::ok("tun", "/dev/net/tun opens"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Row::warn("tun", "/dev/net/tun is not there", "modprobe tun; without it machines have no network")
        }
        Err(error) => Row::warn(
            "tun",
            format!("/dev/net/tun: {error}"),
            "run as root, or let your group read and write /dev/net/tun",
        ),
    }
}

fn cgroups() -> Row {
    match fs::read_to_string("/sys/fs/cgroup/cgroup.controllers") {
        Ok(controllers) => {
            let missing: Vec<_> = ["cpu", "memory", "pids"]
                .into_iter()
                .filter(|want| !controllers.split_whitespace().any(|have| have == *want))
                .collect();
            if missing.is_empty() {
                Row::ok("cgroups", format!("version 2: {}", controllers.trim()))
            } else {
                Row::warn(
                    "cgroups",
                    format!("version 2 without {}", missing.join(", ")),
                    "enable the controllers in the parent's cgroup.subtree_control",
                )
            }
        }
        Err(_) if fs::metadata("/sys/fs/cgroup/memory").is_ok() => Row::ok("cgroups", "version 1"),
        Err(_) => {
            Row::warn("cgroups", "none mounted", "mount -t cgroup2 none /sys/fs/cgroup to limit machines")
        }
    }
}

fn files() -> Row {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, _)) if soft >= WANTED_FILES => Row::ok("open files", format!("{soft} a process")),
        Ok((soft, _)) => Row::warn(
            "open files",
            format!("{soft} a process"),
            format!("ulimit -n {WANTED_FILES}, or LimitNOFILE= in the service"),
        ),
        Err(error) => Row::warn("open files", format!("unknown: {error}"), "check ulimit -n"),
    }
}

fn pids() -> Row {
    at_least("processes", "/proc/sys/kernel/pid_max", WANTED_PIDS, "kernel.pid_max")
}

fn maps() -> Row {
    at_least("memory maps", "/proc/sys/vm/max_map_count", WANTED_MAPS, "vm.max_map_count")
}

fn at_least(check: &'static str, path: &str, wanted: u64, sysctl: &str) -> Row {
    match number(path) {
        Some(value) if value >= wanted => Row::ok(check, format!("{sysctl} is {value}")),
        Some(value) => {
            Row::warn(check, format!("{sysctl} is {value}"), format!("sysctl -w {sysctl}={wanted}"))
        }
        None => Row::warn(check, format!("{path} cannot be read"), "mount /proc"),
    }
}

fn memory() -> Row {
    let Some(mib) = available_mib() else {
        return Row::warn("memory", "/proc/meminfo cannot be read", "mount /proc");
    };
    let found = format!("{mib} MiB available");
    if mib >= WANTED_MEMORY_MIB {
        return Row::ok("memory", found);
    }
    Row::fail("memory", found, "free memory: one machine takes about 20 MiB plus what its container uses")
}

/// Memory that can be had without swapping, in MiB.
pub(super) fn available_mib() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024)
}

/// Merged pages let one tenant learn by timing what another has in memory.
fn page_merging() -> Row {
    match number("/sys/kernel/mm/ksm/run") {
        Some(1) => Row::warn(
            "page merging",
            "the host merges equal pages (KSM)",
            "echo 2 > /sys/kernel/mm/ksm/run: merging across tenants leaks through timing",
        ),
        _ => Row::ok("page merging", "off"),
    }
}

pub(super) fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}
