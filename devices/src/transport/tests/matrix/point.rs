//! The moments at which machines are saved.

/// When the machine is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Point {
    /// Before a driver.
    Fresh,
    /// The driver has noticed the device.
    Noticed,
    /// Features are agreed on and queues in place; the driver is not ready.
    Negotiated,
    /// The driver has used every entry of its queue, and waits for nothing.
    Idle,
    /// Requests are in the ring, and the driver has not kicked yet.
    Offered,
    /// It has kicked; the device may have got anywhere.
    InFlight,
    /// All is answered, the interrupt was sent, and the driver has not looked.
    Unseen,
    /// The same with the queue's vector masked: its interrupt pends.
    Masked,
    /// The same with all vectors masked.
    AllMasked,
    /// The driver asked not to be interrupted.
    Suppressed,
    /// MSI-X is off, and the driver polls.
    Polled,
    /// The driver broke its ring and was told to reset.
    Broken,
    /// The driver has reset the device.
    Reset,
}

pub(super) const POINTS: [Point; 13] = [
    Point::Fresh,
    Point::Noticed,
    Point::Negotiated,
    Point::Idle,
    Point::Offered,
    Point::InFlight,
    Point::Unseen,
    Point::Masked,
    Point::AllMasked,
    Point::Suppressed,
    Point::Polled,
    Point::Broken,
    Point::Reset,
];
