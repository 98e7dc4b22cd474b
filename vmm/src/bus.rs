//! Where a virtual CPU's accesses go: the machine's few ports, and PCI.
//!
//! Total: any address, any length. What nobody answers for reads as all ones and ignores writes.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mvm_devices::serial::Serial;

use crate::exit::Exit;
use crate::layout;
use crate::metrics::Counters;
use crate::pci_bus::PciBus;
use crate::serial_port::SerialPort;
use crate::status::{Event, Stream, now};

/// Most milestones a guest may report; the rest is ignored, so that it cannot flood the stream.
const MAX_MARKS: u32 = 64;
/// `SLP_EN` of the sleep control register.
const SLEEP_ENABLE: u8 = 1 << 5;
/// pvpanic: events this machine understands.
const PANICKED: u8 = 1 << 0;
/// pvpanic: the guest crashed and a crash kernel takes over.
const CRASH_LOADED: u8 = 1 << 1;
/// Keyboard controller command that pulses the CPU's reset line.
const KEYBOARD_RESET: u8 = 0xfe;
/// Keyboard controller status: all ones, as if absent, but ready for a command, so that nobody waits.
const KEYBOARD_STATUS: u8 = 0xfd;

/// The machine as its CPUs see it.
#[derive(Debug)]
pub(crate) struct Bus {
    /// Functions on PCI bus 0.
    pub pci: PciBus,
    /// First serial port.
    pub serial: Option<SerialPort>,
    /// Events for the process that started the machine.
    pub status: Arc<Stream>,
    /// What happened so far.
    pub counters: Arc<Counters>,
    marks: AtomicU32,
}

impl Bus {
    /// Puts the parts together.
    pub(crate) fn new(
        pci: PciBus,
        serial: Option<SerialPort>,
        status: Arc<Stream>,
        counters: Arc<Counters>,
    ) -> Self {
        Self { pci, serial, status, counters, marks: AtomicU32::new(0) }
    }

    /// A read of guest physical memory that no RAM answers.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        Counters::add(&self.counters.mmio_reads);
        data.fill(0xff);
        if !self.pci.read(address, data) {
            Counters::add(&self.counters.unclaimed);
        }
    }

    /// A write of guest physical memory that no RAM answers.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        Counters::add(&self.counters.mmio_writes);
        if !self.pci.write(address, data) {
            Counters::add(&self.counters.unclaimed);
        }
    }

    /// `IN`: each byte of `data` is one read of `port`.
    pub(crate) fn port_in(&self, port: u16, data: &mut [u8]) {
        Counters::add(&self.counters.port_reads);
        for byte in data {
            *byte = self.port_read(port);
        }
    }

    /// `OUT`: each byte of `data` is one write of `port`. Some writes end the machine.
    pub(crate) fn port_out(&self, port: u16, data: &[u8]) -> Option<Exit> {
        Counters::add(&self.counters.port_writes);
        data.iter().find_map(|byte| self.port_write(port, *byte))
    }

    fn port_read(&self, port: u16) -> u8 {
        match port {
            layout::PANIC_PORT => PANICKED | CRASH_LOADED,
            layout::KEYBOARD_PORT => KEYBOARD_STATUS,
            layout::SLEEP_CONTROL_PORT | layout::SLEEP_STATUS_PORT => 0,
            _ => self.serial_register(port).map_or(0xff, |(serial, register)| {
                serial.lock().unwrap_or_else(PoisonError::into_inner).read(register)
            }),
        }
    }

    fn port_write(&self, port: u16, value: u8) -> Option<Exit> {
        match port {
            layout::BOOT_TIMER_PORT => self.mark(value),
            layout::SLEEP_CONTROL_PORT => {
                let asleep = value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == layout::SLEEP_TYPE_S5;
                return asleep.then_some(Exit::Shutdown);
            }
            layout::RESET_PORT => return (value == layout::RESET_VALUE).then_some(Exit::Reboot),
            layout::KEYBOARD_PORT => return (value == KEYBOARD_RESET).then_some(Exit::Reboot),
            layout::PANIC_PORT => return (value & PANICKED != 0).then_some(Exit::GuestPanic),
            _ => {
                if let Some((serial, register)) = self.serial_register(port) {
                    serial.lock().unwrap_or_else(PoisonError::into_inner).write(register, value);
                }
            }
        }
        None
    }

    fn serial_register(&self, port: u16) -> Option<(&Mutex<Serial>, u8)> {
        let register = u8::try_from(port.checked_sub(layout::SERIAL_PORT)?).ok().filter(|&r| r < 8)?;
        Some((&self.serial.as_ref()?.port, register))
    }

    fn mark(&self, value: u8) {
        let ns = now();
        if self.marks.fetch_add(1, Ordering::Relaxed) >= MAX_MARKS {
            self.marks.store(MAX_MARKS, Ordering::Relaxed);
            return;
        }
        self.status.send(&match value {
            0 => Event::GuestFirstInstruction { ns },
            _ => Event::GuestMark { value, ns },
        });
    }
}
