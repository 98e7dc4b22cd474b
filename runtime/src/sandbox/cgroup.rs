//! The machine's place in the host's control groups: the one its engine gives the container or pod, so that the
//! machine is accounted there, and limited as what is above it says.
//!
//! No limit is set here: those of a container hold in the guest, and those of a pod are its engine's. A host that
//! accounts for nothing, or not there, is no reason not to start a machine.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};

use crate::failure::{Context, Failure};
use crate::state::{Ledger, Resource};

/// Controllers that account for a process or limit it. The guest has devices and a freezer of its own.
const CONTROLLERS: [&str; 8] =
    ["cpu", "cpuacct", "cpuset", "memory", "blkio", "pids", "hugetlb", "perf_event"];
/// Those of version 2.
const CONTROLLERS_2: [&str; 5] = ["cpu", "cpuset", "memory", "io", "pids"];

/// A mounted hierarchy of control groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    root: PathBuf,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Version 1, and whether it is the one of CPU sets, which are empty at first.
    One { cpuset: bool },
    /// Version 2.
    Two,
}

/// Puts process `pid` where `given` (`linux.cgroupsPath`) says in each hierarchy of the host. Groups that are missing
/// are made, and the last noted in `ledger`: those above stay, as every runtime leaves them, because another
/// container may be about to be put there.
pub(super) fn join(given: &Path, ledger: &Ledger, pid: u32) {
    let Some(path) = place(given) else {
        return log::warn!("the machine is accounted nowhere: {} is no path of a cgroup", given.display());
    };
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for hierarchy in hierarchies(&mounts) {
        if let Err(failure) = hierarchy.join(&path, ledger, pid) {
            log::warn!("the machine is not accounted: {}", failure.report());
        }
    }
}

/// The hierarchies that account: those of version 1 if there are any with controllers, else version 2.
pub(crate) fn hierarchies(mounts: &str) -> Vec<Hierarchy> {
    let (mut ones, mut twos) = (Vec::new(), Vec::new());
    for (fields, rest) in mounts.lines().filter_map(|line| line.split_once(" - ")) {
        let Some(root) = fields.split(' ').nth(4).map(PathBuf::from) else { continue };
        let mut rest = rest.split(' ');
        let (kind, options) = (rest.next(), rest.nth(1).unwrap_or_default());
        let mut controllers = options.split(',').filter(|option| CONTROLLERS.contains(option)).peekable();
        match kind {
            Some("cgroup") if controllers.peek().is_some() => {
                let cpuset = controllers.any(|controller| controller == "cpuset");
                ones.push(Hierarchy { root, kind: Kind::One { cpuset } });
            }
            Some("cgroup2") => twos.push(Hierarchy { root, kind: Kind::Two }),
            _ => {}
        }
    }
    if ones.is_empty() { twos } else { ones }
}

/// The place a specification means, below the root of a hierarchy: a path, or `slice:prefix:name` of systemd, which
/// is a scope in a slice whose name says which slices it is in.
pub(crate) fn place(given: &Path) -> Option<PathBuf> {
    let text = given.to_str()?;
    let path = match text.split(':').collect::<Vec<_>>().as_slice() {
        [slice, prefix, name] if !text.starts_with('/') => {
            let scope = match name.ends_with(".slice") {
                true => (*name).to_owned(),
                false => format!("{prefix}-{name}.scope"),
            };
            expand(if slice.is_empty() { "system.slice" } else { slice })?.join(scope)
        }
        _ => PathBuf::from(text.trim_start_matches('/')),
    };
    let is_plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    (is_plain && !path.as_os_str().is_empty()).then_some(path)
}

/// The directory of a slice: `a-b.slice` is in `a.slice`, and `-.slice` is the root.
fn expand(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice").filter(|name| !name.is_empty() && !name.contains('/'))?;
    let mut path = PathBuf::new();
    if name == "-" {
        return Some(path);
    }
    for (end, _) in name.match_indices('-').chain([(name.len(), "")]) {
        let outer = name.get(..end).filter(|outer| !outer.is_empty() && !outer.ends_with('-'))?;
        path.push(format!("{outer}.slice"));
    }
    Some(path)
}

impl Hierarchy {
    fn join(&self, path: &Path, ledger: &Ledger, pid: u32) -> Result<(), Failure> {
        let failed = |group: &Path| format!("cannot make {} its place", group.display());
        let mut group = self.root.clone();
        for part in path.components() {
            let outer = group.clone();
            group.push(part);
            if self.kind == Kind::Two {
                delegate(&outer);
            }
            if group.is_dir() {
                continue;
            }
            if group.ends_with(path) {
                ledger.note(&Resource::Cgroup { path: group.clone() })?;
            }
            make(&group).context(|| failed(&group))?;
            if matches!(self.kind, Kind::One { cpuset: true }) {
                inherit(&outer, &group).context(|| failed(&group))?;
            }
        }
        fs::write(group.join("cgroup.procs"), pid.to_string()).context(|| failed(&group))
    }
}

