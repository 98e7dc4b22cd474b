//! Who a machine is told to be: what no other machine has, though it may go on from the same memory.

use std::time::{SystemTime, UNIX_EPOCH};

use mvm_protocol::Identity;

use crate::failure::{Context, Failure};

/// The identity of a machine that is to be called `hostname`, with randomness and an id that nobody else has.
///
/// # Errors
/// The host gives no randomness: the machine would share what it makes of it with its clones.
pub fn fresh_identity(hostname: String) -> Result<Identity, Failure> {
    let (mut entropy, mut id) = ([0; 32], [0; 16]);
    let filled = mvm_devices::sys::random(&mut entropy).and_then(|()| mvm_devices::sys::random(&mut id));
    filled.context(|| "cannot get random bytes".to_owned())?;
    Ok(Identity { hostname, machine_id: as_version_4(id), wall_clock_ns: wall_clock_ns(), entropy })
}

/// An id in the form that machine-id(5) asks for: that of a random UUID (RFC 9562 §5.4).
fn as_version_4(bytes: [u8; 16]) -> u128 {
    const VERSION: u128 = 0xf << 76;
    const VARIANT: u128 = 0x3 << 62;
    u128::from_be_bytes(bytes) & !VERSION & !VARIANT | 0x4 << 76 | 0x2 << 62
}

/// The host's wall clock, in nanoseconds since the Unix epoch.
pub(super) fn wall_clock_ns() -> u64 {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(wall.as_nanos()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_machines_share_id_or_randomness() {
        let [one, other] = ["a", "a"].map(|name| fresh_identity(name.to_owned()).unwrap());
        assert_ne!(one.machine_id, other.machine_id);
        assert_ne!(one.entropy, other.entropy);
    }

    #[test]
    fn a_machines_id_is_a_random_uuid() {
        let text = format!("{:032x}", as_version_4([0xff; 16]));
        assert_eq!(text, "ffffffffffff4fffbfffffffffffffff");
        assert_eq!(format!("{:032x}", as_version_4([0; 16])), "00000000000040008000000000000000");
    }
}
