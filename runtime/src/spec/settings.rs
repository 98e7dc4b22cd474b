//! What annotations say about a machine, and how large a machine is for what will run in it.

use std::collections::HashMap;

use mvm_devices::throttle::{Limit, NotALimit};
use mvm_vmm::config::{MemSize, VcpuCount};
use oci_spec::runtime::{LinuxCpu, LinuxResources, Spec};

use super::refused::{Refused, Result};
use super::resources::cpu_count;
use crate::template::Choice;

/// Beginning of the annotations that are mvm's.
pub const PREFIX: &str = "io.mvm.";
/// RAM of the machine: `256`, `256M`, `2G`.
pub const MEMORY: &str = "io.mvm.memory";
/// Virtual CPUs of the machine.
pub const VCPUS: &str = "io.mvm.vcpus";
/// Size of the disk of a container's writes: `512M`, `10G`; `0` has them in the guest's memory.
pub const UPPER_SIZE: &str = "io.mvm.upper_size";
/// Whether the machine is made of a template: `auto`, `never`, `always`.
pub const TEMPLATE: &str = "io.mvm.template";
/// How fast the machine may use its disks and its network: `disk-read=10M:40M,net-send=500ops`.
pub const LIMITS: &str = "io.mvm.limits";
/// The annotations that may be used unless a configuration says otherwise: all there are.
pub const ALLOWED: [&str; 5] = [MEMORY, VCPUS, UPPER_SIZE, TEMPLATE, LIMITS];

/// What the guest's kernel, the agent and page tables take beside what a limit lets a container use, in MiB: a fixed
/// part, and one part of so many of the limit.
const OVERHEAD_MIB: u64 = 48;
const OVERHEAD_SHARE: u64 = 32;
/// The machine that nobody asked anything of, in MiB.
const DEFAULT_MIB: u64 = 128;

/// What annotations say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// [`MEMORY`].
    pub memory: Option<MemSize>,
    /// [`VCPUS`].
    pub cpus: Option<VcpuCount>,
    /// [`UPPER_SIZE`], in bytes; 0 is no disk.
    pub upper_bytes: Option<u64>,
    /// [`TEMPLATE`].
    pub template: Option<Choice>,
    /// [`LIMITS`].
    pub limits: Vec<Limit>,
}

impl Settings {
    /// Reads what annotations say, as far as `allowed` lets them.
    ///
    /// # Errors
    /// One of mvm's that is not allowed, not known, or not understood.
    pub fn of(annotations: Option<&HashMap<String, String>>, allowed: &[impl AsRef<str>]) -> Result<Self> {
        let mut settings = Self::default();
        let mut ours: Vec<_> =
            annotations.into_iter().flatten().filter(|(name, _)| name.starts_with(PREFIX)).collect();
        ours.sort();
        for (name, value) in ours {
            let refuse = |why: String| Refused::new(format!("annotations.{name}"), why);
            if !allowed.iter().any(|allowed| allowed.as_ref() == name) {
                let allowed: Vec<_> = allowed.iter().map(AsRef::as_ref).collect();
                return Err(refuse(format!("it is not allowed here; allowed are {}", allowed.join(", "))));
            }
            let not = |what: &str| refuse(format!("{value:?} is no {what}"));
            match name.as_str() {
                MEMORY => settings.memory = Some(value.parse().map_err(|_| not("size of memory"))?),
                VCPUS => {
                    let count = value.parse::<u64>().ok().and_then(|count| count.try_into().ok());
                    settings.cpus = Some(count.ok_or_else(|| not("number of CPUs from 1 to 32"))?);
                }
                UPPER_SIZE => {
                    let size = || value.parse().map(|size: MemSize| size.bytes());
                    let bytes = if value == "0" { Ok(0) } else { size() };
                    settings.upper_bytes = Some(bytes.map_err(|_| not("size of a disk"))?);
                }
                TEMPLATE => {
                    settings.template =
                        Some(value.parse().map_err(|_| not("choice of auto, never and always"))?);
                }
                LIMITS => {
                    let limits =
                        value.split(',').map(str::parse).collect::<std::result::Result<_, NotALimit>>();
                    settings.limits = limits.map_err(|error| refuse(error.to_string()))?;
                }
                _ => return Err(refuse("nothing is known by this name".to_owned())),
            }
        }
        Ok(settings)
    }
}

