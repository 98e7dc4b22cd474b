//! virtio-rng: host entropy for the guest (VIRTIO 1.2 §5.4).
//!
//! One queue, no configuration space. The driver posts writable buffers; the device fills them.

use serde::{Deserialize, Serialize};

use crate::chain::Chain;
use crate::device::{Io, Kind, VirtioDevice};
use crate::error::{ChainError, Error};
use crate::fd::FdSource;
use crate::ring::Notify;
use crate::sys;
use crate::virtio::{BuildError, DeviceState, Spec};

/// Most bytes served per request. The guest chooses buffer sizes, so the host must choose a bound:
/// descriptors may overlap and claim gigabytes that are not there.
const MAX_BYTES: u32 = 64 * 1024;

/// Who the device is.
pub const KIND: Kind =
    Kind { id: 4, name: "rng", class: [0xff, 0, 0], guest_config: "CONFIG_HW_RANDOM_VIRTIO" };

/// An entropy device; nothing to configure.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {}

/// An entropy device remembers nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {}

impl Spec for Config {
    fn build(&self, _files: &mut dyn FdSource) -> Result<Box<dyn VirtioDevice>, BuildError> {
        Ok(Box::new(Rng))
    }
}

struct Rng;

impl VirtioDevice for Rng {
    fn kind(&self) -> Kind {
        KIND
    }

    fn queues(&self) -> &[u16] {
        &[64]
    }

    fn on_queue(&mut self, index: u16, io: &mut Io<'_>) -> Result<(), Error> {
        io.serve(index, Notify::Batch, fill)
    }

    fn state(&self) -> DeviceState {
        DeviceState::Rng(State {})
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), Error> {
        match state {
            DeviceState::Rng(State {}) => Ok(()),
            _ => Err(Error::device("restore host entropy")(std::io::ErrorKind::InvalidData.into())),
        }
    }
}

fn fill(chain: &Chain) -> Result<u32, Error> {
    if chain.reader().remaining() != 0 {
        return Err(ChainError::Malformed("entropy request with readable bytes").into());
    }
    let mut out = chain.writer();
    let mut bytes = [0; 256];
    let mut left = out.remaining().min(MAX_BYTES);
    while left > 0 {
        let n = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        let part = bytes.get_mut(..n).unwrap_or_default();
        sys::random(part).map_err(Error::device("read host entropy"))?;
        out.write(part)?;
        left = left.saturating_sub(u32::try_from(n).unwrap_or(u32::MAX));
    }
    Ok(out.passed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Harness;

    fn harness() -> Harness {
        Harness::new(Config {}.build(&mut std::collections::HashMap::new()).unwrap())
    }

    #[test]
    fn fills_every_writable_byte_and_reports_the_count() {
        let mut vm = harness();
        let buffer = vm.driver(0).post(&[], &[16, 100]);
        vm.kick(0);
        assert_eq!(vm.driver(0).take(), Some((buffer.head, 116)));
        let bytes = vm.driver(0).written(&buffer);
        assert_ne!(bytes, vec![0; 116], "116 random bytes are never all zero");
        assert_eq!(vm.interrupts(0), 1);
    }

    #[test]
    fn c116_any_buffer_gets_a_random_byte() {
        let mut vm = harness();
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..64 {
            for pieces in [&[1][..], &[0, 1], &[1, 0], &[1, 1]] {
                let posted = vm.driver(0).post(&[], pieces);
                vm.kick(0);
                let len: u32 = pieces.iter().sum();
                assert_eq!(vm.driver(0).take(), Some((posted.head, len)));
                seen.extend(vm.driver(0).written(&posted));
            }
        }
        assert!(seen.len() > 100, "320 random bytes are hardly ever of so few values: {}", seen.len());
    }

    #[test]
    fn serves_at_most_64_kib_of_a_huge_request() {
        let mut vm = harness();
        let buffer = vm.driver(0).post(&[], &[100_000]);
        vm.kick(0);
        assert_eq!(vm.driver(0).take(), Some((buffer.head, MAX_BYTES)));
    }

    #[test]
    fn a_readable_buffer_is_given_back_unused_and_the_next_request_works() {
        let mut vm = harness();
        let bad = vm.driver(0).post(&[b"entropy, please"], &[8]);
        let good = vm.driver(0).post(&[], &[8]);
        vm.kick(0);
        assert_eq!(vm.driver(0).take(), Some((bad.head, 0)));
        assert_eq!(vm.driver(0).take(), Some((good.head, 8)));
        assert!(!vm.asked_for_reset());
    }

    #[test]
    fn a_state_of_another_device_is_refused() {
        let mut rng = Config {}.build(&mut std::collections::HashMap::new()).unwrap();
        let other = DeviceState::Console(crate::virtio::console::State {});
        assert!(rng.restore(&other).is_err());
        rng.restore(&rng.state()).unwrap();
    }
}
