//! A memory cgroup as a meter: what its processes have and what the kernel keeps for them, whatever others do.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use mvm_runtime::cgroup;
use mvm_runtime::usage::standing_still;

/// A cgroup of its own, into which this process moves for a while. What it starts meanwhile stays.
#[derive(Debug)]
pub struct Meter {
    dir: PathBuf,
    /// Where this process came from.
    home: PathBuf,
}

impl Meter {
    /// Makes the cgroup.
    ///
    /// # Errors
    /// The host has no memory controller, or does not let this process make a cgroup.
    pub fn new() -> io::Result<Self> {
        let own = cgroup::own("memory").ok_or_else(|| io::Error::other("no cgroup of this process"))?;
        let dir = own.root.join(format!("mvm-bench-{}", std::process::id()));
        fs::create_dir(&dir)?;
        let meter = Self { dir, home: own.group };
        meter.used_kb()?; // of a hierarchy without the controller this file is not there
        Ok(meter)
    }

    /// Moves this process in.
    ///
    /// # Errors
    /// The host's reason.
    pub fn enter(&self) -> io::Result<()> {
        move_to(&self.dir)
    }

    /// Moves it back.
    ///
    /// # Errors
    /// The host's reason.
    pub fn leave(&self) -> io::Result<()> {
        move_to(&self.home)
    }

    /// kB charged once that stands still, and how much of it the kernel keeps for itself: objects, stacks, page
    /// tables of processes and of guests.
    ///
    /// # Errors
    /// The host does not tell.
    pub fn settled(&self) -> io::Result<(i64, i64)> {
        Ok((standing_still(|| self.used_kb())?, self.kernel_kb()?))
    }

    fn used_kb(&self) -> io::Result<i64> {
        self.bytes(&["memory.current", "memory.usage_in_bytes"])
    }

    fn kernel_kb(&self) -> io::Result<i64> {
        if let Ok(text) = fs::read_to_string(self.dir.join("memory.stat"))
            && let Some(bytes) = text.lines().find_map(|line| line.strip_prefix("kernel "))
        {
            return parse_kb(bytes);
        }
        self.bytes(&["memory.kmem.usage_in_bytes"])
    }

    fn bytes(&self, names: &[&str]) -> io::Result<i64> {
        let text = names.iter().find_map(|name| fs::read_to_string(self.dir.join(name)).ok());
        parse_kb(&text.ok_or_else(|| io::Error::other("no memory controller"))?)
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        // What cannot be removed is empty and costs nothing.
        let _ = self.leave();
        let _ = fs::remove_dir(&self.dir);
    }
}

fn move_to(dir: &Path) -> io::Result<()> {
    fs::write(dir.join("cgroup.procs"), std::process::id().to_string())
}

fn parse_kb(bytes: &str) -> io::Result<i64> {
    bytes.trim().parse().map(|bytes: i64| bytes / 1024).map_err(io::Error::other)
}
