//! PID 1 in the guest: mounts, reaps, dials the host, runs processes.

fn main() {}
