//! Files that come with a message over a UNIX socket.
#![allow(unsafe_code)] // control messages, and descriptors the kernel has just installed

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::retry;

/// Most files one message may bring.
pub const MAX_FILES: usize = 8;
/// Words of control data: a header of two, then that many descriptors, two a word.
const CONTROL_WORDS: usize = 2 + MAX_FILES / 2;

/// Receives one message, and the files that came with it, close-on-exec.
///
/// # Errors
/// The host's reason; `WouldBlock` when nothing is there and waiting is off; `InvalidData` when more files came
/// than [`MAX_FILES`], or than this process may have: those that arrived are closed.
pub fn receive_with_files(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    flags: libc::c_int,
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut message = libc::msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: &raw mut part,
        msg_iovlen: 1,
        msg_control: control.as_mut_ptr().cast(),
        msg_controllen: size_of_val(&control),
        msg_flags: 0,
    };
    let received = retry(|| {
        // SAFETY: the message names `bytes` and `control` with their lengths; both outlive the call.
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags | libc::MSG_CMSG_CLOEXEC) }
    })?;
    let files = files(&message);
    if message.msg_flags & libc::MSG_CTRUNC != 0 {
        // What files are for is told by their order: some of them are of no use.
        return Err(io::Error::new(io::ErrorKind::InvalidData, "files that came with a message were lost"));
    }
    Ok((received, files))
}

/// The files in the control data of `message`, which the kernel has filled in.
fn files(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut files = Vec::new();
    // SAFETY: the control data is as long as the message says, as the kernel left it.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: a header that is not null lies whole inside the control data, which is aligned for it.
        let head = unsafe { header.read() };
        if head.cmsg_level == libc::SOL_SOCKET && head.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: takes a number only.
            let before = usize::try_from(unsafe { libc::CMSG_LEN(0) }).unwrap_or(usize::MAX);
            let count = head.cmsg_len.saturating_sub(before).checked_div(size_of::<RawFd>()).unwrap_or(0);
            // SAFETY: the header is valid (above); its data follows it.
            let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
            for index in 0..count {
                // SAFETY: `count` descriptors lie in the data, by the length the kernel wrote.
                let number = unsafe { data.wrapping_add(index).read_unaligned() };
                // SAFETY: the kernel has just installed this descriptor for us; nobody else knows it.
                files.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        // SAFETY: as for the first header.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    files
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

    use super::*;

    fn send(socket: &UnixStream, files: &[RawFd]) {
        let control = [ControlMessage::ScmRights(files)];
        let control = if files.is_empty() { &[][..] } else { &control[..] };
        let part = [io::IoSlice::new(b"x")];
        sendmsg::<()>(socket.as_raw_fd(), &part, control, MsgFlags::empty(), None).unwrap();
    }

    #[test]
    fn files_arrive_in_order_with_the_bytes_they_were_sent_with() {
        let (near, far) = UnixStream::pair().unwrap();
        let (null, zero) = (File::open("/dev/null").unwrap(), File::open("/dev/zero").unwrap());
        send(&near, &[null.as_raw_fd(), zero.as_raw_fd()]);
        send(&near, &[]);
        let mut bytes = [0; 8];
        let (received, files) = receive_with_files(far.as_fd(), &mut bytes, 0).unwrap();
        let names = files.iter().map(|file| {
            let link = format!("/proc/self/fd/{}", file.as_raw_fd());
            std::fs::read_link(link).unwrap().display().to_string()
        });
        assert_eq!((received, names.collect::<Vec<_>>()), (1, vec!["/dev/null".into(), "/dev/zero".into()]));
        let (received, files) = receive_with_files(far.as_fd(), &mut bytes, 0).unwrap();
        assert_eq!((received, files.len()), (1, 0));
    }

    #[test]
    fn more_files_than_are_expected_are_an_error_and_stay_open_nowhere() {
        let (near, far) = UnixStream::pair().unwrap();
        let (kept, sent) = std::io::pipe().unwrap();
        send(&near, &[sent.as_raw_fd(); MAX_FILES + 4]);
        let error = receive_with_files(far.as_fd(), &mut [0; 8], 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(sent);
        // The pipe has no writer left, so it is at its end.
        nix::fcntl::fcntl(&kept, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
        assert_eq!(io::Read::read(&mut &kept, &mut [0]).unwrap(), 0);
    }
}
