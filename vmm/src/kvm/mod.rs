//! KVM: a machine in it, what a vCPU starts with, what a host offers, what its failures mean.

pub(crate) mod failure;
pub(crate) mod host;
pub mod probe;
pub(crate) mod registers;
mod vm;

pub(crate) use vm::Vm;
