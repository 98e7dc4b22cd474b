//! A network card between a driver and a socket that stands in for the tap.

mod conformance;
mod hostile;
mod kernel;
mod limits;
mod model;
mod receive;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use super::header::{HEADER, Header};
use super::*;
use crate::memory::{Bytes, GuestAddress};
use crate::sys;
use crate::testing::{Harness, Posted};

pub(super) const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

pub(super) fn config() -> Config {
    Config { tap: FdSlot(0), mac: Some(MacAddress::new(MAC).unwrap()), mtu: None, only_own_mac: false }
}

/// One end of a pair that carries whole frames.
pub(super) struct SocketTap {
    file: OwnedFd,
    prepared: Arc<Mutex<Vec<Agreed>>>,
}

impl AsFd for SocketTap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Tap for SocketTap {
    fn segments_udp(&self) -> bool {
        true
    }

    fn prepare(&mut self, agreed: Agreed) -> io::Result<()> {
        self.prepared.lock().unwrap().push(agreed);
        Ok(())
    }
}

/// The other end: the host's network.
pub(super) struct Wire {
    file: OwnedFd,
    pub(super) prepared: Arc<Mutex<Vec<Agreed>>>,
}

#[allow(unsafe_code)]
fn pair() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: socketpair writes two numbers into the array.
    assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) }, 0);
    // SAFETY: the call made this descriptor for us alone.
    let one = unsafe { OwnedFd::from_raw_fd(fds[0]) };
    // SAFETY: as above.
    (one, unsafe { OwnedFd::from_raw_fd(fds[1]) })
}

impl Wire {
    /// Sends header and frame towards the guest. `false` if the tap's queue is full.
    pub(super) fn send(&self, header: Header, frame: &[u8]) -> bool {
        let whole = [&header.bytes()[..], frame].concat();
        self.send_raw(&whole)
    }

    pub(super) fn send_raw(&self, bytes: &[u8]) -> bool {
        sys::tap::write_frame(self.file.as_fd(), bytes, std::iter::empty()).is_ok()
    }

    /// What the guest sent: header and frame.
    pub(super) fn take(&self) -> Option<(Header, Vec<u8>)> {
        let mut header = [0; HEADER];
        let mut frame = vec![0; 70_000];
        let none = std::iter::empty();
        let got = sys::tap::read_frame(self.file.as_fd(), &mut header, none, &mut frame).ok()?;
        frame.truncate(got.bytes - HEADER);
        Some((Header::parse(header), frame))
    }
}

/// A card with every feature of `keep` accepted.
pub(super) fn card_with(config: &Config, keep: impl Fn(u64) -> u64) -> (Harness, Wire, Counts) {
    let (tap, file) = pair();
    let prepared = Arc::default();
    let wire = Wire { file, prepared: Arc::clone(&prepared) };
    let net = Net::new(config, SocketTap { file: tap, prepared });
    let counts = Counts(net.counters().into_iter().map(|counter| (counter.name(), counter)).collect());
    let features = keep(net.features());
    assert!(net.accepts(features));
    (Harness::with(Box::new(net), features, false), wire, counts)
}

pub(super) fn card() -> (Harness, Wire, Counts) {
    card_with(&config(), |all| all)
}

pub(super) struct Counts(HashMap<&'static str, Arc<Counter>>);

impl Counts {
    pub(super) fn get(&self, name: &str) -> u64 {
        self.0[name].get()
    }
}

/// A frame of `len` bytes from the card's own address; every byte of the payload differs from its neighbours.
pub(super) fn frame(len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8 + 1).collect();
    for (place, byte) in bytes.iter_mut().skip(6).zip(MAC) {
        *place = byte;
    }
    for (place, byte) in bytes.iter_mut().skip(12).zip([0x08, 0x00]) {
        *place = byte;
    }
    bytes
}

/// The driver sends `header` and `frame` in one buffer each.
pub(super) fn send(vm: &mut Harness, header: Header, frame: &[u8]) -> u32 {
    let posted = vm.driver(TRANSMIT).post(&[&header.bytes(), frame], &[]);
    vm.kick(TRANSMIT);
    let (head, len) = vm.driver(TRANSMIT).take().expect("an answer");
    assert_eq!(head, posted.head);
    len
}

