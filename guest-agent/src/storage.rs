//! File systems in the agent's own name space: disks, tmpfs, overlays.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use mvm_protocol::{DiskFilesystem, Lower, Mount, MountSource, Writable, limits};
use nix::mount::{MntFlags, MsFlags, umount2};

use crate::{
    disks::Disks,
    error::{Context, Error, Result},
    spawn::c_string,
    step::{Kernel, MountCall, Step},
};

/// How far a layer is read ahead, in sectors of 512 bytes: a copy of what the host has in its memory already, around each
/// page of a program that is missed. With the kernel's 128 KiB a container that runs `sleep` has 476 KiB more.
const LAYER_READ_AHEAD: u32 = 64;

/// What the agent has mounted for containers, so that a disk is mounted once and all of it is unmounted.
pub(crate) struct Storage {
    /// Where everything is mounted: `/run/mvm` in a guest.
    base: PathBuf,
    /// Disks that there are.
    pub(crate) found: Disks,
    /// Disks that are mounted for containers.
    disks: Vec<Disk>,
    /// Disks mounted so far, for their directories' names.
    named: usize,
    /// All mount points, in the order they were made.
    mounted: Vec<String>,
}

/// A disk that is mounted once, for as long as a container needs it.
struct Disk {
    serial: String,
    directory: String,
    read_only: bool,
    /// The ids of the roots that need it.
    users: Vec<String>,
}

impl Storage {
    /// Nothing mounted yet.
    pub(crate) fn new(base: PathBuf, found: Disks) -> Self {
        Self { base, found, disks: Vec::new(), named: 0, mounted: Vec::new() }
    }

    /// Makes mounts in order; if one fails those made before it are undone.
    pub(crate) fn mount_all(&mut self, kernel: &mut dyn Kernel, mounts: &[Mount]) -> Result<()> {
        if mounts.len() > limits::MAX_MOUNTS {
            return Err(Error::Invalid("more mounts than are allowed".into()));
        }
        let before = self.mark();
        let result = mounts.iter().try_for_each(|mount| self.mount_one(kernel, mount));
        if result.is_err() {
            self.unmount_down_to(before);
        }
        result
    }

    fn mount_one(&mut self, kernel: &mut dyn Kernel, mount: &Mount) -> Result<()> {
        let below = Path::new(&mount.target).strip_prefix(&self.base).ok();
        let plain = |path: &Path| path.components().all(|part| matches!(part, Component::Normal(_)));
        if !below.is_some_and(|below| plain(below) && below.as_os_str() != "") {
            return Err(Error::Invalid(format!("mount target {} is not below /run/mvm", mount.target)));
        }
        let flags = if mount.read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
        match &mount.source {
            MountSource::Disk { serial, filesystem } => {
                let device = self.found.device(serial)?;
                self.mount(kernel, &disk_call(&device, &mount.target, *filesystem, flags)?)
            }
            MountSource::Tmpfs { size } => self.mount(kernel, &tmpfs_call(&mount.target, *size, flags)?),
            MountSource::Overlay { lower, upper } => {
                let upper = upper.as_ref().map(|(upper, work)| (upper.as_str(), work.as_str()));
                self.mount(kernel, &overlay_call(&mount.target, lower, upper)?)
            }
        }
    }

    /// Lays a container's root over its layers; the directory it is mounted at.
    pub(crate) fn mount_root(
        &mut self,
        kernel: &mut dyn Kernel,
        id: &str,
        lower: &[Lower],
        writable: &Writable,
    ) -> Result<String> {
        let whole = matches!(writable, Writable::Whole { .. });
        if lower.is_empty() != whole || lower.len() > limits::MAX_LAYERS {
            return Err(Error::Invalid(
                "a root needs between 1 and 128 layers, or one disk that is all of it".into(),
            ));
        }
        let result = self.lay_root(kernel, id, lower, writable);
        if result.is_err() {
            self.release(id);
        }
        result
    }

