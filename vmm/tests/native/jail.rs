//! What a machine's process still has while its guest runs, as its host sees it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use mvm_vmm::flat::Program;
use nix::unistd::Uid;

use crate::{Vm, run};

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
