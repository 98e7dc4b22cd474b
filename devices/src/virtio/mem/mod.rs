//! virtio-mem: memory beyond what the machine booted with, given and taken back while it runs (VIRTIO 1.3 §5.15).
//!
//! The device has a region of guest addresses, in blocks of 2 MiB. The host says how much of it the guest may have
//! ([`request`]); the driver plugs blocks until it has as much, or unplugs them, at which moment their pages go back
//! to the host.
//!
//! What a guest touches without having plugged it costs the host memory all the same: whatever lies in the *usable*
//! part of the region is memory to it. That part is no larger than the most the host ever asked it to have, rounded
//! up to what guests add at a time; beyond it there is nothing, neither for virtual CPUs nor for devices. So a guest
//! never has more than the host once granted. That it gives memory back is its good will, as with a balloon: a limit
//! to count on is the host's, of the machine's control group.

mod blocks;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bounded;
use crate::chain::Chain;
use crate::config_space::ConfigSpace;
use crate::counter::Counter;
use crate::device::{Io, Kind, VirtioDevice};
use crate::error::{ChainError, Error};
use crate::fd::FdSource;
use crate::memory::{GuestAddress, GuestMemoryBackend, Memory};
use crate::ring::Notify;
use crate::sys;
use crate::virtio::{BuildError, DeviceState, Spec};

use blocks::{Blocks, Found};

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: drivers keep their hands off what they have not plugged.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Bytes of a block: a huge page, so that one can go back to the host as a whole.
pub const BLOCK: u64 = 2 << 20;
/// What a region's size is a multiple of, in MiB: Linux adds memory in no smaller pieces.
pub const STEP_MIB: u64 = 128;
/// Largest region, in MiB.
pub const MAX_MIB: u64 = 512 * 1024;
/// Bytes of the bits of so many blocks.
const MAX_BITS: usize = 32 << 10;

/// Fields of the configuration space (§5.15.4).
const BLOCK_SIZE: usize = 0;
const ADDRESS: usize = 16;
const REGION_SIZE: usize = 24;
const USABLE_SIZE: usize = 32;
const PLUGGED_SIZE: usize = 40;
const REQUESTED_SIZE: usize = 48;
const CONFIG_SIZE: usize = 56;

/// Bytes of a request and of an answer (§5.15.6).
const REQUEST_SIZE: usize = 24;
const ANSWER_SIZE: u32 = 10;

/// What is asked (`VIRTIO_MEM_REQ_*`).
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// Who the device is.
pub const KIND: Kind = Kind { id: 24, name: "mem", class: [0, 0xff, 0], guest_config: "CONFIG_VIRTIO_MEM" };

/// Memory that can be plugged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Most memory that can be plugged, in MiB: a multiple of [`STEP_MIB`].
    pub size_mib: u64,
    /// Guest address at which the region begins. The machine says so, which places it.
    #[serde(skip)]
    pub address: u64,
}

/// What outlives a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Bytes of the region.
    pub region: u64,
    /// Bytes of it that the guest can have.
    pub usable: u64,
    /// Bytes the guest is to have plugged.
    pub requested: u64,
    /// Which blocks are plugged: eight to a byte, the first in the lowest bit.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_BITS>")]
    pub plugged: Vec<u8>,
}

/// Where a device stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Bytes of the region.
    pub region: u64,
    /// Bytes of it, from its beginning on, that the guest can have.
    pub usable: u64,
    /// Bytes that are plugged.
    pub plugged: u64,
    /// Bytes the guest is to have plugged.
    pub requested: u64,
}

/// Asks the guest to have `requested` bytes plugged, in whole blocks, of the first `usable` bytes of the region, which
/// must be there by now; what was usable before still is (§5.15.4.2). Tell the driver of it:
/// [`crate::transport::VirtioPci::change_config`] does.
pub fn request(config: &ConfigSpace, usable: u64, requested: u64) {
    let blocks = |bytes: u64| bytes.saturating_sub(bytes % BLOCK);
    config.update(|bytes| {
        let usable = blocks(usable).min(get(bytes, REGION_SIZE)).max(get(bytes, USABLE_SIZE));
        put(bytes, USABLE_SIZE, usable);
        put(bytes, REQUESTED_SIZE, blocks(requested.min(usable)));
    });
}

/// Where the device of this configuration space stands.
pub fn standing(config: &ConfigSpace) -> Standing {
    let mut bytes = [0; CONFIG_SIZE];
    config.read(0, &mut bytes);
    Standing {
        region: get(&bytes, REGION_SIZE),
        usable: get(&bytes, USABLE_SIZE),
        plugged: get(&bytes, PLUGGED_SIZE),
        requested: get(&bytes, REQUESTED_SIZE),
    }
}

