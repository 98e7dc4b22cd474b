//! A vsock with a parent that accepts what the guest dials, and refuses some of it.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::{Load, build};
use crate::device::VirtioDevice;
use crate::fd::FdSlot;
use crate::sys;
use crate::testing::{Driver, Posted};
use crate::virtio::DeviceSpec;
use crate::virtio::vsock::dialer::DialServer;
use crate::virtio::vsock::{Config, GuestCid};

/// Connections that are kept; what is beyond them is refused.
const MOST: usize = 32;

/// Ends connections that there are not, which asks for no answer.
#[derive(Default)]
pub(super) struct Vsock {
    parent: Option<DialServer>,
    streams: Vec<UnixStream>,
}

impl Vsock {
    /// Answers the oldest question, if there is one: every third is refused.
    fn answer(&mut self) {
        let Some(parent) = &self.parent else { return };
        let Ok(Some(dial)) = parent.recv() else { return };
        if dial.id % 3 == 2 || self.streams.len() == MOST {
            // A device that reads no answers gets none.
            let _ = parent.refuse(dial.id);
            return;
        }
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let _ = parent.accept(dial.id, far.as_fd());
        self.streams.push(near);
    }
}

impl Load for Vsock {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let (parent, dialer) = DialServer::pair().unwrap();
        sys::file::set_nonblocking(parent.as_fd()).unwrap();
        self.parent = Some(parent);
        self.streams.clear();
        let config = Config { dialer: Some(FdSlot(3)), ..Config::new(GuestCid::FIRST) };
        build(&DeviceSpec::Vsock(config), vec![(3, dialer)])
    }

    fn queue(&self) -> u16 {
        1
    }

    fn post(&self, driver: &mut Driver, number: u16) -> Posted {
        let mut header = [0; 44];
        header[0] = 3; // from the guest
        header[8] = 2; // to the host
        header[16..18].copy_from_slice(&number.to_le_bytes());
        header[20] = 1;
        header[28] = 1; // a stream
        header[30] = 3; // VIRTIO_VSOCK_OP_RST
        driver.post(&[&header], &[])
    }

    fn check(&mut self, _: &Driver, _: u16, _: &Posted, len: u32) {
        assert_eq!(len, 0);
    }

    fn carried_out(&mut self) -> Option<u64> {
        None
    }

    fn host(&mut self, what: u8, much: u16) {
        let last = self.streams.len().wrapping_sub(1);
        let stream = self.streams.get_mut(usize::from(much & 0x1f).min(last));
        // Streams that are full or over take and give nothing.
        match (what % 4, stream) {
            (1, Some(stream)) => drop(stream.write(&vec![0x5a; usize::from(much)])),
            (2, Some(stream)) => drop(stream.read(&mut vec![0; usize::from(much)])),
            (3, Some(_)) => drop(self.streams.pop()),
            _ => self.answer(),
        }
    }
}
