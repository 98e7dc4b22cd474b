//! virtio-net: a network card on a tap (VIRTIO 1.2 §5.1).
//!
//! Queue 0 receives, queue 1 transmits. Checksums and the cutting of large frames are left to whoever can
//! do them last: the header before each frame carries that work across.

mod header;
mod mac;
mod receive;
#[cfg(any(test, feature = "testing"))]
pub mod stand_in;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;

use std::os::fd::AsRawFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net as abi;

pub use mac::{InvalidMac, MacAddress};

use crate::config_space::ConfigSpace;
use crate::counter::Counter;
use crate::device::{EventSet, Io, Kind, VirtioDevice};
use crate::error::Error;
use crate::fd::{FdSlot, FdSource};
use crate::ring::{Notify, Served};
use crate::throttle::{Meters, Throttle, What};
use crate::virtio::{BuildError, DeviceState, Spec};
use header::{Agreed, bit};
use receive::{Receiver, Turn};
use tap::{KernelTap, Tap};
use transmit::Transmitter;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUES: [u16; 2] = [256, 256];
/// Least MTU a driver may be told (§5.1.4.1): what IPv4 asks of every link.
const MIN_MTU: u16 = 68;
/// What the loop says of the tap, and of the time being up that frames are held for.
const FRAMES: u32 = 0;
const TIME: u32 = 1;
/// Offset of `status` in the configuration space, and its one bit in use.
const STATUS: usize = 6;
const LINK_UP: u8 = 1;

/// Who the device is.
pub const KIND: Kind = Kind { id: 1, name: "net", class: [0x02, 0, 0], guest_config: "CONFIG_VIRTIO_NET" };

/// A network card on a tap the host made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The tap, made with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`. Header size and offloads are set here.
    pub tap: FdSlot,
    /// The card's address; without it the guest makes one up.
    #[serde(default)]
    pub mac: Option<MacAddress>,
    /// The link's MTU in bytes, 68 or more; without it the guest takes 1500.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Drop what the guest sends from another address than `mac`.
    #[serde(default)]
    pub only_own_mac: bool,
}

/// A network card remembers nothing: frames under way may be lost, as on any network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {}

impl Spec for Config {
    fn build(&self, files: &mut dyn FdSource) -> Result<Box<dyn VirtioDevice>, BuildError> {
        self.check()?;
        let what = "a network card's tap";
        let file = files.take(self.tap).map_err(|source| BuildError::File { what, source })?;
        Ok(Box::new(Net::new(self, KernelTap::open(file)?)))
    }
}

impl Config {
    fn check(&self) -> Result<(), BuildError> {
        let wrong = |what, value, expected| Err(BuildError::Value { what, value, expected });
        if let Some(mtu) = self.mtu.filter(|mtu| *mtu < MIN_MTU) {
            return wrong("MTU", mtu.to_string(), "68 to 65535");
        }
        if self.only_own_mac && self.mac.is_none() {
            return wrong("only_own_mac", "true".into(), "a mac to compare with");
        }
        Ok(())
    }
}

/// What becomes of the tap's readiness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    /// No driver.
    Idle,
    /// The loop tells of frames.
    Watched,
    /// Frames wait in the tap until the driver posts buffers.
    Starved,
    /// Frames wait in the tap until a meter lets them pass.
    Held,
    /// The tap was deleted. That is for good.
    Gone,
}

struct Net<T> {
    tap: T,
    link: Link,
    mac: Option<MacAddress>,
    mtu: Option<u16>,
    config: Arc<ConfigSpace>,
    /// What the space showed at first, with the link up.
    fresh: Vec<u8>,
    /// The driver knows of another card or link, and has to be told.
    changed: bool,
    receiver: Receiver,
    transmitter: Transmitter,
    throttle: Throttle,
}

impl<T: Tap> Net<T> {
    fn new(config: &Config, tap: T) -> Self {
        let fresh = config_bytes(config);
        Self {
            tap,
            link: Link::Idle,
            mac: config.mac,
            mtu: config.mtu,
            config: ConfigSpace::new(fresh.clone(), 0..0),
            fresh,
            changed: false,
            receiver: Receiver::new(config.mtu),
            transmitter: Transmitter::new(config.mac.filter(|_| config.only_own_mac)),
            throttle: Throttle::default(),
        }
    }

    fn receive(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        let Some((ring, interrupt)) = io.ring_and_interrupt(RECEIVE) else {
            return self.starve(io);
        };
        match self.receiver.turn(ring, interrupt, self.tap.as_fd(), &mut self.throttle)? {
            // The tap stays ready, so the loop comes back; a kept frame makes no file ready.
            Turn::Budget if self.receiver.is_waiting() => io.serve_again(RECEIVE),
            Turn::Budget | Turn::Drained => {}
            Turn::Starved => self.starve(io)?,
            Turn::Held => {
                self.look_away(Link::Held, io)?;
                self.throttle.look_again(TIME, io)?;
            }
            Turn::Gone => self.lose(io)?,
        }
        Ok(())
    }

    fn transmit(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        let Self { transmitter, throttle, tap, .. } = self;
        let served = io.serve_until_held(TRANSMIT, Notify::Batch, |chain| {
            if !throttle.admits(What::NetSend) {
                return Err(Error::Held);
            }
            transmitter.send(chain, tap.as_fd(), throttle)
        })?;
        if served == Served::Held { self.throttle.look_again(TIME, io) } else { Ok(()) }
    }

    /// There are no buffers for frames.
    fn starve(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        self.look_away(Link::Starved, io)
    }

    /// Looks away from the tap, which would wake the loop for as long as frames wait.
    fn look_away(&mut self, until: Link, io: &mut Io<'_>) -> Result<(), Error> {
        if self.link == Link::Watched {
            self.link = until;
            io.unwatch(self.tap.as_fd().as_raw_fd())?;
        }
        Ok(())
    }

