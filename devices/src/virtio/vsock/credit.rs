//! How much each side may send (VIRTIO 1.2 §5.10.6.3): counters that run over, and a peer that may lie.
//!
//! Whatever the guest claims about its own space only limits what it receives: data for it waits in the
//! host's socket, not in memory of ours. What it may send is limited by our own numbers alone.

/// Bytes of a connection's backlog: all that is ever kept for a host process that does not read.
pub(super) const BUFFER: u32 = 64 * 1024;

/// Both directions of one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Credit {
    /// The guest's buffer, as it says.
    peer_buffer: u32,
    /// Bytes the guest says it has taken out of that buffer, modulo 2^32.
    peer_forwarded: u32,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    /// Bytes that came from the guest, modulo 2^32.
    received: u32,
    /// Bytes of those that the host process's socket took.
    forwarded: u32,
    /// `forwarded` as it was last told to the guest.
    told: u32,
}

impl Credit {
    /// The guest's side as a header of its gives it.
    pub(super) fn learn(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_buffer = buf_alloc;
        self.peer_forwarded = fwd_cnt;
    }

    /// Bytes that may be sent to the guest now. A guest that shrank its buffer below what is in flight,
    /// or acknowledged what was never sent, gets none.
    pub(super) fn sendable(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_buffer.saturating_sub(in_flight)
    }

    /// `n` bytes went to the guest.
    pub(super) fn sent(&mut self, n: u32) {
        self.sent = self.sent.wrapping_add(n);
    }

    /// Whether the guest may send `n` bytes more: we never told of more space than there is, so one that
    /// overruns it breaks the protocol.
    pub(super) fn allows(&self, n: u32) -> bool {
        let waiting = self.received.wrapping_sub(self.forwarded);
        waiting.checked_add(n).is_some_and(|sum| sum <= BUFFER)
    }

    /// `n` bytes came from the guest.
    pub(super) fn received(&mut self, n: u32) {
        self.received = self.received.wrapping_add(n);
    }

    /// `n` of them went on to the host process.
    pub(super) fn forwarded(&mut self, n: u32) {
        self.forwarded = self.forwarded.wrapping_add(n);
    }

    /// Whether the guest should hear of freed space: once it has less than half of the buffer left by
    /// what it knows, so that it need not stop, nor hear of every byte.
    pub(super) fn worth_telling(&self) -> bool {
        let unknown = self.received.wrapping_sub(self.told);
        self.forwarded != self.told && BUFFER.saturating_sub(unknown) < BUFFER / 2
    }

    /// The count to put in a header; from now on the guest knows it.
    pub(super) fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.forwarded
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn edge() -> impl Strategy<Value = u32> {
        prop_oneof![any::<u32>(), 0..70_000u32, (u32::MAX - 70_000)..=u32::MAX, Just(1 << 31)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        /// P-09: for every claim of the peer, credit is within its buffer and within the truth.
        #[test]
        fn p09_credit_saturates_and_never_exceeds_the_peers_buffer(
            buffer in edge(), forwarded in edge(), sent in edge(),
        ) {
            let credit = Credit { peer_buffer: buffer, peer_forwarded: forwarded, sent, ..Credit::default() };
            let in_flight = u64::from(sent.wrapping_sub(forwarded));
            let expected = u64::from(buffer).saturating_sub(in_flight);
            prop_assert_eq!(u64::from(credit.sendable()), expected);
            prop_assert!(credit.sendable() <= buffer);
        }

        /// P-09: what waits for the host process stays within the buffer, whatever the guest sends.
        #[test]
        fn p09_no_more_than_the_buffer_is_ever_accepted(
            start in edge(), steps in prop::collection::vec((edge(), any::<u32>()), 1..40),
        ) {
            let mut credit = Credit { received: start, forwarded: start, told: start, ..Credit::default() };
            let mut waiting = 0u64;
            for (n, taken) in steps {
                prop_assert_eq!(credit.allows(n), waiting + u64::from(n) <= u64::from(BUFFER));
                if credit.allows(n) {
                    credit.received(n);
                    waiting += u64::from(n);
                }
                let taken = u64::from(taken) % (waiting + 1);
                credit.forwarded(u32::try_from(taken).unwrap());
                waiting -= taken;
                prop_assert!(waiting <= u64::from(BUFFER));
            }
        }

        /// An honest sender, who only sends what the last told count allows, is always allowed, and is
        /// told of space before it has to stop for good.
        #[test]
        fn p09_an_honest_sender_is_never_refused_and_never_stuck(
            start in edge(), sizes in prop::collection::vec(1..BUFFER, 1..60),
        ) {
            let mut credit = Credit { received: start, forwarded: start, told: start, ..Credit::default() };
            for size in sizes {
                let free = BUFFER - credit.received.wrapping_sub(credit.told);
                let n = size.min(free);
                prop_assert!(n > 0, "an honest sender is stuck");
                prop_assert!(credit.allows(n));
                credit.received(n);
                credit.forwarded(n);
                if credit.worth_telling() {
                    credit.tell();
                }
            }
        }
    }
}
