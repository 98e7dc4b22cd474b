//! Limits, in the terms of cgroup v1 in which specifications are written, become files of cgroup v2.

use mvm_protocol::Limits;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::refused::{Refused, Result};

/// Period of the CPU quota when only a quota is given, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;
/// Controllers whose files may be named directly.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// Translates the limits of a container in a machine of `cpus` CPUs.
///
/// # Errors
/// A limit the guest cannot hold.
pub fn limits(given: &LinuxResources, cpus: u8) -> Result<Limits> {
    let mut files = Files::default();
    if let Some(memory) = given.memory() {
        files.memory(memory)?;
    }
    if let Some(cpu) = given.cpu() {
        files.cpu(cpu, cpus)?;
    }
    if let Some(pids) = given.pids() {
        files.pids(pids.limit());
    }
    if let Some(io) = given.block_io() {
        block_io(io)?;
    }
    for limit in given.hugepage_limits().iter().flatten() {
        // Engines say zero of each size there is; that holds where there are none.
        if limit.limit() > 0 {
            let reason = format!("{}: the machine has no huge pages to give", limit.page_size());
            return Err(Refused::new("linux.resources.hugepageLimits", reason));
        }
    }
    if given.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()) {
        return Err(Refused::new("linux.resources.rdma", "the machine has no such device"));
    }
    let mut unified: Vec<_> = given.unified().iter().flatten().collect();
    unified.sort();
    for (name, value) in unified {
        files.unified(name, value)?;
    }
    Ok(Limits { files: files.0 })
}

#[derive(Debug, Default)]
struct Files(Vec<(String, String)>);

impl Files {
    fn push(&mut self, name: &str, text: impl Into<String>) {
        self.0.push((name.to_owned(), text.into()));
    }

    fn memory(&mut self, memory: &LinuxMemory) -> Result<()> {
        // What is below the reservation is taken back last.
        for (file, field, value) in
            [("memory.low", "reservation", memory.reservation()), ("memory.max", "limit", memory.limit())]
        {
            match value {
                None | Some(0) => {}
                Some(-1) => self.push(file, "max"),
                Some(bytes) if bytes > 0 => self.push(file, bytes.to_string()),
                Some(bytes) => {
                    let reason = format!("{bytes} is no size; -1 is without limit");
                    return Err(Refused::new(format!("linux.resources.memory.{field}"), reason));
                }
            }
        }
        Ok(())
    }

    fn cpu(&mut self, cpu: &LinuxCpu, cpus: u8) -> Result<()> {
        for (field, given) in [
            ("realtimeRuntime", cpu.realtime_runtime().is_some_and(|runtime| runtime != 0)),
            ("realtimePeriod", cpu.realtime_period().is_some_and(|period| period != 0)),
        ] {
            if given {
                let reason = "cgroup v2 has no budget for real-time processes";
                return Err(Refused::new(format!("linux.resources.cpu.{field}"), reason));
            }
        }
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            self.push("cpu.weight", weight_of(shares).to_string());
        }
        let period = cpu.period().filter(|period| *period != 0);
        match cpu.quota().filter(|quota| *quota != 0) {
            Some(quota) if quota > 0 => {
                self.push("cpu.max", format!("{quota} {}", period.unwrap_or(DEFAULT_PERIOD)));
            }
            Some(_) => self.push("cpu.max", format!("max {}", period.unwrap_or(DEFAULT_PERIOD))),
            None => period.into_iter().for_each(|period| self.push("cpu.max", format!("max {period}"))),
        }
        if let Some(burst) = cpu.burst() {
            self.push("cpu.max.burst", burst.to_string());
        }
        if let Some(idle) = cpu.idle() {
            self.push("cpu.idle", idle.to_string());
        }
        if let Some(list) = cpu.cpus().as_deref().filter(|list| !list.is_empty()) {
            let wrong = || Refused::new("linux.resources.cpu.cpus", format!("{list:?} is no list of CPUs"));
            let count = cpu_count(list).ok_or_else(wrong)?;
            // The numbers are of the host's CPUs: the container gets as many of the machine's.
            if count < u32::from(cpus) {
                self.push("cpuset.cpus", format!("0-{}", count.saturating_sub(1)));
            }
        }
        Ok(())
    }

    fn pids(&mut self, limit: i64) {
        match limit {
            0 => {}
            1.. => self.push("pids.max", limit.to_string()),
            _ => self.push("pids.max", "max"),
        }
    }

    fn unified(&mut self, name: &str, value: &str) -> Result<()> {
        let refuse = |why: &str| Refused::new("linux.resources.unified", format!("{name:?} {why}"));
        let (controller, file) =
            name.split_once('.').ok_or_else(|| refuse("names no file of a controller"))?;
        if file.is_empty() || name.contains(['/', '\0']) {
            return Err(refuse("names no file of a controller"));
        }
        if !CONTROLLERS.contains(&controller) {
            return Err(refuse(&format!("is not of {}, which the guest has", CONTROLLERS.join(", "))));
        }
        self.push(name, value);
        Ok(())
    }
}

