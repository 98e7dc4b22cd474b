//! What a device does with the buffers it is given (VIRTIO 1.2 §2.7).

use super::*;

/// Pages that the balloon's driver gives up.
const GIVEN_UP: std::ops::Range<u64> = 0x40_0000..0x50_0000;

#[test]
fn c_015_every_kind_takes_requests_in_any_pieces() {
    each_kind(|name, load| {
        let (mut number, mut tried) = (0, 0);
        for piece in [1, 2, 3, 5, 7, 8, 11, 15, 16, 17, 43, 44, 45, 100] {
            let mut vm = PciDriver::new(load.device());
            let mut queues = vm.start(false);
            let mut driver = queues.swap_remove(usize::from(load.queue())).in_pieces_of(piece);
            if name == "block" && piece == 1 {
                continue; // 529 descriptors, which no queue of 512 has
            }
            let (posted, len) = ask(&mut vm, &mut driver, load, number);
            load.check(&driver, number, &posted, len);
            number += 1;
            tried += 1;
            assert_eq!(load.carried_out().unwrap_or(number.into()), u64::from(number), "{name} by {piece}");
        }
        assert!(tried > 12);
    });
}

#[test]
fn c_017_c_019_every_kind_writes_only_what_it_may() {
    each_kind(|name, load| {
        let mut vm = PciDriver::new(load.device());
        let mut queues = vm.start(false);
        let used: Vec<_> = queues.iter().map(|queue| queue.used_ring()..queue.used_ring() + 0x1000).collect();
        let mut driver = queues.swap_remove(usize::from(load.queue()));
        for number in 0..4 {
            let before = driver.used_index();
            let (posted, memory) = vm.at_rest(|vm| (load.post(&mut driver, number), copy(&vm.memory)));
            serve(&mut vm, &driver, load.queue(), before);
            let allowed = |at: u64| {
                posted.writable.iter().any(|(start, len)| (*start..start + u64::from(*len)).contains(&at))
                    || used.iter().any(|ring| ring.contains(&at))
                    || (name == "balloon" && GIVEN_UP.contains(&at))
            };
            let differ = differences(&memory, &vm.memory);
            assert!(!differ.is_empty(), "{name}: at least the used ring");
            let wrong: Vec<_> = differ.into_iter().filter(|at| !allowed(*at)).collect();
            assert!(wrong.is_empty(), "{name} wrote to {wrong:x?}");
        }
    });
}

#[test]
fn c_017_no_queue_writes_to_what_it_may_read() {
    each_kind(|name, load| {
        let mut vm = PciDriver::new(load.device());
        let mut queues = vm.start(false);
        let used: Vec<_> = queues.iter().map(|queue| queue.used_ring()..queue.used_ring() + 0x1000).collect();
        let (posted, memory) = vm.at_rest(|vm| {
            let posted = queues.iter_mut().map(|queue| queue.post(&[&[0x11; 64], &[0x22; 64]], &[64]));
            (posted.collect::<Vec<_>>(), copy(&vm.memory))
        });
        (0..u16::try_from(queues.len()).unwrap()).for_each(|queue| vm.kick(queue));
        (0..10).for_each(|_| vm.settle());
        let writable: Vec<_> = posted.iter().flat_map(|posted| &posted.writable).collect();
        let wrong: Vec<_> = differences(&memory, &vm.memory)
            .into_iter()
            .filter(|at| !used.iter().any(|ring| ring.contains(at)))
            .filter(|at| !writable.iter().any(|(start, len)| (*start..start + u64::from(*len)).contains(at)))
            .collect();
        assert!(wrong.is_empty(), "{name} wrote to {wrong:x?}");
    });
}

#[test]
fn c_028_every_kind_has_written_what_it_says() {
    each_kind(|name, load| {
        let mut vm = PciDriver::new(load.device());
        let mut queues = vm.start(false);
        let mut driver = queues.swap_remove(usize::from(load.queue()));
        let (posted, len) = ask(&mut vm, &mut driver, load, 0);
        let bytes = driver.written(&posted);
        let len = usize::try_from(len).unwrap();
        assert!(len <= bytes.len(), "{name}: no more than there is room for");
        // A byte that was not written still has the pattern; of random ones, a few may.
        let left = bytes[..len].iter().filter(|byte| **byte == 0xa5).count();
        assert!(left * 4 <= len, "{name}: {bytes:x?} of which {len}");
    });
}

#[test]
fn c_031_every_kind_takes_kicks_that_say_nothing_new() {
    each_kind(|name, load| {
        let mut vm = PciDriver::new(load.device());
        let mut queues = vm.start(false);
        let signals = vm.sink.all_signals();
        for _ in 0..100 {
            (0..u16::try_from(queues.len()).unwrap()).for_each(|queue| vm.kick(queue));
            vm.settle();
        }
        assert_eq!((vm.status(), vm.sink.all_signals()), (15, signals), "{name}");
        let mut driver = queues.swap_remove(usize::from(load.queue()));
        let (posted, len) = ask(&mut vm, &mut driver, load, 0);
        load.check(&driver, 0, &posted, len);
    });
}
