//! A private containerd of any generation with `ctr` at hand, for suites that take the runtime by name.

pub mod config;
pub mod cri;
pub mod ctr;
pub mod daemon;
pub mod events;
pub mod image;
pub mod leaks;
pub mod surroundings;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use cri::Cri;
pub use ctr::{Ctr, Output};
pub use daemon::Daemon;
pub use events::{Event, Events};

/// A root file system of busybox; runs a shell.
pub const BUSYBOX: &str = "localhost/mvm/busybox:1";
/// The same as user 1000.
pub const AS_USER: &str = "localhost/mvm/user:1";
/// The same in a hundred layers, each with a file of its own and one that hides the layer's below.
pub const LAYERED: &str = "localhost/mvm/layered:1";
/// What a pod's own container runs.
pub const PAUSE: &str = "localhost/mvm/pause:1";
/// Layers of [`LAYERED`].
pub const LAYERS: usize = 100;

/// Who runs the containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// The judge: what holds for it must hold for ours.
    Runc,
    /// Ours.
    Mvm,
}

impl Runtime {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Runc, Self::Mvm];

    /// In the names of tests.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Mvm => "mvm",
        }
    }

    /// containerd's name of it.
    #[must_use]
    pub fn id(self) -> &'static str {
        match self {
            Self::Runc => "io.containerd.runc.v2",
            Self::Mvm => "io.containerd.mvm.v2",
        }
    }

    /// Its shim's program.
    #[must_use]
    pub fn shim(self) -> String {
        format!("containerd-shim-{}-v2", self.name())
    }

    /// The shim's process that containerd started for a container or a pod.
    #[must_use]
    pub fn shim_of(self, id: &str) -> Option<i32> {
        fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let words: Vec<_> = line.split(|&byte| byte == 0).map(String::from_utf8_lossy).collect();
            let ours = words.first()?.ends_with(&self.shim()) && words.iter().any(|word| word == id);
            entry.file_name().to_string_lossy().parse().ok().filter(|_| ours)
        })
    }
}

/// What `integration/containerd/fetch.sh` left for one generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installation {
    /// `1.6`, `1.7` or `2`.
    pub generation: String,
    /// Where `containerd` and `ctr` are.
    pub programs: PathBuf,
    /// Where `runc` is.
    pub runc: PathBuf,
    /// Where CNI plugins are.
    pub plugins: PathBuf,
}

impl Installation {
    /// Every generation below `dir`, oldest first.
    ///
    /// # Errors
    /// Nothing was fetched.
    pub fn all(dir: &Path) -> io::Result<Vec<Self>> {
        let list = fs::read_to_string(dir.join("generations"))?;
        let (runc, plugins) = (dir.join("runc").canonicalize()?, dir.join("cni").canonicalize()?);
        let generation = |line: &str| {
            let (generation, programs) = line.split_once(' ')?;
            Some(Self {
                generation: generation.to_owned(),
                programs: programs.into(),
                runc: runc.clone(),
                plugins: plugins.clone(),
            })
        };
        Ok(list.lines().filter_map(generation).collect())
    }

    /// The version that Debian gave the package.
    #[must_use]
    pub fn version(&self) -> String {
        let name = self.programs.file_name().unwrap_or_default().to_string_lossy();
        name.split_once('_').map_or_else(|| name.to_string(), |(_, version)| version.to_owned())
    }
}
