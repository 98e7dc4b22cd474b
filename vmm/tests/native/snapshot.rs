//! Machines that are saved, and go on as others.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use mvm_vmm::config::{DeviceSpec, MachineConfig, Restore, Serial, Start};
use mvm_vmm::control::{Answer, Attached, DeviceName, MachineState, Request, Snapshot};
use mvm_vmm::exit::Exit;
use mvm_vmm::flat::Program;
use mvm_vmm::launch::{Ended, Files};
use mvm_vmm::status::Event;

mod source;
mod working;

use super::{Vm, launch};

/// Longest a test waits for what must not take long.
const PATIENCE: Duration = Duration::from_secs(20);

/// The two files of a snapshot.
struct Saved {
    state: File,
    memory: File,
}

/// A machine whose guest counts, and what it has counted.
struct Counting {
    vm: Vm,
    output: File,
}

fn save(vm: &mut Vm, resume: bool, contents: &str) -> std::io::Result<(Saved, Snapshot)> {
    let (state, memory) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let request = Request::Snapshot { resume, contents: contents.to_owned(), base: false };
    match vm.control.call_with(&request, &[state.as_fd(), memory.as_fd()])? {
        Answer::Snapshot(saved) => Ok((Saved { state, memory }, saved)),
        other => panic!("{other:?}"),
    }
}

/// A machine that goes on from `saved`, whose configuration may be changed.
fn restore(saved: &Saved, change: impl FnOnce(&mut MachineConfig, &mut Files)) -> Vm {
    launch(b"", |config, files| {
        let (state, memory) = (saved.state.try_clone().unwrap(), saved.memory.try_clone().unwrap());
        config.start = Start::Restore(Restore::new(files.add(state), files.add(memory)));
        change(config, files);
    })
}

/// Has what `config`'s serial port writes in the file that is returned.
fn output(config: &mut MachineConfig, files: &mut Files) -> File {
    let output = tempfile::tempfile().unwrap();
    config.serial = Some(Serial { output: files.add(output.try_clone().unwrap()), input: None });
    output
}

fn count(start: impl FnOnce(&mut dyn FnMut(&mut MachineConfig, &mut Files)) -> Vm) -> Counting {
    let mut file = None;
    let vm = start(&mut |config, files| file = Some(output(config, files)));
    Counting { vm, output: file.unwrap() }
}

fn boot_counting(cpus: u64) -> Counting {
    count(|serial| {
        launch(&Program::Count.image(), |config, files| {
            config.cpus = cpus.try_into().unwrap();
            serial(config, files);
        })
    })
}

fn restore_counting(saved: &Saved) -> Counting {
    count(|serial| restore(saved, |config, files| serial(config, files)))
}

