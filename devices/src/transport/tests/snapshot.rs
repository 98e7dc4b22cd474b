//! Pause, save and restore.

use std::sync::Arc;

use super::{device, machine};
use crate::pci::PciFunction;
use crate::testing::pci::PciDriver;
use crate::transport::{State, TransportError};

/// The state as it comes back from a file.
fn through_json(state: &State) -> State {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

#[test]
fn a_paused_device_touches_nothing_and_goes_on_when_resumed() {
    let (mut vm, _) = machine();
    let mut queues = vm.start(false);
    vm.function.pause().unwrap();
    queues[0].post(&[b"ping"], &[4]);
    vm.kick(0);
    assert_eq!(queues[0].used_index(), 0);
    vm.function.resume().unwrap();
    vm.sink.wait(1, 1);
    assert_eq!(queues[0].used_index(), 1);
}

#[test]
fn a_running_device_cannot_be_saved() {
    let (mut vm, _) = machine();
    vm.start(false);
    assert!(matches!(vm.function.save(), Err(TransportError::NotAtRest { .. })));
}

#[test]
fn p_27_a_restored_function_looks_and_works_like_the_saved_one() {
    let (mut vm, _) = machine();
    let mut queues = vm.start(true);
    for _ in 0..5 {
        queues[0].post(&[b"ping"], &[4]);
        vm.settle();
        queues[0].take().unwrap();
    }
    vm.write(vm.device.unwrap(), 4, &[0xaa]);
    vm.mask_vector(2, true);
    queues[1].post(&[b"ping"], &[4]);
    vm.settle();
    vm.function.pause().unwrap();
    let state = vm.function.save().unwrap();

    let (again, log) = device();
    let mut clone = PciDriver::in_memory(again, Arc::clone(&vm.memory));
    clone.function.restore(&through_json(&state)).unwrap();
    assert_eq!(clone.function.save().unwrap(), state);
    assert_eq!(clone.function.config(), vm.function.config());
    assert_eq!(clone.function.bars(), vm.function.bars());
    assert_eq!(super::registers(&mut clone), super::registers(&mut vm));
    let bytes: [u8; 5] = clone.read(clone.device.unwrap(), 0);
    assert_eq!(bytes, [1, 2, 3, 4, 0xaa]);
    assert_eq!(log.starts(), 0, "it waits to be resumed");

    clone.function.resume().unwrap();
    queues[0].set_used_event(5);
    let posted = queues[0].post(&[b"ping"], &[4]);
    clone.kick(0);
    clone.sink.wait(1, 1);
    assert_eq!(queues[0].take(), Some((posted.head, 4)));
    assert_eq!(clone.sink.routed(1), vm.sink.routed(1));
    clone.mask_vector(2, false);
    assert_eq!(clone.sink.signals(2), 1, "what pended still pends");
}

#[test]
fn a_function_is_saved_in_every_state_of_negotiation() {
    for status in [0, 1, 3, 11] {
        let (mut vm, _) = machine();
        for step in [1, 3].into_iter().filter(|step| *step <= status) {
            vm.set_status(step);
        }
        if status == 11 {
            assert!(vm.negotiate(1 << 32) || vm.status() == 3);
        }
        let state = vm.function.save().unwrap();
        let mut clone = PciDriver::new(device().0);
        clone.function.restore(&state).unwrap();
        assert_eq!(clone.status(), vm.status());
        assert_eq!(clone.function.save().unwrap(), state);
    }
}

#[test]
fn a_device_that_waits_for_a_reset_still_does_after_a_restore() {
    let (mut vm, log) = machine();
    let mut queues = vm.start(false);
    queues[0].set_available_index(1000);
    vm.kick(0);
    vm.sink.wait(0, 1);
    vm.function.pause().unwrap();
    let state = vm.function.save().unwrap();
    let mut clone = PciDriver::in_memory(device().0, Arc::clone(&vm.memory));
    clone.function.restore(&state).unwrap();
    clone.function.resume().unwrap();
    assert_eq!(clone.status(), 15 | 64);
    clone.set_status(0);
    queues[0].set_available_index(0);
    clone.start(false);
    assert_eq!(clone.status(), 15);
    assert_eq!(log.stops(), 1);
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let (mut vm, _) = machine();
    vm.start(false);
    vm.function.pause().unwrap();
    let good = serde_json::to_value(vm.function.save().unwrap()).unwrap();
    type Spoil = fn(&mut serde_json::Value);
    let spoils: [(&str, Spoil); 12] = [
        ("fewer queues", |s| drop(s["registers"]["queues"].as_array_mut().unwrap().pop())),
        ("size 3", |s| s["registers"]["queues"][0]["ring"]["size"] = 3.into()),
        ("another largest size", |s| s["registers"]["queues"][0]["max"] = 64.into()),
        ("status 4", |s| s["registers"]["status"] = 4.into()),
        ("features not offered", |s| s["registers"]["accepted"] = u64::MAX.into()),
        ("fewer vectors", |s| drop(s["msix"]["entries"].as_array_mut().unwrap().pop())),
        ("short configuration", |s| s["config"] = serde_json::json!([1, 2])),
        ("rings outside memory", |s| s["registers"]["queues"][1]["ring"]["used"] = u64::MAX.into()),
        ("a ring too few", |s| s["rings"][1] = serde_json::Value::Null),
        ("features the device does not take together", |s| {
            s["registers"]["accepted"] = (1u64 << 32 | 2).into()
        }),
        ("ready without rings", |s| s["rings"] = serde_json::Value::Null),
        ("fewer vectors than queues", |s| drop(s["queue_vectors"].as_array_mut().unwrap().pop())),
    ];
    for (name, spoil) in spoils {
        let mut bad = good.clone();
        spoil(&mut bad);
        let state: State = serde_json::from_value(bad).unwrap();
        let mut clone = PciDriver::in_memory(device().0, Arc::clone(&vm.memory));
        assert!(clone.function.restore(&state).is_err(), "{name}");
    }
}

#[test]
fn a_driver_whose_machine_is_saved_while_it_reads_the_configuration_notices() {
    let (mut vm, _) = machine();
    vm.start(false);
    let generation = |vm: &mut PciDriver| -> [u8; 1] { vm.read(vm.common, 0x15) };
    for changes in 0..3 {
        (0..changes).for_each(|_| vm.function.config_space().unwrap().update(|_| ()));
        let before = generation(&mut vm);
        vm.function.pause().unwrap();
        let state = vm.function.save().unwrap();
        vm.function.resume().unwrap();
        let mut clone = PciDriver::in_memory(device().0, Arc::clone(&vm.memory));
        clone.function.restore(&state).unwrap();
        assert_ne!(generation(&mut clone), before, "what is behind the device may be another");
        let again = generation(&mut clone);
        assert_eq!(generation(&mut clone), again, "and it changes once");
    }
}

#[test]
fn a_list_that_is_longer_than_it_can_be_is_not_read() {
    let (vm, _) = machine();
    let good = serde_json::to_value(vm.function.save().unwrap()).unwrap();
    let queue = good["registers"]["queues"][0].clone();
    let entry = good["msix"]["entries"][0].clone();
    let null = serde_json::Value::Null;
    for (place, element, most) in [
        ("/header", serde_json::json!([0, 0]), 1024),
        ("/msix/entries", entry, 2048),
        ("/msix/pending", 0.into(), 2048),
        ("/registers/queues", queue, 64),
        ("/queue_vectors", 0.into(), 64),
        ("/rings", null, 64),
    ] {
        let read = |count| {
            let mut state = good.clone();
            *state.pointer_mut(place).unwrap() = vec![element.clone(); count].into();
            serde_json::from_value::<State>(state)
        };
        read(most).unwrap();
        let error = read(most + 1).unwrap_err().to_string();
        assert!(error.contains(&format!("at most {most} elements")), "{place}: {error}");
    }
}
