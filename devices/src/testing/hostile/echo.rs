//! The least device there is: what a chain has to read is written to what it has to write. With it the ring is alone.

use crate::chain::Chain;
use crate::device::{Io, Kind, VirtioDevice};
use crate::error::Error;
use crate::ring::Notify;
use crate::testing::load::Load;
use crate::testing::{Driver, Posted};
use crate::virtio::{DeviceState, rng};

/// Queues of few entries and of many.
const SIZES: [u16; 2] = [16, 256];

struct Device;

impl VirtioDevice for Device {
    fn kind(&self) -> Kind {
        Kind { id: 42, name: "echo", class: [0xff, 1, 2], guest_config: "CONFIG_NONE" }
    }

    fn queues(&self) -> &[u16] {
        &SIZES
    }

    fn on_queue(&mut self, index: u16, io: &mut Io<'_>) -> Result<(), Error> {
        io.serve(index, Notify::Batch, echo)
    }

    fn state(&self) -> DeviceState {
        DeviceState::Rng(rng::State {})
    }

    fn restore(&mut self, _: &DeviceState) -> Result<(), Error> {
        Ok(())
    }
}

fn echo(chain: &Chain) -> Result<u32, Error> {
    let (mut from, mut to) = (chain.reader(), chain.writer());
    let mut bytes = vec![0; usize::try_from(from.remaining().min(to.remaining()).min(4096)).unwrap()];
    from.read(&mut bytes)?;
    to.write(&bytes)?;
    Ok(to.passed())
}

/// Says something and hears it again.
pub struct Echo;

fn said(number: u16) -> [u8; 16] {
    (0x1111_2222_3333_4444_5555_6666_7777_8888 ^ u128::from(number)).to_le_bytes()
}

impl Load for Echo {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(Device)
    }

    fn queue(&self) -> u16 {
        0
    }

    fn post(&self, driver: &mut Driver, number: u16) -> Posted {
        driver.post(&[&said(number)], &[16])
    }

    fn check(&mut self, driver: &Driver, number: u16, posted: &Posted, len: u32) {
        assert_eq!((len, driver.written(posted)), (16, said(number).to_vec()));
    }

    fn carried_out(&mut self) -> Option<u64> {
        None
    }
}
