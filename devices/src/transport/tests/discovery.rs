//! What the capabilities say (§4.1.2, §4.1.4).

use super::{SIZES, device, machine};
use crate::pci::{Bar, ConfigChange, PciFunction};
use crate::testing::pci::{BAR_ADDRESS, PciDriver};

fn config16(vm: &PciDriver, at: usize) -> u16 {
    u16::from_le_bytes(vm.function.config()[at..at + 2].try_into().unwrap())
}

#[test]
fn c_059_vendor_and_device_id_are_those_of_a_modern_device() {
    let (vm, _) = machine();
    assert_eq!(config16(&vm, 0), 0x1af4);
    assert_eq!(config16(&vm, 2), 0x1040 + 42);
}

#[test]
fn c_060_revision_and_subsystem_are_not_those_of_a_transitional_device() {
    let (vm, _) = machine();
    assert_eq!(vm.function.config()[8], 1);
    assert_eq!(config16(&vm, 0x2c), 0x1af4);
    assert!(config16(&vm, 0x2e) >= 0x40);
    assert_eq!(vm.function.config()[9..12], [2, 1, 0xff], "interface, subclass, base class");
    assert_eq!(vm.function.config()[0x3d], 0, "no interrupt pin");
}

#[test]
fn c_061_a_64_bit_field_is_written_whole_or_by_halves() {
    let (mut vm, _) = machine();
    assert!(vm.negotiate(vm_features()));
    vm.set32(0x20, 0x1111_0000);
    vm.set32(0x24, 0x22);
    assert_eq!(u64::from_le_bytes(vm.read(vm.common, 0x20)), 0x22_1111_0000);
    vm.write(vm.common, 0x28, &0x33_4444_0000u64.to_le_bytes());
    assert_eq!((vm.get32(0x28), vm.get32(0x2c)), (0x4444_0000, 0x33));
    vm.set32(0x2c, 0x55);
    assert_eq!(u64::from_le_bytes(vm.read(vm.common, 0x28)), 0x55_4444_0000, "the low half stays");
}

fn vm_features() -> u64 {
    1 << 32
}

#[test]
fn c_062_every_capability_counts_its_own_length() {
    let (vm, _) = machine();
    let capabilities = vm.capabilities();
    let lengths: Vec<_> =
        capabilities.iter().filter(|c| c.id == 9).map(|c| (c.bytes[3], c.bytes[2])).collect();
    assert_eq!(lengths, [(1, 16), (2, 20), (3, 16), (4, 16), (5, 20)]);
    let mut ends: Vec<_> = capabilities
        .iter()
        .map(|c| (c.at, c.at + if c.id == 9 { usize::from(c.bytes[2]) } else { 12 }))
        .collect();
    ends.sort_unstable();
    assert!(ends.windows(2).all(|pair| pair[0].1 <= pair[1].0), "capabilities overlap: {ends:x?}");
    assert!(ends.iter().all(|(at, end)| at % 4 == 0 && *at >= 0x40 && *end <= 0x100));
}

#[test]
fn c_063_c_074_c_076_blocks_are_aligned_and_inside_the_bar() {
    let (vm, _) = machine();
    let size = vm.function.bar_sizes()[0].1;
    let blocks = [vm.common, vm.notify, vm.isr, vm.device.unwrap(), vm.table(), vm.pending()];
    for block in blocks {
        assert_eq!(block.bar, 0);
        assert_eq!(block.offset % 8, 0);
        assert!(block.len > 0 && block.offset + block.len <= size, "{block:?}");
    }
    assert!(vm.common.len >= 0x38);
    assert_eq!(vm.device.unwrap().len, 12);
}

#[test]
fn c_073_the_doorbell_of_every_queue_lies_in_the_notify_block() {
    let (mut vm, _) = machine();
    assert!(vm.multiplier.is_power_of_two());
    assert_eq!(vm.notify.offset % 2, 0);
    for queue in 0..u16::try_from(SIZES.len()).unwrap() {
        vm.set16(0x16, queue);
        let at = u64::from(vm.get16(0x1e)) * u64::from(vm.multiplier);
        assert!(vm.notify.len >= at + 2);
        let doorbell = &vm.function.doorbells()[usize::from(queue)];
        assert_eq!((doorbell.bar, doorbell.offset), (vm.notify.bar, vm.notify.offset + at));
    }
}

