//! One rule: what a packet must be, and what is done with it.

use std::net::{IpAddr, SocketAddr};

use mvm_protocol::Address;
use serde::{Deserialize, Serialize};

use super::Message;

// linux/netfilter/nf_tables.h
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
const NFTA_PAYLOAD_DREG: u16 = 1;
const NFTA_PAYLOAD_BASE: u16 = 2;
const NFTA_PAYLOAD_OFFSET: u16 = 3;
const NFTA_PAYLOAD_LEN: u16 = 4;
const NFTA_CMP_SREG: u16 = 1;
const NFTA_CMP_OP: u16 = 2;
const NFTA_CMP_DATA: u16 = 3;
const NFTA_BITWISE_SREG: u16 = 1;
const NFTA_BITWISE_DREG: u16 = 2;
const NFTA_BITWISE_LEN: u16 = 3;
const NFTA_BITWISE_MASK: u16 = 4;
const NFTA_BITWISE_XOR: u16 = 5;
const NFTA_CT_DREG: u16 = 1;
const NFTA_CT_KEY: u16 = 2;
const NFTA_FIB_DREG: u16 = 1;
const NFTA_FIB_RESULT: u16 = 2;
const NFTA_FIB_FLAGS: u16 = 3;
const NFTA_IMMEDIATE_DREG: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_REDIR_REG_PROTO_MIN: u16 = 1;
const NFTA_NAT_TYPE: u16 = 1;
const NFTA_NAT_FAMILY: u16 = 2;
const NFTA_NAT_REG_ADDR_MIN: u16 = 3;
const NFTA_NAT_REG_PROTO_MIN: u16 = 5;
const NFT_NAT_DNAT: u32 = 1;
const NFT_CT_STATE: u32 = 0;
const NFT_CT_STATUS: u32 = 2;
const IPS_DST_NAT: u32 = 1 << 5;
/// Asks the routing table of what kind a destination is.
const NFT_FIB_RESULT_ADDRTYPE: u32 = 3;
const NFTA_FIB_F_DADDR: u32 = 2;
/// Established, or related to what is.
const CT_KNOWN: u32 = 1 << 1 | 1 << 2;

/// Register for what is compared, and for addresses; register for ports.
const FIRST: u32 = libc::NFT_REG_1.cast_unsigned();
const SECOND: u32 = libc::NFT_REG_2.cast_unsigned();
const EQUAL: u32 = libc::NFT_CMP_EQ.cast_unsigned();
const NOT_EQUAL: u32 = libc::NFT_CMP_NEQ.cast_unsigned();
const NETWORK_HEADER: u32 = libc::NFT_PAYLOAD_NETWORK_HEADER.cast_unsigned();
const TRANSPORT_HEADER: u32 = libc::NFT_PAYLOAD_TRANSPORT_HEADER.cast_unsigned();

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// One thing the kernel does with a packet: a name and its attributes.
type Expression = Box<dyn FnOnce(Message) -> Message>;

/// A rule under construction: conditions in the order they are checked, an action last.
#[derive(Default)]
pub(in crate::net) struct Rule {
    expressions: Vec<(&'static str, Expression)>,
}

impl Rule {
    pub(in crate::net) fn new() -> Self {
        Self::default()
    }

    /// It carries this.
    pub(in crate::net) fn transport(self, transport: Transport) -> Self {
        let number = match transport {
            Transport::Tcp => libc::IPPROTO_TCP,
            Transport::Udp => libc::IPPROTO_UDP,
        };
        self.meta(libc::NFT_META_L4PROTO).compare(EQUAL, &[u8::try_from(number).unwrap_or_default()])
    }

    /// It goes to this network.
    pub(in crate::net) fn to(self, network: Address) -> Self {
        self.address(network, [16, 24])
    }

    /// It comes from this network.
    pub(in crate::net) fn from(self, network: Address) -> Self {
        self.address(network, [12, 8])
    }

    /// It goes to an address of this host.
    pub(in crate::net) fn for_this_host(self) -> Self {
        self.expression("fib", |fib| {
            number(fib, NFTA_FIB_DREG, FIRST)
                .attribute(NFTA_FIB_RESULT, &NFT_FIB_RESULT_ADDRTYPE.to_be_bytes())
                .attribute(NFTA_FIB_FLAGS, &NFTA_FIB_F_DADDR.to_be_bytes())
        })
        .compare(EQUAL, &u32::from(libc::RTN_LOCAL).to_ne_bytes())
    }

