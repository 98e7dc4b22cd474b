//! The same card on a tap of this machine's kernel, in a network namespace of the test's own.
//!
//! Without the right to make one these tests end early.
#![allow(unsafe_code)]

use super::*;
use std::os::fd::AsRawFd;

/// An interface made of a tap, and a packet socket on it: the host's end of the wire.
struct Lan {
    tap: Option<OwnedFd>,
    socket: OwnedFd,
}

const NAME: &[u8] = b"tap0\0";

fn request() -> libc::ifreq {
    // SAFETY: an ifreq of zeroes is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(NAME) {
        *place = *byte as libc::c_char;
    }
    request
}

fn control(fd: &OwnedFd, call: libc::Ioctl, request: &mut libc::ifreq) {
    // SAFETY: these calls read and write one ifreq, borrowed exclusively.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), call, &raw mut *request) };
    assert_eq!(answer, 0, "{}", io::Error::last_os_error());
}

/// A namespace with one tap in it, made with `flags`, or `None` where that is not allowed.
fn namespace(flags: libc::c_int) -> Option<Lan> {
    // SAFETY: changes the network namespace of this test's thread only, which ends with the test.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return None;
    }
    let tap = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").ok()?;
    let tap = OwnedFd::from(tap);
    let mut made = request();
    made.ifr_ifru.ifru_flags = flags as libc::c_short;
    control(&tap, libc::TUNSETIFF, &mut made);
    Some(Lan { tap: Some(tap), socket: packet_socket() })
}

/// A packet socket with offload headers on the tap, which it brings up.
fn packet_socket() -> OwnedFd {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let all = u16::to_be(libc::ETH_P_ALL as u16);
    // SAFETY: socket touches no memory.
    let socket = unsafe { libc::socket(libc::AF_PACKET, kind, all.into()) };
    assert!(socket >= 0);
    // SAFETY: the call made this descriptor for us alone.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let mut up = request();
    up.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    control(&socket, libc::SIOCSIFFLAGS, &mut up);
    let (fd, one): (_, libc::c_int) = (socket.as_raw_fd(), 1);
    let (level, option) = (libc::SOL_PACKET, PACKET_VNET_HDR);
    // SAFETY: the option is an int, of four bytes.
    assert_eq!(unsafe { libc::setsockopt(fd, level, option, (&raw const one).cast(), 4) }, 0);
    let mut index = request();
    control(&socket, libc::SIOCGIFINDEX, &mut index);
    // SAFETY: an address of zeroes is a valid one.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as libc::c_ushort;
    address.sll_protocol = all;
    // SAFETY: SIOCGIFINDEX set the index.
    address.sll_ifindex = unsafe { index.ifr_ifru.ifru_ifindex };
    let size = std::mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is a sockaddr_ll of that size.
    assert_eq!(unsafe { libc::bind(fd, (&raw const address).cast(), size) }, 0);
    socket
}

const PACKET_VNET_HDR: libc::c_int = 15;
const GOOD: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

impl Lan {
    fn card(&mut self, keep: impl Fn(u64) -> u64) -> Harness {
        let device = build(self.tap.take().unwrap()).unwrap();
        let features = keep(device.features());
        assert!(device.accepts(features));
        Harness::with(device, features, false)
    }

    /// Sends towards the guest; a packet socket's header has no `num_buffers`.
    fn send(&self, header: Header, frame: &[u8]) {
        let whole = [&header.bytes()[..10], frame].concat();
        sys::tap::write_frame(self.socket.as_fd(), &whole, std::iter::empty()).unwrap();
    }

    /// The next frame of the card, past what the host's own stack sends.
    fn take(&self) -> Option<(Header, Vec<u8>)> {
        loop {
            let (mut header, mut frame) = ([0; 10], vec![0; 70_000]);
            let none = std::iter::empty();
            let got = sys::tap::read_frame(self.socket.as_fd(), &mut header, none, &mut frame).ok()?;
            frame.truncate(got.bytes - header.len());
            if frame.get(6..12) == Some(&MAC) {
                let mut whole = [0; HEADER];
                whole[..10].copy_from_slice(&header);
                return Some((Header::parse(whole), frame));
            }
        }
    }
}

fn build(tap: OwnedFd) -> Result<Box<dyn VirtioDevice>, BuildError> {
    config().build(&mut HashMap::from([(FdSlot(0), tap)]))
}

