//! What this host's KVM can do, for `mvm doctor` and before a machine is started.
//!
//! Opens files: for processes that start machines, never for a machine itself.

use std::fs;
use std::io;
use std::path::Path;

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use super::host::REQUIRED;
use crate::config::VcpuCount;

/// What a user of such a host is told.
pub const PVM: &str = "this host's KVM is PVM, without hardware virtualisation: an unmodified Linux kernel ends in \
     KVM_EXIT_INTERNAL_ERROR (emulation); use a host with VT-x or AMD-V, or the lab (`make lab`)";

/// What executes guest instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// Intel VT-x.
    Vmx,
    /// AMD-V.
    Svm,
    /// PVM: no hardware virtualisation; unmodified kernels are interpreted and fail.
    Pvm,
    /// None of these.
    Unknown,
}

impl Backend {
    /// Whether an unmodified Linux kernel runs on it.
    pub fn runs_linux(self) -> bool {
        matches!(self, Backend::Vmx | Backend::Svm)
    }
}

/// A host's KVM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// What executes guest instructions.
    pub backend: Backend,
    /// Capabilities mvm needs and this KVM lacks.
    pub missing: Vec<String>,
    /// Most virtual CPUs of a machine, by KVM and by mvm.
    pub max_vcpus: u8,
    /// Whether the local APIC's timer has a deadline mode; without it a guest boots 200 ms later.
    pub tsc_deadline: bool,
}

impl Probe {
    /// Whether an unmodified Linux kernel can run in a machine here.
    pub fn runs_linux(&self) -> bool {
        self.backend.runs_linux() && self.missing.is_empty()
    }

    /// Why Linux cannot run here and what to do, or `None` if it can.
    pub fn problem(&self) -> Option<String> {
        if !self.missing.is_empty() {
            return Some(format!("this host's KVM lacks {}: use a newer kernel", self.missing.join(", ")));
        }
        match self.backend {
            Backend::Vmx | Backend::Svm => None,
            Backend::Pvm => Some(PVM.to_owned()),
            Backend::Unknown => Some("this host's CPU shows neither VT-x nor AMD-V".to_owned()),
        }
    }
}

/// Opens `/dev/kvm` and asks. An error means that machines cannot be started at all.
pub fn probe() -> io::Result<Probe> {
    let kvm = Kvm::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    let missing = REQUIRED
        .iter()
        .filter(|(capability, _)| !kvm.check_extension(*capability))
        .map(|(_, name)| (*name).to_owned())
        .collect();
    let max_vcpus = u8::try_from(kvm.get_max_vcpus()).unwrap_or(u8::MAX).min(VcpuCount::MAX);
    let tsc_deadline = kvm.check_extension(kvm_ioctls::Cap::TscDeadlineTimer);
    Ok(Probe { backend: backend(), missing, max_vcpus, tsc_deadline })
}

/// Whether KVM's back end is PVM, on which only guests made for it and flat ring-0 guests run. One look at
/// sysfs: cheap enough for every start.
pub fn is_pvm() -> bool {
    Path::new("/sys/module/kvm_pvm").exists()
}

fn backend() -> Backend {
    if is_pvm() {
        return Backend::Pvm;
    }
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    backend_by_flags(&cpuinfo)
}

fn backend_by_flags(cpuinfo: &str) -> Backend {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag| flags.split_ascii_whitespace().any(|word| word == flag);
    match (has("vmx"), has("svm")) {
        (true, _) => Backend::Vmx,
        (_, true) => Backend::Svm,
        _ => Backend::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_back_end_is_read_off_the_cpu_flags() {
        assert_eq!(backend_by_flags("model : x\nflags\t\t: fpu svm lm\n"), Backend::Svm);
        assert_eq!(backend_by_flags("flags\t\t: fpu vmx\n"), Backend::Vmx);
        assert_eq!(backend_by_flags("flags\t\t: fpu svm_lock\n"), Backend::Unknown);
    }

    #[test]
    fn a_host_without_virtualisation_is_told_of_the_lab() {
        let probe = Probe { backend: Backend::Pvm, missing: vec![], max_vcpus: 32, tsc_deadline: true };
        assert!(!probe.runs_linux());
        assert!(probe.problem().unwrap().contains("make lab"));
    }
}
