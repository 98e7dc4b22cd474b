//! IPv4 networks of bridges.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use mvm_protocol::Address;

/// An IPv4 network with room for the host and a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    network: u32,
    prefix: u8,
}

/// Text that is no such network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a subnet: an IPv4 network such as 10.213.0.0/20, its prefix from 8 to 29")]
pub struct NotASubnet(String);

impl Subnet {
    /// The network that the host's address on a bridge lies in.
    pub(super) fn around(address: Address) -> Option<Self> {
        let std::net::IpAddr::V4(ip) = address.ip else { return None };
        (8..=29).contains(&address.prefix).then(|| {
            let subnet = Self { network: 0, prefix: address.prefix };
            Self { network: ip.to_bits() & subnet.mask(), ..subnet }
        })
    }

    /// The whole of it.
    pub(super) fn address(self) -> Address {
        Address { ip: Ipv4Addr::from(self.network).into(), prefix: self.prefix }
    }

    /// The host's address, the guests' gateway: the first.
    pub(super) fn host(self) -> Address {
        Address { ip: self.host_ip().into(), prefix: self.prefix }
    }

    pub(super) fn host_ip(self) -> Ipv4Addr {
        self.network.saturating_add(1).into()
    }

    /// A guest's address with the network it lies in.
    pub(super) fn guest(self, ip: Ipv4Addr) -> Address {
        Address { ip: ip.into(), prefix: self.prefix }
    }

    /// Addresses for guests.
    pub(super) fn guests(self) -> impl Iterator<Item = Ipv4Addr> {
        let broadcast = self.network | !self.mask();
        (self.network.saturating_add(2)..broadcast).map(Ipv4Addr::from)
    }

    /// Whether any address lies in both. The default route's network is everyone's, and nobody's.
    pub(super) fn overlaps(self, other: Address) -> bool {
        let std::net::IpAddr::V4(ip) = other.ip else { return false };
        if other.prefix == 0 {
            return false;
        }
        let wider = Self { network: 0, prefix: self.prefix.min(other.prefix) }.mask();
        (self.network ^ ip.to_bits()) & wider == 0
    }

    fn mask(self) -> u32 {
        u32::MAX.checked_shl(32u32.saturating_sub(self.prefix.into())).unwrap_or(0)
    }
}

impl FromStr for Subnet {
    type Err = NotASubnet;

    fn from_str(text: &str) -> Result<Self, NotASubnet> {
        let wrong = || NotASubnet(text.to_owned());
        let (ip, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let ip: Ipv4Addr = ip.parse().map_err(|_| wrong())?;
        let prefix = prefix.parse().map_err(|_| wrong())?;
        let subnet = Self::around(Address { ip: ip.into(), prefix }).ok_or_else(wrong)?;
        if subnet.network == ip.to_bits() { Ok(subnet) } else { Err(wrong()) }
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.network), self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn the_host_is_first_and_guests_are_all_but_the_last() {
        let small = subnet("10.0.0.8/29");
        assert_eq!(small.host_ip(), Ipv4Addr::new(10, 0, 0, 9));
        let guests: Vec<_> = small.guests().map(|ip| ip.octets()[3]).collect();
        assert_eq!(guests, [10, 11, 12, 13, 14]);
        assert_eq!(Subnet::around(small.host()), Some(small));
        assert_eq!(small.to_string(), "10.0.0.8/29");
    }

    #[test]
    fn networks_overlap_if_one_holds_the_other() {
        let mine = subnet("10.213.128.0/20");
        let other = |ip: &str, prefix| Address { ip: ip.parse().unwrap(), prefix };
        for (address, expected) in [
            (other("10.0.0.0", 8), true),
            (other("10.213.130.7", 32), true),
            (other("10.213.128.0", 20), true),
            (other("10.213.144.0", 20), false),
            (other("0.0.0.0", 0), false),
            (other("fd00::", 8), false),
        ] {
            assert_eq!(mine.overlaps(address), expected, "{address:?}");
        }
    }

    #[test]
    fn networks_too_small_or_with_host_bits_are_refused() {
        for text in ["10.0.0.0/30", "10.0.0.0/7", "10.0.0.1/24", "10.0.0.0", "fd00::/64", "10.0.0.0/-1"] {
            assert!(text.parse::<Subnet>().is_err(), "{text}");
        }
    }
}
