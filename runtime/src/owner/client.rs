//! Asking the owner of a container for something.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use mvm_protocol::WindowSize;

use super::exit_code::Refused;
use super::wire::{Exec, Reply, Request, Wire};
use crate::failure::{Context, Failure};
use crate::state::{CONTROL, Seen};

/// A connection to a container's owner.
#[derive(Debug)]
pub struct Client {
    wire: Wire,
    name: String,
}

/// A process that was started for us, and its streams.
#[derive(Debug)]
pub struct Started {
    /// Its terminal, or standard input where it was asked for, output and error.
    pub streams: Vec<UnixStream>,
    wire: Wire,
    control: Wire,
}

impl Client {
    /// Connects to a container's owner.
    ///
    /// # Errors
    /// The container does not run.
    pub fn connect(seen: &Seen) -> Result<Self, Failure> {
        Self::reach(seen)?.ok_or_else(|| seen.record.not_running())
    }

    /// Connects to a container's owner; `None` if nobody listens: it has not begun to, or no longer does, or is gone.
    ///
    /// # Errors
    /// The host's reason.
    pub fn reach(seen: &Seen) -> Result<Option<Self>, Failure> {
        match UnixStream::connect(seen.directory.join(CONTROL)) {
            Ok(stream) => Ok(Some(Self { wire: Wire::new(stream), name: seen.record.name.clone() })),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                Ok(None)
            }
            Err(error) => Err(Failure::because(
                format!("cannot reach the owner of container {}", seen.record.name),
                error,
            )),
        }
    }

    /// Asks for one thing and waits for the answer.
    ///
    /// # Errors
    /// The owner's reason, or it went away.
    pub fn ask(mut self, request: &Request) -> Result<Reply, Failure> {
        let name = self.name.clone();
        self.wire.send(request, &[]).context(|| format!("cannot ask the owner of container {name}"))?;
        answer(&mut self.wire, &name).map(|(reply, _)| reply)
    }

    /// Asks for the container's end and waits for it. An owner that goes away instead of answering has nothing left to
    /// own: that is the end.
    ///
    /// # Errors
    /// The owner's reason.
    pub fn stop(mut self, grace_s: u32) -> Result<(), Failure> {
        let request = Request::Stop { grace_s };
        self.wire
            .send(&request, &[])
            .context(|| format!("cannot ask the owner of container {}", self.name))?;
        answer_or_end(&mut self.wire, &self.name).map(drop)
    }

    /// Runs a process in the container.
    ///
    /// # Errors
    /// The owner's reason, or it went away.
    pub fn exec(mut self, exec: Exec) -> Result<Started, Failure> {
        let name = self.name;
        let failed = || format!("cannot ask the owner of container {name}");
        self.wire.send(&Request::Exec(exec), &[]).context(failed)?;
        let (_, files) = answer(&mut self.wire, &name)?;
        let control = self.wire.writer().context(failed)?;
        Ok(Started { streams: files.into_iter().map(UnixStream::from).collect(), wire: self.wire, control })
    }
}

/// Tells a process that was started of the user's terminal and signals.
#[derive(Debug)]
pub struct Control(Wire);

impl Control {
    /// The terminal has another size. A process that has ended does not mind.
    pub fn resize(&self, size: WindowSize) {
        let _ = self.0.send(&Request::Resize(size), &[]);
    }

    /// Sends a signal. A process that has ended does not mind.
    pub fn signal(&self, signal: i32) {
        let _ = self.0.send(&Request::Signal { signal, everyone: false }, &[]);
    }
}

impl Started {
    /// Splits off what tells the process things.
    ///
    /// # Errors
    /// The host's reason.
    pub fn control(&self) -> io::Result<Control> {
        self.control.writer().map(Control)
    }

    /// Waits until the process has ended; its exit code as a shell would show it.
    ///
    /// # Errors
    /// Its container's machine was lost.
    pub fn wait(mut self) -> Result<u8, Failure> {
        match answer(&mut self.wire, "").map(|(reply, _)| reply)? {
            Reply::Exited(code) => Ok(code),
            _ => Err(Failure::new("the container's owner does not say how the process ended")),
        }
    }
}

fn answer(wire: &mut Wire, name: &str) -> Result<(Reply, Vec<OwnedFd>), Failure> {
    let ended = || Failure::new("the container has ended").help("`mvm ps -a` tells how");
    answer_or_end(wire, name)?.ok_or_else(ended)
}

/// `None` if the owner is gone.
fn answer_or_end(wire: &mut Wire, name: &str) -> Result<Option<(Reply, Vec<OwnedFd>)>, Failure> {
    match wire.receive::<Reply>().context(|| "cannot understand the container's owner".to_owned())? {
        Some((Reply::Failed { report, exit_code }, _)) => {
            let what = format!("the owner of container {name} cannot do it");
            Err(Failure::because(what, Refused::new(report, exit_code)))
        }
        answer => Ok(answer),
    }
}
