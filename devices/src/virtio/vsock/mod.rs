//! virtio-vsock: stream sockets between host and guest (VIRTIO 1.2 §5.10).
//!
//! On the host's side there are UNIX sockets, all opened by the parent process. Host processes connect to
//! a [listening socket](Config::listener) and name the guest's port; for a connection the guest opens, the
//! parent is asked for a stream by way of the [`dialer`]. Bytes then go from socket to guest buffer and
//! back without a copy of ours; only what a host process does not take at once is kept, at most 64 KiB
//! per connection, which is also what the guest is told it may send.
//!
//! How a packet flows: `on_queue` → [`muxer`] finds the [`connection`], which changes state and may owe a
//! packet → [`rx`] puts owed packets and host data into receive buffers → `settle` watches what each
//! changed connection now waits for.

mod backlog;
mod connection;
mod credit;
mod deadlines;
pub mod dialer;
mod listener;
mod muxer;
mod packet;
mod rx;
mod table;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::chain::Chain;
use crate::config_space::ConfigSpace;
use crate::counter::Counter;
use crate::device::{EventSet, Io, Kind, VirtioDevice};
use crate::error::{ChainError, Error};
use crate::fd::{FdSlot, FdSource};
use crate::ring::Notify;
use crate::virtio::{BuildError, DeviceState, Spec};

use deadlines::{Clock, Deadlines};
use dialer::Dialer;
use listener::Listener;
use muxer::{Muxer, Waiter};
use rx::Feed;
use table::Table;

/// Queues (§5.10.2).
const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;

/// Tokens of watched files.
const TIMER: u32 = 0;
const LISTENER: u32 = 1;
const DIALER: u32 = 2;
const FIRST_CALLER: u32 = 16;
const FIRST_CONNECTION: u32 = 64;

/// `VIRTIO_VSOCK_F_STREAM`. Drivers that know of no feature use streams as well.
const F_STREAM: u64 = 1;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: all connections are gone; the context id may be another.
const TRANSPORT_RESET: u32 = 0;
/// Size of the event queue: Linux posts 8 buffers.
const EVENT_BUFFERS: u16 = 16;
/// How long to wait for a driver to take that in before host processes are let in again.
const ANNOUNCE_TIME: Duration = Duration::from_secs(2);
/// Answers of the parent taken per wake-up.
const ANSWERS: usize = 64;
/// Most connections that can be configured.
const MAX_CONNECTIONS: u16 = 1023;

/// A guest's context id: its address among all guests of a host. The small ones and the largest have
/// meanings of their own (§5.10.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct GuestCid(u32);

/// A number that cannot be a guest's context id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("context id {0} is not a guest's: it must be from 3 to 4294967294")]
pub struct BadCid(pub u32);

impl GuestCid {
    /// The least there is. Machines whose vsock ends in a process of their own may all have it.
    pub const FIRST: Self = Self(3);
}

impl TryFrom<u32> for GuestCid {
    type Error = BadCid;

    fn try_from(value: u32) -> Result<Self, BadCid> {
        if (3..u32::MAX).contains(&value) { Ok(Self(value)) } else { Err(BadCid(value)) }
    }
}

impl From<GuestCid> for u32 {
    fn from(cid: GuestCid) -> Self {
        cid.0
    }
}

/// Who the device is.
pub const KIND: Kind =
    Kind { id: 19, name: "vsock", class: [0x07, 0x80, 0], guest_config: "CONFIG_VIRTIO_VSOCKETS" };

/// A vsock device and the files of its host side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The guest's address.
    pub guest_cid: GuestCid,
    /// A listening UNIX stream socket: host processes connect here, write `CONNECT <port>\n` and read
    /// `OK <local port>\n`. Without it none can reach the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listener: Option<FdSlot>,
    /// A connected `SOCK_SEQPACKET` UNIX socket whose other end is a [`dialer::DialServer`]. Without it
    /// the guest can reach nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dialer: Option<FdSlot>,
    /// Most connections at a time, both ways together; 1 to 1023.
    #[serde(default = "default_connections")]
    pub connections: u16,
}

fn default_connections() -> u16 {
    256
}

