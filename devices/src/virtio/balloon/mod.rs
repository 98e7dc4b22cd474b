//! virtio-balloon: takes memory back from the guest (VIRTIO 1.2 §5.5).
//!
//! Two ways, both ending in the host dropping pages of guest memory: the driver *inflates* towards a target
//! the host sets ([`set_target`]), or it *reports* what it has free by itself. Either way the guest has
//! given the pages up, and reads something undefined when it touches them again, at which moment they cost
//! memory again. So a balloon is a favour of the guest's: never a limit to count on.
//!
//! Undefined means: zeroes where guest memory is anonymous, the file's bytes where it is a private mapping
//! of a file (the kernel image, the memory of a template). Both are the guest's own to know. A driver to
//! which the contents of free pages matter (poisoning) does not accept reporting, since `PAGE_POISON` is not
//! offered (§5.5.6.7).
//!
//! Queues are numbered as drivers do it: those of features that were not accepted are left out, and
//! the reporting queue answers to its number in the specification as well.

mod stats;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use serde::{Deserialize, Serialize};

use crate::chain::{Chain, Cursor};
use crate::config_space::ConfigSpace;
use crate::counter::Counter;
use crate::device::{EventSet, Io, Kind, VirtioDevice};
use crate::error::{ChainError, Error};
use crate::fd::FdSource;
use crate::memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, Memory};
use crate::ring::Notify;
use crate::sys;
use crate::virtio::{BuildError, DeviceState, Spec};

use stats::Stats;

/// `VIRTIO_BALLOON_F_*`.
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

/// A balloon page, whatever the guest's page size is (§5.5.6).
pub const PAGE_SIZE: u64 = 4096;
/// Most page numbers taken from one request; Linux sends no more.
const MAX_PAGES: usize = 256;

/// Fields of the configuration space.
const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
const CONFIG_SIZE: usize = 16;

/// Token of the statistics timer.
const TIMER: u32 = 0;

/// Who the device is.
pub const KIND: Kind =
    Kind { id: 5, name: "balloon", class: [0, 0xff, 0], guest_config: "CONFIG_VIRTIO_BALLOON" };

/// A balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Pages of 4 KiB the guest should give up from the start.
    pub target_pages: u32,
    /// Lets the guest take pages back by itself before it kills a process for lack of memory.
    pub deflate_on_oom: bool,
    /// Has the guest report free memory as it becomes free.
    pub reporting: bool,
    /// Seconds between questions for the guest's memory statistics; 0 asks never.
    pub stats_interval: u16,
}

impl Default for Config {
    fn default() -> Self {
        Self { target_pages: 0, deflate_on_oom: true, reporting: true, stats_interval: 0 }
    }
}

/// What outlives a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The host's wish, in pages.
    pub target_pages: u32,
    /// What the guest says it has given up, in pages.
    pub actual_pages: u32,
}

/// Asks the guest to give up `pages` pages of 4 KiB in total; leave it enough to live on. Tell the driver of it:
/// [`crate::transport::VirtioPci::change_config`] does.
pub fn set_target(config: &ConfigSpace, pages: u32) {
    config.update(|bytes| put(bytes, NUM_PAGES, pages));
}

/// Pages the guest says it has given up: a claim, not a fact.
pub fn actual(config: &ConfigSpace) -> u32 {
    get(config, ACTUAL)
}

impl Spec for Config {
    fn build(&self, _files: &mut dyn FdSource) -> Result<Box<dyn VirtioDevice>, BuildError> {
        let timer = match self.stats_interval {
            0 => None,
            seconds => Some(
                interval_timer(Duration::from_secs(seconds.into()))
                    .map_err(|source| BuildError::File { what: "balloon statistics timer", source })?,
            ),
        };
        let config = ConfigSpace::new(vec![0; CONFIG_SIZE], ACTUAL..ACTUAL.saturating_add(4));
        set_target(&config, self.target_pages);
        Ok(Box::new(Balloon {
            config,
            offered: self.features(),
            accepted: 0,
            timer,
            stats: Stats::new(),
            inflated: Counter::new("inflated_pages"),
            deflated: Counter::new("deflated_pages"),
            refused: Counter::new("refused_pages"),
            reported: Counter::new("reported_bytes"),
        }))
    }
}

impl Config {
    fn features(&self) -> u64 {
        let flag = |on: bool, feature: u64| if on { feature } else { 0 };
        flag(self.stats_interval > 0, F_STATS_VQ)
            | flag(self.deflate_on_oom, F_DEFLATE_ON_OOM)
            | flag(self.reporting, F_REPORTING)
    }
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
    None,
}

