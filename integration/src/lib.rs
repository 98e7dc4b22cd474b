//! End-to-end tests, the lab, benches.

pub mod bench;
pub mod containerd;
pub mod crash;
pub mod lab;
pub mod programs;
pub mod vm;
pub mod witness;