/// What a host can give one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its CPUs.
    pub cpus: u32,
    /// Its memory in MiB.
    pub memory_mib: u64,
}

impl Host {
    /// The host this runs on.
    pub fn this() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, |count| count.get());
        let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let kib = total.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        Self {
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory_mib: kib.map_or(MemSize::MAX_MIB, |kib| kib / 1024),
        }
    }
}

/// How large a machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Virtual CPUs.
    pub cpus: VcpuCount,
    /// RAM.
    pub memory: MemSize,
}

/// The size of the machine for a container, or for the pod whose first container it is.
///
/// An annotation decides. Else memory is the limit (of a pod, the sum that CRI says) and what the guest itself takes,
/// at least 128 MiB; CPUs are as many as the quota fills, or as the set names. Neither exceeds the host's.
pub fn size(spec: &Spec, settings: &Settings, host: Host) -> Size {
    let none = HashMap::new();
    let annotations = spec.annotations().as_ref().unwrap_or(&none);
    let pod = |name: &str| {
        let text = annotations.get(&format!("io.kubernetes.cri.sandbox-{name}"))?;
        text.parse::<i64>().ok().filter(|value| *value > 0)
    };
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let limit = resources.and_then(LinuxResources::memory_limit);
    let limit = pod("memory").or(limit).and_then(|bytes| u64::try_from(bytes).ok());
    let memory = settings.memory.unwrap_or_else(|| memory_for(limit, host));
    let cpu = resources.and_then(|resources| resources.cpu().as_ref());
    let quota = match (pod("cpu-quota"), pod("cpu-period")) {
        (Some(quota), period) => Some(quota_cpus(quota, period.unwrap_or(100_000))),
        _ => cpu.and_then(cpus_of),
    };
    let most = host.cpus.min(VcpuCount::MAX.into());
    let count = u64::from(quota.unwrap_or(1).clamp(1, most.max(1)));
    Size { cpus: settings.cpus.unwrap_or_else(|| count.try_into().unwrap_or_default()), memory }
}

/// The memory of a machine for what has this limit in all, in bytes.
pub fn memory_for(limit: Option<u64>, host: Host) -> MemSize {
    let Some(bytes) = limit else { return MemSize::default() };
    let mib = bytes.div_ceil(1 << 20);
    let wanted = mib.saturating_add(mib / OVERHEAD_SHARE).saturating_add(OVERHEAD_MIB);
    let most = host.memory_mib.clamp(DEFAULT_MIB, MemSize::MAX_MIB);
    wanted.clamp(DEFAULT_MIB, most).try_into().unwrap_or_default()
}

fn cpus_of(cpu: &LinuxCpu) -> Option<u32> {
    match cpu.quota().filter(|quota| *quota > 0) {
        Some(quota) => {
            let period =
                cpu.period().and_then(|period| i64::try_from(period).ok()).filter(|period| *period > 0);
            Some(quota_cpus(quota, period.unwrap_or(100_000)))
        }
        None => cpu.cpus().as_deref().and_then(cpu_count),
    }
}

