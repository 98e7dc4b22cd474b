//! The client against the real agent, run as an ordinary program on this machine.

mod confinement;
mod containers;
mod files;
mod guest;
mod hostile;
mod network;
mod processes;
mod roots;
mod streams;
