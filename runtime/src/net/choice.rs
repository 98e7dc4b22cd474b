//! Networks as people name them.

use std::fmt;
use std::fs::File;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use mvm_devices::virtio::net::MacAddress;
use mvm_protocol::Address;

use super::bridge::Subnet;

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

/// An open tap and the card on it.
#[derive(Clone, Debug)]
pub struct OpenTap {
    /// The tap, with `IFF_VNET_HDR`.
    pub file: Arc<File>,
    /// The card's hardware address.
    pub mac: MacAddress,
    /// What the guest's driver is told of the MTU, in bytes.
    pub mtu: Option<u16>,
    /// Drop what the guest sends from another hardware address.
    pub only_own_mac: bool,
}

/// What a container's machine is to be connected to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// Nothing.
    #[default]
    None,
    /// A bridge of ours, from which the host's network and what lies behind it is reached under the host's address.
    Nat(Option<Subnet>),
    /// A bridge of ours, from which nothing is reached but the host and the machines on it.
    HostOnly(Option<Subnet>),
    /// A bridge that is there; `TapNet::name` is the bridge's.
    Bridge(TapNet),
    /// The network name space at this path, whose links the machine takes over.
    Netns(PathBuf),
    /// A tap.
    Tap(TapNet),
}

/// Text that names no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a network: {forms}")]
pub struct NotANet {
    text: String,
    forms: &'static str,
}

const CARD: &str = "none, or tap=NAME[,mac=MAC][,ip=ADDR/PREFIX][,gateway=ADDR]";
const ANY: &str = "none, nat[:SUBNET], host-only[:SUBNET], bridge:NAME[,ip=ADDR/PREFIX][,gateway=ADDR][,mac=MAC], \
     netns:PATH, or tap=NAME[,ip=…][,gateway=…][,mac=…]";

impl FromStr for Net {
    type Err = NotANet;

    fn from_str(text: &str) -> Result<Self, NotANet> {
        let tap = match text.strip_prefix("tap=") {
            _ if text == "none" => return Ok(Self::None),
            rest => rest.and_then(on_link),
        };
        tap.map(Self::Tap).ok_or_else(|| NotANet { text: text.to_owned(), forms: CARD })
    }
}

impl FromStr for Choice {
    type Err = NotANet;

    fn from_str(text: &str) -> Result<Self, NotANet> {
        let wrong = || NotANet { text: text.to_owned(), forms: ANY };
        if let Some(tap) = text.strip_prefix("tap=") {
            return on_link(tap).map(Self::Tap).ok_or_else(wrong);
        }
        let (kind, rest) = text.split_once(':').map_or((text, None), |(kind, rest)| (kind, Some(rest)));
        let subnet = || rest.map(Subnet::from_str).transpose().map_err(|_| wrong());
        match (kind, rest) {
            ("none", None) => Ok(Self::None),
            ("nat", _) => subnet().map(Self::Nat),
            ("host-only", _) => subnet().map(Self::HostOnly),
            ("bridge", Some(rest)) => on_link(rest).map(Self::Bridge).ok_or_else(wrong),
            ("netns", Some(path)) if !path.is_empty() => Ok(Self::Netns(path.into())),
            _ => Err(wrong()),
        }
    }
}

/// As people write it, without its details.
impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Nat(_) => f.write_str("nat"),
            Self::HostOnly(_) => f.write_str("host-only"),
            Self::Bridge(net) => write!(f, "bridge:{}", net.name),
            Self::Netns(path) => write!(f, "netns:{}", path.display()),
            Self::Tap(net) => write!(f, "tap={}", net.name),
        }
    }
}

/// `NAME[,mac=MAC][,ip=ADDR/PREFIX][,gateway=ADDR]`
fn on_link(text: &str) -> Option<TapNet> {
    let mut parts = text.split(',');
    let name = parts.next().filter(|name| is_link_name(name))?;
    let mut net = TapNet { name: name.to_owned(), mac: None, address: None, gateway: None };
    for part in parts {
        match part.split_once('=')? {
            ("mac", value) => net.mac = Some(value.parse().ok()?),
            ("ip", value) => net.address = Some(parse_address(value)?),
            ("gateway", value) => net.gateway = Some(value.parse().ok()?),
            _ => return None,
        }
    }
    Some(net)
}

fn is_link_name(name: &str) -> bool {
    let fits = (1..libc::IFNAMSIZ).contains(&name.len());
    fits && !name.contains(['/', ' ', ':', '%']) && name != "." && name != ".."
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
mod tests {
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
        for text in [
            "",
            "tap",
            "tap=",
            "tap=a/b",
            "tap=t0,mac=1",
            "tap=t0,ip=10.0.0.1/33",
            "tap=t0,mac=01:0:0:0:0:0",
            "tap=mvm%d",
        ] {
            let error = text.parse::<Net>().unwrap_err().to_string();
            assert!(error.contains("tap=NAME"), "{text}: {error}");
            let error = text.parse::<Choice>().unwrap_err().to_string();
            assert!(error.contains("netns:PATH"), "{text}: {error}");
        }
        for text in
            ["none:", "nat:", "nat:10.0.0.0/33", "nat:10.0.0.0/30x", "bridge", "bridge:", "netns:", "host"]
        {
            assert!(text.parse::<Choice>().is_err(), "{text}");
        }
    }

    #[test]
    fn networks_of_every_kind_are_parsed() {
        let subnet = "10.9.0.0/24".parse().ok();
        for (text, choice) in [
            ("none", Choice::None),
            ("nat", Choice::Nat(None)),
            ("nat:10.9.0.0/24", Choice::Nat(subnet)),
            ("host-only:10.9.0.0/24", Choice::HostOnly(subnet)),
            ("netns:/run/netns/a:b", Choice::Netns("/run/netns/a:b".into())),
        ] {
            assert_eq!(text.parse::<Choice>().unwrap(), choice);
        }
        let Choice::Bridge(bridge) = "bridge:br0,ip=10.0.0.9/24".parse().unwrap() else { panic!() };
        assert_eq!((bridge.name.as_str(), bridge.address.is_some()), ("br0", true));
    }

    #[test]
    fn a_name_always_gives_the_same_unicast_local_address() {
        assert_eq!(mac_of("otter"), mac_of("otter"));
        assert_ne!(mac_of("otter"), mac_of("badger"));
        assert_eq!(mac_of("otter").bytes()[0], 2);
    }
}
