//! The containers of this guest: their roots and the texts every root gets.

use std::path::{Path, PathBuf};

use mvm_protocol::{Configure, SetupRoot, limits::MAX_ROOTS};

use crate::{
    boot::Role,
    cgroup::{self, Cgroup},
    error::{Error, Result},
    kmsg,
    root::{Root, check_id},
    step::Linux,
    storage::Storage,
};

/// All roots, and what is mounted for them.
pub(crate) struct Containers {
    pub(crate) storage: Storage,
    cgroups: Option<&'static Path>,
    /// In the order they were made; an index stays what it is.
    roots: Vec<(String, Root)>,
    /// Path below the root and text, of files the host decides.
    texts: Vec<(&'static str, String)>,
}

impl Containers {
    /// None yet.
    pub(crate) fn new(role: Role) -> Self {
        let storage = Storage::new(role.directory(), PathBuf::from("/sys/block"));
        let cgroups = (role == Role::Init).then_some(Path::new(cgroup::MOUNT_POINT));
        Self { storage, cgroups, roots: Vec::new(), texts: Vec::new() }
    }

    /// Makes a container's root; its index.
    pub(crate) fn set_up(&mut self, request: &SetupRoot) -> Result<usize> {
        check_id(&request.id)?;
        if self.roots.iter().any(|(id, _)| *id == request.id) {
            return Err(Error::Exists(format!("root {} exists", request.id)));
        }
        if self.roots.len() >= MAX_ROOTS {
            return Err(Error::Busy("the guest has as many roots as it may"));
        }
        let mark = self.storage.mark();
        let path = self.storage.mount_root(&mut Linux, &request.id, &request.lower, &request.writable)?;
        let cgroup = self.cgroups.and_then(|at| Cgroup::new(at, &request.id));
        let root = Root::enter(&path, cgroup).inspect_err(|_| self.storage.unmount_down_to(mark))?;
        write_texts(&root, &self.texts);
        self.roots.push((request.id.clone(), root));
        Ok(self.roots.len() - 1)
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
        self.roots.iter().for_each(|(_, root)| write_texts(root, &self.texts));
    }

    /// The root of this id.
    pub(crate) fn root(&self, id: &str) -> Result<&Root> {
        let found = self.roots.iter().find(|(it, _)| it == id);
        found.map(|(_, root)| root).ok_or_else(|| Error::NotFound(format!("no root {id}")))
    }

    /// A process has mounted /proc in this root.
    pub(crate) fn note_proc(&mut self, id: &str) {
        if let Some((_, root)) = self.roots.iter_mut().find(|(it, _)| it == id) {
            root.has_proc = true;
        }
    }

    /// The cgroup of the root at this index, and its id.
    pub(crate) fn cgroup(&mut self, index: usize) -> Option<(&str, &mut Cgroup)> {
        let (id, root) = self.roots.get_mut(index)?;
        Some((id, root.cgroup.as_mut()?))
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
