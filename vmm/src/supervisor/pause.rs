//! Holding a running machine: its CPUs, then its devices, or neither.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::bus::Bus;
use crate::gate::Gate;
use crate::pci_bus::{PciBus, Plugged};
use crate::vcpu::Running;

/// How long virtual CPUs may take to be held, and devices after them.
const PAUSE_TIME: Duration = Duration::from_secs(1);

/// Holds everything: from then on nothing touches guest memory. If something does not let itself be held, all of
/// it goes on and the reason is returned.
pub(super) fn pause(gate: &Gate, bus: &Arc<Bus>, vcpus: &[Running]) -> Result<(), String> {
    if gate.is_paused() {
        return Ok(()); // all of it, devices as well
    }
    let kick = || vcpus.iter().for_each(Running::kick);
    let held = if gate.pause(vcpus.len(), Instant::now() + PAUSE_TIME, kick) {
        hold(bus, |bus| &bus.pci, PAUSE_TIME)
    } else {
        Err("the virtual CPUs did not come to a halt in time".to_owned())
    };
    if held.is_err() {
        gate.resume();
    }
    held
}

/// Lets everything go on.
pub(super) fn resume(gate: &Gate, bus: &PciBus) -> Result<(), String> {
    let result = release(bus);
    gate.resume();
    result
}

/// Holds every device of `pci` in `bus`, within `time`; or else lets all of them go on.
///
/// A device is held once it has completed what it is doing, which the host may never let it. So it is done on a
/// thread, which cleans up after itself when it is no longer waited for.
fn hold<B: Send + Sync + 'static>(
    bus: &Arc<B>,
    pci: fn(&B) -> &PciBus,
    time: Duration,
) -> Result<(), String> {
    let abandoned = Arc::new(AtomicBool::new(false));
    let (done, held) = mpsc::channel();
    let holding = {
        let (bus, abandoned) = (Arc::clone(bus), Arc::clone(&abandoned));
        move || {
            let result = hold_each(pci(&bus), &abandoned);
            // Nobody listens if it took too long.
            let _ = done.send(result);
        }
    };
    let result = match std::thread::Builder::new().name("pause".to_owned()).spawn(holding) {
        Ok(_) => held.recv_timeout(time).unwrap_or_else(|_| {
            Err("a device did not complete its last request in time: the host's file is slow or stuck".into())
        }),
        Err(error) => Err(format!("cannot start a thread: {error}")),
    };
    if result.is_err() {
        abandoned.store(true, Ordering::SeqCst);
        // What cannot be let go on now is held by the thread, which sees that it is abandoned.
        let _ = release(pci(bus));
    }
    result
}

fn hold_each(pci: &PciBus, abandoned: &AtomicBool) -> Result<(), String> {
    let mut result = Ok(());
    let busy = pci.for_each_virtio(|_, device| {
        if abandoned.load(Ordering::SeqCst) {
            return;
        }
        if let Err(error) = device.function.pause() {
            result = Err(describe("hold", device, &error));
        }
        // Under the slot's lock: either this or the one who abandoned it lets the device go on.
        if abandoned.load(Ordering::SeqCst)
            && let Err(error) = device.function.resume()
        {
            log::error!("{}", describe("let go on", device, &error));
        }
    });
    if busy > 0 { Err("a device is busy".to_owned()) } else { result }
}

/// Lets every device go on that is held.
fn release(pci: &PciBus) -> Result<(), String> {
    let mut result = Ok(());
    let busy = pci.for_each_virtio(|_, device| {
        if let Err(error) = device.function.resume() {
            result = Err(describe("let go on", device, &error));
        }
    });
    if busy > 0 { Err("a device is busy".to_owned()) } else { result }
}

fn describe(what: &str, device: &Plugged, error: &dyn std::error::Error) -> String {
    format!("cannot {what} {}: {error}", device.function.kind().name)
}

#[cfg(test)]
mod tests;