fn block_io(io: &LinuxBlockIo) -> Result<()> {
    let of_devices = [
        ("weightDevice", io.weight_device().as_ref().is_some_and(|list| !list.is_empty())),
        (
            "throttleReadBpsDevice",
            io.throttle_read_bps_device().as_ref().is_some_and(|list| !list.is_empty()),
        ),
        (
            "throttleWriteBpsDevice",
            io.throttle_write_bps_device().as_ref().is_some_and(|list| !list.is_empty()),
        ),
        (
            "throttleReadIOPSDevice",
            io.throttle_read_iops_device().as_ref().is_some_and(|list| !list.is_empty()),
        ),
        (
            "throttleWriteIOPSDevice",
            io.throttle_write_iops_device().as_ref().is_some_and(|list| !list.is_empty()),
        ),
    ];
    for (field, given) in of_devices {
        if given {
            let reason = "it names disks of the host, and the machine has disks of its own";
            return Err(Refused::new(format!("linux.resources.blockIO.{field}"), reason));
        }
    }
    Ok(())
}

/// cgroup v1 shares, 2 to 262144, on the scale of cgroup v2 weights, 1 to 10000, as runc lays one on the other.
fn weight_of(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    (shares - 2) * 9999 / 262_142 + 1
}

/// How many CPUs a list such as `0-3,7` names.
pub(super) fn cpu_count(list: &str) -> Option<u32> {
    let mut named = std::collections::BTreeSet::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= 8192 {
            return None;
        }
        named.extend(first..=last);
    }
    u32::try_from(named.len()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(json: &str) -> Result<Vec<(String, String)>> {
        limits(&serde_json::from_str(json).unwrap(), 4).map(|limits| limits.files)
    }

    fn check(json: &str, expected: &[(&str, &str)]) {
        let files = files(json).unwrap();
        let files: Vec<_> = files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        assert_eq!(files, expected, "{json}");
    }

    #[test]
    fn each_limit_becomes_its_file() {
        check(
            r#"{"memory":{"limit":67108864,"reservation":1048576}}"#,
            &[("memory.low", "1048576"), ("memory.max", "67108864")],
        );
        check(r#"{"memory":{"limit":-1,"swap":-1,"swappiness":60}}"#, &[("memory.max", "max")]);
        check(
            r#"{"cpu":{"quota":50000,"period":100000,"shares":1024}}"#,
            &[("cpu.weight", "39"), ("cpu.max", "50000 100000")],
        );
        check(r#"{"cpu":{"quota":20000}}"#, &[("cpu.max", "20000 100000")]);
        check(
            r#"{"cpu":{"quota":-1,"period":50000,"burst":5,"idle":1}}"#,
            &[("cpu.max", "max 50000"), ("cpu.max.burst", "5"), ("cpu.idle", "1")],
        );
        check(r#"{"cpu":{"cpus":"4-5"}}"#, &[("cpuset.cpus", "0-1")]);
        check(r#"{"cpu":{"cpus":"0-3,4"}}"#, &[]);
        check(r#"{"pids":{"limit":100}}"#, &[("pids.max", "100")]);
        check(r#"{"pids":{"limit":-1}}"#, &[("pids.max", "max")]);
        check(r#"{"pids":{"limit":0},"memory":{"limit":0},"cpu":{"shares":0}}"#, &[]);
        check(r#"{"hugepageLimits":[{"pageSize":"2MB","limit":0}]}"#, &[]);
        check(
            r#"{"unified":{"memory.high":"5","cpu.weight":"7"}}"#,
            &[("cpu.weight", "7"), ("memory.high", "5")],
        );
    }

    #[test]
    fn shares_have_the_weights_runc_gives_them() {
        for (shares, weight) in [(1, 1), (2, 1), (1024, 39), (262_144, 10_000), (u64::MAX, 10_000)] {
            assert_eq!(weight_of(shares), weight);
        }
    }

    #[test]
    fn limits_the_guest_cannot_hold_are_refused_by_name() {
        for (json, field) in [
            (r#"{"memory":{"limit":-2}}"#, "linux.resources.memory.limit"),
            (r#"{"cpu":{"realtimeRuntime":1}}"#, "linux.resources.cpu.realtimeRuntime"),
            (r#"{"cpu":{"cpus":"3-1"}}"#, "linux.resources.cpu.cpus"),
            (r#"{"hugepageLimits":[{"pageSize":"2MB","limit":1}]}"#, "linux.resources.hugepageLimits"),
            (r#"{"rdma":{"mlx5":{"hcaHandles":1}}}"#, "linux.resources.rdma"),
            (r#"{"unified":{"memory/../x":"1"}}"#, "linux.resources.unified"),
            (r#"{"unified":{"hugetlb.2MB.max":"1"}}"#, "linux.resources.unified"),
            (
                r#"{"blockIO":{"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1}]}}"#,
                "linux.resources.blockIO.throttleReadBpsDevice",
            ),
        ] {
            assert_eq!(files(json).unwrap_err().field, field, "{json}");
        }
    }
}
