//! The client against the real agent, run as an ordinary program on this machine.

mod abandoned;
mod confinement;
mod containers;
mod excess;
mod files;
mod guest;
mod held;
pub(crate) mod hostile;
mod network;
mod processes;
mod resuming;
mod roots;
mod streams;
