//! virtio-console: one terminal, `hvc0` in the guest (VIRTIO 1.2 §5.3).
//!
//! Two queues. Output never blocks and never grows on the host: what exceeds the rate, or what the reader
//! does not take and the backlog cannot hold, is dropped and counted, because a driver waits for its output
//! to be taken and would stall its guest. Input is only read while the guest has buffers for it, so a
//! typist waits, not the host's memory. A side that hangs up is left alone; the device goes on.

mod output;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use crate::chain::Chain;
use crate::config_space::ConfigSpace;
use crate::counter::Counter;
use crate::device::{EventSet, Io, Kind, VirtioDevice};
use crate::error::{ChainError, Error};
use crate::fd::{FdSlot, FdSource};
use crate::ring::Notify;
use crate::sys;
use crate::virtio::{BuildError, DeviceState, Spec};
use output::Output;

/// Queues (§5.3.2).
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// `VIRTIO_CONSOLE_F_SIZE`: the configuration says how large the terminal is.
const F_SIZE: u64 = 1 << 0;

/// Tokens of watched files.
const INPUT: u32 = 0;
const OUTPUT: u32 = 1;

/// Bytes of input read at once: a page, and so the buffer Linux posts.
const INPUT_CHUNK: u32 = 4096;

/// Who the device is.
pub const KIND: Kind =
    Kind { id: 3, name: "console", class: [0x07, 0x80, 0], guest_config: "CONFIG_VIRTIO_CONSOLE" };

/// A terminal.
///
/// Both files are made non-blocking, which is a property of the open file: give the machine files of its
/// own (reopen a terminal), or the flag reaches the process they are shared with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the guest's input comes from; none if it never gets any.
    #[serde(default)]
    pub input: Option<FdSlot>,
    /// Where its output goes. A regular file begins anew each time it has reached 1 MiB.
    pub output: FdSlot,
    /// Lets output through as fast as it comes: for a person at the other end, not for a log.
    #[serde(default)]
    pub unlimited: bool,
    /// Size of the terminal, if it is known.
    #[serde(default)]
    pub size: Option<Size>,
}

/// Size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// A terminal remembers nothing: what was typed and not read is still with the typist.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {}

impl Spec for Config {
    fn build(&self, files: &mut dyn FdSource) -> Result<Box<dyn VirtioDevice>, BuildError> {
        let mut take = |slot, what| {
            let fail = |source| BuildError::File { what, source };
            let file = files.take(slot).map_err(fail)?;
            sys::file::set_nonblocking(file.as_fd()).map_err(fail)?;
            Ok(file)
        };
        let input = self.input.map(|slot| take(slot, "console input")).transpose()?;
        let input = input.map(Input::new).transpose();
        let input = input.map_err(|source| BuildError::File { what: "console input", source })?;
        let output = File::from(take(self.output, "console output")?);
        let output = Output::new(output, self.unlimited, Box::new(Instant::now));
        Ok(Box::new(Console::new(input, output, self.size)))
    }
}

/// Tells the driver of a console whose [`Config::size`] was given that it has another size now; follow with
/// a configuration change notification.
pub fn resize(space: &ConfigSpace, size: Size) {
    let new = configuration(Some(size));
    space.update(|bytes| bytes.iter_mut().zip(new).for_each(|(byte, value)| *byte = value));
}

struct Console {
    input: Option<Input>,
    output: Output,
    config: Arc<ConfigSpace>,
    size: Option<Size>,
    /// The driver knows another size and has to be told.
    resized: bool,
}

/// The file that input comes from.
struct Input {
    file: OwnedFd,
    mode: Mode,
}

/// How input is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Not at all: the guest has no buffers.
    Idle,
    /// The loop tells when there is some.
    Watched,
    /// The file cannot be watched because it is always ready (a regular file).
    Ready,
}

impl Input {
    /// Finds out whether the file can be watched at all.
    fn new(file: OwnedFd) -> io::Result<Self> {
        let event = EpollEvent::new(EventSet::IN, 0);
        let mode = match Epoll::new()?.ctl(ControlOperation::Add, file.as_raw_fd(), event) {
            Ok(()) => Mode::Idle,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Mode::Ready,
            Err(error) => return Err(error),
        };
        Ok(Self { file, mode })
    }
}

impl Console {
    fn new(input: Option<Input>, output: Output, size: Option<Size>) -> Self {
        let config = ConfigSpace::new(configuration(size), 0..0);
        Self { input, output, config, size, resized: false }
    }

    /// Waits for input, if there may be some and the guest has a buffer.
    fn await_input(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        let Some(input) = &mut self.input else { return Ok(()) };
        if input.mode == Mode::Idle {
            io.watch(input.file.as_raw_fd(), INPUT, EventSet::IN)?;
            input.mode = Mode::Watched;
        }
        if input.mode == Mode::Ready && self.receive(io)? {
            // Others first: such a file may have no end.
            io.serve_again(RECEIVE);
        }
        Ok(())
    }

