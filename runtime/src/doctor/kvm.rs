//! What KVM offers, and whether Linux guests can run on it.

use std::io::ErrorKind;

use mvm_vmm::kvm::probe::{Backend, Probe, probe};

use super::Row;

pub(super) fn rows() -> Vec<Row> {
    match probe() {
        Ok(probe) => vec![device(&probe), linux(&probe), timer(&probe)],
        Err(error) => {
            let remedy = match error.kind() {
                ErrorKind::NotFound => {
                    "load the kvm module (modprobe kvm_intel or kvm_amd), and switch on virtualisation in the firmware"
                }
                ErrorKind::PermissionDenied => {
                    "add yourself to the kvm group (usermod -aG kvm $USER), then log in again"
                }
                _ => "check that /dev/kvm is a working KVM device",
            };
            vec![Row::fail("kvm", format!("/dev/kvm: {error}"), remedy)]
        }
    }
}

fn device(probe: &Probe) -> Row {
    let backend = match probe.backend {
        Backend::Vmx => "Intel VT-x",
        Backend::Svm => "AMD-V",
        Backend::Pvm => "PVM, no hardware virtualisation",
        Backend::Unknown => "unknown back end",
    };
    if probe.missing.is_empty() {
        return Row::ok(
            "kvm",
            format!("/dev/kvm opens, {backend}, up to {} CPUs a machine", probe.max_vcpus),
        );
    }
    Row::fail("kvm", format!("{backend}; it lacks {}", probe.missing.join(", ")), "use a newer host kernel")
}

fn linux(probe: &Probe) -> Row {
    match probe.problem() {
        None => Row::ok("linux guests", "run natively"),
        Some(problem) => Row::fail(
            "linux guests",
            problem,
            "use a host with VT-x or AMD-V (nested virtualisation switched on, if it is a machine itself), or `make lab`",
        ),
    }
}

fn timer(probe: &Probe) -> Row {
    if probe.tsc_deadline {
        return Row::ok("timer", "TSC deadline");
    }
    Row::warn(
        "timer",
        "no TSC deadline mode",
        "guests boot 0.2 s later; use a host CPU and kernel that have it",
    )
}
