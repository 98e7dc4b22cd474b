//! Layers become one tree: later entries replace earlier ones, whiteouts remove them.
//!
//! Nothing here touches the host. Paths are followed inside the tree only, where `..` ends at the
//! root and symbolic links lead to other places of the tree, so that an entry cannot leave it.
//! An entry below a symbolic link goes where the link leads, as it would in a running container.

use std::collections::HashSet;

use super::error::{Error, Result, printable};
use super::limits::{
    MAX_ENTRIES, MAX_LOOKUPS, MAX_METADATA_BYTES, MAX_NAME_BYTES, MAX_PATH_BYTES, MAX_SYMLINKS,
    MAX_TOTAL_BYTES,
};
use crate::erofs::{Dirent, Kind, Meta, Node, NodeId, Tree};

/// A tree that layers are put on, one after the other.
pub(super) struct Merger {
    tree: Tree,
    /// The layer being put on.
    layer: u16,
    /// Directories made opaque in this layer already.
    opaque: HashSet<NodeId>,
    entries: u64,
    lookups: u64,
    metadata: u64,
    data: u64,
}

/// What to do about a directory that is not there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Create,
    Stop,
}

impl Merger {
    pub(super) fn new() -> Self {
        Self {
            tree: Tree::new(Meta::implied_directory()),
            layer: 0,
            opaque: HashSet::new(),
            entries: 0,
            lookups: 0,
            metadata: 0,
            data: 0,
        }
    }

    /// What follows belongs to the next layer up.
    pub(super) fn next_layer(&mut self) {
        self.layer = self.layer.saturating_add(1);
        self.opaque.clear();
    }

    pub(super) fn into_tree(self) -> Tree {
        self.tree
    }

    /// Counts `bytes` of bodies, before they are taken in.
    pub(super) fn charge_data(&mut self, bytes: u64) -> Result<()> {
        self.data = self.data.saturating_add(bytes);
        within("bytes of files", self.data, MAX_TOTAL_BYTES)
    }

    /// Puts a node at `path`. A directory on a directory only replaces what is said about it.
    pub(super) fn insert(&mut self, path: &[u8], node: Node) -> Result<NodeId> {
        let components = components(path)?;
        let Some((name, parents)) = components.split_last() else {
            return self.set_root(path, node);
        };
        let parent = self.resolve(path, parents, Missing::Create)?.ok_or_else(|| no_parent(path))?;
        self.put(parent, name, node)
    }

