//! The two files every guest is made of: its kernel and its agent; and the initial RAM disk made of the latter.

pub mod cpio;

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::failure::{Context, Failure};
use crate::whole_file::write_whole;

/// Where an installation keeps the guest's files, under its prefix.
const SHARE: &str = "share/mvm";

/// Kernel and agent as files of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFiles {
    /// An ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The static agent.
    pub agent: PathBuf,
}

impl GuestFiles {
    /// Looks beside the running program, then where packages install them; `MVM_KERNEL` and `MVM_AGENT` win.
    ///
    /// # Errors
    /// What is missing and where it was looked for.
    pub fn find() -> Result<Self, Failure> {
        Ok(Self { kernel: find("MVM_KERNEL", "vmlinux")?, agent: find("MVM_AGENT", "mvm-agent")? })
    }

    /// The initial RAM disk that starts the agent: made once per agent, then found again in `cache`.
    ///
    /// # Errors
    /// The agent cannot be read or the cache not written.
    pub fn initrd(&self, cache: &Path) -> Result<PathBuf, Failure> {
        let facts = fs::metadata(&self.agent).context(|| format!("cannot read {}", self.agent.display()))?;
        let key = format!("{:x}-{:x}-{:x}", facts.size(), facts.mtime(), facts.ino());
        let path = cache.join(format!("agent-{key}.cpio"));
        if path.exists() {
            return Ok(path);
        }
        let failed = || format!("cannot write the initial RAM disk {}", path.display());
        let agent = fs::read(&self.agent).context(|| format!("cannot read {}", self.agent.display()))?;
        fs::create_dir_all(cache).context(failed)?;
        let mut archive = cpio::Archive::new();
        archive.program("init", &agent);
        let archive = archive.finish();
        // Two starts at once both succeed.
        write_whole(&path, |mut file| file.write_all(&archive).context(failed))?;
        Ok(path)
    }
}

fn find(variable: &str, name: &str) -> Result<PathBuf, Failure> {
    if let Some(path) = std::env::var_os(variable).map(PathBuf::from) {
        return if path.is_file() {
            Ok(path)
        } else {
            Err(Failure::new(format!("{variable} names {}, which is no file", path.display())))
        };
    }
    let places = places();
    places.iter().map(|place| place.join(name)).find(|path| path.is_file()).ok_or_else(|| {
        let looked: Vec<_> = places.iter().map(|place| place.display().to_string()).collect();
        Failure::new(format!("cannot find the guest's {name} in {}", looked.join(" or ")))
            .help(format!("build it with `make build`, or name it in {variable}"))
    })
}

fn places() -> Vec<PathBuf> {
    let mut places = Vec::new();
    if let Some(prefix) = std::env::var_os("MVM_PREFIX") {
        places.push(PathBuf::from(prefix).join(SHARE));
    }
    if let Some(prefix) =
        std::env::current_exe().ok().as_deref().and_then(Path::parent).and_then(Path::parent)
    {
        places.push(prefix.join(SHARE));
    }
    places.push(PathBuf::from("/usr").join(SHARE));
    places
}
