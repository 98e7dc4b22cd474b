//! A memory cgroup as a meter: what its processes have and what the kernel keeps for them, whatever others do.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::memory::standing_still;

/// Where version 2 lies, and the memory controller of version 1.
const ROOT_V2: &str = "/sys/fs/cgroup";
const ROOT_V1: &str = "/sys/fs/cgroup/memory";

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
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let (root, home) = home(&own).ok_or_else(|| io::Error::other("no cgroup of this process"))?;
        let dir = root.join(format!("mvm-bench-{}", std::process::id()));
        fs::create_dir(&dir)?;
        let meter = Self { dir, home };
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

/// The hierarchy that accounts memory and this process's directory in it, from `/proc/self/cgroup`.
fn home(own: &str) -> Option<(PathBuf, PathBuf)> {
    let path = |wanted: &str| {
        own.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let controllers = parts.nth(1)?;
            controllers
                .split(',')
                .any(|name| name == wanted)
                .then(|| parts.next().unwrap_or_default().to_owned())
        })
    };
    let (root, path) = match path("memory") {
        Some(path) => (ROOT_V1, path),
        None => (ROOT_V2, path("")?),
    };
    let root = PathBuf::from(root);
    let home = root.join(path.trim_start_matches('/'));
    Some((root, home))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchy_that_accounts_memory_is_found_in_both_versions() {
        let mixed = "9:name=systemd:/\n4:cpu,memory:/a/b\n0::/\n";
        assert_eq!(home(mixed).unwrap().1, Path::new("/sys/fs/cgroup/memory/a/b"));
        assert_eq!(home("0::/user.slice/x\n").unwrap().1, Path::new("/sys/fs/cgroup/user.slice/x"));
        assert_eq!(home("3:cpu:/\n"), None);
    }
}
