//! Mounts that show something of the host's: each is brought into the guest by the way that suits it, or refused.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Instant;

use mvm_protocol::{ContainerMount, ContainerSource, DiskNode, Lower};
use sha2::{Digest, Sha256};

use super::RootfsMount;
use super::files::{MAX_BYTES, NotCopied, Tree};
use super::shares::{Content, Shares};
use crate::failure::{Context, Failure};
use crate::hex::hex;
use crate::machine::Disk;
use crate::rootfs::{self, Prepared, Upper};
use crate::spec::{HostDisk, HostMount, MountPart, Refused};

/// Part of the paths of volumes that a kubelet makes empty for a pod.
const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
/// Size of a pod's `/dev/shm` in bytes, as engines make it.
const SHM_BYTES: u64 = 64 << 20;

/// What a container brought into the guest.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    /// All its mounts, in order.
    pub(super) mounts: Vec<ContainerMount>,
    /// Nodes of disks.
    pub(super) nodes: Vec<DiskNode>,
    /// Disks for some of these.
    pub(super) disks: Vec<Disk>,
    /// Names of shares they show.
    pub(super) shared: Vec<String>,
    /// Images in use.
    images: Vec<Prepared>,
}

impl Volumes {
    /// Where the first of them is that shows something of the host.
    pub(super) fn first_of_host(&self) -> Option<&str> {
        let of_host = |it: &&ContainerMount| {
            matches!(it.source, ContainerSource::Shared(_) | ContainerSource::Disk { .. })
        };
        let mount = self.mounts.iter().find(of_host).map(|mount| mount.target.as_str());
        mount.or_else(|| self.nodes.first().map(|node| node.path.as_str()))
    }
}

/// What volumes need of the sandbox they are brought into.
pub(super) trait Host {
    /// Where images are cached.
    fn state(&self) -> &Path;

    /// From now on changes of `source` are brought into the guest.
    fn watch(&self, source: &Path);
}

/// Brings the mounts and disks of container `id`. Nothing is taken of `shares` if that fails.
pub(super) fn bring(
    id: &str,
    parts: Vec<MountPart>,
    disks: &[HostDisk],
    host: &dyn Host,
    shares: &mut Shares,
) -> Result<Volumes, Failure> {
    let mut bringing = Bringing { id, host, shares, volumes: Volumes::default() };
    let brought = parts
        .into_iter()
        .try_for_each(|part| bringing.mount(part))
        .and_then(|()| disks.iter().try_for_each(|disk| bringing.device(disk)));
    match brought {
        Ok(()) => Ok(bringing.volumes),
        Err(failure) => {
            bringing.shares.release(None, &bringing.volumes.shared, Instant::now());
            Err(failure)
        }
    }
}

struct Bringing<'a> {
    id: &'a str,
    host: &'a dyn Host,
    shares: &'a mut Shares,
    volumes: Volumes,
}