impl Spec for Config {
    fn build(&self, _files: &mut dyn FdSource) -> Result<Box<dyn VirtioDevice>, BuildError> {
        let wrong =
            |what, value: u64, expected| BuildError::Value { what, value: value.to_string(), expected };
        if !(STEP_MIB..=MAX_MIB).contains(&self.size_mib) || !self.size_mib.is_multiple_of(STEP_MIB) {
            return Err(wrong("size_mib", self.size_mib, "give a multiple of 128 up to 524288"));
        }
        if self.address == 0 || !self.address.is_multiple_of(BLOCK) {
            let expected =
                "its memory is made with the machine: configure it before the machine starts, and once";
            return Err(wrong("the address", self.address, expected));
        }
        let region = self.size_mib.saturating_mul(1 << 20);
        let mut mem = Mem {
            config: ConfigSpace::new(vec![0; CONFIG_SIZE], 0..0),
            address: self.address,
            region,
            blocks: Blocks::new(region / BLOCK),
            plugged: Counter::new("plugged_blocks"),
            unplugged: Counter::new("unplugged_blocks"),
            refused: Counter::new("refused_requests"),
        };
        mem.show(0, 0);
        Ok(Box::new(mem))
    }
}

struct Mem {
    config: Arc<ConfigSpace>,
    address: u64,
    region: u64,
    blocks: Blocks,
    plugged: Arc<Counter>,
    unplugged: Arc<Counter>,
    refused: Arc<Counter>,
}

/// What a driver asks for, of as many blocks from an address on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    kind: u16,
    address: u64,
    blocks: u16,
}

/// What it is told (`VIRTIO_MEM_RESP_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Ack,
    /// It has as much as it is to have.
    Nack,
    /// The host cannot, now.
    Busy,
    /// The request makes no sense.
    Error,
    /// What the blocks are.
    Blocks(Found),
}

impl Request {
    /// Copied out once; what the driver changes afterwards is not looked at.
    fn read(chain: &Chain) -> Result<Self, ChainError> {
        let mut bytes = [0; REQUEST_SIZE];
        chain.reader().read(&mut bytes)?;
        let [k0, k1, _, _, _, _, _, _, a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, ..] = bytes;
        Ok(Self {
            kind: u16::from_le_bytes([k0, k1]),
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            blocks: u16::from_le_bytes([b0, b1]),
        })
    }
}

