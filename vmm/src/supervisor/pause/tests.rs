//! Holding devices of which one does not come back.

use mvm_devices::io_loop::IoLoop;

use super::*;
use crate::pci_bus::tests::fixture;
use crate::pci_bus::tests::stuck::{PATIENCE, stuck};

/// Whether each device is held, by number.
fn held(bus: &PciBus) -> Vec<bool> {
    let mut held = Vec::new();
    bus.for_each_virtio(|_, device| held.push(format!("{:?}", device.function).contains("Paused")));
    held
}

#[test]
fn devices_are_held_and_let_go_on_together() {
    let fixture = fixture();
    fixture.start_driver(1);
    fixture.start_driver(2);
    let bus = Arc::new(fixture.bus);
    assert_eq!(hold(&bus, |bus| bus, PATIENCE), Ok(()));
    assert_eq!(held(&bus), [true, true]);
    assert_eq!(release(&bus), Ok(()));
    assert_eq!(held(&bus), [false, false]);
}

#[test]
fn one_device_that_does_not_come_back_lets_all_go_on() {
    let fixture = fixture();
    let own = IoLoop::spawn("stuck").unwrap();
    let (device, inside, go) = stuck();
    fixture.add(device, &own);
    for device in [1, 2, 3] {
        fixture.start_driver(device);
    }
    fixture.kick(3);
    inside.recv_timeout(PATIENCE).unwrap();

    let bus = Arc::new(fixture.bus);
    let error = hold(&bus, |bus| bus, Duration::from_millis(50)).unwrap_err();
    assert!(error.contains("did not complete its last request"), "{error}");
    let mut seen = Vec::new();
    assert_eq!(bus.for_each_virtio(|number, _| seen.push(number)), 1, "the stuck one is left out");
    assert_eq!((seen, held(&bus)), (vec![1, 2], vec![false, false]));
    // Again: it is still stuck, and that is said.
    assert!(hold(&bus, |bus| bus, PATIENCE).unwrap_err().contains("busy"));
    assert_eq!(held(&bus), [false, false]);

    go.send(()).unwrap();
    // Held and let go on, it looks at its queue once more.
    inside.recv_timeout(PATIENCE).unwrap();
    // And at every later look, of which there is one each time it is let go on.
    for _ in 0..8 {
        go.send(()).unwrap();
    }
    let end = Instant::now() + PATIENCE;
    while held(&bus).len() < 3 {
        assert!(Instant::now() < end, "the thread does not leave the device");
    }
    assert_eq!(held(&bus), [false; 3], "whoever abandoned it lets it go on");
    assert_eq!(hold(&bus, |bus| bus, PATIENCE), Ok(()));
    assert_eq!(held(&bus), [true; 3]);
}
