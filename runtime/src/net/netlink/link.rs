//! Links: listing, bringing up, removing.

use super::message::{Message, attributes, number, text};

/// Bytes of `struct ifinfomsg`.
const HEADER: usize = 16;
/// How IPv6 addresses of a link come about, and that none does (linux/if_link.h).
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_NONE: u8 = 1;
/// The other end of a pair, a header and attributes of its own (linux/veth.h).
const VETH_INFO_PEER: u16 = 1;
const UP: i32 = libc::IFF_UP;

/// A link as the kernel lists it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::net) struct LinkEntry {
    pub(in crate::net) index: u32,
    pub(in crate::net) name: String,
    /// Which driver's, such as `veth`, `tun`; empty for a real card.
    pub(in crate::net) kind: String,
    pub(in crate::net) mac: Vec<u8>,
    pub(in crate::net) mtu: u32,
    pub(in crate::net) up: bool,
    pub(in crate::net) ethernet: bool,
}

impl LinkEntry {
    pub(in crate::net) fn parse(payload: &[u8]) -> Option<Self> {
        let hardware = u16::from_ne_bytes(*payload.get(2..)?.first_chunk()?);
        let flags = number(payload.get(8..)?)?;
        let mut link = Self {
            index: number(payload.get(4..)?)?,
            up: flags & libc::IFF_UP.cast_unsigned() != 0,
            ethernet: hardware == libc::ARPHRD_ETHER && flags & libc::IFF_LOOPBACK.cast_unsigned() == 0,
            ..Self::default()
        };
        for (kind, value) in attributes(payload.get(HEADER..)?) {
            match kind {
                libc::IFLA_IFNAME => link.name = text(value),
                libc::IFLA_ADDRESS => link.mac = value.to_vec(),
                libc::IFLA_MTU => link.mtu = number(value)?,
                libc::IFLA_LINKINFO => {
                    let driver = attributes(value).find(|(kind, _)| *kind == libc::IFLA_INFO_KIND);
                    link.kind = driver.map(|(_, name)| text(name)).unwrap_or_default();
                }
                _ => {}
            }
        }
        Some(link)
    }
}

impl Message {
    /// All links.
    pub(in crate::net) fn links() -> Self {
        Self::new(libc::RTM_GETLINK, &[&header(0, 0)])
    }

    /// Links of one driver. A kernel that does not know it lists all.
    pub(in crate::net) fn links_of(kind: &str) -> Self {
        Self::links().nest(libc::IFLA_LINKINFO, |info| info.text(libc::IFLA_INFO_KIND, kind))
    }

    /// One link.
    pub(in crate::net) fn link(index: u32) -> Self {
        Self::new(libc::RTM_GETLINK, &[&header(index, 0)])
    }

    /// Sets a link's largest packet in bytes and brings it up.
    pub(in crate::net) fn raise(index: u32, mtu: Option<u32>) -> Self {
        let message = Self::new(libc::RTM_NEWLINK, &[&header(index, UP)]);
        match mtu {
            Some(mtu) => message.attribute(libc::IFLA_MTU, &mtu.to_ne_bytes()),
            None => message,
        }
    }

    /// Keeps the kernel from giving the link IPv6 addresses and from talking on it by itself.
    pub(in crate::net) fn without_ipv6(index: u32) -> Self {
        let family = u16::try_from(libc::AF_INET6).unwrap_or_default();
        Self::new(libc::RTM_NEWLINK, &[&header(index, 0)]).nest(libc::IFLA_AF_SPEC, |spec| {
            spec.nest(family, |ipv6| ipv6.attribute(IFLA_INET6_ADDR_GEN_MODE, &[ADDR_GEN_NONE]))
        })
    }

    /// Keeps the host from answering ARP on a link, and from asking.
    pub(in crate::net) fn without_arp(index: u32) -> Self {
        Self::new(libc::RTM_NEWLINK, &[&header(index, libc::IFF_NOARP)])
    }

    /// Gives a link another hardware address.
    pub(in crate::net) fn set_mac(index: u32, mac: [u8; 6]) -> Self {
        Self::new(libc::RTM_NEWLINK, &[&header(index, 0)]).attribute(libc::IFLA_ADDRESS, &mac)
    }

    /// Makes a bridge.
    pub(in crate::net) fn new_bridge(name: &str, mac: [u8; 6]) -> Self {
        Self::new(libc::RTM_NEWLINK, &[&header(0, 0)])
            .create()
            .text(libc::IFLA_IFNAME, name)
            .attribute(libc::IFLA_ADDRESS, &mac)
            .nest(libc::IFLA_LINKINFO, |info| info.attribute(libc::IFLA_INFO_KIND, b"bridge"))
    }

    /// Makes two links of which each receives what the other sends.
    pub(in crate::net) fn new_pair(one: &str, other: &str) -> Self {
        let peer = |data: Self| {
            data.nest(VETH_INFO_PEER, |peer| peer.fixed(&header(0, 0)).text(libc::IFLA_IFNAME, other))
        };
        Self::new(libc::RTM_NEWLINK, &[&header(0, 0)])
            .create()
            .text(libc::IFLA_IFNAME, one)
            .nest(libc::IFLA_LINKINFO, |info| {
                info.attribute(libc::IFLA_INFO_KIND, b"veth").nest(libc::IFLA_INFO_DATA, peer)
            })
    }

    /// Makes a link a port of a bridge.
    pub(in crate::net) fn set_bridge(index: u32, bridge: u32) -> Self {
        Self::new(libc::RTM_NEWLINK, &[&header(index, 0)]).attribute(libc::IFLA_MASTER, &bridge.to_ne_bytes())
    }

    /// Removes a link.
    pub(in crate::net) fn remove_link(index: u32) -> Self {
        Self::new(libc::RTM_DELLINK, &[&header(index, 0)])
    }
}

/// `struct ifinfomsg`: family, pad, type, index, flags that are set, mask of those.
fn header(index: u32, flags: i32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..].copy_from_slice(&flags.to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_read_from_its_attributes_whatever_else_is_there() {
        let mut fixed = header(7, UP);
        fixed[2] = 1;
        let message = Message::new(0, &[&fixed])
            .attribute(99, b"odd")
            .text(libc::IFLA_IFNAME, "eth0")
            .attribute(libc::IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1])
            .attribute(libc::IFLA_MTU, &1400u32.to_ne_bytes())
            .nest(libc::IFLA_LINKINFO, |info| info.text(libc::IFLA_INFO_KIND, "veth"));
        let link = LinkEntry {
            index: 7,
            name: "eth0".into(),
            kind: "veth".into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 1400,
            up: true,
            ethernet: true,
        };
        assert_eq!(LinkEntry::parse(&message.finish(1)[16..]), Some(link));
        assert_eq!(LinkEntry::parse(&[0; 8]), None);
    }
}
