//! A machine's network as the host sees it.

mod forward;
mod netlink;
mod netns;
mod nft;
mod scan;
mod tap;
#[cfg(test)]
mod tests;
mod twin;
mod watch;

pub use forward::{PortForward, forward_localhost};
pub use netns::Netns;
pub use nft::Transport;
pub use scan::{Link, Network, scan};
pub use tap::open_tap;
pub use twin::{SpareTap, Twin, remove_twin, twin};
pub use watch::{Watch, watch};

use std::fs::File;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use mvm_devices::virtio::net::MacAddress;
use mvm_protocol::Address;

/// What a machine's network interface is connected to.
#[derive(Clone, Debug)]
pub enum Net {
    /// No interface.
    None,
    /// A tap of this host, by name; made if it is not there.
    Tap(TapNet),
    /// A tap that is open, of any name space.
    Open(OpenTap),
}

/// An open tap and the card on it.
#[derive(Clone, Debug)]
pub struct OpenTap {
    /// The tap, with `IFF_VNET_HDR`.
    pub file: Arc<File>,
    /// The card's hardware address.
    pub mac: MacAddress,
    /// What the guest's driver is told of the MTU, in bytes.
    pub mtu: Option<u16>,
}

/// A tap and the guest's place on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapNet {
    /// Interface name on the host, at most 15 bytes.
    pub name: String,
    /// Hardware address of the guest's interface; made from the machine's name if it is not given.
    pub mac: Option<MacAddress>,
    /// Address the guest's interface gets, if the agent is to configure it.
    pub address: Option<Address>,
    /// Default gateway of the guest.
    pub gateway: Option<IpAddr>,
}

/// Text that names no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a network: none, or tap=NAME[,mac=MAC][,ip=ADDR/PREFIX][,gateway=ADDR]")]
pub struct NotANet(String);

impl FromStr for Net {
    type Err = NotANet;

    fn from_str(text: &str) -> Result<Self, NotANet> {
        let wrong = || NotANet(text.to_owned());
        if text == "none" {
            return Ok(Self::None);
        }
        let mut parts = text.split(',');
        let name = parts.next().and_then(|part| part.strip_prefix("tap=")).ok_or_else(wrong)?;
        let name_ok =
            !name.is_empty() && name.len() <= 15 && !name.contains(['/', ' ']) && name != "." && name != "..";
        if !name_ok {
            return Err(wrong());
        }
        let mut net = TapNet { name: name.to_owned(), mac: None, address: None, gateway: None };
        for part in parts {
            match part.split_once('=').ok_or_else(wrong)? {
                ("mac", value) => net.mac = Some(value.parse().map_err(|_| wrong())?),
                ("ip", value) => net.address = Some(parse_address(value).ok_or_else(wrong)?),
                ("gateway", value) => net.gateway = Some(value.parse().map_err(|_| wrong())?),
                _ => return Err(wrong()),
            }
        }
        Ok(Self::Tap(net))
    }
}

fn parse_address(text: &str) -> Option<Address> {
    let (ip, prefix) = text.split_once('/')?;
    let ip: IpAddr = ip.parse().ok()?;
    let prefix: u8 = prefix.parse().ok()?;
    let most = if ip.is_ipv4() { 32 } else { 128 };
    (prefix <= most).then_some(Address { ip, prefix })
}

/// A locally administered address that follows from the machine's name, so that it is the same next time.
pub fn mac_of(name: &str) -> MacAddress {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(name.as_bytes());
    let bytes = [0x02, digest[0], digest[1], digest[2], digest[3], digest[4]];
    MacAddress::new(bytes).expect("02 begins a unicast address")
}

#[cfg(test)]
mod text_tests {
    use super::*;

    #[test]
    fn a_tap_is_parsed_with_everything_it_may_have() {
        let net: Net = "tap=t0,mac=02:00:00:00:00:0a,ip=10.0.0.2/24,gateway=10.0.0.1".parse().unwrap();
        let Net::Tap(tap) = net else { panic!("not a tap") };
        assert_eq!(tap.name, "t0");
        assert_eq!(tap.mac.unwrap().bytes(), [2, 0, 0, 0, 0, 10]);
        assert_eq!(tap.address.unwrap().prefix, 24);
        assert_eq!(tap.gateway.unwrap().to_string(), "10.0.0.1");
    }

    #[test]
    fn nonsense_is_refused_with_what_would_do() {
        for text in
            ["", "tap", "tap=", "tap=a/b", "tap=t0,mac=1", "tap=t0,ip=10.0.0.1/33", "tap=t0,mac=01:0:0:0:0:0"]
        {
            let error = text.parse::<Net>().unwrap_err().to_string();
            assert!(error.contains("tap=NAME"), "{text}: {error}");
        }
    }

    #[test]
    fn a_name_always_gives_the_same_unicast_local_address() {
        assert_eq!(mac_of("otter"), mac_of("otter"));
        assert_ne!(mac_of("otter"), mac_of("badger"));
        assert_eq!(mac_of("otter").bytes()[0], 2);
    }
}