    fn lay_root(
        &mut self,
        kernel: &mut dyn Kernel,
        id: &str,
        lower: &[Lower],
        writable: &Writable,
    ) -> Result<String> {
        let layers: Vec<String> =
            lower.iter().map(|layer| self.layer(kernel, id, layer)).collect::<Result<_>>()?;
        let [target, upper_target] = self.own_targets(id);
        let upper = match writable {
            Writable::Whole { serial } => {
                let disk = self.disk(kernel, id, (serial, DiskFilesystem::Ext4), MsFlags::empty())?;
                self.mount(kernel, &bind_call(&disk, &target)?)?;
                return Ok(target);
            }
            Writable::No => None,
            Writable::Tmpfs { size } => {
                self.mount(kernel, &tmpfs_call(&upper_target, *size, MsFlags::empty())?)?;
                Some(upper_target)
            }
            Writable::Disk { serial } => {
                Some(self.disk(kernel, id, (serial, DiskFilesystem::Ext4), MsFlags::empty())?)
            }
        };
        let call = match (upper, layers.as_slice()) {
            (None, [only]) => bind_call(only, &target)?,
            (None, layers) => overlay_call(&target, layers, None)?,
            (Some(directory), layers) => {
                let (upper, work) = (format!("{directory}/upper"), format!("{directory}/work"));
                for made in [&upper, &work] {
                    let step = Step::MakeDirectory { path: c_string(made)?, mode: 0o755 };
                    kernel.perform(&step).context(|| step.to_string())?;
                }
                overlay_call(&target, layers, Some((&upper, &work)))?
            }
        };
        self.mount(kernel, &call)?;
        if call.flags.contains(MsFlags::MS_BIND) {
            // A bind mount takes its flags only when it is mounted again.
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            let step = Step::Mount(MountCall { flags, ..call });
            kernel.perform(&step).context(|| step.to_string())?;
        }
        Ok(target)
    }

    /// Where a root and its writable layer are mounted.
    fn own_targets(&self, id: &str) -> [String; 2] {
        ["root", "upper"].map(|kind| self.path(&format!("{kind}/{id}")))
    }

    fn layer(&mut self, kernel: &mut dyn Kernel, id: &str, layer: &Lower) -> Result<String> {
        match layer {
            Lower::Disk { serial, filesystem } => {
                self.disk(kernel, id, (serial, *filesystem), MsFlags::MS_RDONLY)
            }
            Lower::Directory(path) => Ok(path.clone()),
        }
    }

    /// The directory a disk is mounted at for the root `id`. The name is short because all layers of an
    /// overlay must fit in one page of options.
    pub(crate) fn disk(
        &mut self,
        kernel: &mut dyn Kernel,
        id: &str,
        (serial, filesystem): (&str, DiskFilesystem),
        flags: MsFlags,
    ) -> Result<String> {
        let read_only = flags.contains(MsFlags::MS_RDONLY);
        if let Some(disk) = self.disks.iter_mut().find(|it| it.serial == serial) {
            if disk.read_only != read_only {
                return Err(Error::Invalid(format!("disk {serial} is both a layer and writable")));
            }
            disk.users.push(id.to_owned());
            return Ok(disk.directory.clone());
        }
        let device = self.found.device(serial)?;
        if filesystem == DiskFilesystem::Erofs {
            let step = Step::ReadAhead { device: c_string(&device)?, sectors: LAYER_READ_AHEAD };
            kernel.perform(&step).context(|| step.to_string())?;
        }
        let directory = self.path(&format!("d/{}", self.named));
        self.named += 1;
        self.mount(kernel, &disk_call(&device, &directory, filesystem, flags & MsFlags::MS_RDONLY)?)?;
        let users = vec![id.to_owned()];
        self.disks.push(Disk { serial: serial.to_owned(), directory: directory.clone(), read_only, users });
        Ok(directory)
    }

    /// Unmounts what was mounted for a root alone.
    pub(crate) fn release(&mut self, id: &str) {
        for target in self.own_targets(id) {
            self.unmount(&target);
        }
        self.disks.iter_mut().for_each(|disk| disk.users.retain(|it| it != id));
        let (unused, used) = std::mem::take(&mut self.disks).into_iter().partition(|it| it.users.is_empty());
        self.disks = used;
        let unused: Vec<Disk> = unused;
        unused.iter().for_each(|disk| self.unmount(&disk.directory));
    }

    fn unmount(&mut self, target: &str) {
        if let Some(at) = self.mounted.iter().rposition(|it| it == target) {
            self.mounted.remove(at);
            detach(target);
        }
    }

    fn mount(&mut self, kernel: &mut dyn Kernel, call: &MountCall) -> Result<()> {
        let target = call.target.to_string_lossy().into_owned();
        fs::create_dir_all(&target).context(|| format!("cannot make directory {target}"))?;
        let step = Step::Mount(call.clone());
        kernel.perform(&step).context(|| step.to_string())?;
        self.mounted.push(target);
        Ok(())
    }

