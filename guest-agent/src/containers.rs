//! The containers of this guest: their roots and the texts every root gets.

use std::{
    borrow::Cow,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use mvm_protocol::{
    Configure, ContainerSource, DeviceKind, DeviceNode, DeviceRule, DiskFilesystem, DiskNode, Namespace,
    SetupRoot, Surroundings, limits::MAX_ROOTS,
};
use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    mount::MsFlags,
    sys::stat::{SFlag, fstat, major, minor, stat},
};

use crate::{
    boot::Role,
    cgroup::{self, Cgroup},
    device_rules,
    disks::Disks,
    error::{Context, Error, Result},
    kmsg,
    root::{Root, Spaces, check_id},
    step::Linux,
    storage::Storage,
    surroundings::{self, Source},
    sys::{bpf, trees},
};

/// Where programs look for the id of the machine they run on (machine-id(5)).
const MACHINE_ID: &str = "etc/machine-id";

/// All roots, and what is mounted for them.
pub(crate) struct Containers {
    pub(crate) storage: Storage,
    cgroups: Option<&'static Path>,
    /// By slot; one that is empty is used again.
    roots: Vec<Option<(String, Root)>>,
    /// Path below the root and text, of files the host decides.
    texts: Vec<(&'static str, String)>,
    /// Text of the machine's id, if it has one.
    machine_id: Option<String>,
}

impl Containers {
    /// None yet.
    pub(crate) fn new(role: Role) -> Self {
        let rescan = (role == Role::Init).then(|| PathBuf::from("/sys/bus/pci/rescan"));
        let storage = Storage::new(role.directory(), Disks::new(PathBuf::from("/sys/block"), rescan));
        let cgroups = (role == Role::Init).then_some(Path::new(cgroup::MOUNT_POINT));
        Self { storage, cgroups, roots: Vec::new(), texts: Vec::new(), machine_id: None }
    }

    /// Makes a container's root; its slot.
    pub(crate) fn set_up(&mut self, request: &SetupRoot) -> Result<usize> {
        check_id(&request.id)?;
        surroundings::check(&request.surroundings)?;
        if self.slot(&request.id).is_some() {
            return Err(Error::Exists(format!("root {} exists", request.id)));
        }
        let slot = self.roots.iter().position(Option::is_none).unwrap_or(self.roots.len());
        if slot >= MAX_ROOTS {
            return Err(Error::Busy("the guest has as many roots as it may"));
        }
        let mut root = self.make(request).inspect_err(|_| self.storage.release(&request.id))?;
        write_texts(&root, &self.texts);
        if let Some(id) = &self.machine_id {
            // A root that cannot be written is one without.
            if let Ok(true) = root.write_if_blank(MACHINE_ID, id) {
                root.machine_id = Some(id.clone());
            }
        }
        if slot == self.roots.len() {
            self.roots.push(None);
        }
        if let Some(free) = self.roots.get_mut(slot) {
            *free = Some((request.id.clone(), root));
        }
        Ok(slot)
    }

    fn make(&mut self, request: &SetupRoot) -> Result<Root> {
        let SetupRoot { id, lower, writable, surroundings } = request;
        let surroundings = &self.with_disks(surroundings)?;
        let joined = self.joined(surroundings)?;
        let path = self.storage.mount_root(&mut Linux, id, lower, writable)?;
        let sources = self.sources(id, surroundings)?;
        let cgroup = self.cgroups.and_then(|at| Cgroup::new(at, id));
        let root = Root::make(&path, surroundings, joined, &sources, cgroup)?;
        // Last, so that the set-up itself is not held back by them.
        let confined = !surroundings.limits.files.is_empty() || !surroundings.device_rules.is_empty();
        match &root.cgroup {
            Some(cgroup) => {
                cgroup.limit(&surroundings.limits)?;
                guard_devices(cgroup, surroundings)?;
            }
            None if confined => return Err(Error::NotFound("the guest has no cgroups".into())),
            None => {}
        }
        Ok(root)
    }

