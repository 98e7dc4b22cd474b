//! One stream connection: what its state is, what each side has said, and what it owes the guest.
//!
//! A connection does no waiting and watches nothing. It is told what happened, and asked what to watch
//! ([`Connection::interest`]) and what to send ([`Connection::due`]).

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use super::backlog::Backlog;
use super::credit::{BUFFER, Credit};
use super::packet::{HOST_CID, Header, Key, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM};
use crate::chain::Cursor;
use crate::device::EventSet;
use crate::error::ChainError;
use crate::sys;

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The guest dialled; the parent was asked for a stream, under this id.
    Dialing(u64),
    /// A host process dialled; the guest was, or will be, asked.
    Requesting,
    /// Bytes flow.
    Open,
    /// The host process is gone and the guest was told; its reset is awaited.
    Closing,
    /// The guest will be told that the connection is gone.
    Resetting,
    /// Over for the guest; the host process still has to take the backlog.
    Draining,
    /// Over.
    Dead,
}

/// What a connection waits for no longer than a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// An answer to a request.
    Connect,
    /// The guest's last word.
    Shutdown,
}

/// What a connection would put into the next receive buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// A packet without payload.
    Control(Op),
    /// At most so many bytes of the host's stream, if they are there.
    Data(u32),
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) key: Key,
    state: State,
    host: Option<UnixStream>,
    credit: Credit,
    backlog: Backlog,
    /// Directions the guest has ended, for good (`SHUTDOWN_*`, from its side).
    guest_done: u32,
    /// Directions the host process has ended (`SHUTDOWN_*`, from this side).
    host_done: u32,
    /// What of `host_done` the guest knows.
    told_done: u32,
    /// The host's stream has bytes or its end to read, as far as is known.
    readable: bool,
    /// A request, a response, or a credit update is owed.
    owed: Option<Op>,
    /// Receive buffers to take for one read: as many as the last reads filled.
    pub(super) burst: usize,
}

impl Connection {
    /// The guest's request, asked on to the parent as `id`.
    pub(super) fn dialing(key: Key, id: u64, request: &Header) -> Self {
        let mut this = Self::new(key, State::Dialing(id), None, None);
        this.credit.learn(request.buf_alloc, request.fwd_cnt);
        this
    }

    /// A host process's request.
    pub(super) fn requesting(key: Key, host: UnixStream) -> Self {
        Self::new(key, State::Requesting, Some(host), Some(Op::Request))
    }

    fn new(key: Key, state: State, host: Option<UnixStream>, owed: Option<Op>) -> Self {
        Self {
            key,
            state,
            host,
            credit: Credit::default(),
            backlog: Backlog::default(),
            guest_done: 0,
            host_done: 0,
            told_done: 0,
            readable: false,
            owed,
            burst: 1,
        }
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// The guest ended both directions itself: a clean end.
    pub(super) fn said_goodbye(&self) -> bool {
        self.guest_done == SHUTDOWN_BOTH
    }

    /// What is waited for, if anything is.
    pub(super) fn patience(&self) -> Option<Patience> {
        match self.state {
            State::Dialing(_) | State::Requesting => Some(Patience::Connect),
            State::Closing => Some(Patience::Shutdown),
            State::Open | State::Resetting | State::Draining | State::Dead => None,
        }
    }

    /// The host's stream, while there is one.
    pub(super) fn host(&self) -> Option<BorrowedFd<'_>> {
        self.host.as_ref().map(AsFd::as_fd)
    }

    /// Gives the host's stream up, if it is of no use any more. Unwatch it before dropping it.
    pub(super) fn take_spent_host(&mut self) -> Option<UnixStream> {
        match self.state {
            State::Dead => self.host.take(),
            State::Closing | State::Resetting if self.backlog.is_empty() => self.host.take(),
            _ => None,
        }
    }

