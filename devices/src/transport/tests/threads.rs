//! Many vCPUs at one function while its device runs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::machine;
use crate::pci::{ConfigChange, PciFunction};
use crate::testing::Driver;
use crate::testing::pci::PciDriver;

/// Operations of each thread.
const OPERATIONS: u64 = 10_000;
/// Longest that nothing may move.
const PATIENCE: Duration = Duration::from_secs(10);

/// A small, fast source of numbers that look random (xorshift64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Resets the function and starts it with empty rings.
fn restart(vm: &mut PciDriver, event_idx: bool) -> Vec<Driver> {
    vm.set_status(0);
    for index in 0..3 {
        let mut stale = Driver::new(index, 8, Arc::clone(&vm.memory), false);
        stale.set_available_index(0);
        stale.set_flags(0);
    }
    vm.start(event_idx)
}

/// One thing a vCPU does to the function; `queues` are its rings since it was last started.
fn operate(vm: &mut PciDriver, queues: &Mutex<Vec<Driver>>, dice: &mut Dice) {
    let (choice, value) = (dice.roll() % 16, dice.roll());
    match choice {
        0 => {
            let mut queues = queues.lock().unwrap();
            *queues = restart(vm, value & 1 != 0);
            // Whoever else gets to run on this host: it is at work once each time.
            queues[0].post(&[b"ping"], &[4]);
            vm.settle();
        }
        1 => vm.set_status(0),
        2 => vm.function.notify_config_changed(),
        3 => vm.mask_vector(u16::try_from(value % 4).unwrap(), value & 8 != 0),
        4 => vm.set_msix_control(u16::try_from(value & 0xc000).unwrap()),
        5 => vm.function.config_space().unwrap().update(|bytes| bytes[0] ^= 1),
        6..=9 => vm.kick(u16::try_from(value % 4).unwrap()),
        10..=12 => vm.function.write_bar(0, value % 0x40, &value.to_le_bytes()[..1 << (value % 4)]),
        13 => {
            let at = usize::try_from(value % 256).unwrap();
            let change = vm.function.write_config(at, &value.to_le_bytes()[..4]);
            assert!(matches!(change, ConfigChange::None | ConfigChange::Decoding));
        }
        _ => {
            let mut data = [0; 8];
            vm.function.read_bar(0, value % 0x8000, &mut data);
        }
    }
}

#[test]
fn t_41_four_threads_hammer_one_function_and_none_gets_stuck() {
    let (mut vm, log) = machine();
    let doorbells: Vec<_> = vm.function.doorbells().into_iter().map(|doorbell| doorbell.event).collect();
    let queues = Arc::new(Mutex::new(vm.start(false)));
    let vm = Arc::new(Mutex::new(vm));
    let progress = Arc::new(AtomicU64::new(0));
    let done = Arc::new(AtomicBool::new(false));

    let mut threads: Vec<_> = (1..=3u64)
        .map(|seed| {
            let (vm, queues, progress) = (Arc::clone(&vm), Arc::clone(&queues), Arc::clone(&progress));
            std::thread::spawn(move || {
                let mut dice = Dice(seed << 32 | 0x9e37_79b9);
                for _ in 0..OPERATIONS {
                    operate(&mut vm.lock().unwrap(), &queues, &mut dice);
                    progress.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    // The fourth does what needs no exit: it writes to the rings and rings the doorbells.
    let over = Arc::clone(&done);
    threads.push(std::thread::spawn(move || {
        let mut dice = Dice(77);
        while !over.load(Ordering::SeqCst) {
            let n = usize::try_from(dice.roll() % 3).unwrap();
            queues.lock().unwrap()[n].post(&[b"ping"], &[4]);
            doorbells[n].write(1).unwrap();
            std::thread::yield_now();
        }
    }));

    let (mut last, mut since) = (0, Instant::now());
    while progress.load(Ordering::SeqCst) < 3 * OPERATIONS {
        std::thread::sleep(Duration::from_millis(1));
        let now = progress.load(Ordering::SeqCst);
        if now != last {
            (last, since) = (now, Instant::now());
        }
        assert!(since.elapsed() < PATIENCE, "stuck after {now} operations");
    }
    done.store(true, Ordering::SeqCst);
    for thread in threads {
        thread.join().unwrap();
    }

    assert!(log.starts() > 1000 && log.served() >= log.starts() / 2, "{log:?}: the device hardly ran");

    // Whatever state that left: after a reset and with sane rings, the device works.
    let mut vm = vm.lock().unwrap();
    let mut queues = restart(&mut vm, false);
    let served = log.served();
    let posted = queues[0].post(&[b"ping"], &[4]);
    vm.settle();
    assert_eq!((vm.status(), log.served()), (15, served + 1));
    assert!(!vm.function.needs_reset());
    assert_eq!(queues[0].used_index(), 1);
    assert_eq!(queues[0].take(), Some((posted.head, 4)));
}
