//! virtio-blk: a disk (VIRTIO 1.2 §5.2).
//!
//! Each request is carried out as it is taken, straight between the file and the guest's buffers: with
//! the data in the host's page cache that is one system call, and faster than any queue to a kernel. A
//! disk may also be slow, so each has an I/O loop of its own.

mod counters;
mod disk;
mod request;
mod space;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk as abi;

use crate::chain::{Chain, Cursor};
use crate::config_space::ConfigSpace;
use crate::counter::Counter;
use crate::device::{EventSet, Io, Kind, VirtioDevice};
use crate::error::{ChainError, Error};
use crate::fd::{FdSlot, FdSource};
use crate::ring::{Notify, Served};
use crate::throttle::{Meters, Throttle, What};
use crate::virtio::{BuildError, DeviceState, Spec};
use counters::Counters;
use disk::{Disk, RawDisk};
use request::{Header, Operation, SECTOR, Segments, Status, extent};
use space::config_bytes;

/// Entries of each queue: the segments below, a header and a status.
const QUEUE_SIZE: u16 = 512;
/// Most queues of a disk, and the sizes of that many.
const MAX_QUEUES: u16 = 16;
static QUEUES: [u16; MAX_QUEUES as usize] = [QUEUE_SIZE; MAX_QUEUES as usize];
/// Most data segments of a request, as advertised.
const SEG_MAX: u32 = 510;
/// Most bytes of a segment, as advertised.
const SIZE_MAX: u32 = 64 * 1024;
/// Most data bytes of a request: what a driver that keeps to the two limits above can reach. Nothing of
/// that size is ever allocated; it bounds how long one request keeps the loop.
const MAX_DATA: u32 = SEG_MAX * SIZE_MAX;
/// Bytes of the serial number a driver can ask for.
const ID_BYTES: usize = abi::VIRTIO_BLK_ID_BYTES as usize;

/// Bytes of an image in the place of a disk that may come: Linux tells programs of more sectors, but not of the first.
pub const NO_DISK: u64 = SECTOR;

/// Who the device is.
pub const KIND: Kind =
    Kind { id: 2, name: "block", class: [0x01, 0x80, 0], guest_config: "CONFIG_VIRTIO_BLK" };

/// A disk on a raw image: a regular file or a block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The opened image. Its size, rounded down to 512 bytes, is the disk's.
    pub disk: FdSlot,
    /// The guest may not write. The image should be opened for reading only, then the host sees to it too.
    #[serde(default)]
    pub read_only: bool,
    /// What the guest reads as the disk's serial number: up to 20 bytes, by which it finds the disk.
    #[serde(default)]
    pub serial: String,
    /// Queues, 1 to 16; more than one is of use to guests with more than one CPU.
    #[serde(default = "one")]
    pub queues: u16,
    /// What a completed write and a flush promise.
    #[serde(default)]
    pub cache: Cache,
}

fn one() -> u16 {
    1
}

/// What a completed write and a flush promise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cache {
    /// A write may be lost with the host's power until a flush; after it, not.
    #[default]
    Writeback,
    /// Nothing is ever flushed: for disks that do not outlive their VM.
    Unsafe,
}

/// What a restored disk compares itself with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Sectors of 512 bytes the driver knows of. A different image may be attached on restore: the
    /// driver is then told that its size changed.
    pub sectors: u64,
    /// A flush failed since the driver's last reset, so no later one may succeed.
    #[serde(default)]
    pub lost_writes: bool,
}

impl Spec for Config {
    fn build(&self, files: &mut dyn FdSource) -> Result<Box<dyn VirtioDevice>, BuildError> {
        self.check()?;
        let fd = files.take(self.disk).map_err(|source| BuildError::File { what: "a disk", source })?;
        let (disk, capacity) = RawDisk::open(fd, self.read_only)?;
        Ok(Box::new(Block::new(self, disk, capacity)))
    }
}

impl Config {
    fn check(&self) -> Result<(), BuildError> {
        let wrong = |what, value, expected| Err(BuildError::Value { what, value, expected });
        if self.serial.len() > ID_BYTES || self.serial.contains('\0') {
            return wrong("disk serial", self.serial.clone(), "at most 20 bytes, none of them 0");
        }
        if self.queues == 0 || self.queues > MAX_QUEUES {
            return wrong("disk queues", self.queues.to_string(), "1 to 16");
        }
        Ok(())
    }
}

struct Block<D> {
    disk: D,
    read_only: bool,
    cache: Cache,
    serial: [u8; ID_BYTES],
    queues: u16,
    /// Bytes, whole sectors.
    capacity: u64,
    config: Arc<ConfigSpace>,
    counters: Counters,
    features: u64,
    /// A flush failed: the host may have dropped what it could not write, so no later flush may claim
    /// that everything is stable. Until reset.
    lost_writes: bool,
    /// The driver knows another capacity and has to be told.
    resized: bool,
    throttle: Throttle,
}

