//! Looks for an init's program in its container before the container counts as made.
//!
//! runc does, so clients expect a program that is missing to fail the creation: some leave behind a task that was
//! made and could not be started. What cannot be told for sure is left to the start.

use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use mvm_protocol::{Get, GotContent, Place};
use mvm_runtime::sandbox::Sandbox;
use oci_spec::runtime::Process as OciProcess;

use crate::error::{Error, Result};

/// Links that are followed before it is left to the guest's kernel.
const MAX_LINKS: usize = 16;
/// How long it is looked for.
const LOOK_TIME: Duration = Duration::from_secs(10);
/// Where a file is read from when its content does not matter: behind the end of any program.
const BEHIND: u64 = 1 << 40;

/// What is at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Program,
    NoProgram,
    Nothing,
    Unknown,
}

/// Refuses a process whose program is not there, or is none.
pub(super) fn check(sandbox: &dyn Sandbox, container: &str, process: &OciProcess) -> Result<()> {
    let Some(name) = process.args().as_ref().and_then(|args| args.first()) else {
        return Err(Error::invalid_argument("the process has no program"));
    };
    let places = candidates(name, process);
    let end = Instant::now() + LOOK_TIME;
    let mut denied = false;
    for place in &places {
        match look(sandbox, container, place, end) {
            Found::Program | Found::Unknown => return Ok(()),
            Found::NoProgram => denied = true,
            Found::Nothing => {}
        }
    }
    // Clients recognise these words of runc's.
    Err(Error::failed(match places.as_slice() {
        _ if denied => format!("exec: {name:?}: permission denied"),
        [] => return Ok(()),
        [place] if name.contains('/') => {
            format!("exec: {name:?}: stat {}: no such file or directory", place.display())
        }
        _ => format!("exec: {name:?}: executable file not found in $PATH"),
    }))
}

/// Where a program of this name may be.
fn candidates(name: &str, process: &OciProcess) -> Vec<PathBuf> {
    if name.contains('/') {
        return vec![process.cwd().join(name)];
    }
    let env = process.env().as_deref().unwrap_or_default();
    let path = env.iter().rev().find_map(|pair| pair.strip_prefix("PATH=")).unwrap_or_default();
    let directories = path.split(':').filter(|directory| directory.starts_with('/'));
    directories.map(|directory| Path::new(directory).join(name)).collect()
}

fn look(sandbox: &dyn Sandbox, container: &str, path: &Path, end: Instant) -> Found {
    let mut path = path.to_path_buf();
    let mut climbed = false;
    for _ in 0..MAX_LINKS {
        if Instant::now() >= end {
            return Found::Unknown;
        }
        let Some(plain) = plain(&path, &mut climbed) else { return Found::Unknown };
        let place = Place::Root(container.to_owned());
        let got = match sandbox.get(Get { place, path: plain.clone(), offset: BEHIND }) {
            Ok(got) => got,
            Err(failure) => {
                use std::io::ErrorKind::{NotADirectory, NotFound};
                let is_missing = matches!(failure.source_kind(), Some(NotFound | NotADirectory));
                return if is_missing && !climbed { Found::Nothing } else { Found::Unknown };
            }
        };
        match got.content {
            GotContent::File(_) if got.mode & 0o111 != 0 => return Found::Program,
            GotContent::Link(target) => {
                let directory = Path::new("/").join(plain);
                path = directory.parent().unwrap_or(Path::new("/")).join(target);
            }
            _ => return Found::NoProgram,
        }
    }
    Found::Unknown
}

/// A path relative to the root, without dots. Where it climbs out of what may be a link, what is found missing may
/// be elsewhere: that is noted.
fn plain(path: &Path, climbed: &mut bool) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => parts.push(name.to_str()?),
            Component::ParentDir => {
                *climbed = true;
                parts.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(args: &[&str], path: &str) -> OciProcess {
        let mut process = OciProcess::default();
        process.set_args(Some(args.iter().map(|arg| (*arg).to_owned()).collect()));
        process.set_env(Some(vec!["PATH=/wrong".to_owned(), format!("PATH={path}")]));
        process.set_cwd("/work".into());
        process
    }

    #[test]
    fn programs_are_looked_for_as_execvp_does() {
        let paths = |name: &str, path: &str| {
            let found = candidates(name, &process(&[name], path));
            found.iter().map(|path| path.display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(paths("sh", "/usr/bin::relative:/bin"), ["/usr/bin/sh", "/bin/sh"]);
        assert_eq!(paths("./run", "/bin"), ["/work/./run"]);
        assert_eq!(paths("/opt/run", "/bin"), ["/opt/run"]);
        assert!(paths("sh", "").is_empty());
    }

    #[test]
    fn paths_are_plain_and_say_when_they_climbed() {
        let mut climbed = false;
        assert_eq!(plain(Path::new("/work/./bin//x"), &mut climbed).unwrap(), "work/bin/x");
        assert!(!climbed);
        assert_eq!(plain(Path::new("/bin/../../lib/x"), &mut climbed).unwrap(), "lib/x");
        assert!(climbed);
    }
}
