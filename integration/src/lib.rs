//! End-to-end tests, the lab, benches.
