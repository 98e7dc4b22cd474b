//! The host bridge at 00:00.0: what kernels expect to find first on a PCI bus. It does nothing.

use super::{Bar, CONFIG_SPACE_SIZE, ConfigChange, Doorbell, PciFunction};

/// Vendor and device of a generic PCI Express host bridge (Red Hat, 0x0008).
const IDENTITY: [u8; 4] = [0x36, 0x1b, 0x08, 0x00];
/// Revision 0, programming interface 0, subclass 0 (host), class 6 (bridge).
const CLASS: [u8; 4] = [0, 0, 0, 6];

/// A host bridge without registers of its own.
#[derive(Debug)]
pub struct HostBridge {
    config: Box<[u8; CONFIG_SPACE_SIZE]>,
}

impl HostBridge {
    /// A host bridge.
    pub fn new() -> Self {
        let mut config = Box::new([0; CONFIG_SPACE_SIZE]);
        let header = IDENTITY.iter().chain(&[0; 4]).chain(&CLASS);
        config.iter_mut().zip(header).for_each(|(byte, value)| *byte = *value);
        Self { config }
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn config(&self) -> &[u8; CONFIG_SPACE_SIZE] {
        &self.config
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) -> ConfigChange {
        ConfigChange::None
    }

    fn bars(&self) -> Vec<Bar> {
        Vec::new()
    }

    fn assign_bar(&mut self, _index: u8, _address: u64) {}

    fn bar_sizes(&self) -> Vec<(u8, u64)> {
        Vec::new()
    }

    fn read_bar(&mut self, _index: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_bar(&mut self, _index: u8, _offset: u64, _data: &[u8]) {}

    fn doorbells(&self) -> Vec<Doorbell> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_host_bridge_and_stays_one() {
        let mut bridge = HostBridge::new();
        for offset in 0..CONFIG_SPACE_SIZE {
            assert_eq!(bridge.write_config(offset, &[0xff]), ConfigChange::None);
        }
        let config = bridge.config();
        assert_eq!(config[..4], IDENTITY);
        assert_eq!((config[0xb], config[0xa], config[0xe]), (6, 0, 0));
        assert!(config[0x10..0x40].iter().all(|byte| *byte == 0), "no BAR, no capability, no interrupt pin");
    }
}
