//! The flat guest as an image that QEMU boots: entered by PVH, it reports its first instruction and halts.

/// Port of the report, as with our own flat guest.
pub(super) const PORT: u16 = 0x3f0;
const ADDRESS: u64 = 0x10_0000;
/// Offsets in the file.
const NOTE: usize = 0x200;
const CODE: usize = 0x1000;
/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const PHYS32_ENTRY: u32 = 18;

/// An ELF image with a note that names the entry.
pub(super) fn image() -> Vec<u8> {
    let code = code();
    let note = note();
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version 1
    for word in [ADDRESS, 64, 0] {
        image.extend(word.to_le_bytes()); // entry, program headers, section headers
    }
    // No flags; sizes and number of: header, program headers, section headers.
    image.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    let load = [CODE as u64, ADDRESS, ADDRESS, code.len() as u64, code.len() as u64, 4096];
    let notes = [NOTE as u64, 0, 0, note.len() as u64, note.len() as u64, 4];
    for (kind, flags, words) in [(1u32, 5u32, load), (4, 4, notes)] {
        image.extend(kind.to_le_bytes());
        image.extend(flags.to_le_bytes());
        words.iter().for_each(|word| image.extend(word.to_le_bytes()));
    }
    image.resize(NOTE, 0);
    image.extend(note);
    image.resize(CODE, 0);
    image.extend(code);
    image
}

fn note() -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4, 8, PHYS32_ENTRY] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(ADDRESS.to_le_bytes());
    note
}

/// `mov dx, PORT; mov al, '*'; out dx, al; hlt; jmp to it`, in 32-bit mode.
fn code() -> Vec<u8> {
    let [low, high] = PORT.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, b'*', 0xee, 0xf4, 0xeb, 0xfd]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_point_at_note_and_code() {
        let image = image();
        assert_eq!(&image[NOTE + 12..NOTE + 16], b"Xen\0");
        assert_eq!(image[CODE..], code());
        assert_eq!(image[64 + 8..64 + 16], (CODE as u64).to_le_bytes());
        assert_eq!(image[64 + 56 + 8..64 + 64 + 8], (NOTE as u64).to_le_bytes());
    }
}
