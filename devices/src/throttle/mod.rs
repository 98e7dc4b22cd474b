//! How fast a machine may use its disks and its network: meters that all its devices are charged at.
//!
//! The meters lie in memory that the machine's process shares with the one that started it. That one sets rates there
//! whenever it likes; devices charge what they carry, and are held while a meter is ahead of its rate by more than
//! its burst. A request is carried out whole, whatever it costs: the next one waits for it.

mod hold;
mod limit;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::time::{ClockId, clock_gettime};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

pub(crate) use hold::Throttle;
pub use limit::{Bound, Limit, NotALimit, Rate, What};

/// Bytes of the meters' file: one page.
const FILE: usize = 4096;
/// Bytes of a meter: its rate, its burst, and when what was charged so far is paid for.
const METER: usize = 3 * WORD;
const WORD: usize = size_of::<u64>();
/// What must not happen to the file while it is mapped.
const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW);
const NANOS: u128 = 1_000_000_000;

/// What is counted of a kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Bytes,
    Operations,
}

/// A machine's meters. Clones are the same meters; those that are none hold nobody.
#[derive(Clone, Debug, Default)]
pub struct Meters(Option<Arc<MmapRegion<()>>>);

impl Meters {
    /// New meters without any rate, and the file by which another process has the same.
    ///
    /// # Errors
    /// The host has no memory or no file left.
    pub fn create() -> io::Result<(Self, OwnedFd)> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = std::fs::File::from(memfd_create(c"mvm-meters", flags)?);
        file.set_len(u64::try_from(FILE).unwrap_or(0))?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS | SealFlag::F_SEAL_SEAL))?;
        let meters = Self::open(file.try_clone()?.into())?;
        Ok((meters, file.into()))
    }

    /// The meters in `file`, which another process has created.
    ///
    /// # Errors
    /// It is no such file (`InvalidInput`), or cannot be mapped.
    pub fn open(file: OwnedFd) -> io::Result<Self> {
        let seals = fcntl(file.as_fd(), FcntlArg::F_GET_SEALS)?;
        if !SealFlag::from_bits_retain(seals).contains(SEALS) {
            let problem = "meters are in a memory file whose size is sealed";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        }
        let file = std::fs::File::from(file);
        if file.metadata()?.len() < u64::try_from(FILE).unwrap_or(u64::MAX) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the file of meters is too short"));
        }
        let file = FileOffset::new(file, 0);
        let mapped = MmapRegion::from_file(file, FILE).map_err(io::Error::other)?;
        Ok(Self(Some(Arc::new(mapped))))
    }

    /// Whether there are any.
    pub fn exist(&self) -> bool {
        self.0.is_some()
    }

    /// Sets a limit, at once for all devices: a new rate begins with its whole burst. Devices that are held look again
    /// within a tenth of a second.
    pub fn set(&self, limit: &Limit) {
        let (bytes, operations) = match limit.bound {
            Bound::None => (Some(None), Some(None)),
            Bound::Bytes(rate) => (Some(Some(rate)), None),
            Bound::Operations(rate) => (None, Some(Some(rate))),
        };
        for (unit, rate) in [(Unit::Bytes, bytes), (Unit::Operations, operations)] {
            let (Some(rate), Some(meter)) = (rate, self.meter(limit.what, unit)) else { continue };
            // Nobody is held by a rate that is none while the rest changes.
            meter.rate.store(0, Ordering::Release);
            meter.paid.store(0, Ordering::Release);
            meter.burst.store(rate.map_or(0, Rate::burst), Ordering::Release);
            meter.rate.store(rate.map_or(0, Rate::per_second), Ordering::Release);
        }
    }

    /// The limits that are set.
    #[cfg(test)]
    fn limits(&self) -> Vec<Limit> {
        let mut limits = Vec::new();
        for what in What::ALL {
            for (unit, bound) in
                [(Unit::Bytes, Bound::Bytes as fn(Rate) -> Bound), (Unit::Operations, Bound::Operations)]
            {
                let rate = self.meter(what, unit).and_then(|meter| {
                    let (rate, burst) =
                        (meter.rate.load(Ordering::Acquire), meter.burst.load(Ordering::Acquire));
                    Rate::new(rate, burst)
                });
                limits.extend(rate.map(|rate| Limit { what, bound: bound(rate) }));
            }
        }
        limits
    }

    /// Charges one operation of `what` with `bytes`.
    fn charge(&self, what: What, bytes: u64) {
        self.charge_at(what, bytes, now);
    }

    /// How long `what` has to wait before more of it is carried out; `None` if it need not.
    fn wait(&self, what: What) -> Option<Duration> {
        self.wait_at(what, now)
    }

    /// From now on `what` waits until its limits are set anew: tests hold a device whatever time they take.
    #[cfg(test)]
    pub(crate) fn owe_for_ever(&self, what: What) {
        for meter in [Unit::Bytes, Unit::Operations].into_iter().filter_map(|unit| self.meter(what, unit)) {
            meter.paid.store(u64::MAX, Ordering::Release);
        }
    }

    /// When the bytes and the operations of `what` that were charged are paid for; 0 if none were.
    #[cfg(test)]
    pub(crate) fn paid(&self, what: What) -> [u64; 2] {
        [Unit::Bytes, Unit::Operations]
            .map(|unit| self.meter(what, unit).map_or(0, |meter| meter.paid.load(Ordering::Acquire)))
    }

    fn charge_at(&self, what: What, bytes: u64, now: impl Fn() -> u64) {
        for (unit, amount) in [(Unit::Bytes, bytes), (Unit::Operations, 1)] {
            if let Some(meter) = self.meter(what, unit) {
                meter.charge(amount, &now);
            }
        }
    }

    fn wait_at(&self, what: What, now: impl Fn() -> u64) -> Option<Duration> {
        let units = [Unit::Bytes, Unit::Operations];
        let waits = units.into_iter().filter_map(|unit| self.meter(what, unit)?.wait(&now));
        waits.max().map(Duration::from_nanos)
    }

    fn meter(&self, what: What, unit: Unit) -> Option<Meter<'_>> {
        let mapped = self.0.as_deref()?;
        let number = (what as usize).checked_mul(2)?.checked_add(unit as usize)?;
        let at = number.checked_mul(METER)?;
        let word = |index: usize| {
            let offset = at.checked_add(index.checked_mul(WORD)?)?;
            mapped.get_atomic_ref::<AtomicU64>(offset).ok()
        };
        Some(Meter { rate: word(0)?, burst: word(1)?, paid: word(2)? })
    }
}

