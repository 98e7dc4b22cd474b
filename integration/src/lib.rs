//! End-to-end tests, the lab, benches.

pub mod bench;
pub mod lab;
pub mod vm;
