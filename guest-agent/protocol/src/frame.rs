//! Control frames: `u32` little-endian payload length, then one postcard message.

use serde::{Serialize, de::DeserializeOwned};

use crate::limits::MAX_FRAME;

/// Bytes of the length prefix.
pub const HEADER_LEN: usize = 4;

/// Why a message could not be put in a frame.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The message is larger than [`MAX_FRAME`].
    #[error("message of {0} bytes is larger than a frame")]
    TooLong(usize),
    /// The serializer refused it.
    #[error("cannot encode message")]
    Codec(#[source] postcard::Error),
}

/// Why the bytes of a peer are not frames. There is no way to resume: the connection must end.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The length prefix exceeds [`MAX_FRAME`].
    #[error("frame announces {0} bytes, more than is allowed")]
    TooLong(u32),
    /// The payload is not a message of the expected type, or there are bytes after it.
    #[error("frame does not hold a known message")]
    Malformed,
}

/// One message as a frame, ready to write.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, EncodeError> {
    let frame = postcard::to_extend(message, vec![0; HEADER_LEN]).map_err(EncodeError::Codec)?;
    let payload = frame.len().saturating_sub(HEADER_LEN);
    if payload > MAX_FRAME {
        return Err(EncodeError::TooLong(payload));
    }
    let length = u32::try_from(payload).map_err(|_| EncodeError::TooLong(payload))?;
    let mut frame = frame;
    for (to, from) in frame.iter_mut().zip(length.to_le_bytes()) {
        *to = from;
    }
    Ok(frame)
}

/// Cuts a byte stream into messages, however the bytes were split on the way.
///
/// Holds what was pushed and not yet taken: take all messages after each push and it never exceeds one
/// frame plus one push.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// Bytes at the front that belong to frames already taken; dropped by the next push.
    taken: usize,
}

impl Decoder {
    /// Room that is kept between messages; a larger buffer is given back once it is empty.
    const KEEP: usize = 16 * 1024;

    /// A decoder at the start of a connection.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes as they came from the peer.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.taken.min(self.bytes.len()));
        self.taken = 0;
        if self.bytes.is_empty() && self.bytes.capacity() > Self::KEEP {
            self.bytes = Vec::new();
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The payload of the next complete frame; `None` when more bytes are needed.
    pub fn next_payload(&mut self) -> Result<Option<&[u8]>, DecodeError> {
        let rest = self.bytes.get(self.taken..).unwrap_or_default();
        let Some((prefix, rest)) = rest.split_first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let announced = u32::from_le_bytes(*prefix);
        let length = usize::try_from(announced).map_err(|_| DecodeError::TooLong(announced))?;
        if length > MAX_FRAME {
            return Err(DecodeError::TooLong(announced));
        }
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        self.taken = self.taken.saturating_add(HEADER_LEN).saturating_add(length);
        Ok(Some(payload))
    }

    /// The next message; `None` when more bytes are needed. After an error the connection is lost.
    pub fn next_message<T: DeserializeOwned>(&mut self) -> Result<Option<T>, DecodeError> {
        let Some(payload) = self.next_payload()? else {
            return Ok(None);
        };
        decode(payload).map(Some)
    }
}

/// The message that is the whole of this payload.
pub fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<T, DecodeError> {
    match postcard::take_from_bytes(payload) {
        Ok((message, [])) => Ok(message),
        _ => Err(DecodeError::Malformed),
    }
}
