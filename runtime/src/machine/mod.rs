//! The life of a machine: planned, opened, started, waited for, ended.

mod calls;
mod plan;
mod running;
mod start;

pub use calls::{Calls, VSOCK_SOCKET};
pub use plan::{ConsoleKind, Disk, Net, NotADisk, Plan, TapNet};
pub use running::{Console, Machine};
pub use start::{CONTROL_SOCKET, Prepared, prepare};
