//! Opens a tap interface.
#![allow(unsafe_code)] // one ioctl

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use crate::failure::{Context, Failure};

/// Flags of `struct ifreq`: an Ethernet tap without packet information, with a virtio header on each frame.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// A tap and the name it got.
#[derive(Debug)]
pub(super) struct AnyTap {
    pub(super) file: File,
    pub(super) name: String,
}

/// Opens the tap `name` for a virtio-net device, non-blocking; makes it if it is not there (it then goes
/// away with the machine).
///
/// # Errors
/// `/dev/net/tun` cannot be opened, or the host refuses the interface: no rights, or it is in use.
pub fn open_tap(name: &str) -> Result<File, Failure> {
    let file = open_tun()?;
    attach(&file, name).context(|| format!("cannot use the tap {name}")).map_err(|failure| {
        failure.help(
            "it must be a tap (ip tuntap add NAME mode tap) that no other machine uses; root may make new ones",
        )
    })?;
    Ok(file)
}

/// Makes a tap in the calling thread's name space; in `pattern`, `%d` becomes a free number.
pub(super) fn open_new_tap(pattern: &str) -> Result<AnyTap, Failure> {
    let file = open_tun()?;
    let name = attach(&file, pattern)
        .context(|| "cannot make a tap".to_owned())
        .map_err(|failure| failure.help("run as root"))?;
    Ok(AnyTap { file, name })
}

fn open_tun() -> Result<File, Failure> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .context(|| "cannot open /dev/net/tun".to_owned())
        .map_err(|failure| {
            failure.help("load the tun module and run as root; `mvm doctor` shows what is missing")
        })
}

/// Connects `file` to the tap of this name; returns the name the kernel gave it.
fn attach(file: &File, name: &str) -> std::io::Result<String> {
    let ifr_name = [0; libc::IFNAMSIZ];
    let ifru_flags = libc::c_short::try_from(FLAGS).unwrap_or_default();
    let mut request = libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags } };
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes().iter().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    // SAFETY: the descriptor is open and the pointer is to an ifreq, as TUNSETIFF takes and fills it.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(std::io::Error::last_os_error());
    }
    let name = request.ifr_name.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0);
    Ok(String::from_utf8_lossy(&name.collect::<Vec<u8>>()).into_owned())
}
