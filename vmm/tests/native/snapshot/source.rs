//! Machines whose memory another process has.

use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use mvm_vmm::config::Userfault;
use nix::unistd::Uid;

use super::*;

#[path = "../../../examples/memory_source/handler.rs"]
mod handler;

use handler::Machine;

/// Machines on this host may have missing memory reported.
const DEVICE: &str = "/dev/userfaultfd";

/// A machine that goes on from `saved`, whose memory is at the other end of the socket.
fn restore_from(saved: &Saved, with_device: bool) -> (Counting, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    let device = with_device.then(|| File::options().read(true).write(true).open(DEVICE).unwrap());
    let counting = count(|serial| {
        restore(saved, |config, files| {
            let Start::Restore(restore) = &mut config.start else { panic!("{config:?}") };
            restore.memory = files.add(far);
            restore.userfault = Some(Userfault { device: device.map(|device| files.add(device)) });
            serial(config, files);
        })
    });
    (counting, near)
}

/// One whose memory `saved` has.
fn served(saved: &Saved, with_device: bool) -> (Counting, JoinHandle<Machine>) {
    let (counting, socket) = restore_from(saved, with_device);
    let memory = saved.memory.try_clone().unwrap();
    let thread = std::thread::spawn(move || {
        let mut machine = Machine::meet(socket).unwrap();
        machine.serve(&memory).unwrap();
        machine
    });
    (counting, thread)
}

fn counted() -> (Saved, u8) {
    let mut counting = boot_counting(1);
    counting.wait_for(10);
    let (saved, _) = save(&mut counting.vm, false, "").unwrap();
    let last = *counting.numbers().last().unwrap();
    counting.stop();
    (saved, last)
}

#[test]
fn a_machine_goes_on_with_memory_that_another_process_brings() {
    let (saved, before) = counted();
    let ways = [Uid::effective().is_root().then_some(false), Path::new(DEVICE).exists().then_some(true)];
    let ways: Vec<_> = ways.into_iter().flatten().collect();
    assert!(!ways.is_empty(), "neither root nor {DEVICE}");
    for with_device in ways {
        let (mut counting, source) = served(&saved, with_device);
        assert!(follows(before, &counting.wait_for(10)), "{before} and {:?}", counting.numbers());
        // What was not brought yet is, to be saved.
        let (again, figures) = save(&mut counting.vm, false, "").unwrap();
        assert!(figures.memory_bytes < 1 << 20, "{figures:?}");
        let last = *counting.numbers().last().unwrap();
        counting.stop();
        let machine = source.join().unwrap();
        assert_eq!(machine.brought, (16 << 20) / 4096, "all of it");
        let regions: Vec<_> = machine.mappings.iter().map(|it| (it.size, it.offset, it.page_size)).collect();
        assert_eq!(regions, [(16 << 20, 0, 4096)]);

        let third = restore_counting(&again);
        assert!(follows(last, &third.wait_for(10)));
        third.stop();
    }
}

#[test]
fn a_machine_ends_and_says_why_when_whoever_has_its_memory_is_gone() {
    let (saved, _) = counted();
    let (counting, socket) = restore_from(&saved, false);
    drop(Machine::meet(socket).unwrap());
    let lost = |counting: Counting| {
        let (event, ended) = counting.vm.end();
        let Event::Exit { exit: Exit::MemoryLost { detail }, .. } = event else { panic!("{event:?}") };
        assert!(detail.contains("closed the connection"), "{detail}");
        assert_eq!(ended, Ended::Exit(Exit::MemoryLost { detail: String::new() }));
    };
    lost(counting);
    // Later as well, while the guest waits for nothing.
    let (counting, socket) = restore_from(&saved, false);
    let memory = saved.memory.try_clone().unwrap();
    let hang_up = socket.try_clone().unwrap();
    let thread = std::thread::spawn(move || Machine::meet(socket).unwrap().serve(&memory));
    counting.wait_for(10);
    hang_up.shutdown(std::net::Shutdown::Both).unwrap();
    thread.join().unwrap().unwrap();
    lost(counting);
}

#[test]
fn a_machine_whose_memory_never_comes_can_be_asked_to_end() {
    let (saved, _) = counted();
    let (counting, socket) = restore_from(&saved, false);
    let machine = Machine::meet(socket).unwrap();
    let mut faults = [nix::poll::PollFd::new(machine.userfault.as_fd(), nix::poll::PollFlags::POLLIN)];
    let waited = nix::poll::poll(&mut faults, nix::poll::PollTimeout::try_from(PATIENCE).unwrap()).unwrap();
    assert_eq!(waited, 1, "it wants a page");
    counting.stop();
}

#[test]
fn what_cannot_be_handed_over_is_said() {
    let (saved, _) = counted();
    let (near, far) = UnixStream::pair().unwrap();
    drop(near);
    let without = |memory: std::os::fd::OwnedFd, base: Option<&File>| {
        refused(restore(&saved, |config, files| {
            let Start::Restore(restore) = &mut config.start else { panic!("{config:?}") };
            restore.memory = files.add(memory);
            restore.userfault = Some(Userfault::default());
            restore.base = base.map(|base| files.add(base.try_clone().unwrap()));
            config.serial = Some(Serial { output: files.add(tempfile::tempfile().unwrap()), input: None });
        }))
    };
    let why = without(far.into(), None);
    assert!(why.contains("cannot tell whoever has the memory what to bring"), "{why}");
    let (_near, far) = UnixStream::pair().unwrap();
    let why = without(far.into(), Some(&saved.memory));
    assert!(why.contains("memory that is elsewhere has none"), "{why}");
}
