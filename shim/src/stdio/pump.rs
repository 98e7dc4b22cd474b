//! Carries bytes between a process's streams and what they are connected to.
//!
//! A pump holds memory only while it holds bytes, and reads no more before those are written: who does not read is
//! felt by who writes.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use mvm_runtime::agent::Process;
use nix::sys::socket::{Shutdown, shutdown};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};

use super::{Input, Output, Outputs};

/// Bytes carried at a time.
const CHUNK: usize = 32 * 1024;

/// How far a process's output has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Progress {
    /// There may be more.
    Flowing,
    /// All of it is where it goes.
    Drained,
    /// The logging program has ended too, if there is one.
    Closed,
}

/// The pumps of one process; they stop when this is dropped.
#[derive(Debug)]
pub(crate) struct Pumps {
    hold: Option<File>,
    tasks: Vec<AbortHandle>,
    progress: watch::Receiver<Progress>,
}

impl Pumps {
    /// Begins to pump. Needs to be called in the runtime.
    pub(crate) fn start(input: Option<Input>, sinks: Outputs, process: Process) -> io::Result<Self> {
        let mut outputs = Vec::new();
        let (mut stdin, mut hold) = (None, None);
        let terminal = process.terminal.map(stream).transpose()?;
        let half_closes = terminal.is_none();
        let towards = match &terminal {
            Some(terminal) => Some(Arc::clone(terminal)),
            None => process.stdin.map(stream).transpose()?,
        };
        if let (Some(Input { fifo, hold: held }), Some(towards)) = (input, towards) {
            let fifo = pipe::Receiver::from_file(fifo)?;
            stdin = Some(tokio::spawn(feed(fifo, towards, half_closes)));
            hold = Some(held);
        }
        let stdout = match terminal {
            Some(terminal) => Some(terminal),
            None => process.stdout.map(stream).transpose()?,
        };
        let stderr = process.stderr.map(stream).transpose()?;
        for (from, to) in [(stdout, sinks.stdout), (stderr, sinks.stderr)] {
            if let Some(from) = from {
                outputs.push(tokio::spawn(drain(from, to.map(Sink::new).transpose()?)));
            }
        }
        let tasks = outputs.iter().chain(&stdin).map(JoinHandle::abort_handle).collect();
        let (report, progress) = watch::channel(Progress::Flowing);
        tokio::spawn(async move {
            for output in outputs {
                // One that was called off is over too.
                let _ = output.await;
            }
            report.send_replace(Progress::Drained);
            if let Some(logger) = sinks.logger {
                let _ = tokio::task::spawn_blocking(move || logger.wait()).await;
            }
            report.send_replace(Progress::Closed);
        });
        Ok(Self { hold, tasks, progress })
    }

    /// Standard input ends once what its clients wrote is read and they have closed it.
    pub(crate) fn close_stdin(&mut self) {
        self.hold = None;
    }

    /// Whether that much is done.
    pub(crate) fn has_reached(&self, progress: Progress) -> bool {
        *self.progress.borrow() >= progress
    }

    /// Waits until that much is done, but no longer than the time given.
    pub(crate) fn reach(&self, progress: Progress, time: Duration) -> impl Future<Output = ()> + use<> {
        let mut receiver = self.progress.clone();
        async move {
            let reached = receiver.wait_for(|now| *now >= progress);
            let _ = tokio::time::timeout(time, reached).await;
        }
    }
}

impl Drop for Pumps {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn stream(stream: std::os::unix::net::UnixStream) -> io::Result<Arc<UnixStream>> {
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream).map(Arc::new)
}

/// Copies input to the process. Without a reader in the guest it ends; without a writer here the process sees the end.
async fn feed(from: pipe::Receiver, to: Arc<UnixStream>, half_closes: bool) {
    // Readiness first: a fifo that no client has opened yet reads as ended.
    while from.readable().await.is_ok() {
        let mut chunk = vec![0; CHUNK];
        match from.try_read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => {
                if write_all(&to, chunk.get(..count).unwrap_or_default()).await.is_err() {
                    break;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
    }
    if half_closes {
        let _ = shutdown(to.as_raw_fd(), Shutdown::Write);
    }
}

async fn write_all(to: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        to.writable().await?;
        match to.try_write(bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Copies output from the process until it ends. Output that cannot be written is lost, and the process goes on.
async fn drain(from: Arc<UnixStream>, mut to: Option<Sink>) {
    while from.readable().await.is_ok() {
        let mut chunk = vec![0; CHUNK];
        let count = match from.try_read(&mut chunk) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
            Err(_) => return,
        };
        chunk.truncate(count);
        if let Some(mut sink) = to.take() {
            match sink.write(chunk).await {
                Ok(()) => to = Some(sink),
                Err(error) => log::warn!("output of a process is lost from here on: {error}"),
            }
        }
    }
}

/// An output in use.
enum Sink {
    Pipe(pipe::Sender),
    /// Written by other threads: a disk may make a writer wait.
    File(Arc<File>),
}

impl Sink {
    fn new(output: Output) -> io::Result<Self> {
        Ok(match output {
            Output::Pipe(pipe) => Self::Pipe(pipe::Sender::from_file(pipe)?),
            Output::File(file) => Self::File(Arc::new(file)),
        })
    }

    async fn write(&mut self, bytes: Vec<u8>) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.write_all(&bytes).await,
            Self::File(file) => {
                let file = Arc::clone(file);
                let written = tokio::task::spawn_blocking(move || (&*file).write_all(&bytes));
                written.await.map_err(io::Error::other)?
            }
        }
    }
}