impl Bringing<'_> {
    fn mount(&mut self, part: MountPart) -> Result<(), Failure> {
        let mount = match part {
            MountPart::Guest(mount) => mount,
            MountPart::Host(mount) if mount.filesystem.is_none() && is_disk(&mount.source) => {
                return self.bound_device(&mount);
            }
            MountPart::Host(mount) => mount.from(self.host(&mount)?),
        };
        self.volumes.mounts.push(mount);
        Ok(())
    }

    /// A bind mount of a disk: its node.
    fn bound_device(&mut self, mount: &HostMount) -> Result<(), Failure> {
        let facts =
            fs::metadata(&mount.source).context(|| format!("cannot look at {}", mount.source.display()))?;
        let serial = self.disk(&mount.source, mount.read_only());
        self.volumes.nodes.push(DiskNode {
            path: mount.target.clone(),
            serial,
            mode: facts.mode() & 0o777,
            uid: facts.uid(),
            gid: facts.gid(),
        });
        Ok(())
    }

    /// A disk by its numbers: its node.
    fn device(&mut self, disk: &HostDisk) -> Result<(), Failure> {
        let source = disk.source().filter(|source| is_disk(source)).ok_or_else(|| {
            let (major, minor) = disk.number;
            Refused::new("linux.devices", format!("{}: the host has no disk {major}:{minor}", disk.path))
        })?;
        let serial = self.disk(&source, disk.read_only);
        let (path, mode, uid, gid) = (disk.path.clone(), disk.mode, disk.uid, disk.gid);
        self.volumes.nodes.push(DiskNode { path, serial, mode, uid, gid });
        Ok(())
    }

    /// A disk for the machine; its serial.
    fn disk(&mut self, source: &Path, read_only: bool) -> String {
        let serial = self.serial();
        let path = source.to_path_buf();
        self.volumes.disks.push(Disk { path, read_only, serial: serial.clone(), throwaway: false });
        serial
    }

    fn host(&mut self, mount: &HostMount) -> Result<ContainerSource, Failure> {
        let facts = fs::metadata(&mount.source)
            .context(|| format!("cannot mount {} at {}", mount.source.display(), mount.target))?;
        let kind = facts.file_type();
        if let Some(filesystem) = mount.filesystem {
            if !kind.is_file() && !kind.is_block_device() {
                return Err(refuse(mount, "is neither a disk nor an image of one"));
            }
            let serial = self.disk(&mount.source, mount.read_only());
            return Ok(ContainerSource::Disk { serial, filesystem });
        }
        if kind.is_dir() {
            return self.directory(mount, &facts);
        }
        if !kind.is_file() {
            return Err(refuse(
                mount,
                "is a socket, pipe or device of the host, which the guest cannot open",
            ));
        }
        let copied = self.copy(mount)?;
        if copied.is_some() && !mount.read_only() {
            self.shares.hold_original(&mount.source);
        }
        copied.ok_or_else(|| {
            let why =
                format!("is a file of more than {MAX_BYTES} bytes; those are not copied into the guest");
            refuse(mount, &why)
        })
    }

    fn directory(&mut self, mount: &HostMount, facts: &Metadata) -> Result<ContainerSource, Failure> {
        let path = mount.source.to_string_lossy();
        let shm = mount.target == "/dev/shm";
        if shm || path.split('/').any(|part| part == EMPTY_DIR) {
            let size = if shm { SHM_BYTES } else { 0 };
            let (mode, uid, gid) = (facts.mode() & 0o7777, facts.uid(), facts.gid());
            return self.share(mount, || Ok(Content::Memory { size, mode, uid, gid }));
        }
        if !mount.read_only() {
            return Err(refuse(
                mount,
                "is a directory of the host that the container may write to, and host and guest share no files: \
                 mount it read-only, or use an empty volume or a disk",
            ));
        }
        match self.copy(mount)? {
            Some(source) => Ok(source),
            None => self.image(mount),
        }
    }

    /// Copies files; `None` if they are too many or too large.
    fn copy(&mut self, mount: &HostMount) -> Result<Option<ContainerSource>, Failure> {
        // Before it is read: what changes meanwhile is read again.
        self.host.watch(&mount.source);
        match Tree::read(&mount.source) {
            Ok(tree) => self.share(mount, || Ok(Content::Copied(tree))).map(Some),
            Err(NotCopied::TooLarge | NotCopied::Odd(_)) => Ok(None),
            Err(error) => Err(Failure::because(format!("cannot read {}", mount.source.display()), error)),
        }
    }

    fn share(
        &mut self,
        mount: &HostMount,
        content: impl FnOnce() -> Result<Content, Failure>,
    ) -> Result<ContainerSource, Failure> {
        let name = self.shares.take(&mount.source, content)?;
        self.volumes.shared.push(name.clone());
        Ok(ContainerSource::Shared(name))
    }

    /// A read-only image of a directory, as it is now.
    fn image(&mut self, mount: &HostMount) -> Result<ContainerSource, Failure> {
        let request = rootfs::Request {
            container: &format!("{}:{}", self.id, mount.target),
            mounts: &[RootfsMount {
                kind: "bind".to_owned(),
                source: mount.source.to_string_lossy().into_owned(),
                target: String::new(),
                options: vec!["rbind".to_owned(), "ro".to_owned()],
            }],
            root: None,
            upper: Upper::Nowhere,
            directory: self.host.state(),
            layer_disks: 1,
        };
        let failed = || format!("cannot make an image of {}", mount.source.display());
        let image = rootfs::prepare(&request, self.host.state(), &mut ()).context(failed)?;
        let [Lower::Disk { serial, filesystem }] = image.lower.as_slice() else {
            return Err(Failure::new(failed()));
        };
        let source = ContainerSource::Disk { serial: serial.clone(), filesystem: *filesystem };
        self.volumes.disks.extend(image.disks.iter().cloned());
        self.volumes.images.push(image);
        Ok(source)
    }

    /// A serial that no other disk of the machine has.
    fn serial(&self) -> String {
        let digest = Sha256::digest(self.id.as_bytes());
        let id = hex(digest.iter().take(7));
        format!("{id}-v{}", self.volumes.disks.len())
    }
}

fn is_disk(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|facts| facts.file_type().is_block_device())
}

