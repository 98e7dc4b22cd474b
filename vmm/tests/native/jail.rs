//! What a machine's process still has while its guest runs, as its host sees it.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use mvm_vmm::flat::Program;
use nix::unistd::Uid;

use crate::{Vm, disk, launch, run};

impl Vm {
    /// The user it has become.
    pub(crate) fn user(&self) -> Uid {
        match Uid::effective().is_root() {
            true => Uid::from_raw(0x7000_0000 + self.child.pid.as_raw().unsigned_abs()),
            false => Uid::effective(),
        }
    }

    fn proc(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.child.pid).into()
    }

    /// The fields of its status.
    fn status(&self) -> BTreeMap<String, String> {
        let text = fs::read_to_string(self.proc("status")).unwrap();
        let fields = text.lines().filter_map(|line| line.split_once(':'));
        fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
    }
}

fn running() -> Vm {
    let mut vm = run(Program::Halt);
    vm.wait_for_guest();
    vm
}

#[test]
fn a_machine_has_a_user_of_its_own_without_groups_or_capabilities() {
    let (vm, other) = (running(), running());
    let (status, others) = (vm.status(), other.status());
    assert_eq!(status["NoNewPrivs"], "1");
    let all = vec![vm.user().to_string(); 4].join("\t");
    if !Uid::effective().is_root() {
        return assert_eq!(status["Uid"], all, "whoever started it has no other");
    }
    assert_eq!((&status["Uid"], &status["Gid"], status["Groups"].as_str()), (&all, &all, ""));
    assert_ne!(status["Uid"], others["Uid"]);
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status[set], "0".repeat(16), "{set}");
    }
}

#[test]
fn a_machine_has_an_empty_root_nobody_can_put_anything_into() {
    if !Uid::effective().is_root() {
        return;
    }
    let vm = running();
    let root = vm.proc("root");
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    assert_eq!(fs::metadata(&root).unwrap().nlink(), 0, "it is removed");
    assert!(fs::write(root.join("file"), "").is_err());
    assert_eq!(fs::read_link(vm.proc("cwd")).unwrap(), fs::read_link(&root).unwrap());
}

#[test]
fn a_machine_is_not_dumped_has_no_environment_and_no_descriptors_but_its_own() {
    let vm = running();
    assert_eq!(fs::metadata(vm.proc("mem")).unwrap().uid(), Uid::effective().as_raw(), "the starter's alone");
    assert_eq!(fs::read(vm.proc("environ")).unwrap(), b"");
    let limits = fs::read_to_string(vm.proc("limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"]);
    for entry in fs::read_dir(vm.proc("fd")).unwrap() {
        let path = entry.unwrap().path();
        let to = fs::read_link(&path).unwrap();
        let kind = fs::metadata(&path).unwrap();
        assert!(!kind.is_dir(), "{to:?} is a directory, and leads elsewhere");
    }
}

/// Threads by name, with the fields of their status. KVM's own are left out: they never leave the kernel.
fn threads(vm: &Vm) -> Vec<(String, BTreeMap<String, String>)> {
    let tasks = fs::read_dir(vm.proc("task")).unwrap();
    // Short-lived ones may be gone by now.
    let texts = tasks.filter_map(|entry| fs::read_to_string(entry.unwrap().path().join("status")).ok());
    let fields = texts.map(|text| {
        let fields = text.lines().filter_map(|line| line.split_once(':'));
        fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect::<BTreeMap<_, _>>()
    });
    let named = fields.map(|fields| (fields["Name"].clone(), fields));
    named.filter(|(name, _)| !name.starts_with("kvm-")).collect()
}

#[test]
fn sec_01_every_thread_of_a_machine_has_one_filter_of_its_own() {
    let image = tempfile::tempfile().unwrap();
    image.set_len(1 << 20).unwrap();
    let mut vm = launch(&Program::Halt.image(), |config, files| {
        config.cpus = 2.try_into().unwrap();
        config.devices.push(serde_json::from_value(serde_json::json!({"type": "rng"})).unwrap());
        let disk = serde_json::json!({"type": "block", "disk": files.add(image.try_clone().unwrap())});
        config.devices.push(serde_json::from_value(disk).unwrap());
    });
    vm.wait_for_guest();
    let other = tempfile::tempfile().unwrap();
    other.set_len(1 << 20).unwrap();
    // Answered by a thread that is confined, and by then all threads have begun.
    vm.control.call_with(&disk("later"), &[other.as_fd()]).unwrap();
    let threads = threads(&vm);
    let mut names: Vec<_> = threads.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["io", "io-block", "io-block", "mvm-vmm", "vcpu0", "vcpu1"]);
    for (name, status) in &threads {
        let fields = ["Seccomp", "Seccomp_filters", "NoNewPrivs"].map(|field| status[field].as_str());
        assert_eq!(fields, ["2", "1", "1"], "{name}");
    }
}
