//! What of the host is copied into the guest or made there in its stead, once for all containers that show it.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use mvm_protocol::{Mount, MountSource, Place, Put, PutContent, PutEntry};

use super::files::{Tree, messages};
use super::write_back::{Original, fetch};
use crate::agent::{AgentClient, Error as AgentError};
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
    /// Where what containers write to it goes.
    original: Option<Original>,
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
        let share = Share { name: name.clone(), content, users: 1, there: false, original: None };
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

    /// What containers write to the file at `source` goes to the host's one day. What cannot be held cannot be
    /// written either.
    pub(super) fn hold_original(&mut self, source: &Path) {
        if let Some(share) = self.by_source.get_mut(source).filter(|share| share.original.is_none()) {
            share.original = Original::open(source).ok();
        }
    }

    /// Writes what containers have made of copied files into the host's, of all shares or of those with these names.
    /// A guest that does not tell by `end` loses what it wrote, and is not asked for the rest.
    pub(super) fn write_back(&mut self, agent: &AgentClient, names: Option<&[String]>, end: Instant) {
        let wanted = |share: &Share| names.is_none_or(|names| names.contains(&share.name));
        for (source, share) in self.by_source.iter_mut().filter(|(_, share)| share.there && wanted(share)) {
            if let Err(error) = share.write_back(agent, end) {
                log::warn!("what was written to {} is lost: {error}", source.display());
                break;
            }
        }
    }

    /// Lets go of shares by name; what nothing shows any more is removed from the guest, if there is one. An agent
    /// that does not answer is not asked again, and none is after `end`: it would have its time once for each share.
    pub(super) fn release(&mut self, mut agent: Option<&AgentClient>, names: &[String], end: Instant) {
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
            if let (true, Some(asked)) = (share.there, agent) {
                // It is only room in the guest's memory that is lost if this fails.
                let removed = asked.put_by(removal(&share.name), end);
                agent = agent.filter(|_| removed.as_ref().err().is_none_or(AgentError::is_answer));
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

impl Share {
    fn write_back(&mut self, agent: &AgentClient, end: Instant) -> io::Result<()> {
        let (Some(original), Content::Copied(tree)) = (&self.original, &mut self.content) else {
            return Ok(());
        };
        let Some(old) = tree.file() else { return Ok(()) };
        let new = fetch(agent, &self.name, end)?;
        if new != old {
            original.write(&new)?;
            tree.set_file(new);
        }
        Ok(())
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
    use std::fs;
    use std::io::Write;
    use std::time::Duration;

    use mvm_protocol::{Got, GotContent, GuestMessage, Reply, encode};

    use super::*;
    use crate::agent::tests::hostile::{client, read_frames};

    const MEMORY: Content = Content::Memory { size: 0, mode: 0o777, uid: 0, gid: 0 };

    /// Later than any call's own time.
    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

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
        shares.release(None, std::slice::from_ref(&name), soon());
        assert_eq!(shares.by_source.len(), 1);
        shares.release(None, std::slice::from_ref(&name), soon());
        assert_eq!(shares.by_source.len(), 0);
        assert_ne!(shares.take(Path::new("/a"), || Ok(MEMORY)).unwrap(), name);
    }

    #[test]
    fn an_agent_that_does_not_answer_is_asked_once_however_many_shares_it_has() {
        let (client, mut agent) = client();
        let mut shares = Shares::default();
        let names = ["/a", "/b", "/c"].map(|source| {
            let copied = Content::Copied(Tree::default());
            shares.take(Path::new(source), || Ok(copied)).unwrap()
        });
        shares.by_source.values_mut().for_each(|share| share.there = true);
        shares.release(Some(&client), &names, soon());
        assert!(shares.is_empty());
        drop(client);
        // The answer to its hello, and one question.
        read_frames(&mut agent, 2);
        assert_eq!(std::io::Read::read(&mut agent, &mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_guest_that_tells_a_file_on_and_on_has_no_more_time_for_all_of_them_than_was_said() {
        let dir = tempfile::tempdir().unwrap();
        let mut shares = Shares::default();
        for name in ["a", "b"] {
            let source = dir.path().join(name);
            fs::write(&source, "old").unwrap();
            let tree = Tree::read(&source).unwrap();
            shares.take(&source, || Ok(Content::Copied(tree))).unwrap();
            shares.hold_original(&source);
        }
        shares.by_source.values_mut().for_each(|share| share.there = true);
        let (client, mut agent) = client();
        let answers = std::thread::spawn(move || {
            // The answer to its hello comes first. The second file is not asked for.
            read_frames(&mut agent, 1);
            for id in 1..=2 {
                read_frames(&mut agent, 1);
                if id == 1 {
                    let got = Got { mode: 0, uid: 0, gid: 0, size: 0, content: GotContent::File(vec![b'x']) };
                    let answer = GuestMessage::Response { id, result: Ok(Reply::Got(got)) };
                    agent.write_all(&encode(&answer).unwrap()).unwrap();
                }
            }
            assert_eq!(std::io::Read::read(&mut agent, &mut [0]).unwrap(), 0);
        });
        let begun = Instant::now();
        shares.write_back(&client, None, begun + Duration::from_millis(500));
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        // Nothing more is asked of it either.
        let names: Vec<_> = shares.by_source.values().map(|share| share.name.clone()).collect();
        shares.release(Some(&client), &names, begun);
        drop(client);
        answers.join().unwrap();
        assert!(shares.is_empty());
        for name in ["a", "b"] {
            assert_eq!(fs::read(dir.path().join(name)).unwrap(), b"old");
        }
    }

    #[test]
    fn what_was_written_goes_to_the_file_that_was_mounted_whatever_its_path_means_by_now() {
        let dir = tempfile::tempdir().unwrap();
        let [source, moved, other] = ["source", "moved", "other"].map(|name| dir.path().join(name));
        fs::write(&source, "old").unwrap();
        fs::write(&other, "precious").unwrap();
        let mut shares = Shares::default();
        let tree = Tree::read(&source).unwrap();
        let name = shares.take(&source, || Ok(Content::Copied(tree))).unwrap();
        shares.hold_original(&source);
        shares.by_source.values_mut().for_each(|share| share.there = true);
        fs::rename(&source, &moved).unwrap();
        std::os::unix::fs::symlink(&other, &source).unwrap();
        let (client, mut agent) = client();
        let parts: [&[u8]; 6] = [b"ne", b"w", b"", b"new", b"", b""];
        let answers = std::thread::spawn(move || {
            // The answer to its hello comes first.
            read_frames(&mut agent, 1);
            for (part, id) in parts.into_iter().zip(1..) {
                read_frames(&mut agent, 1);
                let content = GotContent::File(part.to_vec());
                let got = Got { mode: 0o100_644, uid: 0, gid: 0, size: 0, content };
                let answer = GuestMessage::Response { id, result: Ok(Reply::Got(got)) };
                agent.write_all(&encode(&answer).unwrap()).unwrap();
            }
        });
        shares.write_back(&client, Some(&["another".to_owned()]), soon());
        shares.write_back(&client, Some(&[name]), soon());
        assert_eq!(fs::read(&moved).unwrap(), b"new");
        assert_eq!(fs::read(&other).unwrap(), b"precious");
        // What is as it was last told is left alone.
        fs::write(&moved, "host's").unwrap();
        shares.write_back(&client, None, soon());
        assert_eq!(fs::read(&moved).unwrap(), b"host's");
        shares.write_back(&client, None, soon());
        assert_eq!(fs::read(&moved).unwrap(), b"", "a file may be emptied");
        answers.join().unwrap();
    }

    #[test]
    fn what_cannot_be_read_is_not_taken() {
        let mut shares = Shares::default();
        shares.take(Path::new("/a"), || Err(Failure::new("no"))).unwrap_err();
        assert!(shares.by_source.is_empty());
    }
}
