//! The first serial port.

use serde::{Deserialize, Serialize};

use super::FdSlot;

/// Most bytes of serial output that a regular file gets; what follows is dropped, and counted.
pub const MAX_SERIAL_BYTES: u64 = 64 << 20;

/// The first serial port (16550A at 0x3f8, polled).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// Where output goes. A regular file gets at most [`MAX_SERIAL_BYTES`].
    pub output: FdSlot,
    /// Where input comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<FdSlot>,
}
