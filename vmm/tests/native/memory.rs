//! Memory beyond what a machine booted with. Flat guests have no driver for it: what the host does is seen here.

use std::fs::File;
use std::os::fd::AsFd;

use mvm_vmm::config::{MachineConfig, Restore, Start};
use mvm_vmm::control::{Answer, Attached, DeviceName, Memory, Request};
use mvm_vmm::exit::Exit;
use mvm_vmm::flat::Program;
use mvm_vmm::launch::{Ended, Files};
use mvm_vmm::status::Event;

use super::{Vm, launch};

fn device(size_mib: u64) -> mvm_vmm::config::DeviceSpec {
    serde_json::from_str(&format!(r#"{{"type":"mem","size_mib":{size_mib}}}"#)).unwrap()
}

/// A machine of 16 MiB, and of so many more at most.
fn machine(size_mib: u64, change: impl FnOnce(&mut MachineConfig, &mut Files)) -> Vm {
    launch(&Program::Halt.image(), |config, files| {
        config.devices = vec![device(size_mib)];
        change(config, files);
    })
}

fn ask(vm: &mut Vm, size_mib: Option<u64>) -> Result<Memory, String> {
    match vm.control.call(&Request::Memory { size_mib }) {
        Ok(Answer::Memory(memory)) => Ok(memory),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.to_string()),
    }
}

fn stop(mut vm: Vm) {
    vm.control.call(&Request::Stop).unwrap();
    assert_eq!(vm.end().1, Ended::Exit(Exit::Stopped));
}

fn why(vm: Vm) -> String {
    let (event, ended) = vm.end();
    assert_eq!(ended, Ended::FailedToStart);
    let Event::Error { message, because, .. } = event else { panic!("{event:?}") };
    [vec![message], because].concat().join(": ")
}

#[test]
fn a_machine_is_asked_to_have_more_memory_up_to_what_it_was_made_for() {
    let mut vm = machine(1024, |_, _| ());
    vm.wait_for_guest();
    let standing = |size_mib, usable_mib| Ok(Memory { size_mib, plugged_mib: 16, max_mib: 1040, usable_mib });
    assert_eq!(ask(&mut vm, None), standing(16, 16));
    for (wanted, size, usable) in [
        (17, 18, 144),
        (18, 18, 144),
        (272, 272, 272),
        (1040, 1040, 1040),
        (400, 400, 1040),
        (1, 16, 1040),
        (0, 16, 1040),
    ] {
        assert_eq!(ask(&mut vm, Some(wanted)), standing(size, usable), "{wanted}");
    }
    assert_eq!(ask(&mut vm, Some(400)), standing(400, 1040));
    for wanted in [1041, u64::MAX] {
        let error = ask(&mut vm, Some(wanted)).unwrap_err();
        assert!(error.contains("at most 1040 MiB"), "{error}");
    }
    assert_eq!(ask(&mut vm, None), standing(400, 1040), "as it was");
    stop(vm);
}

#[test]
fn a_machine_without_the_device_keeps_what_it_booted_with() {
    let mut vm = launch(&Program::Halt.image(), |_, _| ());
    vm.wait_for_guest();
    for wanted in [None, Some(16)] {
        let error = ask(&mut vm, wanted).unwrap_err();
        assert!(error.contains("without the device `mem`"), "{error}");
    }
    let error = vm.control.call(&Request::Attach { device: device(128) }).unwrap_err().to_string();
    assert!(error.contains("before the machine starts"), "{error}");
    stop(vm);
    let two = machine(128, |config, _| config.devices.push(device(128)));
    assert!(why(two).contains("by one device"));
    let large = machine(512 * 1024, |_, _| ());
    assert!(why(large).contains("up to 524288 MiB"));
}

#[test]
fn the_device_is_attached_where_addresses_are_kept_for_it() {
    let mut vm = launch(&Program::Halt.image(), |config, _| config.pluggable_mib = 300);
    vm.wait_for_guest();
    let attach = |vm: &mut Vm, size| {
        vm.control.call(&Request::Attach { device: device(size) }).map_err(|error| error.to_string())
    };
    let error = attach(&mut vm, 384).unwrap_err();
    assert!(error.contains("before the machine starts"), "{error}");
    assert_eq!(attach(&mut vm, 256), Ok(Answer::Attached(Attached { device: 1 })));
    let error = attach(&mut vm, 128).unwrap_err();
    assert!(error.contains("by one alone"), "{error}");
    let standing = |size_mib| Ok(Memory { size_mib, plugged_mib: 16, max_mib: 272, usable_mib: size_mib });
    assert_eq!(ask(&mut vm, Some(272)), standing(272));
    vm.control.call(&Request::Detach { device: DeviceName::Number(1), force: false }).unwrap();
    assert!(ask(&mut vm, None).is_err());
    attach(&mut vm, 256).unwrap();
    assert_eq!(ask(&mut vm, None), standing(16));
    assert_eq!(ask(&mut vm, Some(144)), standing(144));
    stop(vm);
}

#[test]
fn what_could_be_plugged_is_saved_and_can_grow_on() {
    let mut vm = machine(512, |_, _| ());
    vm.wait_for_guest();
    ask(&mut vm, Some(272)).unwrap();
    let (state, memory) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let request = Request::Snapshot { resume: false, contents: String::new(), base: false };
    vm.control.call_with(&request, &[state.as_fd(), memory.as_fd()]).unwrap();
    stop(vm);
    assert_eq!(memory.metadata().unwrap().len(), ((16 + 256) << 20) + 4096);

    let restore = |size_mib| {
        machine(size_mib, |config, files| {
            let mut add = |file: &File| files.add(file.try_clone().unwrap());
            let (state, memory) = (add(&state), add(&memory));
            config.start = Start::Restore(Restore::new(state, memory));
        })
    };
    let mut again = restore(512);
    let standing = |size_mib| Ok(Memory { size_mib, plugged_mib: 16, max_mib: 528, usable_mib: size_mib });
    assert_eq!(ask(&mut again, None), standing(272));
    assert_eq!(ask(&mut again, Some(528)), standing(528));
    stop(again);
    let larger = why(restore(640));
    assert!(larger.contains("the region has another size"), "{larger}");
    let smaller = why(restore(128));
    assert!(smaller.contains("256 MiB could be plugged into it so far, and at most 128"), "{smaller}");
}
