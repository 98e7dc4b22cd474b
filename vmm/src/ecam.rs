//! The bytes behind PCI configuration space: a page per function, all ones where there is none.
//!
//! KVM maps them to the guest read-only, so reads cost no exit. They lie in the program's data, so the all-ones
//! pages of absent functions are page cache shared by all machines: a function costs its page, an empty slot
//! nothing. That makes them one per process, which is how machines run.
#![allow(unsafe_code)] // static memory that the guest reads while the bus writes it

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mvm_devices::pci::CONFIG_SPACE_SIZE;

use crate::error::{Error, Result};
use crate::layout::ECAM_SIZE;

/// Bytes that are compared and written at a time.
const WORD: usize = size_of::<u64>();
/// Bytes of configuration space of a bus.
const SIZE: usize = ECAM_SIZE as usize;

#[repr(C, align(4096))]
struct Pages(UnsafeCell<[u8; SIZE]>);

// SAFETY: the bytes are only reached through `Ecam`, one word at a time and atomically.
unsafe impl Sync for Pages {}

static PAGES: Pages = Pages(UnsafeCell::new([0xff; SIZE]));
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Configuration space of bus 0 as the guest reads it. There is one per process.
#[derive(Debug)]
pub(crate) struct Ecam(());

impl Ecam {
    /// Takes the process's one configuration space.
    pub(crate) fn take() -> Result<Self> {
        if TAKEN.swap(true, Ordering::AcqRel) { Err(Error::SecondMachine) } else { Ok(Self(())) }
    }

    /// Address of the first byte in this process.
    pub(crate) fn host_address(&self) -> u64 {
        PAGES.0.get() as u64
    }

    /// Makes function `function` of device `device` read as `config`. Touches the words that differ only.
    ///
    /// Called for every write of configuration space, so it goes word by word: byte by byte it took longer than
    /// the exit itself.
    pub(crate) fn show(&self, device: usize, function: usize, config: &[u8; CONFIG_SPACE_SIZE]) {
        let page = (device * 8 + function) * CONFIG_SPACE_SIZE;
        let (words, _) = config.as_chunks::<WORD>();
        for (offset, value) in (page..).step_by(WORD).zip(words) {
            let value = u64::from_ne_bytes(*value);
            if let Some(word) = Self::word(offset)
                && word.load(Ordering::Relaxed) != value
            {
                word.store(value, Ordering::Relaxed);
            }
        }
    }

    /// Takes it once no other test has it.
    #[cfg(test)]
    pub(crate) fn take_in_turn() -> Self {
        loop {
            match Self::take() {
                Ok(ecam) => {
                    (0..32).for_each(|device| ecam.show(device, 0, &[0xff; CONFIG_SPACE_SIZE]));
                    return ecam;
                }
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    /// Reads what the guest reads. Tells whether all of it is inside.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        let Ok(offset) = usize::try_from(offset) else { return false };
        (offset..).zip(data).all(|(offset, value)| match Self::byte(offset) {
            Some(byte) => {
                *value = byte;
                true
            }
            None => false,
        })
    }

    fn byte(offset: usize) -> Option<u8> {
        let word = Self::word(offset - offset % WORD)?.load(Ordering::Relaxed);
        word.to_ne_bytes().get(offset % WORD).copied()
    }

    /// The word at `offset`, a multiple of its size.
    fn word(offset: usize) -> Option<&'static AtomicU64> {
        if !offset.is_multiple_of(WORD) || offset >= SIZE {
            return None;
        }
        // SAFETY: `offset` is inside the static array (checked above).
        let word = unsafe { PAGES.0.get().cast::<u8>().add(offset) };
        // SAFETY: `word` is aligned (a multiple of its size from a page) and valid for the life of the process,
        // which reaches it only atomically and only in whole words.
        Some(unsafe { AtomicU64::from_ptr(word.cast()) })
    }
}

impl Drop for Ecam {
    fn drop(&mut self) {
        TAKEN.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_at_a_time_and_functions_show_in_their_page() {
        let ecam = Ecam::take_in_turn();
        assert!(matches!(Ecam::take(), Err(Error::SecondMachine)));
        let mut config = [0; CONFIG_SPACE_SIZE];
        config[0] = 0x86;
        ecam.show(2, 0, &config);
        let read = |offset| Ecam::byte(offset).unwrap();
        assert_eq!((read(2 * 8 * 4096), read(2 * 8 * 4096 + 1)), (0x86, 0));
        assert_eq!((read(2 * 8 * 4096 - 1), read(3 * 8 * 4096)), (0xff, 0xff));
        ecam.show(2, 0, &[0xff; CONFIG_SPACE_SIZE]);
    }
}