#[test]
fn a_device_without_configuration_has_no_capability_for_it() {
    struct Bare(Box<dyn crate::device::VirtioDevice>);
    impl crate::device::VirtioDevice for Bare {
        fn kind(&self) -> crate::device::Kind {
            self.0.kind()
        }
        fn queues(&self) -> &[u16] {
            self.0.queues()
        }
        fn on_queue(&mut self, _: u16, _: &mut crate::device::Io<'_>) -> Result<(), crate::error::Error> {
            Ok(())
        }
        fn state(&self) -> crate::virtio::DeviceState {
            self.0.state()
        }
        fn restore(&mut self, _: &crate::virtio::DeviceState) -> Result<(), crate::error::Error> {
            Ok(())
        }
    }
    let mut vm = PciDriver::new(Box::new(Bare(device().0)));
    assert_eq!(vm.device, None);
    let mut data = [0xaa; 4];
    vm.function.read_bar(0, 0x2000, &mut data);
    assert_eq!(data, [0; 4]);
}

#[test]
fn p_05_the_capability_walk_ends_inside_the_first_256_bytes() {
    let (vm, _) = machine();
    let capabilities = vm.capabilities();
    assert_eq!(capabilities.len(), 6);
    assert!(capabilities.iter().all(|c| c.at < 0x100));
    assert_eq!(config16(&vm, 6) & 0x10, 0x10, "the status register announces the list");
}

#[test]
fn the_bar_is_sized_by_writing_ones_and_moves_where_it_is_put() {
    let (mut vm, _) = machine();
    let _ = vm.function.write_config(4, &0u16.to_le_bytes());
    assert_eq!(vm.function.bars(), []);
    assert_eq!(vm.function.write_config(0x10, &[0xff; 4]), ConfigChange::None, "nothing decodes it");
    assert_eq!(vm.function.config()[0x10..0x14], 0xffff_8000u32.to_le_bytes());
    let _ = vm.function.write_config(0x10, &0xd000_0000u32.to_le_bytes());
    assert_eq!(vm.function.write_config(4, &2u16.to_le_bytes()), ConfigChange::Decoding);
    assert_eq!(vm.function.bars(), [Bar { index: 0, address: 0xd000_0000, size: 0x8000 }]);
    assert_eq!(vm.function.write_config(0x10, &0xd001_0000u32.to_le_bytes()), ConfigChange::Decoding);
    assert_eq!(vm.function.write_config(0x10, &0xd001_0000u32.to_le_bytes()), ConfigChange::None);
}

#[test]
fn unimplemented_bars_and_the_rom_read_as_zero_whatever_is_written() {
    let (mut vm, _) = machine();
    for at in [0x14, 0x18, 0x1c, 0x20, 0x24, 0x30] {
        let _ = vm.function.write_config(at, &[0xff; 4]);
        assert_eq!(vm.function.config()[at..at + 4], [0; 4]);
    }
}

#[test]
fn assigning_the_bar_leaves_decoding_off() {
    let (mut vm, _) = machine();
    assert_eq!(vm.function.bars(), [Bar { index: 0, address: BAR_ADDRESS, size: 0x8000 }]);
    vm.function.assign_bar(0, 0xc000_0000);
    assert_eq!(vm.function.bars(), []);
}

#[test]
fn bytes_outside_every_block_read_as_ones_and_ignore_writes() {
    let (mut vm, _) = machine();
    for (bar, offset) in [(0, 0x6000), (0, 0x7fff), (0, 0x8000), (0, u64::MAX), (1, 0), (5, 0x3000), (255, 0)]
    {
        let mut data = [0; 8];
        vm.function.write_bar(bar, offset, &[1; 8]);
        vm.function.read_bar(bar, offset, &mut data);
        assert_eq!(data, [0xff; 8], "bar {bar} offset {offset:#x}");
    }
}
