//! One buffer of a chain, kept in the form `readv` and its kin take: a whole list of them needs no conversion.

use std::fmt;

use crate::memory::VolatileSlice;

/// Bytes inside one region of guest memory, never none. Whoever keeps it keeps that memory mapped.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Segment(libc::iovec);

// SAFETY: the pointer leads to guest memory, which no thread owns and every thread may access.
unsafe impl Send for Segment {}

impl Segment {
    /// The bytes of `slice`.
    pub(crate) fn new(slice: &VolatileSlice<'_>) -> Self {
        Self(super::iovec(slice))
    }

    /// Number of bytes, which a descriptor gives in 32 bits.
    pub(crate) fn len(&self) -> u32 {
        u32::try_from(self.0.iov_len).unwrap_or(u32::MAX)
    }

    /// Address of the first byte in this process.
    pub(crate) fn address(&self) -> usize {
        self.0.iov_base.addr()
    }

    /// The segments as the kernel takes them.
    pub(super) fn as_iovecs(list: &[Self]) -> *const libc::iovec {
        list.as_ptr().cast()
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.address(), self.len())
    }
}
