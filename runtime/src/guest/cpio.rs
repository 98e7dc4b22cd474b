//! A cpio archive in the `newc` format, as the kernel unpacks it at boot: just the agent as `/init`.

/// Type bits of a directory, a regular file and a character device, with their permissions.
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CONSOLE: u32 = 0o020_600;

/// Everything the agent needs before it mounts file systems of its own.
pub(super) fn archive(agent: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(agent.len() + 1024);
    for name in ["dev", "proc", "sys", "run", "tmp"] {
        entry(&mut out, &Entry { name, mode: DIRECTORY, device: (0, 0), data: &[] });
    }
    // The kernel opens this for the first process before anything is mounted.
    entry(&mut out, &Entry { name: "dev/console", mode: CONSOLE, device: (5, 1), data: &[] });
    entry(&mut out, &Entry { name: "init", mode: PROGRAM, device: (0, 0), data: agent });
    entry(&mut out, &Entry { name: "TRAILER!!!", mode: 0, device: (0, 0), data: &[] });
    out
}

struct Entry<'a> {
    name: &'a str,
    mode: u32,
    device: (u32, u32),
    data: &'a [u8],
}

fn entry(out: &mut Vec<u8>, entry: &Entry<'_>) {
    // Inode numbers only tell hard links apart, and there are none.
    let fields = [
        out.len(),
        entry.mode as usize,
        0,
        0,
        1,
        0,
        entry.data.len(),
        0,
        0,
        entry.device.0 as usize,
        entry.device.1 as usize,
        entry.name.len() + 1,
        0,
    ];
    out.extend_from_slice(b"070701");
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(entry.name.as_bytes());
    out.push(0);
    pad(out);
    out.extend_from_slice(entry.data);
    pad(out);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_data_are_aligned_and_the_trailer_ends_it() {
        let bytes = archive(b"agent");
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"070701"));
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 8);
        assert!(text.trim_end_matches('\0').ends_with("TRAILER!!!"));
    }

    #[test]
    fn the_agent_is_whole_and_executable() {
        let agent: Vec<u8> = (0..=255).collect();
        let bytes = archive(&agent);
        assert!(bytes.windows(256).any(|window| window == agent.as_slice()));
        let init = bytes.windows(5).position(|window| window == b"init\0").unwrap();
        let header = std::str::from_utf8(&bytes[init - 110..init]).unwrap();
        assert_eq!(u32::from_str_radix(&header[14..22], 16).unwrap(), PROGRAM);
        assert_eq!(u32::from_str_radix(&header[54..62], 16).unwrap(), 256);
    }
}
