//! What is asked of a machine that runs: devices come and go.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mvm_devices::fd::FdSlot;
use mvm_devices::throttle::{Limit, Meters};
use mvm_devices::virtio::{DeviceSpec, mem, net};
use mvm_vmm::config::MachineId;
use mvm_vmm::control::{Answer, Attached, Client, DeviceName, Memory, Request, Snapshot as Saved};

use super::device::{disk_spec, open_disk, tap_spec};
use super::plan::{Disk, OpenTap};
use crate::failure::{Context, Failure};

/// Longest wait for an answer. Generous: an emulated host is thirty times slower.
const ANSWER_TIME: Duration = Duration::from_secs(60);
/// The same for a machine's memory to be written, at the pace of a slow disk.
const SAVE_TIME: Duration = Duration::from_secs(30 * 60);
/// The first file of a request.
const FIRST: FdSlot = FdSlot(0);

/// The connection to a machine's process. Clones share it; it is of no use once the machine has ended.
#[derive(Clone, Debug)]
pub struct Control {
    id: MachineId,
    /// `None` once an answer was lost: what comes next would be taken for it.
    client: Arc<Mutex<Option<Client>>>,
    /// What its disks and cards are charged at.
    meters: Meters,
}

impl Control {
    pub(super) fn new(id: MachineId, stream: UnixStream, meters: Meters) -> io::Result<Self> {
        stream.set_read_timeout(Some(ANSWER_TIME))?;
        stream.set_write_timeout(Some(ANSWER_TIME))?;
        Ok(Self { id, client: Arc::new(Mutex::new(Some(Client::new(stream)))), meters })
    }

    pub(super) fn id(&self) -> &MachineId {
        &self.id
    }

    /// Attaches a disk. The guest finds it, by its serial number, when it looks at its PCI bus again.
    ///
    /// # Errors
    /// The file cannot be opened, or the machine refuses it: its bus is full.
    pub fn attach_disk(&self, disk: &Disk) -> Result<Attached, Failure> {
        let file = open_disk(disk)?;
        self.attach(disk_spec(disk, FIRST), file.as_fd())
            .context(|| format!("cannot attach disk image {} to machine {}", disk.path.display(), self.id))
    }

    /// Attaches a network interface. The guest finds it, by its hardware address, when it looks at its PCI bus
    /// again.
    ///
    /// # Errors
    /// The machine refuses it: its bus is full, or the file is no tap.
    pub fn attach_net(&self, tap: &OpenTap) -> Result<Attached, Failure> {
        let spec = tap_spec(tap.mac, tap.mtu, tap.only_own_mac, FIRST);
        self.attach(spec, tap.file.as_fd())
            .context(|| format!("cannot attach a network interface to machine {}", self.id))
    }

    /// Attaches what plugs up to `most_mib` of memory, once. The guest finds it when it looks at its PCI bus again.
    ///
    /// # Errors
    /// The machine refuses it: it was not made for so much.
    pub fn attach_memory(&self, most_mib: u64) -> Result<Attached, Failure> {
        let spec = DeviceSpec::Mem(mem::Config { size_mib: most_mib, address: 0 });
        let attached = self.call(&Request::Attach { device: spec }, &[]).and_then(device);
        attached.context(|| format!("cannot attach more memory to machine {}", self.id))
    }

    /// Has the guest have `size_mib` of memory in all, as soon as it can; none changes nothing. Tells where that
    /// stands.
    ///
    /// # Errors
    /// The machine cannot have so much, or its memory does not change.
    pub fn memory(&self, size_mib: Option<u64>) -> Result<Memory, Failure> {
        let answer = match self.call(&Request::Memory { size_mib }, &[]) {
            Ok(Answer::Memory(memory)) => Ok(memory),
            Ok(other) => Err(io::Error::other(format!("the answer is no size: {other:?}"))),
            Err(error) => Err(error),
        };
        answer.context(|| format!("cannot change the memory of machine {}", self.id))
    }

    /// Limits how fast it may use its disks or its network, from now on.
    ///
    /// # Errors
    /// It was made without meters.
    pub fn limit(&self, limit: &Limit) -> Result<(), Failure> {
        if !self.meters.exist() {
            return Err(Failure::new(format!("machine {} cannot be limited: it has no meters", self.id)));
        }
        self.meters.set(limit);
        Ok(())
    }

    /// Detaches the disk of this serial number and closes its file. The guest must have removed it.
    ///
    /// # Errors
    /// There is no such disk, or the guest uses it.
    pub fn detach_disk(&self, serial: &str) -> Result<(), Failure> {
        self.detach(DeviceName::Serial(serial.to_owned()), false)
    }

