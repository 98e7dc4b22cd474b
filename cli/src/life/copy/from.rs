//! Files from a container. What the guest says is not to be believed: names stay names, everything within a copy is
//! new, and there is an end.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path};

use mvm_protocol::{Got, GotContent};
use mvm_runtime::failure::{Context, Failure};

use super::{Guest, MAX_DEPTH, join};
use crate::table::bytes;

/// Entries of a copy; a guest that makes up more does not go on for ever.
const MAX_ENTRIES: u64 = 1_000_000;

/// Copies from a container.
pub(super) struct From<G> {
    guest: G,
    entries: u64,
    /// Bytes that may come.
    most: u64,
    /// Those that have.
    taken: u64,
}

impl<G: Guest> From<G> {
    /// Takes at most `most` bytes.
    pub(super) fn new(guest: G, most: u64) -> Self {
        Self { guest, entries: 0, most, taken: 0 }
    }

    pub(super) fn copy(&mut self, from: &str, to: &Path) -> Result<(), Failure> {
        let name = from.trim_end_matches('/').rsplit('/').next().filter(|name| is_name(name));
        let target = match name {
            Some(name) if to.is_dir() => to.join(name),
            _ => to.to_owned(),
        };
        // A link in the place of the copy may be of an earlier copy: it leads where that guest wanted.
        if target != to && target.is_symlink() {
            return Err(Failure::new(format!("cannot write {}: it is a link", target.display())));
        }
        self.take_tree(from, &target, 0)
    }

    fn take_tree(&mut self, from: &str, to: &Path, depth: u32) -> Result<(), Failure> {
        if depth > MAX_DEPTH {
            return Err(Failure::new(format!(
                "the container's tree is more than {MAX_DEPTH} directories deep"
            )));
        }
        let failed = || format!("cannot write {}", to.display());
        let got = self.guest.get(from, 0)?;
        // Bits that give rights are not taken from a guest.
        let mode = fs::Permissions::from_mode(got.mode & 0o777);
        match got.content {
            GotContent::Directory(_) => {
                // What was there before keeps its mode: that is not the guest's to say.
                let made = match fs::create_dir(to) {
                    Err(_) if depth == 0 && to.is_dir() => false,
                    other => other.map(|()| true).context(failed)?,
                };
                self.take_entries(from, got.content, to, depth)?;
                if made { fs::set_permissions(to, mode).context(failed) } else { Ok(()) }
            }
            GotContent::File(_) => {
                let mut options = File::options();
                options.write(true).mode(0o600).custom_flags(nix::libc::O_NOFOLLOW);
                // Within a tree everything is new; a file named by the user is replaced.
                if depth > 0 {
                    options.create_new(true)
                } else {
                    options.create(true).truncate(true)
                };
                let mut file = options.open(to).context(failed)?;
                self.take_file(from, got, &mut file).context(failed)?;
                file.set_permissions(mode).context(failed)
            }
            GotContent::Link(target) => symlink(target, to).context(failed),
            GotContent::Other => Err(Failure::new(format!("/{from} is neither file, directory nor link"))),
        }
    }

    fn take_entries(&mut self, from: &str, first: GotContent, to: &Path, depth: u32) -> Result<(), Failure> {
        let (mut part, mut offset) = (first, 0_u64);
        while let GotContent::Directory(names) = part {
            if names.is_empty() {
                break;
            }
            let count = u64::try_from(names.len()).unwrap_or(u64::MAX);
            // Before any of them is taken: the names of all directories on the way are held at one time.
            self.entries = self.entries.saturating_add(count);
            if self.entries > MAX_ENTRIES {
                return Err(Failure::new(format!(
                    "the container's tree has more than {MAX_ENTRIES} entries"
                )));
            }
            for name in &names {
                if !is_name(name) {
                    return Err(Failure::new(format!("/{from} has an entry whose name is none")));
                }
                self.take_tree(&join(from, name), &to.join(name), depth + 1)?;
            }
            offset = offset.saturating_add(count);
            part = self.guest.get(from, offset)?.content;
        }
        Ok(())
    }

    fn take_file(&mut self, from: &str, got: Got, to: &mut File) -> Result<(), Failure> {
        let (mut content, mut offset) = (got.content, 0_u64);
        loop {
            let GotContent::File(part) = content else {
                return Err(Failure::new(format!("/{from} changed while it was copied")));
            };
            if part.is_empty() {
                return Ok(());
            }
            let count = u64::try_from(part.len()).unwrap_or(u64::MAX);
            offset = offset.saturating_add(count);
            if offset > got.size {
                return Err(Failure::new(format!("/{from} grew while it was copied")));
            }
            self.taken = self.taken.saturating_add(count);
            if self.taken > self.most {
                let most = bytes(self.most);
                return Err(Failure::new(format!("the container sends more than {most}"))
                    .help("allow more with --max-size if it is to be trusted"));
            }
            to.write_all(&part).context(|| "cannot write".to_owned())?;
            content = self.guest.get(from, offset)?.content;
        }
    }
}

/// One ordinary component of a path.
fn is_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let one = matches!(components.next(), Some(Component::Normal(it)) if it.as_bytes() == name.as_bytes());
    one && components.next().is_none() && !name.contains('\0')
}

#[cfg(test)]
mod tests;
