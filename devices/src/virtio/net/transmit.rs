//! From the driver to the tap: one frame, one system call.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::header::{Agreed, ETHERNET, HEADER, Header, MAX_FRAME, MIN_FRAME};
use super::mac::MacAddress;
use crate::chain::{Chain, Cursor};
use crate::counter::Counter;
use crate::error::{ChainError, Error};
use crate::sys;
use crate::throttle::{Throttle, What};

/// What happened to the driver's frames.
#[derive(Debug)]
pub(super) struct TransmitCounters {
    pub(super) frames: Arc<Counter>,
    pub(super) bytes: Arc<Counter>,
    /// Not taken by the host: busy, link down, or refused by its kernel.
    pub(super) dropped: Arc<Counter>,
    /// Length or header not possible.
    pub(super) malformed: Arc<Counter>,
    /// From an address that is not the card's.
    pub(super) spoofed: Arc<Counter>,
}

impl Default for TransmitCounters {
    fn default() -> Self {
        Self {
            frames: Counter::new("tx_frames"),
            bytes: Counter::new("tx_bytes"),
            dropped: Counter::new("tx_dropped"),
            malformed: Counter::new("tx_malformed"),
            spoofed: Counter::new("tx_spoofed"),
        }
    }
}

/// Sends what the driver posts.
#[derive(Debug)]
pub(super) struct Transmitter {
    pub(super) agreed: Agreed,
    /// The one address frames may come from; `None` lets all pass.
    only_from: Option<MacAddress>,
    pub(super) counters: TransmitCounters,
    /// A frame in too many pieces for one call, as a whole. Empty until there is one.
    whole: Vec<u8>,
}

impl Transmitter {
    pub(super) fn new(only_from: Option<MacAddress>) -> Self {
        let (agreed, counters) = (Agreed::default(), TransmitCounters::default());
        Self { agreed, only_from, counters, whole: Vec::new() }
    }

    /// Sends the frame in `chain` or drops it; either way the chain is done with.
    pub(super) fn send(
        &mut self,
        chain: &Chain,
        tap: BorrowedFd<'_>,
        throttle: &Throttle,
    ) -> Result<u32, Error> {
        if chain.writer().remaining() != 0 {
            return Err(ChainError::Malformed("frame to send with writable bytes").into());
        }
        let mut rest = chain.reader();
        let mut header = [0; HEADER];
        rest.read(&mut header)?;
        let len = rest.remaining();
        if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
            self.counters.malformed.one();
            return Ok(0);
        }
        let Ok(header) = Header::parse(header).for_host(len, self.agreed) else {
            self.counters.malformed.one();
            return Ok(0);
        };
        // The address is checked in the copy that is sent: the driver may change its own meanwhile.
        let mut link = [0; ETHERNET];
        rest.read(&mut link)?;
        let [_, _, _, _, _, _, source @ .., _, _] = link;
        if self.only_from.is_some_and(|mac| mac.bytes() != source) {
            self.counters.spoofed.one();
            return Ok(0);
        }
        throttle.charge(What::NetSend, len.into());
        match self.write(header, link, &rest, tap) {
            Ok(()) => {
                self.counters.frames.one();
                self.counters.bytes.add(len.into());
            }
            // Like a full switch: the network above copes with loss, and nothing piles up here.
            Err(_) => self.counters.dropped.one(),
        }
        Ok(0)
    }

    fn write(
        &mut self,
        header: Header,
        link: [u8; ETHERNET],
        rest: &Cursor<'_>,
        tap: BorrowedFd<'_>,
    ) -> std::io::Result<()> {
        let mut front = [0; HEADER + ETHERNET];
        for (place, byte) in front.iter_mut().zip(header.bytes().into_iter().chain(link)) {
            *place = byte;
        }
        if sys::tap::write_frame(tap, &front, rest.slices(u32::MAX))? {
            return Ok(());
        }
        self.whole.clear();
        self.whole.extend_from_slice(&front);
        for slice in rest.slices(u32::MAX) {
            let start = self.whole.len();
            self.whole.resize(start.saturating_add(slice.len()), 0);
            slice.copy_to(self.whole.get_mut(start..).unwrap_or_default());
        }
        sys::tap::write_frame(tap, &self.whole, std::iter::empty()).map(drop)
    }
}
