//! A device whose requests the host does not complete.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use mvm_devices::device::{Io, Kind, VirtioDevice};
use mvm_devices::error::Error;
use mvm_devices::virtio::{DeviceState, rng};

/// Longest a test waits for what must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits in each kick, as in a request that the host does not complete, but not while it is started.
struct Stuck {
    started: bool,
    entered: Sender<()>,
    leave: Receiver<()>,
}

impl VirtioDevice for Stuck {
    fn kind(&self) -> Kind {
        rng::KIND
    }

    fn queues(&self) -> &[u16] {
        &[64]
    }

    fn on_queue(&mut self, _: u16, _: &mut Io<'_>) -> Result<(), Error> {
        if std::mem::replace(&mut self.started, true) {
            self.entered.send(()).unwrap();
            self.leave.recv_timeout(PATIENCE).unwrap();
        }
        Ok(())
    }

    fn state(&self) -> DeviceState {
        DeviceState::Rng(rng::State {})
    }

    fn restore(&mut self, _: &DeviceState) -> Result<(), Error> {
        Ok(())
    }
}

/// The device, where it tells of each kick, and where it is let go on.
pub(crate) fn stuck() -> (Box<dyn VirtioDevice>, Receiver<()>, Sender<()>) {
    let ((entered, inside), (go, leave)) = (channel(), channel());
    (Box::new(Stuck { started: false, entered, leave }), inside, go)
}