    /// Detaches a device and closes its file. The guest must have removed it, unless it is done by `force`: it is
    /// then as if the device were pulled out.
    ///
    /// # Errors
    /// There is no such device, or the guest uses it.
    pub fn detach(&self, device: DeviceName, force: bool) -> Result<(), Failure> {
        let what = match &device {
            DeviceName::Number(number) => format!("device {number}"),
            DeviceName::Serial(serial) => format!("disk {serial:?}"),
        };
        match self.call(&Request::Detach { device, force }, &[]) {
            Ok(_) => Ok(()),
            Err(error) => {
                Err(Failure::because(format!("cannot detach {what} of machine {}", self.id), error))
            }
        }
    }

    /// Numbers of its network cards, in order.
    ///
    /// # Errors
    /// The machine does not answer.
    pub fn cards(&self) -> Result<Vec<u8>, Failure> {
        let answer = match self.call(&Request::Metrics, &[]) {
            Ok(Answer::Metrics(metrics)) => Ok(metrics),
            Ok(other) => Err(io::Error::other(format!("the answer is no list: {other:?}"))),
            Err(error) => Err(error),
        };
        let metrics = answer.context(|| format!("cannot list the devices of machine {}", self.id))?;
        let cards = metrics.devices.iter().filter(|device| device.name == net::KIND.name);
        Ok(cards.map(|device| device.device).collect())
    }

    /// Saves the machine into two files, whose former content is lost. It is held meanwhile, and goes on
    /// afterwards if `resume` says so and it was not paused before. `contents` says what is in it: who restores it
    /// must say the same.
    ///
    /// # Errors
    /// A file cannot be written, or the machine cannot be held. It then is as it was before.
    pub fn snapshot(
        &self,
        state: BorrowedFd<'_>,
        memory: BorrowedFd<'_>,
        contents: &str,
        resume: bool,
    ) -> Result<Saved, Failure> {
        let request = Request::Snapshot { resume, contents: contents.to_owned(), base: false };
        self.save(&request, &[state, memory])
    }

