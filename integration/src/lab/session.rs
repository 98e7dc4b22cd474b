//! One QEMU from start to end: a single loop over its channels, so nothing blocks but the caller's own writers.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdout};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::pulse::Pulse;
use super::stream::Tail;
use super::workdir::Workdir;
use super::{Error, Image, Options, Outcome, qemu};

/// Lines of the console that an error shows.
const SHOWN: usize = 12;
/// How the kernel begins the report of a crash.
const CRASHES: [&str; 4] = ["BUG:", "Oops:", "int3:", "Kernel panic"];
/// Lines of the console that are kept.
const KEPT: usize = 10_000;

/// How often the pulse is felt while nothing comes.
const CHECK: Duration = Duration::from_secs(2);

/// Where the command's output goes.
pub(super) struct Sinks<'a> {
    pub(super) stdout: &'a mut dyn Write,
    pub(super) stderr: &'a mut dyn Write,
}

/// A running emulated host.
#[derive(Debug)]
pub(super) struct Session {
    child: Child,
    started: Instant,
    inputs: Vec<Input>,
    console: Console,
    qemu_said: Vec<u8>,
    out: Tail,
    err: Tail,
    control: Vec<u8>,
    command_started: Option<Instant>,
    status: Option<(u8, Instant)>,
    limit: Duration,
    pulse: Pulse,
}

/// One thing to wait for.
#[derive(Debug)]
enum Input {
    Console(ChildStdout),
    Qemu(ChildStderr),
    Waiting(Channel, UnixListener),
    Open(Channel, UnixStream),
}

#[derive(Debug, Clone, Copy)]
enum Channel {
    Out,
    Err,
    Control,
}

impl Session {
    pub(super) fn start(options: &Options, image: &Image, dir: &Workdir) -> Result<Self, Error> {
        let mut inputs = Vec::new();
        for (channel, name) in [Channel::Out, Channel::Err, Channel::Control].into_iter().zip(qemu::CHANNELS)
        {
            let path = dir.socket(name);
            let listener = UnixListener::bind(&path).map_err(Error::file("bind", &path))?;
            inputs.push(Input::Waiting(channel, listener));
        }
        let mut command = qemu::command(options, image, dir)?;
        let started = Instant::now();
        let mut child = command.spawn().map_err(Error::file("run", command.get_program()))?;
        let pulse = Pulse::new(child.id());
        inputs.extend(child.stdout.take().map(Input::Console));
        inputs.extend(child.stderr.take().map(Input::Qemu));
        Ok(Self {
            child,
            started,
            inputs,
            console: Console::default(),
            qemu_said: Vec::new(),
            out: Tail::new(&dir.token),
            err: Tail::new(&dir.token),
            control: Vec::new(),
            command_started: None,
            status: None,
            limit: options.timeout,
            pulse,
        })
    }

    pub(super) fn console(&self) -> &Console {
        &self.console
    }

