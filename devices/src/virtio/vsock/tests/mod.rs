//! A guest's driver, a parent process and callers on the host, all on the test's own thread.

mod callers;
mod event_loop;
mod handshake;
mod hostile;
mod lifecycle;
mod model;
mod restart;
mod stream;

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use super::credit::BUFFER;
use super::deadlines::Clock;
use super::dialer::{Dial, DialServer};
use super::packet::*;
use super::*;
use crate::testing::{Harness, Posted};

pub(super) const CID: u64 = 42;
/// Files watched while there is no connection: timer, dialer, listener.
const BASELINE: usize = 3;
/// What the test guest says of its own buffer unless a test says otherwise.
pub(super) const GUEST_BUFFER: u32 = 256 * 1024;

/// The device and everybody around it.
pub(super) struct Vm {
    pub(super) harness: Harness,
    pub(super) server: DialServer,
    pub(super) clock: Clock,
    pub(super) socket: PathBuf,
    _directory: tempfile::TempDir,
    posted: HashMap<u16, Posted>,
    /// Packets taken from the receive queue and not looked at yet.
    pub(super) inbox: VecDeque<(Header, Vec<u8>)>,
}

/// A device with a listener and a dialer, and their other ends.
pub(super) fn device(connections: u16) -> (Vsock, DialServer, Clock, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
    let (server, dialer) = DialServer::pair().unwrap();
    let mut files: HashMap<FdSlot, OwnedFd> =
        [(FdSlot(3), listener.into()), (FdSlot(4), dialer)].into_iter().collect();
    let config = Config {
        listener: Some(FdSlot(3)),
        dialer: Some(FdSlot(4)),
        connections,
        ..Config::new(GuestCid::try_from(u32::try_from(CID).unwrap()).unwrap())
    };
    let clock = Clock::default();
    (Vsock::new(&config, &mut files, clock.clone()).unwrap(), server, clock, directory)
}

impl Vm {
    /// A running device; the guest has posted no receive buffers.
    pub(super) fn starved() -> Self {
        Self::with_room_for(256)
    }

    /// A running device whose guest has posted 128 buffers of 4 KiB.
    pub(super) fn new() -> Self {
        let mut vm = Self::starved();
        vm.post(128, 4096);
        vm
    }

    pub(super) fn with_room_for(connections: u16) -> Self {
        let (device, server, clock, directory) = device(connections);
        Self::around(device, server, clock, directory)
    }

    pub(super) fn around(
        device: Vsock,
        server: DialServer,
        clock: Clock,
        directory: tempfile::TempDir,
    ) -> Self {
        Self::around_boxed(Box::new(device), server, clock, directory)
    }

    pub(super) fn around_boxed(
        device: Box<dyn VirtioDevice>,
        server: DialServer,
        clock: Clock,
        directory: tempfile::TempDir,
    ) -> Self {
        Self::of(Harness::new(device), server, clock, directory)
    }

    pub(super) fn of(
        harness: Harness,
        server: DialServer,
        clock: Clock,
        directory: tempfile::TempDir,
    ) -> Self {
        let socket = directory.path().join("vsock");
        let (posted, inbox) = (HashMap::new(), VecDeque::new());
        Self { harness, server, clock, socket, _directory: directory, posted, inbox }
    }

    /// The guest posts receive buffers.
    pub(super) fn post(&mut self, count: usize, size: u32) {
        for _ in 0..count {
            self.post_in_pieces(&[size]);
        }
        self.harness.kick(RX);
    }

    /// The guest posts one receive buffer of these pieces, without a kick.
    pub(super) fn post_in_pieces(&mut self, pieces: &[u32]) {
        let posted = self.harness.driver(RX).post(&[], pieces);
        self.posted.insert(posted.head, posted);
    }

    /// Lets host files be seen until nothing happens any more, and takes what reached the guest. Filled
    /// buffers are posted again at once.
    pub(super) fn settle(&mut self) {
        for _ in 0..10_000 {
            let ready = self.harness.poll();
            if !self.collect() && ready == 0 {
                return;
            }
        }
        panic!("the device spins");
    }

    fn collect(&mut self) -> bool {
        let mut any = false;
        while let Some((head, len)) = self.harness.driver(RX).take() {
            any = true;
            let posted = self.posted.remove(&head).unwrap();
            let bytes = self.harness.driver(RX).written(&posted);
            if len > 0 {
                let header = Header::from_wire(bytes[..44].try_into().unwrap());
                assert_eq!(len, HEADER_SIZE + header.len, "used length is what was written");
                assert_eq!((header.source_cid, header.destination_cid), (HOST_CID, CID));
                self.inbox.push_back((header, bytes[44..len as usize].to_vec()));
            }
            let pieces: Vec<u32> = posted.writable.iter().map(|(_, len)| *len).collect();
            self.post_in_pieces(&pieces);
        }
        if any {
            self.harness.kick(RX);
        }
        any
    }