    /// It goes to this port. The transport has been checked before.
    pub(in crate::net) fn for_port(self, port: u16) -> Self {
        self.payload(TRANSPORT_HEADER, 2, 2).compare(EQUAL, &port.to_be_bytes())
    }

    /// It goes to any port but this.
    pub(in crate::net) fn not_for_port(self, port: u16) -> Self {
        self.payload(TRANSPORT_HEADER, 2, 2).compare(NOT_EQUAL, &port.to_be_bytes())
    }

    /// It came in on this link.
    pub(in crate::net) fn came_in_on(self, link: &str) -> Self {
        self.meta(libc::NFT_META_IIFNAME).compare(EQUAL, &link_name(link))
    }

    /// It did not come in on this link.
    pub(in crate::net) fn not_came_in_on(self, link: &str) -> Self {
        self.meta(libc::NFT_META_IIFNAME).compare(NOT_EQUAL, &link_name(link))
    }

    /// It goes out on this link.
    pub(in crate::net) fn goes_out_on(self, link: &str) -> Self {
        self.meta(libc::NFT_META_OIFNAME).compare(EQUAL, &link_name(link))
    }

    /// It does not go out on this link.
    pub(in crate::net) fn not_goes_out_on(self, link: &str) -> Self {
        self.meta(libc::NFT_META_OIFNAME).compare(NOT_EQUAL, &link_name(link))
    }

    /// It does not belong to a connection that is known.
    pub(in crate::net) fn begins(self) -> Self {
        self.expression("ct", |ct| number(number(ct, NFTA_CT_DREG, FIRST), NFTA_CT_KEY, NFT_CT_STATE))
            .mask(&CT_KNOWN.to_ne_bytes())
            .compare(EQUAL, &[0; 4])
    }

    /// Its destination was not changed.
    pub(in crate::net) fn not_sent_elsewhere(self) -> Self {
        self.expression("ct", |ct| number(number(ct, NFTA_CT_DREG, FIRST), NFTA_CT_KEY, NFT_CT_STATUS))
            .mask(&IPS_DST_NAT.to_ne_bytes())
            .compare(EQUAL, &[0; 4])
    }

    /// Then it goes to this port of this host.
    pub(in crate::net) fn redirect(self, port: u16) -> Self {
        self.immediate(FIRST, &port.to_be_bytes())
            .expression("redir", |redir| number(redir, NFTA_REDIR_REG_PROTO_MIN, FIRST))
    }

    /// Then its source becomes the address of the link it leaves by.
    pub(in crate::net) fn masquerade(self) -> Self {
        self.expression("masq", |masq| masq)
    }

    /// Then it goes there.
    pub(in crate::net) fn send_to(self, destination: SocketAddr) -> Self {
        let family = family(destination.ip());
        self.immediate(FIRST, &octets(destination.ip()))
            .immediate(SECOND, &destination.port().to_be_bytes())
            .expression("nat", move |nat| {
                let nat = number(nat, NFTA_NAT_TYPE, NFT_NAT_DNAT);
                let nat = number(nat, NFTA_NAT_FAMILY, family.into());
                number(number(nat, NFTA_NAT_REG_ADDR_MIN, FIRST), NFTA_NAT_REG_PROTO_MIN, SECOND)
            })
    }

    /// Then nobody asks what connection it belongs to.
    pub(in crate::net) fn untracked(self) -> Self {
        self.expression("notrack", |notrack| notrack)
    }

    /// Then it is dropped.
    pub(in crate::net) fn discard(self) -> Self {
        self.expression("immediate", |immediate| {
            number(immediate, NFTA_IMMEDIATE_DREG, libc::NFT_REG_VERDICT.cast_unsigned()).nest(
                NFTA_IMMEDIATE_DATA,
                |data| {
                    data.nest(NFTA_DATA_VERDICT, |verdict| {
                        number(verdict, NFTA_VERDICT_CODE, libc::NF_DROP.cast_unsigned())
                    })
                },
            )
        })
    }

