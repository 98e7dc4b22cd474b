//! Opens a tap interface.
#![allow(unsafe_code)] // one ioctl

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use crate::failure::{Context, Failure};

/// Flags of `struct ifreq`: an Ethernet tap without packet information, with a virtio header on each frame.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Opens the tap `name` for a virtio-net device, non-blocking; makes it if it is not there (it then goes
/// away with the machine).
///
/// # Errors
/// `/dev/net/tun` cannot be opened, or the host refuses the interface: no rights, or it is in use.
pub fn open_tap(name: &str) -> Result<File, Failure> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .context(|| "cannot open /dev/net/tun".to_owned())
        .map_err(|failure| {
            failure.help("load the tun module and run as root; `mvm doctor` shows what is missing")
        })?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes().iter().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(FLAGS).unwrap_or_default();
    // SAFETY: the descriptor is open and the pointer is to an ifreq, as TUNSETIFF takes it.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    if result < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Failure::because(format!("cannot use the tap {name}"), error)
            .help("it must be a tap (ip tuntap add NAME mode tap) that no other machine uses; root may make new ones"));
    }
    Ok(file)
}