    /// The guest sends a packet, its bytes in pieces of these sizes (the last takes the rest).
    pub(super) fn send_in_pieces(&mut self, header: Header, payload: &[u8], pieces: &[usize]) {
        let mut bytes = header.to_wire().to_vec();
        bytes.extend_from_slice(payload);
        let mut rest = bytes.as_slice();
        let mut parts = Vec::new();
        for piece in pieces {
            let (part, after) = rest.split_at((*piece).min(rest.len()));
            if !part.is_empty() {
                parts.push(part);
            }
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(rest);
        }
        let posted = self.harness.driver(TX).post(&parts, &[]);
        self.harness.kick(TX);
        assert_eq!(self.harness.driver(TX).take(), Some((posted.head, 0)));
    }

    /// The guest sends a packet as Linux does: header and payload one after the other.
    pub(super) fn send(&mut self, header: Header, payload: &[u8]) {
        self.send_in_pieces(header, payload, &[44]);
    }

    /// The next packet for the guest.
    pub(super) fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        if self.inbox.is_empty() {
            self.settle();
        }
        self.inbox.pop_front()
    }

    /// The next packet, which has this operation and no payload.
    pub(super) fn expect(&mut self, op: Op, key: Key) -> Header {
        let (header, payload) = self.receive().unwrap_or_else(|| panic!("nothing came; expected {op:?}"));
        assert_eq!((header.op, header.key_of_guest(), payload.len()), (Some(op), key, 0));
        header
    }

    /// Nothing is there for the guest.
    pub(super) fn expect_silence(&mut self) {
        assert_eq!(self.receive(), None);
    }

    /// Time passes for the device.
    pub(super) fn pass(&mut self, millis: u64) {
        self.clock.ahead_millis.fetch_add(millis, Ordering::SeqCst);
        self.harness.deliver(TIMER, EventSet::IN);
        self.settle();
    }

    /// The guest dials host port `key.local`; the parent accepts. Returns the host's end.
    pub(super) fn guest_dials(&mut self, key: Key) -> UnixStream {
        self.send(from_guest(key, Op::Request), b"");
        let dial = self.question();
        assert_eq!(dial.port, key.local);
        let (near, far) = UnixStream::pair().unwrap();
        self.server.accept(dial.id, far.as_fd()).unwrap();
        self.expect(Op::Response, key);
        patient(near)
    }

    /// The device's question to the parent.
    pub(super) fn question(&mut self) -> Dial {
        assert!(self.asked(), "the parent was not asked");
        self.server.recv().unwrap().unwrap()
    }

    /// Whether a question waits for the parent.
    pub(super) fn asked(&self) -> bool {
        readable(&self.server)
    }

    /// A host process calls the guest's `port`; the guest accepts.
    pub(super) fn host_dials(&mut self, port: u32) -> (UnixStream, Key) {
        let mut stream = patient(UnixStream::connect(&self.socket).unwrap());
        writeln!(stream, "CONNECT {port}").unwrap();
        let (request, _) = self.receive().unwrap();
        let key = request.key_of_guest();
        assert_eq!((request.op, key.peer), (Some(Op::Request), port));
        self.send(from_guest(key, Op::Response), b"");
        let mut line = [0; 64];
        let n = stream.read(&mut line).unwrap();
        assert_eq!(line[..n], *format!("OK {}\n", key.local).as_bytes());
        (stream, key)
    }
}

impl Header {
    /// The connection a header *to* the guest speaks of.
    pub(super) fn key_of_guest(&self) -> Key {
        Key { local: self.source_port, peer: self.destination_port }
    }
}

/// A packet of the guest's without payload, with an honest guest's credit.
pub(super) fn from_guest(key: Key, op: Op) -> Header {
    Header {
        source_cid: CID,
        destination_cid: HOST_CID,
        source_port: key.peer,
        destination_port: key.local,
        len: 0,
        kind: STREAM,
        op: Some(op),
        flags: 0,
        buf_alloc: GUEST_BUFFER,
        fwd_cnt: 0,
    }
}

/// A packet with payload.
pub(super) fn data(key: Key, len: usize) -> Header {
    Header { len: u32::try_from(len).unwrap(), ..from_guest(key, Op::ReadWrite) }
}

/// The end of one or both directions.
pub(super) fn shutdown(key: Key, flags: u32) -> Header {
    Header { flags, ..from_guest(key, Op::Shutdown) }
}

pub(super) fn key(local: u32, peer: u32) -> Key {
    Key { local, peer }
}

pub(super) fn readable(file: &impl AsFd) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 1
}

/// A host process's stream whose reads fail rather than wait for ever.
pub(super) fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// The stream has ended, with nothing left to read.
pub(super) fn at_end(stream: &mut UnixStream) -> bool {
    readable(stream) && matches!(stream.read(&mut [0]), Ok(0) | Err(_))
}
