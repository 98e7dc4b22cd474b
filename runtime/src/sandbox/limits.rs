//! What a container's limits may be raised to: what its machine can become. Its CPUs are settled when it is started.

use oci_spec::runtime::LinuxResources;

use crate::spec::{Refused, Size, VCPUS};

/// From here on a limit is none: engines say "unlimited" of memory as the most pages a signed count of bytes holds.
const UNLIMITED: i64 = i64::MAX & !0xfff;
/// Period of the CPU quota when only a quota is given, in microseconds.
const PERIOD: u64 = 100_000;

/// The limits that are held against a machine's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sizes {
    /// Memory in bytes, 0 without limit.
    pub(super) memory: u64,
    /// The CPUs' time in each period, both in microseconds; 0 without limit.
    quota: u64,
    period: u64,
}

impl Sizes {
    /// Those among a container's limits.
    pub(super) fn of(resources: Option<&LinuxResources>) -> Self {
        let memory = resources.and_then(|resources| resources.memory().as_ref());
        let memory = memory.and_then(|memory| memory.limit()).filter(|limit| *limit < UNLIMITED);
        let cpu = resources.and_then(|resources| resources.cpu().as_ref());
        let quota = cpu.and_then(|cpu| cpu.quota());
        let period = cpu.and_then(|cpu| cpu.period()).filter(|period| *period > 0);
        Self {
            memory: memory.and_then(|limit| u64::try_from(limit).ok()).unwrap_or(0),
            quota: quota.and_then(|quota| u64::try_from(quota).ok()).unwrap_or(0),
            period: period.unwrap_or(PERIOD),
        }
    }

    /// Whether these limits say anything of memory.
    pub(super) fn name_memory(resources: &LinuxResources) -> bool {
        resources.memory().as_ref().is_some_and(|memory| memory.limit().is_some())
    }

    /// Refuses what a machine that can become this large cannot give: it would be promised and not be there. What the container
    /// was made with is not raised by saying it again.
    pub(super) fn fit(&self, size: &Size, made_with: &Self) -> Result<(), Refused> {
        let (limit, mib) = (self.memory, size.memory.mib());
        if limit > size.memory.bytes() && limit > made_with.memory {
            let reason = format!(
                "{limit} bytes are more than the {mib} MiB that the machine can have at most: this host has no more"
            );
            return Err(Refused::new("linux.resources.memory.limit", reason));
        }
        let (quota, period, cpus) = (self.quota, self.period, size.cpus.get());
        let is_new = (quota, period) != (made_with.quota, made_with.period);
        if quota > period.saturating_mul(cpus.into()) && is_new {
            let reason = format!(
                "{quota} us of each {period} us are more than the machine's CPUs, {cpus}, which cannot become more \
                 while it runs: make the container with a larger quota, or with the annotation {VCPUS}"
            );
            return Err(Refused::new("linux.resources.cpu.quota", reason));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_raised_up_to_the_machines_size_and_no_further() {
        let size = Size { cpus: 2_u64.try_into().unwrap(), memory: 256_u64.try_into().unwrap() };
        let sizes = |json: &str| Sizes::of(Some(&serde_json::from_str(json).unwrap()));
        let made_with = sizes(r#"{"memory":{"limit":300000000},"cpu":{"quota":300000}}"#);
        let refused = |json: &str| {
            let refused = sizes(json).fit(&size, &made_with).err();
            refused.map_or(String::new(), |refused| refused.to_string())
        };
        for fine in [
            "{}",
            r#"{"memory":{"limit":268435456},"cpu":{"quota":200000}}"#,
            r#"{"memory":{"limit":-1},"cpu":{"quota":-1}}"#,
            r#"{"memory":{"limit":9223372036854771712},"cpu":{"quota":0,"period":0}}"#,
            r#"{"cpu":{"quota":20000,"period":10000,"shares":100000}}"#,
            r#"{"memory":{"limit":300000000},"cpu":{"quota":300000}}"#,
        ] {
            assert_eq!(refused(fine), "", "{fine}");
        }
        let memory = refused(r#"{"memory":{"limit":300000001}}"#);
        assert!(memory.contains("memory.limit") && memory.contains("256 MiB"), "{memory}");
        assert!(memory.contains("this host has no more"), "{memory}");
        for quota in ["200001", r#"20001,"period":10000"#] {
            let cpu = refused(&format!(r#"{{"cpu":{{"quota":{quota}}}}}"#));
            assert!(cpu.contains("cpu.quota") && cpu.contains("io.mvm.vcpus"), "{cpu}");
        }
    }
}
