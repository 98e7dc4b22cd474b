//! `fake_machine`: stands in for `mvm-vmm` where no guest can run. It takes what a machine is started with, dials as an
//! agent does, says yes to everything, and ends with whoever started it.
#![allow(unsafe_code)] // the descriptors it was started with

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use mvm_devices::sys::receive_with_files;
use mvm_devices::virtio::DeviceSpec;
use mvm_protocol::{
    CONTROL_PORT, Decoder, Event, ExitStatus, GuestMessage, Hello, HostMessage, MAGIC, Reply, Request,
    STREAM_PORT, Stamp, Start, Stdio, StreamHeader, Token, VERSION, encode,
};
use mvm_vmm::config::{CONFIG_FD, MachineConfig};
use mvm_vmm::status::{Event as Status, Stages, now};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, sendmsg};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Bytes of a question about a call, and of its answer (`devices/src/virtio/vsock/dialer.rs`).
const MESSAGE: usize = 16;

fn main() -> Result<()> {
    let mut text = Vec::new();
    file(CONFIG_FD.try_into()?).read_to_end(&mut text)?;
    let config: MachineConfig = serde_json::from_slice(&text)?;
    let dialer = config.devices.iter().find_map(|device| match device {
        DeviceSpec::Vsock(vsock) => vsock.dialer,
        _ => None,
    });
    let number = |slot: mvm_devices::fd::FdSlot| RawFd::try_from(slot.0);
    let dialer = file(number(dialer.ok_or("a machine without an agent")?)?).into();
    let status = file(number(config.status.ok_or("nobody is told")?)?);
    let mut guest = Guest { dialer, dialled: 0, status, processes: Vec::new(), control: None };
    let ns = now();
    let stages =
        Stages { entered_ns: ns, config_ns: ns, loaded_ns: ns, vm_ns: ns, devices_ns: ns, vcpus_ns: ns };
    guest.tell(&Status::Started { stages })?;
    guest.tell(&Status::FirstExit { run_ns: ns, ns: now() })?;
    guest.serve()
}

fn file(number: RawFd) -> File {
    // SAFETY: each descriptor of the configuration is taken once, and was open when this process started.
    unsafe { File::from_raw_fd(number) }
}

struct Guest {
    dialer: OwnedFd,
    /// Calls so far.
    dialled: u64,
    status: File,
    processes: Vec<Running>,
    control: Option<UnixStream>,
}

/// A process that was started, and its streams.
struct Running {
    id: u64,
    _streams: Vec<UnixStream>,
}

impl Guest {
    fn tell(&mut self, event: &Status) -> Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        Ok(self.status.write_all(&line)?)
    }

    fn dial(&mut self, port: u32) -> Result<UnixStream> {
        self.dialled += 1;
        let mut question = [0; MESSAGE];
        question[..8].copy_from_slice(&self.dialled.to_le_bytes());
        question[8..12].copy_from_slice(&port.to_le_bytes());
        let text = [IoSlice::new(&question)];
        sendmsg::<()>(self.dialer.as_raw_fd(), &text, &[], MsgFlags::empty(), None)?;
        let mut answer = [0; MESSAGE];
        let (_, files) = receive_with_files(std::os::fd::AsFd::as_fd(&self.dialer), &mut answer, 0)?;
        Ok(files.into_iter().next().ok_or("the call was refused")?.into())
    }

    fn send(&mut self, message: &GuestMessage) -> Result<()> {
        let control = self.control.as_mut().ok_or("it has not called")?;
        Ok(control.write_all(&encode(message)?)?)
    }

    fn serve(mut self) -> Result<()> {
        let control = self.dial(CONTROL_PORT)?;
        let mut from = control.try_clone()?;
        self.control = Some(control);
        self.send(&GuestMessage::Hello(Hello {
            magic: MAGIC,
            version: VERSION,
            agent_version: "0".to_owned(),
            kernel_release: "0".to_owned(),
            connection: 0,
            stages: Default::default(),
        }))?;
        let (mut decoder, mut bytes) = (Decoder::new(), vec![0; 1 << 16]);
        loop {
            let mut ready = [
                PollFd::new(std::os::fd::AsFd::as_fd(&from), PollFlags::POLLIN),
                PollFd::new(std::os::fd::AsFd::as_fd(&self.status), PollFlags::empty()),
            ];
            poll(&mut ready, PollTimeout::NONE)?;
            if ready[1].revents().is_some_and(|it| !it.is_empty()) {
                return Ok(()); // whoever started it is gone
            }
            let count = from.read(&mut bytes)?;
            if count == 0 {
                return Ok(());
            }
            decoder.push(&bytes[..count]);
            while let Some(message) = decoder.next_message::<HostMessage>().map_err(|it| it.to_string())? {
                if let HostMessage::Request { id, request } = message {
                    self.answer(id, request)?;
                }
            }
        }
    }

    fn answer(&mut self, id: u64, request: Request) -> Result<()> {
        let reply = match &request {
            Request::Start(start) => self.start(start)?,
            Request::List => Reply::Processes(Vec::new()),
            Request::Stats => Reply::Stats(Default::default()),
            Request::Clock => Reply::Clock(0),
            _ => Reply::Done,
        };
        self.send(&GuestMessage::Response { id, result: Ok(reply) })?;
        match request {
            Request::Start(start) if start.args.iter().any(|word| word == "true") => {
                self.end(start.process, ExitStatus::Code(0))
            }
            Request::Signal { process, signal, .. } => {
                self.end(process, ExitStatus::Signal(u8::try_from(signal)?))
            }
            Request::Shutdown { .. } => {
                self.tell(&Status::Exit { exit: mvm_vmm::exit::Exit::Shutdown, ns: now() })?;
                std::process::exit(mvm_vmm::exit::Exit::Shutdown.code().into());
            }
            _ => Ok(()),
        }
    }

    fn start(&mut self, start: &Start) -> Result<Reply> {
        let tokens: Vec<Token> = match &start.stdio {
            Stdio::Pipes { stdin, stdout, stderr } => {
                [stdin, stdout, stderr].into_iter().flatten().copied().collect()
            }
            Stdio::Terminal { stream, .. } => vec![*stream],
        };
        let mut streams = Vec::new();
        for token in tokens {
            let mut stream = self.dial(STREAM_PORT)?;
            stream.write_all(&StreamHeader { token }.encode())?;
            streams.push(stream);
        }
        self.processes.push(Running { id: start.process, _streams: streams });
        Ok(Reply::Started { pid: 2 })
    }

    /// A process ends: its streams first, as an agent has it.
    fn end(&mut self, process: u64, status: ExitStatus) -> Result<()> {
        let before = self.processes.len();
        self.processes.retain(|it| it.id != process);
        if self.processes.len() == before {
            return Ok(());
        }
        let at = Stamp { monotonic_ns: 1, boottime_ns: 1 };
        self.send(&GuestMessage::Event(Event::Exited { process, status, at }))
    }
}
