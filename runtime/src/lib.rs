//! A container becomes a machine: images, layers, rootfs, network, VM lifecycle, agent client.

pub mod agent;
pub mod container;
pub mod doctor;
pub mod erofs;
pub mod failure;
pub mod guest;
pub mod image;
pub mod machine;
pub mod net;
pub mod owner;
pub mod rootfs;
pub mod sandbox;
pub mod spec;
pub mod state;
