//! `mvm boot`: kernels, consoles, and the ways a machine ends.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use mvm_integration::vm::{PATIENCE, TestVm, initrd, scratch};
use mvm_protocol::ShutdownMode;
use mvm_vmm::exit::Exit;

use crate::{Test, mvm, programs};

pub(crate) const TESTS: &[Test] = &[
    ("boot_shows_the_guests_console_and_ends_with_power_off", power_off),
    ("boot_tells_reboot_panic_and_power_off_apart", endings),
    ("a_stock_debian_kernel_boots_from_its_bzimage", debian),
    ("a_read_only_disk_refuses_writes_and_a_writable_one_keeps_them", disks),
    ("a_machine_does_not_outlive_a_killed_mvm", orphaned),
    ("an_orderly_shutdown_and_reboot_through_the_agent_are_told_apart", through_the_agent),
];

fn our_kernel() -> PathBuf {
    programs().join("share/mvm/vmlinux")
}

fn boot(kernel: &Path, initrd: &Path, more: &[&str]) -> Output {
    let mut command = mvm();
    command.arg("boot").arg("--kernel").arg(kernel).arg("--initrd").arg(initrd).args(more);
    command.stdin(Stdio::null()).output().expect("mvm is built")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\r', "")
}

fn power_off() {
    let initrd = initrd("power-off", "echo \"cpus $(nproc)\"; uname -r; poweroff -f");
    let output = boot(&our_kernel(), &initrd, &["--console", "--cpus", "2", "--cmdline", "quiet panic=-1"]);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(stdout.contains("cpus 2\n"), "{stdout}{stderr}");
    assert!(stdout.contains("-mvm\n"), "{stdout}");
    assert!(stderr.contains("powered off"), "{stderr}");
    assert_eq!(output.status.code(), Some(0));
}

fn endings() {
    for (name, script, code, words) in
        [("reboot", "reboot -f", 3, "reboot"), ("panic", "exit 1", 4, "panicked")]
    {
        let output = boot(&our_kernel(), &initrd(name, script), &["--cmdline", "quiet panic=-1"]);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{name}: {stderr}");
        assert!(stderr.contains(words), "{name}: {stderr}");
    }
}

fn debian() {
    let kernel = std::env::var_os("MVM_TEST_DEBIAN_KERNEL").expect("`make e2e` names a stock Debian kernel");
    // Through the kernel's log, which is out when it returns: the serial port has no interrupt, and what its
    // driver still holds is lost at a forced power-off.
    let initrd = initrd("debian", "echo \"<0>debian says $(uname -r)\" > /dev/kmsg; poweroff -f");
    let output = boot(
        Path::new(&kernel),
        &initrd,
        &["--console=serial", "--memory", "256M", "--cmdline", "quiet panic=-1"],
    );
    let stdout = text(&output.stdout);
    assert!(
        stdout.contains("debian says 6.") && stdout.contains("-amd64"),
        "{stdout}{}",
        text(&output.stderr)
    );
    assert_eq!(output.status.code(), Some(0));
}

fn disks() {
    let (fixed, kept) = (scratch().join("fixed.img"), scratch().join("kept.img"));
    std::fs::write(&fixed, vec![b'f'; 1 << 20]).expect("a file");
    std::fs::write(&kept, vec![b'k'; 1 << 20]).expect("a file");
    let script = "cat /sys/block/vda/ro /sys/block/vdb/ro /sys/block/vdb/serial; \
        echo changed | dd of=/dev/vda conv=notrunc 2>&1 | grep -o 'not permitted' ; \
        echo changed | dd of=/dev/vdb conv=notrunc,fsync 2>/dev/null && echo written; \
        dd if=/dev/vda bs=4 count=1 2>/dev/null; poweroff -f";
    let (ro, rw) = (format!("{},ro", fixed.display()), format!("{},serial=kept", kept.display()));
    let arguments = ["--console", "--disk", &ro, "--disk", &rw, "--cmdline", "quiet panic=-1"];
    let output = boot(&our_kernel(), &initrd("disks", script), &arguments);
    let stdout = text(&output.stdout);
    assert!(stdout.contains("1\n0\nkept"), "{stdout}{}", text(&output.stderr));
    assert!(
        stdout.contains("not permitted") && stdout.contains("written\n") && stdout.contains("ffff"),
        "{stdout}"
    );
    assert!(std::fs::read(&fixed).expect("a file").iter().all(|byte| *byte == b'f'));
    assert!(std::fs::read(&kept).expect("a file").starts_with(b"changed\nkkk"));
}

fn orphaned() {
    let initrd = initrd("orphaned", "echo up; while :; do sleep 1000; done");
    let mut command = mvm();
    command.arg("boot").arg("--kernel").arg(our_kernel()).arg("--initrd").arg(initrd).arg("--console");
    let child =
        command.args(["--cmdline", "quiet panic=-1"]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = child.expect("mvm is built");
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().expect("asked for")).read_line(&mut line).expect("it speaks");
    assert_eq!(line.trim(), "up");
    let children = format!("/proc/{0}/task/{0}/children", child.id());
    let children = std::fs::read_to_string(children).expect("a process");
    let machine = Path::new("/proc").join(children.trim());
    assert!(std::fs::read_to_string(machine.join("comm")).expect("its machine").contains("mvm-vmm"));
    child.kill().expect("SIGKILL");
    child.wait().expect("it ends");
    let end = Instant::now() + PATIENCE;
    // As a zombie it is gone, too: nobody may be there to wait for it.
    while std::fs::read_link(machine.join("exe")).is_ok() {
        assert!(Instant::now() < end, "it lives on");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn through_the_agent() {
    assert_eq!(TestVm::new().boot().shut_down(ShutdownMode::PowerOff), Exit::Shutdown);
    assert_eq!(TestVm::new().boot().shut_down(ShutdownMode::Reboot), Exit::Reboot);
}
