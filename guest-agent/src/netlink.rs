//! rtnetlink(7): just the messages that bring a guest's interfaces up.

use std::{
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
};

use mvm_protocol::{Address, Route};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto, socket,
    },
};

/// Largest datagram the kernel sends for what is asked here.
const DATAGRAM: usize = 32 * 1024;

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;

/// Bytes of `struct ifinfomsg`.
const LINK_HEADER: usize = 16;

const REQUEST: u16 = libc::NLM_F_REQUEST as u16 | libc::NLM_F_ACK as u16;
const MAKE: u16 = REQUEST | libc::NLM_F_CREATE as u16 | libc::NLM_F_REPLACE as u16;

/// An address's flags as 32 bits (linux/if_addr.h).
const IFA_FLAGS: u16 = 8;

/// The gateway is on the link (linux/rtnetlink.h).
const RTNH_F_ONLINK: u32 = 4;

/// One request under construction: header, the kind's fixed part, attributes.
#[derive(Debug)]
pub(crate) struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: u16, fixed: &[&[u8]]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        fixed.iter().for_each(|part| bytes.extend_from_slice(part));
        Self { bytes }
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len().saturating_add(4)).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    fn address(self, kind: u16, ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => self.attribute(kind, &ip.octets()),
            IpAddr::V6(ip) => self.attribute(kind, &ip.octets()),
        }
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

fn family(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

/// `struct ifinfomsg`: family, pad, type, index, flags, mask of flags.
fn link_header(index: u32, flags: u32, mask: u32) -> [u8; LINK_HEADER] {
    let mut bytes = [0; LINK_HEADER];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..].copy_from_slice(&mask.to_ne_bytes());
    bytes
}

/// Asks for all links.
pub(crate) fn list_links() -> Message {
    let flags = libc::NLM_F_REQUEST as u16 | libc::NLM_F_DUMP as u16;
    Message::new(libc::RTM_GETLINK, flags, &[&link_header(0, 0, 0)])
}

/// Renames a link that is down.
pub(crate) fn rename_link(index: u32, name: &str) -> Message {
    let mut text = name.as_bytes().to_vec();
    text.push(0);
    Message::new(libc::RTM_NEWLINK, REQUEST, &[&link_header(index, 0, 0)]).attribute(libc::IFLA_IFNAME, &text)
}

/// Sets a link's largest packet; 0 leaves it, and brings it up or down.
pub(crate) fn set_link(index: u32, mtu: u32, up: bool) -> Message {
    let mask = libc::IFF_UP as u32;
    let header = link_header(index, if up { mask } else { 0 }, mask);
    let message = Message::new(libc::RTM_NEWLINK, REQUEST, &[&header]);
    if mtu == 0 { message } else { message.attribute(libc::IFLA_MTU, &mtu.to_ne_bytes()) }
}

/// Gives a link an address. An IPv6 address is used at once, without asking around for duplicates: the
/// host has assigned it.
pub(crate) fn add_address(index: u32, address: Address) -> Message {
    let header = [family(address.ip), address.prefix, 0, 0];
    let message = Message::new(libc::RTM_NEWADDR, MAKE, &[&header, &index.to_ne_bytes()])
        .address(libc::IFA_LOCAL, address.ip)
        .address(libc::IFA_ADDRESS, address.ip);
    match address.ip {
        IpAddr::V6(_) => message.attribute(IFA_FLAGS, &libc::IFA_F_NODAD.to_ne_bytes()),
        IpAddr::V4(ip) => {
            // The last address of the network, for those who still broadcast.
            let hosts = u32::MAX.checked_shr(address.prefix.into()).unwrap_or(0);
            message.attribute(libc::IFA_BROADCAST, &(ip.to_bits() | hosts).to_be_bytes())
        }
    }
}

/// Adds a route through a link.
pub(crate) fn add_route(index: u32, route: &Route) -> Message {
    let any = route.destination.map(|it| it.ip).or(route.gateway);
    let prefix = route.destination.map_or(0, |it| it.prefix);
    let scope = if route.gateway.is_some() { libc::RT_SCOPE_UNIVERSE } else { libc::RT_SCOPE_LINK };
    let flags = if route.on_link { RTNH_F_ONLINK } else { 0 };
    let header = [
        any.map_or(libc::AF_INET as u8, family),
        prefix,
        0,
        0,
        libc::RT_TABLE_MAIN,
        libc::RTPROT_STATIC,
        scope,
        libc::RTN_UNICAST,
    ];
    let mut message = Message::new(libc::RTM_NEWROUTE, MAKE, &[&header, &flags.to_ne_bytes()]);
    if let Some(destination) = route.destination {
        message = message.address(libc::RTA_DST, destination.ip);
    }
    if let Some(gateway) = route.gateway {
        message = message.address(libc::RTA_GATEWAY, gateway);
    }
    if route.metric != 0 {
        message = message.attribute(libc::RTA_PRIORITY, &route.metric.to_ne_bytes());
    }
    message.attribute(libc::RTA_OIF, &index.to_ne_bytes())
}

/// Adds a neighbour that is never asked for.
pub(crate) fn add_neighbour(index: u32, ip: IpAddr, mac: [u8; 6]) -> Message {
    let state = libc::NUD_PERMANENT.to_ne_bytes();
    let header = [family(ip), 0, 0, 0];
    Message::new(libc::RTM_NEWNEIGH, MAKE, &[&header, &index.to_ne_bytes(), &state, &[0, 0]])
        .address(libc::NDA_DST, ip)
        .attribute(libc::NDA_LLADDR, &mac)
}

/// A link as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) mac: Vec<u8>,
}