/// Posts receive buffers, one chain each, filled with 0xa5, and kicks.
pub(super) fn offer(vm: &mut Harness, sizes: &[u32]) {
    for size in sizes {
        offer_chain(vm, &[*size]);
    }
    vm.kick(RECEIVE);
}

/// Posts one receive chain without a kick.
pub(super) fn offer_chain(vm: &mut Harness, sizes: &[u32]) -> Posted {
    let posted = vm.driver(RECEIVE).post(&[], sizes);
    for (address, len) in &posted.writable {
        vm.memory().write_slice(&vec![0xa5; *len as usize], GuestAddress(*address)).unwrap();
    }
    posted
}

/// The receive chain at `head`, as its descriptors say.
pub(super) fn chain_at(vm: &mut Harness, head: u16) -> Posted {
    let table = vm.driver(RECEIVE).table();
    let mut posted = Posted { head, writable: Vec::new() };
    let mut next = head;
    loop {
        let bytes: u128 = vm.memory().read_obj(GuestAddress(table + 16 * u64::from(next))).unwrap();
        let (address, len, flags) = (bytes as u64, (bytes >> 64) as u32, (bytes >> 96) as u16);
        if flags & crate::testing::WRITE != 0 {
            posted.writable.push((address, len));
        }
        if flags & crate::testing::NEXT == 0 {
            return posted;
        }
        next = (bytes >> 112) as u16;
    }
}

/// What arrived: for each used chain its length, and the bytes of all up to those lengths.
pub(super) fn received(vm: &mut Harness) -> (Vec<u32>, Vec<u8>) {
    let (mut lens, mut bytes) = (Vec::new(), Vec::new());
    while let Some((head, len)) = vm.driver(RECEIVE).take() {
        let posted = chain_at(vm, head);
        let all = vm.driver(RECEIVE).written(&posted);
        bytes.extend_from_slice(&all[..len as usize]);
        lens.push(len);
    }
    (lens, bytes)
}

pub(super) fn split(bytes: &[u8]) -> (Header, &[u8]) {
    let (header, frame) = bytes.split_at(HEADER);
    (Header::parse(header.try_into().unwrap()), frame)
}

/// A TCPv4 frame left to be cut and summed by the receiver.
pub(super) fn large() -> Header {
    Header {
        flags: 1,
        gso_type: 1,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    }
}

#[test]
fn a_card_that_was_saved_with_its_tap_gone_has_its_link_up_on_a_new_one() {
    let up = |space: &ConfigSpace| {
        let mut status = [0];
        space.read(STATUS, &mut status);
        status[0]
    };
    for (saved, changes) in [(0, 1), (LINK_UP, 0)] {
        let (mut card, _wire) = stand_in::card(&config()).unwrap();
        let space = card.config().unwrap();
        // As the transport does: what the saved driver read comes first.
        space.update(|bytes| bytes[STATUS] = saved);
        card.restore(&DeviceState::Net(State {})).unwrap();
        assert_eq!(up(&space), LINK_UP);
        let mut vm = Harness::new(card);
        assert_eq!(vm.config_changes(), changes, "the driver is told, if it is new to it");
        vm.pause_and_resume();
        assert_eq!(vm.config_changes(), changes, "once");
    }
}

#[test]
fn a_restored_card_shows_its_own_address_and_mtu() {
    let own = Config { mtu: Some(1400), ..config() };
    let (mut card, _wire) = stand_in::card(&own).unwrap();
    let space = card.config().unwrap();
    let bytes = || {
        let mut bytes = [0; 12];
        space.read(0, &mut bytes);
        bytes
    };
    let fresh = bytes();
    // As the transport does: a card of another address, on a link of another MTU.
    space.update(|bytes| bytes.copy_from_slice(&[2, 0, 0, 0, 0, 9, LINK_UP, 0, 0, 0, 0x28, 0x23]));
    card.restore(&DeviceState::Net(State {})).unwrap();
    assert_eq!(bytes(), fresh, "or a driver that starts anew would send what is taken for spoofed");
    assert_eq!(Harness::new(card).config_changes(), 1);
}
