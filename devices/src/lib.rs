//! Virtual hardware: rings, virtio devices, PCI functions, serial.
//!
//! A device is one file that turns chains into bytes; everything else about being a device is written
//! once, here. This crate knows no KVM, no command line and no container: it sees guest memory, event
//! file descriptors and byte streams, so all of it is tested without `/dev/kvm`.
//!
//! Everything a guest can write is hostile. The lints below hold the code to that: what a guest chose is
//! never unwrapped, never used as an index, never added without a check and never narrowed silently.
#![cfg_attr(
    not(test),
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

pub mod memory;
pub mod pci;