    /// The same, but that of the memory only what differs from a base is written: the last of state, memory and base is
    /// the whole memory of a machine of this size.
    ///
    /// # Errors
    /// As [`Control::snapshot`], or the base is none.
    pub fn snapshot_above(
        &self,
        files: [BorrowedFd<'_>; 3],
        contents: &str,
        resume: bool,
    ) -> Result<Saved, Failure> {
        self.save(&Request::Snapshot { resume, contents: contents.to_owned(), base: true }, &files)
    }

    fn save(&self, request: &Request, files: &[BorrowedFd<'_>]) -> Result<Saved, Failure> {
        let answer = match self.call_within(SAVE_TIME, request, files) {
            Ok(Answer::Snapshot(saved)) => Ok(saved),
            Ok(other) => Err(io::Error::other(format!("the answer is no snapshot: {other:?}"))),
            Err(error) => Err(error),
        };
        answer.context(|| format!("cannot save machine {}", self.id))
    }

    /// Holds the machine: its CPUs, then its devices.
    ///
    /// # Errors
    /// Something of it does not let itself be held; all of it goes on then.
    pub fn pause(&self) -> Result<(), Failure> {
        let paused = self.call(&Request::Pause, &[]).map(drop);
        paused.context(|| format!("cannot hold machine {}", self.id))
    }

    /// Lets the machine go on.
    ///
    /// # Errors
    /// The machine does not answer.
    pub fn resume(&self) -> Result<(), Failure> {
        let resumed = self.call(&Request::Resume, &[]).map(drop);
        resumed.context(|| format!("cannot let machine {} go on", self.id))
    }

    /// Asks anything.
    ///
    /// # Errors
    /// The machine's reason, or that it gives no answer.
    pub fn call(&self, request: &Request, files: &[BorrowedFd<'_>]) -> io::Result<Answer> {
        self.call_within(ANSWER_TIME, request, files)
    }

    fn call_within(&self, time: Duration, request: &Request, files: &[BorrowedFd<'_>]) -> io::Result<Answer> {
        let mut place = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        let client = place.as_mut().ok_or_else(|| io::Error::from(ErrorKind::NotConnected))?;
        client.set_patience(time)?;
        let answer = client.call_with(request, files);
        // Refusals are of these kinds; anything else says that the connection is of no more use.
        let refusals = [ErrorKind::Other, ErrorKind::ResourceBusy];
        if answer.as_ref().is_err_and(|error| !refusals.contains(&error.kind())) {
            *place = None;
        }
        answer
    }

    fn attach(&self, spec: DeviceSpec, file: BorrowedFd<'_>) -> io::Result<Attached> {
        self.call(&Request::Attach { device: spec }, &[file]).and_then(device)
    }
}

fn device(answer: Answer) -> io::Result<Attached> {
    match answer {
        Answer::Attached(attached) => Ok(attached),
        other => Err(io::Error::other(format!("the answer is no device: {other:?}"))),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::{BufRead, BufReader, Write};

    use super::*;

    /// A machine that answers each request with the next of `answers`, then closes. Returns what was asked.
    pub(crate) fn answering(answers: &'static [&str]) -> (Control, std::thread::JoinHandle<Vec<String>>) {
        played(answers.iter().copied())
    }

    /// A machine that is busy whatever it is asked, until nobody is there. Returns what was asked.
    pub(crate) fn busy() -> (Control, std::thread::JoinHandle<Vec<String>>) {
        played(std::iter::repeat(r#"{"busy":"a device is busy"}"#))
    }

    fn played(
        answers: impl Iterator<Item = &'static str> + Send + 'static,
    ) -> (Control, std::thread::JoinHandle<Vec<String>>) {
        let (near, far) = UnixStream::pair().unwrap();
        let host = std::thread::spawn(move || {
            let mut reader = BufReader::new(far);
            let asked = answers.map_while(|answer| {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap() == 0 {
                    return None;
                }
                writeln!(reader.get_mut(), "{answer}").unwrap();
                Some(line.trim().to_owned())
            });
            asked.collect()
        });
        (Control::new("m".parse().unwrap(), near, Meters::default()).unwrap(), host)
    }

    #[test]
    fn a_disk_is_attached_with_its_file_and_detached_by_its_serial() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let disk =
            Disk { path: file.path().to_path_buf(), read_only: true, serial: "d".into(), throwaway: false };
        let (control, host) = answering(&[r#"{"ok":{"device":5}}"#, r#"{"ok":{}}"#]);
        assert_eq!(control.attach_disk(&disk).unwrap(), Attached { device: 5 });
        control.detach_disk("d").unwrap();
        let asked = host.join().unwrap();
        assert!(
            asked[0].starts_with(r#"{"command":"attach","device":{"type":"block","disk":0"#),
            "{asked:?}"
        );
        assert_eq!(asked[1], r#"{"command":"detach","device":"d"}"#);
    }

    #[test]
    fn a_machine_is_saved_into_two_files_and_says_why_if_it_is_not() {
        let files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
        let (control, host) = answering(&[
            r#"{"ok":{"memory_bytes":8192,"state_bytes":7000,"held_ns":5}}"#,
            r#"{"error":"a device is busy"}"#,
            r#"{"ok":{}}"#,
            r#"{"ok":{"memory_bytes":4096,"state_bytes":7000,"held_ns":5}}"#,
        ]);
        let save = |resume| control.snapshot(files[0].as_fd(), files[1].as_fd(), "a kernel", resume);
        assert_eq!(save(true).unwrap(), Saved { memory_bytes: 8192, state_bytes: 7000, held_ns: 5 });
        let refused = save(false).unwrap_err().report();
        assert!(
            refused.contains("cannot save machine m") && refused.contains("a device is busy"),
            "{refused}"
        );
        save(true).unwrap_err();
        let above = [files[0].as_fd(), files[1].as_fd(), files[0].as_fd()];
        assert_eq!(control.snapshot_above(above, "k", false).unwrap().memory_bytes, 4096);
        let asked = host.join().unwrap();
        assert_eq!(asked[0], r#"{"command":"snapshot","resume":true,"contents":"a kernel"}"#);
        assert_eq!(asked[1], r#"{"command":"snapshot","resume":false,"contents":"a kernel"}"#);
        assert_eq!(asked[3], r#"{"command":"snapshot","resume":false,"contents":"k","base":true}"#);
    }

    #[test]
    fn a_refusal_is_said_and_leaves_the_connection_and_an_end_does_not() {
        let (control, host) = answering(&[
            r#"{"error":"the guest uses it"}"#,
            r#"{"busy":"a device is busy"}"#,
            r#"{"ok":{}}"#,
        ]);
        let refused = control.detach_disk("d").unwrap_err().report();
        assert!(refused.contains(r#"cannot detach disk "d" of machine m"#), "{refused}");
        assert!(refused.contains("the guest uses it"), "{refused}");
        let busy = control.detach_disk("d").unwrap_err();
        assert_eq!(busy.source_kind(), Some(ErrorKind::ResourceBusy), "{}", busy.report());
        control.detach(DeviceName::Number(3), true).unwrap();
        host.join().unwrap();
        for _ in 0..2 {
            control.detach_disk("d").unwrap_err();
        }
    }
}
