//! One machine: KVM, memory, vCPUs, boot, PCI bus; bin `mvm-vmm` is one VM process.
//!
//! The process is started with everything already open and a [`config::MachineConfig`] on descriptor 3; it
//! opens nothing itself. [`launch`] starts it. [`config`], [`control`], [`status`] and [`exit`] are plain data for
//! the programs that do; the rest is the machine:
//!
//! ```text
//! main         machine::Machine::build, then supervisor: control socket, signals, the end
//! vcpu0..N     KVM_RUN; exits → bus → ports or pci_bus
//! io loops     devices (mvm-devices)
//! ```

pub mod boot;
mod bus;
pub mod config;
pub mod control;
mod cpuid;
mod devices;
mod doorbell;
mod ecam;
mod error;
pub mod exit;
mod fds;
pub mod flat;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod gate;
mod jail;
pub mod kvm;
pub mod launch;
pub mod layout;
pub mod log;
mod machine;
mod memory;
mod metrics;
mod msi;
mod pci_bus;
pub mod process;
mod serial_port;
pub mod snapshot;
pub mod status;
mod supervisor;
mod userfault;
mod vcpu;

pub use error::Error;