    /// Readiness of the host's stream that matters now: none of it while what it would announce could
    /// not be acted on, or the loop would spin. An empty set still hears of the host process's end.
    pub(super) fn interest(&self) -> Option<EventSet> {
        let out = if self.backlog.is_empty() { EventSet::empty() } else { EventSet::OUT };
        match self.state {
            State::Open => {
                let ended = self.host_done & SHUTDOWN_SEND != 0;
                let input = if self.readable || ended { EventSet::empty() } else { EventSet::IN };
                let gone = self.host_done & SHUTDOWN_RECEIVE != 0;
                let wanted = input | out;
                if wanted.is_empty() && (self.readable || gone) { None } else { Some(wanted) }
            }
            State::Resetting | State::Draining if !out.is_empty() => Some(out),
            _ => None,
        }
    }

    /// The parent's stream for a guest's request.
    pub(super) fn dialled(&mut self, host: UnixStream) {
        self.host = Some(host);
        self.state = State::Open;
        self.owed = Some(Op::Response);
    }

    /// Ends it now: the guest hears a reset, the host process the end of its stream.
    pub(super) fn kill(&mut self) {
        self.backlog.clear();
        self.state = State::Resetting;
    }

    /// A packet of the guest's on this connection, with its payload.
    pub(super) fn receive(&mut self, header: &Header, payload: &mut Cursor<'_>) -> Result<(), ChainError> {
        let Some(op) = header.op else {
            self.kill();
            return Ok(());
        };
        match (self.state, op) {
            // A reset is never answered (§5.10.6.5).
            (_, Op::Reset) => self.leave(),
            (State::Resetting | State::Draining | State::Dead, _) => {}
            (State::Requesting, Op::Response) if self.owed.is_none() => {
                self.credit.learn(header.buf_alloc, header.fwd_cnt);
                self.answered();
            }
            (State::Open | State::Closing, _) => {
                self.credit.learn(header.buf_alloc, header.fwd_cnt);
                return self.converse(op, header, payload);
            }
            _ => self.kill(),
        }
        Ok(())
    }

    fn converse(&mut self, op: Op, header: &Header, payload: &mut Cursor<'_>) -> Result<(), ChainError> {
        match op {
            Op::ReadWrite if self.guest_done & SHUTDOWN_SEND != 0 || !self.credit.allows(header.len) => {
                self.kill()
            }
            Op::ReadWrite => return self.pass_on(payload, header.len),
            Op::CreditUpdate => {}
            Op::CreditRequest => self.owed = self.owed.or(Some(Op::CreditUpdate)),
            Op::Shutdown => self.guest_shuts(header.flags),
            Op::Request | Op::Response | Op::Reset => self.kill(),
        }
        Ok(())
    }

    /// The guest accepted the host process's request.
    fn answered(&mut self) {
        self.state = State::Open;
        let line = format!("OK {}\n", self.key.local);
        let sent = self.host.as_ref().map(|host| sys::send_bytes(host.as_fd(), line.as_bytes()));
        // A socket just accepted has room for a line, or its process is gone.
        if !matches!(sent, Some(Ok(n)) if n == line.len()) {
            self.kill();
        }
    }

    /// Payload: to the host's socket as far as it goes, the rest to the backlog.
    fn pass_on(&mut self, payload: &mut Cursor<'_>, len: u32) -> Result<(), ChainError> {
        let mut payload = payload.split_to(len)?;
        self.credit.received(len);
        if self.host_done & SHUTDOWN_RECEIVE != 0 {
            self.credit.forwarded(len);
            return Ok(());
        }
        if self.backlog.is_empty()
            && len > 0
            && let Some(host) = &self.host
        {
            match sys::send(host.as_fd(), &mut payload, len) {
                Ok(n) => self.credit.forwarded(n),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => {
                    self.credit.forwarded(len);
                    self.host_gone();
                    return Ok(());
                }
            }
        }
        match payload.remaining() {
            0 => Ok(()),
            rest => self.backlog.append(&mut payload, rest),
        }
    }

    fn guest_shuts(&mut self, flags: u32) {
        self.guest_done |= flags & SHUTDOWN_BOTH;
        if self.guest_done & SHUTDOWN_RECEIVE != 0 {
            // Nothing will be read for it any more: the host process's next write shall fail.
            self.host_done |= SHUTDOWN_SEND;
            self.readable = false;
            self.shut_host(Shutdown::Read);
        }
        if self.guest_done & SHUTDOWN_SEND != 0 && self.backlog.is_empty() {
            self.shut_host(Shutdown::Write);
        }
        if self.guest_done == SHUTDOWN_BOTH {
            self.state = State::Resetting;
        }
    }

