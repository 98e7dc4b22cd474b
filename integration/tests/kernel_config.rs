//! The guest kernel drives every device this tree lists.

use std::path::Path;
use std::process::Command;

use mvm_devices::virtio::KINDS;

#[test]
fn every_listed_devices_driver_is_built_into_every_kernel() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernel-config/build.sh");
    for variant in ["smp", "up", "hardened", "debug"] {
        let output = Command::new(&script).args(["--variant", variant, "--print-config"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let config = String::from_utf8(output.stdout).unwrap();
        for kind in KINDS {
            let wanted = format!("{}=y", kind.guest_config);
            assert!(
                config.lines().any(|line| line == wanted),
                "{variant} lacks {wanted}, which drives {}",
                kind.name
            );
        }
    }
}
