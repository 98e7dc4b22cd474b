//! The guest's clocks: stamps for the host, and the wall clock it sets.

use std::time::Duration;

use mvm_protocol::Stamp;
use nix::time::{ClockId, clock_gettime, clock_settime};

/// Now, on the clocks that count from boot.
pub(crate) fn now() -> Stamp {
    Stamp {
        monotonic_ns: nanoseconds(ClockId::CLOCK_MONOTONIC),
        boottime_ns: nanoseconds(ClockId::CLOCK_BOOTTIME),
    }
}

/// Sets the wall clock to the host's unless it is close already.
pub(crate) fn set_wall_clock(host_ns: u64, tolerance_ns: u64) -> nix::Result<()> {
    if wall_clock().abs_diff(host_ns) <= tolerance_ns {
        return Ok(());
    }
    clock_settime(ClockId::CLOCK_REALTIME, Duration::from_nanos(host_ns).into())
}

/// What the wall clock says, in nanoseconds since the Unix epoch.
pub(crate) fn wall_clock() -> u64 {
    nanoseconds(ClockId::CLOCK_REALTIME)
}

fn nanoseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock).map(Duration::from).unwrap_or_default();
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
