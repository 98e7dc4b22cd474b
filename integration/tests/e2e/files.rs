//! Disks and what is on them.

use std::path::PathBuf;
use std::process::Command;

use mvm_integration::vm::{TestVm, scratch};
use mvm_vmm::exit::Exit;

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("what_is_written_to_a_disk_is_there_after_a_reboot", survives_reboot),
    ("a_full_upper_layer_is_the_guests_problem_alone", full_upper),
];

/// A sparse raw disk with an empty ext4 file system.
pub(crate) fn ext4_disk(name: &str, mib: u64) -> PathBuf {
    let path = scratch().join(name);
    let file = std::fs::File::create(&path).expect("a file");
    file.set_len(mib << 20).expect("a size");
    let made =
        Command::new("mke2fs").args(["-q", "-t", "ext4", "-F"]).arg(&path).status().expect("e2fsprogs");
    assert!(made.success());
    path
}

fn survives_reboot() {
    let disk = ext4_disk("survives.ext4", 64);
    let mut vm = TestVm::new().upper_disk(&disk).boot();
    let written = vm.sh("head -c 5000000 /dev/urandom > /kept; sync; sha256sum < /kept");
    assert_eq!(vm.power_off(), Exit::Shutdown);
    let clean = Command::new("e2fsck").arg("-fn").arg(&disk).output().expect("e2fsprogs");
    assert!(clean.status.success(), "{}", String::from_utf8_lossy(&clean.stdout));
    let mut vm = TestVm::new().upper_disk(&disk).boot();
    assert_eq!(vm.sh("sha256sum < /kept"), written);
}

fn full_upper() {
    let disk = ext4_disk("full.ext4", 16);
    let mut vm = TestVm::new().upper_disk(&disk).boot();
    let output = vm.output("dd if=/dev/zero of=/big bs=1M count=100", b"");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(complaint.contains("No space left"), "{complaint}{}", vm.sh("dmesg | tail -n 20"));
    assert_eq!(vm.sh("rm /big; echo room > /small; cat /small"), "room\n");
}
