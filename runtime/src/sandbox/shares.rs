//! What of the host is copied into the guest or made there in its stead, once for all containers that show it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mvm_protocol::{Mount, MountSource, Place, Put, PutContent, PutEntry};

use super::files::{Tree, messages};
use crate::agent::AgentClient;
use crate::failure::{Context, Failure};

/// Where the agent keeps what containers bind.
const PLACE: &str = "/run/mvm";

/// What a share holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Copies of files.
    Copied(Tree),
    /// A directory in the guest's memory, empty at first, of this size in bytes (0 is half the memory), with mode and
    /// owners of the directory it stands for.
    Memory { size: u64, mode: u32, uid: u32, gid: u32 },
}

#[derive(Debug)]
struct Share {
    /// Its name in the guest.
    name: String,
    content: Content,
    /// Mounts that show it.
    users: usize,
    /// The guest has it.
    there: bool,
}

/// The shares of a sandbox, by what they stand for on the host.
#[derive(Debug, Default)]
pub(super) struct Shares {
    by_source: BTreeMap<PathBuf, Share>,
    made: u64,
}

impl Shares {
    /// The name of the share for `source`; `content` is asked for if there is none yet.
    pub(super) fn take(
        &mut self,
        source: &Path,
        content: impl FnOnce() -> Result<Content, Failure>,
    ) -> Result<String, Failure> {
        if let Some(share) = self.by_source.get_mut(source) {
            share.users = share.users.saturating_add(1);
            return Ok(share.name.clone());
        }
        let content = content()?;
        self.made = self.made.saturating_add(1);
        let name = format!("share-{}", self.made);
        let share = Share { name: name.clone(), content, users: 1, there: false };
        self.by_source.insert(source.to_path_buf(), share);
        Ok(name)
    }

    /// Gives the guest what it has not yet.
    pub(super) fn push(&mut self, agent: &AgentClient) -> Result<(), Failure> {
        for (source, share) in self.by_source.iter_mut().filter(|(_, share)| !share.there) {
            give(agent, share).context(|| format!("cannot bring {} into the guest", source.display()))?;
            share.there = true;
        }
        Ok(())
    }

    /// Whether files at `source` are copied.
    pub(super) fn copies(&self, source: &Path) -> bool {
        self.by_source.get(source).is_some_and(|share| matches!(share.content, Content::Copied(_)))
    }

    /// Gives the guest what has changed at `source` since it was copied.
    pub(super) fn update(&mut self, agent: &AgentClient, source: &Path) -> Result<(), Failure> {
        let Some(share) = self.by_source.get_mut(source) else { return Ok(()) };
        let Content::Copied(old) = &share.content else { return Ok(()) };
        let failed = || format!("cannot bring what has changed in {} into the guest", source.display());
        let new = Tree::read(source).context(failed)?;
        if share.there {
            for put in messages(&share.name, new.changes_since(old)) {
                agent.put(put).context(failed)?;
            }
        }
        share.content = Content::Copied(new);
        Ok(())
    }

    /// Lets go of shares by name; what nothing shows any more is removed from the guest, if there is one.
    pub(super) fn release(&mut self, agent: Option<&AgentClient>, names: &[String]) {
        self.by_source.retain(|_, share| {
            let mounts = names.iter().filter(|name| **name == share.name).count();
            if mounts == 0 {
                return true;
            }
            share.users = share.users.saturating_sub(mounts);
            let memory = matches!(share.content, Content::Memory { .. });
            // A pod's memory stays for its next container.
            if share.users > 0 || (share.there && memory) {
                return true;
            }
            if let (true, Some(agent)) = (share.there, agent) {
                // It is only room in the guest's memory that is lost if this fails.
                let _ = agent.put(removal(&share.name));
            }
            false
        });
    }

    /// Whether nothing is shown by any mount.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.by_source.is_empty()
    }

    /// Forgets everything: the machine is gone.
    pub(super) fn clear(&mut self) {
        self.by_source.clear();
    }
}

fn give(agent: &AgentClient, share: &Share) -> crate::agent::Result<()> {
    let entries = match &share.content {
        Content::Copied(tree) => tree.entries(),
        Content::Memory { size, mode, uid, gid } => {
            agent.mount(vec![Mount {
                source: MountSource::Tmpfs { size: *size },
                target: format!("{PLACE}/{}", share.name),
                read_only: false,
            }])?;
            let content = PutContent::Directory;
            vec![PutEntry { path: String::new(), mode: *mode, uid: *uid, gid: *gid, content }]
        }
    };
    messages(&share.name, entries).into_iter().try_for_each(|put| agent.put(put))
}

fn removal(name: &str) -> Put {
    let content = PutContent::Remove;
    let entry = PutEntry { path: String::new(), mode: 0, uid: 0, gid: 0, content };
    Put { place: Place::Shared(name.to_owned()), entries: vec![entry] }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: Content = Content::Memory { size: 0, mode: 0o777, uid: 0, gid: 0 };

    #[test]
    fn what_several_containers_show_is_brought_once() {
        let mut shares = Shares::default();
        let name = shares.take(Path::new("/a"), || Ok(MEMORY)).unwrap();
        let again = shares.take(Path::new("/a"), || panic!("read twice")).unwrap();
        let other = shares.take(Path::new("/b"), || Ok(MEMORY)).unwrap();
        assert_eq!(name, again);
        assert_ne!(name, other);
    }

    #[test]
    fn names_taken_for_nothing_are_forgotten_with_their_last_user() {
        let mut shares = Shares::default();
        let name = shares.take(Path::new("/a"), || Ok(MEMORY)).unwrap();
        shares.take(Path::new("/a"), || panic!("read twice")).unwrap();
        shares.release(None, std::slice::from_ref(&name));
        assert_eq!(shares.by_source.len(), 1);
        shares.release(None, std::slice::from_ref(&name));
        assert_eq!(shares.by_source.len(), 0);
        assert_ne!(shares.take(Path::new("/a"), || Ok(MEMORY)).unwrap(), name);
    }

    #[test]
    fn what_cannot_be_read_is_not_taken() {
        let mut shares = Shares::default();
        shares.take(Path::new("/a"), || Err(Failure::new("no"))).unwrap_err();
        assert!(shares.by_source.is_empty());
    }
}
