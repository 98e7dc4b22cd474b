//! The disks of this guest, found by their virtio serial.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{
    bus,
    error::{Context, Error, Result},
    uevent::Uevents,
};

/// Longest virtio serial (virtio 1.2 §5.2.6.1).
const MAX_SERIAL: usize = 20;

/// Fewest sectors of a disk that anything can be on. Until the kernel has heard that there is a disk in a place that was
/// empty, it takes it for one of a single sector: of a change from none it tells nobody.
const LEAST_SECTORS: u64 = 8;

/// How long a disk may take to show after its container was asked for.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where disks are looked for.
pub(crate) struct Disks {
    /// Where the kernel lists block devices: `/sys/block`.
    listed: PathBuf,
    /// Where the kernel is told to look for new PCI functions, if that is this agent's to do.
    rescan: Option<PathBuf>,
    /// How long a disk that is not there is waited for.
    patience: Duration,
}

/// What there is of a disk.
enum Found {
    /// It can be mounted.
    Device(String),
    /// It is there, and the kernel is about to learn how large it is.
    Coming,
    Nothing,
}

impl Disks {
    /// Those that are listed in this directory, and those that the kernel finds when it is told to at `rescan`.
    pub(crate) fn new(listed: PathBuf, rescan: Option<PathBuf>) -> Self {
        Self { listed, rescan, patience: PATIENCE }
    }

    /// The device whose virtio serial is this. Names like vda follow the order of probing and mean
    /// nothing. A disk that has just been attached may take a moment to show.
    pub(crate) fn device(&self, serial: &str) -> Result<String> {
        if serial.is_empty() || serial.len() > MAX_SERIAL {
            return Err(Error::Invalid(format!("disk serial {serial:?} is not 1 to 20 bytes")));
        }
        if let Found::Device(device) = self.look_for(serial)? {
            return Ok(device);
        }
        let missing = || Error::NotFound(format!("no disk has the serial {serial}"));
        let deadline = Instant::now() + self.patience;
        // Listens first and looks then: what comes in between is not missed.
        let events = Uevents::new().map_err(|_| missing())?;
        let mut found = self.look_for(serial)?;
        if let (Found::Nothing, Some(rescan)) = (&found, &self.rescan) {
            // It may have been plugged in just now, of which nobody tells the kernel.
            let _ = fs::write(rescan, "1");
            found = self.look_for(serial)?;
        }
        loop {
            if let Found::Device(device) = found {
                return Ok(device);
            }
            if !events.wait(deadline) {
                return Err(missing());
            }
            found = self.look_for(serial)?;
        }
    }

    /// Has the kernel look for functions that were plugged in.
    pub(crate) fn rescan(&self) -> Result<()> {
        let missing = || Error::NotFound("no PCI bus to look for devices on".into());
        fs::write(self.rescan.as_ref().ok_or_else(missing)?, "1")
            .context(|| "cannot rescan the PCI bus".into())
    }

    /// Takes the PCI function away that carries the disk of this serial.
    pub(crate) fn eject(&self, serial: &str) -> Result<()> {
        let disk =
            self.find(serial)?.ok_or_else(|| Error::NotFound(format!("no disk has the serial {serial}")))?;
        bus::remove(&disk.join("device"), || format!("cannot remove the function of disk {serial}"))
    }

    fn look_for(&self, serial: &str) -> Result<Found> {
        let Some(disk) = self.find(serial)? else { return Ok(Found::Nothing) };
        let Some(name) = disk.file_name().and_then(|name| name.to_str()) else { return Ok(Found::Nothing) };
        // A file that is not there says nothing.
        let size = fs::read_to_string(disk.join("size")).unwrap_or_default();
        let coming = size.trim().parse::<u64>().is_ok_and(|sectors| sectors < LEAST_SECTORS);
        Ok(if coming { Found::Coming } else { Found::Device(format!("/dev/{name}")) })
    }

    fn find(&self, serial: &str) -> Result<Option<PathBuf>> {
        let disks = fs::read_dir(&self.listed).context(|| "cannot list block devices".into())?;
        Ok(disks.flatten().map(|disk| disk.path()).find(|disk| has_serial(disk, serial)))
    }
}

fn has_serial(disk: &Path, serial: &str) -> bool {
    fs::read(disk.join("serial")).is_ok_and(|it| trim(&it) == serial.as_bytes())
}

/// The text of a sysfs file without its end.
fn trim(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|&byte| byte == 0 || byte == b'\n').unwrap_or(bytes.len());
    &bytes[..end]
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    /// These disks, by name and serial, which nobody waits for, below `directory`.
    pub(crate) fn disks(directory: &Path, disks: &[(&str, &str)]) -> Disks {
        let listed = directory.join("block");
        fs::create_dir_all(&listed).unwrap();
        for (name, serial) in disks {
            fs::create_dir_all(listed.join(name)).unwrap();
            fs::write(listed.join(name).join("serial"), serial).unwrap();
        }
        Disks { listed, rescan: Some(directory.join("rescan")), patience: Duration::ZERO }
    }

    fn guest() -> (TempDir, Disks) {
        let dir = tempfile::tempdir().unwrap();
        let disks = disks(dir.path(), &[("vda", "a"), ("vdb", "b\n")]);
        (dir, disks)
    }

    #[test]
    fn a_missing_disk_is_named_after_the_kernel_has_looked_for_it() {
        let (_dir, disks) = guest();
        let rescan = disks.rescan.clone().unwrap();
        assert_eq!(disks.device("b").unwrap(), "/dev/vdb");
        assert!(!rescan.exists(), "it is there");
        let error = disks.device("ab").unwrap_err();
        assert!(matches!(&error, Error::NotFound(text) if text == "no disk has the serial ab"), "{error}");
        assert_eq!(fs::read_to_string(&rescan).unwrap(), "1");
    }

    #[test]
    fn a_disk_of_a_single_sector_is_waited_for_without_looking_for_others() {
        let (_dir, disks) = guest();
        for (sectors, there) in
            [("0\n", false), ("1\n", false), ("7\n", false), ("8\n", true), ("2048\n", true)]
        {
            fs::write(disks.listed.join("vda/size"), sectors).unwrap();
            let found = disks.device("a");
            assert_eq!(found.ok(), there.then(|| "/dev/vda".to_owned()), "{sectors}");
        }
        assert!(!disks.rescan.unwrap().exists());
    }

    #[test]
    fn the_function_that_carries_a_disk_is_ejected() {
        let (dir, disks) = guest();
        let devices = dir.path().join("devices");
        for (disk, function) in [("vda", "0000:00:05.0"), ("vdb", "0000:00:06.0")] {
            fs::create_dir_all(devices.join(function).join("virtio1")).unwrap();
            fs::write(devices.join(function).join("remove"), "").unwrap();
            symlink(devices.join(function).join("virtio1"), disks.listed.join(disk).join("device")).unwrap();
        }
        disks.eject("b").unwrap();
        let written = |function: &str| fs::read_to_string(devices.join(function).join("remove")).unwrap();
        assert_eq!((written("0000:00:05.0"), written("0000:00:06.0")), (String::new(), "1".to_owned()));
        assert!(matches!(disks.eject("c"), Err(Error::NotFound(_))));
    }
}
