//! Storage against a kernel that only takes notes.

use nix::errno::Errno;
use tempfile::TempDir;

use super::*;

/// Notes mounts as `kind source target data`, and fails the one it is told to.
#[derive(Default)]
struct Notebook {
    mounts: Vec<String>,
    /// Devices and how many sectors they are read ahead.
    read_ahead: Vec<(String, u32)>,
    fail_at: Option<usize>,
}

impl Kernel for Notebook {
    fn perform(&mut self, step: &Step<'_>) -> nix::Result<()> {
        if let Step::ReadAhead { device, sectors } = step {
            self.read_ahead.push((device.to_str().unwrap().to_owned(), *sectors));
        }
        if let Step::Mount(call) = step {
            if self.fail_at == Some(self.mounts.len()) {
                return Err(Errno::ENODEV);
            }
            let text = |text: &std::ffi::CString| text.to_str().unwrap().to_owned();
            let mode = if call.flags.contains(MsFlags::MS_RDONLY) { " ro" } else { "" };
            let (kind, source, target) = (text(&call.kind), text(&call.source), text(&call.target));
            self.mounts.push(format!("{kind} {source} {target} {}{mode}", text(&call.data)));
        }
        Ok(())
    }
}

struct Guest {
    storage: Storage,
    kernel: Notebook,
    base: String,
    _dir: TempDir,
}

/// A guest with these disks: name and serial.
fn guest(disks: &[(&str, &str)]) -> Guest {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("mvm");
    let text = base.to_str().unwrap().to_owned();
    let storage = Storage::new(base, crate::disks::tests::disks(dir.path(), disks));
    Guest { storage, kernel: Notebook::default(), base: text, _dir: dir }
}

impl Guest {
    fn mount_root(&mut self, lower: &[Lower], writable: Writable) -> Result<Vec<String>> {
        self.storage.mount_root(&mut self.kernel, "c1", lower, &writable)?;
        let base = format!("{}/", self.base);
        Ok(self.kernel.mounts.iter().map(|it| it.replace(&base, "")).collect())
    }
}

fn erofs(serial: &str) -> Lower {
    Lower::Disk { serial: serial.into(), filesystem: DiskFilesystem::Erofs }
}

#[test]
fn layers_are_read_ahead_less_than_disks_that_are_written() {
    let mut guest = guest(&[("vda", "a"), ("vdb", "b")]);
    guest.mount_root(&[erofs("a")], Writable::Disk { serial: "b".into() }).unwrap();
    assert_eq!(guest.kernel.read_ahead, [("/dev/vda".to_owned(), LAYER_READ_AHEAD)]);
}

#[test]
fn a_root_is_an_overlay_of_disks_found_by_serial_under_a_bounded_tmpfs() {
    let mut guest = guest(&[("vda", "base"), ("vdb", "top\n")]);
    let mounts = guest.mount_root(&[erofs("top"), erofs("base")], Writable::Tmpfs { size: 4096 }).unwrap();
    assert_eq!(
        mounts,
        [
            "erofs /dev/vdb d/0  ro",
            "erofs /dev/vda d/1  ro",
            "tmpfs tmpfs upper/c1 mode=0755,size=4096",
            "overlay overlay root/c1 lowerdir=d/0:d/1,upperdir=upper/c1/upper,workdir=upper/c1/work",
        ]
    );
}

#[test]
fn a_disk_that_is_the_whole_root_is_bound_writable_and_has_no_layers() {
    let whole = Writable::Whole { serial: "b".into() };
    let mounts = guest(&[("vda", "a"), ("vdb", "b")]).mount_root(&[], whole.clone()).unwrap();
    assert_eq!(mounts, ["ext4 /dev/vdb d/0 ", "none d/0 root/c1 "]);
    assert!(guest(&[("vda", "a"), ("vdb", "b")]).mount_root(&[erofs("a")], whole).is_err());
    assert!(guest(&[("vda", "a")]).mount_root(&[], Writable::No).is_err());
}

#[test]
fn a_single_read_only_layer_is_bound_read_only_not_overlaid() {
    let mounts = guest(&[("vda", "a")]).mount_root(&[erofs("a")], Writable::No).unwrap();
    assert_eq!(mounts, ["erofs /dev/vda d/0  ro", "none d/0 root/c1 ", "none d/0 root/c1  ro"]);
}

#[test]
fn a_disk_that_two_roots_share_is_mounted_once() {
    let mut guest = guest(&[("vda", "a")]);
    guest.mount_root(&[erofs("a")], Writable::No).unwrap();
    let mounts = guest.mount_root(&[erofs("a")], Writable::No).unwrap();
    assert_eq!(mounts.iter().filter(|it| it.starts_with("erofs")).count(), 1);
}

