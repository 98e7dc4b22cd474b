//! Traffic control: what comes in on one link goes out on another.

use super::message::Message;

/// Parent of an ingress queueing discipline, and its handle (linux/pkt_sched.h).
const INGRESS: u32 = 0xffff_fff1;
const INGRESS_HANDLE: u32 = 0xffff_0000;
/// Parent of filters on what comes in: fits the `ingress` discipline and `clsact` alike.
const INGRESS_FILTERS: u32 = 0xffff_fff2;
/// Our filter's priority. The lowest comes first, and ours must: it takes everything.
const PRIORITY: u32 = 1;

// linux/rtnetlink.h, linux/pkt_cls.h, linux/tc_act/tc_mirred.h
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TC_U32_TERMINAL: u8 = 1;
const TC_ACT_STOLEN: u32 = 4;
const TCA_EGRESS_REDIR: u32 = 1;

impl Message {
    /// Lets filters see what comes in on a link.
    pub(in crate::net) fn add_ingress(index: u32) -> Self {
        Self::new(libc::RTM_NEWQDISC, &[&header(index, INGRESS_HANDLE, INGRESS, 0)])
            .create()
            .text(TCA_KIND, "ingress")
    }

    /// Undoes that, filters and all.
    pub(in crate::net) fn remove_ingress(index: u32) -> Self {
        Self::new(libc::RTM_DELQDISC, &[&header(index, INGRESS_HANDLE, INGRESS, 0)])
    }

    /// Sends all that comes in on the link `from` out on the link `to`: `protocol all u32 match u8 0 0 action
    /// mirred egress redirect`. The plainest classifier there is, and the one that every kernel has.
    pub(in crate::net) fn redirect(from: u32, to: u32) -> Self {
        let every_protocol = u32::from(u16::try_from(libc::ETH_P_ALL).unwrap_or_default().to_be());
        let info = PRIORITY << 16 | every_protocol;
        Self::new(libc::RTM_NEWTFILTER, &[&header(from, 0, INGRESS_FILTERS, info)])
            .create()
            .text(TCA_KIND, "u32")
            .nest(TCA_OPTIONS, |options| {
                options.attribute(TCA_U32_SEL, &everything()).nest(TCA_U32_ACT, |actions| {
                    actions.nest(1, |action| {
                        action.text(TCA_ACT_KIND, "mirred").nest(TCA_ACT_OPTIONS, |options| {
                            options.attribute(TCA_MIRRED_PARMS, &redirection(to))
                        })
                    })
                })
            })
    }
}

/// `struct tcmsg`: family and pad, link, handle, parent, info.
fn header(index: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    words([0, index, handle, parent, info])
}

/// `struct tc_u32_sel` with one key, whose mask is empty: it fits every packet.
fn everything() -> [u8; 32] {
    let mut selector = [0; 32];
    selector[0] = TC_U32_TERMINAL;
    selector[2] = 1;
    selector
}

/// `struct tc_mirred`: index, capabilities, verdict, two counts of references; what is done, and where to.
fn redirection(to: u32) -> [u8; 28] {
    words([0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to])
}

fn words<const WORDS: usize, const BYTES: usize>(words: [u32; WORDS]) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
        place.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}
