//! Buffers that a driver left with a device to be filled: saved empty, filled once in the restored machine.

use std::io::Write;
use std::os::fd::OwnedFd;

use super::*;
use crate::fd::FdSlot;
use crate::virtio::{DeviceSpec, Spec, net};

const HEADER: [u8; 12] = [0; 12];

fn build(config: &str, files: Vec<(u32, OwnedFd)>) -> Box<dyn crate::device::VirtioDevice> {
    let spec: DeviceSpec = serde_json::from_str(config).unwrap();
    let mut files: std::collections::HashMap<_, _> =
        files.into_iter().map(|(slot, file)| (FdSlot(slot), file)).collect();
    spec.build(&mut files).unwrap()
}

/// A new device, and who sends it something.
type Host = (Box<dyn crate::device::VirtioDevice>, Box<dyn Fn(u8)>);

/// A card whose wire carries a frame of this byte.
fn card() -> Host {
    let config = net::Config { tap: FdSlot(3), mac: None, mtu: None, only_own_mac: false };
    let (device, wire) = net::stand_in::card(&config).unwrap();
    let send = move |byte| {
        let frame = [&HEADER[..], &[byte; 60]].concat();
        assert_eq!(nix::unistd::write(&wire, &frame), Ok(72));
    };
    (device, Box::new(send))
}

/// A terminal at which this byte is typed.
fn terminal() -> Host {
    let (input, typist) = std::io::pipe().unwrap();
    let output = std::fs::File::options().write(true).open("/dev/null").unwrap();
    let device =
        build(r#"{"type":"console","input":3,"output":4}"#, vec![(3, input.into()), (4, output.into())]);
    (device, Box::new(move |byte| (&typist).write_all(&[byte]).unwrap()))
}

/// Buffers posted to queue 0 before the machine is saved receive `at` in each what is sent, before and after.
fn fill_across_a_restore(host: fn() -> Host, at: usize) {
    for event_idx in [false, true] {
        let (device, send) = host();
        let mut vm = PciDriver::new(device);
        let mut queues = vm.start(event_idx);
        let posted: Vec<_> = (0..6).map(|_| queues[0].post(&[], &[1600])).collect();
        vm.kick(0);
        send(1);
        vm.sink.wait(1, 1);
        vm.function.pause().unwrap();
        let (state, memory) = (vm.function.save().unwrap(), copy(&vm.memory));
        drop(vm);

        let (device, send) = host();
        let mut vm = PciDriver::in_memory(device, Arc::clone(&memory));
        vm.function.restore(&state).unwrap();
        vm.function.resume().unwrap();
        let mut driver = queues[0].moved_to(memory);
        driver.set_used_event(1);
        assert_eq!(vm.sink.signals(1), 0);
        send(2);
        vm.sink.wait(1, 1);
        for (byte, posted) in (1..=2).zip(&posted) {
            assert_eq!(driver.take().map(|(head, _)| head), Some(posted.head));
            assert_eq!(driver.written(posted)[at], byte);
        }
        assert_eq!(driver.take(), None, "the others still wait");
    }
}

#[test]
fn frames_go_into_the_buffers_that_a_saved_driver_had_posted() {
    fill_across_a_restore(card, 12);
}

#[test]
fn keystrokes_go_into_the_buffers_that_a_saved_driver_had_posted() {
    fill_across_a_restore(terminal, 0);
}

#[test]
fn the_statistics_that_a_saved_driver_had_posted_are_asked_for_anew_once() {
    let new = || build(r#"{"type":"balloon","stats_interval":1}"#, Vec::new());
    let mut vm = PciDriver::new(new());
    let mut queues = vm.start(true);
    let posted = queues[2].post(&[&[0; 10]], &[]);
    vm.kick(2);
    vm.settle();
    vm.function.pause().unwrap();
    let (state, memory) = (vm.function.save().unwrap(), copy(&vm.memory));
    assert_eq!(queues[2].take(), None, "the device keeps it until it asks");
    drop(vm);

    let mut vm = PciDriver::in_memory(new(), Arc::clone(&memory));
    vm.function.restore(&state).unwrap();
    vm.function.resume().unwrap();
    vm.sink.wait(3, 1);
    let mut driver = queues[2].moved_to(memory);
    assert_eq!(driver.take(), Some((posted.head, 0)));
    assert_eq!(driver.take(), None);
}
