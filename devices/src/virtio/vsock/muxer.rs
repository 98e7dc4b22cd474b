//! Who talks to whom: packets from the guest, answers from the parent and the passing of time, each
//! brought to the connection it is for.
//!
//! Nothing here watches files. A connection that changed is put on a list; [`Muxer::settle`] goes through
//! it at the end of a turn, so that what changes twice is watched anew once.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use super::FIRST_CONNECTION;
use super::connection::{Connection, Patience, State};
use super::deadlines::Deadlines;
use super::dialer::{Dial, Dialer};
use super::packet::{HOST_CID, Header, Key, MAX_PAYLOAD, Op, STREAM};
use super::table::Table;
use crate::chain::Chain;
use crate::counter::Counter;
use crate::device::{EventSet, Io};
use crate::error::Error;

/// How long a request, the guest's or a host process's, may wait for its answer.
const CONNECT_TIME: Duration = Duration::from_secs(2);
/// How long the guest may take to confirm that a connection is over.
const SHUTDOWN_TIME: Duration = Duration::from_secs(2);
/// Resets kept for packets that belong to no connection; the guest gives up by itself on those lost.
const MAX_STRAYS: usize = 256;

/// Who a deadline is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Waiter {
    /// The connection in this slot.
    Connection(u16),
    /// The host process in this place, which has not said what it wants.
    Caller(u16),
    /// The listener, after the host ran out of files.
    Listener,
}

/// What the device counts.
#[derive(Debug)]
pub(super) struct Counters {
    /// Connections that were opened, either way.
    pub(super) opened: Arc<Counter>,
    /// Requests refused: no listener, no room, no answer.
    pub(super) refused: Arc<Counter>,
    /// Connections ended because the guest broke the protocol.
    pub(super) killed: Arc<Counter>,
    /// Packets to or from a context that is not there.
    pub(super) dropped: Arc<Counter>,
    /// Bytes of payload from the guest.
    pub(super) from_guest: Arc<Counter>,
    /// Bytes of payload to the guest.
    pub(super) to_guest: Arc<Counter>,
}

impl Counters {
    pub(super) fn all(&self) -> Vec<Arc<Counter>> {
        let Self { opened, refused, killed, dropped, from_guest, to_guest } = self;
        [opened, refused, killed, dropped, from_guest, to_guest].map(Arc::clone).into()
    }
}

#[derive(Debug)]
pub(super) struct Muxer {
    pub(super) guest_cid: u64,
    pub(super) table: Table,
    pub(super) deadlines: Deadlines<Waiter>,
    pub(super) dialer: Option<Dialer>,
    /// Slots with packets for the guest, in turn.
    pub(super) ready: VecDeque<u16>,
    /// Resets owed to nobody in the table: the ports and the socket type.
    pub(super) strays: VecDeque<(Key, u16)>,
    /// Slots to settle.
    touched: Vec<u16>,
    /// Distinguishes questions to the parent that came from the same slot.
    questions: u64,
    pub(super) counters: Counters,
}

impl Muxer {
    pub(super) fn new(
        guest_cid: u64,
        table: Table,
        deadlines: Deadlines<Waiter>,
        dialer: Option<Dialer>,
    ) -> Self {
        let counters = Counters {
            opened: Counter::new("connections_opened"),
            refused: Counter::new("connections_refused"),
            killed: Counter::new("connections_killed"),
            dropped: Counter::new("packets_dropped"),
            from_guest: Counter::new("bytes_from_guest"),
            to_guest: Counter::new("bytes_to_guest"),
        };
        let (ready, strays) = (VecDeque::new(), VecDeque::new());
        let (touched, questions) = (Vec::new(), 0);
        Self { guest_cid, table, deadlines, dialer, ready, strays, touched, questions, counters }
    }

    /// Handles a packet of the guest's.
    pub(super) fn receive(&mut self, chain: &Chain) -> Result<u32, Error> {
        let mut packet = chain.reader();
        let header = Header::read(&mut packet)?;
        let len = header.len.min(packet.remaining());
        if header.source_cid != self.guest_cid || header.destination_cid != HOST_CID {
            self.counters.dropped.one();
        } else if header.kind != STREAM {
            self.stray(&header);
        } else if let Some(index) = self.table.find(header.key()) {
            let Some(slot) = self.table.get(index) else { return Ok(0) };
            let before = slot.connection.state();
            if len != header.len || header.len > MAX_PAYLOAD {
                // Part of the stream is lost.
                slot.connection.kill();
            } else {
                slot.connection.receive(&header, &mut packet)?;
            }
            self.counters.from_guest.add(len.into());
            self.moved(before, index);
        } else if header.op == Some(Op::Request) {
            self.dial(&header);
        } else {
            self.stray(&header);
        }
        Ok(0)
    }

    /// The guest wants a connection to a host port: asks the parent.
    fn dial(&mut self, request: &Header) {
        let Some(index) = self.table.vacancy() else { return self.refuse(request) };
        let Some(dialer) = &self.dialer else { return self.refuse(request) };
        self.questions = self.questions.wrapping_add(1);
        let id = (self.questions << 16) | u64::from(index);
        if let Err(error) = dialer.ask(Dial { id, port: request.destination_port }) {
            log::debug!(
                "refused a connection of the guest's: cannot ask for port {}: {error}",
                request.destination_port
            );
            return self.refuse(request);
        }
        self.table.insert(index, Connection::dialing(request.key(), id, request));
        self.changed(index);
    }

