//! Hosts that are not as one would wish: each is an emulated host of its own.

use std::ffi::OsString;
use std::time::Duration;

use mvm_integration::lab::{self, Options};
use mvm_integration::programs::{demo_image, programs};

/// What Linux says when KVM's default is not what the host knows by now.
const UNFIT: &str = "user requested TSC rate below hardware speed";

/// What a shell prints in an emulated host that differs by these options.
fn on_host(options: &Options, script: &str) -> String {
    let options = Options { timeout: Duration::from_secs(180), ..options.clone() };
    let captured = lab::run_captured(&options, &["sh", "-c", script].map(OsString::from)).unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert_eq!(captured.outcome.status, 0, "{}{}", text(&captured.stdout), text(&captured.stderr));
    text(&captured.stdout)
}

/// Linux measures its TSC twice. KVM that is loaded in between remembers the first result. On virtual time it always is
/// loaded in between, however busy this host is.
#[test]
fn timers_fire_on_a_host_that_has_corrected_its_tsc_since_kvm_was_loaded() {
    // A gigahertz, and what a first measurement makes of it: shorter than one of a busy host was ever seen to be wrong,
    // by half a thousandth, and closer than the hundredth from which on Linux does not believe the second.
    let short = "tsc_early_khz=996000".to_owned();
    let prefix = programs();
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    demo_image(&image).unwrap();
    // Each sleep would take as long as the host is up: 40 of them, several times the limit.
    let script = format!(
        "export MVM_STATE=/tmp/state; timeout -s KILL 10 grep -m 1 'Refined TSC' /dev/kmsg; loop='for i in $(seq 40); do sleep 0.1; done'; timeout -s KILL 120 {}/bin/mvm run --template never {}:busybox -- sh -c \"$loop\" 2>&1; echo \"end $?\"; dmesg",
        prefix.display(),
        image.display()
    );
    let kernel_args = vec![short];
    let host = Options { kernel_args, copy: vec![prefix, image], deterministic: true, ..Options::default() };
    let said = on_host(&host, &script);
    assert!(said.lines().any(|line| line == "end 0"), "{said}");
    assert!(said.contains(UNFIT), "KVM was loaded when the TSC had been measured again: {said}");
}

/// Without a TSC, Linux knows no frequency of it and KVM fires no timer by it.
#[test]
fn a_host_that_knows_no_frequency_of_its_tsc_is_refused_at_once() {
    let prefix = programs();
    let qemu_args = ["-cpu", "max,-tsc"].map(OsString::from).to_vec();
    let kernel = prefix.join("share/mvm/vmlinux");
    let script = format!(
        "timeout -s KILL 30 {}/bin/mvm boot --kernel {} 2>&1; echo \"end $?\"",
        prefix.display(),
        kernel.display()
    );
    let said = on_host(&Options { qemu_args, copy: vec![prefix], ..Options::default() }, &script);
    assert!(
        said.contains("this host's KVM lacks a time stamp counter whose frequency the host knows"),
        "{said}"
    );
    assert!(said.lines().any(|line| line == "end 125"), "{said}");
}
