//! Ways in for the fuzz targets: what is in a snapshot beside the machine.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::manifest::Manifest;
use super::packed;

/// Largest file that is unpacked.
const MOST: u64 = 1 << 20;

/// Has `look` read bytes at a path of their own.
pub(crate) fn at_a_path<T>(bytes: &[u8], look: impl FnOnce(&Path) -> T) -> io::Result<T> {
    use std::os::fd::AsRawFd;
    let mut file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(look(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd()))))
}

/// A manifest: what can be one is one again when it is written.
///
/// # Panics
/// It is not.
pub fn manifest(bytes: &[u8]) -> bool {
    let Ok(Ok(manifest)) = at_a_path(bytes, Manifest::read) else { return false };
    let _ = (manifest.run.machine.bytes(), manifest.run.machine.written(), manifest.run.machine.lay(&[]));
    let again = serde_json::to_vec(&manifest).unwrap_or_default();
    assert!(matches!(at_a_path(&again, Manifest::read), Ok(Ok(_))), "{manifest:?}");
    true
}

/// A packed file of `length` bytes, modulo what is bearable; what was unpacked is packed and unpacked again.
///
/// # Panics
/// It is another file then.
pub fn packed(mut bytes: &[u8], length: u64) -> io::Result<bool> {
    let length = length % MOST;
    let file = || memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).map(File::from);
    let (one, two) = (file()?, file()?);
    if packed::unpack(&mut bytes, &one, length).is_err() {
        return Ok(false);
    }
    assert_eq!(one.metadata()?.len(), length);
    let mut stream = Vec::new();
    packed::pack(&one, &mut stream)?;
    packed::unpack(&mut stream.as_slice(), &two, length)?;
    let read = |file: &File| {
        let mut all = vec![0; usize::try_from(length).unwrap_or(0)];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut all, 0).map(|()| all)
    };
    assert!(read(&one)? == read(&two)?, "what is packed is what is unpacked");
    Ok(true)
}

/// What a file of `length` bytes is packed as, every third page of which is zeroes.
pub fn sample(length: u16) -> Vec<u8> {
    let bytes: Vec<u8> =
        (0..length).map(|at| if at >> 12 == 1 { 0 } else { at.to_le_bytes()[0] | 1 }).collect();
    let mut stream = Vec::new();
    let packed = at_a_path(&bytes, |path| packed::pack(&File::open(path)?, &mut stream));
    packed.and_then(|packed| packed).map_or(Vec::new(), |_| stream)
}
