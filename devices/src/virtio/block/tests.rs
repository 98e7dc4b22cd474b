//! A disk and its driver, without a machine.

mod build;
mod conformance;
mod faults;
mod hostile;
mod limits;
mod model;

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use super::*;
use crate::testing::{Harness, Posted};

pub(super) const IN: u32 = 0;
pub(super) const OUT: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;

pub(super) const OK: u8 = 0;
pub(super) const IOERR: u8 = 1;
pub(super) const UNSUPP: u8 = 2;

pub(super) fn config() -> Config {
    Config { disk: FdSlot(0), read_only: false, serial: "root".into(), queues: 1, cache: Cache::Writeback }
}

/// An image of `sectors` sectors, each filled with its own number plus one.
pub(super) fn image(sectors: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    for sector in 0..sectors {
        file.write_all_at(&pattern(sector), sector * 512).unwrap();
    }
    file
}

pub(super) fn pattern(sector: u64) -> [u8; 512] {
    [u8::try_from((sector + 1) % 256).unwrap(); 512]
}

/// The same file, opened anew, with other flags.
pub(super) fn reopen(file: &File, options: &std::fs::OpenOptions) -> OwnedFd {
    use std::os::fd::AsRawFd;
    options.open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap().into()
}

pub(super) fn try_build(
    config: &Config,
    fd: impl Into<OwnedFd>,
) -> Result<Box<dyn VirtioDevice>, BuildError> {
    config.build(&mut HashMap::from([(config.disk, fd.into())]))
}

pub(super) fn build(config: &Config, file: &File) -> Box<dyn VirtioDevice> {
    try_build(config, file.try_clone().unwrap()).unwrap()
}

pub(super) fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

pub(super) fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

pub(super) fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// What came of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u8,
    /// Length on the used ring.
    pub(super) len: u32,
    /// The writable buffers without the status.
    pub(super) data: Vec<u8>,
}

/// Posts one request, lets the device work and takes the answer. Memory the device does not write
/// reads as 0xa5.
pub(super) fn ask(vm: &mut Harness, readable: &[&[u8]], writable: &[u32]) -> Answer {
    let posted = vm.driver(0).post(readable, writable);
    taint(vm, &posted);
    vm.kick(0);
    answer(vm, 0, &posted)
}

pub(super) fn taint(vm: &Harness, posted: &Posted) {
    use crate::memory::{Bytes, GuestAddress};
    for (address, len) in &posted.writable {
        vm.memory().write_slice(&vec![0xa5; *len as usize], GuestAddress(*address)).unwrap();
    }
}

/// The oldest answer, which must be to `posted`.
pub(super) fn answer(vm: &mut Harness, queue: u16, posted: &Posted) -> Answer {
    let (head, len) = vm.driver(queue).take().expect("an answer");
    assert_eq!(head, posted.head, "answers come in order");
    let mut data = vm.driver(queue).written(posted);
    let status = data.pop().unwrap_or(0xff);
    Answer { status, len, data }
}

pub(super) fn write(vm: &mut Harness, sector: u64, data: &[u8]) -> u8 {
    ask(vm, &[&header(OUT, sector), data], &[1]).status
}

pub(super) fn read(vm: &mut Harness, sector: u64, len: u32) -> Answer {
    ask(vm, &[&header(IN, sector)], &[len, 1])
}

pub(super) fn flush(vm: &mut Harness) -> u8 {
    ask(vm, &[&header(FLUSH, 0)], &[1]).status
}

pub(super) fn counts(device: &dyn VirtioDevice) -> HashMap<&'static str, Arc<Counter>> {
    device.counters().into_iter().map(|counter| (counter.name(), counter)).collect()
}
