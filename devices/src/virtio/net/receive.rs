//! From the tap to the driver: one frame, one system call, straight into the driver's buffers.
//!
//! How long a frame is shows only once it is read. So the buffers held ready follow the length of recent
//! frames, and what a frame has more of them lands in host memory and is copied from there. Buffers that
//! were not needed go back at the end of a turn: between turns the device has none, and can be saved.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::header::{Agreed, ETHERNET, HEADER, HEADER_BYTES, Header, MAX_FRAME, MIN_FRAME, link_header};
use crate::chain::Chain;
use crate::counter::Counter;
use crate::error::{ChainError, Error};
use crate::interrupt::Interrupt;
use crate::ring::Ring;
use crate::sys;
use crate::throttle::{Throttle, What};

/// Most frames of a turn.
const FRAMES: usize = 64;
/// Most chains taken in a turn, in rings: a driver may post nonsense as fast as it is given back.
const RINGS: u32 = 4;

/// What happened to the host's frames.
#[derive(Debug)]
pub(super) struct ReceiveCounters {
    pub(super) frames: Arc<Counter>,
    pub(super) bytes: Arc<Counter>,
    /// Too long, too short, or not as agreed.
    pub(super) dropped: Arc<Counter>,
    /// Times the driver had posted no buffers while there was a frame.
    pub(super) starved: Arc<Counter>,
}

impl Default for ReceiveCounters {
    fn default() -> Self {
        Self {
            frames: Counter::new("rx_frames"),
            bytes: Counter::new("rx_bytes"),
            dropped: Counter::new("rx_dropped"),
            starved: Counter::new("rx_starved"),
        }
    }
}

/// Why a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// The tap has no more frames.
    Drained,
    /// There may be more; others come first.
    Budget,
    /// The driver has to post buffers first, and will kick when it does.
    Starved,
    /// A meter has to let the next frame pass first.
    Held,
    /// The tap is gone.
    Gone,
}

/// A frame that was read.
#[derive(Clone, Copy, Debug)]
struct Frame {
    header: Header,
    /// Bytes without the header.
    len: u32,
    /// Bytes that lie in the held buffers already; the others lie in `bounce`, at their offset.
    direct: u32,
}

/// Receives for the driver.
#[derive(Debug)]
pub(super) struct Receiver {
    pub(super) agreed: Agreed,
    pub(super) mtu: u32,
    pub(super) counters: ReceiveCounters,
    held: VecDeque<Chain>,
    /// Bytes of all held buffers.
    room: u64,
    /// Chains that may still be taken this turn.
    takes: u32,
    /// Bytes of recent long frames.
    expected: u32,
    bounce: Vec<u8>,
    /// A frame, wholly in `bounce`, for which the driver has to post more buffers.
    waiting: Option<Frame>,
}

impl Receiver {
    pub(super) fn new(mtu: Option<u16>) -> Self {
        Self {
            agreed: Agreed::default(),
            mtu: mtu.map_or(MAX_FRAME, u32::from),
            counters: ReceiveCounters::default(),
            held: VecDeque::new(),
            room: 0,
            takes: 0,
            expected: MIN_FRAME,
            // One byte more than can be, to tell what is too long.
            bounce: vec![0; usize::try_from(MAX_FRAME).unwrap_or(0).saturating_add(1)],
            waiting: None,
        }
    }

    /// Whether a frame waits for buffers.
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Forgets what the driver said.
    pub(super) fn reset(&mut self) {
        self.held.clear();
        self.room = 0;
        self.waiting = None;
        self.agreed = Agreed::default();
    }

    /// Moves frames until one of the ends of a turn is reached.
    pub(super) fn turn(
        &mut self,
        ring: &mut Ring,
        interrupt: &dyn Interrupt,
        tap: BorrowedFd<'_>,
        throttle: &mut Throttle,
    ) -> Result<Turn, Error> {
        self.takes = u32::from(ring.state().size).saturating_mul(RINGS);
        let turn = self.frames(ring, tap, throttle)?;
        self.give_back(ring)?;
        ring.notify(interrupt)?;
        Ok(turn)
    }

