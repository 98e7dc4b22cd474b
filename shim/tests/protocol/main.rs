//! The shim as containerd sees it: the real program, driven over its socket, with plain processes for machines.

mod bootstrap;
mod bundles;
mod containerd;
mod execs;
mod faults;
mod fifos;
mod host;
mod life;
mod pods;
mod stdio;
