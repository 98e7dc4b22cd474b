//! What guest and host agree on for round trips and streams.

/// Round trips that are timed; one goes before them.
pub const ROUND_TRIPS: usize = 500;
/// Bytes of a round trip's message.
pub const MESSAGE: usize = 64;
/// Bytes of a stream.
pub const STREAM: usize = 16 << 20;
