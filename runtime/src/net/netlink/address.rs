//! Addresses of links, and neighbours.

use std::net::IpAddr;

use mvm_protocol::Address;

use super::message::{Message, attributes, ip, number};

/// Bytes of `struct ifaddrmsg`.
const ADDRESS_HEADER: usize = 8;
/// Bytes of `struct ndmsg`.
const NEIGHBOUR_HEADER: usize = 12;
/// An address's flags as 32 bits (linux/if_addr.h).
const IFA_FLAGS: u16 = 8;

/// An address as the kernel lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::net) struct AddressEntry {
    /// The link it is on.
    pub(in crate::net) index: u32,
    pub(in crate::net) address: Address,
    /// The address at the other end, of which the prefix speaks then.
    pub(in crate::net) peer: Option<IpAddr>,
    /// `RT_SCOPE_*`.
    pub(in crate::net) scope: u8,
    /// Made up by the kernel for a while.
    pub(in crate::net) temporary: bool,
}

impl AddressEntry {
    pub(in crate::net) fn parse(payload: &[u8]) -> Option<Self> {
        let &[_, prefix, flags, scope, ..] = payload else { return None };
        let index = number(payload.get(4..)?)?;
        let (mut local, mut address, mut flags) = (None, None, u32::from(flags));
        for (kind, value) in attributes(payload.get(ADDRESS_HEADER..)?) {
            match kind {
                libc::IFA_LOCAL => local = ip(value),
                libc::IFA_ADDRESS => address = ip(value),
                IFA_FLAGS => flags = number(value)?,
                _ => {}
            }
        }
        let own = local.or(address)?;
        Some(Self {
            index,
            address: Address { ip: own, prefix },
            peer: address.filter(|peer| *peer != own),
            scope,
            temporary: own.is_ipv6() && flags & libc::IFA_F_TEMPORARY != 0,
        })
    }
}

/// A neighbour as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::net) struct NeighbourEntry {
    /// The link it is on.
    pub(in crate::net) index: u32,
    pub(in crate::net) ip: IpAddr,
    pub(in crate::net) mac: [u8; 6],
}

impl NeighbourEntry {
    /// A permanent neighbour; others are none.
    pub(in crate::net) fn parse(payload: &[u8]) -> Option<Self> {
        let index = number(payload.get(4..)?)?;
        let state = u16::from_ne_bytes(*payload.get(8..)?.first_chunk()?);
        if state & libc::NUD_PERMANENT == 0 {
            return None;
        }
        let list = || attributes(payload.get(NEIGHBOUR_HEADER..).unwrap_or_default());
        let value = |wanted| list().find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
        let mac = <[u8; 6]>::try_from(value(libc::NDA_LLADDR)?).ok()?;
        Some(Self { index, ip: ip(value(libc::NDA_DST)?)?, mac })
    }
}

impl Message {
    /// All addresses of both families.
    pub(in crate::net) fn addresses() -> Self {
        Self::new(libc::RTM_GETADDR, &[&[0; ADDRESS_HEADER]])
    }

    /// All neighbours of both families.
    pub(in crate::net) fn neighbours() -> Self {
        Self::new(libc::RTM_GETNEIGH, &[&[0; NEIGHBOUR_HEADER]])
    }

    /// Gives a link an address.
    pub(in crate::net) fn add_address(index: u32, address: Address) -> Self {
        let header = [family(address.ip), address.prefix, 0, 0];
        Self::new(libc::RTM_NEWADDR, &[&header, &index.to_ne_bytes()])
            .create()
            .address(libc::IFA_LOCAL, address.ip)
            .address(libc::IFA_ADDRESS, address.ip)
    }
}

fn family(ip: IpAddr) -> u8 {
    let family = if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    u8::try_from(family).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(prefix: u8, attributes: &[(u16, &str)]) -> Option<AddressEntry> {
        let mut message = Message::new(0, &[&[2, prefix, 0, 0, 9, 0, 0, 0]]);
        for (kind, text) in attributes {
            message = message.address(*kind, text.parse().unwrap());
        }
        AddressEntry::parse(&message.finish(1)[16..])
    }

    #[test]
    fn a_peer_is_told_from_the_own_address() {
        let plain = entry(24, &[(libc::IFA_ADDRESS, "10.0.0.2"), (libc::IFA_LOCAL, "10.0.0.2")]).unwrap();
        assert_eq!((plain.address.ip.to_string(), plain.peer), ("10.0.0.2".to_owned(), None));
        let point = entry(32, &[(libc::IFA_ADDRESS, "10.0.0.1"), (libc::IFA_LOCAL, "10.0.0.2")]).unwrap();
        assert_eq!(
            (point.address.ip.to_string(), point.peer),
            ("10.0.0.2".to_owned(), "10.0.0.1".parse().ok())
        );
        let six = entry(64, &[(libc::IFA_ADDRESS, "fd00::2")]).unwrap();
        assert_eq!((six.index, six.address.prefix, six.peer), (9, 64, None));
        assert_eq!(entry(24, &[]), None);
    }

    #[test]
    fn only_permanent_neighbours_with_an_ethernet_address_count() {
        let entry = |state: u16| {
            let message =
                Message::new(0, &[&[2, 0, 0, 0], &3u32.to_ne_bytes(), &state.to_ne_bytes(), &[0, 0]])
                    .address(libc::NDA_DST, "169.254.1.1".parse().unwrap())
                    .attribute(libc::NDA_LLADDR, &[0xee; 6]);
            NeighbourEntry::parse(&message.finish(1)[16..])
        };
        assert_eq!(
            entry(libc::NUD_PERMANENT),
            Some(NeighbourEntry { index: 3, ip: "169.254.1.1".parse().unwrap(), mac: [0xee; 6] })
        );
        assert_eq!(entry(libc::NUD_REACHABLE), None);
    }
}
