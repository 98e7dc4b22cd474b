//! Puts a kernel, its initial RAM disk, its command line and its tables into guest memory.
//!
//! An ELF kernel is mapped unless the configuration says otherwise, so that starting costs no copy and clean pages
//! are shared by all machines; a small initial RAM disk is read.
//! Image files are not trusted: every number in them is bounded before it is used.

mod acpi;
mod aml;
mod bzimage;
mod cmdline;
mod elf;
mod params;
mod tables;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use mvm_devices::memory::{Bytes, GuestAddress, Memory};

pub use acpi::Platform;

use crate::config::{Image, Protocol};
use crate::layout::{self, PAGE_SIZE};
use crate::memory::{HUGE_PAGE, map_file, read_file, small_pages_around};

/// Largest kernel image, and most memory a kernel may ask for.
pub const MAX_KERNEL_BYTES: u64 = 128 << 20;
/// Largest initial RAM disk.
pub const MAX_INITRD_BYTES: u64 = 512 << 20;

/// Largest initial RAM disk that is read. Guests unpack it, free its pages and use them for something else, so no
/// page of it stays shared; mapping only pays where reading would take long.
const READ_INITRD_BYTES: u64 = 8 << 20;

/// A kernel could not be put into memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An image could not be read.
    #[error("cannot read the {0}")]
    Read(&'static str, #[source] io::Error),
    /// An image is not a regular file.
    #[error("the {0} is not a regular file")]
    NotAFile(&'static str),
    /// An image is too large.
    #[error("the {what} has {bytes} bytes, and at most {max} are accepted")]
    TooLarge {
        /// Kernel or initial RAM disk.
        what: &'static str,
        /// Its size.
        bytes: u64,
        /// The bound.
        max: u64,
    },
    /// The file is neither an ELF image nor a bzImage.
    #[error("the kernel is neither an ELF vmlinux nor a bzImage")]
    UnknownFormat,
    /// The ELF image contradicts itself.
    #[error("the kernel is not a usable ELF image: {0}")]
    Elf(&'static str),
    /// The bzImage cannot be booted.
    #[error("the kernel is not a usable bzImage: {0}")]
    BzImage(&'static str),
    /// PVH was asked for and the image has no entry for it.
    #[error("the kernel has no PVH entry note")]
    NoPvhEntry,
    /// RAM is too small.
    #[error(
        "too little memory: kernel and initial RAM disk need {needed_mib} MiB, the machine has {mib} MiB"
    )]
    TooLittleMemory {
        /// What they need, in MiB.
        needed_mib: u64,
        /// What there is, in MiB.
        mib: u64,
    },
    /// The command line with the machine's own arguments is too long.
    #[error("the command line has {0} bytes with the machine's own arguments, and at most {max} fit", max = layout::CMDLINE_SIZE - 1)]
    CmdlineTooLong(usize),
    /// An image could not be mapped into guest memory.
    #[error("cannot map the {0} into guest memory")]
    Map(&'static str, #[source] io::Error),
    /// A write to guest memory failed.
    #[error("cannot write the {0} to guest memory")]
    Write(&'static str, #[source] vm_memory::GuestMemoryError),
}

impl Error {
    /// What a person can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::TooLittleMemory { needed_mib, .. } => Some(format!("give --memory {needed_mib}M or more")),
            Error::UnknownFormat => Some("give an uncompressed vmlinux (best) or a bzImage".to_owned()),
            Error::NoPvhEntry => {
                Some("build the kernel with CONFIG_PVH=y, or leave out the protocol".to_owned())
            }
            Error::CmdlineTooLong(_) => Some("shorten the kernel command line".to_owned()),
            _ => None,
        }
    }
}

type Result<T> = std::result::Result<T, Error>;

/// Everything that decides what is put into memory.
#[derive(Debug)]
pub struct Images<'a> {
    /// Kernel image.
    pub kernel: &'a File,
    /// Initial RAM disk.
    pub initrd: Option<&'a File>,
    /// Command line as configured.
    pub cmdline: &'a str,
    /// How the kernel is entered.
    pub protocol: Protocol,
    /// How an ELF kernel gets into memory.
    pub image: Image,
}

