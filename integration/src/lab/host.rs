//! Whether this machine's own KVM can run an unmodified Linux guest.

use std::path::Path;

/// Whether an unmodified Linux guest runs on this machine's own KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Hardware virtualisation under KVM.
    Yes,
    /// No KVM device here.
    NoKvm,
    /// KVM without VT-x or AMD-V (the PVM back end): ring-0 flat guests run, Linux does not.
    NoHardware,
    /// The KVM device is there but may not be opened.
    NoAccess,
}

impl Verdict {
    /// True when a Linux guest runs natively.
    #[must_use]
    pub fn runs_linux(self) -> bool {
        self == Self::Yes
    }

    /// One clause that says why not, or that it does.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Yes => "KVM has hardware virtualisation",
            Self::NoKvm => "/dev/kvm is missing",
            Self::NoHardware => "KVM has no hardware virtualisation (no vmx or svm flag; kvm_pvm)",
            Self::NoAccess => "/dev/kvm may not be opened for writing",
        }
    }
}

/// Looks at /dev/kvm, the CPU's flags and the KVM back end.
#[must_use]
pub fn host_runs_linux() -> Verdict {
    if !Path::new("/dev/kvm").exists() {
        return Verdict::NoKvm;
    }
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if Path::new("/sys/module/kvm_pvm").exists() || !has_hardware(&cpuinfo) {
        return Verdict::NoHardware;
    }
    match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Verdict::Yes,
        Err(_) => Verdict::NoAccess,
    }
}

fn has_hardware(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| key.trim() == "flags")
        .any(|(_, flags)| flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_vendors_flag_is_hardware() {
        assert!(has_hardware("processor\t: 0\nflags\t\t: fpu vmx sse\n"));
        assert!(has_hardware("flags\t\t: fpu svm\n"));
    }

    #[test]
    fn a_flag_that_only_contains_the_name_is_not_hardware() {
        assert!(!has_hardware("flags\t\t: fpu svm_lock vmx_flags\nvmx flags\t: vmx\nbugs\t\t: svm\n"));
    }
}
