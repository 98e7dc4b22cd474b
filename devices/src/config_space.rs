//! A device's configuration space: passive bytes that both sides may read at any time.
//!
//! The device itself may live on an I/O thread while a vCPU reads its configuration, so the bytes are
//! shared and the device is not asked. Host-side changes bump the generation, by which a driver tells
//! that a multi-byte read was torn (VIRTIO 1.2 §2.5).

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Shared configuration bytes. The lock is held for a copy of a few bytes only, never across a call out.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: Mutex<Vec<u8>>,
    writable: Range<usize>,
    changes: AtomicU64,
}

impl ConfigSpace {
    /// A space with these initial bytes, of which the driver may write `writable`.
    pub fn new(bytes: Vec<u8>, writable: Range<usize>) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(bytes), writable, changes: AtomicU64::new(0) })
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether the device has no configuration at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Changes whenever the host changed a byte; the driver's own writes do not count.
    pub fn generation(&self) -> u8 {
        let [low, ..] = self.changes().to_le_bytes();
        low
    }

    /// How often the host changed bytes. Unlike the 8-bit generation it does not come round, so a transport
    /// can tell 256 changes from none.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Driver read. Bytes past the end read as 0.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let bytes = self.lock();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = offset.checked_add(i).and_then(|at| bytes.get(at)).copied().unwrap_or(0);
        }
    }

    /// Driver write. Bytes outside the writable range stay as they are.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let mut bytes = self.lock();
        for (i, value) in data.iter().enumerate() {
            let Some(at) = offset.checked_add(i).filter(|at| self.writable.contains(at)) else { continue };
            if let Some(byte) = bytes.get_mut(at) {
                *byte = *value;
            }
        }
    }

    /// Host change: `change` edits the bytes in place, then the generation moves on. Tell the driver
    /// with [`crate::interrupt::Interrupt::config_changed`].
    pub fn update(&self, change: impl FnOnce(&mut [u8])) {
        let mut bytes = self.lock();
        change(&mut bytes);
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// Host change to `new`, if the bytes are others; whether they were. A restored device does this where all of the
    /// space is its own: there it finds what the saved one showed.
    pub fn replace(&self, new: &[u8]) -> bool {
        let mut bytes = self.lock();
        let mut differed = false;
        for (byte, new) in bytes.iter_mut().zip(new) {
            differed |= std::mem::replace(byte, *new) != *new;
        }
        if differed {
            self.changes.fetch_add(1, Ordering::AcqRel);
        }
        differed
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        // A poisoned lock still guards plain bytes: any state of them is a valid one.
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_past_the_end_are_zero_and_never_fail() {
        let space = ConfigSpace::new(vec![1, 2, 3], 0..0);
        let mut data = [0xff; 4];
        space.read(1, &mut data);
        assert_eq!(data, [2, 3, 0, 0]);
        space.read(usize::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn the_driver_writes_only_the_writable_range() {
        let space = ConfigSpace::new(vec![0; 6], 2..4);
        space.write(0, &[9; 8]);
        let mut data = [0; 6];
        space.read(0, &mut data);
        assert_eq!(data, [0, 0, 9, 9, 0, 0]);
        assert_eq!(space.generation(), 0, "the driver's own write is no host change");
    }

    #[test]
    fn bytes_that_are_replaced_by_the_same_are_no_change() {
        let space = ConfigSpace::new(vec![1, 2, 3], 0..0);
        assert!(!space.replace(&[1, 2, 3]));
        assert_eq!(space.changes(), 0);
        assert!(space.replace(&[1, 9, 3, 4]));
        let mut data = [0; 4];
        space.read(0, &mut data);
        assert_eq!((data, space.changes()), ([1, 9, 3, 0], 1));
    }

    #[test]
    fn a_host_change_moves_the_generation_and_wraps() {
        let space = ConfigSpace::new(vec![0], 0..0);
        for _ in 0..256 {
            let before = space.generation();
            space.update(|bytes| bytes[0] = bytes[0].wrapping_add(1));
            assert_ne!(space.generation(), before);
        }
        assert_eq!(space.generation(), 0);
    }
}
