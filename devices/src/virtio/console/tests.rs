//! The console between a driver and pipes, files and ends that hang up.

use std::collections::HashMap;
use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::output::{BACKLOG, BURST, FILE_SIZE, MAX_CHAIN, Output, RATE};
use super::{Config, Console, RECEIVE, Size, TRANSMIT, resize};
use crate::device::VirtioDevice;
use crate::fd::FdSlot;
use crate::testing::Harness;
use crate::testing::pci::PciDriver;
use crate::virtio::{BuildError, Spec};

const BURST_USIZE: usize = BURST as usize;

/// Builds a console as a machine does.
fn build(input: Option<OwnedFd>, output: impl Into<OwnedFd>, unlimited: bool) -> Box<dyn VirtioDevice> {
    let mut files = HashMap::from([(FdSlot(4), output.into())]);
    let slot = input.is_some().then_some(FdSlot(3));
    files.extend(input.map(|file| (FdSlot(3), file)));
    let config = Config { input: slot, output: FdSlot(4), unlimited, size: None };
    config.build(&mut files).unwrap()
}

/// A console with a pipe at either end.
fn piped() -> (Harness, PipeWriter, PipeReader) {
    let (input, typist) = std::io::pipe().unwrap();
    let (reader, output) = std::io::pipe().unwrap();
    (Harness::new(build(Some(input.into()), output, true)), typist, reader)
}

fn print(vm: &mut Harness, bytes: &[u8]) {
    vm.driver(TRANSMIT).post(&[bytes], &[]);
    vm.kick(TRANSMIT);
    assert_eq!(vm.driver(TRANSMIT).take().map(|(_, len)| len), Some(0), "output is always taken");
}

/// Delivers what is ready until nothing is.
fn settle(vm: &mut Harness) {
    let turns = (0..1000).take_while(|_| vm.poll() > 0).count();
    assert!(turns < 1000, "the loop would never sleep");
}

fn count(device: &dyn VirtioDevice, name: &str) -> u64 {
    device.counters().iter().find(|counter| counter.name() == name).unwrap().get()
}

#[test]
fn output_reaches_the_reader_whatever_its_layout() {
    let (mut vm, _typist, mut reader) = piped();
    print(&mut vm, b"one ");
    vm.driver(TRANSMIT).post(&[b"t", b"w", b"", b"o"], &[]);
    vm.kick(TRANSMIT);
    let mut bytes = [0; 7];
    reader.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"one two");
    assert_eq!(vm.interrupts(TRANSMIT), 2);
}

#[test]
fn input_reaches_the_guest_in_the_buffers_it_posted() {
    let (mut vm, mut typist, _reader) = piped();
    let first = vm.driver(RECEIVE).post(&[], &[4]);
    let second = vm.driver(RECEIVE).post(&[], &[100]);
    vm.kick(RECEIVE);
    typist.write_all(b"hello!").unwrap();
    settle(&mut vm);
    assert_eq!(vm.driver(RECEIVE).take(), Some((first.head, 4)));
    assert_eq!(vm.driver(RECEIVE).take(), Some((second.head, 2)));
    assert_eq!(vm.driver(RECEIVE).written(&first), b"hell");
    assert_eq!(vm.driver(RECEIVE).written(&second)[..2], *b"o!");
}

#[test]
fn input_waits_outside_while_the_guest_has_no_buffer() {
    let (mut vm, mut typist, _reader) = piped();
    typist.write_all(b"early").unwrap();
    vm.kick(RECEIVE);
    settle(&mut vm);
    assert_eq!(vm.watched_files(), 0, "or the loop would spin");
    let posted = vm.driver(RECEIVE).post(&[], &[16]);
    vm.kick(RECEIVE);
    assert_eq!(vm.watched_files(), 1);
    settle(&mut vm);
    assert_eq!(vm.driver(RECEIVE).take(), Some((posted.head, 5)));
}

#[test]
fn a_typist_who_hangs_up_is_forgotten_and_output_goes_on() {
    let (mut vm, mut typist, mut reader) = piped();
    let posted = vm.driver(RECEIVE).post(&[], &[16]);
    vm.driver(RECEIVE).post(&[], &[16]);
    vm.kick(RECEIVE);
    typist.write_all(b"bye").unwrap();
    drop(typist);
    settle(&mut vm);
    assert_eq!(vm.driver(RECEIVE).take(), Some((posted.head, 3)), "what was typed before still arrives");
    assert_eq!(vm.driver(RECEIVE).take(), None);
    assert_eq!(vm.watched_files(), 0);
    vm.kick(RECEIVE);
    assert_eq!(vm.watched_files(), 0, "for good");
    print(&mut vm, b"still here");
    let mut bytes = [0; 10];
    reader.read_exact(&mut bytes).unwrap();
    assert!(!vm.asked_for_reset());
}

