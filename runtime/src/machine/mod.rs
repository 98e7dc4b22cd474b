//! The life of a machine: planned, opened, started, waited for, ended.

mod calls;
mod control;
mod device;
mod listen;
mod plan;
mod running;
mod source;
mod start;
mod working;

pub use calls::{Calls, VSOCK_SOCKET};
pub use control::Control;
#[cfg(test)]
pub(crate) use control::tests::{answering, busy};
pub use mvm_vmm::control::{Attached, DeviceName, Memory, Snapshot as Saved};
pub use plan::{ConsoleKind, Disk, Kernel, Net, NotADisk, OpenTap, Origin, Plan, Slot, Snapshot, TapNet};
#[cfg(test)]
pub(crate) use running::tests::machine;
pub use running::{Console, Machine};
pub(crate) use running::{LOST_TIME, explain};
pub use source::{MemorySource, NotASource};
pub use start::{CONTROL_SOCKET, Prepared, describe, prepare};
pub(crate) use working::WORKING_SET;