    /// Runs until the command has ended and its output is drained, or until `deadline`.
    pub(super) fn drive(&mut self, deadline: Instant, sinks: &mut Sinks<'_>) -> Result<Outcome, Error> {
        let mut buffer = vec![0; 256 * 1024];
        loop {
            if let Some(outcome) = self.outcome() {
                return Ok(outcome);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::TimedOut { after: self.limit, console: self.console.ending() });
            }
            let ready = self.ready(left.min(CHECK))?;
            if ready.is_empty() && self.pulse.stopped() {
                return Err(Error::Hung { after: self.started.elapsed(), console: self.console.ending() });
            }
            for index in ready {
                self.receive(index, &mut buffer, sinks)?;
            }
        }
    }

    fn outcome(&self) -> Option<Outcome> {
        let (status, ended) = self.status?;
        let began = self.command_started?;
        (self.out.ended() && self.err.ended()).then(|| Outcome {
            status,
            reruns: 0,
            boot: began - self.started,
            command: ended - began,
        })
    }

    /// The inputs with something to read, after at most `left`.
    fn ready(&self, left: Duration) -> Result<Vec<usize>, Error> {
        let mut fds: Vec<PollFd<'_>> =
            self.inputs.iter().map(|input| PollFd::new(input.as_fd(), PollFlags::POLLIN)).collect();
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(Error::Channel("poll", errno.into())),
        }
        let some = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        Ok(fds.iter().enumerate().filter(|(_, fd)| some(fd)).map(|(index, _)| index).collect())
    }

    fn receive(&mut self, index: usize, buffer: &mut [u8], sinks: &mut Sinks<'_>) -> Result<(), Error> {
        let Some(input) = self.inputs.get_mut(index) else { return Ok(()) };
        if let Input::Waiting(channel, listener) = input {
            let (stream, _) =
                listener.accept().map_err(|error| Error::Channel("accept QEMU's connection", error))?;
            *input = Input::Open(*channel, stream);
            return Ok(());
        }
        let read = match input.read(buffer) {
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(Error::Channel("read from QEMU", error)),
        };
        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else {
            return Err(self.died());
        };
        match input {
            Input::Console(_) => self.console.push(bytes),
            Input::Qemu(_) => self.qemu_said.extend_from_slice(bytes),
            Input::Open(Channel::Out, _) => forward(&mut self.out, bytes, sinks.stdout)?,
            Input::Open(Channel::Err, _) => forward(&mut self.err, bytes, sinks.stderr)?,
            Input::Open(Channel::Control, _) => self.control(bytes),
            Input::Waiting(..) => {}
        }
        Ok(())
    }

    /// Takes in the second stage's words.
    fn control(&mut self, bytes: &[u8]) {
        self.control.extend_from_slice(bytes);
        while let Some(end) = self.control.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.control.drain(..=end).collect();
            match String::from_utf8_lossy(&line).trim_end() {
                "started" => self.command_started = Some(Instant::now()),
                "beat" => {}
                line => {
                    let status = line.strip_prefix("exit ").and_then(|status| status.parse().ok());
                    self.status = Some((status.unwrap_or(u8::MAX), Instant::now()));
                }
            }
            self.pulse.beat();
        }
    }

    /// QEMU closed a channel: collects its last words.
    fn died(&mut self) -> Error {
        for input in &mut self.inputs {
            match input {
                Input::Console(from) => {
                    let mut rest = Vec::new();
                    if from.read_to_end(&mut rest).is_ok() {
                        self.console.push(&rest);
                    }
                }
                // What cannot be read any more is not needed for the report.
                Input::Qemu(from) => drop(from.read_to_end(&mut self.qemu_said)),
                Input::Waiting(..) | Input::Open(..) => {}
            }
        }
        let said = String::from_utf8_lossy(&self.qemu_said);
        let said = said.trim().lines().last().unwrap_or("nothing").to_owned();
        Error::Died { said, console: self.console.ending() }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Its state is all in memory and ours to throw away; a failure means it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl AsFd for Input {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Console(pipe) => pipe.as_fd(),
            Self::Qemu(pipe) => pipe.as_fd(),
            Self::Waiting(_, listener) => listener.as_fd(),
            Self::Open(_, stream) => stream.as_fd(),
        }
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Console(pipe) => pipe.read(buffer),
            Self::Qemu(pipe) => pipe.read(buffer),
            Self::Open(_, stream) => stream.read(buffer),
            Self::Waiting(..) => Ok(0),
        }
    }
}

fn forward(tail: &mut Tail, bytes: &[u8], sink: &mut dyn Write) -> Result<(), Error> {
    let bytes = tail.push(bytes);
    sink.write_all(&bytes).and_then(|()| sink.flush()).map_err(Error::Sink)
}

/// The emulated kernel's console, line by line.
#[derive(Debug, Default)]
pub(super) struct Console {
    lines: VecDeque<String>,
    partial: Vec<u8>,
}

impl Console {
    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte != b'\n' {
                self.partial.push(byte);
                continue;
            }
            let line = String::from_utf8_lossy(&self.partial).trim_end().to_owned();
            self.partial.clear();
            self.lines.push_back(line);
            if self.lines.len() > KEPT {
                self.lines.pop_front();
            }
        }
    }

    /// What an error shows: from the first word of a crash, or else the last lines.
    fn ending(&self) -> Vec<String> {
        let crash = self.lines.iter().position(|line| CRASHES.iter().any(|words| line.contains(words)));
        let start = crash.unwrap_or(usize::MAX).min(self.lines.len().saturating_sub(SHOWN));
        self.lines.iter().skip(start).take(SHOWN).cloned().collect()
    }

    pub(super) fn save(&self, path: &Path) -> Result<(), Error> {
        let text: String = self.lines.iter().flat_map(|line| [line, "\n"]).collect();
        std::fs::write(path, text).map_err(Error::file("write", path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console(lines: impl IntoIterator<Item = String>) -> Console {
        let mut console = Console::default();
        lines.into_iter().for_each(|line| console.push(format!("{line}\r\n").as_bytes()));
        console
    }

    #[test]
    fn an_ending_is_the_last_lines() {
        let lines: Vec<_> = (0..50).map(|number| format!("line {number}")).collect();
        assert_eq!(console(lines.clone()).ending(), lines[38..]);
        assert_eq!(console(lines[..3].to_vec()).ending(), lines[..3]);
    }

    #[test]
    fn an_ending_in_a_crash_begins_with_its_cause() {
        let trace = (0..50).map(|number| format!("trace {number}"));
        let lines = ["fine".to_owned(), "[ 6.7] Kernel panic - not syncing: why".to_owned()];
        let ending = console(lines.into_iter().chain(trace)).ending();
        assert_eq!(ending[0], "[ 6.7] Kernel panic - not syncing: why");
        assert_eq!(ending.len(), SHOWN);
    }
}
