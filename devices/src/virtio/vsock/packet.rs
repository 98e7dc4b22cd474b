//! The header of a vsock packet (VIRTIO 1.2 §5.10.6): 44 little-endian bytes, then the payload.

use crate::chain::Cursor;
use crate::error::ChainError;

/// Bytes of a header.
pub(super) const HEADER_SIZE: u32 = 44;
/// Most payload of one packet, either way.
pub(super) const MAX_PAYLOAD: u32 = 64 * 1024;
/// The host's context id.
pub(super) const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM`, the only socket type served.
pub(super) const STREAM: u16 = 1;

/// The sender will not receive any more (`VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`).
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender will not send any more (`VIRTIO_VSOCK_SHUTDOWN_F_SEND`).
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub(super) const SHUTDOWN_BOTH: u32 = 3;

/// What a packet asks for (§5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Open a connection.
    Request,
    /// It is open.
    Response,
    /// It is gone.
    Reset,
    /// One or both directions end.
    Shutdown,
    /// Payload.
    ReadWrite,
    /// Here is my buffer space.
    CreditUpdate,
    /// Tell me your buffer space.
    CreditRequest,
}

impl Op {
    fn from_wire(value: u16) -> Option<Self> {
        Some(match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    fn to_wire(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::ReadWrite => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// What names a connection: the port on this side and the port in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The host's port.
    pub(super) local: u32,
    /// The guest's port.
    pub(super) peer: u32,
}

/// A header, in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) source_cid: u64,
    pub(super) destination_cid: u64,
    pub(super) source_port: u32,
    pub(super) destination_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    /// `None`: a number that means nothing.
    pub(super) op: Option<Op>,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Copies a header out of the guest, once; the cursor then stands at the payload.
    pub(super) fn read(from: &mut Cursor<'_>) -> Result<Self, ChainError> {
        let mut bytes = [0; HEADER_SIZE as usize];
        from.read(&mut bytes)?;
        Ok(Self::from_wire(&bytes))
    }

    /// Writes the header into the guest.
    pub(super) fn write(&self, to: &mut Cursor<'_>) -> Result<(), ChainError> {
        to.write(&self.to_wire())
    }

    /// The connection this header from the guest speaks of.
    pub(super) fn key(&self) -> Key {
        Key { local: self.destination_port, peer: self.source_port }
    }

    pub(super) fn from_wire(bytes: &[u8; HEADER_SIZE as usize]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            source_cid: u64::from_le_bytes(take(&mut rest)),
            destination_cid: u64::from_le_bytes(take(&mut rest)),
            source_port: u32::from_le_bytes(take(&mut rest)),
            destination_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: Op::from_wire(u16::from_le_bytes(take(&mut rest))),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub(super) fn to_wire(self) -> [u8; HEADER_SIZE as usize] {
        let mut bytes = [0; HEADER_SIZE as usize];
        let mut rest = bytes.as_mut_slice();
        put(&mut rest, self.source_cid.to_le_bytes());
        put(&mut rest, self.destination_cid.to_le_bytes());
        put(&mut rest, self.source_port.to_le_bytes());
        put(&mut rest, self.destination_port.to_le_bytes());
        put(&mut rest, self.len.to_le_bytes());
        put(&mut rest, self.kind.to_le_bytes());
        put(&mut rest, self.op.map_or(0, Op::to_wire).to_le_bytes());
        put(&mut rest, self.flags.to_le_bytes());
        put(&mut rest, self.buf_alloc.to_le_bytes());
        put(&mut rest, self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// The next `N` bytes of a slice that has them (callers take the fixed sizes of a fixed array).
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let Some((first, after)) = rest.split_first_chunk::<N>() else { return [0; N] };
    *rest = after;
    *first
}

/// Puts `N` bytes in front of a slice that has room for them, and moves past them.
fn put<const N: usize>(rest: &mut &mut [u8], value: [u8; N]) {
    if let Some((first, after)) = std::mem::take(rest).split_first_chunk_mut::<N>() {
        *first = value;
        *rest = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let header = Header {
            source_cid: 0x0102_0304_0506_0708,
            destination_cid: HOST_CID,
            source_port: 0x1112_1314,
            destination_port: 0x2122_2324,
            len: 0x3132_3334,
            kind: STREAM,
            op: Some(Op::ReadWrite),
            flags: 0x4142_4344,
            buf_alloc: 0x5152_5354,
            fwd_cnt: 0x6162_6364,
        };
        let bytes = header.to_wire();
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[8..16], [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..20], [0x14, 0x13, 0x12, 0x11]);
        assert_eq!(bytes[20..24], [0x24, 0x23, 0x22, 0x21]);
        assert_eq!(bytes[24..28], [0x34, 0x33, 0x32, 0x31]);
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
        assert_eq!(bytes[32..36], [0x44, 0x43, 0x42, 0x41]);
        assert_eq!(bytes[36..40], [0x54, 0x53, 0x52, 0x51]);
        assert_eq!(bytes[40..], [0x64, 0x63, 0x62, 0x61]);
    }

    proptest! {
        #[test]
        fn any_44_bytes_are_a_header_and_known_ops_come_back_as_they_were(bytes: [u8; 44]) {
            let header = Header::from_wire(&bytes);
            let mut again = header.to_wire();
            if header.op.is_none() {
                again[30..32].copy_from_slice(&bytes[30..32]);
            }
            prop_assert_eq!(again, bytes);
        }
    }
}
