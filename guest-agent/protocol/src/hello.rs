//! The first exchange: who speaks which version, and who the guest is to be.

use serde::{Deserialize, Serialize};

/// Opens every hello, so that a stranger on the port is told apart from an old agent.
pub const MAGIC: [u8; 4] = *b"mvmA";

/// The version this crate speaks.
pub const VERSION: Version = Version { major: 3, minor: 1 };

/// A protocol version. Equal majors understand each other; the side with the higher minor keeps to the
/// verbs of the lower.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Version {
    /// Raised when an existing message changes.
    pub major: u16,
    /// Raised when a message is added.
    pub minor: u16,
}

/// The agent's first message on a control connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: [u8; 4],
    /// What the agent speaks.
    pub version: Version,
    /// The agent's crate version.
    pub agent_version: String,
    /// `uname -r` of the guest.
    pub kernel_release: String,
    /// How many control connections this agent has opened before this one: 0 after a boot, more after a
    /// reconnection and in a clone. The kernel's boot id is not told, because to read it is to make it, and
    /// clones would share it.
    pub connection: u32,
    /// When the agent reached its stages.
    pub stages: StageTimes,
}

impl Hello {
    /// The version in the payload of a first frame, also when the rest of it is of a later major.
    /// `None` when it is no hello at all.
    pub fn version_in(payload: &[u8]) -> Option<Version> {
        /// What every hello of every version begins with: the message's number, magic and version.
        type Opening = (u32, [u8; 4], Version);
        let ((0, MAGIC, version), _) = postcard::take_from_bytes::<Opening>(payload).ok()? else {
            return None;
        };
        Some(version)
    }
}

/// The guest's clocks when the agent reached its stages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTimes {
    /// First instruction of `main`.
    pub agent_start: Stamp,
    /// The mounts a hello needs are there.
    pub mounts_done: Stamp,
    /// The control connection is open.
    pub dialled: Stamp,
}

/// One moment on the guest's clocks, in nanoseconds since the guest kernel began to count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// `CLOCK_MONOTONIC`: stands still while the machine is suspended.
    pub monotonic_ns: u64,
    /// `CLOCK_BOOTTIME`: includes suspension.
    pub boottime_ns: u64,
}

/// The host's answer to [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloAck {
    /// [`MAGIC`].
    pub magic: [u8; 4],
    /// What the host speaks.
    pub version: Version,
    /// Bits of optional behaviour both sides know; none is defined yet.
    pub features: u64,
    /// Who this guest is. A clone learns here that it is no longer its template.
    pub identity: Identity,
}

/// What makes one guest different from a clone of it. Assumed before the first request is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The machine's host name; empty leaves it as it is.
    pub hostname: String,
    /// Text of `/etc/machine-id` in container roots that have none, as a number; 0 leaves them without.
    pub machine_id: u128,
    /// The host's wall clock, nanoseconds since the Unix epoch; 0 leaves the guest's clock alone.
    pub wall_clock_ns: u64,
    /// Fresh randomness, credited to the guest's pool, from which its generators are seeded anew.
    pub entropy: [u8; 32],
}
