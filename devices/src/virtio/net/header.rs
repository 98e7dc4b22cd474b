//! The header before each frame (VIRTIO 1.2 §5.1.6): what may pass, in either direction.
//!
//! The host's kernel acts on this header, so what goes to it is always rebuilt from a checked copy.

use virtio_bindings::virtio_net as abi;

/// Bytes of the header, `num_buffers` included.
pub(crate) const HEADER: usize = 12;
/// [`HEADER`] as a cursor counts.
pub(crate) const HEADER_BYTES: u32 = 12;
/// Bytes of an Ethernet header, the least a frame can have.
pub(crate) const ETHERNET: usize = 14;
pub(crate) const MIN_FRAME: u32 = 14;
/// Most bytes of a frame: an Ethernet header and what an IP packet can hold at most.
pub(crate) const MAX_FRAME: u32 = 65_550;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const GSO_UDP: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// `struct virtio_net_hdr`, copied out of where it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) flags: u8,
    pub(crate) gso_type: u8,
    pub(crate) hdr_len: u16,
    pub(crate) gso_size: u16,
    pub(crate) csum_start: u16,
    pub(crate) csum_offset: u16,
    pub(crate) num_buffers: u16,
}

/// The frame cannot be passed on: its header says what was not agreed, or what cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unsound;

impl Header {
    pub(crate) fn parse(bytes: [u8; HEADER]) -> Self {
        let [flags, gso_type, h0, h1, s0, s1, c0, c1, o0, o1, n0, n1] = bytes;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([s0, s1]),
            csum_start: u16::from_le_bytes([c0, c1]),
            csum_offset: u16::from_le_bytes([o0, o1]),
            num_buffers: u16::from_le_bytes([n0, n1]),
        }
    }

    pub(crate) fn bytes(self) -> [u8; HEADER] {
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [s0, s1] = self.gso_size.to_le_bytes();
        let [c0, c1] = self.csum_start.to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        let [n0, n1] = self.num_buffers.to_le_bytes();
        [self.flags, self.gso_type, h0, h1, s0, s1, c0, c1, o0, o1, n0, n1]
    }

    /// The header of a frame of `len` bytes from the driver, fit for the host's kernel.
    pub(crate) fn for_host(self, len: u32, agreed: Agreed) -> Result<Self, Unsound> {
        self.pass(len, agreed.host, NEEDS_CSUM)
    }

    /// The header of a frame of `len` bytes from the host, fit for the driver. The buffers are yet to be
    /// counted.
    pub(crate) fn for_driver(self, len: u32, agreed: Agreed) -> Result<Self, Unsound> {
        let known = if agreed.guest.csum { NEEDS_CSUM | DATA_VALID } else { NEEDS_CSUM };
        self.pass(len, agreed.guest, known)
    }

    fn pass(self, len: u32, offloads: Offloads, known_flags: u8) -> Result<Self, Unsound> {
        let mut passed = Self { flags: self.flags & known_flags, ..Self::default() };
        if self.flags & NEEDS_CSUM != 0 {
            // The receiver writes a checksum there: it must be inside the frame.
            let end = u32::from(self.csum_start).saturating_add(self.csum_offset.into()).saturating_add(2);
            if !offloads.csum || end > len {
                return Err(Unsound);
            }
            passed.csum_start = self.csum_start;
            passed.csum_offset = self.csum_offset;
        }
        if self.gso_type == GSO_NONE {
            return Ok(passed);
        }
        if !offloads.allow(self.gso_type) || self.flags & NEEDS_CSUM == 0 || self.gso_size == 0 {
            return Err(Unsound);
        }
        passed.gso_type = self.gso_type;
        passed.gso_size = self.gso_size;
        // A hint that may be wrong (§5.1.6.2.2): without it, the kernel finds the headers' end itself.
        passed.hdr_len = if u32::from(self.hdr_len) <= len { self.hdr_len } else { 0 };
        Ok(passed)
    }
}

/// Work one side may leave to the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offloads {
    pub(crate) csum: bool,
    pub(crate) tso4: bool,
    pub(crate) tso6: bool,
    pub(crate) ecn: bool,
    pub(crate) uso: bool,
}

impl Offloads {
    fn allow(self, gso_type: u8) -> bool {
        match gso_type & !GSO_ECN {
            GSO_TCP4 => self.tso4 && (self.ecn || gso_type & GSO_ECN == 0),
            GSO_TCP6 => self.tso6 && (self.ecn || gso_type & GSO_ECN == 0),
            GSO_UDP => self.uso && gso_type & GSO_ECN == 0,
            _ => false,
        }
    }

    /// Large frames and checksums come together, and explicit congestion with large TCP frames (§5.1.3.1).
    fn are_whole(self) -> bool {
        let tso = self.tso4 || self.tso6;
        (self.csum || !(tso || self.uso)) && (tso || !self.ecn)
    }
}

/// What driver and device agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Agreed {
    /// What the driver may leave to the host.
    pub(crate) host: Offloads,
    /// What the host may leave to the driver.
    pub(crate) guest: Offloads,
    /// A frame may span several receive buffers.
    pub(crate) merge: bool,
    /// The driver was told the link's MTU.
    pub(crate) mtu: bool,
}

