//! System calls on guest buffers: scatter-gather I/O straight into a chain, sockets, and host entropy.
//!
//! The one place where guest memory meets raw pointers.
#![allow(unsafe_code)]

pub mod file;
mod rights;
pub(crate) mod segment;
pub mod tap;

pub use rights::{MAX_FILES, receive_with_files};

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::chain::Cursor;
use crate::memory::VolatileSlice;
use segment::Segment;

/// Size of a host page on x86-64.
const HOST_PAGE: usize = 4096;
/// Parts of chains in one system call; more of them take several.
const MAX_PARTS: usize = 260;
const NO_PARTS: [MaybeUninit<libc::iovec>; MAX_PARTS] = [const { MaybeUninit::uninit() }; MAX_PARTS];

/// Buffers of guest memory in the form `readv` and its kin take.
struct Buffers<'a> {
    /// The buffers as they lie in a chain, if all of them are wanted whole.
    whole: Option<&'a [Segment]>,
    /// Else parts of them.
    parts: [MaybeUninit<libc::iovec>; MAX_PARTS],
    count: usize,
}

impl<'a> Buffers<'a> {
    /// The next buffers of `cursor`, up to `max` bytes.
    fn gather(cursor: &Cursor<'a>, max: u32) -> Self {
        match cursor.segments(max) {
            Some(segments) => Self { whole: Some(segments), parts: NO_PARTS, count: segments.len() },
            None => Self::collect(cursor.slices(max)),
        }
    }

    fn collect(slices: impl Iterator<Item = VolatileSlice<'a>>) -> Self {
        // Small requests are most of them: they do not pay for the room that large ones need.
        let mut parts = NO_PARTS;
        let mut places = parts.iter_mut();
        for (slice, place) in slices.zip(places.by_ref()) {
            place.write(iovec(&slice));
        }
        let count = MAX_PARTS.saturating_sub(places.len());
        Self { whole: None, parts, count }
    }

    /// The first of [`Buffers::count`] buffers.
    fn first(&self) -> *const libc::iovec {
        self.whole.map_or(self.parts.as_ptr().cast(), Segment::as_iovecs)
    }

    /// How many buffers one system call gets.
    fn count(&self) -> libc::c_int {
        libc::c_int::try_from(self.count).unwrap_or(0).min(libc::UIO_MAXIOV)
    }

    /// The buffers as a message without address or control data.
    fn message(&self) -> libc::msghdr {
        libc::msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            // The kernel reads this list and never writes it.
            msg_iov: self.first().cast_mut(),
            msg_iovlen: usize::try_from(self.count()).unwrap_or(0),
            msg_control: std::ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        }
    }
}

fn iovec(slice: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }
}

/// Reads up to `len` bytes of `file` at `offset` into `to`, until it is full or the file ends.
/// Returns the bytes read; `to` moved past them.
///
/// # Errors
/// The host's reason; what was read before it stays counted in `to`.
pub fn read_at(file: BorrowedFd<'_>, to: &mut Cursor<'_>, len: u32, offset: u64) -> io::Result<u32> {
    transfer_at(to, len, offset, |buffers, at| {
        // SAFETY: each iovec names bytes inside a mapped guest region that outlives the call (the cursor
        // borrows it); guest memory may change under the kernel, which only affects the bytes' values.
        unsafe { libc::preadv(file.as_raw_fd(), buffers.first(), buffers.count(), at) }
    })
}

/// Writes up to `len` bytes from `from` to `file` at `offset`. Returns the bytes written; fewer than
/// `len` only if `from` or the file ended.
///
/// # Errors
/// The host's reason; what was written before it stays counted in `from`.
pub fn write_at(file: BorrowedFd<'_>, from: &mut Cursor<'_>, len: u32, offset: u64) -> io::Result<u32> {
    transfer_at(from, len, offset, |buffers, at| {
        // SAFETY: as in `read_at`; the kernel only reads these bytes.
        unsafe { libc::pwritev(file.as_raw_fd(), buffers.first(), buffers.count(), at) }
    })
}

/// Reads once, whatever is there, into the front of `to` (at most `max` bytes); moves `to` past it.
///
/// # Errors
/// The host's reason; `WouldBlock` when nothing is there.
pub fn read_some(file: BorrowedFd<'_>, to: &mut Cursor<'_>, max: u32) -> io::Result<u32> {
    let buffers = Buffers::gather(to, max);
    let done = retry(|| {
        // SAFETY: as in `read_at`.
        unsafe { libc::readv(file.as_raw_fd(), buffers.first(), buffers.count()) }
    })?;
    advance(to, done)
}

/// Writes once, as much as the file takes, from the front of `from` (at most `max` bytes); moves `from`
/// past it.
///
/// # Errors
/// The host's reason; `WouldBlock` when nothing can be taken.
pub fn write_some(file: BorrowedFd<'_>, from: &mut Cursor<'_>, max: u32) -> io::Result<u32> {
    let buffers = Buffers::gather(from, max);
    let done = retry(|| {
        // SAFETY: as in `write_at`.
        unsafe { libc::writev(file.as_raw_fd(), buffers.first(), buffers.count()) }
    })?;
    advance(from, done)
}

