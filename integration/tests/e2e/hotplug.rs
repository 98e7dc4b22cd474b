//! Devices that come and go while the guest runs.

use std::fs::File;
use std::path::{Path, PathBuf};

use mvm_integration::vm::{TestVm, Vm, scratch, state};
use mvm_protocol::ShutdownMode;
use mvm_runtime::container::root_file_system;
use mvm_runtime::machine::{DeviceName, Disk, OpenTap};
use mvm_runtime::net::open_tap;
use mvm_vmm::exit::Exit;

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("a_disk_is_attached_read_removed_and_replaced_by_another_in_its_slot", replaced),
    ("a_disk_in_use_stays_unless_forced_and_is_gone_then", forced),
    ("a_writable_disk_that_was_attached_later_keeps_what_is_written", written),
    ("a_network_interface_is_attached_with_its_mtu_and_carries_frames", interface),
    ("disks_come_and_go_many_times_and_leave_nothing_behind", many),
];

/// Where the guest sees the bus.
const PREPARE: &str = "mount -o remount,rw /sys; mount -t devtmpfs dev /dev; mkdir -p /mnt";
const RESCAN: &str = "echo 1 > /sys/bus/pci/rescan";

/// An EROFS image with `text` in the file `word`.
fn image(name: &str, text: &str) -> PathBuf {
    let root = scratch().join(format!("{name}.root"));
    std::fs::create_dir_all(&root).expect("a directory");
    std::fs::write(root.join("word"), text).expect("a file");
    let made = root_file_system(&root.display().to_string(), &state(), &mut ());
    made.unwrap_or_else(|failure| panic!("{}", failure.report())).path
}

fn disk(path: &Path, serial: &str, read_only: bool) -> Disk {
    Disk { path: path.to_path_buf(), read_only, serial: serial.to_owned(), throwaway: false }
}

/// Shell code that sets `d` to the name of the disk with this serial.
fn find(serial: &str) -> String {
    format!("d=$(basename $(dirname $(grep -l -x {serial} /sys/block/*/serial)))")
}

/// Shell code that has the guest give the disk `$d` up.
const REMOVE: &str = "echo 1 > $(readlink -f /sys/block/$d/device/..)/remove";

fn attach(vm: &Vm, disk: &Disk) -> u8 {
    let attached = vm.container.machine.control().attach_disk(disk);
    attached.unwrap_or_else(|failure| panic!("{}", failure.report())).device
}

fn detach(vm: &Vm, serial: &str) {
    let detached = vm.container.machine.control().detach_disk(serial);
    detached.unwrap_or_else(|failure| panic!("{}", failure.report()));
}

/// Files that the machine's process has open, by their names.
fn open_files(vm: &Vm) -> Vec<PathBuf> {
    let fds = std::fs::read_dir(format!("/proc/{}/fd", vm.container.machine.pid())).expect("a process");
    fds.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok()).collect()
}

/// How many of them there are but sockets: a stream of a process that has ended is closed a moment later.
fn kept_files(vm: &Vm) -> usize {
    open_files(vm).iter().filter(|path| !path.to_string_lossy().starts_with("socket:")).count()
}

fn replaced() {
    let (first, second) = (image("first", "badger"), image("second", "otter"));
    let mut vm = TestVm::new().cpus(2).boot();
    vm.sh(PREPARE);
    let mount = format!("{RESCAN}; {}; mount -t erofs -o ro /dev/$d /mnt; cat /mnt/word", find("extra"));
    let mut numbers = Vec::new();
    for (path, word) in [(&first, "badger"), (&second, "otter")] {
        numbers.push(attach(&vm, &disk(path, "extra", true)));
        assert_eq!(vm.sh(&mount), word);
        assert!(open_files(&vm).contains(path));
        vm.sh(&format!("{}; umount /mnt; {REMOVE}", find("extra")));
        detach(&vm, "extra");
        assert!(!open_files(&vm).contains(path), "its image is closed");
        assert_eq!(vm.sh("grep -c -x extra /sys/block/*/serial | grep -c ':1$' || true"), "0\n");
    }
    assert_eq!(numbers[0], numbers[1], "the slot was free again");
    assert_eq!(vm.shut_down(ShutdownMode::PowerOff), Exit::Shutdown);
}