    fn frames(
        &mut self,
        ring: &mut Ring,
        tap: BorrowedFd<'_>,
        throttle: &mut Throttle,
    ) -> Result<Turn, Error> {
        for _ in 0..FRAMES {
            let frame = match self.waiting.take() {
                Some(frame) => frame,
                None => {
                    if !throttle.admits(What::NetReceive) {
                        return Ok(Turn::Held);
                    }
                    if let Some(turn) = self.prepare(ring)? {
                        return Ok(turn);
                    }
                    match self.read(tap) {
                        Ok(Some(frame)) => {
                            throttle.charge(What::NetReceive, frame.len.into());
                            frame
                        }
                        Ok(None) => continue,
                        Err(turn) => return Ok(turn),
                    }
                }
            };
            if let Some(turn) = self.place(ring, frame)? {
                return Ok(turn);
            }
        }
        Ok(Turn::Budget)
    }

    /// Holds buffers for the next frame, at least one.
    fn prepare(&mut self, ring: &mut Ring) -> Result<Option<Turn>, Error> {
        loop {
            self.hold(ring, HEADER_BYTES.saturating_add(self.expected))?;
            if !self.held.is_empty() {
                return Ok(None);
            }
            if self.takes == 0 {
                return Ok(Some(Turn::Budget));
            }
            if !ring.enable_kicks()? {
                self.counters.starved.one();
                return Ok(Some(Turn::Starved));
            }
        }
    }

    /// Takes chains until they hold `bytes`, if the driver posted as many.
    fn hold(&mut self, ring: &mut Ring, bytes: u32) -> Result<(), Error> {
        while self.room < bytes.into() && self.takes > 0 {
            if !self.agreed.merge && !self.held.is_empty() {
                break;
            }
            let Some(chain) = ring.pop()? else { break };
            self.takes = self.takes.saturating_sub(1);
            let room = chain.writer().remaining();
            let refused = if chain.reader().remaining() != 0 {
                Some(ChainError::Malformed("receive buffer with readable bytes"))
            } else if room < HEADER_BYTES {
                Some(ChainError::Short)
            } else {
                None
            };
            if let Some(error) = refused {
                ring.refuse(error);
                ring.complete(chain, 0)?;
                ring.publish()?;
                continue;
            }
            self.room = self.room.saturating_add(room.into());
            self.held.push_back(chain);
        }
        Ok(())
    }

    /// Reads one frame; `None` if it was not one to pass on.
    fn read(&mut self, tap: BorrowedFd<'_>) -> Result<Option<Frame>, Turn> {
        let mut header = [0; HEADER];
        let mut skip = HEADER_BYTES;
        let slices = self.held.iter().flat_map(|held| {
            let mut buffer = held.writer();
            // Every held chain has room for a header; only the first one's is left free for it.
            let _ = buffer.skip(std::mem::take(&mut skip));
            buffer.slices(u32::MAX)
        });
        let received = match sys::tap::read_frame(tap, &mut header, slices, &mut self.bounce) {
            Ok(received) if received.bytes == 0 => return Err(Turn::Gone),
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(Turn::Drained),
            Err(error) => {
                log::warn!("a network card's tap is gone: {error}");
                return Err(Turn::Gone);
            }
        };
        let len = received.bytes.checked_sub(HEADER).and_then(|len| u32::try_from(len).ok()).unwrap_or(0);
        let direct = u32::try_from(received.direct).unwrap_or(u32::MAX).min(len);
        let frame = (MIN_FRAME..=MAX_FRAME)
            .contains(&len)
            .then(|| Header::parse(header).for_driver(len, self.agreed).ok())
            .flatten()
            .map(|header| Frame { header, len, direct })
            .filter(|frame| self.fits_link(frame));
        if frame.is_none() {
            self.counters.dropped.one();
        }
        Ok(frame)
    }

    /// Whether the link the driver was told of could have carried the frame (§5.1.6.4.1).
    fn fits_link(&mut self, frame: &Frame) -> bool {
        let longest = |link: u32| self.mtu.saturating_add(link);
        if !self.agreed.mtu || frame.header.gso_type != 0 || frame.len <= longest(MIN_FRAME) {
            return true;
        }
        self.gather(frame.direct.min(MIN_FRAME));
        let mut front = [0; ETHERNET];
        for (place, byte) in front.iter_mut().zip(&self.bounce) {
            *place = *byte;
        }
        frame.len <= self.mtu.saturating_add(link_header(front))
    }

