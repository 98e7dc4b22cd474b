//! The life of a machine: planned, opened, started, waited for, ended.

mod calls;
mod control;
mod device;
mod listen;
mod plan;
mod running;
mod start;

pub use calls::{Calls, VSOCK_SOCKET};
pub use control::Control;
pub use mvm_vmm::control::{Attached, DeviceName};
pub use plan::{ConsoleKind, Disk, Net, NotADisk, OpenTap, Plan, TapNet};
pub use running::{Console, Machine};
pub use start::{CONTROL_SOCKET, Prepared, describe, prepare};
