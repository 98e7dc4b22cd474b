//! A disk whose storage fails, forgets and keeps a diary.

use super::*;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use crate::memory::{Bytes, GuestAddress, Memory};

/// What storage was asked to do, and where the used ring of queue 0 stood then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Write { used: u16 },
    Sync { used: u16 },
}

/// Storage in memory: what is written, and what of it a loss of power would leave.
#[derive(Default)]
pub(super) struct Platter {
    pub(super) current: Vec<u8>,
    pub(super) stable: Vec<u8>,
    pub(super) events: Vec<Event>,
    /// Fail the operation after this many.
    fail_in: Option<u32>,
    used_index: Option<(Arc<Memory>, u64)>,
}

impl Platter {
    fn step(&mut self) -> io::Result<()> {
        match &mut self.fail_in {
            Some(0) => {
                self.fail_in = None;
                Err(io::Error::from_raw_os_error(libc::EIO))
            }
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn used(&self) -> u16 {
        let Some((memory, at)) = &self.used_index else { return 0 };
        memory.read_obj(GuestAddress(*at)).unwrap()
    }
}

/// The platter, seen by the device and by the test.
#[derive(Clone)]
pub(super) struct TestDisk(Arc<Mutex<Platter>>);

impl TestDisk {
    pub(super) fn new(sectors: usize) -> Self {
        let bytes = vec![0; sectors * 512];
        Self(Arc::new(Mutex::new(Platter { current: bytes.clone(), stable: bytes, ..Platter::default() })))
    }

    pub(super) fn platter(&self) -> MutexGuard<'_, Platter> {
        self.0.lock().unwrap()
    }

    pub(super) fn device(&self, config: &Config) -> Box<dyn VirtioDevice> {
        let capacity = self.platter().current.len();
        Box::new(Block::new(config, self.clone(), capacity as u64))
    }

    /// Lets the diary note the used index.
    fn watch_ring(&self, vm: &mut Harness) {
        let at = vm.driver(0).used_ring() + 2;
        self.platter().used_index = Some((vm.memory().clone(), at));
    }
}

fn place(range: &Range<u64>) -> Range<usize> {
    range.start as usize..range.end as usize
}

impl Disk for TestDisk {
    fn read(&mut self, to: &mut Cursor<'_>, offset: u64) -> io::Result<()> {
        let mut platter = self.platter();
        platter.step()?;
        let range = offset as usize..offset as usize + to.remaining() as usize;
        to.write(&platter.current[range]).map_err(io::Error::other)
    }

    fn write(&mut self, from: &mut Cursor<'_>, offset: u64) -> io::Result<()> {
        let mut platter = self.platter();
        platter.step()?;
        let used = platter.used();
        platter.events.push(Event::Write { used });
        let range = offset as usize..offset as usize + from.remaining() as usize;
        from.read(&mut platter.current[range]).map_err(io::Error::other)
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut platter = self.platter();
        platter.step()?;
        let used = platter.used();
        platter.events.push(Event::Sync { used });
        platter.stable = platter.current.clone();
        Ok(())
    }

    fn zero(&mut self, range: &Range<u64>, _unmap: bool) -> io::Result<()> {
        let mut platter = self.platter();
        platter.step()?;
        platter.current[place(range)].fill(0);
        Ok(())
    }

