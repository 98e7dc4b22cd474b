//! Files to a container.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use mvm_protocol::limits::MAX_PART;
use mvm_protocol::{Got, GotContent, Place, Put, PutContent, PutEntry};
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::owner::{Client, Request};
use mvm_runtime::state::Seen;

use super::{Guest as _, MAX_DEPTH, join};

/// Copies to a container.
pub(super) struct To(pub(super) Seen);

impl To {
    pub(super) fn copy(&self, from: &Path, to: &str) -> Result<(), Failure> {
        let name = from.canonicalize().ok().and_then(|it| it.file_name()?.to_str().map(str::to_owned));
        let into =
            to.is_empty() || to.ends_with('/') || matches!(self.0.get(to, 0), Ok(it) if is_directory(&it));
        let target = match (into, name) {
            (true, Some(name)) => join(to, &name),
            _ => to.to_owned(),
        };
        self.put_tree(from, &target, 0)
    }

    fn put_tree(&self, from: &Path, to: &str, depth: u32) -> Result<(), Failure> {
        let failed = || format!("cannot read {}", from.display());
        if depth > MAX_DEPTH {
            return Err(Failure::new(format!("{} lies too deep", from.display())));
        }
        let metadata = if depth == 0 { from.metadata() } else { from.symlink_metadata() }.context(failed)?;
        let entry = |content| PutEntry {
            path: to.to_owned(),
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            content,
        };
        if metadata.is_dir() {
            self.put(entry(PutContent::Directory))?;
            for child in fs::read_dir(from).context(failed)? {
                let child = child.context(failed)?;
                let name = child.file_name();
                let name = name.to_str().ok_or_else(|| {
                    Failure::new(format!("{} is not a name in UTF-8", child.path().display()))
                })?;
                self.put_tree(&child.path(), &join(to, name), depth + 1)?;
            }
            return Ok(());
        }
        if metadata.is_symlink() {
            let target = fs::read_link(from).context(failed)?;
            return self.put(entry(PutContent::Link(target.to_string_lossy().into_owned())));
        }
        if !metadata.is_file() {
            return Err(Failure::new(format!("{} is neither file, directory nor link", from.display())));
        }
        let mut file = File::open(from).context(failed)?;
        let mut offset = 0;
        loop {
            let mut bytes = Vec::new();
            let most = u64::try_from(MAX_PART).unwrap_or(u64::MAX);
            (&mut file).take(most).read_to_end(&mut bytes).context(failed)?;
            let count = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            let last = count < most;
            self.put(entry(PutContent::File { offset, bytes, last }))?;
            if last {
                return Ok(());
            }
            offset += count;
        }
    }

    fn put(&self, entry: PutEntry) -> Result<(), Failure> {
        let put = Put { place: Place::Root(String::new()), entries: vec![entry] };
        Client::connect(&self.0)?.ask(&Request::Put(put)).map(drop)
    }
}

fn is_directory(got: &Got) -> bool {
    matches!(got.content, GotContent::Directory(_))
}