/// The CPUs a quota fills, the last perhaps in part.
fn quota_cpus(quota: i64, period: i64) -> u32 {
    let count = quota.unsigned_abs().div_ceil(period.unsigned_abs().max(1));
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// The memory limit a list of resources sets.
trait MemoryLimit {
    fn memory_limit(&self) -> Option<i64>;
}

impl MemoryLimit for LinuxResources {
    fn memory_limit(&self) -> Option<i64> {
        self.memory().as_ref().and_then(|memory| memory.limit()).filter(|limit| *limit > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host = Host { cpus: 8, memory_mib: 16384 };

    fn sized(json: &str) -> (u8, u64) {
        let spec: Spec = serde_json::from_str(json).unwrap();
        let settings = Settings::of(spec.annotations().as_ref(), &ALLOWED).unwrap();
        let size = size(&spec, &settings, HOST);
        (size.cpus.get(), size.memory.mib())
    }

    #[test]
    fn a_container_that_asks_nothing_gets_the_smallest_machine() {
        assert_eq!(sized("{}"), (1, 128));
    }

    #[test]
    fn limits_size_the_machine_with_room_for_the_guest_itself() {
        assert_eq!(sized(r#"{"linux":{"resources":{"memory":{"limit":67108864}}}}"#), (1, 128));
        assert_eq!(sized(r#"{"linux":{"resources":{"memory":{"limit":1073741824}}}}"#), (1, 1104));
        assert_eq!(sized(r#"{"linux":{"resources":{"memory":{"limit":1099511627776}}}}"#), (1, 16384));
        assert_eq!(sized(r#"{"linux":{"resources":{"cpu":{"quota":250000,"period":100000}}}}"#), (3, 128));
        assert_eq!(sized(r#"{"linux":{"resources":{"cpu":{"cpus":"2,4-5"}}}}"#), (3, 128));
        assert_eq!(sized(r#"{"linux":{"resources":{"cpu":{"quota":9900000}}}}"#), (8, 128));
    }

    #[test]
    fn a_pod_is_sized_by_what_cri_says_of_it_all() {
        let pod = r#"{"annotations":{"io.kubernetes.cri.sandbox-memory":"268435456",
            "io.kubernetes.cri.sandbox-cpu-quota":"150000","io.kubernetes.cri.sandbox-cpu-period":"100000"}}"#;
        assert_eq!(sized(pod), (2, 312));
        assert_eq!(sized(r#"{"annotations":{"io.kubernetes.cri.sandbox-memory":"0"}}"#), (1, 128));
    }

    #[test]
    fn annotations_decide_where_they_are_allowed() {
        assert_eq!(sized(r#"{"annotations":{"io.mvm.memory":"1G","io.mvm.vcpus":"4"}}"#), (4, 1024));
        let annotations = HashMap::from([(UPPER_SIZE.to_owned(), "512M".to_owned())]);
        let settings = Settings::of(Some(&annotations), &ALLOWED).unwrap();
        assert_eq!((settings.upper_bytes, settings.template), (Some(512 << 20), None));
        assert_eq!(
            Settings::of(Some(&annotations), &[MEMORY]).unwrap_err().field,
            "annotations.io.mvm.upper_size"
        );
        let annotations = HashMap::from([(LIMITS.to_owned(), "disk-read=1M,net-send=5ops".to_owned())]);
        let limits = Settings::of(Some(&annotations), &ALLOWED).unwrap().limits;
        assert_eq!(limits, ["disk-read=1M", "net-send=5ops"].map(|limit| limit.parse().unwrap()));
        let annotations = HashMap::from([(TEMPLATE.to_owned(), "never".to_owned())]);
        assert_eq!(Settings::of(Some(&annotations), &ALLOWED).unwrap().template, Some(Choice::Never));
    }

    #[test]
    fn annotations_that_say_nothing_sensible_are_refused_by_name() {
        for (name, value) in [
            (MEMORY, "lots"),
            (VCPUS, "0"),
            (VCPUS, "33"),
            (TEMPLATE, "yes"),
            (LIMITS, "disk=1M"),
            ("io.mvm.kernel", "/x"),
        ] {
            let annotations = HashMap::from([(name.to_owned(), value.to_owned())]);
            let refused = Settings::of(Some(&annotations), &ALLOWED).unwrap_err();
            assert_eq!(refused.field, format!("annotations.{name}"));
        }
        let others = HashMap::from([("io.kubernetes.cri.sandbox-id".to_owned(), "x".to_owned())]);
        assert_eq!(Settings::of(Some(&others), &ALLOWED).unwrap(), Settings::default());
    }
}