    /// The parent answered question `id`. An answer nobody waits for any more is dropped.
    pub(super) fn dialled(&mut self, id: u64, stream: Option<UnixStream>) {
        let index = u16::try_from(id & 0xffff).unwrap_or(0);
        let Some(slot) = self.table.get(index) else { return };
        if slot.connection.state() != State::Dialing(id) {
            return;
        }
        match stream {
            Some(stream) => {
                slot.connection.dialled(stream);
                self.counters.opened.one();
            }
            None => {
                slot.connection.kill();
                self.counters.refused.one();
            }
        }
        self.changed(index);
    }

    /// A host process wants a connection to the guest's `port`; without room its stream is closed.
    pub(super) fn call(&mut self, port: u32, stream: UnixStream) {
        let Some(index) = self.table.vacancy() else {
            self.counters.refused.one();
            return;
        };
        let key = Key { local: self.table.free_port(port), peer: port };
        self.table.insert(index, Connection::requesting(key, stream));
        self.changed(index);
    }

    /// The host's stream of a connection is ready.
    pub(super) fn host_ready(&mut self, index: u16, events: EventSet) {
        if let Some(slot) = self.table.get(index) {
            slot.connection.host_ready(events);
            self.changed(index);
        }
    }

    /// The time of a connection is up.
    pub(super) fn expire(&mut self, index: u16) {
        if let Some(slot) = self.table.get(index) {
            slot.waiting = None;
            if slot.connection.patience() == Some(Patience::Connect) {
                self.counters.refused.one();
            }
            slot.connection.kill();
            self.changed(index);
        }
    }

    fn refuse(&mut self, request: &Header) {
        self.counters.refused.one();
        self.stray(request);
    }

    /// Owes a reset for a packet that belongs to no connection, unless it is a reset itself.
    fn stray(&mut self, header: &Header) {
        if header.op == Some(Op::Reset) {
            return;
        }
        if self.strays.len() >= MAX_STRAYS {
            self.strays.pop_front();
        }
        self.strays.push_back((header.key(), header.kind));
    }

    /// Counts what a packet did to the connection it was for, and notes the change.
    fn moved(&mut self, before: State, index: u16) {
        let Some(slot) = self.table.get(index) else { return };
        match (before, slot.connection.state()) {
            (State::Requesting, State::Open) => self.counters.opened.one(),
            (State::Requesting, State::Dead) => self.counters.refused.one(),
            (before, State::Resetting) if before != State::Resetting && !slot.connection.said_goodbye() => {
                self.counters.killed.one();
            }
            _ => {}
        }
        self.changed(index);
    }

    /// A connection changed: it may owe a packet, wait for another thing, or be over.
    pub(super) fn changed(&mut self, index: u16) {
        let Some(slot) = self.table.get(index) else { return };
        let patience = slot.connection.patience();
        let waiting = slot.waiting;
        let over = matches!(slot.connection.state(), State::Draining | State::Dead);
        let key = slot.connection.key;
        if !slot.queued && slot.connection.due().is_some() {
            slot.queued = true;
            self.ready.push_back(index);
        }
        if !slot.touched {
            slot.touched = true;
            self.touched.push(index);
        }
        if waiting.map(|(kind, _)| kind) != patience {
            self.wait(index, patience);
        }
        if over {
            self.table.forget_key(index, key);
        }
    }

    fn wait(&mut self, index: u16, patience: Option<Patience>) {
        let who = Waiter::Connection(index);
        let Some(slot) = self.table.get(index) else { return };
        if let Some((_, deadline)) = slot.waiting.take() {
            self.deadlines.clear(deadline, who);
        }
        slot.waiting = patience.map(|kind| {
            let time = if kind == Patience::Connect { CONNECT_TIME } else { SHUTDOWN_TIME };
            (kind, self.deadlines.set(time, who))
        });
    }

    /// Has the loop watch what the changed connections wait for, and closes what is over.
    pub(super) fn settle(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        while let Some(index) = self.touched.pop() {
            let Some(slot) = self.table.get(index) else { continue };
            slot.touched = false;
            let wanted = slot.connection.interest();
            if let Some(host) = slot.connection.host()
                && wanted != slot.watched
            {
                let (file, token) = (host.as_raw_fd(), FIRST_CONNECTION.saturating_add(index.into()));
                match (slot.watched, wanted) {
                    (_, None) => io.unwatch(file)?,
                    (None, Some(events)) => io.watch(file, token, events)?,
                    (Some(_), Some(events)) => io.rewatch(file, token, events)?,
                }
                slot.watched = wanted;
            }
            drop(slot.connection.take_spent_host());
            // One that still stands in line is removed when its turn comes.
            if slot.connection.state() == State::Dead && !slot.queued {
                self.table.remove(index);
            }
        }
        Ok(())
    }

    /// Starts watching anew after the loop forgot everything.
    pub(super) fn resume(&mut self) {
        for index in self.table.indices() {
            if let Some(slot) = self.table.get(index) {
                slot.watched = None;
            }
            self.changed(index);
        }
    }

    /// Forgets every connection. None is watched any more.
    pub(super) fn clear(&mut self) {
        self.table.clear();
        self.ready.clear();
        self.strays.clear();
        self.touched.clear();
        self.deadlines.clear_all();
    }
}
