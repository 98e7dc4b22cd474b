//! Every bound of the protocol, by name. Both sides enforce them; none depends on the peer's word.

/// Largest payload of a control frame, in bytes. Longer is an error before anything is allocated.
pub const MAX_FRAME: usize = 1 << 20;
/// Most a stream's pump holds between its two ends, in bytes.
pub const STREAM_BUFFER: usize = 64 * 1024;
/// Requests the host may have unanswered; the host's client refuses more.
pub const MAX_IN_FLIGHT: usize = 64;
/// Streams open at one time in one guest; more are refused as busy.
pub const MAX_STREAMS: usize = 256;
/// Processes the agent keeps a record of (running, or exited and not yet forgotten).
pub const MAX_PROCESSES: usize = 256;
/// Mounts in one request.
pub const MAX_MOUNTS: usize = 128;
/// Lower directories of one container root.
pub const MAX_LAYERS: usize = 128;
/// Container roots in one guest.
pub const MAX_ROOTS: usize = 64;
/// Longest id of a container root, in bytes.
pub const MAX_ID: usize = 64;
/// Longest text a guest may send (versions, error texts), in bytes; the host cuts what is longer.
pub const MAX_GUEST_TEXT: usize = 4096;
/// Unsent control bytes the agent keeps for a host that does not read, before it drops the connection.
pub const MAX_UNSENT: usize = 4 * MAX_FRAME;
/// Longest the agent waits between TERM and KILL at shutdown, whatever was asked, in milliseconds.
pub const MAX_SHUTDOWN_MS: u32 = 60_000;
/// Largest `/etc/passwd` or `/etc/group` of an image that is read to find a user, in bytes.
pub const MAX_USER_DATABASE: usize = 1 << 20;
/// Longest text of one cgroup file in a container's statistics, in bytes; the agent cuts what is longer.
pub const MAX_STAT_TEXT: usize = 8192;
/// Most files in a container's statistics.
pub const MAX_STAT_FILES: usize = 64;
/// Most process numbers in a container's statistics.
pub const MAX_STAT_PIDS: usize = 4096;
/// Most bytes of a file in one [`crate::Put`] or [`crate::Got`].
pub const MAX_PART: usize = 512 * 1024;
/// Most names in one [`crate::Got`]: each counts as its bytes and one more, and all together as a file's part.
pub const MAX_PART_NAMES: usize = MAX_PART / 2;
/// Most entries of each list of a container's surroundings.
pub const MAX_SURROUNDINGS: usize = 1024;
/// Most entries of one [`crate::Put`].
pub const MAX_PUT_ENTRIES: usize = 4096;