#[test]
fn one_disk_cannot_be_a_layer_and_writable() {
    let mut guest = guest(&[("vda", "a")]);
    let error = guest.mount_root(&[erofs("a")], Writable::Disk { serial: "a".into() }).unwrap_err();
    assert_eq!(error.to_string(), "disk a is both a layer and writable");
}

#[test]
fn a_root_without_layers_or_with_too_many_is_refused() {
    let mut guest = guest(&[("vda", "a")]);
    assert!(matches!(guest.mount_root(&[], Writable::No), Err(Error::Invalid(_))));
    let many = vec![erofs("a"); limits::MAX_LAYERS + 1];
    assert!(matches!(guest.mount_root(&many, Writable::No), Err(Error::Invalid(_))));
}

#[test]
fn a_path_that_would_smuggle_an_option_into_an_overlay_is_refused() {
    for bad in ["/a:/etc", "/a,upperdir=/etc", "relative", "/a\\"] {
        let lower = [Lower::Directory(bad.into()), Lower::Directory("/b".into())];
        let result = guest(&[]).mount_root(&lower, Writable::No);
        assert!(matches!(result, Err(Error::Invalid(_))), "{bad}");
    }
}

#[test]
fn a_hundred_and_twenty_eight_layers_fit_the_options() {
    let names: Vec<(String, String)> = (0..128).map(|at| (format!("vd{at}"), format!("layer{at}"))).collect();
    let disks: Vec<(&str, &str)> = names.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    let lower: Vec<Lower> = names.iter().map(|(_, serial)| erofs(serial)).collect();
    let mut guest = guest(&disks);
    let base_excess = (guest.base.len() - "/run/mvm".len()) * 130;
    let result = guest.mount_root(&lower, Writable::No);
    match result {
        Ok(mounts) => assert_eq!(mounts.len(), 129),
        Err(error) => assert!(base_excess > 1000, "{error}"),
    }
}

#[test]
fn a_mount_outside_the_agents_directory_is_refused() {
    let mut guest = guest(&[]);
    let base = guest.base.clone();
    for bad in ["/etc", "/", "", &base, &format!("{base}/../x"), &format!("{base}x")] {
        let source = MountSource::Tmpfs { size: 0 };
        let mount = Mount { source, target: bad.to_owned(), read_only: false };
        let result = guest.storage.mount_all(&mut guest.kernel, &[mount]);
        assert!(matches!(result, Err(Error::Invalid(_))), "{bad}");
    }
}

#[test]
fn mounts_before_one_that_fails_are_forgotten() {
    let mut guest = guest(&[("vda", "a")]);
    guest.kernel.fail_at = Some(1);
    let error = guest.mount_root(&[erofs("a")], Writable::Tmpfs { size: 0 }).unwrap_err();
    assert!(matches!(error, Error::System { errno: Errno::ENODEV, .. }));
    assert!(guest.storage.mounted.is_empty());
    assert!(guest.storage.disks.is_empty());
}

#[test]
fn what_one_root_alone_needs_goes_with_it_and_the_rest_stays() {
    let mut guest = guest(&[("vda", "shared"), ("vdb", "own")]);
    let tmpfs = Writable::Tmpfs { size: 0 };
    guest.storage.mount_root(&mut guest.kernel, "c1", &[erofs("own"), erofs("shared")], &tmpfs).unwrap();
    guest.storage.mount_root(&mut guest.kernel, "c2", &[erofs("shared")], &tmpfs).unwrap();
    guest.storage.release("c1");
    let base = format!("{}/", guest.base);
    let left: Vec<String> = guest.storage.mounted.iter().map(|it| it.replace(&base, "")).collect();
    assert_eq!(left, ["d/1", "upper/c2", "root/c2"]);
    assert!(matches!(guest.storage.eject("shared"), Err(Error::Busy(_))));
    guest.storage.mount_root(&mut guest.kernel, "c1", &[erofs("own")], &tmpfs).unwrap();
    assert!(guest.storage.mounted.contains(&format!("{base}d/2")), "a name of its own");
    guest.storage.release("c1");
    guest.storage.release("c2");
    assert!(guest.storage.mounted.is_empty() && guest.storage.disks.is_empty());
}

#[test]
fn shared_paths_are_below_the_base_and_none_of_the_agents_own() {
    let guest = guest(&[]);
    let base = Path::new(&guest.base);
    assert_eq!(guest.storage.shared("volumes/a").unwrap(), base.join("volumes/a"));
    assert_eq!(guest.storage.shared(base.join("v").to_str().unwrap()).unwrap(), base.join("v"));
    for bad in ["", "/", "/etc", "..", "a/../../b", "root/c1", "upper", "d/0"] {
        assert!(guest.storage.shared(bad).is_err(), "{bad}");
    }
}
