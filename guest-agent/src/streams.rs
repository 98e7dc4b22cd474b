//! The stdio streams of all processes, pumped by the one event loop.
//!
//! A descriptor is registered with epoll only while its stream waits for it. A hung-up pipe whose bytes
//! wait for the host would otherwise wake the loop for ever.

use std::{
    mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use mvm_protocol::{WindowSize, limits};
use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollEvent, EpollFlags},
        socket::{Shutdown, shutdown},
    },
};

use crate::{
    error::{Context, Error, Result},
    flow::{Flow, Sink, Turn},
    sys,
};

/// Most that is taken from a terminal after its process has gone; the kernel holds less.
const TERMINAL_REST: usize = 128 * 1024;

/// What a stream is to its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Input,
    Output,
    ErrorOutput,
    Terminal,
    /// A connection within the guest, whose directions end one by one.
    Connection,
}

impl Kind {
    /// From the process alone.
    fn is_output(self) -> bool {
        matches!(self, Self::Output | Self::ErrorOutput)
    }
}

/// A connection to the host and the process's end of the stream, both non-blocking.
pub(crate) struct Stream {
    /// `None` is a stream of the machine's.
    pub(crate) process: Option<u64>,
    pub(crate) kind: Kind,
    pub(crate) socket: OwnedFd,
    pub(crate) end: OwnedFd,
}

/// All streams, by slot.
pub(crate) struct Streams {
    slots: Vec<Slot>,
    buffer: Vec<u8>,
    /// The machine is being saved: nothing moves.
    held: bool,
}

enum Slot {
    Free,
    Live(Live),
    /// Output of descendants of a process that was reported gone: read and dropped, so that they are not
    /// killed by a pipe that closed behind their back.
    Orphaned(OwnedFd),
}

/// A stream under way.
struct Live {
    stream: Stream,
    inward: Option<Flow>,
    outward: Option<Flow>,
    interest: Interest,
}

/// The events a stream's two descriptors are watched for.
#[derive(Clone, Copy)]
struct Interest {
    socket: EpollFlags,
    end: EpollFlags,
}

impl Interest {
    const NONE: Self = Self { socket: EpollFlags::empty(), end: EpollFlags::empty() };
}

impl Streams {
    /// No streams yet.
    pub(crate) fn new() -> Self {
        Self { slots: Vec::new(), buffer: vec![0; limits::STREAM_BUFFER], held: false }
    }

    /// Whether this many more streams may be opened.
    pub(crate) fn check_room(&self, more: usize) -> Result<()> {
        let open = self.slots.iter().filter(|slot| !matches!(slot, Slot::Free)).count();
        if open.saturating_add(more) > limits::MAX_STREAMS {
            return Err(Error::Busy("the guest has as many streams open as it may"));
        }
        Ok(())
    }

    /// Begins to pump a stream.
    pub(crate) fn add(&mut self, epoll: &Epoll, stream: Stream) {
        let inward = (!stream.kind.is_output()).then(Flow::default);
        let outward = (stream.kind != Kind::Input).then(Flow::default);
        let first = Interest {
            socket: inward.as_ref().map_or(EpollFlags::empty(), |_| EpollFlags::EPOLLIN),
            end: outward.as_ref().map_or(EpollFlags::empty(), |_| EpollFlags::EPOLLIN),
        };
        let slot = self.slots.iter().position(|slot| matches!(slot, Slot::Free)).unwrap_or_else(|| {
            self.slots.push(Slot::Free);
            self.slots.len() - 1
        });
        let mut live = Live { stream, inward, outward, interest: Interest::NONE };
        live.watch(epoll, slot, first);
        self.slots[slot] = Slot::Live(live);
    }