impl Config {
    /// A device with room for 256 connections and nobody to talk to.
    pub fn new(guest_cid: GuestCid) -> Self {
        Self { guest_cid, listener: None, dialer: None, connections: default_connections() }
    }
}

/// What outlives a snapshot: connections do not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Local port of the next connection from the host, so that the guest sees none twice.
    pub next_port: u32,
}

impl Spec for Config {
    fn build(&self, files: &mut dyn FdSource) -> Result<Box<dyn VirtioDevice>, BuildError> {
        Ok(Box::new(Vsock::new(self, files, Clock::default())?))
    }
}

/// How far the driver has been told that a restored machine has lost its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Announce {
    /// There is nothing to tell.
    Done,
    /// The driver has posted no buffer for it yet.
    Pending,
    /// It was told, and may still be cleaning up.
    Sent,
}

struct Vsock {
    config: Arc<ConfigSpace>,
    muxer: Muxer,
    listener: Option<Listener>,
    feed: Feed,
    announce: Announce,
}

impl Vsock {
    fn new(config: &Config, files: &mut dyn FdSource, clock: Clock) -> Result<Self, BuildError> {
        if !(1..=MAX_CONNECTIONS).contains(&config.connections) {
            let value = config.connections.to_string();
            return Err(BuildError::Value { what: "connections", value, expected: "1 to 1023" });
        }
        let mut open = |what, slot: Option<FdSlot>| take(files, what, slot);
        let listener = open("vsock listener", config.listener)?;
        let dialer = open("vsock dialer", config.dialer)?;
        let listener = listener.map(Listener::new).transpose().map_err(unusable("vsock listener"))?;
        let dialer = dialer.map(Dialer::new).transpose().map_err(unusable("vsock dialer"))?;
        let deadlines = Deadlines::new(clock).map_err(unusable("vsock timer"))?;
        let guest_cid = u64::from(config.guest_cid.0);
        let space = ConfigSpace::new(guest_cid.to_le_bytes().to_vec(), 0..0);
        let muxer = Muxer::new(guest_cid, Table::new(config.connections), deadlines, dialer);
        Ok(Self { config: space, muxer, listener, feed: Feed::default(), announce: Announce::Done })
    }

    /// Ends every turn: feeds the guest, then watches what is waited for now.
    fn turn(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        self.feed.run(&mut self.muxer, io)?;
        self.muxer.settle(io)
    }

