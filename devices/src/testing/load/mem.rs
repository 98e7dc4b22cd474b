//! A region of memory whose driver plugs it block after block.

use std::collections::HashMap;

use super::{Counted, Load, ROOM};
use crate::device::VirtioDevice;
use crate::testing::{Driver, Posted};
use crate::virtio::{Spec, mem};

/// Plugs a block a request.
pub(super) struct Mem {
    plugged: Counted,
}

impl Default for Mem {
    fn default() -> Self {
        Self { plugged: Counted::new("plugged_blocks") }
    }
}

impl Load for Mem {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let config = mem::Config { size_mib: u64::from(ROOM) * 2, address: 1 << 32 };
        let device = config.build(&mut HashMap::new()).unwrap();
        let all = u64::from(ROOM) * mem::BLOCK;
        mem::request(&device.config().unwrap(), all, all);
        self.plugged.watch(device.as_ref());
        device
    }

    fn queue(&self) -> u16 {
        0
    }

    fn post(&self, driver: &mut Driver, number: u16) -> Posted {
        let mut request = [0; 24];
        let address = (1 << 32) + u64::from(number) * mem::BLOCK;
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16] = 1;
        driver.post(&[&request], &[10])
    }

    fn check(&mut self, driver: &Driver, _: u16, posted: &Posted, len: u32) {
        assert_eq!((len, driver.written(posted)), (10, vec![0; 10]));
    }

    fn carried_out(&mut self) -> Option<u64> {
        Some(self.plugged.sum())
    }

    fn probe(&self, driver: &mut Driver, _: u16) -> Posted {
        let mut request = [0; 24];
        request[0] = 3; // VIRTIO_MEM_REQ_STATE
        request[8..16].copy_from_slice(&(1u64 << 32).to_le_bytes());
        request[16] = 1;
        driver.post(&[&request], &[10])
    }

    fn check_probe(&mut self, driver: &Driver, _: u16, posted: &Posted, len: u32) {
        assert_eq!((len, &driver.written(posted)[..2]), (10, &[0, 0][..]), "plugged or not, it is told");
    }
}
