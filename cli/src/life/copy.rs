//! `mvm cp`: files from and to a running container.

mod from;
mod to;

use std::path::Path;

use mvm_protocol::{Get, Got, Place};
use mvm_runtime::failure::Failure;
use mvm_runtime::owner::{Client, Reply, Request};
use mvm_runtime::state::{Home, Seen};

use self::from::From;
use self::to::To;
use super::args::Cp;

/// Directories within one another; a tree that has more is made up, or a loop.
const MAX_DEPTH: u32 = 64;

pub(super) fn cp(home: &Home, options: &Cp) -> Result<u8, Failure> {
    match (inside(&options.from), inside(&options.to)) {
        (None, Some((name, path))) => To(home.find(&name)?).copy(&options.from, &path)?,
        (Some((name, path)), None) => {
            From::new(home.find(&name)?, options.max_size).copy(&path, &options.to)?;
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

/// What has files to be read.
trait Guest {
    /// A file or directory from an offset, or the target of a link.
    fn get(&self, path: &str, offset: u64) -> Result<Got, Failure>;
}

impl Guest for Seen {
    fn get(&self, path: &str, offset: u64) -> Result<Got, Failure> {
        let get = Get { place: Place::Root(String::new()), path: path.to_owned(), offset };
        match Client::connect(self)?.ask(&Request::Get(get))? {
            Reply::Got(got) => Ok(got),
            _ => Err(Failure::new("the container's owner gives another answer")),
        }
    }
}

fn join(path: &str, name: &str) -> String {
    match path.trim_end_matches('/') {
        "" => name.to_owned(),
        path => format!("{path}/{name}"),
    }
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
}
