//! The shim as containerd sees it: the real program, driven over its socket, with plain processes for machines.

mod bootstrap;
mod bundles;
mod checkpoints;
mod containerd;
mod execs;
mod faults;
mod fifos;
mod host;
mod hostile;
mod life;
mod orders;
mod pods;
mod stdio;
mod wire;