    fn discard(&mut self, range: &Range<u64>) -> io::Result<()> {
        let mut platter = self.platter();
        platter.step()?;
        platter.current[place(range)].fill(0xdd);
        Ok(())
    }
}

#[test]
fn fi01_one_failing_operation_fails_one_request() {
    for nth in 0..12 {
        let disk = TestDisk::new(8);
        let device = disk.device(&config());
        let counts = counts(device.as_ref());
        let mut vm = Harness::new(device);
        disk.platter().fail_in = Some(nth);
        let mut failed = Vec::new();
        for i in 0..12 {
            let status = match i % 4 {
                0 => write(&mut vm, 0, &[1; 512]),
                1 => read(&mut vm, 0, 512).status,
                2 => ask(&mut vm, &[&header(WRITE_ZEROES, 0), &segment(0, 1, 0)], &[1]).status,
                _ => ask(&mut vm, &[&header(DISCARD, 0), &segment(0, 1, 0)], &[1]).status,
            };
            if status != OK {
                assert_eq!(status, IOERR);
                failed.push(i);
            }
        }
        assert_eq!(failed, [nth]);
        assert_eq!(counts["errors"].get(), 1);
        assert!(!vm.asked_for_reset());
    }
}

#[test]
fn fi01_a_failing_read_claims_no_byte_of_the_buffer() {
    let disk = TestDisk::new(8);
    let mut vm = Harness::new(disk.device(&config()));
    disk.platter().fail_in = Some(0);
    let got = read(&mut vm, 0, 1024);
    assert_eq!(got, Answer { status: IOERR, len: 0, data: vec![0xa5; 1024] });
}

#[test]
fn fi05_after_a_failed_flush_no_flush_succeeds_until_reset() {
    let disk = TestDisk::new(8);
    let mut vm = Harness::new(disk.device(&config()));
    assert_eq!(flush(&mut vm), OK);
    disk.platter().fail_in = Some(0);
    assert_eq!(flush(&mut vm), IOERR);
    assert_eq!(flush(&mut vm), IOERR, "the host may have dropped what it could not write");
    assert_eq!(write(&mut vm, 0, &[1; 512]), OK, "the rest goes on");
    let mut vm = Harness::new(vm.reset());
    assert_eq!(flush(&mut vm), OK);
}

#[test]
fn a_lost_write_is_remembered_across_save_and_restore() {
    let disk = TestDisk::new(8);
    let mut block = Block::new(&config(), disk.clone(), 8 * 512);
    block.lost_writes = true;
    let state = VirtioDevice::state(&block);
    let mut restored = disk.device(&config());
    restored.restore(&state).unwrap();
    assert_eq!(flush(&mut Harness::new(restored)), IOERR);
}

#[test]
fn c108_a_flush_is_answered_after_the_sync_and_the_sync_comes_after_earlier_writes() {
    let disk = TestDisk::new(8);
    let mut vm = Harness::new(disk.device(&config()));
    disk.watch_ring(&mut vm);
    vm.driver(0).post(&[&header(OUT, 0), &[1; 512]], &[1]);
    vm.driver(0).post(&[&header(OUT, 1), &[2; 512]], &[1]);
    vm.driver(0).post(&[&header(FLUSH, 0)], &[1]);
    vm.kick(0);
    let events = [Event::Write { used: 0 }, Event::Write { used: 1 }, Event::Sync { used: 2 }];
    assert_eq!(disk.platter().events, events);
    assert_eq!(vm.driver(0).used_index(), 3);
}

#[test]
fn c108_without_flush_every_write_is_stable_before_it_is_answered() {
    let disk = TestDisk::new(8);
    let device = disk.device(&config());
    let features = device.features() & !(1 << 9);
    let mut vm = Harness::with(device, features, false);
    disk.watch_ring(&mut vm);
    assert_eq!(write(&mut vm, 0, &[1; 512]), OK);
    assert_eq!(disk.platter().events, [Event::Write { used: 0 }, Event::Sync { used: 0 }]);
    assert_eq!(disk.platter().stable[..512], [1; 512]);
    assert_eq!(ask(&mut vm, &[&header(WRITE_ZEROES, 0), &segment(0, 1, 0)], &[1]).status, OK);
    assert_eq!(disk.platter().stable[..512], [0; 512]);
}

#[test]
fn an_unsafe_disk_offers_no_flush_and_never_waits_for_storage() {
    let disk = TestDisk::new(8);
    let device = disk.device(&Config { cache: Cache::Unsafe, ..config() });
    assert_eq!(device.features() & 1 << 9, 0);
    let mut vm = Harness::new(device);
    assert_eq!(write(&mut vm, 0, &[1; 512]), OK);
    assert_eq!(flush(&mut vm), OK);
    assert_eq!(disk.platter().events, [Event::Write { used: 0 }]);
}
