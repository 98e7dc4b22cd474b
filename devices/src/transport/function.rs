//! The transport as the PCI bus drives it: configuration space and the BAR.

use super::VirtioPci;
use super::layout::{self, BAR, BAR_SIZE, NOTIFY_MULTIPLIER, Region, window};
use super::status::Step;
use crate::pci::{Bar, CONFIG_SPACE_SIZE, ConfigChange, Doorbell, PciFunction};

/// Offset of message control in the MSI-X capability.
const MESSAGE_CONTROL: usize = 2;

impl PciFunction for VirtioPci {
    fn config(&self) -> &[u8; CONFIG_SPACE_SIZE] {
        self.header.bytes()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) -> ConfigChange {
        let decoded = self.bars();
        let control = self.message_control();
        self.header.write(offset, data);
        if control != self.message_control() {
            self.msix.set_control(self.message_control());
        }
        self.after_window_write(offset, data.len());
        if decoded == self.bars() { ConfigChange::None } else { ConfigChange::Decoding }
    }

    fn bars(&self) -> Vec<Bar> {
        if !self.header.memory_enabled() {
            return Vec::new();
        }
        let bars = self.header.memory_bars();
        bars.map(|(index, address, size)| Bar { index, address: address.into(), size: size.into() }).collect()
    }

    fn assign_bar(&mut self, index: u8, address: u64) {
        // The machine's window for BARs lies below 4 GiB; anything else would not be decoded.
        self.header.place_bar(index, u32::try_from(address).unwrap_or(0));
    }

    fn bar_sizes(&self) -> Vec<(u8, u64)> {
        vec![(BAR, BAR_SIZE.into())]
    }

    fn read_bar(&mut self, index: u8, offset: u64, data: &mut [u8]) {
        match layout::region(offset).filter(|_| index == BAR) {
            Some((Region::Isr, 0)) if data.len() == 1 => data.fill(self.events.take_isr()),
            Some((region, at)) => self.peek(region, at, data),
            None => data.fill(0xff),
        }
    }

    fn write_bar(&mut self, index: u8, offset: u64, data: &[u8]) {
        let Some((region, at)) = layout::region(offset).filter(|_| index == BAR) else { return };
        match region {
            Region::Common => {
                let step = self.registers.write(at, data);
                self.take_step(step);
            }
            Region::Device => {
                if let (Some(config), Ok(at)) = (&self.config, usize::try_from(at)) {
                    config.write(at, data);
                }
            }
            Region::Notify => self.kick(at),
            Region::Table => self.msix.write_table(at, data),
            Region::Isr | Region::Pending => {}
        }
    }

    fn doorbells(&self) -> Vec<Doorbell> {
        let kicks = (0u16..).zip(&self.kicks);
        // Without a duplicate the write exits to `write_bar` instead: slower, not wrong.
        kicks
            .filter_map(|(queue, kick)| {
                let event = kick.try_clone().ok()?;
                Some(Doorbell { bar: BAR, offset: layout::doorbell(queue), event })
            })
            .collect()
    }
}

impl VirtioPci {
    /// Reads registers without side effects. What is not a register of its region reads as 0.
    fn peek(&mut self, region: Region, at: u64, data: &mut [u8]) {
        data.fill(0);
        match region {
            Region::Common => {
                let changes = self.config.as_ref().map_or(0, |config| config.changes());
                self.registers.read(at, changes, data);
            }
            Region::Isr if at == 0 && data.len() == 1 => data.fill(self.events.isr()),
            Region::Device => {
                if let (Some(config), Ok(at)) = (&self.config, usize::try_from(at)) {
                    config.read(at, data);
                }
            }
            Region::Table => self.msix.read_table(at, data),
            Region::Pending => self.msix.read_pending(at, data),
            Region::Isr | Region::Notify => {}
        }
    }

    fn take_step(&mut self, step: Step) {
        match step {
            Step::Ignore | Step::Set(_) => {}
            Step::Reset => self.reset(),
            Step::Negotiated => self.finish_negotiation(),
            Step::Ready => self.activate(),
        }
    }

    /// A doorbell that KVM did not take: the value written says nothing, the address names the queue.
    fn kick(&mut self, at: u64) {
        let multiplier = u64::from(NOTIFY_MULTIPLIER);
        let queue = at.checked_div(multiplier).filter(|_| at.checked_rem(multiplier) == Some(0));
        match queue.and_then(|queue| self.kicks.get(usize::try_from(queue).ok()?)) {
            // Fails only when the event is as signalled as can be.
            Some(kick) => drop(kick.write(1)),
            None => self.counters.kicks_ignored.one(),
        }
    }

    pub(super) fn message_control(&self) -> u16 {
        u16::from_le_bytes(self.header.get(self.msix_at.saturating_add(MESSAGE_CONTROL)))
    }

    /// Executes what a write to the configuration access window asked for (§4.1.4.9).
    fn after_window_write(&mut self, offset: usize, len: usize) {
        let touches = |from: usize, to: usize| {
            let (start, end) = (self.window_at.saturating_add(from), self.window_at.saturating_add(to));
            offset < end && offset.saturating_add(len) > start
        };
        if !touches(window::BAR, window::END) {
            return;
        }
        let to_data = touches(window::DATA, window::END);
        let data_at = self.window_at.saturating_add(window::DATA);
        let Some((offset, len)) = self.window_target() else { return };
        let mut data: [u8; 4] = self.header.get(data_at);
        let (Some(part), Some((region, at))) = (data.get_mut(..len), layout::region(offset)) else { return };
        if to_data {
            self.write_bar(BAR, offset, part);
        }
        self.peek(region, at, part);
        self.header.set(data_at, part);
    }

    /// The access the window describes, if there is one: BAR 0, 1, 2 or 4 bytes, naturally aligned.
    fn window_target(&self) -> Option<(u64, usize)> {
        let field = |at: usize| u32::from_le_bytes(self.header.get(self.window_at.saturating_add(at)));
        let [bar] = self.header.get(self.window_at.saturating_add(window::BAR));
        let (offset, len) = (field(window::OFFSET), field(window::LENGTH));
        if bar != BAR || !matches!(len, 1 | 2 | 4) || offset.checked_rem(len) != Some(0) {
            return None;
        }
        Some((offset.into(), usize::try_from(len).ok()?))
    }
}
