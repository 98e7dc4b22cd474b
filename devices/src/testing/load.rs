//! What a driver asks of each kind of device, and what the host can tell of it afterwards.

mod mem;
mod vsock;

use std::collections::HashMap;
use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::counter::Counter;
use crate::device::VirtioDevice;
use crate::fd::FdSlot;
use crate::memory::{Bytes, GuestAddress};
use crate::sys;
use crate::testing::{Driver, Posted};
use crate::virtio::{DeviceSpec, Spec, balloon, block, console, net, rng};
use mem::Mem;
use vsock::Vsock;

/// Bytes of a request's part of the back end.
const SECTOR: usize = 512;
/// First of the pages that a balloon is given; neither rings nor buffers lie there.
const PAGE: u32 = 0x40_0000 / 4096;
/// Requests that the back ends have room for.
const ROOM: u16 = 1024;

/// One kind of device at work.
pub trait Load {
    /// A new device on the host's side as it is now.
    fn device(&mut self) -> Box<dyn VirtioDevice>;
    /// The queue that requests go to.
    fn queue(&self) -> u16;
    /// Posts request `number`, of at most three buffers.
    fn post(&self, driver: &mut Driver, number: u16) -> Posted;
    /// Request `number` was answered with `len` bytes: rightly.
    fn check(&mut self, driver: &Driver, number: u16, posted: &Posted, len: u32);
    /// How many requests all devices together have carried out, if the host can tell. They came in order.
    fn carried_out(&mut self) -> Option<u64>;

    /// Posts request `number` to a device that a hostile driver had before: one that any state of it answers alike.
    fn probe(&self, driver: &mut Driver, number: u16) -> Posted {
        self.post(driver, number)
    }

    /// Probe `number` was answered rightly.
    fn check_probe(&mut self, driver: &Driver, number: u16, posted: &Posted, len: u32) {
        self.check(driver, number, posted, len);
    }

    /// Something happens on the host's side: which, and how much of it.
    fn host(&mut self, _what: u8, _much: u16) {}

    /// The host's side is as a guest must leave it.
    fn intact(&self) {}
}

/// All kinds by their names.
pub fn all() -> Vec<(&'static str, Box<dyn Load>)> {
    vec![
        ("block", Box::new(Disk::new())),
        ("console", Box::new(Terminal::new())),
        ("net", Box::new(Card::default())),
        ("rng", Box::new(Entropy)),
        ("balloon", Box::new(Balloon::default())),
        ("mem", Box::new(Mem::default())),
        ("vsock", Box::new(Vsock::default())),
    ]
}

/// The kind called `name`.
pub fn named(name: &str) -> Box<dyn Load> {
    all().into_iter().find(|(own, _)| *own == name).unwrap().1
}

fn build(spec: &DeviceSpec, files: Vec<(u32, OwnedFd)>) -> Box<dyn VirtioDevice> {
    let mut files: HashMap<FdSlot, OwnedFd> =
        files.into_iter().map(|(slot, file)| (FdSlot(slot), file)).collect();
    spec.build(&mut files).unwrap()
}

/// A byte that tells requests apart, and a request from nothing.
fn mark(number: u16) -> u8 {
    u8::try_from(number % 255).unwrap() + 1
}

struct Counted {
    name: &'static str,
    counters: Vec<Arc<Counter>>,
}

impl Counted {
    fn new(name: &'static str) -> Self {
        Self { name, counters: Vec::new() }
    }

    fn watch(&mut self, device: &dyn VirtioDevice) {
        self.counters.extend(device.counters().into_iter().filter(|counter| counter.name() == self.name));
    }

    fn sum(&self) -> u64 {
        self.counters.iter().map(|counter| counter.get()).sum()
    }
}

/// Writes sector after sector.
struct Disk {
    image: File,
    writes: Counted,
}

impl Disk {
    fn new() -> Self {
        let image = File::from(memfd_create(c"disk", MFdFlags::MFD_CLOEXEC).unwrap());
        image.set_len(u64::from(ROOM) * 512).unwrap();
        Self { image, writes: Counted::new("writes") }
    }
}

impl Load for Disk {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let spec = DeviceSpec::Block(block::Config {
            disk: FdSlot(3),
            read_only: false,
            serial: String::new(),
            queues: 1,
            cache: block::Cache::Unsafe,
        });
        let device = build(&spec, vec![(3, self.image.try_clone().unwrap().into())]);
        assert!(matches!(device.state(), crate::virtio::DeviceState::Block(block::State { .. })));
        self.writes.watch(device.as_ref());
        device
    }

    fn queue(&self) -> u16 {
        0
    }

    fn post(&self, driver: &mut Driver, number: u16) -> Posted {
        let mut header = [0; 16];
        header[0] = 1; // VIRTIO_BLK_T_OUT
        header[8..10].copy_from_slice(&number.to_le_bytes());
        driver.post(&[&header, &[mark(number); SECTOR]], &[1])
    }

    fn check(&mut self, driver: &Driver, number: u16, posted: &Posted, len: u32) {
        assert_eq!((len, driver.written(posted)), (1, vec![0]), "the status");
        let mut sector = [0; SECTOR];
        self.image.read_exact_at(&mut sector, u64::from(number) * SECTOR as u64).unwrap();
        assert_eq!(sector, [mark(number); SECTOR]);
    }

    fn carried_out(&mut self) -> Option<u64> {
        Some(self.writes.sum())
    }

    fn intact(&self) {
        assert_eq!(
            self.image.metadata().unwrap().len(),
            u64::from(ROOM) * 512,
            "the disk's file keeps its length"
        );
    }
}