    /// Takes the PCI function away that carries the disk of this serial.
    pub(crate) fn eject(&self, serial: &str) -> Result<()> {
        if self.disks.iter().any(|disk| disk.serial == serial) {
            return Err(Error::Busy("the disk is mounted"));
        }
        self.found.eject(serial)
    }

    /// Where the disks are mounted that can be written.
    pub(crate) fn writable(&self) -> impl Iterator<Item = &str> {
        self.disks.iter().filter(|disk| !disk.read_only).map(|disk| disk.directory.as_str())
    }

    /// A path below the base, from the base or from the root of the agent's name space.
    pub(crate) fn shared(&self, path: &str) -> Result<PathBuf> {
        let path = Path::new(path);
        let below = path.strip_prefix(&self.base).unwrap_or(path);
        let plain = below.components().all(|part| matches!(part, Component::Normal(_)));
        if !plain
            || below.as_os_str().is_empty()
            || ["root", "upper", "d"].iter().any(|own| below.starts_with(own))
        {
            return Err(Error::Invalid(format!("{} is no shared path", path.display())));
        }
        Ok(self.base.join(below))
    }

    fn path(&self, name: &str) -> String {
        self.base.join(name).to_string_lossy().into_owned()
    }

    /// How much is mounted, to come back to.
    pub(crate) fn mark(&self) -> usize {
        self.mounted.len()
    }

    /// Unmounts what was mounted since a mark, the newest first.
    pub(crate) fn unmount_down_to(&mut self, keep: usize) {
        for target in self.mounted.drain(keep.min(self.mounted.len())..).rev() {
            detach(&target);
            self.disks.retain(|disk| disk.directory != target);
        }
    }
}

/// What is still in use vanishes from sight at once and goes when it is used no more.
fn detach(target: &str) {
    if umount2(target, MntFlags::empty()).is_err() {
        let _ = umount2(target, MntFlags::MNT_DETACH);
    }
    let _ = fs::remove_dir(target);
}

fn disk_call(device: &str, target: &str, filesystem: DiskFilesystem, flags: MsFlags) -> Result<MountCall> {
    let (kind, data) = match filesystem {
        DiskFilesystem::Erofs => (c"erofs", c""),
        DiskFilesystem::Ext4 => (c"ext4", c""),
    };
    // EROFS has no other mode, and says so when it is asked for one.
    let flags = if filesystem == DiskFilesystem::Erofs { flags | MsFlags::MS_RDONLY } else { flags };
    Ok(MountCall {
        source: c_string(device)?,
        target: c_string(target)?,
        kind: kind.into(),
        flags,
        data: data.into(),
    })
}

fn tmpfs_call(target: &str, size: u64, flags: MsFlags) -> Result<MountCall> {
    let data = if size == 0 { "mode=0755".to_owned() } else { format!("mode=0755,size={size}") };
    Ok(MountCall::of(c"tmpfs", c_string(target)?, flags, &c_string(&data)?))
}

fn bind_call(source: &str, target: &str) -> Result<MountCall> {
    Ok(MountCall {
        source: c_string(source)?,
        target: c_string(target)?,
        kind: c"none".into(),
        flags: MsFlags::MS_BIND,
        data: c"".into(),
    })
}

fn overlay_call(target: &str, lower: &[String], upper: Option<(&str, &str)>) -> Result<MountCall> {
    let paths =
        lower.iter().map(String::as_str).chain(upper.iter().flat_map(|(upper, work)| [*upper, *work]));
    for path in paths {
        if !path.starts_with('/') || path.contains([':', ',', '\\']) {
            return Err(Error::Invalid(format!("{path:?} cannot be part of an overlay")));
        }
    }
    let mut data = format!("lowerdir={}", lower.join(":"));
    if let Some((upper, work)) = upper {
        data += &format!(",upperdir={upper},workdir={work}");
    }
    // mount(2) takes one page of options.
    if data.len() >= 4096 {
        return Err(Error::Invalid("the layers' paths are too long for an overlay".into()));
    }
    Ok(MountCall::of(c"overlay", c_string(target)?, MsFlags::empty(), &c_string(&data)?))
}

#[cfg(test)]
#[path = "storage_tests.rs"]
mod tests;