impl<D: Disk> Block<D> {
    fn new(config: &Config, disk: D, capacity: u64) -> Self {
        let mut serial = [0; ID_BYTES];
        for (place, byte) in serial.iter_mut().zip(config.serial.bytes()) {
            *place = byte;
        }
        Self {
            disk,
            read_only: config.read_only,
            cache: config.cache,
            serial,
            queues: config.queues,
            capacity,
            config: ConfigSpace::new(config_bytes(sectors(capacity), config.queues), 0..0),
            counters: Counters::default(),
            features: 0,
            lost_writes: false,
            resized: false,
            throttle: Throttle::default(),
        }
    }

    /// Carries out the request in `chain`, or holds it. The status is written last, whatever happened before it.
    fn execute(&mut self, chain: &Chain) -> Result<u32, Error> {
        let mut input = chain.reader();
        let mut output = chain.writer();
        // The last writable byte is the status; a request without one cannot even be failed.
        let room = output.remaining().checked_sub(1).ok_or(ChainError::Short)?;
        let mut data = output.split_to(room)?;
        let header = Header::read(&mut input);
        if header.is_ok_and(|header| !self.throttle.admits(header.operation.what())) {
            return Err(Error::Held);
        }
        let status = header.and_then(|header| self.run(header, &mut input, &mut data));
        let status = status.err().unwrap_or(Status::Ok);
        if status != Status::Ok {
            self.counters.errors.one();
        }
        output.write(&[status as u8])?;
        // Only a prefix without gaps may be claimed as written (§2.7.8.2).
        let whole = u32::from(data.remaining() == 0);
        Ok(data.passed().saturating_add(whole))
    }

    fn run(
        &mut self,
        Header { operation, sector }: Header,
        input: &mut Cursor<'_>,
        output: &mut Cursor<'_>,
    ) -> Result<(), Status> {
        match operation {
            Operation::Read => self.read(sector, input, output),
            Operation::Write => self.write(sector, input, output),
            Operation::Flush => self.flush(),
            Operation::Identify => self.identify(output),
            Operation::Discard | Operation::WriteZeroes => self.clear(operation, input),
        }
    }

    fn read(&mut self, sector: u64, input: &Cursor<'_>, output: &mut Cursor<'_>) -> Result<(), Status> {
        let bytes = self.extent(sector, output.remaining(), input.remaining())?;
        let len = output.remaining();
        self.throttle.charge(What::DiskRead, len.into());
        let done = self.disk.read(output, bytes);
        report("read", bytes, done)?;
        self.counters.reads.one();
        self.counters.read_bytes.add(len.into());
        Ok(())
    }

    fn write(&mut self, sector: u64, input: &mut Cursor<'_>, output: &Cursor<'_>) -> Result<(), Status> {
        if self.read_only {
            return Err(Status::IoError);
        }
        let len = input.remaining();
        let bytes = self.extent(sector, len, output.remaining())?;
        self.throttle.charge(What::DiskWrite, len.into());
        let done = self.disk.write(input, bytes);
        report("write", bytes, done)?;
        self.counters.writes.one();
        self.counters.written_bytes.add(len.into());
        self.settle()
    }

    /// First byte of a transfer of `len` bytes. Data on the wrong side makes no sense, so `extra` must be 0.
    fn extent(&self, sector: u64, len: u32, extra: u32) -> Result<u64, Status> {
        if len > MAX_DATA || extra != 0 {
            return Err(Status::IoError);
        }
        extent(sector, len.into(), self.capacity).map(|range| range.start).ok_or(Status::IoError)
    }

    fn identify(&mut self, output: &mut Cursor<'_>) -> Result<(), Status> {
        self.throttle.charge(What::DiskRead, 0);
        output.write(&self.serial).map_err(|_| Status::IoError)
    }

    fn flush(&mut self) -> Result<(), Status> {
        self.throttle.charge(What::DiskWrite, 0);
        self.counters.flushes.one();
        if self.read_only || self.cache == Cache::Unsafe {
            return Ok(());
        }
        self.sync()
    }

    fn clear(&mut self, operation: Operation, input: &mut Cursor<'_>) -> Result<(), Status> {
        let (feature, what) = match operation {
            Operation::Discard => (abi::VIRTIO_BLK_F_DISCARD, "discard"),
            _ => (abi::VIRTIO_BLK_F_WRITE_ZEROES, "zero"),
        };
        if self.read_only || !self.accepted(feature) {
            return Err(Status::Unsupported);
        }
        let segments = Segments::read(input, operation, self.capacity)?;
        // A file system may leave us to write zeroes; what is discarded is not written.
        let written = if operation == Operation::WriteZeroes { segments.bytes() } else { 0 };
        self.throttle.charge(What::DiskWrite, written);
        for segment in segments.iter() {
            let done = match operation {
                Operation::Discard => self.disk.discard(&segment.bytes),
                _ => self.disk.zero(&segment.bytes, segment.unmap),
            };
            report(what, segment.bytes.start, done)?;
        }
        self.counters.discards.one();
        self.settle()
    }

