//! The transport driven through configuration space and BAR, as a guest does it.

use std::collections::HashMap;

use crate::device::VirtioDevice;
use crate::testing::pci::PciDriver;
use crate::virtio::Spec;

fn entropy() -> Box<dyn VirtioDevice> {
    crate::virtio::rng::Config {}.build(&mut HashMap::new()).unwrap()
}

#[test]
fn a_driver_finds_the_device_starts_it_and_gets_its_bytes() {
    let mut vm = PciDriver::new(entropy());
    let mut queues = vm.start(true);
    let posted = queues[0].post(&[], &[32]);
    vm.kick(0);
    vm.sink.wait(1, 1);
    assert_eq!(queues[0].take(), Some((posted.head, 32)));
    assert_eq!(vm.status(), 15);
}