impl Counting {
    /// What was counted so far.
    fn numbers(&self) -> Vec<u8> {
        let length = usize::try_from(self.output.metadata().unwrap().len()).unwrap();
        let mut bytes = vec![0; length];
        self.output.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn wait_for(&self, count: usize) -> Vec<u8> {
        let end = Instant::now() + PATIENCE;
        while self.numbers().len() < count {
            assert!(Instant::now() < end, "it counts no further than {:?}", self.numbers());
            std::thread::yield_now();
        }
        self.numbers()
    }

    fn stop(mut self) {
        self.vm.control.call(&Request::Stop).unwrap();
        assert_eq!(self.vm.end().1, Ended::Exit(Exit::Stopped));
    }
}

/// Whether each number is the one before it plus one, from `before` on.
fn follows(before: u8, numbers: &[u8]) -> bool {
    let expected = (1..).map(|step| before.wrapping_add((step % 256) as u8));
    numbers.iter().zip(expected).all(|(number, expected)| *number == expected)
}

#[test]
fn a_machine_goes_on_where_it_was_saved() {
    let mut counting = boot_counting(1);
    counting.wait_for(10);
    let (saved, figures) = save(&mut counting.vm, false, "").unwrap();
    assert_eq!(counting.vm.state(), MachineState::Paused);
    let before = counting.numbers();
    assert!(follows(0, &before), "{before:?}");
    assert!(figures.memory_bytes < 1 << 20, "{figures:?}");
    counting.stop();

    let again = restore_counting(&saved);
    let after = again.wait_for(10);
    assert!(follows(*before.last().unwrap(), &after), "{before:?} and {after:?}");
    again.stop();
}

#[test]
fn a_machine_goes_on_from_what_changed_since_it_was_saved_before() {
    let mut counting = boot_counting(2);
    counting.wait_for(10);
    let (base, whole) = save(&mut counting.vm, true, "").unwrap();
    counting.wait_for(counting.numbers().len() + 10);
    let saved = Saved { state: tempfile::tempfile().unwrap(), memory: tempfile::tempfile().unwrap() };
    let request = Request::Snapshot { resume: false, contents: String::new(), base: true };
    let files = [saved.state.as_fd(), saved.memory.as_fd(), base.memory.as_fd()];
    let without = counting.vm.control.call_with(&request, &files[..2]).unwrap_err().to_string();
    assert!(without.contains("three files"), "{without}");
    assert_eq!(counting.vm.state(), MachineState::Running);
    let answer = counting.vm.control.call_with(&request, &files).unwrap();
    let Answer::Snapshot(changes) = answer else { panic!("{answer:?}") };
    assert!(changes.memory_bytes < whole.memory_bytes, "{changes:?} of {whole:?}");
    let before = counting.numbers();
    counting.stop();

    let again = count(|serial| {
        restore(&saved, |config, files| {
            config.cpus = 2.try_into().unwrap();
            let Start::Restore(restore) = &mut config.start else { panic!("{config:?}") };
            restore.base = Some(files.add(base.memory.try_clone().unwrap()));
            serial(config, files);
        })
    });
    let after = again.wait_for(10);
    assert!(follows(*before.last().unwrap(), &after), "{before:?} and {after:?}");
    again.stop();
}

#[test]
fn a_saved_machine_goes_on_itself() {
    let mut counting = boot_counting(1);
    for _ in 0..3 {
        let so_far = counting.wait_for(5).len();
        save(&mut counting.vm, true, "").unwrap();
        assert_eq!(counting.vm.state(), MachineState::Running);
        let numbers = counting.wait_for(so_far + 5);
        assert!(follows(0, &numbers), "{numbers:?}");
    }
    counting.vm.control.call(&Request::Pause).unwrap();
    save(&mut counting.vm, true, "").unwrap();
    assert_eq!(counting.vm.state(), MachineState::Paused, "as it was before");
    counting.stop();
}

#[test]
fn machines_of_one_snapshot_go_their_own_ways_and_can_be_saved_themselves() {
    let mut counting = boot_counting(2);
    counting.wait_for(3);
    let (saved, _) = save(&mut counting.vm, false, "").unwrap();
    let last = *counting.numbers().last().unwrap();
    counting.stop();
    let two = |saved| {
        count(|serial| {
            restore(saved, |config, files| {
                config.cpus = 2.try_into().unwrap();
                serial(config, files);
            })
        })
    };
    let (mut first, second) = (two(&saved), two(&saved));
    first.wait_for(20);
    let (later, _) = save(&mut first.vm, false, "").unwrap();
    let at = first.numbers();
    assert!(follows(last, &at), "{at:?}");
    assert!(follows(last, &second.wait_for(5)));
    let third = two(&later);
    assert!(follows(*at.last().unwrap(), &third.wait_for(5)));
    [first, second, third].into_iter().for_each(Counting::stop);
}

/// Waits until the guest has marked its time.
fn wait_for_mark(vm: &mut Vm) {
    let marked = |event: std::io::Result<Event>| matches!(event.unwrap(), Event::GuestMark { value: 1, .. });
    assert!(vm.child.events.by_ref().any(marked), "the machine ended before");
}

#[test]
fn an_alarm_that_is_set_rings_in_the_restored_machine() {
    let mut vm = launch(&Program::Alarm.image(), |_, _| ());
    wait_for_mark(&mut vm);
    let (saved, _) = save(&mut vm, false, "").unwrap();
    vm.control.call(&Request::Stop).unwrap();
    assert_eq!(vm.end().1, Ended::Exit(Exit::Stopped), "it had not rung");
    for _ in 0..3 {
        assert_eq!(restore(&saved, |_, _| ()).end().1, Ended::Exit(Exit::Shutdown));
    }
}

#[test]
fn an_alarm_that_passes_while_the_machine_is_held_rings_in_both() {
    let mut vm = launch(&Program::Alarm.image(), |_, _| ());
    wait_for_mark(&mut vm);
    vm.control.call(&Request::Pause).unwrap();
    // One that set its alarm later has heard it: so would this one have.
    let later = launch(&Program::Alarm.image(), |_, _| ());
    assert_eq!(later.end().1, Ended::Exit(Exit::Shutdown));
    let (saved, _) = save(&mut vm, true, "").unwrap();
    vm.control.call(&Request::Resume).unwrap();
    assert_eq!(vm.end().1, Ended::Exit(Exit::Shutdown));
    assert_eq!(restore(&saved, |_, _| ()).end().1, Ended::Exit(Exit::Shutdown));
}

/// Why `vm` did not start.
fn refused(vm: Vm) -> String {
    let (event, ended) = vm.end();
    assert_eq!(ended, Ended::FailedToStart);
    let Event::Error { message, because, .. } = event else { panic!("{event:?}") };
    [vec![message], because].concat().join(": ")
}

/// A saved machine that halts.
fn halted(change: impl FnOnce(&mut MachineConfig, &mut Files)) -> Saved {
    let mut vm = launch(&Program::Halt.image(), change);
    vm.wait_for_guest();
    let (saved, _) = save(&mut vm, true, "a halted guest").unwrap();
    vm.control.call(&Request::Stop).unwrap();
    assert_eq!(vm.end().1, Ended::Exit(Exit::Stopped));
    saved
}

fn contents(config: &mut MachineConfig, text: &str) {
    let Start::Restore(restore) = &mut config.start else { panic!("{config:?}") };
    restore.contents = text.to_owned();
}

fn device(text: &str) -> DeviceSpec {
    serde_json::from_str(text).unwrap()
}

#[test]
fn a_machine_of_another_size_or_with_other_contents_is_refused() {
    let saved = halted(|_, _| ());
    let why = |change: &dyn Fn(&mut MachineConfig)| {
        refused(restore(&saved, |config, _| {
            contents(config, "a halted guest");
            change(config);
        }))
    };
    let cpus = why(&|config| config.cpus = 2.try_into().unwrap());
    assert!(cpus.contains("it has 1 CPUs and 16 MiB, and 2 CPUs and 16 MiB are wanted"), "{cpus}");
    let memory = why(&|config| config.memory = 32.try_into().unwrap());
    assert!(memory.contains("1 CPUs and 32 MiB are wanted"), "{memory}");
    let other = why(&|config| contents(config, "another kernel"));
    assert!(other.contains("in it is \"a halted guest\", and \"another kernel\" is wanted"), "{other}");
    let devices = why(&|config| config.devices.push(device(r#"{"type":"rng"}"#)));
    assert!(devices.contains("it has 0 devices, and 1 are configured"), "{devices}");
}

#[test]
fn devices_keep_their_places_and_another_kind_in_one_is_refused() {
    let mut vm = launch(&Program::Halt.image(), |config, _| {
        config.devices =
            vec![device(r#"{"type":"rng"}"#), device(r#"{"type":"balloon"}"#), device(r#"{"type":"rng"}"#)];
    });
    vm.wait_for_guest();
    vm.control.call(&Request::Detach { device: DeviceName::Number(1), force: false }).unwrap();
    let (saved, _) = save(&mut vm, true, "").unwrap();
    vm.control.call(&Request::Stop).unwrap();
    vm.end();

    let mut again = restore(&saved, |config, _| {
        config.devices = vec![device(r#"{"type":"balloon"}"#), device(r#"{"type":"rng"}"#)];
    });
    let Answer::Metrics(metrics) = again.control.call(&Request::Metrics).unwrap() else { panic!() };
    let places: Vec<_> = metrics.devices.iter().map(|it| (it.device, it.name.as_str())).collect();
    assert_eq!(places, [(2, "balloon"), (3, "rng")]);
    // The free place is free, and so are the addresses of its BAR.
    let rng = Request::Attach { device: device(r#"{"type":"rng"}"#) };
    assert_eq!(again.control.call(&rng).unwrap(), Answer::Attached(Attached { device: 1 }));
    again.control.call(&Request::Stop).unwrap();
    again.end();

    let why = refused(restore(&saved, |config, _| {
        config.devices = vec![device(r#"{"type":"rng"}"#), device(r#"{"type":"balloon"}"#)];
    }));
    assert!(why.contains("its device 2 is a balloon, and a rng is configured for it"), "{why}");
}

#[test]
fn files_that_are_no_snapshot_or_of_two_are_refused() {
    let (one, two) = (halted(|_, _| ()), halted(|_, _| ()));
    let go_on = |state: &File, memory: &File| {
        let saved = Saved { state: state.try_clone().unwrap(), memory: memory.try_clone().unwrap() };
        refused(restore(&saved, |config, _| contents(config, "a halted guest")))
    };
    assert!(go_on(&one.state, &two.memory).contains("the memory does not fit the state"));
    assert!(go_on(&one.memory, &one.state).contains("longer than any state"));
    let empty = tempfile::tempfile().unwrap();
    assert!(go_on(&empty, &one.memory).contains("no saved machine"));
    let null = File::open("/dev/null").unwrap();
    assert!(go_on(&null, &one.memory).contains("no saved machine"));
    assert!(go_on(&one.state, &null).contains("no file of the right size"));
    let short = one.memory.metadata().unwrap().len() - 1;
    one.memory.set_len(short).unwrap();
    assert!(go_on(&one.state, &one.memory).contains("no file of the right size"));
}

#[test]
fn a_changed_byte_anywhere_in_the_state_is_refused() {
    let saved = halted(|_, _| ());
    let length = saved.state.metadata().unwrap().len();
    // All of the header, then one byte in each part.
    for at in (0..24).chain((24..length).step_by(usize::try_from(length / 40).unwrap())) {
        let mut byte = [0];
        saved.state.read_exact_at(&mut byte, at).unwrap();
        saved.state.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        let why = refused(restore(&saved, |config, _| contents(config, "a halted guest")));
        assert!(why.starts_with("cannot go on from the snapshot"), "{at}: {why}");
        saved.state.write_all_at(&byte, at).unwrap();
    }
}

#[test]
fn a_state_that_was_changed_with_its_checksum_never_takes_the_process_down() {
    let kinds = |config: &mut MachineConfig, files: &mut Files| {
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(1 << 20).unwrap();
        let disk = format!(r#"{{"type":"block","disk":{}}}"#, files.add(disk).0);
        let others = [r#"{"type":"rng"}"#, r#"{"type":"balloon"}"#, r#"{"type":"vsock","guest_cid":3}"#];
        config.devices = others.map(device).into_iter().chain([device(&disk)]).collect();
    };
    let saved = halted(kinds);
    let mut bytes = vec![0; usize::try_from(saved.state.metadata().unwrap().len()).unwrap()];
    saved.state.read_exact_at(&mut bytes, 0).unwrap();
    let mut refusals = 0;
    for round in 0..250usize {
        let mut changed = bytes.clone();
        // Spread over the whole of it, with values that are lengths, signs and nonsense.
        let at = 24 + (round * 7919) % (bytes.len() - 24);
        changed[at] = [0xff, 0x00, 0x80, 0x7f][round % 4];
        changed.drain(12..16).for_each(drop);
        let sum = crc32fast::hash(&changed);
        changed.splice(12..12, sum.to_le_bytes());
        saved.state.set_len(0).unwrap();
        saved.state.write_all_at(&changed, 0).unwrap();
        let mut vm = restore(&saved, |config, files| {
            contents(config, "a halted guest");
            kinds(config, files);
        });
        // One that goes on may do what it likes, but for taking its process down.
        let _ = vm.control.call(&Request::Stop);
        let ended = vm.end().1;
        assert!(matches!(ended, Ended::Exit(_) | Ended::FailedToStart), "byte {at}: {ended:?}");
        refusals += usize::from(ended == Ended::FailedToStart);
    }
    assert!(refusals > 0 && refusals < 250, "{refusals}: it tells something from nothing");
}

#[test]
fn a_snapshot_that_cannot_be_written_leaves_the_machine_as_it_was() {
    let mut vm = super::run(Program::Halt);
    vm.wait_for_guest();
    let (file, read_only) =
        (tempfile::NamedTempFile::new().unwrap(), |path: &Path| File::open(path).unwrap());
    let request = Request::Snapshot { resume: false, contents: String::new(), base: false };
    let nowhere = read_only(file.path());
    for files in
        [&[][..], &[file.as_fd()], &[file.as_fd(), nowhere.as_fd()], &[nowhere.as_fd(), file.as_fd()]]
    {
        vm.control.call_with(&request, files).unwrap_err();
        assert_eq!(vm.state(), MachineState::Running);
    }
    let long = Request::Snapshot { resume: true, contents: "x".repeat(1025), base: false };
    let error = vm.control.call_with(&long, &[file.as_fd(), file.as_fd()]).unwrap_err().to_string();
    assert!(error.contains("1025 bytes"), "{error}");
    vm.control.call(&Request::Stop).unwrap();
    assert_eq!(vm.end().1, Ended::Exit(Exit::Stopped));
}