#[test]
fn input_from_a_file_is_read_to_its_end() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"script").unwrap();
    file.rewind().unwrap();
    let mut vm = Harness::new(build(Some(file.into()), File::create("/dev/null").unwrap(), true));
    let posted: Vec<_> = (0..3).map(|_| vm.driver(RECEIVE).post(&[], &[4])).collect();
    vm.kick(RECEIVE);
    assert_eq!(vm.driver(RECEIVE).take(), Some((posted[0].head, 4)));
    assert_eq!(vm.driver(RECEIVE).take(), Some((posted[1].head, 2)));
    assert_eq!(vm.driver(RECEIVE).take(), None);
    assert!(!vm.asked_for_reset());
}

#[test]
fn a_file_without_end_fills_the_buffers_there_are_and_no_more() {
    let zero = File::open("/dev/zero").unwrap();
    let mut vm = Harness::new(build(Some(zero.into()), File::create("/dev/null").unwrap(), true));
    (0..5).for_each(|_| drop(vm.driver(RECEIVE).post(&[], &[16])));
    vm.kick(RECEIVE);
    assert_eq!(vm.driver(RECEIVE).used_index(), 5);
}

#[test]
fn l_03_a_reader_that_stops_costs_output_and_nothing_else() {
    let (reader, output) = std::io::pipe().unwrap();
    let mut reader = reader;
    let device = build(None, output, true);
    let counters = device.counters();
    let value = |name: &str| counters.iter().find(|counter| counter.name() == name).unwrap().get();
    let mut vm = Harness::new(device);
    let line = [b'x'; 1000];
    (0..300).for_each(|_| print(&mut vm, &line));
    let (written, dropped) = (value("output_bytes"), value("output_bytes_dropped"));
    let backlog = 300_000 - written - dropped;
    assert_eq!(backlog, BACKLOG as u64);
    assert!(dropped > 0);
    assert_eq!(vm.watched_files(), 1, "the loop tells when the reader goes on");

    let mut bytes = vec![0; usize::try_from(written).unwrap()];
    reader.read_exact(&mut bytes).unwrap();
    while vm.watched_files() > 0 {
        assert!(vm.poll() > 0);
        let rest = value("output_bytes") - u64::try_from(bytes.len()).unwrap();
        let mut more = vec![0; usize::try_from(rest).unwrap()];
        reader.read_exact(&mut more).unwrap();
        bytes.extend(more);
    }
    assert_eq!(bytes.len() as u64, written + backlog);
    print(&mut vm, b"again");
    assert_eq!(value("output_bytes"), written + backlog + 5);
}

#[test]
fn in_a_real_loop_both_directions_work_until_either_end_is_gone() {
    let (input, mut typist) = std::io::pipe().unwrap();
    let (mut reader, output) = std::io::pipe().unwrap();
    let mut vm = PciDriver::new(build(Some(input.into()), output, false));
    assert_eq!(vm.msix_control() & 0x7ff, 1, "two vectors: one for both queues");
    let mut queues = vm.start(false);
    let posted = queues[usize::from(RECEIVE)].post(&[], &[16]);
    vm.kick(RECEIVE);
    typist.write_all(b"ls").unwrap();
    vm.sink.wait(1, 1);
    assert_eq!(queues[usize::from(RECEIVE)].take(), Some((posted.head, 2)));
    queues[usize::from(TRANSMIT)].post(&[b"file"], &[]);
    vm.kick(TRANSMIT);
    vm.sink.wait(1, 2);
    reader.read_exact(&mut [0; 4]).unwrap();
    drop((typist, reader));
    queues[usize::from(TRANSMIT)].post(&[b"more"], &[]);
    vm.kick(TRANSMIT);
    vm.sink.wait(1, 3);
    assert_eq!(vm.status(), 15);
}

#[test]
fn in_a_real_loop_input_may_be_a_regular_file() {
    let mut script = tempfile::tempfile().unwrap();
    script.write_all(b"script").unwrap();
    script.rewind().unwrap();
    let mut vm = PciDriver::new(build(Some(script.into()), File::create("/dev/null").unwrap(), false));
    let mut queues = vm.start(false);
    let posted = queues[usize::from(RECEIVE)].post(&[], &[16]);
    vm.kick(RECEIVE);
    vm.sink.wait(1, 1);
    assert_eq!(queues[usize::from(RECEIVE)].take(), Some((posted.head, 6)));
}

