//! nftables: tables of ours, made and removed in one transaction each.
//!
//! Spoken over netlink and not by calling `nft`: nothing needs to be installed, and no process is started for it.

mod rule;

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;

pub(super) use rule::Rule;
pub use rule::Transport;

use super::netlink::{Message, Netlink, attributes, text};

/// Table family: IPv4 and IPv6 in one.
const INET: u8 = 1;
const VERSION: u8 = 0;
/// Bytes of `struct nfgenmsg`.
const GENERIC_HEADER: usize = 4;

// linux/netfilter/nf_tables.h
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;

/// Where packets are seen by a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hook {
    /// Those that arrive, before it is known what connection they belong to.
    Raw,
    /// Those that arrive, to have their destination changed.
    Prerouting,
    /// Those sent from here, to have their destination changed.
    Output,
    /// Those that leave, to have their source changed.
    Postrouting,
    /// Those that pass through.
    Forward,
    /// Those that are for this host.
    Input,
}

impl Hook {
    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Prerouting => "prerouting",
            Self::Output => "output",
            Self::Postrouting => "postrouting",
            Self::Forward => "forward",
            Self::Input => "input",
        }
    }

    /// The chain's type, the hook's number, and the priority usual for the type.
    fn place(self) -> (&'static str, i32, i32) {
        match self {
            Self::Raw => ("filter", libc::NF_INET_PRE_ROUTING, -300),
            Self::Prerouting => ("nat", libc::NF_INET_PRE_ROUTING, -100),
            Self::Output => ("nat", libc::NF_INET_LOCAL_OUT, -100),
            Self::Postrouting => ("nat", libc::NF_INET_POST_ROUTING, 100),
            Self::Forward => ("filter", libc::NF_INET_FORWARD, 0),
            Self::Input => ("filter", libc::NF_INET_LOCAL_IN, 0),
        }
    }
}

/// A table of family `inet` with its chains, each named like its hook. Packets that no rule takes pass.
#[derive(Debug)]
pub(super) struct Table<'a> {
    pub(super) name: &'a str,
    pub(super) chains: Vec<(Hook, Vec<Rule>)>,
}

impl Table<'_> {
    /// Puts the table in place of one of this name in the calling thread's name space, at once or not at all.
    pub(super) fn install(self) -> nix::Result<()> {
        let mut batch = vec![self.table(libc::NFT_MSG_NEWTABLE), self.table(libc::NFT_MSG_DELTABLE)];
        batch.push(self.table(libc::NFT_MSG_NEWTABLE));
        for (hook, rules) in self.chains {
            batch.push(chain(self.name, hook));
            batch.extend(rules.into_iter().map(|rule| append(self.name, hook, rule)));
        }
        perform(batch)
    }

    fn table(&self, kind: i32) -> Message {
        message(kind).create_or_keep().text(NFTA_TABLE_NAME, self.name)
    }
}

/// Chains that drop what passes through this host unless a rule of theirs accepts it, as `TABLE CHAIN`; without
/// tables that have a rule about `link`, whose owner has thought of it. Only nftables is asked, which is where the
/// rules of today's iptables are too.
pub(super) fn dropping(link: &str) -> nix::Result<Vec<String>> {
    let mut kernel = Netlink::of(SockProtocol::NetlinkNetFilter, 0)?;
    let about = |payload: &[u8]| {
        let named = payload.windows(link.len()).any(|window| window == link.as_bytes());
        value(payload, NFTA_RULE_TABLE).filter(|_| named).map(text)
    };
    let known = kernel.list(question(libc::NFT_MSG_GETRULE), about)?;
    let chains = kernel.list(question(libc::NFT_MSG_GETCHAIN), dropping_chain)?;
    let unknown = chains.into_iter().filter(|(table, _)| !known.contains(table));
    Ok(unknown.map(|(table, chain)| format!("{table} {chain}")).collect())
}

/// Table and name of a chain that sees what passes, and drops it.
fn dropping_chain(payload: &[u8]) -> Option<(String, String)> {
    let family = i32::from(*payload.first()?);
    let (_, hook) =
        attributes(value(payload, NFTA_CHAIN_HOOK)?).find(|(kind, _)| *kind == NFTA_HOOK_HOOKNUM)?;
    let passes = libc::NF_INET_FORWARD.to_be_bytes() == *hook;
    let drops = libc::NF_DROP.to_be_bytes() == *value(payload, NFTA_CHAIN_POLICY)?;
    let ipv4 = family == libc::NFPROTO_INET || family == libc::NFPROTO_IPV4;
    let name = (text(value(payload, NFTA_CHAIN_TABLE)?), text(value(payload, NFTA_CHAIN_NAME)?));
    (passes && drops && ipv4).then_some(name)
}

/// Asks for all of a kind in all families.
fn question(kind: i32) -> Message {
    let kind = libc::NFNL_SUBSYS_NFTABLES << 8 | kind;
    Message::new(u16::try_from(kind).unwrap_or_default(), &[&[0; GENERIC_HEADER]])
}

/// An attribute of an answer.
fn value(payload: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(payload.get(GENERIC_HEADER..)?).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// Removes a table in the calling thread's name space. One that is not there is no error.
pub(super) fn remove_table(name: &str) -> nix::Result<()> {
    match perform(vec![message(libc::NFT_MSG_DELTABLE).text(NFTA_TABLE_NAME, name)]) {
        Err(Errno::ENOENT) => Ok(()),
        result => result,
    }
}

fn chain(table: &str, hook: Hook) -> Message {
    let (kind, number, priority) = hook.place();
    message(libc::NFT_MSG_NEWCHAIN)
        .create_or_keep()
        .text(NFTA_CHAIN_TABLE, table)
        .text(NFTA_CHAIN_NAME, hook.name())
        .nest(NFTA_CHAIN_HOOK, |place| {
            place
                .attribute(NFTA_HOOK_HOOKNUM, &number.to_be_bytes())
                .attribute(NFTA_HOOK_PRIORITY, &priority.to_be_bytes())
        })
        .text(NFTA_CHAIN_TYPE, kind)
}

fn append(table: &str, hook: Hook, rule: Rule) -> Message {
    message(libc::NFT_MSG_NEWRULE)
        .create_or_keep()
        .append()
        .text(NFTA_RULE_TABLE, table)
        .text(NFTA_RULE_CHAIN, hook.name())
        .nest(NFTA_RULE_EXPRESSIONS, |list| rule.expressions(list))
}

/// A message of nftables: its header is `struct nfgenmsg`.
fn message(kind: i32) -> Message {
    let kind = libc::NFNL_SUBSYS_NFTABLES << 8 | kind;
    Message::new(u16::try_from(kind).unwrap_or_default(), &[&[INET, VERSION, 0, 0]]).acknowledged()
}

/// Has the kernel do all of it or nothing.
fn perform(batch: Vec<Message>) -> nix::Result<()> {
    let frame = |kind: i32| {
        let subsystem = u16::try_from(libc::NFNL_SUBSYS_NFTABLES).unwrap_or_default();
        let header = [&[0, VERSION][..], &subsystem.to_be_bytes()].concat();
        Message::new(u16::try_from(kind).unwrap_or_default(), &[&header])
    };
    let mut kernel = Netlink::of(SockProtocol::NetlinkNetFilter, 0)?;
    kernel.transact(frame(libc::NFNL_MSG_BATCH_BEGIN), batch, frame(libc::NFNL_MSG_BATCH_END))
}