impl Answer {
    fn bytes(self) -> [u8; ANSWER_SIZE as usize] {
        let (kind, state) = match self {
            Self::Ack | Self::Blocks(Found::Plugged) => (0, 0),
            Self::Blocks(Found::Unplugged) => (0, 1),
            Self::Blocks(Found::Mixed) => (0, 2),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

impl Mem {
    /// Serves one request. What it asks for is done only if there is room to say so.
    fn serve(&mut self, chain: &Chain, memory: &Memory) -> Result<u32, Error> {
        let request = Request::read(chain)?;
        let mut out = chain.writer();
        if out.remaining() < ANSWER_SIZE {
            return Err(ChainError::Short.into());
        }
        let answer = self.answer(request, memory);
        if !matches!(answer, Answer::Ack | Answer::Blocks(_)) {
            self.refused.add(1);
        }
        out.write(&answer.bytes())?;
        Ok(ANSWER_SIZE)
    }

    fn answer(&mut self, request: Request, memory: &Memory) -> Answer {
        let standing = standing(&self.config);
        if request.kind == UNPLUG_ALL {
            return self.unplug_all(memory, standing.usable);
        }
        let Some(blocks) = self.blocks_of(request, standing.usable) else { return Answer::Error };
        match (request.kind, self.blocks.find(blocks.clone())) {
            (PLUG, found) => self.plug(blocks, found, &standing),
            (UNPLUG, Found::Plugged) => self.unplug(blocks, memory),
            (STATE, found) => Answer::Blocks(found),
            _ => Answer::Error,
        }
    }

    /// The blocks a request names, if there are such in the usable part of the region.
    fn blocks_of(&self, request: Request, usable: u64) -> Option<Range<u64>> {
        let offset = request.address.checked_sub(self.address)?;
        let count = u64::from(request.blocks);
        let end = offset.checked_add(count.checked_mul(BLOCK)?)?;
        let sensible = count > 0 && offset.is_multiple_of(BLOCK) && end <= usable.min(self.region);
        sensible.then_some(offset / BLOCK..end / BLOCK)
    }

    fn plug(&mut self, blocks: Range<u64>, found: Found, standing: &Standing) -> Answer {
        if found != Found::Unplugged {
            return Answer::Error;
        }
        let count = blocks.end.saturating_sub(blocks.start);
        let wanted = self.blocks.plugged().saturating_add(count).saturating_mul(BLOCK);
        if wanted > standing.requested {
            return Answer::Nack;
        }
        self.blocks.set(blocks, true);
        self.plugged.add(count);
        self.tell();
        Answer::Ack
    }

    /// Gives the blocks' pages back before the driver is told that it is rid of them.
    fn unplug(&mut self, blocks: Range<u64>, memory: &Memory) -> Answer {
        if let Err(error) = self.discard(&blocks, memory) {
            log::debug!("cannot drop unplugged memory: {error}");
            return Answer::Busy;
        }
        let before = self.blocks.plugged();
        self.blocks.set(blocks, false);
        self.unplugged.add(before.saturating_sub(self.blocks.plugged()));
        self.tell();
        Answer::Ack
    }

    /// As [`Mem::unplug`], with all there is: what was touched without having been plugged, too.
    fn unplug_all(&mut self, memory: &Memory, usable: u64) -> Answer {
        match usable / BLOCK {
            0 => Answer::Ack,
            end => self.unplug(0..end, memory),
        }
    }

    fn discard(&self, blocks: &Range<u64>, memory: &Memory) -> io::Result<()> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let start = blocks.start.checked_mul(BLOCK).and_then(|offset| offset.checked_add(self.address));
        let len = blocks.end.saturating_sub(blocks.start).checked_mul(BLOCK);
        let start = GuestAddress(start.ok_or_else(invalid)?);
        let len = len.and_then(|len| usize::try_from(len).ok()).ok_or_else(invalid)?;
        let slice = memory.get_slice(start, len).map_err(|_| invalid())?;
        let region = memory.find_region(start).ok_or_else(invalid)?;
        sys::discard(&slice, region.flags() & libc::MAP_SHARED != 0).map(drop)
    }

    /// Has the configuration space say how much is plugged.
    fn tell(&self) {
        let plugged = self.blocks.plugged().saturating_mul(BLOCK);
        self.config.update(|bytes| put(bytes, PLUGGED_SIZE, plugged));
    }

    /// Replaces the whole configuration space.
    fn show(&mut self, usable: u64, requested: u64) {
        let mut bytes = [0; CONFIG_SIZE];
        let plugged = self.blocks.plugged().saturating_mul(BLOCK);
        for (field, value) in [
            (BLOCK_SIZE, BLOCK),
            (ADDRESS, self.address),
            (REGION_SIZE, self.region),
            (USABLE_SIZE, usable),
            (PLUGGED_SIZE, plugged),
            (REQUESTED_SIZE, requested),
        ] {
            put(&mut bytes, field, value);
        }
        self.config.replace(&bytes);
    }
}

impl VirtioDevice for Mem {
    fn kind(&self) -> Kind {
        KIND
    }

    fn queues(&self) -> &[u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    fn config(&self) -> Option<Arc<ConfigSpace>> {
        Some(Arc::clone(&self.config))
    }

    fn counters(&self) -> Vec<Arc<Counter>> {
        [&self.plugged, &self.unplugged, &self.refused].map(Arc::clone).into()
    }

    fn shares_vector(&self) -> bool {
        true
    }

    fn on_queue(&mut self, index: u16, io: &mut Io<'_>) -> Result<(), Error> {
        let memory = Arc::clone(io.memory());
        io.serve(index, Notify::Batch, |chain| self.serve(chain, &memory))
    }

    fn state(&self) -> DeviceState {
        let Standing { region, usable, requested, .. } = standing(&self.config);
        DeviceState::Mem(State { region, usable, requested, plugged: self.blocks.bytes().to_vec() })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), Error> {
        let refuse = |why| {
            let source = io::Error::new(io::ErrorKind::InvalidData, why);
            Err(Error::Device { operation: "restore plugged memory", source })
        };
        let DeviceState::Mem(State { region, usable, requested, plugged }) = state else {
            return refuse("it is another device's");
        };
        if *region != self.region {
            return refuse("the region has another size: configure the one it was saved with");
        }
        let whole = usable.is_multiple_of(BLOCK) && requested.is_multiple_of(BLOCK);
        if !whole || *usable > *region || *requested > *usable {
            return refuse("its sizes make no sense");
        }
        let Some(blocks) = self.blocks.replaced(plugged, *usable / BLOCK) else {
            return refuse("its plugged blocks make no sense");
        };
        self.blocks = blocks;
        self.show(*usable, *requested);
        Ok(())
    }
}

fn get(bytes: &[u8], offset: usize) -> u64 {
    let field = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    u64::from_le_bytes(field.copied().unwrap_or_default())
}

fn put(bytes: &mut [u8], offset: usize, value: u64) {
    if let Some(field) = bytes.get_mut(offset..).and_then(|rest| rest.first_chunk_mut()) {
        *field = value.to_le_bytes();
    }
}
