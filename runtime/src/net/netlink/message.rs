//! The form of netlink messages: header, a fixed part by kind, attributes that may nest.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nix::errno::Errno;

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Bytes of `struct nlattr`.
const ATTRIBUTE: usize = 4;
/// The attribute holds attributes (linux/netlink.h).
const NESTED: u16 = 1 << 15;
/// What is left of an attribute's type without its flags.
const TYPE: u16 = 0x3fff;

/// One request under construction.
#[derive(Debug)]
pub(in crate::net) struct Message {
    bytes: Vec<u8>,
    flags: i32,
}

impl Message {
    /// A request of this kind with the parts of its fixed header.
    pub(in crate::net) fn new(kind: u16, fixed: &[&[u8]]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        fixed.iter().for_each(|part| bytes.extend_from_slice(part));
        Self { bytes, flags: libc::NLM_F_REQUEST }
    }

    /// Makes something that must not be there yet.
    pub(super) fn create(mut self) -> Self {
        self.flags |= libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        self
    }

    /// Makes something unless it is there.
    pub(in crate::net) fn create_or_keep(mut self) -> Self {
        self.flags |= libc::NLM_F_CREATE;
        self
    }

    /// Adds to the end of a list.
    pub(in crate::net) fn append(mut self) -> Self {
        self.flags |= libc::NLM_F_APPEND;
        self
    }

    /// Asks for an answer if it is done, not only if it fails.
    pub(in crate::net) fn acknowledged(mut self) -> Self {
        self.flags |= libc::NLM_F_ACK;
        self
    }

    /// Asks for IPv4's alone: all fixed headers begin with the family.
    pub(in crate::net) fn of_ipv4(mut self) -> Self {
        self.bytes[HEADER] = u8::try_from(libc::AF_INET).unwrap_or_default();
        self
    }

    pub(super) fn dump(mut self) -> Self {
        self.flags |= libc::NLM_F_DUMP;
        self
    }

    pub(in crate::net) fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len().saturating_add(ATTRIBUTE)).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// Bytes that are no attribute: a header within one.
    pub(super) fn fixed(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// A text with the NUL that ends it.
    pub(in crate::net) fn text(self, kind: u16, text: &str) -> Self {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    pub(super) fn address(self, kind: u16, ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => self.attribute(kind, &ip.octets()),
            IpAddr::V6(ip) => self.attribute(kind, &ip.octets()),
        }
    }

    /// An attribute that holds what `fill` adds.
    pub(in crate::net) fn nest(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self = fill(self.attribute(kind | NESTED, &[]));
        let length = u16::try_from(self.bytes.len().saturating_sub(start)).unwrap_or(u16::MAX);
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    pub(super) fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        let flags = u16::try_from(self.flags).unwrap_or_default();
        self.bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

/// What is read of a message's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: u16,
    pub(super) sequence: u32,
}

/// The first message of a datagram and what follows it.
pub(super) fn split(bytes: &[u8]) -> Option<(Header, &[u8], &[u8])> {
    let length = usize::try_from(number(bytes)?).ok()?;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let sequence = number(bytes.get(8..)?)?;
    let payload = bytes.get(HEADER..length)?;
    let next = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((Header { kind, sequence }, payload, next))
}

/// The kernel's verdict in the payload of an `NLMSG_ERROR`.
pub(super) fn acknowledgement(payload: &[u8]) -> nix::Result<()> {
    match payload.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
        Some(0) => Ok(()),
        Some(code) => Err(Errno::from_raw(code.saturating_neg())),
        None => Err(Errno::EIO),
    }
}

/// The attributes in `bytes`, type and value, as far as they are whole.
pub(in crate::net) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?);
        let value = bytes.get(ATTRIBUTE..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & TYPE, value))
    })
}

/// The number that `bytes` begin with.
pub(super) fn number(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

/// The text in an attribute.
pub(in crate::net) fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned()
}

/// The address in an attribute, by its length.
pub(super) fn ip(value: &[u8]) -> Option<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(value) {
        return Some(Ipv4Addr::from(bytes).into());
    }
    <[u8; 16]>::try_from(value).ok().map(|bytes| Ipv6Addr::from(bytes).into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_nest_counts_what_is_in_it_and_is_read_back() {
        let message = Message::new(1, &[&[0; 4]])
            .nest(2, |inner| inner.text(3, "u32").nest(4, |inner| inner.attribute(5, &[7; 5])))
            .attribute(6, &[1]);
        let bytes = message.finish(9);
        let (header, payload, next) = split(&bytes).unwrap();
        assert_eq!((header, next.len()), (Header { kind: 1, sequence: 9 }, 0));
        let outer: Vec<_> = attributes(&payload[4..]).collect();
        assert_eq!(outer.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [2, 6]);
        let inner: Vec<_> = attributes(outer[0].1).collect();
        assert_eq!((inner[0].0, text(inner[0].1).as_str(), inner[1].0), (3, "u32", 4));
        assert_eq!(attributes(inner[1].1).collect::<Vec<_>>(), [(5, &[7; 5][..])]);
    }

    #[test]
    fn a_verdict_is_the_kernels_error_number() {
        assert_eq!(acknowledgement(&0i32.to_ne_bytes()), Ok(()));
        assert_eq!(acknowledgement(&(-libc::EBUSY).to_ne_bytes()), Err(Errno::EBUSY));
        assert_eq!(acknowledgement(&[0]), Err(Errno::EIO));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(attributes(&bytes).count() <= bytes.len() / ATTRIBUTE);
            if let Some((_, payload, next)) = split(&bytes) {
                prop_assert!(payload.len() + next.len() < bytes.len());
            }
        }
    }
}
