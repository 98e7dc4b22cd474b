//! The guest's clocks: stamps for the host, and the wall clock it sets.

use std::time::Duration;

use mvm_protocol::Stamp;
use nix::time::{ClockId, clock_gettime, clock_settime};

/// A wall clock nearer than this to the host's is left alone: kvm-clock usually has it right.
const TOLERANCE_NS: u64 = 100_000_000;

/// Now, on the clocks that count from boot.
pub(crate) fn now() -> Stamp {
    Stamp {
        monotonic_ns: nanoseconds(ClockId::CLOCK_MONOTONIC),
        boottime_ns: nanoseconds(ClockId::CLOCK_BOOTTIME),
    }
}

/// Sets the wall clock to the host's unless it is close already.
pub(crate) fn set_wall_clock(host_ns: u64) -> nix::Result<()> {
    if nanoseconds(ClockId::CLOCK_REALTIME).abs_diff(host_ns) <= TOLERANCE_NS {
        return Ok(());
    }
    clock_settime(ClockId::CLOCK_REALTIME, Duration::from_nanos(host_ns).into())
}

fn nanoseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock).map(Duration::from).unwrap_or_default();
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