    /// Moves what can be moved on a stream; the process, if its output has ended by it.
    pub(crate) fn turn(&mut self, epoll: &Epoll, slot: usize) -> Option<u64> {
        let live = match self.slots.get_mut(slot)? {
            Slot::Free => return None,
            Slot::Orphaned(end) => {
                if Flow::default().turn(end.as_fd(), Sink::Nowhere, &mut self.buffer) != Turn::AwaitSource {
                    watch(epoll, end.as_fd(), slot, (EpollFlags::EPOLLIN, EpollFlags::empty()));
                    self.slots[slot] = Slot::Free;
                }
                return None;
            }
            Slot::Live(_) if self.held => return None,
            Slot::Live(live) => live,
        };
        let progress = live.turn(&mut self.buffer);
        if let Progress::Going(interest) = progress {
            live.watch(epoll, slot, interest);
            return None;
        }
        live.watch(epoll, slot, Interest::NONE);
        let Slot::Live(live) = mem::replace(&mut self.slots[slot], Slot::Free) else {
            return None;
        };
        let Stream { process, kind, end, .. } = live.stream;
        if matches!(progress, Progress::Left) && kind.is_output() {
            watch(epoll, end.as_fd(), slot, (EpollFlags::empty(), EpollFlags::EPOLLIN));
            self.slots[slot] = Slot::Orphaned(end);
        }
        process.filter(|_| kind != Kind::Input)
    }

    /// The process has exited: its input is closed, and its output ends with what is there by now. How
    /// many outputs ended at once.
    pub(crate) fn drain(&mut self, epoll: &Epoll, process: u64) -> usize {
        let mut ended = 0;
        for slot in 0..self.slots.len() {
            if let Some(live) = self.live(slot, process) {
                live.inward = None;
                let left = match live.stream.kind {
                    Kind::Terminal => TERMINAL_REST,
                    _ => sys::readable_bytes(live.stream.end.as_fd()).unwrap_or(limits::STREAM_BUFFER),
                };
                if let Some(flow) = &mut live.outward {
                    flow.drain(left);
                }
                ended += usize::from(self.turn(epoll, slot).is_some());
            }
        }
        ended
    }

    /// Closes a process's standard input.
    pub(crate) fn close_input(&mut self, epoll: &Epoll, process: u64) {
        for slot in 0..self.slots.len() {
            if let Some(live) = self.live(slot, process) {
                live.inward = None;
                self.turn(epoll, slot);
            }
        }
    }

    /// Sets the size of a process's terminal.
    pub(crate) fn resize(&mut self, process: u64, size: WindowSize) -> Result<()> {
        for slot in 0..self.slots.len() {
            if let Some(Live { stream: Stream { kind: Kind::Terminal, end, .. }, .. }) =
                self.live(slot, process)
            {
                return sys::set_window_size(end.as_fd(), size.rows, size.columns)
                    .context(|| "cannot resize the terminal".into());
            }
        }
        Err(Error::NotFound(format!("process {process} has no terminal")))
    }

    /// Nothing moves from now on.
    pub(crate) fn hold(&mut self, epoll: &Epoll) {
        self.held = true;
        for (slot, stream) in self.slots.iter_mut().enumerate() {
            if let Slot::Live(live) = stream {
                live.watch(epoll, slot, Interest::NONE);
            }
        }
    }

    /// Everything moves again; the processes of outputs that have ended by it.
    pub(crate) fn release(&mut self, epoll: &Epoll) -> Vec<u64> {
        self.held = false;
        (0..self.slots.len()).filter_map(|slot| self.turn(epoll, slot)).collect()
    }

    /// A stream that is held leads to `socket` instead. One that has ended does not, and the host sees its end.
    pub(crate) fn attach(&mut self, process: u64, kind: Kind, socket: OwnedFd) {
        let is_it = |live: &Live| live.stream.process == Some(process) && live.stream.kind == kind;
        let found = self.slots.iter_mut().find_map(|slot| match slot {
            Slot::Live(live) if is_it(live) => Some(live),
            _ => None,
        });
        if let Some(live) = found {
            live.stream.socket = socket;
        }
    }