/// A connection to the kernel's routing tables.
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens it.
    pub(crate) fn new() -> nix::Result<Self> {
        let protocol = SockProtocol::NetlinkRoute;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Has the kernel do it.
    pub(crate) fn perform(&mut self, message: Message) -> nix::Result<()> {
        self.exchange(message, |_| {})
    }

    /// All links.
    pub(crate) fn links(&mut self) -> nix::Result<Vec<Link>> {
        let mut links = Vec::new();
        self.exchange(list_links(), |payload| links.extend(parse_link(payload)))?;
        Ok(links)
    }

    /// Sends a request and reads its answers to the end: an error, an acknowledgement, or a list.
    fn exchange(&mut self, message: Message, mut each: impl FnMut(&[u8])) -> nix::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = message.finish(self.sequence);
        sendto(self.socket.as_raw_fd(), &bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut datagram = vec![0; DATAGRAM];
        loop {
            let count = recv(self.socket.as_raw_fd(), &mut datagram, MsgFlags::empty())?;
            let mut rest = &datagram[..count];
            while let Some((kind, sequence, payload, next)) = split(rest) {
                rest = next;
                if sequence != self.sequence {
                    continue;
                }
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR => return acknowledged(payload),
                    _ => each(payload),
                }
            }
        }
    }
}

/// The first message of a datagram: kind, sequence, payload; and what follows it.
fn split(bytes: &[u8]) -> Option<(u16, u32, &[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let sequence = u32::from_ne_bytes(*bytes.get(8..)?.first_chunk()?);
    let payload = bytes.get(HEADER..length)?;
    let next = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, sequence, payload, next))
}

fn acknowledged(payload: &[u8]) -> nix::Result<()> {
    match payload.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
        Some(0) => Ok(()),
        Some(code) => Err(Errno::from_raw(code.saturating_neg())),
        None => Err(Errno::EIO),
    }
}

fn parse_link(payload: &[u8]) -> Option<Link> {
    let index = u32::from_ne_bytes(*payload.get(4..)?.first_chunk()?);
    let mut link = Link { index, name: String::new(), mac: Vec::new() };
    let mut rest = payload.get(LINK_HEADER..)?;
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_ne_bytes(*length));
        let kind = u16::from_ne_bytes(*after.first_chunk()?);
        let value = rest.get(4..length)?;
        match kind {
            libc::IFLA_IFNAME => {
                link.name = String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned();
            }
            libc::IFLA_ADDRESS => link.mac = value.to_vec(),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The message in words: hexadecimal digits of four bytes each.
    fn words(message: Message) -> Vec<String> {
        let bytes = message.finish(1);
        bytes.chunks(4).map(|word| word.iter().map(|byte| format!("{byte:02x}")).collect()).collect()
    }

    #[test]
    fn an_ipv4_address_is_local_peer_and_broadcast() {
        let address = Address { ip: "10.0.0.2".parse().unwrap(), prefix: 24 };
        let header = ["30000000", "14000505", "01000000", "00000000", "02180000", "10000000"];
        let attributes = ["08000200", "0a000002", "08000100", "0a000002", "08000400", "0a0000ff"];
        let message = words(add_address(16, address));
        assert_eq!(message[0], "30000000");
        assert_eq!(message[2..6], header[2..]);
        assert_eq!(message[6..], attributes);
    }

    #[test]
    fn an_ipv6_address_is_not_asked_around_for() {
        let address = Address { ip: "fd00::2".parse().unwrap(), prefix: 64 };
        let message = words(add_address(16, address));
        assert_eq!(message[4..6], ["0a400000", "10000000"]);
        assert_eq!(message[message.len() - 2..], ["08000800", "02000000"]);
    }

    #[test]
    fn a_link_goes_up_with_its_mtu_and_no_other_flag_changes() {
        let message = words(set_link(16, 1500, true));
        assert_eq!(message[4..], ["00000000", "10000000", "01000000", "01000000", "08000400", "dc050000"]);
        assert_eq!(words(set_link(16, 0, false))[4..], ["00000000", "10000000", "00000000", "01000000"]);
    }

    #[test]
    fn a_name_ends_in_nul_and_is_padded() {
        let message = words(rename_link(16, "eth0"));
        assert_eq!(message[8..], ["09000300", "65746830", "00000000"]);
    }

    #[test]
    fn a_default_route_has_a_gateway_and_no_destination() {
        let route = Route {
            destination: None,
            gateway: Some("10.0.0.1".parse().unwrap()),
            interface: "eth0".into(),
            metric: 0,
            on_link: true,
        };
        let message = words(add_route(16, &route));
        assert_eq!(message[4..7], ["02000000", "fe040001", "04000000"]);
        assert_eq!(message[7..], ["08000500", "0a000001", "08000400", "10000000"]);
    }

    #[test]
    fn a_link_is_read_from_its_attributes_whatever_else_is_there() {
        let message = Message::new(0, 0, &[&link_header(7, 0, 0)])
            .attribute(99, b"odd")
            .attribute(libc::IFLA_IFNAME, b"eth0\0")
            .attribute(libc::IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1]);
        let link = Link { index: 7, name: "eth0".into(), mac: vec![2, 0, 0, 0, 0, 1] };
        assert_eq!(parse_link(&message.finish(1)[HEADER..]), Some(link));
    }

    #[test]
    fn a_message_that_is_cut_ends_the_reading() {
        let bytes = rename_link(1, "x").finish(5);
        assert!(split(&bytes).is_some());
        assert!(split(&bytes[..bytes.len() - 4]).is_none());
        assert!(split(&[]).is_none());
    }
}
