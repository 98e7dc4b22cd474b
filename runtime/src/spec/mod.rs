//! A container's specification (`config.json`, OCI runtime spec 1.2) in the words of the agent.
//!
//! Every field is either honoured, or ignored where that costs the container nothing it could notice or count on, or
//! refused with one error that names it. The table in `docs/oci-spec.md` says which; a test feeds each of its rows to
//! this module.

mod capabilities;
mod devices;
mod mounts;
mod namespaces;
mod process;
mod refused;
mod resources;
mod seccomp;
mod settings;
mod syscalls;
#[cfg(test)]
mod table_tests;

pub use devices::HostDisk;
pub use mounts::{HostMount, MountPart};
pub use namespaces::Spaces;
pub use process::{ProcessPart, process};
pub use refused::{Refused, Result};
pub use resources::limits;
pub use seccomp::{Profile, profile};
pub use settings::{
    ALLOWED, Host, LIMITS, MEMORY, PREFIX, Settings, Size, TEMPLATE, UPPER_SIZE, VCPUS, memory_for, size,
};

use std::path::Path;

use mvm_protocol::Surroundings;
use oci_spec::runtime::{Linux, LinuxResources, Spec};

/// A container's specification, translated as far as it can be without looking at the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Translated {
    /// What surrounds its processes; without mounts, which are beside it.
    pub surroundings: Surroundings,
    /// Its mounts, in order.
    pub mounts: Vec<MountPart>,
    /// Disks of the host that it gets the nodes of.
    pub disks: Vec<HostDisk>,
    /// Its name spaces.
    pub spaces: Spaces,
    /// Its system call filter.
    pub profile: Profile,
}

/// Translates the specification of a container whose bundle is at `bundle`, for a machine of `cpus` CPUs.
///
/// # Errors
/// The first field that cannot be honoured.
pub fn translate(spec: &Spec, bundle: &Path, cpus: u8) -> Result<Translated> {
    check_other_systems(spec)?;
    check_hooks(spec)?;
    let linux = spec.linux().as_ref();
    linux.map_or(Ok(()), check_linux)?;
    let spaces = namespaces::spaces(linux)?;
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    let given = linux.and_then(|linux| linux.devices().as_deref()).unwrap_or_default();
    let (nodes, disks) = devices::nodes(given, rules)?;
    let surroundings = Surroundings {
        namespaces: spaces.namespaces.clone(),
        hostname: spec.hostname().clone(),
        domainname: spec.domainname().clone(),
        mounts: Vec::new(),
        device_rules: devices::rules(rules, &nodes)?,
        devices: nodes,
        disks: Vec::new(),
        masked_paths: paths(linux.and_then(|linux| linux.masked_paths().as_deref()), "maskedPaths")?,
        read_only_paths: paths(linux.and_then(|linux| linux.readonly_paths().as_deref()), "readonlyPaths")?,
        read_only_root: spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false),
        root_propagation: linux.map_or(Ok(0), root_propagation)?,
        sysctls: linux.map_or_else(|| Ok(Vec::new()), sysctls)?,
        limits: resources
            .map_or_else(|| Ok(Default::default()), |given: &LinuxResources| limits(given, cpus))?,
    };
    Ok(Translated {
        surroundings,
        mounts: mounts::mounts(spec.mounts().as_deref().unwrap_or_default(), bundle)?,
        disks,
        spaces,
        profile: profile(linux.and_then(|linux| linux.seccomp().as_ref()))?,
    })
}

fn check_other_systems(spec: &Spec) -> Result<()> {
    for (field, given) in [
        ("solaris", spec.solaris().is_some()),
        ("windows", spec.windows().is_some()),
        ("zos", spec.zos().is_some()),
    ] {
        if given {
            return Err(Refused::new(field, "the guest is a Linux"));
        }
    }
    match spec.vm() {
        Some(_) => {
            Err(Refused::new("vm", "the machine is configured by its engine and by annotations io.mvm.*"))
        }
        None => Ok(()),
    }
}

fn check_hooks(spec: &Spec) -> Result<()> {
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    #[allow(deprecated)] // what is deprecated is still met
    let kinds = [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (kind, hooks) in kinds {
        if hooks.as_ref().is_some_and(|hooks| !hooks.is_empty()) {
            let reason = "hooks are programs of the host that change a container's name spaces, which are in a machine";
            return Err(Refused::new(format!("hooks.{kind}"), reason));
        }
    }
    Ok(())
}

/// Fields of `linux` that can only be refused.
fn check_linux(linux: &Linux) -> Result<()> {
    let mapped = "owners are not mapped in a machine: its kernel is what keeps the container from the host";
    let some = |given: bool, field: &str, reason: &str| match given {
        true => Err(Refused::new(format!("linux.{field}"), reason)),
        false => Ok(()),
    };
    some(linux.uid_mappings().as_ref().is_some_and(|list| !list.is_empty()), "uidMappings", mapped)?;
    some(linux.gid_mappings().as_ref().is_some_and(|list| !list.is_empty()), "gidMappings", mapped)?;
    let host_links =
        "interfaces of the host are not moved into a machine, they are mirrored by its network name space";
    some(linux.net_devices().as_ref().is_some_and(|map| !map.is_empty()), "netDevices", host_links)?;
    some(
        linux.intel_rdt().is_some(),
        "intelRdt",
        "the machine has no cache or memory bandwidth to allocate",
    )?;
    some(linux.memory_policy().is_some(), "memoryPolicy", "the machine has one memory node")?;
    some(
        linux.personality().as_ref().is_some_and(|given| {
            given.domain() != oci_spec::runtime::LinuxPersonalityDomain::PerLinux
                || given.flags().as_ref().is_some_and(|flags| !flags.is_empty())
        }),
        "personality",
        "the guest's kernel runs 64-bit programs only",
    )?;
    let offsets = linux.time_offsets().iter().flatten();
    let set = offsets
        .into_iter()
        .any(|(_, offset)| offset.secs().unwrap_or(0) != 0 || offset.nanosecs().unwrap_or(0) != 0);
    some(set, "timeOffsets", "no time name space is made: clocks are the machine's")
}

fn paths(given: Option<&[String]>, field: &str) -> Result<Vec<String>> {
    let given = given.unwrap_or_default();
    match given.iter().find(|path| !path.starts_with('/')) {
        Some(path) => Err(Refused::new(format!("linux.{field}"), format!("{path:?} is no absolute path"))),
        None => Ok(given.to_vec()),
    }
}

fn root_propagation(linux: &Linux) -> Result<u64> {
    let Some(name) = linux.rootfs_propagation().as_deref().filter(|name| !name.is_empty()) else {
        return Ok(0);
    };
    let wrong = || Refused::new("linux.rootfsPropagation", format!("{name:?} is no propagation"));
    mounts::propagation(name).ok_or_else(wrong)
}

/// Kernel parameters in the order of their names.
fn sysctls(linux: &Linux) -> Result<Vec<(String, String)>> {
    let mut sysctls: Vec<_> = linux.sysctl().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
    sysctls.sort();
    for (name, _) in &sysctls {
        let refuse = |why: &str| Err(Refused::new("linux.sysctl", format!("{name:?} {why}")));
        let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
        if name.is_empty() || !name.chars().all(ok) || name.contains("..") || name.starts_with(['.', '/']) {
            return refuse("names no kernel parameter");
        }
        if matches!(name.as_str(), "kernel.hostname" | "kernel/hostname") {
            return refuse("is what `hostname` says");
        }
    }
    Ok(sysctls)
}