/// Makes a group, unless another does just now.
fn make(group: &Path) -> io::Result<()> {
    match fs::create_dir(group) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// Has the groups in `group` account for what it does, as far as it may: one controller after the other, because a
/// host may have switched some off.
fn delegate(group: &Path) {
    let here = fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
    let below = fs::read_to_string(group.join("cgroup.subtree_control")).unwrap_or_default();
    let missing = |name: &&&str| !below.split_whitespace().any(|there| there == **name);
    let here: Vec<_> = here.split_whitespace().collect();
    for name in CONTROLLERS_2.iter().filter(|name| here.contains(name)).filter(missing) {
        if let Err(error) = fs::write(group.join("cgroup.subtree_control"), format!("+{name}")) {
            log::debug!("cgroup {} does not pass {name} on: {error}", group.display());
        }
    }
}

/// A new group of CPU sets has no CPUs and no memory, and then nobody may be in it.
fn inherit(outer: &Path, group: &Path) -> io::Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        fs::write(group.join(file), fs::read_to_string(outer.join(file))?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_place_is_a_path_or_a_scope_in_its_slices() {
        let means = |given: &str| place(Path::new(given)).map(|path| path.display().to_string());
        assert_eq!(means("/default/one").as_deref(), Some("default/one"));
        assert_eq!(means("kubepods/pod7/c").as_deref(), Some("kubepods/pod7/c"));
        let slices = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7.slice";
        let scope = format!("{slices}/cri-containerd-c.scope");
        assert_eq!(means("kubepods-burstable-pod7.slice:cri-containerd:c"), Some(scope));
        assert_eq!(means(":docker:c").as_deref(), Some("system.slice/docker-c.scope"));
        assert_eq!(means("-.slice:docker:c").as_deref(), Some("docker-c.scope"));
        assert_eq!(means("a.slice:x:b.slice").as_deref(), Some("a.slice/b.slice"));
        // With a slash in front it is a directory of that name.
        assert_eq!(means("/a:b:c").as_deref(), Some("a:b:c"));
        for nonsense in
            ["", "/", "/../x", "/a/../b", "a--b.slice:p:n", "-a.slice:p:n", "a:p:n", "a/b.slice:p:n"]
        {
            assert_eq!(means(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn hierarchies_of_version_1_are_taken_before_the_one_of_version_2() {
        let unified = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let ones = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
            34 31 0:31 / /sys/fs/cgroup/cpuset rw shared:9 - cgroup cgroup rw,cpuset\n\
            36 31 0:33 / /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices\n\
            40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd\n\
            31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n";
        let one = |root: &str, cpuset| Hierarchy { root: root.into(), kind: Kind::One { cpuset } };
        let expected = [one("/sys/fs/cgroup/cpu,cpuacct", false), one("/sys/fs/cgroup/cpuset", true)];
        assert_eq!(hierarchies(&format!("{unified}{ones}")), expected);
        let two = Hierarchy { root: "/sys/fs/cgroup/unified".into(), kind: Kind::Two };
        assert_eq!(hierarchies(unified), [two]);
        assert_eq!(hierarchies("nonsense\n"), []);
    }

    /// Plain files in the place of a hierarchy: what is written where.
    #[test]
    fn groups_are_made_noted_and_given_what_they_need() {
        let dir = tempfile::tempdir().unwrap();
        let (root, ledger) = (dir.path().join("root"), Ledger::of(dir.path()).unwrap());
        fs::create_dir_all(root.join("pods")).unwrap();
        for at in [&root, &root.join("pods")] {
            fs::write(at.join("cpuset.cpus"), "0-3\n").unwrap();
            fs::write(at.join("cpuset.mems"), "0\n").unwrap();
            fs::write(at.join("cgroup.controllers"), "cpuset memory rdma\n").unwrap();
            fs::write(at.join("cgroup.subtree_control"), "memory\n").unwrap();
        }
        let one = Hierarchy { root: root.clone(), kind: Kind::One { cpuset: true } };
        one.join(Path::new("pods/a"), &ledger, 7).unwrap();
        let read = |path: &str| fs::read_to_string(root.join(path)).unwrap();
        assert_eq!((read("pods/a/cgroup.procs"), read("pods/a/cpuset.cpus")), ("7".into(), "0-3\n".into()));
        assert_eq!(read("cgroup.subtree_control"), "memory\n");
        let two = Hierarchy { root: root.clone(), kind: Kind::Two };
        two.join(Path::new("pods/b"), &ledger, 8).unwrap();
        assert_eq!(
            (read("pods/b/cgroup.procs"), read("pods/cgroup.subtree_control")),
            ("8".into(), "+cpuset".into())
        );
        let made = ["pods/a", "pods/b"].map(|group| Resource::Cgroup { path: root.join(group) });
        assert_eq!(ledger.entries().unwrap(), made);
        // They are no cgroups, and not touched.
        ledger.settle().unwrap();
        assert!(root.join("pods/a").exists());
    }

    #[test]
    fn a_process_is_accounted_where_it_is_put_and_nothing_is_left_of_the_groups() {
        let dir = tempfile::tempdir().unwrap();
        let name = format!("mvm-test-{}", std::process::id());
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let ledger = Ledger::of(dir.path()).unwrap();
        join(Path::new(&format!("/{name}/one")), &ledger, child.id());
        let groups = fs::read_to_string(format!("/proc/{}/cgroup", child.id())).unwrap();
        let noted = ledger.entries().unwrap().into_iter();
        let made: Vec<_> = noted
            .filter_map(|resource| match resource {
                Resource::Cgroup { path } if path.is_dir() => Some(path),
                _ => None,
            })
            .collect();
        let is_in = groups.lines().filter(|line| line.ends_with(&format!("/{name}/one"))).count();
        child.kill().unwrap();
        child.wait().unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let probe = |hierarchy: &&Hierarchy| {
            let probe = hierarchy.root.join(format!("{name}-probe"));
            fs::create_dir(&probe).and_then(|()| fs::remove_dir(probe)).is_ok()
        };
        // Where nothing may be made, nothing is, and the process runs all the same.
        let possible = hierarchies(&mounts).iter().filter(probe).count();
        assert_eq!((is_in, made.len()), (possible, possible), "{groups}{made:?}");
        ledger.settle().unwrap();
        assert!(made.iter().all(|group| !group.exists()), "{made:?}");
        // Those above are only the test's.
        made.iter().for_each(|group| fs::remove_dir(group.parent().unwrap()).unwrap());
    }
}