struct Balloon {
    config: Arc<ConfigSpace>,
    offered: u64,
    accepted: u64,
    timer: Option<TimerFd>,
    stats: Stats,
    inflated: Arc<Counter>,
    deflated: Arc<Counter>,
    refused: Arc<Counter>,
    reported: Arc<Counter>,
}

impl Balloon {
    fn role(&self, index: u16) -> Role {
        let stats = self.accepted & F_STATS_VQ != 0;
        let reporting = self.accepted & F_REPORTING != 0;
        match index {
            0 => Role::Inflate,
            1 => Role::Deflate,
            2 if stats => Role::Stats,
            2..=4 if reporting => Role::Reporting,
            _ => Role::None,
        }
    }

    fn stats_queue(&self) -> Option<u16> {
        (0..5).find(|index| self.role(*index) == Role::Stats)
    }

    /// Drops the pages a request names, before the driver is told that they are taken (§5.5.6.2).
    fn inflate(&self, chain: &Chain, memory: &Memory) -> Result<u32, Error> {
        let mut pages = [0; MAX_PAGES];
        let named = page_numbers(chain, &mut pages)?;
        named.sort_unstable();
        let mut rest = &*named;
        while let Some((first, count)) = next_run(&mut rest) {
            let taken = discard_pages(memory, first, count);
            self.inflated.add(taken);
            self.refused.add(count.saturating_sub(taken));
        }
        Ok(0)
    }

    /// Pages come back by being touched; there is nothing to do but count.
    fn deflate(&self, chain: &Chain) -> Result<u32, Error> {
        let mut pages = [0; MAX_PAGES];
        let named = page_numbers(chain, &mut pages)?;
        self.deflated.add(u64::try_from(named.len()).unwrap_or(0));
        Ok(0)
    }

    /// Drops the memory a driver reports as free: the buffers themselves.
    fn reported(&self, chain: &Chain, memory: &Memory) -> Result<u32, Error> {
        let free = chain.writer();
        let shared = is_shared(memory);
        for slice in free.slices(u32::MAX) {
            match sys::discard(&slice, shared) {
                Ok(bytes) => self.reported.add(u64::try_from(bytes).unwrap_or(0)),
                Err(error) => log::debug!("cannot drop reported memory: {error}"),
            }
        }
        Ok(0)
    }

    /// Reads the statistics that were posted and leaves their buffer where it is: giving it back is the
    /// question for new ones.
    fn read_stats(&self, index: u16, io: &mut Io<'_>) -> Result<(), Error> {
        let Some((ring, interrupt)) = io.ring_and_interrupt(index) else { return Ok(()) };
        if let Some(chain) = ring.pop()? {
            self.stats.read(&mut chain.reader());
            ring.undo(chain)?;
        }
        // Buffers that made no sense may have been given back on the way.
        ring.notify(interrupt)
    }

