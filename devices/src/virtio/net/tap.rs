//! The host's end of the cable: a tap, or in tests anything that carries whole frames.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::header::{Agreed, HEADER};
use crate::sys;
use crate::virtio::BuildError;

/// A file that takes and gives one frame per call, each after a header.
pub(crate) trait Tap: AsFd + Send {
    /// Whether it can leave UDP segmentation to the driver and do it for the driver.
    fn segments_udp(&self) -> bool;
    /// Gets ready for a driver: the frames given from now on keep to what was agreed.
    fn prepare(&mut self, agreed: Agreed) -> io::Result<()>;
}

/// A tap of the host's kernel.
#[derive(Debug)]
pub(crate) struct KernelTap {
    file: OwnedFd,
    segments_udp: bool,
}

impl KernelTap {
    /// Checks a tap that was made (`TUNSETIFF`) with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`. Of the second
    /// the kernel tells nothing (it reports the flag whether it was given or not).
    pub(crate) fn open(file: OwnedFd) -> Result<Self, BuildError> {
        let fail = |source| BuildError::File { what: "a network card's tap", source };
        let flags = sys::tap::flags(file.as_fd()).map_err(fail)?;
        for (flag, missing) in [
            (libc::IFF_TAP, "it was not made with IFF_TAP"),
            (libc::IFF_VNET_HDR, "it was not made with IFF_VNET_HDR"),
        ] {
            if flags & flag == 0 {
                return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, missing)));
            }
        }
        sys::file::set_nonblocking(file.as_fd()).map_err(fail)?;
        // There is no other way to learn it: kernels before 6.2 refuse the bits.
        let udp = libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
        let segments_udp = sys::tap::set_offloads(file.as_fd(), udp).is_ok();
        Ok(Self { file, segments_udp })
    }
}

impl AsFd for KernelTap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Tap for KernelTap {
    fn segments_udp(&self) -> bool {
        self.segments_udp
    }

    fn prepare(&mut self, agreed: Agreed) -> io::Result<()> {
        let guest = agreed.guest;
        let offloads = [
            (guest.csum, libc::TUN_F_CSUM),
            (guest.tso4, libc::TUN_F_TSO4),
            (guest.tso6, libc::TUN_F_TSO6),
            (guest.ecn, libc::TUN_F_TSO_ECN),
            (guest.uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
        ];
        let offloads = offloads.iter().filter(|(on, _)| *on).fold(0, |all, (_, offload)| all | offload);
        let size = libc::c_int::try_from(HEADER).map_err(io::Error::other)?;
        sys::tap::set_header_size(self.file.as_fd(), size)?;
        sys::tap::set_offloads(self.file.as_fd(), offloads)
    }
}