/// Where the first virtual CPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Long mode, identity-mapped, `boot_params` in RSI.
    Long {
        /// First instruction.
        rip: u64,
    },
    /// Flat 32-bit protected mode, `hvm_start_info` in EBX.
    Protected {
        /// First instruction.
        eip: u64,
    },
}

/// What was put into memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Where the first virtual CPU starts.
    pub entry: Entry,
    /// Where kernel and initial RAM disk are. Pages there may be the image's file.
    pub images: Vec<Range<u64>>,
}

/// A kernel in memory.
#[derive(Clone, Debug, Default)]
struct Loaded {
    /// 64-bit entry.
    entry: u64,
    /// PVH entry.
    pvh_entry: Option<u64>,
    /// First byte after everything the kernel needs before it manages memory itself.
    end: u64,
    /// Setup header, for `boot_params`.
    header: Option<bzimage::Header>,
}

/// A range of guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Span {
    start: u64,
    length: u64,
}

/// What kernel and initial RAM disk must fit into.
#[derive(Clone, Copy, Debug)]
struct Room {
    /// Bytes of RAM.
    ram: u64,
    /// Bytes of the initial RAM disk.
    initrd: u64,
    /// How an ELF kernel gets in.
    image: Image,
}

impl Room {
    /// End of the RAM below the hole.
    fn below_hole(self) -> u64 {
        self.ram.min(layout::HOLE_START)
    }

    /// What to say when a kernel that ends at `kernel_end` leaves too little. The initial RAM disk may use
    /// half of RAM.
    fn too_little(self, kernel_end: u64) -> Error {
        let both = kernel_end.saturating_add(self.initrd).saturating_add(PAGE_SIZE);
        let needed = both.max(self.initrd.saturating_mul(2));
        Error::TooLittleMemory { needed_mib: needed.div_ceil(1 << 20), mib: self.ram >> 20 }
    }
}

/// Loads everything. `memory` must be fresh (all zero).
pub fn load(memory: &Memory, ram: u64, images: &Images<'_>, platform: &Platform) -> Result<Placed> {
    let kernel_bytes = regular_size(images.kernel, "kernel", MAX_KERNEL_BYTES)?;
    let initrd_bytes =
        images.initrd.map(|file| regular_size(file, "initial RAM disk", MAX_INITRD_BYTES)).transpose()?;
    let room = Room { ram, image: images.image, initrd: initrd_bytes.unwrap_or(0) };
    let kernel = load_kernel(memory, images.kernel, kernel_bytes, room)?;
    if kernel.end & (HUGE_PAGE - 1) != 0 {
        // Of the block the kernel ends in, its end is touched and, at boot, little else.
        small_pages_around(memory, kernel.end);
    }
    small_pages_around(memory, layout::SPARSE_BLOCK);
    let initrd = images.initrd.map(|file| load_initrd(memory, file, room, &kernel)).transpose()?;
    let cmdline = cmdline::complete(images.cmdline, platform)?;
    write(memory, layout::CMDLINE, cmdline.as_bytes(), "command line")?;
    acpi::write(memory, platform)?;
    let entry = match images.protocol {
        Protocol::Linux64 => {
            tables::write(memory)?;
            params::write_zero_page(memory, ram, &kernel, initrd)?;
            Entry::Long { rip: kernel.entry }
        }
        Protocol::Pvh => {
            let eip = kernel.pvh_entry.ok_or(Error::NoPvhEntry)?;
            params::write_start_info(memory, ram, initrd)?;
            Entry::Protected { eip }
        }
    };
    let initrd = initrd.map(|span| span.start..span.start.saturating_add(span.length));
    let images = std::iter::once(layout::HIGH_MEMORY..kernel.end).chain(initrd).collect();
    Ok(Placed { entry, images })
}