    /// Copies the first bytes of a frame from the held buffers to where they belong in `bounce`.
    fn gather(&mut self, bytes: u32) {
        let mut skip = HEADER_BYTES;
        let mut at = 0usize;
        let end = usize::try_from(bytes).unwrap_or(0);
        for held in &self.held {
            let mut buffer = held.writer();
            let _ = buffer.skip(std::mem::take(&mut skip));
            let room = usize::try_from(buffer.remaining()).unwrap_or(0);
            let next = at.saturating_add(room).min(end);
            // The range fits both sides, so the copy cannot come short.
            let _ = buffer.read(self.bounce.get_mut(at..next).unwrap_or_default());
            at = next;
        }
    }

    /// Gives the driver the frame, or keeps it until there are buffers, or drops it.
    fn place(&mut self, ring: &mut Ring, frame: Frame) -> Result<Option<Turn>, Error> {
        let bytes = HEADER_BYTES.saturating_add(frame.len);
        loop {
            self.hold(ring, bytes)?;
            if self.room >= bytes.into() {
                self.deliver(ring, frame)?;
                return Ok(None);
            }
            // A driver that posted half a ring and has no room for one frame will never have it.
            let posted = self.held.len().saturating_mul(2);
            if !self.agreed.merge || posted >= usize::from(ring.state().size) {
                self.counters.dropped.one();
                return Ok(None);
            }
            let turn = if self.takes == 0 {
                Turn::Budget
            } else if ring.enable_kicks()? {
                continue;
            } else {
                Turn::Starved
            };
            self.counters.starved.one();
            self.gather(frame.direct);
            self.waiting = Some(Frame { direct: 0, ..frame });
            return Ok(Some(turn));
        }
    }

    /// Fills in the header and what is not in the buffers yet, and shows the buffers all at once.
    fn deliver(&mut self, ring: &mut Ring, frame: Frame) -> Result<(), Error> {
        let bytes = HEADER_BYTES.saturating_add(frame.len);
        let header = Header { num_buffers: self.buffers_for(bytes), ..frame.header };
        let mut at = 0u32;
        while at < bytes {
            let Some(chain) = self.held.pop_front() else { break };
            let mut buffer = chain.writer();
            self.room = self.room.saturating_sub(buffer.remaining().into());
            let len = buffer.remaining().min(bytes.saturating_sub(at));
            let mut part = buffer.split_to(len)?;
            if at == 0 {
                part.write(&header.bytes())?;
            }
            // From here on in the frame, first what the kernel put there, then what it could not.
            let here = at.saturating_add(part.passed()).saturating_sub(HEADER_BYTES);
            let placed = frame.direct.saturating_sub(here).min(part.remaining());
            part.skip(placed)?;
            let from = usize::try_from(here.saturating_add(placed)).unwrap_or(usize::MAX);
            let to = from.saturating_add(usize::try_from(part.remaining()).unwrap_or(usize::MAX));
            part.write(self.bounce.get(from..to).ok_or(ChainError::Short)?)?;
            at = at.saturating_add(len);
            ring.complete(chain, len)?;
        }
        ring.publish()?;
        self.counters.frames.one();
        self.counters.bytes.add(frame.len.into());
        let decayed = self.expected.saturating_sub(self.expected.checked_div(8).unwrap_or(0));
        self.expected = decayed.max(frame.len);
        Ok(())
    }

    /// How many of the held buffers `bytes` fill.
    fn buffers_for(&self, bytes: u32) -> u16 {
        let mut left = bytes;
        let mut count = 0u16;
        for held in &self.held {
            if left == 0 {
                break;
            }
            left = left.saturating_sub(held.writer().remaining());
            count = count.saturating_add(1);
        }
        count
    }

    /// Puts unused buffers back where they were.
    fn give_back(&mut self, ring: &mut Ring) -> Result<(), Error> {
        self.room = 0;
        while let Some(chain) = self.held.pop_back() {
            ring.undo(chain)?;
        }
        Ok(())
    }
}
