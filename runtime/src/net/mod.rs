//! A machine's network as the host sees it.
//!
//! An engine hands over a network name space: [`scan`] reads it, [`twin`] puts a guest in the place of each link,
//! [`watch`] tells when it changes, [`forward_localhost`] makes its localhost the guest's. A person names a network:
//! [`NetRequest::connect`] makes it so.

mod bridge;
mod choice;
mod connection;
mod dns;
mod forward;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod netlink;
mod netns;
mod nft;
mod port;
mod scan;
mod tap;
mod tcp;
#[cfg(test)]
mod tests;
mod twin;
mod watch;

pub(crate) use bridge::{DEFAULT_GUESTS, MACHINES as BRIDGE_MACHINES, PORTS as BRIDGE_PORTS};
pub use bridge::{NotASubnet, Subnet, sweep, sweep_leases};
pub use choice::{Choice, Net, NotANet, OpenTap, TapNet, mac_of};
pub use connection::{Connection, NetRequest};
pub use forward::{PortForward, forward_localhost, remove_forward};
pub use netns::Netns;
pub use nft::Transport;
pub use port::{NotAPort, Publish};
pub use scan::{Link, Network, scan};
pub use tap::open_tap;
pub use tcp::{NotAProfile, TcpProfile};
pub use twin::{SpareTap, Twin, TwinTrace, twin};
pub use watch::{Watch, watch};
