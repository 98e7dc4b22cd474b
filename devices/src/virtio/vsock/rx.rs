//! Feeds the receive queue: what connections owe the guest, in turn, into the buffers the driver posted.
//!
//! Payload goes from the host's socket straight into guest memory, several buffers per system call. A
//! driver that posts no buffers costs nothing: what waits for it stays where it is.

use std::os::fd::BorrowedFd;

use super::RX;
use super::connection::Due;
use super::muxer::Muxer;
use super::packet::{HEADER_SIZE, HOST_CID, Header, Key, MAX_PAYLOAD, Op};
use crate::chain::{Chain, Cursor};
use crate::device::Io;
use crate::error::{ChainError, Error};
use crate::interrupt::Interrupt;
use crate::memory::VolatileSlice;
use crate::ring::Ring;
use crate::sys;

/// Most buffers filled per turn, before other devices have theirs.
const TURN: usize = 256;
/// Filled buffers that are shown to the driver while more are being filled.
const SHOWN: usize = 32;
/// Most buffers of one read.
const MAX_BURST: usize = 16;

/// The receive queue's side of the device.
#[derive(Debug, Default)]
pub(super) struct Feed {
    /// Chains of the read being made; kept for its memory.
    batch: Vec<Chain>,
    /// The driver was told that kicks are not needed.
    quiet: bool,
}

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// So many buffers were filled.
    Filled(usize),
    /// The driver has posted no more buffers.
    Starved,
}

impl Feed {
    /// The loop and the rings are new.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// Fills buffers until there is nothing to say, or no buffer, or the turn is over.
    pub(super) fn run(&mut self, muxer: &mut Muxer, io: &mut Io<'_>) -> Result<(), Error> {
        if muxer.ready.is_empty() && muxer.strays.is_empty() {
            return Ok(());
        }
        let Some((ring, interrupt)) = io.ring_and_interrupt(RX) else { return Ok(()) };
        let (mut filled, mut shown) = (0usize, 0usize);
        while !(muxer.ready.is_empty() && muxer.strays.is_empty()) {
            if filled >= TURN {
                show(ring, interrupt)?;
                io.serve_again(RX);
                return Ok(());
            }
            match self.step(muxer, ring)? {
                Step::Filled(n) => filled = filled.saturating_add(n),
                // Counted, or a driver that posts only useless buffers would keep the loop here.
                Step::Starved if ring.enable_kicks()? => filled = filled.saturating_add(1),
                Step::Starved => {
                    self.quiet = false;
                    break;
                }
            }
            if filled.saturating_sub(shown) >= SHOWN {
                show(ring, interrupt)?;
                shown = filled;
            }
        }
        show(ring, interrupt)
    }

    /// One packet, or one read's worth of them.
    fn step(&mut self, muxer: &mut Muxer, ring: &mut Ring) -> Result<Step, Error> {
        if let Some((key, kind)) = muxer.strays.front().copied() {
            let header = stray_reset(key, kind, muxer.guest_cid);
            let step = self.control(ring, &header)?;
            if step != Step::Starved {
                muxer.strays.pop_front();
            }
            return Ok(step);
        }
        let Some(index) = muxer.ready.front().copied() else { return Ok(Step::Filled(0)) };
        let guest_cid = muxer.guest_cid;
        let mut step = Step::Filled(0);
        if let Some(slot) = muxer.table.get(index) {
            let connection = &mut slot.connection;
            match connection.due() {
                None => {}
                Some(Due::Control(op)) => {
                    let header = connection.header(op, 0, guest_cid);
                    step = self.control(ring, &header)?;
                    if step != Step::Starved {
                        connection.told(op);
                    }
                }
                Some(Due::Data(max)) => step = self.data(muxer, ring, index, max)?,
            }
        }
        if step != Step::Starved {
            // Back to the end of the line, if there is more.
            muxer.ready.pop_front();
            if let Some(slot) = muxer.table.get(index) {
                slot.queued = false;
            }
            muxer.changed(index);
        }
        Ok(step)
    }

    fn control(&mut self, ring: &mut Ring, header: &Header) -> Result<Step, Error> {
        let Some(chain) = self.next_buffer(ring)? else { return Ok(Step::Starved) };
        header.write(&mut chain.writer())?;
        ring.complete(chain, HEADER_SIZE)?;
        Ok(Step::Filled(1))
    }

