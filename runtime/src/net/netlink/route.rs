//! Routes.

use std::net::IpAddr;

use mvm_protocol::Address;

use super::message::{Message, attributes, ip, number};

/// Bytes of `struct rtmsg`.
const HEADER: usize = 12;
/// Bytes of `struct rtnexthop`.
const HOP_HEADER: usize = 8;
/// The gateway is on the link (linux/rtnetlink.h).
const RTNH_F_ONLINK: u32 = 4;

/// A unicast route of the main table as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::net) struct RouteEntry {
    /// The link it leads through.
    pub(in crate::net) index: u32,
    /// `None` is the default route.
    pub(in crate::net) destination: Option<Address>,
    pub(in crate::net) gateway: Option<IpAddr>,
    pub(in crate::net) metric: u32,
    pub(in crate::net) on_link: bool,
    pub(in crate::net) ipv4: bool,
    /// The kernel made it from an address.
    pub(in crate::net) from_address: bool,
}

impl RouteEntry {
    pub(in crate::net) fn parse(payload: &[u8]) -> Option<Self> {
        let &[family, prefix, _, _, table, protocol, _, kind, ..] = payload else { return None };
        if table != libc::RT_TABLE_MAIN || kind != libc::RTN_UNICAST {
            return None;
        }
        let mut route = Self {
            index: 0,
            destination: None,
            gateway: None,
            metric: 0,
            on_link: number(payload.get(8..)?)? & RTNH_F_ONLINK != 0,
            ipv4: i32::from(family) == libc::AF_INET,
            from_address: protocol == libc::RTPROT_KERNEL,
        };
        for (kind, value) in attributes(payload.get(HEADER..)?) {
            match kind {
                libc::RTA_DST if prefix > 0 => {
                    route.destination = Some(Address { ip: ip(value)?, prefix });
                }
                libc::RTA_GATEWAY => route.gateway = ip(value),
                libc::RTA_OIF => route.index = number(value)?,
                libc::RTA_PRIORITY => route.metric = number(value)?,
                libc::RTA_MULTIPATH => route.take_first_hop(value)?,
                // A gateway of the other family, which the guest is not told about.
                libc::RTA_VIA => return None,
                _ => {}
            }
        }
        Some(route)
    }

    /// Of several next hops a guest gets the first: it has one way out as good as the others.
    fn take_first_hop(&mut self, hops: &[u8]) -> Option<()> {
        let length = usize::from(u16::from_ne_bytes(*hops.first_chunk()?));
        let hop = hops.get(..length)?;
        self.on_link = u32::from(*hop.get(2)?) & RTNH_F_ONLINK != 0;
        self.index = number(hop.get(4..)?)?;
        for (kind, value) in attributes(hop.get(HOP_HEADER..)?) {
            if kind == libc::RTA_GATEWAY {
                self.gateway = ip(value);
            }
        }
        Some(())
    }
}

impl Message {
    /// All routes of both families.
    pub(in crate::net) fn routes() -> Self {
        Self::new(libc::RTM_GETROUTE, &[&[0; HEADER]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(prefix: u8, table: u8, kind: u8) -> [u8; HEADER] {
        [2, prefix, 0, 0, table, 3, 0, kind, 4, 0, 0, 0]
    }

    #[test]
    fn a_default_route_through_a_gateway_on_the_link_is_read() {
        let message = Message::new(0, &[&header(0, libc::RT_TABLE_MAIN, libc::RTN_UNICAST)])
            .address(libc::RTA_GATEWAY, "169.254.1.1".parse().unwrap())
            .attribute(libc::RTA_OIF, &5u32.to_ne_bytes())
            .attribute(libc::RTA_PRIORITY, &7u32.to_ne_bytes());
        let route = RouteEntry::parse(&message.finish(1)[16..]).unwrap();
        assert_eq!((route.index, route.destination, route.metric, route.on_link), (5, None, 7, true));
        assert_eq!(route.gateway, "169.254.1.1".parse().ok());
    }

    #[test]
    fn of_several_next_hops_the_first_is_taken() {
        let hop = |index: u8, last: u8| [16, 0, 0, 0, index, 0, 0, 0, 8, 0, 5, 0, 10, 0, 0, last];
        let message = Message::new(0, &[&header(8, libc::RT_TABLE_MAIN, libc::RTN_UNICAST)])
            .address(libc::RTA_DST, "11.0.0.0".parse().unwrap())
            .attribute(libc::RTA_MULTIPATH, &[hop(3, 1), hop(4, 2)].concat());
        let route = RouteEntry::parse(&message.finish(1)[16..]).unwrap();
        assert_eq!((route.index, route.gateway, route.on_link), (3, "10.0.0.1".parse().ok(), false));
    }

    #[test]
    fn other_tables_and_kinds_are_passed_over() {
        for fixed in [header(0, 255, libc::RTN_UNICAST), header(0, libc::RT_TABLE_MAIN, libc::RTN_BLACKHOLE)]
        {
            assert_eq!(RouteEntry::parse(&Message::new(0, &[&fixed]).finish(1)[16..]), None);
        }
    }
}
