//! The client against the real agent, run as an ordinary program on this machine.

mod containers;
mod guest;
mod hostile;
mod network;
mod processes;
mod roots;
mod streams;