/// Guest addresses of what a kernel has in memory and never writes: its code, and data that is only read. `None` if the
/// file does not say, as a `bzImage` does not.
pub fn read_only(kernel: &File) -> Result<Option<Range<u64>>> {
    if is_elf(kernel)? { elf::read_only(kernel).map(Some) } else { Ok(None) }
}

fn load_kernel(memory: &Memory, file: &File, bytes: u64, room: Room) -> Result<Loaded> {
    if is_elf(file)? {
        elf::load(memory, file, bytes, room)
    } else {
        bzimage::load(memory, file, bytes, room)
    }
}

fn is_elf(file: &File) -> Result<bool> {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0).map_err(|_| Error::UnknownFormat)?;
    Ok(&magic == b"\x7fELF")
}

/// Puts the initial RAM disk as high as the kernel can reach, away from the kernel.
fn load_initrd(memory: &Memory, file: &File, room: Room, kernel: &Loaded) -> Result<Span> {
    let length = room.initrd;
    let reach = kernel.header.as_ref().map_or(u32::MAX.into(), bzimage::Header::initrd_addr_max);
    let top = room.below_hole().min(reach.saturating_add(1)) & !(PAGE_SIZE - 1);
    let span = place_below(top, length, kernel.end).ok_or_else(|| room.too_little(kernel.end))?;
    if length > room.ram / 2 {
        return Err(room.too_little(kernel.end));
    }
    let put = if length <= READ_INITRD_BYTES { copy } else { map_whole_pages };
    put(memory, file, Span { start: 0, length }, span.start, "initial RAM disk")?;
    Ok(span)
}

/// The highest page-aligned place for `length` bytes below `top` and not below `floor`.
fn place_below(top: u64, length: u64, floor: u64) -> Option<Span> {
    let start = top.checked_sub(length)? & !(PAGE_SIZE - 1);
    (start >= floor.max(layout::HIGH_MEMORY)).then_some(Span { start, length })
}

/// Puts bytes `from` of `file` at guest address `to`: whole pages are mapped, the rest is copied.
fn map_whole_pages(memory: &Memory, file: &File, from: Span, to: u64, what: &'static str) -> Result<()> {
    let end = to.saturating_add(from.length);
    let map_start = to.next_multiple_of(PAGE_SIZE);
    let map_end = end & !(PAGE_SIZE - 1);
    let congruent = from.start % PAGE_SIZE == to % PAGE_SIZE;
    if !congruent || map_start >= map_end {
        return copy(memory, file, from, to, what);
    }
    let head = map_start - to;
    let mapped = map_end - map_start;
    copy(memory, file, Span { start: from.start, length: head }, to, what)?;
    map_file(memory, file, from.start + head, map_start, mapped)
        .map_err(|source| Error::Map(what, source))?;
    let tail = Span { start: from.start + head + mapped, length: end - map_end };
    copy(memory, file, tail, map_end, what)
}

/// Reads bytes `from` of `file` to guest address `to`.
fn copy(memory: &Memory, file: &File, from: Span, to: u64, what: &'static str) -> Result<()> {
    read_file(memory, file, from.start, to, from.length).map_err(|source| Error::Read(what, source))
}

fn write(memory: &Memory, at: u64, bytes: &[u8], what: &'static str) -> Result<()> {
    memory.write_slice(bytes, GuestAddress(at)).map_err(|source| Error::Write(what, source))
}

fn regular_size(file: &File, what: &'static str, max: u64) -> Result<u64> {
    let metadata = file.metadata().map_err(|source| Error::Read(what, source))?;
    if !metadata.is_file() {
        return Err(Error::NotAFile(what));
    }
    let bytes = metadata.len();
    if bytes > max { Err(Error::TooLarge { what, bytes, max }) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests;
