//! The device status register: which writes mean something (VIRTIO 1.2 §2.1, §3.1.1).

/// The driver has noticed the device.
pub const ACKNOWLEDGE: u8 = 1;
/// The driver knows how to drive it.
pub const DRIVER: u8 = 2;
/// The driver is ready: the device runs.
pub const DRIVER_OK: u8 = 4;
/// Negotiation is over.
pub const FEATURES_OK: u8 = 8;
/// The device cannot go on. Read-only to the driver.
pub const NEEDS_RESET: u8 = 64;
/// The driver gave the device up.
pub const FAILED: u8 = 128;

/// What a write to the register asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing: the same again, or something the specification does not allow.
    Ignore,
    /// Start over.
    Reset,
    /// These bits are now set, and that is all.
    Set(u8),
    /// Is this set of features acceptable?
    Negotiated,
    /// Start the device.
    Ready,
}

/// Decides on a write of `written` while the driver's bits are `current` (without [`NEEDS_RESET`]).
///
/// Bits only ever accumulate, in the order of §3.1.1; `ACKNOWLEDGE` and `DRIVER` may come at once, and
/// `FAILED` at any time. A write with reserved bits, one that clears a bit, and one out of order is ignored
/// as a whole. After `FAILED` only a reset is heard.
pub fn step(current: u8, written: u8) -> Step {
    const BOTH: u8 = ACKNOWLEDGE | DRIVER;
    const NEGOTIATED: u8 = BOTH | FEATURES_OK;
    const READY: u8 = NEGOTIATED | DRIVER_OK;
    if written == 0 {
        return Step::Reset;
    }
    // A driver that adds a bit to what it read writes this one back.
    let written = written & !NEEDS_RESET;
    if current & FAILED != 0 {
        return Step::Ignore;
    }
    if written == current | FAILED {
        return Step::Set(written);
    }
    match (current, written) {
        (0, ACKNOWLEDGE | BOTH) | (ACKNOWLEDGE, BOTH) => Step::Set(written),
        (BOTH, NEGOTIATED) => Step::Negotiated,
        (NEGOTIATED, READY) => Step::Ready,
        _ => Step::Ignore,
    }
}

/// Whether [`step`] can lead to these bits: what a saved register may hold.
pub fn is_reachable(status: u8) -> bool {
    matches!(status & !FAILED, 0 | 1 | 3 | 11 | 15)
}