fn forced() {
    let path = image("used", "lynx");
    let mut vm = TestVm::new().boot();
    vm.sh(PREPARE);
    let number = attach(&vm, &disk(&path, "used", true));
    let control = vm.container.machine.control().clone();
    let twice = control.attach_disk(&disk(&path, "used", true)).expect_err("one has this name").report();
    assert!(twice.contains("attached already"), "{twice}");
    vm.sh(&format!("{RESCAN}; {}; head -c 16 /dev/$d > /dev/null", find("used")));
    let refused = control.detach_disk("used").expect_err("the driver runs").report();
    assert!(refused.contains("the guest uses it"), "{refused}");
    control.detach(DeviceName::Number(number), true).unwrap_or_else(|failure| panic!("{}", failure.report()));
    assert!(!open_files(&vm).contains(&path));
    let pulled = format!("cat /sys/bus/pci/devices/0000:00:{number:02x}.0/vendor");
    // The guest does not know yet; it lives, and what it reads of the function itself is all ones.
    assert_eq!(vm.sh(&pulled), "0x1af4\n");
    let raw = format!("od -An -tx4 -N4 /sys/bus/pci/devices/0000:00:{number:02x}.0/config");
    assert_eq!(vm.sh(&raw).trim(), "ffffffff");
    // It would wait for ever for the function's reset when it shuts down, so it is not asked to.
    vm.container.end().unwrap_or_else(|failure| panic!("{}", failure.report()));
}

fn written() {
    let path = scratch().join("written-later.img");
    File::create(&path).and_then(|file| file.set_len(1 << 20)).expect("a file");
    let mut vm = TestVm::new().boot();
    vm.sh(PREPARE);
    attach(&vm, &disk(&path, "later", false));
    vm.sh(&format!("{RESCAN}; {}; echo kept | dd of=/dev/$d conv=notrunc,fsync 2>/dev/null", find("later")));
    vm.sh(&format!("{}; {REMOVE}", find("later")));
    detach(&vm, "later");
    assert!(std::fs::read(&path).expect("a file").starts_with(b"kept\n"));
    assert_eq!(vm.shut_down(ShutdownMode::PowerOff), Exit::Shutdown);
}

fn interface() {
    let tap = open_tap("mvmhot0").unwrap_or_else(|failure| panic!("{}", failure.report()));
    let up = "ip addr add 10.77.0.1/24 dev mvmhot0 && ip link set mvmhot0 up mtu 1400";
    let status = std::process::Command::new("sh").args(["-c", up]).status().expect("a shell");
    assert!(status.success());
    let mut vm = TestVm::new().boot();
    vm.sh(PREPARE);
    let mac = "02:00:00:00:00:77".parse().expect("an address");
    let net = OpenTap { file: std::sync::Arc::new(tap), mac, mtu: Some(1400), only_own_mac: false };
    let attached = vm.container.machine.control().attach_net(&net);
    let number = attached.unwrap_or_else(|failure| panic!("{}", failure.report())).device;
    vm.sh(RESCAN);
    let address = "i=$(basename $(dirname $(grep -l 02:00:00:00:00:77 /sys/class/net/*/address)))";
    let ping = "ip addr add 10.77.0.2/24 dev $i; ip link set $i up; ping -c 1 -W 60 10.77.0.1 > /dev/null";
    assert_eq!(vm.sh(&format!("{address}; {ping} && cat /sys/class/net/$i/mtu")), "1400\n");
    vm.sh(&format!("echo 1 > /sys/bus/pci/devices/0000:00:{number:02x}.0/remove"));
    let detached = vm.container.machine.control().detach(DeviceName::Number(number), false);
    detached.unwrap_or_else(|failure| panic!("{}", failure.report()));
    assert_eq!(vm.shut_down(ShutdownMode::PowerOff), Exit::Shutdown);
}

fn many() {
    let path = image("many", "stoat");
    let mut vm = TestVm::new().boot();
    vm.sh(PREPARE);
    let before = kept_files(&vm);
    for _ in 0..8 {
        let numbers: Vec<u8> = (0..3).map(|i| attach(&vm, &disk(&path, &format!("m{i}"), true))).collect();
        assert_eq!(numbers[2], numbers[0] + 2);
        let mut script = RESCAN.to_owned();
        for i in 0..3 {
            let serial = format!("m{i}");
            script += &format!("; {}; mount -t erofs -o ro /dev/$d /mnt", find(&serial));
            script += &format!("; cat /mnt/word; umount /mnt; {REMOVE}");
        }
        assert_eq!(vm.sh(&script), "stoat".repeat(3));
        (0..3).for_each(|i| detach(&vm, &format!("m{i}")));
    }
    assert_eq!(kept_files(&vm), before);
    assert_eq!(vm.shut_down(ShutdownMode::PowerOff), Exit::Shutdown);
}
