//! Exactly what crosses the vsock between host and agent.
//!
//! The guest always dials the host (CID 2), so neither side ever polls:
//!
//! 1. **Port [`CONTROL_PORT`]**, once, when the agent is ready. Frames: `u32` little-endian payload length,
//!    then one postcard-encoded message ([`HostMessage`] towards the guest, [`GuestMessage`] towards the
//!    host), at most [`limits::MAX_FRAME`] bytes. The first frames are [`Hello`] and [`HelloAck`]; then
//!    requests with ids the host chose, responses that repeat the id, and events that have none.
//! 2. **Port [`STREAM_PORT`]**, one connection per stdio stream, opened by the guest with a
//!    [`StreamHeader`] that repeats the token the host gave in [`Start`]. Raw bytes follow; half-close is
//!    end of file, in order with the data.
//!
//! Nothing read from the guest is to be trusted: a container may have taken the kernel. Nothing here
//! allocates more than the bytes received so far, or one capped first guess, whatever a length field says.
//!
//! **Compatibility.** postcard does not describe itself, so the order of variants and fields is the wire
//! format, held by golden bytes in `tests/golden.txt`. A new verb is appended and raises
//! [`Version::minor`]; any other change raises [`Version::major`]. [`Hello::version_in`] reads the version
//! of a hello whose remainder this build may not understand.

mod container;
mod frame;
mod hello;
pub mod limits;
mod message;
mod process;
mod root;
mod setup;
mod stream;

pub use container::{
    Capabilities, Confinement, ContainerMount, ContainerSource, DeviceKind, DeviceNode, DeviceRule, DiskNode,
    Get, Got, GotContent, Limits, Namespace, Namespaces, Place, Put, PutContent, PutEntry, Rlimit, RootStats,
    Scheduler, Surroundings,
};
pub use frame::{DecodeError, Decoder, EncodeError, HEADER_LEN, decode, encode};
pub use hello::{Hello, HelloAck, Identity, MAGIC, StageTimes, Stamp, VERSION, Version};
pub use message::{
    Event, Failure, FailureKind, GuestMessage, HostMessage, Reply, Request, ShutdownMode, Stats,
};
pub use process::{
    ExitStatus, PidNamespace, ProcessEntry, SignalTarget, Start, Stdio, Token, User, WindowSize,
};
pub use root::{DiskFilesystem, Lower, Mount, MountSource, SetupRoot, Writable};
pub use setup::{Address, Configure, Interface, Neighbour, Route};
pub use stream::{STREAM_HEADER_LEN, StreamHeader, StreamHeaderError};

/// The host's vsock context id (virtio 1.2 §5.10.4).
pub const HOST_CID: u32 = 2;
/// Where the agent dials its one control connection.
pub const CONTROL_PORT: u32 = 1024;
/// Where the agent dials one connection per stdio stream.
pub const STREAM_PORT: u32 = 1025;
