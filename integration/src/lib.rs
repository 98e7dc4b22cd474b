//! End-to-end tests, the lab, benches.

pub mod lab;