    /// Adds the rule's expressions to a list.
    pub(super) fn expressions(self, list: Message) -> Message {
        self.expressions.into_iter().fold(list, |list, (name, fill)| {
            list.nest(NFTA_LIST_ELEM, |element| element.text(NFTA_EXPR_NAME, name).nest(NFTA_EXPR_DATA, fill))
        })
    }

    fn expression(mut self, name: &'static str, fill: impl FnOnce(Message) -> Message + 'static) -> Self {
        self.expressions.push((name, Box::new(fill)));
        self
    }

    fn meta(self, key: i32) -> Self {
        self.expression("meta", move |meta| {
            number(number(meta, NFTA_META_DREG, FIRST), NFTA_META_KEY, key.cast_unsigned())
        })
    }

    fn payload(self, base: u32, offset: u32, length: u32) -> Self {
        self.expression("payload", move |payload| {
            let payload = number(payload, NFTA_PAYLOAD_DREG, FIRST);
            let payload = number(number(payload, NFTA_PAYLOAD_BASE, base), NFTA_PAYLOAD_OFFSET, offset);
            number(payload, NFTA_PAYLOAD_LEN, length)
        })
    }

    fn compare(self, operator: u32, value: &[u8]) -> Self {
        let value = value.to_vec();
        self.expression("cmp", move |cmp| {
            data(number(number(cmp, NFTA_CMP_SREG, FIRST), NFTA_CMP_OP, operator), NFTA_CMP_DATA, &value)
        })
    }

    fn mask(self, mask: &[u8]) -> Self {
        let mask = mask.to_vec();
        self.expression("bitwise", move |bitwise| {
            let length = u32::try_from(mask.len()).unwrap_or_default();
            let bitwise = number(number(bitwise, NFTA_BITWISE_SREG, FIRST), NFTA_BITWISE_DREG, FIRST);
            let bitwise = data(number(bitwise, NFTA_BITWISE_LEN, length), NFTA_BITWISE_MASK, &mask);
            data(bitwise, NFTA_BITWISE_XOR, &vec![0; mask.len()])
        })
    }

    fn immediate(self, register: u32, value: &[u8]) -> Self {
        let value = value.to_vec();
        self.expression("immediate", move |immediate| {
            data(number(immediate, NFTA_IMMEDIATE_DREG, register), NFTA_IMMEDIATE_DATA, &value)
        })
    }

    /// Compares an address of the header, at one offset in IPv4 and at another in IPv6.
    fn address(self, network: Address, offsets: [u32; 2]) -> Self {
        let rule = self.meta(libc::NFT_META_NFPROTO).compare(EQUAL, &[family(network.ip)]);
        if network.prefix == 0 {
            return rule;
        }
        let value = octets(network.ip);
        let [four, six] = offsets;
        let offset = if network.ip.is_ipv4() { four } else { six };
        let mask: Vec<u8> = (0..value.len()).map(|byte| mask_byte(network.prefix, byte)).collect();
        let masked: Vec<u8> = value.iter().zip(&mask).map(|(value, mask)| value & mask).collect();
        let length = u32::try_from(value.len()).unwrap_or_default();
        rule.payload(NETWORK_HEADER, offset, length).mask(&mask).compare(EQUAL, &masked)
    }
}

impl std::fmt::Debug for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.expressions.iter().map(|(name, _)| name)).finish()
    }
}

/// One byte of a network's mask.
fn mask_byte(prefix: u8, byte: usize) -> u8 {
    let bits = usize::from(prefix).saturating_sub(byte.saturating_mul(8)).min(8);
    u8::try_from(0xff00_u32.checked_shr(u32::try_from(bits).unwrap_or(8)).unwrap_or(0) & 0xff).unwrap_or(0)
}

fn number(message: Message, kind: u16, value: u32) -> Message {
    message.attribute(kind, &value.to_be_bytes())
}

fn data(message: Message, kind: u16, value: &[u8]) -> Message {
    message.nest(kind, |data| data.attribute(NFTA_DATA_VALUE, value))
}

fn family(ip: IpAddr) -> u8 {
    let family = if ip.is_ipv4() { libc::NFPROTO_IPV4 } else { libc::NFPROTO_IPV6 };
    u8::try_from(family).unwrap_or_default()
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn link_name(name: &str) -> [u8; libc::IFNAMSIZ] {
    let mut bytes = [0; libc::IFNAMSIZ];
    for (to, from) in bytes.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from;
    }
    bytes
}