    /// Asks for new statistics.
    fn ask_for_stats(&self, io: &mut Io<'_>) -> Result<(), Error> {
        let Some(index) = self.stats_queue() else { return Ok(()) };
        let Some((ring, interrupt)) = io.ring_and_interrupt(index) else { return Ok(()) };
        if let Some(chain) = ring.pop()? {
            ring.complete(chain, 0)?;
        }
        let posted = ring.enable_kicks()?;
        ring.publish()?;
        ring.notify(interrupt)?;
        if posted {
            io.serve_again(index);
        }
        Ok(())
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> Kind {
        KIND
    }

    fn queues(&self) -> &[u16] {
        &[128; 5]
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn config(&self) -> Option<Arc<ConfigSpace>> {
        Some(Arc::clone(&self.config))
    }

    fn counters(&self) -> Vec<Arc<Counter>> {
        let own = [&self.inflated, &self.deflated, &self.refused, &self.reported].map(Arc::clone);
        let stats = self.timer.iter().flat_map(|_| self.stats.counters());
        own.into_iter().chain(stats).collect()
    }

    fn start(&mut self, features: u64, io: &mut Io<'_>) -> Result<(), Error> {
        self.accepted = features;
        if let Some(timer) = &self.timer
            && self.stats_queue().is_some()
        {
            io.watch(timer.as_fd().as_raw_fd(), TIMER, EventSet::IN)?;
        }
        Ok(())
    }

    fn on_queue(&mut self, index: u16, io: &mut Io<'_>) -> Result<(), Error> {
        let memory = Arc::clone(io.memory());
        match self.role(index) {
            Role::Inflate => io.serve(index, Notify::Batch, |chain| self.inflate(chain, &memory)),
            Role::Deflate => io.serve(index, Notify::Batch, |chain| self.deflate(chain)),
            Role::Reporting => io.serve(index, Notify::Batch, |chain| self.reported(chain, &memory)),
            Role::Stats => self.read_stats(index, io),
            Role::None => Ok(()),
        }
    }

    fn on_event(&mut self, _token: u32, _events: EventSet, io: &mut Io<'_>) -> Result<(), Error> {
        if let Some(timer) = &self.timer {
            // Nothing to read: a spurious wake-up. One question more does no harm.
            let _ = timer.wait();
        }
        self.ask_for_stats(io)
    }

    fn stop(&mut self) {
        self.accepted = 0;
        self.config.update(|bytes| put(bytes, ACTUAL, 0));
    }

    fn state(&self) -> DeviceState {
        DeviceState::Balloon(State {
            target_pages: get(&self.config, NUM_PAGES),
            actual_pages: actual(&self.config),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), Error> {
        let DeviceState::Balloon(state) = state else {
            let source = io::Error::new(io::ErrorKind::InvalidData, "it is another device's");
            return Err(Error::Device { operation: "restore the balloon's state", source });
        };
        self.config.update(|bytes| {
            put(bytes, NUM_PAGES, state.target_pages);
            put(bytes, ACTUAL, state.actual_pages);
        });
        Ok(())
    }
}

/// The page numbers of a request, at most as many as `pages` holds: what comes after is not looked at.
fn page_numbers<'a>(chain: &Chain, pages: &'a mut [u32; MAX_PAGES]) -> Result<&'a mut [u32], Error> {
    let mut request: Cursor<'_> = chain.reader();
    if request.remaining().checked_rem(4) != Some(0) {
        return Err(ChainError::Malformed("half a page number").into());
    }
    let mut count = 0usize;
    for page in pages.iter_mut() {
        if request.remaining() == 0 {
            break;
        }
        let mut bytes = [0; 4];
        request.read(&mut bytes)?;
        *page = u32::from_le_bytes(bytes);
        count = count.saturating_add(1);
    }
    Ok(pages.get_mut(..count).unwrap_or_default())
}

/// Takes the longest run of consecutive numbers off a sorted list, a number that repeats counting once.
fn next_run(sorted: &mut &[u32]) -> Option<(u32, u64)> {
    let (first, mut rest) = sorted.split_first()?;
    let mut last = *first;
    while let Some((next, after)) = rest.split_first() {
        if next.checked_sub(last).is_none_or(|step| step > 1) {
            break;
        }
        last = *next;
        rest = after;
    }
    *sorted = rest;
    Some((*first, u64::from(last.saturating_sub(*first)).saturating_add(1)))
}

/// Drops `count` pages from number `first` on, as far as they are memory; returns how many were.
fn discard_pages(memory: &Memory, first: u32, count: u64) -> u64 {
    let start = u64::from(first).saturating_mul(PAGE_SIZE);
    let end = start.saturating_add(count.saturating_mul(PAGE_SIZE));
    let shared = is_shared(memory);
    let mut taken = 0u64;
    for region in memory.iter() {
        let from = start.max(region.start_addr().0);
        let to = end.min(region.start_addr().0.saturating_add(region.len()));
        let len = usize::try_from(to.saturating_sub(from)).unwrap_or(0);
        if len == 0 {
            continue;
        }
        let Ok(slice) = memory.get_slice(GuestAddress(from), len) else { continue };
        match sys::discard(&slice, shared) {
            Ok(bytes) => taken = taken.saturating_add(u64::try_from(bytes).unwrap_or(0) / PAGE_SIZE),
            Err(error) => log::debug!("cannot drop balloon pages: {error}"),
        }
    }
    taken
}

/// Whether guest memory is a shared mapping, whose pages belong to a file as well.
fn is_shared(memory: &Memory) -> bool {
    memory.iter().any(|region| region.flags() & libc::MAP_SHARED != 0)
}

fn interval_timer(interval: Duration) -> io::Result<TimerFd> {
    let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
    let interval = TimeSpec::from_duration(interval);
    timer.set(Expiration::Interval(interval), TimerSetTimeFlags::empty())?;
    Ok(timer)
}

fn get(config: &ConfigSpace, offset: usize) -> u32 {
    let mut bytes = [0; 4];
    config.read(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn put(bytes: &mut [u8], offset: usize, value: u32) {
    if let Some(field) = bytes.get_mut(offset..).and_then(|rest| rest.first_chunk_mut()) {
        *field = value.to_le_bytes();
    }
}
