//! The little of ACPI Machine Language (ACPI 6.5 §20) that describes this machine.
//!
//! Each function returns the encoding of one object; objects nest by concatenation.

/// Memory or I/O a device decodes, for `_CRS`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Resource {
    /// Fixed 32-bit memory range.
    Memory { start: u32, length: u32 },
    /// 32-bit memory window that a bridge passes on.
    Window { start: u32, length: u32 },
    /// The one bus, number 0.
    Bus0,
    /// I/O ports.
    Ports { start: u16, length: u8 },
}

/// `Scope (\_SB)`.
pub(super) fn system_bus(content: &[Vec<u8>]) -> Vec<u8> {
    let mut body = b"\\_SB_".to_vec();
    body.extend(content.concat());
    [vec![0x10], with_length(&body)].concat()
}

/// `Device (name)`.
pub(super) fn device(name: &[u8; 4], content: &[Vec<u8>]) -> Vec<u8> {
    let mut body = name.to_vec();
    body.extend(content.concat());
    [vec![0x5b, 0x82], with_length(&body)].concat()
}

/// `Name (name, value)`.
pub(super) fn name(name: &[u8; 4], value: &[u8]) -> Vec<u8> {
    [&[0x08], name.as_slice(), value].concat()
}

/// An integer below 256.
pub(super) fn byte(value: u8) -> Vec<u8> {
    match value {
        0 | 1 => vec![value],
        _ => vec![0x0a, value],
    }
}

/// A string without NULs.
pub(super) fn string(text: &str) -> Vec<u8> {
    [&[0x0d], text.as_bytes(), &[0]].concat()
}

/// A compressed EISA identifier such as `PNP0A08`: three letters, four hexadecimal digits.
pub(super) fn eisa_id(text: &[u8; 7]) -> Vec<u8> {
    let [a, b, c, digits @ ..] = text;
    let letter = |byte: u8| u32::from(byte & 0x1f);
    let hex = |byte: u8| char::from(byte).to_digit(16).unwrap_or(0);
    let digits = digits.iter().fold(0, |sum, digit| (sum << 4) | hex(*digit));
    let value = (letter(*a) << 26) | (letter(*b) << 21) | (letter(*c) << 16) | digits;
    [&[0x0c], value.to_be_bytes().as_slice()].concat()
}

/// A package of at most 255 elements.
pub(super) fn package(elements: &[Vec<u8>]) -> Vec<u8> {
    let count = u8::try_from(elements.len()).unwrap_or(u8::MAX);
    let body = [vec![count], elements.concat()].concat();
    [vec![0x12], with_length(&body)].concat()
}

/// `_CRS`: a resource template in a buffer.
pub(super) fn resources(list: &[Resource]) -> Vec<u8> {
    let mut template: Vec<u8> = list.iter().flat_map(|resource| resource.encode()).collect();
    template.extend([0x79, 0x00]); // end tag, no checksum
    let size = [&[0x0b], u16::try_from(template.len()).unwrap_or(0).to_le_bytes().as_slice()].concat();
    let body = [size, template].concat();
    name(b"_CRS", &[vec![0x11], with_length(&body)].concat())
}

impl Resource {
    fn encode(self) -> Vec<u8> {
        match self {
            Resource::Memory { start, length } => {
                let mut bytes = vec![0x86, 9, 0, 1]; // fixed memory, writable
                bytes.extend(start.to_le_bytes());
                bytes.extend(length.to_le_bytes());
                bytes
            }
            Resource::Window { start, length } => {
                // Memory, fixed limits, positive decode, not cached, writable.
                let mut bytes = vec![0x87, 23, 0, 0, 0x0c, 0x01];
                let end = start.saturating_add(length.saturating_sub(1));
                for value in [0, start, end, 0, length] {
                    bytes.extend(value.to_le_bytes());
                }
                bytes
            }
            Resource::Bus0 => {
                let mut bytes = vec![0x88, 13, 0, 2, 0x0c, 0];
                for value in [0u16, 0, 0, 0, 1] {
                    bytes.extend(value.to_le_bytes());
                }
                bytes
            }
            Resource::Ports { start, length } => {
                let mut bytes = vec![0x47, 1]; // 16-bit decode
                bytes.extend(start.to_le_bytes());
                bytes.extend(start.to_le_bytes());
                bytes.extend([1, length]);
                bytes
            }
        }
    }
}

/// `body` behind its package length, which counts itself.
fn with_length(body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(body.len() + 3);
    if body.len() < 63 {
        bytes.push(low_byte(body.len() + 1));
    } else if body.len() + 2 < 1 << 12 {
        let total = body.len() + 2;
        bytes.extend([0x40 | (low_byte(total) & 0xf), low_byte(total >> 4)]);
    } else {
        let total = body.len() + 3;
        bytes.extend([0x80 | (low_byte(total) & 0xf), low_byte(total >> 4), low_byte(total >> 12)]);
    }
    bytes.extend(body);
    bytes
}

fn low_byte(value: usize) -> u8 {
    value.to_le_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eisa_identifiers_are_compressed_as_the_specification_shows() {
        assert_eq!(eisa_id(b"PNP0A08"), [0x0c, 0x41, 0xd0, 0x0a, 0x08]);
        assert_eq!(eisa_id(b"PNP0501"), [0x0c, 0x41, 0xd0, 0x05, 0x01]);
    }

    #[test]
    fn package_lengths_count_themselves() {
        assert_eq!(with_length(&[7; 3]), [4, 7, 7, 7]);
        assert_eq!(with_length(&[0; 62]).first(), Some(&63));
        let long = with_length(&[0; 63]);
        assert_eq!((long.len(), long[0], long[1]), (65, 0x41, 4));
        let longer = with_length(&[0; 5000]);
        let total = usize::from(longer[0] & 0xf) | usize::from(longer[1]) << 4 | usize::from(longer[2]) << 12;
        assert_eq!((longer.len(), total, longer[0] >> 6), (5003, 5003, 2));
    }

    #[test]
    fn soft_off_is_a_package_of_small_integers() {
        let s5 = name(b"_S5_", &package(&[byte(5), byte(0)]));
        assert_eq!(s5, [0x08, b'_', b'S', b'5', b'_', 0x12, 5, 2, 0x0a, 5, 0]);
    }
}