#[test]
fn a_reader_that_is_gone_leaves_nothing_watched_and_a_guest_that_goes_on() {
    let (reader, output) = std::io::pipe().unwrap();
    let mut vm = Harness::new(build(None, output, true));
    (0..200).for_each(|_| print(&mut vm, &[b'x'; 1000]));
    assert_eq!(vm.watched_files(), 1);
    drop(reader);
    vm.poll();
    assert_eq!(vm.watched_files(), 0);
    print(&mut vm, b"to nobody");
    assert_eq!(vm.watched_files(), 0);
    assert!(!vm.asked_for_reset());
}

/// A console with a clock the test moves, writing to a file.
fn limited() -> (Console, File, Arc<AtomicU64>) {
    let file = tempfile::tempfile().unwrap();
    let millis = Arc::new(AtomicU64::new(0));
    let (start, now) = (Instant::now(), Arc::clone(&millis));
    let clock = move || start + Duration::from_millis(now.load(Ordering::SeqCst));
    let output = Output::new(file.try_clone().unwrap(), false, Box::new(clock));
    (Console::new(None, output, None), file, millis)
}

#[test]
fn l_01_output_beyond_the_burst_and_the_rate_is_dropped_and_counted() {
    let (console, mut file, millis) = limited();
    let counters = console.output.counters();
    let mut vm = Harness::new(Box::new(console));
    (0..100).for_each(|_| print(&mut vm, &[b'x'; 1024]));
    assert_eq!(counters[0].get(), u64::from(BURST));
    assert_eq!(counters[1].get(), 100 * 1024 - u64::from(BURST));
    millis.store(500, Ordering::SeqCst);
    (0..100).for_each(|_| print(&mut vm, &[b'y'; 1024]));
    assert_eq!(counters[0].get(), u64::from(BURST + RATE / 2));
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes[..BURST_USIZE], vec![b'x'; BURST_USIZE]);
    assert_eq!(bytes[BURST_USIZE..], vec![b'y'; BURST_USIZE / 2]);
}

#[test]
fn a_file_begins_anew_once_it_is_full() {
    let file = tempfile::tempfile().unwrap();
    let mut vm = Harness::new(build(None, file.try_clone().unwrap(), true));
    let line = [b'x'; 4096];
    let lines = FILE_SIZE / 4096;
    (0..lines).for_each(|_| print(&mut vm, &line));
    assert_eq!(file.metadata().unwrap().len(), FILE_SIZE);
    print(&mut vm, b"new");
    assert_eq!(file.metadata().unwrap().len(), 3);
    let (mut file, mut bytes) = (file, Vec::new());
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"new");
}

#[test]
fn a_huge_chain_is_looked_at_no_further_than_the_cap() {
    let device = build(None, File::create("/dev/null").unwrap(), true);
    let counters = device.counters();
    let mut vm = Harness::new(device);
    print(&mut vm, &vec![b'x'; 300_000]);
    assert_eq!(counters[0].get(), u64::from(MAX_CHAIN));
    assert_eq!(counters[1].get(), 300_000 - u64::from(MAX_CHAIN));
}

#[test]
fn buffers_of_the_wrong_direction_are_given_back_unused() {
    let (mut vm, mut typist, mut reader) = piped();
    typist.write_all(b"x").unwrap();
    let readable = vm.driver(RECEIVE).post(&[b"in"], &[4]);
    let empty = vm.driver(RECEIVE).post(&[], &[0]);
    let good = vm.driver(RECEIVE).post(&[], &[4]);
    vm.kick(RECEIVE);
    settle(&mut vm);
    let taken: Vec<_> = std::iter::from_fn(|| vm.driver(RECEIVE).take()).collect();
    assert_eq!(taken, [(readable.head, 0), (empty.head, 0), (good.head, 1)]);
    let writable = vm.driver(TRANSMIT).post(&[b"out"], &[4]);
    vm.kick(TRANSMIT);
    assert_eq!(vm.driver(TRANSMIT).take(), Some((writable.head, 0)));
    print(&mut vm, b"ok");
    let mut bytes = [0; 2];
    reader.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"ok", "of the other nothing is printed");
    assert!(!vm.asked_for_reset());
}

