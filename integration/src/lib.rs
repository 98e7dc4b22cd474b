//! End-to-end tests, the lab, benches.

pub mod bench;
pub mod containerd;
pub mod lab;
pub mod vm;
