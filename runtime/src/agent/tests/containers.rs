//! What surrounds containers, against the real agent. Needs the right to mount.

use std::{fs, io::Read, path::Path};

use mvm_protocol::{
    ContainerMount, ContainerSource, DeviceKind, DeviceNode, ExitStatus, FailureKind, Limits, Lower,
    Namespace, Namespaces, PidNamespace, Place, Put, PutContent, PutEntry, SetupRoot, Surroundings, Writable,
};
use nix::mount::MsFlags;

use super::guest::{Guest, SOON, shell};
use crate::agent::{Error, ProcessSpec};

/// Programs come from this machine's /usr; all else is made by the test.
fn image(guest: &Guest) -> Vec<Lower> {
    let top = guest.dir.path().join("image");
    ["etc", "proc", "sys", "dev", "data"].iter().for_each(|it| fs::create_dir_all(top.join(it)).unwrap());
    fs::write(top.join("etc/secret"), "secret\n").unwrap();
    [top.as_path(), Path::new("/usr")].map(|path| Lower::Directory(path.to_str().unwrap().to_owned())).into()
}

pub(super) fn root(guest: &Guest, id: &str, surroundings: Surroundings) -> SetupRoot {
    SetupRoot {
        id: id.to_owned(),
        lower: image(guest),
        writable: Writable::Tmpfs { size: 1 << 20 },
        surroundings,
    }
}

pub(super) fn filesystem(kind: &str, target: &str, flags: MsFlags, data: &str) -> ContainerMount {
    let source = ContainerSource::Filesystem(kind.to_owned());
    ContainerMount {
        source,
        target: target.to_owned(),
        flags: flags.bits(),
        propagation: 0,
        data: data.to_owned(),
    }
}

pub(super) fn bound(source: ContainerSource, target: &str, flags: MsFlags) -> ContainerMount {
    let flags = (flags | MsFlags::MS_BIND).bits();
    ContainerMount { source, target: target.to_owned(), flags, propagation: 0, data: String::new() }
}

/// As an engine asks for them.
pub(super) fn usual_mounts() -> Vec<ContainerMount> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    vec![
        filesystem("proc", "/proc", plain | MsFlags::MS_NODEV, ""),
        filesystem("tmpfs", "/dev", MsFlags::MS_NOSUID | MsFlags::MS_STRICTATIME, "mode=755,size=65536k"),
        filesystem("devpts", "/dev/pts", plain, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
        filesystem("tmpfs", "/dev/shm", plain | MsFlags::MS_NODEV, "mode=1777,size=65536k"),
    ]
}

pub(super) fn inside(id: &str, script: &str) -> ProcessSpec {
    ProcessSpec { root: Some(id.to_owned()), pid_namespace: PidNamespace::New, ..shell(script) }
}

pub(super) fn run(guest: &Guest, spec: ProcessSpec) -> (String, ExitStatus) {
    let mut process = guest.client.start(spec).unwrap();
    let mut text = String::new();
    process.stdout.as_mut().unwrap().read_to_string(&mut text).unwrap();
    (text, guest.client.wait(process.id, Some(SOON)).unwrap())
}

pub(super) fn output(guest: &Guest, id: &str, script: &str) -> String {
    run(guest, inside(id, script)).0
}

pub(super) fn file(path: &str, text: &[u8]) -> PutEntry {
    let content = PutContent::File { offset: 0, bytes: text.to_vec(), last: true };
    PutEntry { path: path.to_owned(), mode: 0o640, uid: 7, gid: 8, content }
}

pub(super) fn shared(name: &str, entries: Vec<PutEntry>) -> Put {
    Put { place: Place::Shared(name.to_owned()), entries }
}

#[test]
fn mounts_are_made_in_order_with_their_flags_and_their_targets() {
    let guest = Guest::new();
    guest.client.put(shared("volumes/conf", vec![file("a/b", b"from the host\n")])).unwrap();
    guest.client.put(shared("volumes/one", vec![file("", b"one file\n")])).unwrap();
    let from_host = |name: &str| ContainerSource::Shared(format!("volumes/{name}"));
    let mut mounts = usual_mounts();
    mounts.push(filesystem("tmpfs", "/made/for/it", MsFlags::MS_NOEXEC, "size=4096"));
    mounts.push(bound(from_host("conf"), "/made/for/it/conf", MsFlags::MS_RDONLY | MsFlags::MS_NOSUID));
    mounts.push(bound(from_host("one"), "/etc/one", MsFlags::empty()));
    mounts.push(bound(ContainerSource::Inside("/etc".to_owned()), "/again", MsFlags::MS_REC));
    guest.client.set_up_root(root(&guest, "c1", Surroundings { mounts, ..Default::default() })).unwrap();
    let script = "cat /made/for/it/conf/a/b /etc/one /again/secret /again/one; stat -c '%a %u %g' /etc/one; \
                  touch /made/for/it/conf/x 2>&1; touch /made/for/it/x /again/x && echo written; \
                  grep -c ' /made/for/it/conf ro,nosuid' /proc/self/mountinfo; echo $$; ls -l /dev | grep -c ^c";
    let expected = "from the host\none file\nsecret\none file\n640 7 8\n\
                    touch: cannot touch '/made/for/it/conf/x': Read-only file system\nwritten\n1\n1\n6\n";
    assert_eq!(output(&guest, "c1", script), expected);
}

