//! What is asked of a machine that runs: devices come and go.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mvm_devices::fd::FdSlot;
use mvm_devices::virtio::DeviceSpec;
use mvm_vmm::config::MachineId;
use mvm_vmm::control::{Answer, Attached, Client, DeviceName, Request};

use super::device::{disk_spec, open_disk, tap_spec};
use super::plan::{Disk, OpenTap};
use crate::failure::{Context, Failure};

/// Longest wait for an answer. Generous: an emulated host is thirty times slower.
const ANSWER_TIME: Duration = Duration::from_secs(60);
/// The first file of a request.
const FIRST: FdSlot = FdSlot(0);

/// The connection to a machine's process. Clones share it; it is of no use once the machine has ended.
#[derive(Clone, Debug)]
pub struct Control {
    id: MachineId,
    /// `None` once an answer was lost: what comes next would be taken for it.
    client: Arc<Mutex<Option<Client>>>,
}

impl Control {
    pub(super) fn new(id: MachineId, stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(ANSWER_TIME))?;
        stream.set_write_timeout(Some(ANSWER_TIME))?;
        Ok(Self { id, client: Arc::new(Mutex::new(Some(Client::new(stream)))) })
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

    /// Asks anything.
    ///
    /// # Errors
    /// The machine's reason, or that it gives no answer.
    pub fn call(&self, request: &Request, files: &[BorrowedFd<'_>]) -> io::Result<Answer> {
        let mut place = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        let client = place.as_mut().ok_or_else(|| io::Error::from(ErrorKind::NotConnected))?;
        let answer = client.call_with(request, files);
        // A refusal is of this kind; anything else says that the connection is of no more use.
        if answer.as_ref().is_err_and(|error| error.kind() != ErrorKind::Other) {
            *place = None;
        }
        answer
    }

    fn attach(&self, device: DeviceSpec, file: BorrowedFd<'_>) -> io::Result<Attached> {
        match self.call(&Request::Attach { device }, &[file])? {
            Answer::Attached(attached) => Ok(attached),
            other => Err(io::Error::other(format!("the answer is no device: {other:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};

    use super::*;

    /// A machine that answers each request with the next of `answers`, then closes. Returns what was asked.
    fn machine(answers: &'static [&str]) -> (Control, std::thread::JoinHandle<Vec<String>>) {
        let (near, far) = UnixStream::pair().unwrap();
        let host = std::thread::spawn(move || {
            let mut reader = BufReader::new(far);
            let asked = answers.iter().map(|answer| {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                writeln!(reader.get_mut(), "{answer}").unwrap();
                line.trim().to_owned()
            });
            asked.collect()
        });
        (Control::new("m".parse().unwrap(), near).unwrap(), host)
    }

    #[test]
    fn a_disk_is_attached_with_its_file_and_detached_by_its_serial() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let disk =
            Disk { path: file.path().to_path_buf(), read_only: true, serial: "d".into(), throwaway: false };
        let (control, host) = machine(&[r#"{"ok":{"device":5}}"#, r#"{"ok":{}}"#]);
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
    fn a_refusal_is_said_and_leaves_the_connection_and_an_end_does_not() {
        let (control, host) = machine(&[r#"{"error":"the guest uses it"}"#, r#"{"ok":{}}"#]);
        let refused = control.detach_disk("d").unwrap_err().report();
        assert!(refused.contains(r#"cannot detach disk "d" of machine m"#), "{refused}");
        assert!(refused.contains("the guest uses it"), "{refused}");
        control.detach(DeviceName::Number(3), true).unwrap();
        host.join().unwrap();
        for _ in 0..2 {
            control.detach_disk("d").unwrap_err();
        }
    }
}
