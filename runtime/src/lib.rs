//! A container becomes a machine: images, layers, rootfs, network, VM lifecycle, agent client.

pub mod agent;
pub mod erofs;
pub mod image;