#[test]
fn after_a_reset_both_directions_work_again() {
    let (vm, mut typist, mut reader) = piped();
    let mut vm = Harness::new(vm.reset());
    print(&mut vm, b"a");
    let posted = vm.driver(RECEIVE).post(&[], &[4]);
    vm.kick(RECEIVE);
    typist.write_all(b"b").unwrap();
    settle(&mut vm);
    assert_eq!(vm.driver(RECEIVE).take(), Some((posted.head, 1)));
    reader.read_exact(&mut [0]).unwrap();
}

#[test]
fn after_a_pause_input_and_backlog_are_watched_again() {
    let (mut vm, _typist, _reader) = piped();
    vm.driver(RECEIVE).post(&[], &[4]);
    vm.kick(RECEIVE);
    (0..200).for_each(|_| print(&mut vm, &[b'x'; 1000]));
    assert_eq!(vm.watched_files(), 2);
    vm.pause_and_resume();
    assert_eq!(vm.watched_files(), 2);
}

#[test]
fn the_size_is_offered_only_if_it_is_known_and_can_change() {
    let null = || OwnedFd::from(File::create("/dev/null").unwrap());
    assert_eq!(build(None, null(), true).features(), 0);
    let size = Some(Size { columns: 80, rows: 25 });
    let config = Config { input: None, output: FdSlot(4), unlimited: true, size };
    let device = config.build(&mut HashMap::from([(FdSlot(4), null())])).unwrap();
    assert_eq!(device.features(), 1);
    let space = device.config().unwrap();
    let mut bytes = [0; 4];
    space.read(0, &mut bytes);
    assert_eq!(bytes, [80, 0, 25, 0]);
    let before = space.generation();
    resize(&space, Size { columns: 300, rows: 50 });
    space.read(0, &mut bytes);
    assert_eq!(bytes, [44, 1, 50, 0]);
    assert_ne!(space.generation(), before);
    assert_eq!(count(device.as_ref(), "output_bytes"), 0);
}

#[test]
fn c_167_c_168_there_is_one_port_and_no_emergency_write() {
    for size in [None, Some(Size { columns: 80, rows: 25 })] {
        let null = OwnedFd::from(File::create("/dev/null").unwrap());
        let config = Config { input: None, output: FdSlot(4), unlimited: true, size };
        let mut vm = PciDriver::new(config.build(&mut HashMap::from([(FdSlot(4), null)])).unwrap());
        assert_eq!(vm.offered() & 0b110, 0, "neither MULTIPORT nor EMERG_WRITE");
        assert_eq!(vm.get16(0x12), 2, "receive and transmit");
        let block = vm.device.unwrap();
        assert_eq!(u32::from_le_bytes(vm.read(block, 4)), 1, "port");
        vm.write(block, 8, &[b'!', 0, 0, 0]);
        assert_eq!(vm.read(block, 8), [0; 4]);
    }
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let config = Config { input: None, output: FdSlot(9), unlimited: false, size: None };
    let error = config.build(&mut HashMap::new()).map(drop).unwrap_err();
    assert!(matches!(error, BuildError::File { what: "console output", .. }));
}

#[test]
fn the_configuration_is_plain_and_refuses_what_it_does_not_know() {
    let config: Config = serde_json::from_str(r#"{"output": 4}"#).unwrap();
    assert_eq!(config, Config { input: None, output: FdSlot(4), unlimited: false, size: None });
    assert!(serde_json::from_str::<Config>(r#"{"output": 4, "colour": true}"#).is_err());
}

#[test]
fn a_state_of_another_device_is_refused() {
    let mut console = build(None, tempfile::tempfile().unwrap(), false);
    let other = crate::virtio::DeviceState::Rng(crate::virtio::rng::State {});
    assert!(console.restore(&other).is_err());
    console.restore(&console.state()).unwrap();
}

#[test]
fn a_restored_console_on_a_terminal_of_another_size_says_so() {
    for (saved, changes) in [(80u16, 1), (100, 0)] {
        let size = Some(Size { columns: 100, rows: 30 });
        let config = Config { input: None, output: FdSlot(4), unlimited: false, size };
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        let mut console = config.build(&mut HashMap::from([(FdSlot(4), file)])).unwrap();
        let space = console.config().unwrap();
        // As the transport does: what the saved driver read comes first.
        space.update(|bytes| bytes[..2].copy_from_slice(&saved.to_le_bytes()));
        console.restore(&console.state()).unwrap();
        let mut columns = [0; 2];
        space.read(0, &mut columns);
        assert_eq!(u16::from_le_bytes(columns), 100);
        let mut vm = Harness::new(console);
        vm.pause_and_resume();
        assert_eq!(vm.config_changes(), changes);
    }
}
