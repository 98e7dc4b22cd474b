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
    /// Counts in a register and in memory, and writes the lowest byte of each number to the serial port. Reports a
    /// panic if the two are not the same.
    Count,
    /// Sets its local APIC's timer to a deadline 2^31 ticks away, marks its time (1), and waits for the interrupt to
    /// power off.
    Alarm,
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
            Program::Count => count(),
            Program::Alarm => alarm(),
        });
        code
    }
}

fn count() -> Vec<u8> {
    let [low, high] = layout::SERIAL_PORT.to_le_bytes();
    let mut code = vec![0x31, 0xdb, 0xbf, 0x00, 0x00, 0x20, 0x00]; // xor ebx, ebx; mov edi, 2 MiB
    code.extend([0x48, 0xff, 0xc3, 0x48, 0xff, 0x07]); // step: inc rbx; inc qword [rdi]
    code.extend([0x48, 0x39, 0x1f, 0x75, 0x14]); // cmp [rdi], rbx; jne panic
    code.extend([0x66, 0xba, low, high, 0x88, 0xd8, 0xee]); // mov dx, port; mov al, bl; out dx, al
    // Exits take about as long everywhere, instructions do not.
    code.extend([0xb9, 20, 0, 0, 0, 0xe4, 0x80]); // mov ecx, 20; again: in al, 0x80
    code.extend([0xff, 0xc9, 0x75, 0xfa]); // dec ecx; jnz again
    code.extend([0xeb, 0xe1]); // jmp step
    code.extend(out(layout::PANIC_PORT, 1));
    code
}

fn alarm() -> Vec<u8> {
    let wrmsr = |register: u32, value: u32| {
        let mut code = vec![0xb9];
        code.extend(register.to_le_bytes()); // mov ecx, register
        code.push(0xb8);
        code.extend(value.to_le_bytes()); // mov eax, value
        code.extend([0x31, 0xd2, 0x0f, 0x30]); // xor edx, edx; wrmsr
        code
    };
    let mut set_up = vec![0xbf, 0x00, 0x04, 0x21, 0x00]; // mov edi, gate 0x40 of a table at 0x210000
    set_up.extend([0x66, 0x89, 0x07, 0x48, 0xc1, 0xe8, 0x10]); // mov [rdi], ax; shr rax, 16
    set_up.extend([0x66, 0x89, 0x47, 0x06]); // mov [rdi + 6], ax
    set_up.extend([0x66, 0xc7, 0x47, 0x02, 0x10, 0x00]); // mov word [rdi + 2], the code segment
    set_up.extend([0x66, 0xc7, 0x47, 0x04, 0x00, 0x8e]); // mov word [rdi + 4], an interrupt gate that is present
    set_up.extend([0x48, 0xc7, 0xc4, 0x00, 0x00, 0x30, 0x00]); // mov rsp, 3 MiB
    set_up.extend([0x66, 0xc7, 0x04, 0x24, 0xff, 0x0f]); // mov word [rsp], the table's limit
    set_up.extend([0x48, 0xc7, 0x44, 0x24, 0x02, 0x00, 0x00, 0x21, 0x00]); // mov qword [rsp + 2], its address
    set_up.extend([0x0f, 0x01, 0x1c, 0x24]); // lidt [rsp]
    set_up.extend(wrmsr(0x1b, 0xfee0_0d00)); // x2APIC mode, on the first CPU
    set_up.extend(wrmsr(0x80f, 0x1ff)); // the APIC is on
    set_up.extend(wrmsr(0x832, 0x4_0040)); // its timer has a deadline, and vector 0x40
    set_up.extend([0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0]); // rdtsc; shl rdx, 32; or rax, rdx
    set_up.extend([0xb9, 0x00, 0x00, 0x00, 0x80, 0x48, 0x01, 0xc8, 0x48, 0x89, 0xc2]); // add rax, 1 << 31; mov rdx, rax
    set_up.extend([0x48, 0xc1, 0xea, 0x20, 0xb9, 0xe0, 0x06, 0x00, 0x00, 0x0f, 0x30]); // the deadline: wrmsr
    set_up.extend(out(layout::BOOT_TIMER_PORT, 1));
    set_up.extend([0xfb, 0xf4, 0xeb, 0xfd]); // sti; hlt; jmp to it
    let handler = u32::try_from(set_up.len()).unwrap_or(0);
    let mut code = vec![0x48, 0x8d, 0x05]; // lea rax, [handler]
    code.extend(handler.to_le_bytes());
    code.extend(set_up);
    code.extend(out(layout::SLEEP_CONTROL_PORT, layout::SLEEP_TYPE_S5 << 2 | 1 << 5));
    code
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
