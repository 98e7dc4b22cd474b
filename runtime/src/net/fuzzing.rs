//! Ways in for the fuzz targets: what the kernel's tables and files say.

use super::netlink::fuzzing;

/// A resolver's configuration.
pub fn resolver(text: &str) -> bool {
    super::dns::reachable(text).is_some()
}

/// A datagram of the kernel's: how many entries there are in it.
pub fn netlink(bytes: &[u8]) -> usize {
    fuzzing::entries(bytes)
}