/// Receives once, whatever is there, into `slices` in their order. Never waits, whatever mode the socket
/// is in: other processes share that mode. 0 is the end of the stream.
///
/// # Errors
/// The host's reason; `WouldBlock` when nothing is there.
pub fn receive<'a>(
    socket: BorrowedFd<'_>,
    slices: impl Iterator<Item = VolatileSlice<'a>>,
) -> io::Result<u32> {
    let buffers = Buffers::collect(slices);
    let mut message = buffers.message();
    let done = retry(|| {
        // SAFETY: the message names the iovecs of `buffers`, which lives on; each names bytes inside a
        // mapped guest region that outlives the call (the slices borrow it).
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) }
    })?;
    u32::try_from(done).map_err(io::Error::other)
}

/// Sends once, as much as the socket takes, from the front of `from` (at most `max` bytes); moves `from`
/// past it. Never waits and raises no `SIGPIPE`.
///
/// # Errors
/// The host's reason; `WouldBlock` when nothing can be taken.
pub fn send(socket: BorrowedFd<'_>, from: &mut Cursor<'_>, max: u32) -> io::Result<u32> {
    let buffers = Buffers::gather(from, max);
    let message = buffers.message();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let done = retry(|| {
        // SAFETY: as in `receive`; the kernel only reads these bytes.
        unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) }
    })?;
    advance(from, done)
}

/// Sends once, as much as the socket takes of `bytes`. Never waits and raises no `SIGPIPE`.
///
/// # Errors
/// As [`send`].
pub fn send_bytes(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    retry(|| {
        // SAFETY: pointer and length are of the same slice, which the kernel only reads.
        unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) }
    })
}

/// Gives the whole host pages inside `slice` back to the host and returns their bytes. What the guest
/// reads there next is what its memory began with: zeroes, or the bytes of the file mapped there. `shared`
/// says that the mapping is, and then the file loses the pages too.
///
/// # Errors
/// The host's reason; memory of huge pages can only be dropped in those.
pub fn discard(slice: &VolatileSlice<'_>, shared: bool) -> io::Result<usize> {
    let page = HOST_PAGE;
    let guard = slice.ptr_guard_mut();
    let skip = guard.as_ptr().align_offset(page);
    let len = slice.len().saturating_sub(skip).checked_div(page).unwrap_or(0).saturating_mul(page);
    if len == 0 {
        return Ok(0);
    }
    let advice = if shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    let start = guard.as_ptr().wrapping_add(skip);
    retry(|| {
        // SAFETY: the range lies inside a mapped guest region that outlives the call (the slice borrows
        // it). It stays mapped; only its contents change, which guest memory's always may.
        let result = unsafe { libc::madvise(start.cast(), len, advice) };
        libc::ssize_t::try_from(result).unwrap_or(-1)
    })?;
    Ok(len)
}

/// Fills `bytes` from the host's entropy pool.
///
/// # Errors
/// The host's reason; never returns fewer bytes as success.
pub fn random(bytes: &mut [u8]) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        // SAFETY: pointer and length are of the same exclusive slice.
        let done = retry(|| unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) })?;
        rest = rest.get_mut(done..).unwrap_or_default();
    }
    Ok(())
}

/// Has the calling thread, and the processes it starts, run when nobody else wants to.
///
/// # Errors
/// As setpriority(2).
pub fn lowest_priority() -> io::Result<()> {
    const NICEST: libc::c_int = 19;
    // SAFETY: setpriority touches no memory.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICEST) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn transfer_at(
    cursor: &mut Cursor<'_>,
    len: u32,
    offset: u64,
    call: impl Fn(&Buffers<'_>, libc::off_t) -> libc::ssize_t,
) -> io::Result<u32> {
    let mut total = 0u32;
    while total < len {
        let buffers = Buffers::gather(cursor, len.saturating_sub(total));
        if buffers.count() == 0 {
            break;
        }
        let at = offset.checked_add(total.into()).and_then(|at| libc::off_t::try_from(at).ok());
        let at = at.ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))?;
        let done = advance(cursor, retry(|| call(&buffers, at))?)?;
        if done == 0 {
            break;
        }
        total = total.saturating_add(done);
    }
    Ok(total)
}

fn advance(cursor: &mut Cursor<'_>, done: usize) -> io::Result<u32> {
    // The kernel never reports more than the buffers hold, which is below 2^32.
    let done = u32::try_from(done).map_err(io::Error::other)?;
    cursor.skip(done).map_err(io::Error::other)?;
    Ok(done)
}

fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(done) => return Ok(done),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// A call's answer of 0 or -1 as a result.
fn check(answer: libc::c_int) -> io::Result<()> {
    if answer == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