    fn answers(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        for _ in 0..ANSWERS {
            let Some(dialer) = &self.muxer.dialer else { return Ok(()) };
            match dialer.answer() {
                Ok(Some(answer)) => self.muxer.dialled(answer.id, answer.stream.map(UnixStream::from)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Ok(None) | Err(_) => {
                    log::info!("the parent process answers no more: the guest can dial nobody");
                    io.unwatch(dialer.file())?;
                    self.muxer.dialer = None;
                }
            }
        }
        Ok(())
    }

    fn call(&mut self, place: u16, io: &mut Io<'_>) -> Result<(), Error> {
        let Some(listener) = &mut self.listener else { return Ok(()) };
        if let Some((port, stream)) = listener.read(place, io, &mut self.muxer.deadlines)? {
            self.muxer.call(port, stream);
        }
        Ok(())
    }

    fn time_passed(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        self.muxer.deadlines.fired();
        while let Some(who) = self.muxer.deadlines.expired() {
            match (who, &mut self.listener) {
                (Waiter::Connection(index), _) => self.muxer.expire(index),
                (Waiter::Caller(place), Some(listener)) => drop(listener.dismiss(place, io)?),
                (Waiter::Listener, Some(listener)) => listener.open(io)?,
                (_, None) => {}
            }
        }
        Ok(())
    }

    /// Tells a restored driver that its connections are gone, and then lets host processes in again.
    fn announce(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        match self.announce {
            Announce::Done => Ok(()),
            Announce::Pending => {
                if tell_reset(io)? {
                    self.announce = Announce::Sent;
                    self.muxer.deadlines.set(ANNOUNCE_TIME, Waiter::Listener);
                }
                Ok(())
            }
            // The driver has come back to the queue, so it has seen the event.
            Announce::Sent => {
                self.announce = Announce::Done;
                self.listener.as_mut().map_or(Ok(()), |listener| listener.open(io))
            }
        }
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> Kind {
        KIND
    }

    fn queues(&self) -> &[u16] {
        &[128, 256, EVENT_BUFFERS]
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn config(&self) -> Option<Arc<ConfigSpace>> {
        Some(Arc::clone(&self.config))
    }

    fn counters(&self) -> Vec<Arc<Counter>> {
        self.muxer.counters.all()
    }

    fn start(&mut self, _features: u64, io: &mut Io<'_>) -> Result<(), Error> {
        self.feed.reset();
        io.watch(self.muxer.deadlines.file(), TIMER, EventSet::IN)?;
        if let Some(dialer) = &self.muxer.dialer {
            io.watch(dialer.file(), DIALER, EventSet::IN)?;
        }
        if let Some(listener) = &mut self.listener {
            listener.resume(io)?;
            if self.announce != Announce::Done {
                listener.close(io)?;
            }
        }
        self.muxer.resume();
        self.turn(io)
    }

    fn on_queue(&mut self, index: u16, io: &mut Io<'_>) -> Result<(), Error> {
        match index {
            TX => io.serve(TX, Notify::Batch, |chain| self.muxer.receive(chain))?,
            EVENT => self.announce(io)?,
            _ => {}
        }
        self.turn(io)
    }

    fn on_event(&mut self, token: u32, events: EventSet, io: &mut Io<'_>) -> Result<(), Error> {
        let place = |first: u32| token.checked_sub(first).and_then(|place| u16::try_from(place).ok());
        if let Some(index) = place(FIRST_CONNECTION) {
            self.muxer.host_ready(index, events);
        } else if let Some(place) = place(FIRST_CALLER) {
            self.call(place, io)?;
        } else {
            match (token, &mut self.listener) {
                (TIMER, _) => self.time_passed(io)?,
                (LISTENER, Some(listener)) => listener.accept(io, &mut self.muxer.deadlines)?,
                (DIALER, _) => self.answers(io)?,
                _ => {}
            }
        }
        self.turn(io)
    }

    fn stop(&mut self) {
        self.muxer.clear();
        if let Some(listener) = &mut self.listener {
            listener.clear();
        }
        self.feed.reset();
        self.announce = Announce::Done;
    }

    fn state(&self) -> DeviceState {
        DeviceState::Vsock(State { next_port: self.muxer.table.next_port })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), Error> {
        let DeviceState::Vsock(state) = state else {
            let source = io::Error::new(io::ErrorKind::InvalidData, "it is another device's");
            return Err(Error::Device { operation: "restore the vsock state", source });
        };
        // The space holds what the saved driver read; it reads it again when it is told of the reset.
        self.config.replace(&self.muxer.guest_cid.to_le_bytes());
        self.muxer.table.next_port = state.next_port;
        self.announce = Announce::Pending;
        Ok(())
    }
}

/// Puts the reset event into the next event buffer; `false` if there is none.
fn tell_reset(io: &mut Io<'_>) -> Result<bool, Error> {
    let Some((ring, interrupt)) = io.ring_and_interrupt(EVENT) else { return Ok(false) };
    let mut told = false;
    for _ in 0..EVENT_BUFFERS {
        let Some(chain) = ring.pop()? else { break };
        let written = write_event(&chain);
        told = written.is_ok();
        if let Err(error) = &written {
            ring.refuse(*error);
        }
        ring.complete(chain, written.unwrap_or(0))?;
        if told {
            break;
        }
    }
    let more = ring.enable_kicks()?;
    ring.publish()?;
    ring.notify(interrupt)?;
    if more && !told {
        io.serve_again(EVENT);
    }
    Ok(told)
}

fn write_event(chain: &Chain) -> Result<u32, ChainError> {
    let mut buffer = chain.writer();
    buffer.write(&TRANSPORT_RESET.to_le_bytes())?;
    Ok(buffer.passed())
}

fn take(
    files: &mut dyn FdSource,
    what: &'static str,
    slot: Option<FdSlot>,
) -> Result<Option<OwnedFd>, BuildError> {
    slot.map(|slot| files.take(slot)).transpose().map_err(unusable(what))
}

fn unusable(what: &'static str) -> impl FnOnce(io::Error) -> BuildError {
    move |source| BuildError::File { what, source }
}
