//! Connects this process's standard streams and signals to a process in a container, until that ends.

use std::io::{self, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use mvm_protocol::WindowSize;
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::owner::{Output, Outputs};
use mvm_runtime::timeline::{Timeline, Track};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::terminal;

/// How often a user asks a process to end before it is no longer asked.
const LAST_WORD: u32 = 3;

/// Signals that go to the container instead of ending `mvm`.
const FORWARDED: [Signal; 7] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

/// A process's streams; a terminal, or what of the three is connected.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    pub(crate) terminal: Option<UnixStream>,
    pub(crate) stdin: Option<UnixStream>,
    pub(crate) stdout: Option<UnixStream>,
    pub(crate) stderr: Option<UnixStream>,
    /// Where the first byte of each output is written down.
    pub(crate) timeline: Timeline,
}

/// A process that can be told things. One that has just ended does not mind.
pub(crate) trait Target: Send + 'static {
    /// Its terminal has another size.
    fn resize(&self, size: WindowSize);
    /// Sends it a signal.
    fn signal(&self, signal: Signal);
    /// Its user has asked it to end often enough.
    fn give_up(&self);
}

/// Whether the user's terminal can be given to a process.
///
/// # Errors
/// There is none.
pub(crate) fn check_terminal(wanted: bool) -> Result<(), Failure> {
    if wanted && !io::stdin().is_terminal() {
        return Err(
            Failure::new("cannot give the container a terminal: standard input is none").help("leave -t out")
        );
    }
    Ok(())
}

/// Holds back the signals that are passed on. Before any thread starts, so that all leave them to the one that
/// passes them on.
pub(crate) fn hold_signals() -> Result<SigSet, Failure> {
    terminal::block_signals(&FORWARDED).context(|| "cannot block signals".to_owned())
}

/// Sees whether this process is asked to end, by signals that are held back and stay so.
#[derive(Debug)]
pub(crate) struct Ends(SignalFd);

impl Ends {
    /// Looks from now on.
    ///
    /// # Errors
    /// The host's reason.
    pub(crate) fn new() -> Result<Self, Failure> {
        let ends: SigSet =
            [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT].into_iter().collect();
        let file = SignalFd::with_flags(&ends, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
        Ok(Self(file.context(|| "cannot watch for signals".to_owned())?))
    }

    /// Whether such a signal has come.
    pub(crate) fn are_asked_for(&self) -> bool {
        let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut ready, PollTimeout::ZERO), Ok(1..))
    }
}

/// Pumps until `wait` tells how the process has ended and all it wrote is out.
pub(crate) fn serve(
    streams: Streams,
    signals: SigSet,
    target: impl Target,
    wait: impl FnOnce() -> Result<u8, Failure>,
) -> Result<u8, Failure> {
    let has_terminal = streams.terminal.is_some();
    let raw = if has_terminal {
        Some(terminal::RawMode::enter().context(|| "cannot use this terminal".to_owned())?)
    } else {
        None
    };
    let outputs = Outputs::new().context(|| "cannot follow the process's output".to_owned())?;
    let timeline = &streams.timeline;
    let first = |of: &'static str| FirstByte(Some((timeline.clone(), of)));
    let mut pumps = Vec::new();
    if let Some(stream) = &streams.terminal {
        pumps.push(copy_out(outputs.take(clone(stream)?), io::stdout(), first("output")));
        feed(clone(stream)?, false);
    }
    pumps.extend(streams.stdout.map(|stream| copy_out(outputs.take(stream), io::stdout(), first("output"))));
    pumps.extend(
        streams.stderr.map(|stream| copy_out(outputs.take(stream), io::stderr(), first("error output"))),
    );
    if let Some(stream) = streams.stdin {
        feed(stream, true);
    }
    std::thread::spawn(move || pass_on(&signals, &target, has_terminal));
    let code = wait();
    outputs.process_ended();
    if code.is_ok() {
        for pump in pumps {
            // A panic of a pump was reported where it happened.
            let _ = pump.join();
        }
    }
    drop(raw);
    code
}

fn pass_on(signals: &SigSet, target: &impl Target, has_terminal: bool) {
    let mut asked = 0;
    while let Ok(signal) = signals.wait() {
        if matches!(signal, Signal::SIGINT | Signal::SIGTERM | Signal::SIGHUP | Signal::SIGQUIT) {
            asked += 1;
        }
        if asked >= LAST_WORD {
            // The guest had its chance: a user can always get rid of it.
            target.give_up();
        }
        match signal {
            Signal::SIGWINCH if has_terminal => target.resize(terminal::size()),
            Signal::SIGWINCH => {}
            other => target.signal(other),
        }
    }
}

fn clone(stream: &UnixStream) -> Result<UnixStream, Failure> {
    stream.try_clone().context(|| "cannot use the process's terminal".to_owned())
}

/// Writes down when a stream's first byte comes.
struct FirstByte(Option<(Timeline, &'static str)>);

impl FirstByte {
    /// Bytes have come.
    fn note(&mut self) {
        if let Some((timeline, what)) = self.0.take() {
            timeline.moment(Track::Host, format!("first byte of {what}"));
        }
    }
}

/// Copies until the process's stream ends. If nobody reads ours, the stream is closed: the process learns of it.
fn copy_out(mut from: Output, mut to: impl Write + Send + 'static, mut first: FirstByte) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut bytes = [0; 32 * 1024];
        loop {
            let count = match from.read(&mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(count @ 1..) => count,
                Ok(0) | Err(_) => return,
            };
            first.note();
            if to.write_all(&bytes[..count]).and_then(|()| to.flush()).is_err() {
                return;
            }
        }
    })
}

/// Copies our input to the process. The thread is left behind when the process ends: a read cannot be
/// called off, and the program ends with it.
fn feed(mut to: UnixStream, close_at_end: bool) {
    std::thread::spawn(move || {
        let _ = io::copy(&mut io::stdin().lock(), &mut to);
        if close_at_end {
            let _ = to.shutdown(Shutdown::Write);
        }
    });
}