    fn live(&mut self, slot: usize, process: u64) -> Option<&mut Live> {
        match self.slots.get_mut(slot)? {
            Slot::Live(live) if live.stream.process == Some(process) => Some(live),
            _ => None,
        }
    }
}

/// How a stream stands after a turn.
#[derive(Clone, Copy)]
enum Progress {
    /// It waits for these events.
    Going(Interest),
    /// Done, and the process's end is closed or of no use.
    Over,
    /// Done, but somebody may still write to the process's end.
    Left,
}

impl Live {
    fn turn(&mut self, buffer: &mut [u8]) -> Progress {
        let (socket, end) = (self.stream.socket.as_fd(), self.stream.end.as_fd());
        let mut next = Interest::NONE;
        let connection = self.stream.kind == Kind::Connection;
        if let Some(flow) = &mut self.inward {
            let sink = if connection { Sink::Socket(end) } else { Sink::File(end) };
            match flow.turn(socket, sink, buffer) {
                Turn::AwaitSource => next.socket |= EpollFlags::EPOLLIN,
                Turn::AwaitSink => next.end |= EpollFlags::EPOLLOUT,
                Turn::Finished | Turn::Broken => {
                    if connection {
                        let _ = shutdown(end.as_raw_fd(), Shutdown::Write);
                    }
                    self.inward = None;
                }
            }
        }
        if let Some(flow) = &mut self.outward {
            match flow.turn(end, Sink::Socket(socket), buffer) {
                Turn::AwaitSource => next.end |= EpollFlags::EPOLLIN,
                Turn::AwaitSink => next.socket |= EpollFlags::EPOLLOUT,
                Turn::Broken => return Progress::Over,
                Turn::Finished => {
                    let _ = shutdown(socket.as_raw_fd(), Shutdown::Write);
                    if connection && self.inward.is_some() {
                        self.outward = None;
                        return Progress::Going(next);
                    }
                    return if hung_up(end) { Progress::Over } else { Progress::Left };
                }
            }
        }
        if self.inward.is_none() && self.outward.is_none() {
            return Progress::Over;
        }
        Progress::Going(next)
    }

    fn watch(&mut self, epoll: &Epoll, slot: usize, next: Interest) {
        watch(epoll, self.stream.socket.as_fd(), slot, (self.interest.socket, next.socket));
        watch(epoll, self.stream.end.as_fd(), slot, (self.interest.end, next.end));
        self.interest = next;
    }
}

/// The epoll key of a slot; keys below [`FIRST_KEY`] are the agent's own.
fn key(slot: usize) -> u64 {
    FIRST_KEY.saturating_add(slot as u64)
}

/// The first epoll key that belongs to a stream.
pub(crate) const FIRST_KEY: u64 = 1 << 32;

/// The slot an epoll key means.
pub(crate) fn slot_of(key: u64) -> Option<usize> {
    usize::try_from(key.checked_sub(FIRST_KEY)?).ok()
}

fn watch(epoll: &Epoll, fd: BorrowedFd<'_>, slot: usize, (old, new): (EpollFlags, EpollFlags)) {
    let mut event = EpollEvent::new(new, key(slot));
    let result = match (old.is_empty(), new.is_empty()) {
        _ if old == new => Ok(()),
        (true, _) => epoll.add(fd, event),
        (_, true) => epoll.delete(fd),
        _ => epoll.modify(fd, &mut event),
    };
    // A descriptor of ours can always be watched, short of memory; then the stream stalls until its
    // process ends, which is the smallest harm.
    debug_assert!(matches!(result, Ok(()) | Err(Errno::ENOMEM | Errno::ENOSPC)), "{result:?}");
}

/// Whether nobody holds the other end of a pipe any more.
fn hung_up(end: BorrowedFd<'_>) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(end, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok()
        && fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
}