    /// The same with the nodes of its disks and the right to use them, by the numbers they have here.
    fn with_disks<'a>(&self, surroundings: &'a Surroundings) -> Result<Cow<'a, Surroundings>> {
        let mut known = Cow::Borrowed(surroundings);
        for DiskNode { path, serial, mode, uid, gid } in &surroundings.disks {
            let device = self.storage.found.device(serial)?;
            let number = stat(device.as_str()).context(|| format!("cannot look at {device}"))?.st_rdev;
            let of = |part: u64| {
                u32::try_from(part).map_err(|_| Error::Invalid(format!("{device} has no number")))
            };
            let (kind, major, minor) = (DeviceKind::Block, of(major(number))?, of(minor(number))?);
            let known = known.to_mut();
            let (path, mode, uid, gid) = (path.clone(), *mode, *uid, *gid);
            known.devices.push(DeviceNode { path, kind, major, minor, mode, uid, gid });
            if !surroundings.device_rules.is_empty() {
                known.device_rules.push(DeviceRule {
                    allow: true,
                    kind: Some(kind),
                    major: Some(major),
                    minor: Some(minor),
                    access: "rwm".to_owned(),
                });
            }
        }
        Ok(known)
    }

    /// The name spaces that a root shares with others.
    fn joined(&self, surroundings: &Surroundings) -> Result<Spaces> {
        let of = |namespace: &Namespace, which: fn(&Spaces) -> &Option<OwnedFd>| match namespace {
            Namespace::Guest | Namespace::Own => Ok(None),
            Namespace::Of(id) => {
                let space = which(&self.root(id)?.spaces).as_ref();
                space
                    .map(OwnedFd::try_clone)
                    .transpose()
                    .context(|| format!("cannot join a name space of {id}"))
            }
        };
        let namespaces = &surroundings.namespaces;
        Ok(Spaces {
            ipc: of(&namespaces.ipc, |it| &it.ipc)?,
            uts: of(&namespaces.uts, |it| &it.uts)?,
            cgroup: of(&namespaces.cgroup, |it| &it.cgroup)?,
            mount: None,
        })
    }

    /// What a container's mounts show that is not of itself.
    fn sources(&mut self, id: &str, surroundings: &Surroundings) -> Result<Vec<Option<Source>>> {
        let mut sources = Vec::new();
        for mount in &surroundings.mounts {
            let flags = MsFlags::from_bits_retain(mount.flags);
            sources.push(match &mount.source {
                ContainerSource::Filesystem(_) | ContainerSource::Inside(_) => None,
                ContainerSource::Shared(path) => {
                    let path = self.storage.shared(path)?;
                    Some(open_source(&path, flags.contains(MsFlags::MS_REC))?)
                }
                ContainerSource::Disk { serial, filesystem } => {
                    let read_only = *filesystem == DiskFilesystem::Erofs;
                    let flags = if read_only { flags | MsFlags::MS_RDONLY } else { flags };
                    let path = self.storage.disk(&mut Linux, id, (serial, *filesystem), flags)?;
                    Some(open_source(Path::new(&path), false)?)
                }
            });
        }
        Ok(sources)
    }

    /// Keeps the texts of a configuration for later roots and puts them into those that are there.
    pub(crate) fn configure(&mut self, request: &Configure) {
        let hostname = request.hostname.as_ref().map(|name| format!("{name}\n"));
        let new = [
            ("etc/hostname", hostname),
            ("etc/resolv.conf", request.resolv_conf.clone()),
            ("etc/hosts", request.hosts.clone()),
        ];
        for (path, text) in new.into_iter().filter_map(|(path, text)| Some((path, text?))) {
            self.texts.retain(|(it, _)| *it != path);
            self.texts.push((path, text));
        }
        self.roots.iter().flatten().for_each(|(_, root)| write_texts(root, &self.texts));
    }

    /// The id of the machine that roots made from now on are told; 0 is none.
    pub(crate) fn name_machine(&mut self, id: u128) {
        self.machine_id = (id != 0).then(|| format!("{id:032x}\n"));
    }

    /// A root that was told the machine's id is told the one it has now, unless the container has written another.
    pub(crate) fn tell_id(&mut self, root: &str) -> Result<()> {
        let Some(id) = self.machine_id.clone() else { return Ok(()) };
        let root = self.root_mut(root)?;
        if let Some(old) = &root.machine_id
            && *old != id
            && root.says(MACHINE_ID, old)
        {
            root.write_file(MACHINE_ID, &id)?;
            root.machine_id = Some(id);
        }
        Ok(())
    }

    /// Does in a template what each of its clones would have to do.
    pub(crate) fn warm(&self) {
        if let Some(mount_point) = self.cgroups {
            cgroup::warm(mount_point);
        }
    }

    /// Whether all processes of all containers are stopped, as far as the kernel can stop them.
    pub(crate) fn are_frozen(&self) -> bool {
        let frozen = |(_, root): &(String, Root)| root.cgroup.as_ref().is_none_or(Cgroup::frozen);
        self.roots.iter().flatten().all(frozen)
    }

    /// Whether there is no root.
    pub(crate) fn is_empty(&self) -> bool {
        self.roots.iter().all(Option::is_none)
    }

    /// The slot of the root of this id.
    pub(crate) fn slot(&self, id: &str) -> Option<usize> {
        self.roots.iter().position(|root| root.as_ref().is_some_and(|(it, _)| it == id))
    }

    /// How many slots there are, empty ones too.
    pub(crate) fn slots(&self) -> usize {
        self.roots.len()
    }

    /// The root of this id.
    pub(crate) fn root(&self, id: &str) -> Result<&Root> {
        let found = self.roots.iter().flatten().find(|(it, _)| it == id);
        found.map(|(_, root)| root).ok_or_else(|| Error::NotFound(format!("no root {id}")))
    }

    /// The root of this id.
    pub(crate) fn root_mut(&mut self, id: &str) -> Result<&mut Root> {
        let found = self.roots.iter_mut().flatten().find(|(it, _)| it == id);
        found.map(|(_, root)| root).ok_or_else(|| Error::NotFound(format!("no root {id}")))
    }

    /// A process has mounted /proc in this root.
    pub(crate) fn note_proc(&mut self, id: &str) {
        if let Ok(root) = self.root_mut(id) {
            root.has_proc = true;
        }
    }

    /// The cgroup of the root of this id.
    pub(crate) fn cgroup_of(&self, id: &str) -> Result<&Cgroup> {
        let cgroup = self.root(id)?.cgroup.as_ref();
        cgroup.ok_or_else(|| Error::NotFound(format!("root {id} has no cgroup")))
    }

    /// The cgroup of the root in this slot, and its id.
    pub(crate) fn cgroup(&mut self, slot: usize) -> Option<(&str, &mut Cgroup)> {
        let (id, root) = self.roots.get_mut(slot)?.as_mut()?;
        Some((id, root.cgroup.as_mut()?))
    }

    /// Gives up a root that has no process left, and what was mounted for it alone.
    pub(crate) fn remove(&mut self, id: &str) {
        if let Some(slot) = self.slot(id).and_then(|slot| self.roots.get_mut(slot)) {
            *slot = None;
            self.storage.release(id);
        }
    }

    /// Gives up all roots and unmounts everything.
    pub(crate) fn unmount_all(&mut self) {
        self.roots.clear();
        self.storage.unmount_down_to(0);
    }
}

/// A read-only root keeps its own texts; that is worth a line, not a failure.
fn write_texts(root: &Root, texts: &[(&'static str, String)]) {
    for (path, text) in texts {
        if let Err(error) = root.write_file(path, text) {
            kmsg::say(&error.to_string());
        }
    }
}

/// Without rules a container may use what is there.
fn guard_devices(cgroup: &Cgroup, surroundings: &Surroundings) -> Result<()> {
    if surroundings.device_rules.is_empty() {
        return Ok(());
    }
    let program = device_rules::program(&surroundings.device_rules)?;
    bpf::guard_devices(cgroup.directory.as_fd(), &program)
        .context(|| "cannot install the device rules".into())
}

/// Copies the mount at a path of the agent's that leads through no link.
fn open_source(path: &Path, recursive: bool) -> Result<Source> {
    let failed = || format!("cannot open {}", path.display());
    let how =
        OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    let found = openat2(nix::fcntl::AT_FDCWD, path, how).context(failed)?;
    let is_directory = fstat(&found).context(failed)?.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits();
    let tree = trees::copy_from(found.as_fd(), recursive).context(failed)?;
    Ok(Source { tree, is_directory })
}
