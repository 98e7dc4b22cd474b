//! What the guest sends first on a stream connection: which stream it is.

use crate::Token;

/// Bytes of the header: magic (4), version (2), reserved zero (2), token (8), little-endian.
pub const STREAM_HEADER_LEN: usize = 16;

const MAGIC: [u8; 4] = *b"mvmS";
const VERSION: u16 = 1;

/// Opens a stream connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamHeader {
    /// The token the host gave in [`crate::Start`].
    pub token: Token,
}

/// Why a stream connection is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamHeaderError {
    /// Not a stream of ours.
    #[error("stream header has the wrong magic")]
    Magic,
    /// A stream of a later version.
    #[error("stream header has unknown version {0}")]
    Version(u16),
    /// Bytes that must be zero are not.
    #[error("stream header has reserved bits set")]
    Reserved,
}

impl StreamHeader {
    /// The header's bytes.
    pub fn encode(self) -> [u8; STREAM_HEADER_LEN] {
        let [m0, m1, m2, m3] = MAGIC;
        let [v0, v1] = VERSION.to_le_bytes();
        let [t0, t1, t2, t3, t4, t5, t6, t7] = self.token.0.to_le_bytes();
        [m0, m1, m2, m3, v0, v1, 0, 0, t0, t1, t2, t3, t4, t5, t6, t7]
    }

    /// The header in these bytes.
    pub fn decode(bytes: &[u8; STREAM_HEADER_LEN]) -> Result<Self, StreamHeaderError> {
        let [m0, m1, m2, m3, v0, v1, r0, r1, t0, t1, t2, t3, t4, t5, t6, t7] = *bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(StreamHeaderError::Magic);
        }
        let version = u16::from_le_bytes([v0, v1]);
        if version != VERSION {
            return Err(StreamHeaderError::Version(version));
        }
        if [r0, r1] != [0, 0] {
            return Err(StreamHeaderError::Reserved);
        }
        Ok(Self { token: Token(u64::from_le_bytes([t0, t1, t2, t3, t4, t5, t6, t7])) })
    }
}