    /// Gives the file at `target` another name.
    pub(super) fn hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let refuse = |reason| Error::Entry { path: printable(path), reason };
        let node =
            self.find(target)?.ok_or_else(|| refuse("the file it is a hard link to does not exist"))?;
        if self.tree[node].children().is_some() {
            return Err(refuse("it is a hard link to a directory"));
        }
        let components = components(path)?;
        let (name, parents) = components.split_last().ok_or_else(|| refuse("the root is a directory"))?;
        let parent = self.resolve(path, parents, Missing::Create)?.ok_or_else(|| no_parent(path))?;
        self.link(parent, name, node)
    }

    /// Gives a file of the tree a name in a directory.
    pub(super) fn link(&mut self, parent: NodeId, name: &[u8], node: NodeId) -> Result<()> {
        check_name(name)?;
        self.charge(name.len())?;
        self.bind(parent, name, node);
        Ok(())
    }

    /// Removes what lower layers have at `name` in the directory `parent`.
    pub(super) fn whiteout(&mut self, path: &[u8], parent: &[u8], name: &[u8]) -> Result<()> {
        self.count_entry()?;
        if matches!(name, b"" | b"." | b"..") {
            return Err(Error::Entry { path: printable(path), reason: "it is a whiteout of no name" });
        }
        if let Some(parent) = self.resolve(path, &components(parent)?, Missing::Stop)? {
            self.hide(parent, name);
        }
        Ok(())
    }

    /// Removes all that lower layers have in a directory.
    pub(super) fn opaque(&mut self, path: &[u8], directory: &[u8]) -> Result<()> {
        self.count_entry()?;
        if let Some(directory) = self.resolve(path, &components(directory)?, Missing::Stop)? {
            self.clear(directory);
        }
        Ok(())
    }

    /// Puts a node into a directory of the tree.
    pub(super) fn put(&mut self, parent: NodeId, name: &[u8], node: Node) -> Result<NodeId> {
        check_name(name)?;
        let target = if let Kind::Symlink(target) = &node.kind { target.len() } else { 0 };
        self.charge(name.len() + target + node.meta.xattrs.bytes())?;
        let existing = self.child(parent, name).filter(|id| self.tree[*id].children().is_some());
        if let (Some(existing), Kind::Directory(_)) = (existing, &node.kind) {
            self.tree[existing].meta = node.meta;
            self.bind(parent, name, existing);
            return Ok(existing);
        }
        let id = self.add(node)?;
        self.bind(parent, name, id);
        Ok(id)
    }

    /// Makes a name in a directory this layer's.
    fn bind(&mut self, parent: NodeId, name: &[u8], node: NodeId) {
        let layer = self.layer;
        if let Some(children) = self.tree[parent].children_mut() {
            children.insert(name.into(), Dirent { node, layer });
        }
    }

    /// Removes `name` as far as it comes from lower layers.
    pub(super) fn hide(&mut self, parent: NodeId, name: &[u8]) {
        let layer = self.layer;
        let Some(children) = self.tree[parent].children_mut() else { return };
        match children.get(name).copied() {
            Some(dirent) if dirent.layer < layer => {
                children.remove(name);
            }
            // This layer has a directory there too: only what was below goes.
            Some(dirent) => self.clear(dirent.node),
            None => {}
        }
    }

    /// Removes what comes from lower layers in a directory, at any depth.
    pub(super) fn clear(&mut self, directory: NodeId) {
        let layer = self.layer;
        let mut pending = vec![directory];
        while let Some(id) = pending.pop() {
            // Once per layer is enough, and keeps a layer of nothing but markers cheap.
            let Some(children) = self.tree[id].children_mut().filter(|_| self.opaque.insert(id)) else {
                continue;
            };
            children.retain(|_, dirent| dirent.layer == layer);
            pending.extend(children.values().map(|dirent| dirent.node));
        }
    }

    /// What is said about the root directory.
    pub(super) fn set_root(&mut self, path: &[u8], node: Node) -> Result<NodeId> {
        self.charge(node.meta.xattrs.bytes())?;
        if node.children().is_none() {
            return Err(Error::Entry { path: printable(path), reason: "the root is a directory" });
        }
        self.tree[Tree::ROOT].meta = node.meta;
        Ok(Tree::ROOT)
    }

    /// The node at `path`, its last component not followed.
    fn find(&mut self, path: &[u8]) -> Result<Option<NodeId>> {
        let components = components(path)?;
        let Some((name, parents)) = components.split_last() else { return Ok(Some(Tree::ROOT)) };
        let parent = self.resolve(path, parents, Missing::Stop)?;
        Ok(parent.and_then(|parent| self.child(parent, name)))
    }

    fn child(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        self.tree[parent].children()?.get(name).map(|dirent| dirent.node)
    }

    /// Follows `components` from the root to a directory. With [`Missing::Create`] every directory
    /// on the way becomes this layer's.
    fn resolve(&mut self, path: &[u8], components: &[&[u8]], missing: Missing) -> Result<Option<NodeId>> {
        let refuse = |reason| Error::Entry { path: printable(path), reason };
        let count = |lookups: &mut u64, names: usize| {
            *lookups = lookups.saturating_add(names as u64);
            within("names on the way to entries of an image", *lookups, MAX_LOOKUPS)
        };
        count(&mut self.lookups, components.len())?;
        let mut pending: Vec<Box<[u8]>> = components.iter().rev().map(|name| (*name).into()).collect();
        let mut here = vec![Tree::ROOT];
        let mut followed = 0;
        while let Some(name) = pending.pop() {
            let directory = here.last().copied().unwrap_or(Tree::ROOT);
            let found = match &*name {
                b"" | b"." => continue,
                b".." => {
                    here.truncate(here.len().saturating_sub(1).max(1));
                    continue;
                }
                name => self.child(directory, name),
            };
            let Some(found) = found else {
                if missing == Missing::Stop {
                    return Ok(None);
                }
                here.push(self.put(directory, &name, Node::directory(Meta::implied_directory()))?);
                continue;
            };
            match &self.tree[found].kind {
                Kind::Directory(_) => {
                    here.push(found);
                    if missing == Missing::Create {
                        self.bind(directory, &name, found);
                    }
                }
                Kind::Symlink(target) => {
                    followed += 1;
                    if followed > MAX_SYMLINKS {
                        return Err(refuse("too many symbolic links on the way"));
                    }
                    if target.starts_with(b"/") {
                        here.truncate(1);
                    }
                    // Before they are kept: a way may end long before its last name.
                    count(&mut self.lookups, target.split(|byte| *byte == b'/').count())?;
                    pending.extend(target.split(|byte| *byte == b'/').rev().map(Box::from));
                }
                _ if missing == Missing::Stop => return Ok(None),
                _ => return Err(refuse("a file is where its directory should be")),
            }
        }
        Ok(here.last().copied())
    }

    fn add(&mut self, node: Node) -> Result<NodeId> {
        self.tree.add(node).ok_or(Error::Limit { what: "entries of an image", limit: MAX_ENTRIES })
    }

    fn count_entry(&mut self) -> Result<()> {
        self.entries += 1;
        within("entries of an image", self.entries, MAX_ENTRIES)
    }

    fn charge(&mut self, metadata: usize) -> Result<()> {
        self.count_entry()?;
        self.metadata = self.metadata.saturating_add(metadata as u64);
        within("bytes of names and attributes of an image", self.metadata, MAX_METADATA_BYTES)
    }
}

fn within(what: &'static str, used: u64, limit: u64) -> Result<()> {
    if used > limit { Err(Error::Limit { what, limit }) } else { Ok(()) }
}

fn no_parent(path: &[u8]) -> Error {
    Error::Entry { path: printable(path), reason: "its directory cannot be made" }
}

fn check_name(name: &[u8]) -> Result<()> {
    within("bytes of a file name", name.len() as u64, MAX_NAME_BYTES as u64)
}

/// The names on a path, from the root: `.` and `..` are resolved by the text alone, and `..` ends
/// at the root.
fn components(path: &[u8]) -> Result<Vec<&[u8]>> {
    within("bytes of a path", path.len() as u64, MAX_PATH_BYTES as u64)?;
    if path.contains(&0) {
        return Err(Error::Entry { path: printable(path), reason: "its path contains a zero byte" });
    }
    let mut names = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => {
                names.pop();
            }
            name => {
                check_name(name)?;
                names.push(name);
            }
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests;