    /// Reads the host's stream into as many buffers as the last reads needed.
    fn data(&mut self, muxer: &mut Muxer, ring: &mut Ring, index: u16, max: u32) -> Result<Step, Error> {
        let guest_cid = muxer.guest_cid;
        let Some(slot) = muxer.table.get(index) else { return Ok(Step::Filled(0)) };
        let connection = &mut slot.connection;
        let room = self.collect(ring, connection.burst, max)?;
        if self.batch.is_empty() {
            return Ok(Step::Starved);
        }
        let asked = room.min(max);
        let result = match connection.host() {
            Some(host) => self.read(host, asked),
            None => Ok(0),
        };
        connection.host_read(&result, asked);
        let mut left = result.unwrap_or(0);
        muxer.counters.to_guest.add(left.into());
        connection.burst = if left == asked { connection.burst.saturating_mul(2).min(MAX_BURST) } else { 1 };
        let mut filled = 0usize;
        let lens: [u32; MAX_BURST] = std::array::from_fn(|at| {
            let len = self.batch.get(at).map_or(0, payload_room).min(left);
            left = left.saturating_sub(len);
            filled = filled.saturating_add(usize::from(len > 0));
            len
        });
        while self.batch.len() > filled
            && let Some(chain) = self.batch.pop()
        {
            ring.undo(chain)?;
        }
        if left == asked || filled > 1 {
            connection.burst = connection.burst.max(filled);
        }
        for (chain, len) in self.batch.drain(..).zip(lens) {
            connection.header(Op::ReadWrite, len, guest_cid).write(&mut chain.writer())?;
            ring.complete(chain, len.saturating_add(HEADER_SIZE))?;
        }
        Ok(Step::Filled(filled))
    }

    /// Takes up to `count` buffers for `max` bytes; returns the room in them.
    fn collect(&mut self, ring: &mut Ring, count: usize, max: u32) -> Result<u32, Error> {
        let mut room = 0u32;
        while self.batch.len() < count.min(MAX_BURST) && room < max {
            let Some(chain) = self.next_buffer(ring)? else { break };
            room = room.saturating_add(payload_room(&chain));
            self.batch.push(chain);
        }
        Ok(room)
    }

    fn read(&self, host: BorrowedFd<'_>, asked: u32) -> std::io::Result<u32> {
        let mut left = usize::try_from(asked).unwrap_or(usize::MAX);
        let slices = self.batch.iter().flat_map(payload_slices).map_while(move |slice| {
            let len = slice.len().min(left);
            left = left.saturating_sub(len);
            if len == 0 { None } else { slice.subslice(0, len).ok() }
        });
        sys::receive(host, slices)
    }

    /// The next buffer with room for a packet; those without are given back.
    fn next_buffer(&mut self, ring: &mut Ring) -> Result<Option<Chain>, Error> {
        if !self.quiet {
            ring.disable_kicks()?;
            self.quiet = true;
        }
        for _ in 0..TURN {
            let Some(chain) = ring.pop()? else { break };
            if payload_room(&chain) > 0 {
                return Ok(Some(chain));
            }
            ring.refuse(ChainError::Short);
            ring.complete(chain, 0)?;
        }
        Ok(None)
    }
}

fn show(ring: &mut Ring, interrupt: &dyn Interrupt) -> Result<(), Error> {
    ring.publish()?;
    ring.notify(interrupt)
}

/// Where the payload of a packet goes in a receive buffer; empty if not even a header fits.
fn payload(chain: &Chain) -> Option<Cursor<'_>> {
    let mut buffer = chain.writer();
    buffer.skip(HEADER_SIZE).ok()?;
    Some(buffer)
}

fn payload_room(chain: &Chain) -> u32 {
    payload(chain).map_or(0, |room| room.remaining().min(MAX_PAYLOAD))
}

fn payload_slices(chain: &Chain) -> impl Iterator<Item = VolatileSlice<'_>> {
    payload(chain).into_iter().flat_map(|room| room.slices(MAX_PAYLOAD))
}

/// A reset for a packet that belongs to no connection, in the socket type it came with.
fn stray_reset(key: Key, kind: u16, guest_cid: u64) -> Header {
    Header {
        source_cid: HOST_CID,
        destination_cid: guest_cid,
        source_port: key.local,
        destination_port: key.peer,
        len: 0,
        kind,
        op: Some(Op::Reset),
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    }
}