    /// Moves input that is there into the guest's next buffer, once. Whether there may be more of both.
    fn receive(&mut self, io: &mut Io<'_>) -> Result<bool, Error> {
        let Some(input) = &mut self.input else { return Ok(false) };
        let Some((ring, interrupt)) = io.ring_and_interrupt(RECEIVE) else { return self.no_buffers(io) };
        let Some(chain) = ring.pop()? else {
            if ring.enable_kicks()? {
                return Ok(true);
            }
            return self.no_buffers(io);
        };
        let mut to = chain.writer();
        if let Err(error) = only_writable(&chain) {
            ring.refuse(error);
            ring.complete(chain, 0)?;
            ring.publish()?;
            ring.notify(interrupt)?;
            return Ok(true);
        }
        match sys::read_some(input.file.as_fd(), &mut to, INPUT_CHUNK) {
            Ok(n) if n > 0 => {
                ring.complete(chain, n)?;
                ring.publish()?;
                ring.notify(interrupt)?;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                ring.undo(chain)?;
                Ok(false)
            }
            // The end of a file, or a terminal whose other end was closed.
            Ok(_) | Err(_) => {
                ring.undo(chain)?;
                self.hang_up(io)?;
                Ok(false)
            }
        }
    }

    /// Stops waiting for input until the guest posts a buffer, or the loop would never sleep.
    fn no_buffers(&mut self, io: &mut Io<'_>) -> Result<bool, Error> {
        if let Some(input) = &mut self.input
            && input.mode == Mode::Watched
        {
            input.mode = Mode::Idle;
            io.unwatch(input.file.as_raw_fd())?;
        }
        Ok(false)
    }

    /// Forgets the input for good.
    fn hang_up(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        match self.input.take() {
            Some(Input { file, mode: Mode::Watched }) => io.unwatch(file.as_raw_fd()),
            _ => Ok(()),
        }
    }

    /// Has the loop tell when the backlog can move on, or stop telling.
    fn watch_output(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        match self.output.wants_watch() {
            Some(true) => io.watch(self.output.file().as_raw_fd(), OUTPUT, EventSet::OUT),
            Some(false) => io.unwatch(self.output.file().as_raw_fd()),
            None => Ok(()),
        }
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> Kind {
        KIND
    }

    fn queues(&self) -> &[u16] {
        &[64, 64]
    }

    fn features(&self) -> u64 {
        if self.size.is_some() { F_SIZE } else { 0 }
    }

    fn config(&self) -> Option<Arc<ConfigSpace>> {
        Some(Arc::clone(&self.config))
    }

    fn counters(&self) -> Vec<Arc<Counter>> {
        self.output.counters()
    }

    fn shares_vector(&self) -> bool {
        true
    }

    fn start(&mut self, _features: u64, io: &mut Io<'_>) -> Result<(), Error> {
        if std::mem::take(&mut self.resized) {
            io.interrupt().config_changed();
        }
        // After a pause nothing is watched any more.
        self.stop();
        let _ = self.output.flush();
        self.watch_output(io)
    }

    fn on_queue(&mut self, index: u16, io: &mut Io<'_>) -> Result<(), Error> {
        if index == RECEIVE {
            return self.await_input(io);
        }
        let output = &mut self.output;
        io.serve(TRANSMIT, Notify::Batch, |chain| {
            if chain.writer().remaining() != 0 {
                return Err(ChainError::Malformed("output with writable bytes").into());
            }
            output.write(&mut chain.reader())?;
            Ok(0)
        })?;
        self.watch_output(io)
    }

    fn on_event(&mut self, token: u32, events: EventSet, io: &mut Io<'_>) -> Result<(), Error> {
        match token {
            INPUT if events.contains(EventSet::IN) => self.receive(io).map(drop),
            INPUT => self.hang_up(io),
            OUTPUT => {
                // A reader that is gone shows as a failing write, which empties the backlog.
                let _ = self.output.flush();
                self.watch_output(io)
            }
            _ => Ok(()),
        }
    }

    fn stop(&mut self) {
        if let Some(input) = &mut self.input
            && input.mode == Mode::Watched
        {
            input.mode = Mode::Idle;
        }
        self.output.unwatched();
    }

    fn state(&self) -> DeviceState {
        DeviceState::Console(State {})
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), Error> {
        let DeviceState::Console(State {}) = state else {
            return Err(Error::device("restore a console")(io::ErrorKind::InvalidData.into()));
        };
        // The space holds what the saved driver read: the size of a terminal that may be another.
        self.resized = self.config.replace(&configuration(self.size));
        Ok(())
    }
}

/// `struct virtio_console_config`: columns, rows, number of ports, emergency write (the last two unused).
fn configuration(size: Option<Size>) -> Vec<u8> {
    let Size { columns, rows } = size.unwrap_or(Size { columns: 0, rows: 0 });
    let mut bytes = Vec::with_capacity(12);
    bytes.extend(columns.to_le_bytes());
    bytes.extend(rows.to_le_bytes());
    bytes.extend(1u32.to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

fn only_writable(chain: &Chain) -> Result<(), ChainError> {
    if chain.reader().remaining() != 0 {
        Err(ChainError::Malformed("input buffer with readable bytes"))
    } else if chain.writer().remaining() == 0 {
        Err(ChainError::Malformed("input buffer without bytes"))
    } else {
        Ok(())
    }
}
