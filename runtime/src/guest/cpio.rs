//! A cpio archive in the `newc` format, as the kernel unpacks it at boot.

/// Type bits of a directory, a regular file, a symbolic link and a character device, with permissions.
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;
const DEVICE: u32 = 0o020_600;

/// An initial RAM disk in the making.
#[derive(Clone, Debug, Default)]
pub struct Archive(Vec<u8>);

impl Archive {
    /// What every first process needs: mount points, and the console, which the kernel opens for it before
    /// anything is mounted.
    pub fn new() -> Self {
        let mut archive = Self::default();
        for name in ["dev", "proc", "sys", "run", "tmp"] {
            archive.directory(name);
        }
        archive.entry("dev/console", DEVICE, (5, 1), &[]);
        archive
    }

    /// Adds a directory; parents first.
    pub fn directory(&mut self, name: &str) -> &mut Self {
        self.entry(name, DIRECTORY, (0, 0), &[])
    }

    /// Adds an executable file.
    pub fn program(&mut self, name: &str, content: &[u8]) -> &mut Self {
        self.entry(name, PROGRAM, (0, 0), content)
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, name: &str, target: &str) -> &mut Self {
        self.entry(name, LINK, (0, 0), target.as_bytes())
    }

    /// The archive's bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.0
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> &mut Self {
        // The position serves as inode number: it only has to differ, as there are no hard links.
        let (inode, mode) = (self.0.len(), mode as usize);
        let (major, minor) = (device.0 as usize, device.1 as usize);
        let fields = [inode, mode, 0, 0, 1, 0, data.len(), 0, 0, major, minor, name.len() + 1, 0];
        self.0.extend_from_slice(b"070701");
        for field in fields {
            self.0.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(0);
        self.pad();
        self.0.extend_from_slice(data);
        self.pad();
        self
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(agent: &[u8]) -> Vec<u8> {
        let mut archive = Archive::new();
        archive.program("init", agent);
        archive.finish()
    }

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
    fn a_program_is_whole_and_executable() {
        let agent: Vec<u8> = (0..=255).collect();
        let bytes = archive(&agent);
        assert!(bytes.windows(256).any(|window| window == agent.as_slice()));
        let init = bytes.windows(5).position(|window| window == b"init\0").unwrap();
        let header = std::str::from_utf8(&bytes[init - 110..init]).unwrap();
        assert_eq!(u32::from_str_radix(&header[14..22], 16).unwrap(), PROGRAM);
        assert_eq!(u32::from_str_radix(&header[54..62], 16).unwrap(), 256);
    }
}
