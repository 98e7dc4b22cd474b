//! This host's own KVM, whatever its back end: what `mvm` says where Linux cannot run.

use mvm_integration::programs::programs;
use std::io::Write;
use std::process::{Command, ExitCode, Stdio};

use libtest_mimic::{Arguments, Trial};
use mvm_vmm::kvm::probe::is_pvm;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // Elsewhere there is nothing to refuse: Linux guests run.
    let trials = vec![
        Trial::test("run_on_a_pvm_host_is_refused_at_once_with_the_way_out", run_is_refused)
            .with_ignored_flag(!is_pvm()),
        Trial::test("boot_on_a_pvm_host_warns_first_and_then_says_what_happened", boot_says)
            .with_ignored_flag(!is_pvm()),
    ];
    if !is_pvm() {
        let why = "skipped: these tests are about hosts whose KVM is PVM, which this one's is not";
        let _ = writeln!(std::io::stdout(), "native: {why}");
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn run_is_refused() -> Result<(), libtest_mimic::Failed> {
    let state = tempfile::tempdir()?;
    let root = mvm_integration::vm::image();
    let mut command = Command::new(programs().join("bin/mvm"));
    command.arg("run").arg(root).args(["--name", "otter", "--", "true"]).env("MVM_STATE", state.path());
    let output = command.stdin(Stdio::null()).output()?;
    let text = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(125), "{text}");
    let report = text.split_once("mvm: cannot boot machine otter\n").expect("the failure").1;
    assert!(
        report.starts_with("  because: this host's KVM is PVM, without hardware virtualisation"),
        "{text}"
    );
    assert!(report.contains("KVM_EXIT_INTERNAL_ERROR (emulation)"), "{text}");
    assert!(report.contains("\n  help:    make lab CMD="), "{text}");
    Ok(())
}

fn boot_says() -> Result<(), libtest_mimic::Failed> {
    let mut command = Command::new(programs().join("bin/mvm"));
    command.args(["boot", "--kernel"]).arg(programs().join("share/mvm/vmlinux"));
    let output = command.stdin(Stdio::null()).output()?;
    let text = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(125), "{text}");
    let mut lines = text.lines();
    assert!(lines.next().unwrap_or_default().starts_with("mvm: warning: this host's KVM is PVM"), "{text}");
    let end = lines.next().unwrap_or_default();
    assert!(end.starts_with("mvm: machine boot-") && end.contains("KVM_EXIT_INTERNAL_ERROR"), "{text}");
    assert!(end.contains("make lab"), "{text}");
    Ok(())
}
