//! What VIRTIO asks of every device, asked of each kind there is, in each shape that changes what it offers.

mod buffers;

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;

use crate::device::VirtioDevice;
use crate::fd::FdSlot;
use crate::memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, Memory};
use crate::pci::PciFunction;
use crate::testing::load::{self, Load};
use crate::testing::pci::PciDriver;
use crate::testing::{Driver, Posted, copy};
use crate::virtio::{DeviceSpec, Spec, mem, net};

const VERSION_1: u64 = 1 << 32;
/// `INDIRECT_DESC`, `EVENT_IDX` and `VERSION_1`: what the transport adds.
const TRANSPORT: u64 = 1 << 28 | 1 << 29 | VERSION_1;

/// Every kind at work.
fn each_kind(check: impl Fn(&str, &mut dyn Load)) {
    let kinds = load::all();
    assert_eq!(kinds.len(), crate::virtio::NAMES.len());
    for (name, mut load) in kinds {
        check(name, load.as_mut());
    }
}

/// Every kind, in each shape that changes what it offers.
fn shapes() -> Vec<(u16, Box<dyn VirtioDevice>)> {
    let disk = || {
        let image = tempfile::tempfile().unwrap();
        image.set_len(1 << 20).unwrap();
        image.into()
    };
    let null = || File::options().write(true).open("/dev/null").unwrap().into();
    let build = |config: &str, files: Vec<OwnedFd>| {
        let spec: DeviceSpec = serde_json::from_str(config).unwrap();
        let mut files: HashMap<_, _> = (0..).map(FdSlot).zip(files).collect();
        spec.build(&mut files).unwrap()
    };
    let card = |mac: Option<&str>, mtu| {
        let mac = mac.map(|mac| mac.parse().unwrap());
        net::stand_in::card(&net::Config { tap: FdSlot(0), mac, mtu, only_own_mac: false }).unwrap().0
    };
    let memory = mem::Config { size_mib: 256, address: 1 << 32 };
    vec![
        (1, card(None, None)),
        (1, card(Some("52:54:00:00:00:01"), Some(1500))),
        (2, build(r#"{"type":"block","disk":0}"#, vec![disk()])),
        (2, build(r#"{"type":"block","disk":0,"read_only":true}"#, vec![disk()])),
        (2, build(r#"{"type":"block","disk":0,"cache":"unsafe","queues":4}"#, vec![disk()])),
        (3, build(r#"{"type":"console","output":0}"#, vec![null()])),
        (3, build(r#"{"type":"console","output":0,"size":{"columns":80,"rows":25}}"#, vec![null()])),
        (4, build(r#"{"type":"rng"}"#, vec![])),
        (5, build(r#"{"type":"balloon"}"#, vec![])),
        (5, build(r#"{"type":"balloon","reporting":false,"deflate_on_oom":false}"#, vec![])),
        (5, build(r#"{"type":"balloon","stats_interval":9}"#, vec![])),
        (19, build(r#"{"type":"vsock","guest_cid":3}"#, vec![])),
        (24, memory.build(&mut HashMap::new()).unwrap()),
    ]
}

/// Addresses of the bytes that differ.
fn differences(before: &Memory, after: &Memory) -> Vec<u64> {
    let (mut all, mut a, mut b) = (Vec::new(), vec![0; 4096], vec![0; 4096]);
    for region in after.iter() {
        let start = region.start_addr().0;
        for at in (start..start + region.len()).step_by(4096) {
            before.read_slice(&mut a, GuestAddress(at)).unwrap();
            after.read_slice(&mut b, GuestAddress(at)).unwrap();
            if a != b {
                all.extend((at..).zip(a.iter().zip(&b)).filter(|(_, (a, b))| a != b).map(|(at, _)| at));
            }
        }
    }
    all
}

/// A driver that has told the device of all its queues, but not that it is ready.
fn set_up(vm: &mut PciDriver) -> Vec<Driver> {
    let offered = vm.offered();
    assert!(vm.negotiate(offered & !(1 << 29)));
    vm.set_up_vectors();
    let queues = vm.get16(0x12);
    (0..queues).map(|queue| vm.set_up_queue(queue, false)).collect()
}

/// Posts request `number` with writable buffers full of a pattern, has it served and takes the answer's length.
fn ask(vm: &mut PciDriver, driver: &mut Driver, load: &dyn Load, number: u16) -> (Posted, u32) {
    let before = driver.used_index();
    let posted = vm.at_rest(|vm| {
        let posted = load.post(driver, number);
        for (address, len) in &posted.writable {
            vm.memory.write_slice(&vec![0xa5; *len as usize], GuestAddress(*address)).unwrap();
        }
        posted
    });
    serve(vm, driver, load.queue(), before);
    let (head, len) = driver.take().unwrap();
    assert_eq!(head, posted.head);
    (posted, len)
}

/// Kicks and lets the device work until it has used one more than `before`.
fn serve(vm: &mut PciDriver, driver: &Driver, queue: u16, before: u16) {
    vm.kick(queue);
    for _ in 0..1000 {
        vm.settle();
        if driver.used_index() != before {
            return;
        }
    }
    panic!("no answer");
}

#[test]
fn c_001_c_002_no_kind_consumes_or_announces_before_driver_ok() {
    each_kind(|name, load| {
        let mut vm = PciDriver::new(load.device());
        let mut queues = set_up(&mut vm);
        (0..3).for_each(|number| drop(load.post(&mut queues[usize::from(load.queue())], number)));
        let before = copy(&vm.memory);
        (0..u16::try_from(queues.len()).unwrap()).for_each(|queue| vm.kick(queue));
        vm.function.notify_config_changed();
        vm.settle();
        assert_eq!(differences(&before, &vm.memory), [0u64; 0], "{name}");
        assert_eq!((vm.sink.all_signals(), vm.read(vm.isr, 0)), (0, [0]), "{name}");
        assert_eq!(load.carried_out().unwrap_or(0), 0, "{name}");
        vm.set_status(15);
        for _ in 0..1000 {
            vm.settle();
        }
        assert_eq!(queues[usize::from(load.queue())].used_index(), 3, "{name}: then it does");
    });
}

#[test]
fn c_005_no_kind_offers_a_feature_without_those_it_needs() {
    // Device id, feature, and the features of which it needs one (§5.1.3.1, §5.2.5.2).
    let needs: &[(u16, u32, u64)] = &[
        (1, 7, 1 << 1),
        (1, 8, 1 << 1),
        (1, 9, 1 << 7 | 1 << 8),
        (1, 10, 1 << 1),
        (1, 54, 1 << 1),
        (1, 55, 1 << 1),
        (1, 11, 1),
        (1, 12, 1),
        (1, 13, 1 << 11 | 1 << 12),
        (1, 14, 1),
        (1, 56, 1),
        (1, 18, 1 << 17),
        (1, 19, 1 << 17),
        (1, 21, 1 << 17),
        (1, 22, 1 << 17),
        (1, 23, 1 << 17),
        (1, 60, 1 << 17),
        (1, 61, 1 << 11 | 1 << 12),
        (2, 11, 1 << 9),
    ];
    let mut seen = 0;
    for (id, device) in shapes() {
        let offered = PciDriver::new(device).offered();
        for (_, feature, any) in
            needs.iter().filter(|(kind, feature, _)| *kind == id && offered & 1 << feature != 0)
        {
            assert_ne!(offered & any, 0, "device {id} offers {feature} in {offered:#x}");
            seen += 1;
        }
    }
    assert!(seen > 10);
}

#[test]
fn c_007_c_032_c_034_c_035_no_kind_offers_what_it_does_not_know() {
    for (id, device) in shapes() {
        let known: &[u32] = match id {
            1 => &[0, 1, 3, 5, 7, 8, 9, 11, 12, 13, 15, 16, 54, 55, 56],
            2 => &[1, 2, 5, 6, 9, 10, 12, 13, 14],
            3 | 19 => &[0],
            5 => &[1, 2, 5],
            24 => &[1],
            _ => &[],
        };
        let known: u64 = known.iter().map(|bit| 1 << bit).sum();
        let offered = PciDriver::new(device).offered();
        assert_eq!(offered & TRANSPORT, TRANSPORT, "device {id}");
        assert_eq!(offered & !(TRANSPORT | known), 0, "device {id} offers {offered:#x}");
    }
}

#[test]
fn c_008_every_kind_accepts_again_what_it_accepted() {
    for (id, device) in shapes() {
        let mut vm = PciDriver::new(device);
        let offered = vm.offered();
        for features in [offered, VERSION_1, offered, offered & TRANSPORT, VERSION_1].repeat(4) {
            assert!(vm.negotiate(features), "device {id} refuses {features:#x} of {offered:#x}");
            vm.set_status(0);
        }
    }
}

#[test]
fn c_010_no_kind_touches_anything_after_a_reset() {
    each_kind(|name, load| {
        let mut vm = PciDriver::new(load.device());
        let mut queues = vm.start(false);
        let mut driver = queues.swap_remove(usize::from(load.queue()));
        let (posted, len) = ask(&mut vm, &mut driver, load, 0);
        load.check(&driver, 0, &posted, len);
        let done = load.carried_out();
        vm.set_status(0);
        let signals = vm.sink.all_signals();
        (1..4).for_each(|number| drop(load.post(&mut driver, number)));
        let before = copy(&vm.memory);
        vm.kick(load.queue());
        vm.function.notify_config_changed();
        vm.settle();
        assert_eq!(differences(&before, &vm.memory), [0u64; 0], "{name}");
        assert_eq!((vm.sink.all_signals(), load.carried_out()), (signals, done), "{name}");
    });
}

#[test]
fn c_011_every_kind_lets_its_configuration_be_read_in_every_state() {
    for (id, device) in shapes() {
        let Some(space) = device.config() else { continue };
        let mut expected = vec![0; space.len()];
        space.read(0, &mut expected);
        let mut vm = PciDriver::new(device);
        let block = vm.device.unwrap();
        assert_eq!(block.len, expected.len() as u64);
        for status in [0, 1, 3, 11, 15] {
            match status {
                11 => assert!(vm.negotiate(VERSION_1)),
                _ => vm.set_status(status),
            }
            assert_eq!(vm.status(), status);
            for width in [1, 2, 4] {
                let mut read = vec![0; expected.len().next_multiple_of(4)];
                for (at, data) in (0..).step_by(width).zip(read.chunks_mut(width)) {
                    vm.function.read_bar(block.bar, block.offset + at, data);
                }
                read.truncate(expected.len());
                assert_eq!(read, expected, "device {id} in status {status} by {width}");
            }
        }
    }
}

#[test]
fn c_059_every_kind_has_the_id_of_the_specification() {
    let mut seen = std::collections::BTreeSet::new();
    for (id, device) in shapes() {
        let vm = PciDriver::new(device);
        let word = |at: usize| u16::from_le_bytes(vm.function.config()[at..at + 2].try_into().unwrap());
        assert_eq!((word(0), word(2)), (0x1af4, 0x1040 + id));
        seen.insert(id);
    }
    assert_eq!(seen.len(), crate::virtio::KINDS.len());
}

#[test]
fn c_069_c_070_every_kind_has_queues_of_possible_sizes() {
    for (id, device) in shapes() {
        let least = match id {
            1 | 3 => 2,
            5 => 5,
            19 => 3,
            _ => 1,
        };
        let mut vm = PciDriver::new(device);
        let queues = vm.get16(0x12);
        assert!(queues >= least, "device {id}");
        for queue in 0..queues {
            vm.set16(0x16, queue);
            assert!(vm.get16(0x18).is_power_of_two(), "device {id} queue {queue}");
        }
        vm.set16(0x16, queues);
        assert_eq!(vm.get16(0x18), 0, "device {id}");
    }
}

#[test]
fn c_148_every_kind_with_a_configuration_says_where_it_is() {
    for (id, device) in shapes() {
        // Least size of its structure: up to the last field that does not belong to a feature.
        let least = match id {
            1 => Some(12),
            2 => Some(60),
            3 => Some(12),
            5 | 19 => Some(8),
            24 => Some(56),
            _ => None,
        };
        let block = PciDriver::new(device).device;
        assert_eq!(block.is_some(), least.is_some(), "device {id}");
        assert!(block.map(|block| block.len) >= least, "device {id}");
    }
}
