//! The life of a machine: opened, started, waited for, ended.

mod plan;

pub use plan::{ConsoleKind, Disk, Net, NotADisk, Plan, TapNet};