/// One meter. What another process writes to it may hold devices too long or not at all, and nothing else.
struct Meter<'a> {
    /// Units per second; 0 is no limit.
    rate: &'a AtomicU64,
    /// Units that may be ahead of that.
    burst: &'a AtomicU64,
    /// When all that was charged is paid for, in nanoseconds of CLOCK_MONOTONIC.
    paid: &'a AtomicU64,
}

impl Meter<'_> {
    /// Charges `amount` units.
    fn charge(&self, amount: u64, now: impl Fn() -> u64) {
        let Some(cost) = self.time(amount) else { return };
        let now = now();
        let later = |paid: u64| Some(paid.max(now).saturating_add(cost));
        // Never fails: `later` always has an answer.
        let _ = self.paid.fetch_update(Ordering::AcqRel, Ordering::Acquire, later);
    }

    /// Nanoseconds until one more unit is within the burst; `None` if it is.
    fn wait(&self, now: impl Fn() -> u64) -> Option<u64> {
        let (burst, one) = (self.time(self.burst.load(Ordering::Acquire))?, self.time(1)?);
        let free = self.paid.load(Ordering::Acquire).saturating_add(one).saturating_sub(burst);
        free.checked_sub(now()).filter(|wait| *wait > 0)
    }

    /// How long the rate takes for `amount` units, in nanoseconds; `None` without a rate.
    fn time(&self, amount: u64) -> Option<u64> {
        let rate = self.rate.load(Ordering::Acquire);
        let nanos = u128::from(amount).saturating_mul(NANOS).checked_div(rate.into())?;
        Some(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// CLOCK_MONOTONIC in nanoseconds: the same for every process of the host.
fn now() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| u64::try_from(Duration::from(time).as_nanos()).unwrap_or(u64::MAX))
}