impl Agreed {
    pub(crate) fn from_features(features: u64) -> Self {
        let has = |feature| features & bit(feature) != 0;
        Self {
            host: Offloads {
                csum: has(abi::VIRTIO_NET_F_CSUM),
                tso4: has(abi::VIRTIO_NET_F_HOST_TSO4),
                tso6: has(abi::VIRTIO_NET_F_HOST_TSO6),
                ecn: has(abi::VIRTIO_NET_F_HOST_ECN),
                uso: has(abi::VIRTIO_NET_F_HOST_USO),
            },
            guest: Offloads {
                csum: has(abi::VIRTIO_NET_F_GUEST_CSUM),
                tso4: has(abi::VIRTIO_NET_F_GUEST_TSO4),
                tso6: has(abi::VIRTIO_NET_F_GUEST_TSO6),
                ecn: has(abi::VIRTIO_NET_F_GUEST_ECN),
                // The host has one switch each for v4 and v6; a driver that takes only one gets neither.
                uso: has(abi::VIRTIO_NET_F_GUEST_USO4) && has(abi::VIRTIO_NET_F_GUEST_USO6),
            },
            merge: has(abi::VIRTIO_NET_F_MRG_RXBUF),
            mtu: has(abi::VIRTIO_NET_F_MTU),
        }
    }

    /// Whether every feature came with those it needs (§5.1.3.1).
    pub(crate) fn is_consistent(self) -> bool {
        self.host.are_whole() && self.guest.are_whole()
    }
}

/// The mask of a feature by its number.
pub(crate) fn bit(feature: u32) -> u64 {
    1u64.checked_shl(feature).unwrap_or(0)
}

/// Bytes of the link-level header of a frame that starts with `front`: a VLAN tag makes it longer.
pub(crate) fn link_header(front: [u8; ETHERNET]) -> u32 {
    let [.., kind0, kind1] = front;
    match u16::from_be_bytes([kind0, kind1]) {
        0x8100 | 0x88a8 => MIN_FRAME.saturating_add(4),
        _ => MIN_FRAME,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn offloads() -> impl Strategy<Value = Offloads> {
        any::<[bool; 5]>().prop_map(|[csum, tso4, tso6, ecn, uso]| Offloads { csum, tso4, tso6, ecn, uso })
    }

    fn headers() -> impl Strategy<Value = Header> {
        let field = || prop_oneof![Just(0), Just(u16::MAX), 0..200u16, any::<u16>()];
        let kind = prop_oneof![Just(0), Just(1), Just(4), Just(5), Just(0x81), any::<u8>()];
        (any::<u8>(), kind, field(), field(), field(), field()).prop_map(
            |(flags, gso_type, hdr_len, gso_size, csum_start, csum_offset)| Header {
                flags,
                gso_type,
                hdr_len,
                gso_size,
                csum_start,
                csum_offset,
                num_buffers: 7,
            },
        )
    }

    proptest! {
        #[test]
        fn a_header_that_passes_says_only_what_was_agreed_and_what_can_be(
            header in headers(), len in 14..300u32, host in offloads(), guest in offloads(),
        ) {
            let agreed = Agreed { host, guest, merge: true, mtu: false };
            for (passed, offloads) in
                [(header.for_host(len, agreed), host), (header.for_driver(len, agreed), guest)]
            {
                let Ok(passed) = passed else { continue };
                prop_assert_eq!(passed.num_buffers, 0);
                prop_assert_eq!(passed.flags & !3, 0);
                prop_assert!(u32::from(passed.hdr_len) <= len);
                if passed.flags & 1 != 0 {
                    prop_assert!(offloads.csum);
                    prop_assert!(u32::from(passed.csum_start) + u32::from(passed.csum_offset) + 2 <= len);
                } else {
                    prop_assert_eq!((passed.csum_start, passed.csum_offset), (0, 0));
                }
                match passed.gso_type {
                    0 => prop_assert_eq!((passed.gso_size, passed.hdr_len), (0, 0)),
                    kind => {
                        prop_assert!(passed.flags & 1 != 0 && passed.gso_size > 0);
                        prop_assert!(kind & 0x80 == 0 || offloads.ecn);
                        let taken = match kind & 0x7f {
                            1 => offloads.tso4,
                            4 => offloads.tso6,
                            5 => offloads.uso,
                            _ => false,
                        };
                        prop_assert!(taken, "type {}", kind);
                    }
                }
            }
        }

        #[test]
        fn a_header_reads_back_as_it_was_written(header in headers()) {
            prop_assert_eq!(Header::parse(header.bytes()), header);
        }
    }

    #[test]
    fn fields_stand_where_the_specification_has_them() {
        let header = Header::parse([1, 4, 2, 0, 3, 0, 5, 0, 6, 0, 7, 1]);
        assert_eq!((header.flags, header.gso_type, header.hdr_len, header.gso_size), (1, 4, 2, 3));
        assert_eq!((header.csum_start, header.csum_offset, header.num_buffers), (5, 6, 0x107));
    }
}