fn refuse(mount: &HostMount, why: &str) -> Failure {
    Refused::new("mounts", format!("{} at {} {why}", mount.source.display(), mount.target)).into()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use mvm_protocol::DiskFilesystem;

    use super::*;

    struct Nowhere;

    impl Host for Nowhere {
        fn state(&self) -> &Path {
            Path::new("/nowhere")
        }

        fn watch(&self, _: &Path) {}
    }

    fn mount(source: PathBuf, target: &str, read_only: bool) -> HostMount {
        let flags = if read_only { libc::MS_RDONLY } else { 0 };
        HostMount {
            source,
            filesystem: None,
            target: target.into(),
            flags,
            propagation: 0,
            data: String::new(),
        }
    }

    fn bring_one(mount: HostMount, shares: &mut Shares) -> Result<Volumes, Failure> {
        bring("c1", vec![MountPart::Host(mount)], &[], &Nowhere, shares)
    }

    #[test]
    fn a_small_file_is_copied_whether_it_may_be_written_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = dir.path().join("hosts");
        fs::write(&hosts, "127.0.0.1 localhost\n").unwrap();
        let mut shares = Shares::default();
        for read_only in [false, true] {
            let volumes = bring_one(mount(hosts.clone(), "/etc/hosts", read_only), &mut shares).unwrap();
            let [mounted] = volumes.mounts.as_slice() else { panic!("{:?}", volumes.mounts) };
            assert_eq!(mounted.source, ContainerSource::Shared(volumes.shared[0].clone()));
            assert_eq!(mounted.target, "/etc/hosts");
        }
    }

    #[test]
    fn a_directory_that_may_be_written_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let failure =
            bring_one(mount(dir.path().into(), "/data", false), &mut Shares::default()).unwrap_err();
        let report = failure.report();
        assert!(report.contains("/data") && report.contains("mount it read-only"), "{report}");
    }

    #[test]
    fn a_pods_shared_memory_and_empty_volumes_are_memory_of_the_guest() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("volumes").join(EMPTY_DIR).join("cache");
        fs::create_dir_all(&empty).unwrap();
        let mut shares = Shares::default();
        let shm = bring_one(mount(dir.path().into(), "/dev/shm", false), &mut shares).unwrap();
        let cache = bring_one(mount(empty, "/cache", false), &mut shares).unwrap();
        assert_ne!(shm.shared, cache.shared);
        assert!(shm.disks.is_empty() && cache.disks.is_empty());
    }

    #[test]
    fn a_disk_with_a_file_system_becomes_a_disk_of_the_machine() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let wanted = HostMount {
            filesystem: Some(DiskFilesystem::Ext4),
            ..mount(image.path().into(), "/data", false)
        };
        let volumes = bring_one(wanted, &mut Shares::default()).unwrap();
        let [disk] = volumes.disks.as_slice() else { panic!("{:?}", volumes.disks) };
        assert!(disk.serial.len() <= 20 && !disk.read_only);
        let source = ContainerSource::Disk { serial: disk.serial.clone(), filesystem: DiskFilesystem::Ext4 };
        assert_eq!(volumes.mounts[0].source, source);
    }

    #[test]
    fn what_cannot_be_brought_leaves_no_share_taken() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let mut shares = Shares::default();
        let parts = [(file, "/f"), (socket, "/s")].map(|(path, at)| MountPart::Host(mount(path, at, true)));
        let failure = bring("c1", parts.to_vec(), &[], &Nowhere, &mut shares).unwrap_err();
        assert!(failure.report().contains("socket"), "{}", failure.report());
        assert!(shares.is_empty());
    }

    /// A disk of this host with its number, if it has one; nothing is read of it.
    fn any_disk() -> Option<(PathBuf, (u32, u32))> {
        let disks = fs::read_dir("/sys/dev/block").ok()?.flatten();
        disks
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let (major, minor) = name.split_once(':')?;
                let number = (major.parse().ok()?, minor.parse().ok()?);
                let disk =
                    HostDisk { number, read_only: false, path: String::new(), mode: 0, uid: 0, gid: 0 };
                Some((disk.source().filter(|source| is_disk(source))?, number))
            })
            .next()
    }

    #[test]
    fn a_disk_becomes_one_of_the_machine_with_a_node_by_its_path_or_by_its_number() {
        let mut shares = Shares::default();
        let missing =
            HostDisk { number: (4000, 1), read_only: false, path: "/dev/y".into(), mode: 0, uid: 0, gid: 0 };
        let failure = bring("c1", vec![], std::slice::from_ref(&missing), &Nowhere, &mut shares).unwrap_err();
        assert!(failure.report().contains("/dev/y: the host has no disk 4000:1"), "{}", failure.report());
        let Some((source, number)) = any_disk() else { return };
        let by_path = vec![MountPart::Host(mount(source.clone(), "/dev/x", true))];
        let by_number = HostDisk { number, mode: 0o640, gid: 6, ..missing };
        let volumes = bring("c1", by_path, &[by_number], &Nowhere, &mut shares).unwrap();
        let [first, second] = volumes.disks.as_slice() else { panic!("{:?}", volumes.disks) };
        assert_eq!((&first.path, first.read_only), (&source, true));
        assert_eq!((&second.path, second.read_only), (&source, false));
        assert_ne!(first.serial, second.serial);
        let [x, y] = volumes.nodes.as_slice() else { panic!("{:?}", volumes.nodes) };
        assert_eq!((x.path.as_str(), &x.serial), ("/dev/x", &first.serial));
        assert_eq!((y.path.as_str(), &y.serial, y.mode, y.gid), ("/dev/y", &second.serial, 0o640, 6));
        assert!(volumes.mounts.is_empty());
    }
}
