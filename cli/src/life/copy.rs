//! `mvm cp`: files from and to a running container.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use mvm_protocol::limits::MAX_PART;
use mvm_protocol::{Get, Got, GotContent, Place, Put, PutContent, PutEntry};
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::owner::{Client, Reply, Request};
use mvm_runtime::state::{Home, Seen};

use super::args::Cp;

/// Directories within one another; a guest that makes up more does not go on for ever.
const MAX_DEPTH: u32 = 64;
/// Entries of a copy from a guest, for the same reason.
const MAX_ENTRIES: u64 = 1_000_000;

pub(super) fn cp(home: &Home, options: &Cp) -> Result<u8, Failure> {
    match (inside(&options.from), inside(&options.to)) {
        (None, Some((name, path))) => To(home.find(&name)?).copy(&options.from, &path)?,
        (Some((name, path)), None) => {
            From { seen: home.find(&name)?, entries: 0 }.copy(&path, &options.to)?;
        }
        _ => {
            return Err(Failure::new("one of FROM and TO must be in a container, the other on this host")
                .help("write CONTAINER:PATH for the one in a container, ./PATH for a path with a colon"));
        }
    }
    Ok(0)
}

/// Container and path of `CONTAINER:PATH`.
fn inside(path: &Path) -> Option<(String, String)> {
    let (name, inside) = path.to_str()?.split_once(':')?;
    let plain = !name.is_empty() && !name.contains('/') && name != "." && name != "..";
    plain.then(|| (name.to_owned(), inside.trim_start_matches('/').to_owned()))
}

/// Copies to a container.
struct To(Seen);

impl To {
    fn copy(&self, from: &Path, to: &str) -> Result<(), Failure> {
        let name = from.canonicalize().ok().and_then(|it| it.file_name()?.to_str().map(str::to_owned));
        let into =
            to.is_empty() || to.ends_with('/') || matches!(self.get(to, 0), Ok(it) if is_directory(&it));
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

    fn get(&self, path: &str, offset: u64) -> Result<Got, Failure> {
        get(&self.0, path, offset)
    }
}

/// Copies from a container. What the guest says is not to be believed: names stay names, and there is an end.
struct From {
    seen: Seen,
    entries: u64,
}

impl From {
    fn copy(&mut self, from: &str, to: &Path) -> Result<(), Failure> {
        let name = from.trim_end_matches('/').rsplit('/').next().filter(|name| is_name(name));
        let target = match name {
            Some(name) if to.is_dir() => to.join(name),
            _ => to.to_owned(),
        };
        self.take_tree(from, &target, 0)
    }

    fn take_tree(&mut self, from: &str, to: &Path, depth: u32) -> Result<(), Failure> {
        self.entries += 1;
        if depth > MAX_DEPTH || self.entries > MAX_ENTRIES {
            return Err(Failure::new("the container's tree is too large to copy"));
        }
        let failed = || format!("cannot write {}", to.display());
        let got = get(&self.seen, from, 0)?;
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
            GotContent::File(first) => {
                let mut options = File::options();
                options.write(true).mode(0o600).custom_flags(nix::libc::O_NOFOLLOW);
                // Within a tree everything is new; a file named by the user is replaced.
                if depth > 0 {
                    options.create_new(true)
                } else {
                    options.create(true).truncate(true)
                };
                let mut file = options.open(to).context(failed)?;
                self.take_file(from, (first, got.size), &mut file).context(failed)?;
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
            for name in &names {
                if !is_name(name) {
                    return Err(Failure::new(format!("/{from} has an entry whose name is none")));
                }
                self.take_tree(&join(from, name), &to.join(name), depth + 1)?;
            }
            offset = offset.saturating_add(u64::try_from(names.len()).unwrap_or(u64::MAX));
            part = get(&self.seen, from, offset)?.content;
        }
        Ok(())
    }

    fn take_file(&self, from: &str, (first, size): (Vec<u8>, u64), to: &mut File) -> Result<(), Failure> {
        let (mut part, mut offset) = (first, 0_u64);
        while !part.is_empty() {
            to.write_all(&part).context(|| "cannot write".to_owned())?;
            offset = offset.saturating_add(u64::try_from(part.len()).unwrap_or(u64::MAX));
            if offset > size {
                return Err(Failure::new(format!("/{from} grew while it was copied")));
            }
            part = match get(&self.seen, from, offset)?.content {
                GotContent::File(bytes) => bytes,
                _ => return Err(Failure::new(format!("/{from} changed while it was copied"))),
            };
        }
        Ok(())
    }
}

fn get(seen: &Seen, path: &str, offset: u64) -> Result<Got, Failure> {
    let get = Get { place: Place::Root(String::new()), path: path.to_owned(), offset };
    match Client::connect(seen)?.ask(&Request::Get(get))? {
        Reply::Got(got) => Ok(got),
        _ => Err(Failure::new("the container's owner gives another answer")),
    }
}

fn is_directory(got: &Got) -> bool {
    matches!(got.content, GotContent::Directory(_))
}

fn join(path: &str, name: &str) -> String {
    match path.trim_end_matches('/') {
        "" => name.to_owned(),
        path => format!("{path}/{name}"),
    }
}

/// One ordinary component of a path.
fn is_name(name: &str) -> bool {
    let path = PathBuf::from(name);
    let mut components = path.components();
    let one = matches!(components.next(), Some(Component::Normal(it)) if it.as_bytes() == name.as_bytes());
    one && components.next().is_none() && !name.contains('\0')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_in_a_container_is_told_from_one_of_the_host() {
        let of = |text: &str| inside(Path::new(text));
        assert_eq!(of("web:/etc/hosts"), Some(("web".into(), "etc/hosts".into())));
        assert_eq!(of("web:"), Some(("web".into(), String::new())));
        for host in ["/a:b", "./a:b", "plain", ":x", "../a:b"] {
            assert_eq!(of(host), None, "{host}");
        }
    }

    #[test]
    fn a_guest_s_names_lead_nowhere() {
        for good in ["a", "a b", "...", "ä"] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", ".", "..", "/", "a/b", "/a", "a/", "a\0b"] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
