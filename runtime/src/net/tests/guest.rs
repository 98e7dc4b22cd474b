//! A guest without a machine: it speaks ARP, and UDP over IPv4, on a tap.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Bytes of the header before each frame of a tap fresh from the kernel.
const VNET_HEADER: usize = 10;
const ARP: [u8; 2] = [0x08, 0x06];
const IPV4: [u8; 2] = [0x08, 0x00];
const UDP: u8 = 17;
const SOON: Duration = Duration::from_secs(5);
/// How often a question is asked, and how far apart.
const ASKS: u32 = 20;
const AGAIN: Duration = Duration::from_millis(500);

pub(super) type Mac = [u8; 6];

/// A host with one card.
pub(super) struct Guest<'a> {
    pub(super) tap: &'a File,
    pub(super) mac: Mac,
    pub(super) ip: Ipv4Addr,
}

/// A UDP datagram as the guest got it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Datagram {
    pub(super) from: (Ipv4Addr, u16),
    pub(super) to: u16,
    pub(super) text: Vec<u8>,
}

impl Guest<'_> {
    /// Asks who has an address, more than once: a bridge that has just got its first port may still be deaf.
    pub(super) fn ask_for(&mut self, ip: Ipv4Addr) -> Mac {
        for _ in 0..ASKS {
            self.send_arp([0xff; 6], 1, [0; 6], ip);
            if let Some(mac) = self.next_answer(ip) {
                return mac;
            }
        }
        panic!("nobody has {ip}");
    }

    fn next_answer(&mut self, ip: Ipv4Addr) -> Option<Mac> {
        loop {
            let frame = self.receive(AGAIN)?;
            if frame[12..14] == ARP && frame[20..22] == [0, 2] && frame[28..32] == ip.octets() {
                return frame[22..28].try_into().ok();
            }
            self.answer_arp(&frame);
        }
    }

    /// Waits for a UDP datagram, answering what ARP asks meanwhile.
    pub(super) fn next_datagram(&mut self) -> Datagram {
        loop {
            let frame = self.receive(SOON).expect("a frame comes");
            self.answer_arp(&frame);
            let ours = frame[12..14] == IPV4 && frame[23] == UDP && frame[30..34] == self.ip.octets();
            if ours && frame[..6] == self.mac {
                let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
                let from = Ipv4Addr::from(<[u8; 4]>::try_from(&frame[26..30]).unwrap());
                let text = frame[42..34 + usize::from(port(38))].to_vec();
                return Datagram { from: (from, port(34)), to: port(36), text };
            }
        }
    }

    /// Sends a UDP datagram.
    pub(super) fn send(&mut self, hardware: Mac, from: u16, to: (Ipv4Addr, u16), text: &[u8]) {
        let length = |header: usize| u16::try_from(header + text.len()).unwrap().to_be_bytes();
        let mut ip = [&[0x45, 0][..], &length(28), &[0, 0, 0, 0, 64, UDP, 0, 0]].concat();
        ip.extend_from_slice(&self.ip.octets());
        ip.extend_from_slice(&to.0.octets());
        let sum: u32 = ip.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
        let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let udp = [&from.to_be_bytes()[..], &to.1.to_be_bytes(), &length(8), &[0, 0], text].concat();
        self.transmit(&[&hardware[..], &self.mac, &IPV4, &ip, &udp].concat());
    }

    fn answer_arp(&mut self, frame: &[u8]) {
        if frame[12..14] == ARP && frame[20..22] == [0, 1] && frame[38..42] == self.ip.octets() {
            let asker = frame[22..28].try_into().unwrap();
            self.send_arp(asker, 2, asker, Ipv4Addr::new(frame[28], frame[29], frame[30], frame[31]));
        }
    }

    fn send_arp(&mut self, to: Mac, operation: u8, target: Mac, ip: Ipv4Addr) {
        let head = [0, 1, 8, 0, 6, 4, 0, operation];
        let parts = [&to[..], &self.mac, &ARP, &head, &self.mac, &self.ip.octets(), &target, &ip.octets()];
        self.transmit(&parts.concat());
    }

    fn transmit(&mut self, frame: &[u8]) {
        let bytes = [&[0; VNET_HEADER][..], frame].concat();
        assert_eq!(self.tap.write(&bytes).unwrap(), bytes.len());
    }

    fn receive(&mut self, patience: Duration) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 2048];
        loop {
            match self.tap.read(&mut bytes) {
                Ok(count) => return Some(bytes[VNET_HEADER..count].to_vec()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => panic!("cannot read the tap: {error}"),
            }
            let mut ready = [PollFd::new(self.tap.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::try_from(patience).unwrap()).unwrap() == 0 {
                return None;
            }
        }
    }
}