/// Prints a byte a request.
struct Terminal {
    reader: PipeReader,
    output: OwnedFd,
    input: OwnedFd,
    typist: PipeWriter,
    seen: u64,
}

impl Terminal {
    fn new() -> Self {
        let (reader, output) = std::io::pipe().unwrap();
        let (input, typist) = std::io::pipe().unwrap();
        sys::file::set_nonblocking(reader.as_fd()).unwrap();
        sys::file::set_nonblocking(typist.as_fd()).unwrap();
        Self { reader, output: output.into(), input: input.into(), typist, seen: 0 }
    }
}

impl Load for Terminal {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let spec = DeviceSpec::Console(console::Config {
            input: Some(FdSlot(3)),
            output: FdSlot(4),
            unlimited: true,
            size: None,
        });
        let files = [(3, &self.input), (4, &self.output)];
        build(&spec, files.map(|(slot, file)| (slot, file.try_clone().unwrap())).into())
    }

    fn queue(&self) -> u16 {
        1
    }

    fn post(&self, driver: &mut Driver, number: u16) -> Posted {
        driver.post(&[&[mark(number)]], &[])
    }

    fn check(&mut self, _: &Driver, _: u16, _: &Posted, len: u32) {
        assert_eq!(len, 0);
    }

    fn carried_out(&mut self) -> Option<u64> {
        let mut bytes = Vec::new();
        // Ends with `WouldBlock`: the writer is open.
        self.reader.read_to_end(&mut bytes).unwrap_err();
        for byte in bytes {
            assert_eq!(byte, mark(u16::try_from(self.seen).unwrap()));
            self.seen += 1;
        }
        Some(self.seen)
    }

    fn host(&mut self, what: u8, much: u16) {
        if what & 1 == 0 {
            // A typist whose terminal is full waits.
            let _ = self.typist.write(&vec![b'x'; usize::from(much % 8192)]);
        } else {
            let _ = self.reader.read(&mut vec![0; usize::from(much)]);
        }
    }
}

/// Sends a frame a request.
#[derive(Default)]
struct Card {
    wire: Option<OwnedFd>,
    sent: Vec<Vec<u8>>,
}

impl Card {
    /// Takes what came over the wire.
    fn drain(&mut self) {
        let mut packet = [0; 128];
        while let Some(wire) = &self.wire
            && let Ok(len @ 1..) = nix::unistd::read(wire, &mut packet)
        {
            self.sent.push(packet[HEADER.len()..len].to_vec());
        }
    }
}

const HEADER: [u8; 12] = [0; 12];

fn frame(number: u16) -> Vec<u8> {
    let mut frame = vec![0xaa; 60];
    frame[14..16].copy_from_slice(&number.to_le_bytes());
    frame
}

impl Load for Card {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let config = net::Config { tap: FdSlot(3), mac: None, mtu: None, only_own_mac: false };
        let (device, wire) = net::stand_in::card(&config).unwrap();
        self.drain();
        self.wire = Some(wire);
        device
    }

    fn queue(&self) -> u16 {
        1
    }

    fn post(&self, driver: &mut Driver, number: u16) -> Posted {
        driver.post(&[&HEADER, &frame(number)], &[])
    }

    fn check(&mut self, _: &Driver, _: u16, _: &Posted, len: u32) {
        assert_eq!(len, 0);
        self.drain(); // or the socket would be full one day
    }

    fn carried_out(&mut self) -> Option<u64> {
        self.drain();
        for (number, sent) in (0..).zip(&self.sent) {
            assert_eq!(*sent, frame(number));
        }
        Some(self.sent.len() as u64)
    }

    fn host(&mut self, what: u8, much: u16) {
        let packet = vec![what & 1; usize::from(much)];
        match &self.wire {
            // What the socket has no room for is lost, as on any wire.
            Some(wire) if what < 0xf0 => drop(nix::unistd::write(wire, &packet)),
            _ => self.drain(),
        }
    }
}

/// Asks for random bytes.
struct Entropy;

impl Load for Entropy {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        build(&DeviceSpec::Rng(rng::Config {}), Vec::new())
    }

    fn queue(&self) -> u16 {
        0
    }

    fn post(&self, driver: &mut Driver, _: u16) -> Posted {
        driver.post(&[], &[32])
    }

    fn check(&mut self, driver: &Driver, _: u16, posted: &Posted, len: u32) {
        assert_eq!(len, 32);
        assert_ne!(driver.written(posted), [0; 32]);
    }

    fn carried_out(&mut self) -> Option<u64> {
        None
    }
}

/// Gives up a page a request.
struct Balloon {
    inflated: Counted,
}

impl Default for Balloon {
    fn default() -> Self {
        Self { inflated: Counted::new("inflated_pages") }
    }
}

impl Load for Balloon {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let device = build(&DeviceSpec::Balloon(balloon::Config::default()), Vec::new());
        self.inflated.watch(device.as_ref());
        device
    }

    fn queue(&self) -> u16 {
        0
    }

    fn post(&self, driver: &mut Driver, number: u16) -> Posted {
        let page = PAGE + u32::from(number);
        driver.memory().write_slice(&[0xaa; 4096], GuestAddress(u64::from(page) * 4096)).unwrap();
        driver.post(&[&page.to_le_bytes()], &[])
    }

    fn check(&mut self, driver: &Driver, number: u16, _: &Posted, len: u32) {
        assert_eq!(len, 0);
        let page = u64::from(PAGE + u32::from(number)) * 4096;
        assert_eq!(driver.posted_at(page, 4096), [0; 4096], "page {page:#x} is gone");
    }

    fn carried_out(&mut self) -> Option<u64> {
        Some(self.inflated.sum())
    }
}
