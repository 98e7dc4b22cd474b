//! What is on record of a template.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::recipe::Key;
use crate::catalog::Format;
use crate::digest::{facts, sha256};
use crate::failure::{Context, Failure};

/// The version of manifests that this build writes and reads.
pub const VERSION: u32 = 1;
/// Those that are read.
const FORMAT: Format = Format { what: "manifests", version: VERSION, max_bytes: 64 * 1024, help: None };

/// What a template is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`VERSION`].
    pub version: u32,
    /// Its key.
    pub key: Key,
    /// When it was made, in seconds since the Unix epoch.
    pub created: u64,
    /// How long that took, in milliseconds.
    pub took_ms: u64,
    /// Virtual CPUs.
    pub cpus: u8,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// The kernel's command line.
    pub cmdline: String,
    /// The processor and the host's kernel.
    pub processor: String,
    /// The guest's kernel.
    pub kernel: Ingredient,
    /// The agent.
    pub agent: Ingredient,
    /// The program that is the machine.
    pub vmm: Ingredient,
    /// Release of the guest's kernel, as the agent said it.
    pub kernel_release: String,
    /// The agent's version.
    pub agent_version: String,
    /// Bytes of RAM that are in the file; the rest of it is holes.
    pub memory_bytes: u64,
    /// Bytes of the state.
    pub state_bytes: u64,
}

impl Manifest {
    /// Reads one.
    ///
    /// # Errors
    /// It is not there, too long, not understood, or of another version.
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        FORMAT.read(path)
    }

    /// Whether the files it was made of are still what they were.
    pub fn is_fresh(&self) -> bool {
        [&self.kernel, &self.agent, &self.vmm].iter().all(|it| it.is_unchanged())
    }
}

/// A file that went into a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ingredient {
    /// Where it is.
    pub path: PathBuf,
    /// By which it is known without being read: device, inode, size, times of change.
    pub facts: String,
    /// SHA-256 of its content in hex; empty as long as nobody has asked.
    pub sha256: String,
}

impl Ingredient {
    /// A file as it is now, not read.
    ///
    /// # Errors
    /// It is not there.
    pub(super) fn look(path: &Path) -> Result<Self, Failure> {
        let facts = facts(path).context(|| format!("cannot look at {}", path.display()))?;
        Ok(Self { path: path.to_owned(), facts, sha256: String::new() })
    }

    /// The same with its digest.
    ///
    /// # Errors
    /// It cannot be read, or has changed since it was looked at.
    pub(super) fn digest(self) -> Result<Self, Failure> {
        let failed = || format!("cannot digest {}", self.path.display());
        let sha256 = sha256(&self.path).context(failed)?;
        if !self.is_unchanged() {
            return Err(Failure::because(failed(), Failure::new("it has changed meanwhile")));
        }
        Ok(Self { sha256, ..self })
    }

    fn is_unchanged(&self) -> bool {
        facts(&self.path).is_ok_and(|facts| facts == self.facts)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_that_was_written_to_or_replaced_is_another_ingredient() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        fs::write(&path, "abc").unwrap();
        let it = Ingredient::look(&path).unwrap().digest().unwrap();
        assert_eq!(it.sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert!(it.is_unchanged());
        fs::write(&path, "abcd").unwrap();
        assert!(!it.is_unchanged());
        let report = it.digest().unwrap_err().report();
        assert!(report.contains("has changed meanwhile"), "{report}");
    }

    #[test]
    fn manifests_that_are_of_another_version_cut_or_made_up_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("manifest.json");
        for text in ["", "{", "[]", "{\"version\":2}", "{\"version\":1}", "{\"version\":\"1\"}"] {
            fs::write(&path, text).unwrap();
            assert!(Manifest::read(&path).is_err(), "{text}");
        }
        fs::write(&path, "{\"version\":2}").unwrap();
        let report = Manifest::read(&path).unwrap_err().report();
        assert!(report.contains("of version 1 only"), "{report}");
        assert!(Manifest::read(&dir.path().join("none")).is_err());
    }
}