#[test]
fn a_link_of_the_image_leads_a_mount_nowhere_but_into_the_root() {
    let guest = Guest::new();
    let mut request = root(&guest, "c1", Surroundings { mounts: usual_mounts(), ..Default::default() });
    let outside = guest.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let top = guest.dir.path().join("image");
    std::os::unix::fs::symlink(&outside, top.join("link")).unwrap();
    std::os::unix::fs::symlink("/proc/1/root", top.join("magic")).unwrap();
    std::os::unix::fs::symlink("../../../../data", top.join("climbing")).unwrap();
    let inner = format!("/magic{}/made", guest.dir.path().display());
    request.surroundings.mounts.extend([
        filesystem("tmpfs", "/climbing/x", MsFlags::empty(), "size=4096"),
        filesystem("tmpfs", &inner, MsFlags::empty(), "size=4096"),
    ]);
    guest.client.set_up_root(request.clone()).unwrap();
    assert!(!guest.dir.path().join("made").exists());
    assert_eq!(output(&guest, "c1", "grep -c ' /data/x ' /proc/self/mountinfo"), "1\n");
    let target = "/link/made";
    request.surroundings.mounts.push(filesystem("tmpfs", target, MsFlags::empty(), ""));
    request.id = "c2".to_owned();
    let error = guest.client.set_up_root(request).unwrap_err();
    assert_eq!(error.to_string(), "cannot make /link/made to mount something on");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn masked_paths_read_as_empty_and_read_only_paths_refuse_writes_also_below_proc() {
    let guest = Guest::new();
    let own = |path: &str| path.to_owned();
    let surroundings = Surroundings {
        mounts: usual_mounts(),
        masked_paths: vec![own("/etc/secret"), own("/data"), own("/proc/timer_list"), own("/nowhere")],
        read_only_paths: vec![own("/proc/sys"), own("/usr"), own("/etc")],
        ..Default::default()
    };
    let mut request = root(&guest, "c1", surroundings);
    fs::write(guest.dir.path().join("image/data/hidden"), "x").unwrap();
    fs::create_dir_all(guest.dir.path().join("image/usr")).unwrap();
    guest.client.set_up_root(request.clone()).unwrap();
    let script = "cat /etc/secret; ls /data; cat /proc/timer_list; touch /etc/x 2>&1; \
                  echo x 2>&1 > /proc/sys/kernel/hostname; grep -c . /proc/self/comm; ls -d /proc/[0-9]*";
    let text = output(&guest, "c1", script);
    let expected = "touch: cannot touch '/etc/x': Read-only file system\n1\n/proc/1\n";
    let text: String =
        text.lines().filter(|line| !line.contains("cannot create")).map(|it| format!("{it}\n")).collect();
    assert!(text.starts_with(expected), "{text}");
    // A second process with a PID name space of its own finds the same.
    let again = "cat /proc/timer_list; test -w /proc/sys/kernel/hostname || echo protected";
    assert_eq!(output(&guest, "c1", again), "protected\n");
    request.id = "c2".to_owned();
    request.surroundings.mounts.clear();
    guest.client.set_up_root(request).unwrap();
    assert_eq!(output(&guest, "c2", again), "protected\n", "without mounts of its own too");
}

#[test]
fn a_read_only_root_keeps_its_mounts_writable_and_gets_the_hosts_texts() {
    let guest = Guest::new();
    let mut mounts = usual_mounts();
    mounts.push(filesystem("tmpfs", "/data", MsFlags::empty(), ""));
    let surroundings = Surroundings { mounts, read_only_root: true, ..Default::default() };
    guest.client.set_up_root(root(&guest, "c1", surroundings)).unwrap();
    let hosts = Some("127.0.0.1 localhost\n".to_owned());
    guest.client.configure(mvm_protocol::Configure { hosts, ..Default::default() }).unwrap();
    let script = "touch /x 2>&1; touch /data/x && cat /etc/hosts";
    let expected = "touch: cannot touch '/x': Read-only file system\n127.0.0.1 localhost\n";
    assert_eq!(output(&guest, "c1", script), expected);
}

#[test]
fn name_spaces_are_shared_as_asked_and_have_their_own_names_and_parameters() {
    let guest = Guest::new();
    let own = Namespaces { ipc: Namespace::Own, uts: Namespace::Own, cgroup: Namespace::Guest };
    let surroundings = Surroundings {
        namespaces: own,
        hostname: Some("pod".to_owned()),
        domainname: Some("example".to_owned()),
        sysctls: vec![("kernel.msgmax".to_owned(), "4321".to_owned())],
        ..Default::default()
    };
    guest.client.set_up_root(root(&guest, "pod", surroundings)).unwrap();
    let of = || Namespace::Of("pod".to_owned());
    let joined = Namespaces { ipc: of(), uts: of(), cgroup: Namespace::Guest };
    let surroundings = Surroundings { namespaces: joined, ..Default::default() };
    guest.client.set_up_root(root(&guest, "app", surroundings)).unwrap();
    guest.client.set_up_root(root(&guest, "guest", Surroundings::default())).unwrap();
    let script = "cat /proc/sys/kernel/hostname /proc/sys/kernel/domainname /proc/sys/kernel/msgmax; \
                  readlink /proc/self/ns/ipc";
    let (pod, app) = (output(&guest, "pod", script), output(&guest, "app", script));
    assert!(pod.starts_with("pod\nexample\n4321\nipc:"), "{pod}");
    assert_eq!(pod, app);
    let other = output(&guest, "guest", script);
    assert!(other.starts_with("otter\n") && other.lines().last() != pod.lines().last(), "{other}");
    let surroundings = Surroundings {
        namespaces: Namespaces { ipc: Namespace::Of("nobody".to_owned()), ..Default::default() },
        ..Default::default()
    };
    let error = guest.client.set_up_root(root(&guest, "lost", surroundings)).unwrap_err();
    assert_eq!(error.to_string(), "no root nobody");
}

#[test]
fn devices_have_their_kind_mode_and_owner() {
    let guest = Guest::new();
    let device = |path: &str, kind, major, minor| DeviceNode {
        path: path.to_owned(),
        kind,
        major,
        minor,
        mode: 0o640,
        uid: 3,
        gid: 4,
    };
    let devices = vec![
        device("/dev/deep/er/null", DeviceKind::Char, 1, 3),
        device("/dev/disk", DeviceKind::Block, 7, 200),
        device("/dev/pipe", DeviceKind::Fifo, 0, 0),
    ];
    let surroundings = Surroundings { mounts: usual_mounts(), devices, ..Default::default() };
    guest.client.set_up_root(root(&guest, "c1", surroundings)).unwrap();
    let script =
        "stat -c '%F %a %u %g %t %T' /dev/deep/er/null /dev/disk /dev/pipe; echo x > /dev/deep/er/null";
    let expected = "character special file 640 3 4 1 3\nblock special file 640 3 4 7 c8\nfifo 640 3 4 0 0\n";
    assert_eq!(output(&guest, "c1", script), expected);
}

#[test]
fn a_root_that_is_removed_takes_its_processes_and_mounts_and_leaves_its_id() {
    let guest = Guest::new();
    let mounts = || fs::read_to_string(format!("/proc/{}/mountinfo", guest.agent_pid())).unwrap();
    let before = mounts();
    for id in ["c1", "c2", "c3"] {
        guest.client.set_up_root(root(&guest, id, Surroundings::default())).unwrap();
    }
    let stays = guest.client.start(inside("c3", "exec sleep 1000")).unwrap();
    let first = guest.client.start(inside("c2", "exec sleep 1000")).unwrap();
    let second = guest
        .client
        .start(ProcessSpec { pid_namespace: PidNamespace::Join(first.id), ..inside("c2", "exec sleep 1000") })
        .unwrap();
    guest.client.remove_root("c2").unwrap();
    for process in [first, second] {
        assert_eq!(guest.client.wait(process.id, Some(SOON)).unwrap(), ExitStatus::Signal(9));
    }
    assert!(!mounts().contains("root/c2") && mounts().contains("root/c3"));
    let error = guest.client.start(inside("c2", "true")).unwrap_err();
    assert!(matches!(error, Error::Refused { kind: FailureKind::NotFound, .. }), "{error}");
    // Its slot and its id are used again, and the others are what they were.
    guest.client.set_up_root(root(&guest, "c2", Surroundings::default())).unwrap();
    let again = guest.client.start(inside("c2", "exec sleep 1000")).unwrap();
    guest.client.remove_root("c3").unwrap();
    assert_eq!(guest.client.wait(stays.id, Some(SOON)).unwrap(), ExitStatus::Signal(9));
    guest.client.signal(again.id, 9, mvm_protocol::SignalTarget::Process).unwrap();
    assert_eq!(guest.client.wait(again.id, Some(SOON)).unwrap(), ExitStatus::Signal(9));
    for id in ["c1", "c2"] {
        guest.client.remove_root(id).unwrap();
    }
    assert_eq!(mounts(), before);
    let error = guest.client.remove_root("c1").unwrap_err();
    assert!(matches!(error, Error::Refused { kind: FailureKind::NotFound, .. }), "{error}");
}

#[test]
fn limits_without_cgroups_are_refused_and_nothing_is_left_behind() {
    let guest = Guest::new();
    let limits = Limits { files: vec![("memory.max".to_owned(), "1048576".to_owned())] };
    let surroundings = Surroundings { limits: limits.clone(), ..Default::default() };
    let error = guest.client.set_up_root(root(&guest, "c1", surroundings)).unwrap_err();
    assert_eq!(error.to_string(), "the guest has no cgroups");
    guest.client.set_up_root(root(&guest, "c1", Surroundings::default())).unwrap();
    assert!(guest.client.update("c1", limits).is_err());
    assert!(guest.client.freeze("c1", true).is_err());
    assert!(guest.client.root_stats("c1").is_err());
}
