//! `mvm boot --print-config` only prints.

use std::path::Path;
use std::process::{Command, Stdio};

use mvm_vmm::config::MachineConfig;

#[test]
fn printing_the_configuration_needs_no_file_and_makes_none() {
    let sockets = Path::new(env!("CARGO_TARGET_TMPDIR")).join("no-sockets");
    let mut command = Command::new(env!("CARGO_BIN_EXE_mvm"));
    command.args(["boot", "--print-config", "--console", "--kernel", "/no/such/kernel"]);
    command.args(["--disk", "/no/such/disk,ro,serial=d", "--net", "tap=nosuch0", "--sockets"]).arg(&sockets);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let config: MachineConfig = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(config.devices.len(), 4, "disk, card, vsock, console");
    assert!(!sockets.exists());
    assert!(!Path::new("/sys/class/net/nosuch0").exists());
}