    /// Without flushes to wait for, a driver takes what is complete for stable (§5.2.5.2).
    fn settle(&mut self) -> Result<(), Status> {
        if self.cache == Cache::Unsafe || self.accepted(abi::VIRTIO_BLK_F_FLUSH) {
            return Ok(());
        }
        self.sync()
    }

    fn sync(&mut self) -> Result<(), Status> {
        let done = self.disk.sync();
        self.lost_writes |= done.is_err();
        report("flush", 0, done)?;
        if self.lost_writes { Err(Status::IoError) } else { Ok(()) }
    }

    fn accepted(&self, feature: u32) -> bool {
        self.features & bit(feature) != 0
    }
}

impl<D: Disk> VirtioDevice for Block<D> {
    fn kind(&self) -> Kind {
        KIND
    }

    fn queues(&self) -> &[u16] {
        QUEUES.get(..usize::from(self.queues)).unwrap_or_default()
    }

    fn features(&self) -> u64 {
        let mut features = bit(abi::VIRTIO_BLK_F_SIZE_MAX)
            | bit(abi::VIRTIO_BLK_F_SEG_MAX)
            | bit(abi::VIRTIO_BLK_F_BLK_SIZE)
            | bit(abi::VIRTIO_BLK_F_TOPOLOGY);
        if self.read_only {
            features |= bit(abi::VIRTIO_BLK_F_RO);
        } else {
            features |= bit(abi::VIRTIO_BLK_F_DISCARD) | bit(abi::VIRTIO_BLK_F_WRITE_ZEROES);
        }
        if self.cache == Cache::Writeback {
            features |= bit(abi::VIRTIO_BLK_F_FLUSH);
        }
        if self.queues > 1 {
            features |= bit(abi::VIRTIO_BLK_F_MQ);
        }
        features
    }

    fn config(&self) -> Option<Arc<ConfigSpace>> {
        Some(Arc::clone(&self.config))
    }

    fn counters(&self) -> Vec<Arc<Counter>> {
        let mut counters = self.counters.all();
        counters.push(Arc::clone(&self.throttle.held));
        counters
    }

    fn wants_own_loop(&self) -> bool {
        // A place without a disk answers at once.
        self.capacity > NO_DISK
    }

    fn start(&mut self, features: u64, io: &mut Io<'_>) -> Result<(), Error> {
        self.features = features;
        self.throttle.begin();
        if std::mem::take(&mut self.resized) {
            io.interrupt().config_changed();
        }
        Ok(())
    }

    fn on_queue(&mut self, index: u16, io: &mut Io<'_>) -> Result<(), Error> {
        // Each: the guest works on one answer while the next request is carried out. A guest that is still
        // busy has moved its event index away, and is not interrupted again.
        let served = io.serve_until_held(index, Notify::Each, |chain| self.execute(chain))?;
        if served == Served::Held { self.throttle.look_again(0, io) } else { Ok(()) }
    }

    fn on_event(&mut self, _token: u32, _events: EventSet, io: &mut Io<'_>) -> Result<(), Error> {
        self.throttle.rang();
        (0..self.queues).try_for_each(|index| self.on_queue(index, io))
    }

    fn charge_at(&mut self, meters: Meters) {
        self.throttle.charge_at(meters);
    }

    fn stop(&mut self) {
        self.features = 0;
        self.lost_writes = false;
    }

    fn state(&self) -> DeviceState {
        DeviceState::Block(State { sectors: sectors(self.capacity), lost_writes: self.lost_writes })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), Error> {
        let DeviceState::Block(state) = state else {
            return Err(Error::device("restore a disk")(std::io::ErrorKind::InvalidData.into()));
        };
        self.lost_writes = state.lost_writes;
        self.resized = state.sectors != sectors(self.capacity);
        if self.resized {
            // The space holds what the saved driver read.
            let capacity = sectors(self.capacity).to_le_bytes();
            self.config.update(|space| space.iter_mut().zip(capacity).for_each(|(byte, new)| *byte = new));
        }
        Ok(())
    }
}

fn sectors(bytes: u64) -> u64 {
    bytes.checked_div(SECTOR).unwrap_or(0)
}

fn bit(feature: u32) -> u64 {
    1u64.checked_shl(feature).unwrap_or(0)
}

/// Turns the host's answer into the guest's, which has no room for the reason.
fn report(what: &str, at: u64, done: std::io::Result<()>) -> Result<(), Status> {
    done.map_err(|error| {
        log::warn!("a disk failed to {what} at byte {at}: {error}");
        Status::IoError
    })
}
