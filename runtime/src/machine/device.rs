//! Disks and network interfaces as a machine takes them: an open file, and a configuration that names it.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use mvm_devices::fd::FdSlot;
use mvm_devices::virtio::net::MacAddress;
use mvm_devices::virtio::{DeviceSpec, block, net};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::plan::Disk;
use crate::failure::{Context, Failure};

/// Opens a disk's image.
pub(super) fn open_disk(disk: &Disk) -> Result<File, Failure> {
    OpenOptions::new()
        .read(true)
        .write(!disk.read_only)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOCTTY | libc::O_NONBLOCK)
        .open(&disk.path)
        .context(|| format!("cannot open disk image {}", disk.path.display()))
        .map_err(|failure| match failure.source_kind() {
            Some(ErrorKind::PermissionDenied) if !disk.read_only => failure
                .help(format!("make it writable, or attach it read-only: --disk {},ro", disk.path.display())),
            _ => failure,
        })
}

/// What is opened of a disk that is not there.
pub(super) fn no_disk() -> Result<File, Failure> {
    let made = memfd_create(c"mvm-no-disk", MFdFlags::MFD_CLOEXEC).map(File::from);
    let made = made.map_err(Into::into).and_then(|file| file.set_len(block::NO_DISK).map(|()| file));
    made.context(|| "cannot make an empty file".to_owned())
}

/// A place for a disk, whose image with nothing in it is in `slot`.
pub(super) fn empty_spec(read_only: bool, slot: FdSlot) -> DeviceSpec {
    let disk = Disk { path: PathBuf::new(), read_only, serial: String::new(), throwaway: false };
    disk_spec(&disk, slot)
}

/// A disk whose image is in `slot`.
pub(super) fn disk_spec(disk: &Disk, slot: FdSlot) -> DeviceSpec {
    DeviceSpec::Block(block::Config {
        disk: slot,
        read_only: disk.read_only,
        serial: disk.serial.clone(),
        queues: 1,
        cache: if disk.throwaway { block::Cache::Unsafe } else { block::Cache::Writeback },
    })
}

/// A network interface whose tap is in `slot`.
pub(super) fn tap_spec(mac: MacAddress, mtu: Option<u16>, only_own_mac: bool, slot: FdSlot) -> DeviceSpec {
    DeviceSpec::Net(net::Config { tap: slot, mac: Some(mac), mtu, only_own_mac })
}
