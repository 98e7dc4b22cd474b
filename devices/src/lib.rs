//! Virtual hardware: rings, virtio devices, PCI functions, serial.
//!
//! A device is one file that turns chains into bytes; everything else about being a device is written
//! once, here. This crate knows no KVM, no command line and no container: it sees guest memory, event
//! file descriptors and byte streams, so all of it is tested without `/dev/kvm`.
//!
//! The way through: a PCI function ([`pci`]) carries a virtio transport, which owns a
//! [`device::VirtioDevice`] and its queue registers until the driver is ready. Then both move, as a
//! [`task::DeviceTask`] with one [`ring::Ring`] per queue, into an I/O loop thread, and move back on reset.
//!
//! Everything a guest can write is hostile. The lints below hold the code to that: what a guest chose is
//! never unwrapped, never used as an index, never added without a check and never narrowed silently.
#![cfg_attr(
    not(any(test, feature = "testing")),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss
    )
)]

pub mod bounded;
pub mod chain;
pub mod config_space;
pub mod counter;
pub mod device;
pub mod error;
pub mod fd;
pub mod interrupt;
pub mod io_loop;
pub mod memory;
pub mod pci;
pub mod rate;
pub mod ring;
pub mod serial;
pub mod sys;
pub mod task;
pub mod throttle;
pub mod transport;
pub mod virtio;

#[cfg(any(test, feature = "testing"))]
pub mod testing;
