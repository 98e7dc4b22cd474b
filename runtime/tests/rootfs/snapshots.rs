//! Snapshots made by the kernel's own overlay, and what a guest makes of the disks they become.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use mvm_protocol::{DiskFilesystem, Lower, Writable};
use mvm_runtime::rootfs::{LAYER_DISKS, Prepared, Request, Upper, prepare};
use mvm_runtime::sandbox::RootfsMount;

/// Directories as a snapshotter has them, made by the kernel's own overlay.
pub(crate) struct Snapshots {
    dir: tempfile::TempDir,
    count: usize,
}

impl Snapshots {
    /// Each of `scripts` changes the merged tree in the directory it runs in; what it changed is a layer.
    pub(crate) fn new(scripts: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["state", "container", "merged"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let snapshots = Self { dir, count: scripts.len() };
        for (index, script) in scripts.iter().enumerate() {
            snapshots.add(index, script);
        }
        snapshots.add(scripts.len(), ":");
        snapshots
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn fs(&self, index: usize) -> PathBuf {
        self.path(&format!("{index}/fs"))
    }

    fn add(&self, index: usize, script: &str) {
        fs::create_dir_all(self.fs(index)).unwrap();
        fs::create_dir_all(self.path(&format!("{index}/work"))).unwrap();
        if index == 0 {
            self.run(&format!("cd 0/fs; {script}"));
        } else {
            self.run(&format!("{}; (cd merged; {script})", overlay(index)));
        }
    }

    /// Runs a script in a mount name space of its own; what it prints.
    pub(crate) fn run(&self, script: &str) -> String {
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-ec", script]).current_dir(self.dir.path());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{script}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The mount of the active snapshot above all layers, as containerd words it.
    pub(crate) fn mount(&self) -> RootfsMount {
        let lower: Vec<String> = (0..self.count).rev().map(|it| self.fs(it).display().to_string()).collect();
        let work = self.path(&format!("{}/work", self.count));
        let upper = self.fs(self.count);
        RootfsMount {
            kind: "overlay".to_owned(),
            source: "overlay".to_owned(),
            target: String::new(),
            options: vec![
                "index=off".to_owned(),
                format!("workdir={}", work.display()),
                format!("upperdir={}", upper.display()),
                format!("lowerdir={}", lower.join(":")),
            ],
        }
    }

    pub(crate) fn prepare(&self, mounts: &[RootfsMount]) -> Prepared {
        let directory = self.path("container");
        let request = Request {
            container: "c1",
            mounts,
            root: None,
            upper: Upper::Disk { bytes: 64 << 20 },
            directory: &directory,
            layer_disks: LAYER_DISKS,
        };
        prepare(&request, &self.path("state"), &mut ()).unwrap()
    }

    /// Mounts the disks as the agent would, runs a script in the root; what it prints.
    pub(crate) fn in_guest(&self, prepared: &Prepared, script: &str) -> String {
        let mut mounts = String::from("mkdir -p guest; mount -t tmpfs none guest; mkdir guest/root\n");
        let disk = |serial: &str| prepared.disks.iter().find(|disk| disk.serial == serial).unwrap();
        let mut lowers = Vec::new();
        for (index, lower) in prepared.lower.iter().enumerate() {
            let Lower::Disk { serial, filesystem } = lower else { panic!("{lower:?}") };
            let kind = if *filesystem == DiskFilesystem::Erofs { "erofs" } else { "ext4" };
            assert!(disk(serial).read_only);
            let path = disk(serial).path.display();
            mounts += &format!("mkdir guest/{index}; mount -t {kind} -o loop,ro {path} guest/{index}\n");
            lowers.push(format!("guest/{index}"));
        }
        let lowers = lowers.join(":");
        mounts += &match &prepared.writable {
            Writable::Disk { serial } => {
                assert!(!disk(serial).read_only);
                let path = disk(serial).path.display();
                format!(
                    "mkdir guest/w; mount -o loop {path} guest/w; mkdir -p guest/w/upper guest/w/work
                     mount -t overlay -o lowerdir={lowers},upperdir=guest/w/upper,workdir=guest/w/work none guest/root"
                )
            }
            Writable::Whole { serial } => format!("mount -o loop {} guest/root", disk(serial).path.display()),
            Writable::No | Writable::Tmpfs { .. } => {
                format!("mkdir guest/none; mount -t overlay -o lowerdir={lowers}:guest/none none guest/root")
            }
        };
        self.run(&format!("{mounts}\ncd guest/root; {script}"))
    }
}

pub(crate) fn overlay(index: usize) -> String {
    let lower: Vec<String> = (0..index).rev().map(|it| format!("{it}/fs")).collect();
    let lower = lower.join(":");
    format!("mount -t overlay -o lowerdir={lower},upperdir={index}/fs,workdir={index}/work none merged")
}

/// Everything about every file that a container could see.
pub(crate) const LIST: &str = r#"find . -printf '%P %y %m %U:%G %s %l %T@\n' | grep -v '^ d' | sed 's/ d \([0-9]* [0-9:]*\) [0-9]* / d \1 /' | sort; find . -type f | sort | xargs cat | sha256sum"#;
