//! ELF kernels: `vmlinux`, and flat 64-bit guests.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use linux_loader::elf::{EM_X86_64, Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use mvm_devices::memory::{ByteValued, Memory};

use super::{Error, Loaded, MAX_KERNEL_BYTES, Result, Room, Span, copy, map_whole_pages};
use crate::config::Image;
use crate::layout;

/// Most program headers; a kernel has about five.
const MAX_PROGRAM_HEADERS: u16 = 32;
/// Segment flag: executable.
const PF_X: u32 = 1;
/// Segment flag: writable.
const PF_W: u32 = 2;
/// Most bytes of notes looked through for the PVH entry.
const MAX_NOTE_BYTES: u64 = 4096;
/// Note type of the PVH entry, in notes named "Xen".
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// Maps the image's segments where it wants them. Segments must not overlap and must lie in RAM above 1 MiB.
pub(super) fn load(memory: &Memory, file: &File, bytes: u64, room: Room) -> Result<Loaded> {
    let header = read_header(file)?;
    let segments = read_program_headers(file, &header)?;
    let loads: Vec<_> = segments.iter().filter(|s| s.p_type == PT_LOAD && s.p_memsz > 0).collect();
    let end = check(&loads, bytes, room)?;
    if !loads.iter().any(|s| (s.p_paddr..s.p_paddr + s.p_filesz).contains(&header.e_entry)) {
        return Err(Error::Elf("its entry lies in no loaded segment"));
    }
    for segment in &loads {
        let from = Span { start: segment.p_offset, length: segment.p_filesz };
        // Nearly every page of a writable segment is written while the kernel boots: mapped, each would cost two
        // faults and a copy, and be shared with nobody.
        let read = room.image == Image::Copy || segment.p_flags & PF_W != 0;
        let load = if read { copy } else { map_whole_pages };
        load(memory, file, from, segment.p_paddr, "kernel")?;
    }
    let pvh_entry = find_pvh_entry(file, &segments)?;
    Ok(Loaded { entry: header.e_entry, pvh_entry, end, header: None })
}

/// Guest addresses of the first segment that has code and is not writable.
pub(super) fn read_only(file: &File) -> Result<Range<u64>> {
    let segments = read_program_headers(file, &read_header(file)?)?;
    let code = |s: &&Elf64_Phdr| s.p_type == PT_LOAD && s.p_flags & (PF_X | PF_W) == PF_X;
    let code = segments.iter().find(code).ok_or(Error::Elf("it has no code that is only read"))?;
    Ok(code.p_paddr..code.p_paddr.saturating_add(code.p_filesz))
}

fn read_header(file: &File) -> Result<Elf64_Ehdr> {
    let mut header = Elf64_Ehdr::default();
    file.read_exact_at(header.as_mut_slice(), 0).map_err(|source| Error::Read("kernel", source))?;
    let [.., class, data, _, _, _, _, _, _, _, _, _, _] = header.e_ident[..] else {
        return Err(Error::Elf("it has no identification"));
    };
    if class != 2 || data != 1 || header.e_machine != EM_X86_64 {
        return Err(Error::Elf("it is not for x86-64"));
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() || header.e_phnum > MAX_PROGRAM_HEADERS {
        return Err(Error::Elf("its program headers have the wrong size or number"));
    }
    Ok(header)
}

fn read_program_headers(file: &File, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>> {
    let mut segments = vec![Elf64_Phdr::default(); header.e_phnum.into()];
    let mut offset = header.e_phoff;
    for segment in &mut segments {
        file.read_exact_at(segment.as_mut_slice(), offset).map_err(|source| Error::Read("kernel", source))?;
        offset = offset.saturating_add(size_of::<Elf64_Phdr>() as u64);
    }
    Ok(segments)
}

/// Checks that segments lie in the file, in RAM and apart. Returns the end of the last one.
fn check(loads: &[&Elf64_Phdr], bytes: u64, room: Room) -> Result<u64> {
    let mut spans = Vec::with_capacity(loads.len());
    for segment in loads {
        let in_file = segment.p_offset.checked_add(segment.p_filesz).is_some_and(|end| end <= bytes);
        if !in_file || segment.p_filesz > segment.p_memsz {
            return Err(Error::Elf("a segment is not in the file"));
        }
        if segment.p_memsz > MAX_KERNEL_BYTES || segment.p_paddr < layout::HIGH_MEMORY {
            return Err(Error::Elf("a segment is too large or lies below 1 MiB"));
        }
        let end = segment.p_paddr.checked_add(segment.p_memsz).ok_or(Error::Elf("a segment wraps"))?;
        spans.push((segment.p_paddr, end));
    }
    spans.sort_unstable();
    if spans.windows(2).any(|pair| matches!(pair, [(_, end), (start, _)] if start < end)) {
        return Err(Error::Elf("two segments overlap"));
    }
    let (_, end) = *spans.last().ok_or(Error::Elf("it has nothing to load"))?;
    if end > room.below_hole() {
        return Err(room.too_little(end));
    }
    Ok(end)
}

/// Looks for the note `Xen`/[`XEN_ELFNOTE_PHYS32_ENTRY`].
fn find_pvh_entry(file: &File, segments: &[Elf64_Phdr]) -> Result<Option<u64>> {
    for note in segments.iter().filter(|s| s.p_type == PT_NOTE) {
        let mut bytes = vec![0; usize::try_from(note.p_filesz.min(MAX_NOTE_BYTES)).unwrap_or(0)];
        file.read_exact_at(&mut bytes, note.p_offset).map_err(|source| Error::Read("kernel", source))?;
        if let Some(entry) = pvh_entry_in(&bytes) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

fn pvh_entry_in(mut notes: &[u8]) -> Option<u64> {
    loop {
        let (header, rest) = notes.split_first_chunk::<12>()?;
        let [n0, n1, n2, n3, d0, d1, d2, d3, t0, t1, t2, t3] = *header;
        let name_size = usize::try_from(u32::from_le_bytes([n0, n1, n2, n3])).ok()?;
        let desc_size = usize::try_from(u32::from_le_bytes([d0, d1, d2, d3])).ok()?;
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        let (name, rest) = rest.split_at_checked(name_size.checked_next_multiple_of(4)?)?;
        // The last description may end without padding.
        let padded = desc_size.checked_next_multiple_of(4)?.min(rest.len());
        let (desc, rest) = rest.split_at_checked(padded)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name.starts_with(b"Xen\0") {
            let entry = desc.first_chunk::<4>()?;
            return Some(u32::from_le_bytes(*entry).into());
        }
        notes = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pvh_note_is_found_behind_others() {
        let mut notes = Vec::new();
        for (kind, value) in [(1u32, 0u32), (18, 0x10_0abc)] {
            notes.extend(4u32.to_le_bytes());
            notes.extend(4u32.to_le_bytes());
            notes.extend(kind.to_le_bytes());
            notes.extend(b"Xen\0");
            notes.extend(value.to_le_bytes());
        }
        assert_eq!(pvh_entry_in(&notes), Some(0x10_0abc));
        assert_eq!(pvh_entry_in(&notes[..20]), None);
    }

    #[test]
    fn a_note_that_claims_gigabytes_is_ignored() {
        let mut notes = vec![0xff; 12];
        notes.extend([0; 64]);
        assert_eq!(pvh_entry_in(&notes), None);
    }
}
