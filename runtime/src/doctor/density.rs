//! What so many containers at once would want of this host: each limit before it bites, and how to raise it.

use std::fs;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::Row;
use super::host::{available_mib, number};
use crate::cgroup;
use crate::net::{BRIDGE_MACHINES, BRIDGE_PORTS, DEFAULT_GUESTS};

/// Threads of one container: its machine's (one per CPU, the I/O loops, control) and those of the process that owns it.
const THREADS: u64 = 16;
/// Open files of both, with some room.
const FILES: u64 = 64;
/// Instances of inotify: one follows the files that were copied, one the network.
const WATCHES: u64 = 2;
/// Memory of an idle one whose machine was made of a template, in KiB; a booted one takes 20 MB.
const MEMORY_KIB: u64 = 6 * 1024;
/// Entries of the neighbour table: the host's of the guest, for IPv4 and IPv6.
const NEIGHBOURS: u64 = 2;
/// What else runs on a host.
const OTHERS: u64 = 4096;

/// A line for each limit that `count` containers would meet.
pub(super) fn rows(count: u64) -> Vec<Row> {
    let want = |each: u64| count.saturating_mul(each).saturating_add(OTHERS);
    let threads = want(THREADS);
    vec![
        memory(count),
        sysctl("process numbers", "kernel.pid_max", threads),
        sysctl("threads", "kernel.threads-max", threads),
        user_processes(threads),
        cgroup_pids(threads),
        sysctl("files", "fs.file-max", want(FILES)),
        sysctl("watches", "fs.inotify.max_user_instances", want(WATCHES)),
        sysctl("neighbours", "net.ipv4.neigh.default.gc_thresh3", want(NEIGHBOURS)),
        bridge(count),
    ]
}

fn memory(count: u64) -> Row {
    let wanted = count.saturating_mul(MEMORY_KIB) / 1024;
    match available_mib() {
        Some(mib) if mib >= wanted => {
            Row::ok("memory of all", format!("{mib} MiB available, {wanted} wanted"))
        }
        Some(mib) => Row::warn(
            "memory of all",
            format!("{mib} MiB available, {wanted} wanted"),
            format!(
                "about {} idle ones made of templates fit; what their processes use comes on top",
                mib * 1024 / MEMORY_KIB
            ),
        ),
        None => Row::warn("memory of all", "/proc/meminfo cannot be read", "mount /proc"),
    }
}

fn sysctl(check: &'static str, name: &str, wanted: u64) -> Row {
    let path = format!("/proc/sys/{}", name.replace('.', "/"));
    match number(&path) {
        Some(value) if value >= wanted => Row::ok(check, format!("{name} is {value}, {wanted} wanted")),
        Some(value) => Row::warn(
            check,
            format!("{name} is {value}, {wanted} wanted"),
            format!("sysctl -w {name}={wanted}, and in /etc/sysctl.d to keep it"),
        ),
        None => Row::warn(check, format!("{path} cannot be read"), "mount /proc"),
    }
}

fn user_processes(wanted: u64) -> Row {
    let check = "user's processes";
    match getrlimit(Resource::RLIMIT_NPROC) {
        Ok((RLIM_INFINITY, _)) => Row::ok(check, "not limited"),
        Ok((soft, _)) if soft >= wanted => Row::ok(check, format!("{soft}, {wanted} wanted")),
        Ok((soft, _)) => Row::warn(
            check,
            format!("{soft}, {wanted} wanted"),
            format!("ulimit -u {wanted}, or LimitNPROC= in the service"),
        ),
        Err(error) => Row::warn(check, format!("unknown: {error}"), "check ulimit -u"),
    }
}

/// The limit of the control group that this process, and so whatever it starts, is in.
fn cgroup_pids(wanted: u64) -> Row {
    let check = "group's processes";
    let Some(own) = cgroup::own("pids") else { return Row::ok(check, "not limited") };
    let path = own.group.join("pids.max");
    let remedy = || format!("echo {wanted} > {}, or TasksMax= of the service or slice", path.display());
    match fs::read_to_string(&path).map(|text| text.trim().parse::<u64>()) {
        Ok(Ok(most)) if most < wanted => Row::warn(check, format!("{most}, {wanted} wanted"), remedy()),
        Ok(Ok(most)) => Row::ok(check, format!("{most}, {wanted} wanted")),
        // `max`, or there is no such controller here.
        _ => Row::ok(check, "not limited"),
    }
}

/// A network of mvm's own spreads over as many bridges as it takes; its addresses are what ends. A bridge that is
/// there already is one.
fn bridge(count: u64) -> Row {
    let check = "bridge ports";
    let bridges = match count.div_ceil(u64::from(BRIDGE_MACHINES)) {
        0 | 1 => "one bridge".to_owned(),
        bridges => format!("{bridges} bridges of {BRIDGE_MACHINES} machines each"),
    };
    if count > DEFAULT_GUESTS {
        let room = count.saturating_add(3).checked_next_power_of_two().map_or(0, u64::trailing_zeros);
        let remedy = match 32u32.saturating_sub(room) {
            prefix @ 8.. if room > 0 => format!("name a wider one: --net nat:10.0.0.0/{prefix}"),
            _ => "no subnet is wide enough".to_owned(),
        };
        return Row::warn(
            check,
            format!("{bridges}, but the subnet of --net nat has {DEFAULT_GUESTS} addresses"),
            remedy,
        );
    }
    if count > u64::from(BRIDGE_PORTS) {
        return Row::ok(
            check,
            format!("{bridges} for --net nat and host-only; --net bridge:NAME takes {BRIDGE_PORTS}"),
        );
    }
    Row::ok(check, format!("{bridges} for --net nat and host-only"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn few_fit_everywhere_and_a_million_nowhere() {
        assert_eq!(bridge(1023).status, Status::Ok);
        let two = bridge(1024);
        assert_eq!(two.status, Status::Ok);
        assert!(two.found.starts_with("2 bridges of 1018"), "{}", two.found);
        assert_eq!(bridge(4093).status, Status::Ok);
        // Network, host and broadcast are no guests'.
        for (count, prefix) in [(4094, "/19"), (8189, "/19"), (8190, "/18"), ((1 << 24) - 3, "/8")] {
            assert!(bridge(count).remedy.ends_with(prefix), "{count}: {}", bridge(count).remedy);
        }
        assert_eq!(bridge(1 << 24).remedy, "no subnet is wide enough");
        assert_eq!(bridge(u64::MAX).remedy, "no subnet is wide enough");
        assert_eq!(memory(1).status, Status::Ok);
        assert_eq!(memory(u64::MAX).status, Status::Warn);
        let rows = rows(1 << 40);
        let named = |name: &str| rows.iter().find(|row| row.check == name).unwrap();
        assert_eq!(named("process numbers").status, Status::Warn);
        assert!(named("process numbers").remedy.starts_with("sysctl -w kernel.pid_max="));
    }
}
