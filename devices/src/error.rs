//! What can go wrong while a device serves its rings, by how far the damage reaches.

use std::io;

/// A failure, scoped: one request, one ring, or the whole device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This request makes no sense. Its chain is given back with length 0 and the device goes on.
    #[error("refused a request: {0}")]
    Chain(#[from] ChainError),
    /// The ring itself is broken. The device asks for a reset and stops.
    #[error("the driver broke ring {ring}: {cause}")]
    Ring {
        /// Index of the queue.
        ring: u16,
        /// What was found.
        cause: RingError,
    },
    /// The host side of the device is gone. The device asks for a reset and stops.
    #[error("cannot {operation}")]
    Device {
        /// What the device was doing, as in "read the tap".
        operation: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// This request has to wait for its turn. Its chain is put back, and the device goes on when it likes.
    #[error("has to wait")]
    Held,
}

impl Error {
    /// A host-side failure during `operation`.
    pub fn device(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Device { operation, source }
    }
}

/// Why one chain was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor's `next`, or the head, is not below the table's size.
    #[error("descriptor index {0} is outside its table")]
    Index(u16),
    /// More descriptors than the queue has entries, which also ends every loop (VIRTIO 1.2 §2.7.5.2).
    #[error("chain is longer than its queue")]
    TooLong,
    /// The buffers add up to 2^32 bytes or more (§2.7.5.2).
    #[error("chain holds 4 GiB or more")]
    TooLarge,
    /// A buffer or table is not wholly inside guest memory.
    #[error("address {address:#x}+{len:#x} is not guest memory")]
    Address {
        /// First byte.
        address: u64,
        /// Bytes.
        len: u32,
    },
    /// A device-readable descriptor follows a device-writable one (§2.7.4.2).
    #[error("readable descriptor after a writable one")]
    Order,
    /// An indirect descriptor that was not negotiated, is nested, has NEXT or a bad length (§2.7.5.3.1).
    #[error("bad indirect descriptor")]
    Indirect,
    /// The request has fewer bytes than its format needs.
    #[error("request is too short")]
    Short,
    /// The bytes are there but say something the format does not allow.
    #[error("malformed request: {0}")]
    Malformed(&'static str),
}

/// Why a ring cannot be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// `avail.idx` moved back, or more than a queue ahead (§2.7.6.1).
    #[error("available index jumped")]
    AvailIndex,
    /// An entry of the available ring names no descriptor.
    #[error("head {0} is not below the queue size")]
    Head(u16),
    /// An entry of the available ring names a chain the device already has.
    #[error("head {0} is already in flight")]
    InFlight(u16),
    /// The rings are not wholly inside guest memory, misaligned, or overlap each other.
    #[error("rings are not placed in guest memory")]
    Placement,
    /// The size is 0, not a power of two, or above what was offered.
    #[error("queue size is not valid")]
    Size,
}
