//! Guests of a few instructions, which run on every KVM: for tests, for measuring a machine without a kernel,
//! and to find out whether a host's KVM works at all.

use crate::layout;

/// Where the code lies and starts.
const ADDRESS: u64 = layout::HIGH_MEMORY;
/// Offset of the code in the image: a page of headers first, so that the rest can be mapped.
const CODE_OFFSET: usize = 4096;

/// What a guest does after its first instruction, which is a time stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Waits for an interrupt that never comes.
    Halt,
    /// Runs without leaving the guest.
    Spin,
    /// Powers off.
    PowerOff,
    /// Resets.
    Reset,
    /// Reports a panic.
    Panic,
    /// Shuts the CPU down by a triple fault.
    TripleFault,
    /// Reads a port that nobody answers, again and again.
    ReadPorts,
}

impl Program {
    /// An ELF image, 64-bit and flat.
    pub fn image(self) -> Vec<u8> {
        elf(&self.code())
    }

    fn code(self) -> Vec<u8> {
        let mut code = out(layout::BOOT_TIMER_PORT, 0);
        code.extend(match self {
            Program::Halt => vec![0xf4, 0xeb, 0xfd],  // hlt; jmp to it
            Program::Spin => vec![0xeb, 0xfe],        // jmp to itself
            Program::TripleFault => vec![0x0f, 0x0b], // ud2, and no descriptor table to handle it
            Program::PowerOff => out(layout::SLEEP_CONTROL_PORT, layout::SLEEP_TYPE_S5 << 2 | 1 << 5),
            Program::Reset => out(layout::RESET_PORT, layout::RESET_VALUE),
            Program::Panic => out(layout::PANIC_PORT, 1),
            Program::ReadPorts => vec![0xe4, 0x80, 0xeb, 0xfc], // in al, 0x80; jmp to it
        });
        code
    }
}

/// `mov dx, port; mov al, value; out dx, al`.
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// An ELF image of one segment that holds `code`.
fn elf(code: &[u8]) -> Vec<u8> {
    let size = code.len() as u64;
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version 1
    for word in [ADDRESS, 64, 0] {
        image.extend(word.to_le_bytes()); // entry, program headers, section headers
    }
    // No flags; sizes and number of: header, program headers, section headers.
    image.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    image.extend([1, 0, 0, 0, 5, 0, 0, 0]); // PT_LOAD, readable and executable
    for word in [CODE_OFFSET as u64, ADDRESS, ADDRESS, size, size, layout::PAGE_SIZE] {
        image.extend(word.to_le_bytes());
    }
    image.resize(CODE_OFFSET, 0);
    image.extend(code);
    image
}
