//! Bytes from the guest that the host process has not taken yet.

use super::credit::BUFFER;
use crate::chain::Cursor;
use crate::error::ChainError;

/// A bounded run of bytes; holds memory only while there is something in it.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    bytes: Vec<u8>,
    /// Bytes at the front that are gone already.
    gone: usize,
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// What waits, in order.
    pub(super) fn waiting(&self) -> &[u8] {
        self.bytes.get(self.gone..).unwrap_or_default()
    }

    /// Appends `n` bytes. The caller has checked them against the connection's credit, which is what
    /// bounds the backlog to [`BUFFER`].
    pub(super) fn append(&mut self, from: &mut Cursor<'_>, n: u32) -> Result<(), ChainError> {
        let n = usize::try_from(n).map_err(|_| ChainError::Short)?;
        if self.bytes.capacity() == 0 {
            self.bytes.reserve_exact(BUFFER as usize);
        }
        if self.bytes.len().saturating_add(n) > self.bytes.capacity() {
            self.bytes.drain(..self.gone);
            self.gone = 0;
        }
        let start = self.bytes.len();
        let end = start.checked_add(n).ok_or(ChainError::Short)?;
        self.bytes.resize(end, 0);
        let read = from.read(self.bytes.get_mut(start..).unwrap_or_default());
        if read.is_err() {
            self.bytes.truncate(start);
        }
        read
    }

    /// The first `n` bytes are delivered.
    pub(super) fn advance(&mut self, n: usize) {
        self.gone = self.gone.saturating_add(n);
        if self.gone >= self.bytes.len() {
            self.clear();
        }
    }

    /// Forgets everything and gives the memory back.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Driver;

    fn append(backlog: &mut Backlog, bytes: &[u8]) {
        let mut driver = Driver::new(0, 4, crate::testing::memory(), false);
        let mut ring = driver.ring();
        driver.post(&[bytes], &[]);
        let chain = ring.pop().unwrap().unwrap();
        backlog.append(&mut chain.reader(), u32::try_from(bytes.len()).unwrap()).unwrap();
    }

    #[test]
    fn gives_bytes_out_in_order_and_the_memory_back() {
        let mut backlog = Backlog::default();
        append(&mut backlog, b"hello, ");
        backlog.advance(2);
        append(&mut backlog, b"world");
        assert_eq!(backlog.waiting(), b"llo, world");
        backlog.advance(10);
        assert!(backlog.is_empty());
        assert_eq!(backlog.bytes.capacity(), 0);
    }

    #[test]
    fn a_buffer_that_never_empties_does_not_grow() {
        let mut backlog = Backlog::default();
        append(&mut backlog, &[0; BUFFER as usize]);
        for round in 1..100u8 {
            backlog.advance(1000);
            append(&mut backlog, &[round; 1000]);
            assert_eq!(backlog.waiting().len(), BUFFER as usize);
            assert_eq!(backlog.waiting().last(), Some(&round));
            assert_eq!(backlog.bytes.capacity(), BUFFER as usize);
        }
    }
}