    fn shut_host(&self, how: Shutdown) {
        if let Some(host) = &self.host {
            // Fails when the other end is gone, which its event says as well.
            let _ = host.shutdown(how);
        }
    }

    /// The connection is over for the guest; what it sent before still arrives.
    fn leave(&mut self) {
        self.state = if self.backlog.is_empty() { State::Dead } else { State::Draining };
    }

    /// The host's stream became ready.
    pub(super) fn host_ready(&mut self, events: EventSet) {
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.host_gone();
        }
        if events.contains(EventSet::OUT) {
            self.flush();
        }
        let input =
            events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR);
        let wanted = self.state == State::Open && self.host_done & SHUTDOWN_SEND == 0;
        self.readable = wanted && (self.readable || input);
    }

    /// The host process will not take any more bytes. It may have left some to read.
    fn host_gone(&mut self) {
        let lost = u32::try_from(self.backlog.waiting().len()).unwrap_or(BUFFER);
        self.credit.forwarded(lost);
        self.backlog.clear();
        self.host_done |= SHUTDOWN_RECEIVE;
        if self.state == State::Draining {
            self.state = State::Dead;
        }
    }

    fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let Some(host) = &self.host else { return };
            match sys::send_bytes(host.as_fd(), self.backlog.waiting()) {
                Ok(n) => {
                    self.backlog.advance(n);
                    self.credit.forwarded(u32::try_from(n).unwrap_or(BUFFER));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.host_gone(),
            }
        }
        if self.guest_done & SHUTDOWN_SEND != 0 {
            self.shut_host(Shutdown::Write);
        }
        if self.state == State::Draining {
            self.state = State::Dead;
        }
    }

    /// A read of the host's stream gave `result`, of at most `asked` bytes.
    pub(super) fn host_read(&mut self, result: &io::Result<u32>, asked: u32) {
        match result {
            Ok(0) => {
                self.host_done |= SHUTDOWN_SEND;
                self.readable = false;
            }
            // A short read emptied the stream, or nearly: readiness is level-triggered and tells. Of a
            // process that is gone the end is still to be read.
            Ok(n) => {
                self.readable = *n == asked || self.host_done & SHUTDOWN_RECEIVE != 0;
                self.credit.sent(*n);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(_) => {
                self.readable = false;
                self.host_done |= SHUTDOWN_SEND;
                self.host_gone();
            }
        }
    }

    /// The most urgent packet for the guest.
    pub(super) fn due(&self) -> Option<Due> {
        let control = match self.state {
            State::Resetting => Some(Op::Reset),
            State::Requesting => self.owed,
            State::Open | State::Closing => match self.owed {
                Some(Op::Response) => Some(Op::Response),
                _ if self.readable && self.credit.sendable() > 0 => {
                    return Some(Due::Data(self.credit.sendable()));
                }
                _ if self.host_done != self.told_done => Some(Op::Shutdown),
                Some(op) => Some(op),
                None => self.credit.worth_telling().then_some(Op::CreditUpdate),
            },
            State::Dialing(_) | State::Draining | State::Dead => None,
        };
        control.map(Due::Control)
    }

    /// The header of a packet for the guest, `len` bytes of payload following.
    pub(super) fn header(&mut self, op: Op, len: u32, guest_cid: u64) -> Header {
        Header {
            source_cid: HOST_CID,
            destination_cid: guest_cid,
            source_port: self.key.local,
            destination_port: self.key.peer,
            len,
            kind: STREAM,
            op: Some(op),
            flags: if op == Op::Shutdown { self.host_done } else { 0 },
            buf_alloc: BUFFER,
            fwd_cnt: self.credit.tell(),
        }
    }

    /// A control packet reached the guest.
    pub(super) fn told(&mut self, op: Op) {
        match op {
            Op::Reset => self.leave(),
            Op::Shutdown => {
                self.told_done = self.host_done;
                if self.told_done == SHUTDOWN_BOTH {
                    self.state = State::Closing;
                }
            }
            _ => {}
        }
        if self.owed == Some(op) {
            self.owed = None;
        }
    }
}