/// An Ethernet frame with a TCP segment of `payload` bytes in it, its checksum left to the receiver.
fn segment(payload: usize) -> Vec<u8> {
    let mut bytes = frame(54 + payload);
    let len = (40 + payload) as u16;
    bytes[..6].copy_from_slice(&[0x52, 0x54, 0, 9, 9, 9]);
    bytes[14..34].copy_from_slice(&[0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes[16..18].copy_from_slice(&len.to_be_bytes());
    let sum = ones_complement(&bytes[14..34], 0);
    bytes[24..26].copy_from_slice(&(!sum).to_be_bytes());
    bytes[34..54]
        .copy_from_slice(&[0x12, 0x34, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    // The pseudo header's sum is what an unfinished checksum starts from.
    let pseudo = ones_complement(&bytes[26..34], 6 + u32::from(len - 20));
    bytes[50..52].copy_from_slice(&pseudo.to_be_bytes());
    bytes
}

fn ones_complement(bytes: &[u8], start: u32) -> u16 {
    let mut sum = bytes
        .chunks(2)
        .fold(start, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])));
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Everything that arrives, as header and frame each; other stacks' chatter left out.
fn all_received(vm: &mut Harness) -> Vec<(Header, Vec<u8>)> {
    while vm.poll() > 0 && vm.watched_files() > 0 {}
    let mut frames = Vec::new();
    while let Some((head, len)) = vm.driver(RECEIVE).take() {
        let posted = chain_at(vm, head);
        let mut bytes = vm.driver(RECEIVE).written(&posted);
        bytes.truncate(len as usize);
        let (header, frame) = split(&bytes);
        assert_eq!(header.num_buffers, 1, "the buffers are long enough");
        if frame[6..12] == MAC {
            frames.push((header, frame.to_vec()));
        }
    }
    frames
}

#[test]
fn frames_cross_a_real_tap_both_ways() {
    let Some(mut lan) = namespace(GOOD) else { return };
    let mut vm = lan.card(|all| all);
    let data = segment(100);
    let unfinished = Header { flags: 1, csum_start: 34, csum_offset: 16, ..Header::default() };
    send(&mut vm, unfinished, &data);
    let (header, got) = lan.take().expect("the frame");
    assert_eq!((header.flags & 1, got), (1, data.clone()));
    assert_eq!(lan.take(), None);

    offer(&mut vm, &[2000; 8]);
    lan.send(unfinished, &data);
    let frames = all_received(&mut vm);
    assert_eq!(frames.len(), 1);
    assert_eq!((frames[0].0.flags & 1, &frames[0].1), (1, &data));
}

#[test]
fn a_large_frame_crosses_a_real_tap_whole_if_the_driver_takes_it_and_in_segments_if_not() {
    let large = Header { gso_size: 1000, ..large() };
    let data = segment(3000);

    let Some(mut lan) = namespace(GOOD) else { return };
    let mut vm = lan.card(|all| all);
    send(&mut vm, large, &data);
    let (header, got) = lan.take().expect("the frame");
    assert_eq!((header.gso_type, header.gso_size, got.len()), (1, 1000, data.len()));
    offer(&mut vm, &[4000; 8]);
    lan.send(large, &data);
    let frames = all_received(&mut vm);
    assert_eq!(frames.len(), 1);
    assert_eq!((frames[0].0.gso_type, frames[0].0.gso_size), (1, 1000));
    assert_eq!(frames[0].1, data);

    let mut lan = namespace(GOOD).unwrap();
    let mut vm = lan.card(|all| all & !(1 << 7 | 1 << 8 | 1 << 9 | 1 << 54 | 1 << 55));
    offer(&mut vm, &[4000; 8]);
    lan.send(large, &data);
    let frames = all_received(&mut vm);
    assert_eq!(frames.iter().map(|(_, frame)| frame.len()).collect::<Vec<_>>(), [1054; 3]);
    assert!(frames.iter().all(|(header, _)| header.gso_type == 0));
    let payload: Vec<u8> = frames.iter().flat_map(|(_, frame)| &frame[54..]).copied().collect();
    assert_eq!(payload, data[54..]);

    let mut lan = namespace(GOOD).unwrap();
    let mut vm = lan.card(|_| 1 << 15);
    offer(&mut vm, &[4000; 8]);
    lan.send(large, &data);
    let frames = all_received(&mut vm);
    assert_eq!(frames.len(), 3);
    for (header, frame) in frames {
        assert_eq!((header.flags, header.gso_type), (0, 0));
        let sum = ones_complement(&frame[26..], 6 + (frame.len() - 34) as u32);
        assert_eq!(sum, 0xffff, "the host finished the checksum");
    }
}

#[test]
fn hg_n08_an_interface_that_is_deleted_pulls_the_cable() {
    let Some(mut lan) = namespace(GOOD) else { return };
    let mut vm = lan.card(|all| all);
    offer(&mut vm, &[2000; 8]);
    let mut down = request();
    control(&lan.socket, libc::SIOCSIFFLAGS, &mut down);
    send(&mut vm, Header::default(), &frame(60));
    all_received(&mut vm);
    assert_eq!((vm.config_changes(), vm.watched_files()), (0, 1), "down is not gone");
    down.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    control(&lan.socket, libc::SIOCSIFFLAGS, &mut down);
    let before = lan.take();
    send(&mut vm, Header::default(), &frame(61));
    assert_eq!((before, lan.take().map(|(_, frame)| frame.len())), (None, Some(61)), "and comes back");

    let status = std::process::Command::new("ip").args(["link", "del", "tap0"]).status();
    let Ok(status) = status else { return };
    assert!(status.success());
    assert_eq!(vm.poll(), 1);
    assert_eq!((vm.config_changes(), vm.watched_files()), (1, 0));
    assert_eq!(send(&mut vm, Header::default(), &frame(60)), 0);
    assert!(!vm.asked_for_reset());
}

#[test]
fn a_file_that_is_no_fitting_tap_is_refused() {
    let reason = |result: Result<Box<dyn VirtioDevice>, BuildError>| match result.err() {
        Some(BuildError::File { source, .. }) => source.to_string(),
        other => panic!("not refused for its file: {other:?}"),
    };
    reason(build(std::fs::File::open("/dev/null").unwrap().into()));
    reason(build(pair().0));
    for (flags, missing) in [
        (libc::IFF_TAP | libc::IFF_NO_PI, "IFF_VNET_HDR"),
        (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR, "IFF_TAP"),
    ] {
        let Some(mut lan) = namespace(flags) else { return };
        assert!(reason(build(lan.tap.take().unwrap())).ends_with(missing));
    }
}