    /// What frames in the tap waited for may be there.
    fn look_back(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        self.link = Link::Watched;
        io.watch(self.tap.as_fd().as_raw_fd(), FRAMES, EventSet::IN)?;
        if let Some(ring) = io.ring(RECEIVE) {
            ring.disable_kicks()?;
        }
        self.receive(io)
    }

    /// The driver posted buffers.
    fn resume(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        if self.link == Link::Starved {
            return self.look_back(io);
        }
        if self.link == Link::Watched && self.receiver.is_waiting() {
            return self.receive(io);
        }
        Ok(())
    }

    /// The tap is gone: the driver sees the cable pulled.
    fn lose(&mut self, io: &mut Io<'_>) -> Result<(), Error> {
        if self.link == Link::Watched {
            io.unwatch(self.tap.as_fd().as_raw_fd())?;
        }
        self.link = Link::Gone;
        self.config.update(|bytes| {
            if let Some(status) = bytes.get_mut(STATUS) {
                *status &= !LINK_UP;
            }
        });
        io.interrupt().config_changed();
        Ok(())
    }
}

impl<T: Tap> VirtioDevice for Net<T> {
    fn kind(&self) -> Kind {
        KIND
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        let mut features = bit(abi::VIRTIO_NET_F_CSUM)
            | bit(abi::VIRTIO_NET_F_GUEST_CSUM)
            | bit(abi::VIRTIO_NET_F_GUEST_TSO4)
            | bit(abi::VIRTIO_NET_F_GUEST_TSO6)
            | bit(abi::VIRTIO_NET_F_GUEST_ECN)
            | bit(abi::VIRTIO_NET_F_HOST_TSO4)
            | bit(abi::VIRTIO_NET_F_HOST_TSO6)
            | bit(abi::VIRTIO_NET_F_HOST_ECN)
            | bit(abi::VIRTIO_NET_F_MRG_RXBUF)
            | bit(abi::VIRTIO_NET_F_STATUS);
        if self.tap.segments_udp() {
            features |= bit(abi::VIRTIO_NET_F_GUEST_USO4)
                | bit(abi::VIRTIO_NET_F_GUEST_USO6)
                | bit(abi::VIRTIO_NET_F_HOST_USO);
        }
        if self.mac.is_some() {
            features |= bit(abi::VIRTIO_NET_F_MAC);
        }
        if self.mtu.is_some() {
            features |= bit(abi::VIRTIO_NET_F_MTU);
        }
        features
    }

    fn accepts(&self, features: u64) -> bool {
        Agreed::from_features(features).is_consistent()
    }

    fn config(&self) -> Option<Arc<ConfigSpace>> {
        Some(Arc::clone(&self.config))
    }

    fn counters(&self) -> Vec<Arc<Counter>> {
        let (rx, tx) = (&self.receiver.counters, &self.transmitter.counters);
        [
            &rx.frames,
            &rx.bytes,
            &rx.dropped,
            &rx.starved,
            &tx.frames,
            &tx.bytes,
            &tx.dropped,
            &tx.malformed,
            &tx.spoofed,
            &self.throttle.held,
        ]
        .map(Arc::clone)
        .into()
    }

    fn start(&mut self, features: u64, io: &mut Io<'_>) -> Result<(), Error> {
        let agreed = Agreed::from_features(features);
        self.receiver.agreed = agreed;
        self.transmitter.agreed = agreed;
        self.throttle.begin();
        if std::mem::take(&mut self.changed) {
            io.interrupt().config_changed();
        }
        if self.link == Link::Gone {
            return Ok(());
        }
        self.tap.prepare(agreed).map_err(Error::device("set a tap's offloads"))?;
        if let Some(ring) = io.ring(RECEIVE) {
            ring.disable_kicks()?;
        }
        self.link = Link::Watched;
        io.watch(self.tap.as_fd().as_raw_fd(), FRAMES, EventSet::IN)
    }

    fn on_queue(&mut self, index: u16, io: &mut Io<'_>) -> Result<(), Error> {
        match index {
            RECEIVE => self.resume(io),
            TRANSMIT => self.transmit(io),
            _ => Ok(()),
        }
    }

    fn on_event(&mut self, token: u32, _events: EventSet, io: &mut Io<'_>) -> Result<(), Error> {
        if token != TIME {
            // An error or hang-up shows in the next read.
            return self.receive(io);
        }
        self.throttle.rang();
        if self.link == Link::Held {
            self.look_back(io)?;
        }
        self.transmit(io)
    }

    fn charge_at(&mut self, meters: Meters) {
        self.throttle.charge_at(meters);
    }

    fn stop(&mut self) {
        if self.link != Link::Gone {
            self.link = Link::Idle;
        }
        self.receiver.reset();
        self.transmitter.agreed = Agreed::default();
    }

    fn state(&self) -> DeviceState {
        DeviceState::Net(State {})
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), Error> {
        let DeviceState::Net(State {}) = state else {
            return Err(Error::device("restore a network card")(std::io::ErrorKind::InvalidData.into()));
        };
        // The space holds what the saved driver read. Its tap may have gone, but this one is there.
        self.changed = self.config.replace(&self.fresh);
        Ok(())
    }
}

/// The configuration space (§5.1.4), up to `mtu`.
fn config_bytes(config: &Config) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(12);
    bytes.extend(config.mac.map_or([0; 6], MacAddress::bytes));
    bytes.extend([LINK_UP, 0]);
    bytes.extend(0u16.to_le_bytes()); // max_virtqueue_pairs, not offered
    bytes.extend(config.mtu.unwrap_or(0).to_le_bytes());
    bytes
}
