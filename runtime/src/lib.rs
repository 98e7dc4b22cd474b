//! A container becomes a machine: images, layers, rootfs, network, VM lifecycle, agent client.

pub mod agent;
mod catalog;
pub mod cgroup;
pub mod container;
mod digest;
pub mod doctor;
pub mod erofs;
pub mod failure;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod guest;
pub mod hex;
pub mod image;
pub mod machine;
pub mod net;
pub mod owner;
pub mod rootfs;
pub mod sandbox;
pub mod snapshot;
pub mod spec;
pub mod state;
pub mod template;
pub mod timeline;
pub mod usage;
mod whole_file;
