//! System calls on a tap: whole frames between it and guest buffers, and its offload settings.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::memory::VolatileSlice;

/// Guest buffers of one frame that go to the kernel as they are. A frame in more pieces is copied.
const MAX_SLICES: usize = 62;

/// A header, guest buffers and a rest, in the form `readv` and `writev` take.
struct Pieces<'a> {
    list: [libc::iovec; MAX_SLICES + 2],
    count: usize,
    memory: PhantomData<&'a ()>,
}

impl<'a> Pieces<'a> {
    fn new(header: libc::iovec) -> Self {
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let mut list = [empty; MAX_SLICES + 2];
        if let Some(first) = list.first_mut() {
            *first = header;
        }
        Self { list, count: 1, memory: PhantomData }
    }

    fn push(&mut self, piece: libc::iovec) {
        if let Some(place) = self.list.get_mut(self.count) {
            *place = piece;
            self.count = self.count.saturating_add(1);
        }
    }

    /// Takes the first guest buffers; returns how many bytes they hold and whether they were all.
    fn extend(&mut self, slices: impl Iterator<Item = VolatileSlice<'a>>) -> (usize, bool) {
        let mut bytes = 0usize;
        for (taken, slice) in slices.enumerate() {
            if taken == MAX_SLICES {
                return (bytes, false);
            }
            self.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
            bytes = bytes.saturating_add(slice.len());
        }
        (bytes, true)
    }

    fn count(&self) -> libc::c_int {
        libc::c_int::try_from(self.count).unwrap_or(0)
    }
}

/// What one read of a tap brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Bytes, the header included.
    pub bytes: usize,
    /// Bytes of the frame, without the header, that the guest buffers had room for. What the frame has
    /// more of them lies in `rest`, at this offset.
    pub direct: usize,
}

/// Reads one frame: its header, then into guest buffers as far as they go, then into `rest`.
///
/// What lies in `rest` starts at the offset in the frame, so that `rest` could hold the whole of it.
///
/// # Errors
/// The host's reason; `WouldBlock` when there is no frame.
pub fn read_frame<'a>(
    tap: BorrowedFd<'_>,
    header: &mut [u8],
    slices: impl Iterator<Item = VolatileSlice<'a>>,
    rest: &mut [u8],
) -> io::Result<Received> {
    let mut pieces = Pieces::new(exclusive(header));
    let (direct, _) = pieces.extend(slices);
    if let Some(rest) = rest.get_mut(direct..) {
        pieces.push(exclusive(rest));
    }
    // SAFETY: each iovec names bytes of `header`, of a mapped guest region that `slices` borrows, or of
    // `rest`; all outlive the call, and our own two are borrowed exclusively.
    let bytes =
        super::retry(|| unsafe { libc::readv(tap.as_raw_fd(), pieces.list.as_ptr(), pieces.count()) })?;
    Ok(Received { bytes, direct })
}

/// Writes one frame: `front`, then guest buffers. `false` if they are too many pieces for one call, and
/// nothing was written.
///
/// # Errors
/// The host's reason; `WouldBlock` when the tap takes nothing now.
pub fn write_frame<'a>(
    tap: BorrowedFd<'_>,
    front: &[u8],
    slices: impl Iterator<Item = VolatileSlice<'a>>,
) -> io::Result<bool> {
    let mut pieces = Pieces::new(shared(front));
    let (_, all) = pieces.extend(slices);
    if all {
        // SAFETY: as in `read_frame`; the kernel only reads these bytes.
        super::retry(|| unsafe { libc::writev(tap.as_raw_fd(), pieces.list.as_ptr(), pieces.count()) })?;
    }
    Ok(all)
}

fn exclusive(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

/// For `writev` only, which does not write to it.
fn shared(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

/// The flags a tap was made with (`IFF_TAP`, `IFF_NO_PI`, `IFF_VNET_HDR` …).
///
/// # Errors
/// The host's reason: the file is no tap, or is attached to none.
pub fn flags(tap: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    let name = [0; libc::IFNAMSIZ];
    let mut request =
        libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 } };
    // SAFETY: TUNGETIFF writes one ifreq, which is borrowed exclusively for the call.
    super::check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
    // SAFETY: TUNGETIFF sets the flags, and any bits are a valid number.
    Ok(libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags }))
}

/// Sets the size of the header before each frame, in bytes.
///
/// # Errors
/// The host's reason.
pub fn set_header_size(tap: BorrowedFd<'_>, bytes: libc::c_int) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    super::check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) })
}

/// Says which unfinished frames the reader of the tap can take (`TUN_F_*`).
///
/// # Errors
/// The host's reason; `InvalidInput` when its kernel does not know one of them.
pub fn set_offloads(tap: BorrowedFd<'_>, offloads: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
    super::check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })
}
