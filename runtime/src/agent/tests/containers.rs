//! What surrounds and confines containers, against the real agent. Needs the right to mount.

use std::{fs, io::Read, io::Write, net::TcpListener, path::Path};

use mvm_protocol::{
    Capabilities, Confinement, ContainerMount, ContainerSource, DeviceKind, DeviceNode, ExitStatus,
    FailureKind, Get, GotContent, Limits, Lower, Namespace, Namespaces, PidNamespace, Place, Put, PutContent,
    PutEntry, Rlimit, Scheduler, SetupRoot, Surroundings, User, Writable, limits::MAX_PART,
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

fn root(guest: &Guest, id: &str, surroundings: Surroundings) -> SetupRoot {
    SetupRoot {
        id: id.to_owned(),
        lower: image(guest),
        writable: Writable::Tmpfs { size: 1 << 20 },
        surroundings,
    }
}

fn filesystem(kind: &str, target: &str, flags: MsFlags, data: &str) -> ContainerMount {
    let source = ContainerSource::Filesystem(kind.to_owned());
    ContainerMount {
        source,
        target: target.to_owned(),
        flags: flags.bits(),
        propagation: 0,
        data: data.to_owned(),
    }
}

fn bound(source: ContainerSource, target: &str, flags: MsFlags) -> ContainerMount {
    let flags = (flags | MsFlags::MS_BIND).bits();
    ContainerMount { source, target: target.to_owned(), flags, propagation: 0, data: String::new() }
}

/// As an engine asks for them.
fn usual_mounts() -> Vec<ContainerMount> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    vec![
        filesystem("proc", "/proc", plain | MsFlags::MS_NODEV, ""),
        filesystem("tmpfs", "/dev", MsFlags::MS_NOSUID | MsFlags::MS_STRICTATIME, "mode=755,size=65536k"),
        filesystem("devpts", "/dev/pts", plain, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
        filesystem("tmpfs", "/dev/shm", plain | MsFlags::MS_NODEV, "mode=1777,size=65536k"),
    ]
}

fn inside(id: &str, script: &str) -> ProcessSpec {
    ProcessSpec { root: Some(id.to_owned()), pid_namespace: PidNamespace::New, ..shell(script) }
}

fn run(guest: &Guest, spec: ProcessSpec) -> (String, ExitStatus) {
    let mut process = guest.client.start(spec).unwrap();
    let mut text = String::new();
    process.stdout.as_mut().unwrap().read_to_string(&mut text).unwrap();
    (text, guest.client.wait(process.id, Some(SOON)).unwrap())
}

fn output(guest: &Guest, id: &str, script: &str) -> String {
    run(guest, inside(id, script)).0
}

fn file(path: &str, text: &[u8]) -> PutEntry {
    let content = PutContent::File { offset: 0, bytes: text.to_vec(), last: true };
    PutEntry { path: path.to_owned(), mode: 0o640, uid: 7, gid: 8, content }
}

fn shared(name: &str, entries: Vec<PutEntry>) -> Put {
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

/// `CAP_NET_BIND_SERVICE` and `CAP_KILL`.
const SOME: u64 = 1 << 10 | 1 << 5;

#[test]
fn a_process_has_the_capabilities_limits_and_mask_it_was_given_and_no_more() {
    let guest = Guest::new();
    guest.client.set_up_root(root(&guest, "c1", Surroundings::default())).unwrap();
    let sets =
        Capabilities { bounding: SOME, effective: SOME, inheritable: SOME, permitted: SOME, ambient: SOME };
    let mut spec = inside(
        "c1",
        "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status | tr '\\t' ' '; umask; ulimit -n; ulimit -Hn; nice",
    );
    spec.user = User::Ids { uid: 1000, gid: 1000, groups: vec![5] };
    spec.confinement = Confinement {
        capabilities: Some(sets),
        no_new_privileges: true,
        rlimits: vec![Rlimit { resource: libc::RLIMIT_NOFILE, soft: 100, hard: 200 }],
        umask: Some(0o077),
        scheduler: Some(Scheduler { policy: 0, nice: 5, priority: 0 }),
        io_priority: Some(2 << 13 | 7),
        ..Default::default()
    };
    let set = "0000000000000420";
    let expected = format!(
        "CapInh: {set}\nCapPrm: {set}\nCapEff: {set}\nCapBnd: {set}\nCapAmb: {set}\n\
         NoNewPrivs: 1\nSeccomp: 0\n0077\n100\n200\n5\n"
    );
    assert_eq!(run(&guest, spec.clone()).0, expected);
    // Root without capabilities is nobody special; without a wish all are kept.
    spec.user = User::Ids { uid: 0, gid: 0, groups: vec![] };
    spec.confinement.capabilities = Some(Capabilities::default());
    assert!(run(&guest, spec.clone()).0.contains("CapEff: 0000000000000000\n"));
    spec.confinement = Confinement::default();
    assert!(!run(&guest, spec).0.contains("CapEff: 0000000000000000\n"));
}

/// A filter that answers one system call with an error number.
fn deny(system_call: i64, errno: u32) -> Vec<u8> {
    let instruction = |code: u16, jump_true: u8, jump_false: u8, k: u32| {
        let [a, b] = code.to_ne_bytes();
        let [c, d, e, f] = k.to_ne_bytes();
        [a, b, jump_true, jump_false, c, d, e, f]
    };
    let number = u32::try_from(system_call).unwrap();
    [
        instruction(0x20, 0, 0, 0),
        instruction(0x15, 0, 1, number),
        instruction(0x06, 0, 0, 0x0005_0000 | errno),
        instruction(0x06, 0, 0, 0x7fff_0000),
    ]
    .concat()
}

#[test]
fn a_system_call_filter_answers_with_and_without_new_privileges() {
    let guest = Guest::new();
    guest.client.set_up_root(root(&guest, "c1", Surroundings::default())).unwrap();
    for no_new_privileges in [true, false] {
        let mut spec = inside("c1", "mkdir /x 2>&1; grep Seccomp: /proc/self/status | tr '\\t' ' '");
        let none = Capabilities::default();
        let confinement =
            Confinement { seccomp: deny(libc::SYS_mkdir, 1), no_new_privileges, ..Default::default() };
        spec.confinement = Confinement { capabilities: Some(none), ..confinement };
        let expected = "mkdir: cannot create directory '/x': Operation not permitted\nSeccomp: 2\n";
        assert_eq!(run(&guest, spec).0, expected, "{no_new_privileges}");
    }
    let mut spec = inside("c1", "true");
    spec.confinement.seccomp = vec![0; 16];
    let error = guest.client.start(spec).unwrap_err();
    assert_eq!(error.to_string(), "cannot install the system call filter");
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

#[test]
fn files_are_put_in_parts_and_come_back_whole() {
    let guest = Guest::new();
    guest.client.set_up_root(root(&guest, "c1", Surroundings::default())).unwrap();
    let place = || Place::Root("c1".to_owned());
    let bytes: Vec<u8> = (0..600_000_u32).map(|at| (at / 3) as u8).collect();
    let parts = bytes.chunks(MAX_PART).enumerate();
    for (at, part) in parts {
        let offset = (at * MAX_PART) as u64;
        let last = offset as usize + part.len() == bytes.len();
        assert_eq!(output(&guest, "c1", "test -e /srv/big || echo no"), "no\n");
        let content = PutContent::File { offset, bytes: part.to_vec(), last };
        let entry = PutEntry { path: "srv/big".to_owned(), mode: 0o600, uid: 0, gid: 0, content };
        guest.client.put(Put { place: place(), entries: vec![entry] }).unwrap();
    }
    let mut seen = Vec::new();
    loop {
        let get = Get { place: place(), path: "srv/big".to_owned(), offset: seen.len() as u64 };
        let got = guest.client.get(get).unwrap();
        assert_eq!((got.size, got.mode), (600_000, libc::S_IFREG | 0o600));
        match got.content {
            GotContent::File(part) if part.is_empty() => break,
            GotContent::File(part) => seen.extend(part),
            other => panic!("{other:?}"),
        }
    }
    assert!(seen == bytes);
    let list = guest.client.get(Get { place: place(), path: "srv".to_owned(), offset: 0 }).unwrap();
    assert_eq!(list.content, GotContent::Directory(vec!["big".to_owned()]));
    let remove = PutEntry { path: "srv".to_owned(), mode: 0, uid: 0, gid: 0, content: PutContent::Remove };
    guest.client.put(Put { place: place(), entries: vec![remove] }).unwrap();
    let error = guest.client.get(Get { place: place(), path: "srv".to_owned(), offset: 0 }).unwrap_err();
    assert!(matches!(error, Error::Refused { errno: libc::ENOENT, .. }), "{error}");
}

#[test]
fn an_update_of_a_shared_file_is_seen_in_the_container() {
    let guest = Guest::new();
    guest.client.put(shared("conf", vec![file("key", b"old\n")])).unwrap();
    let mut mounts = usual_mounts();
    mounts.push(bound(ContainerSource::Shared("conf".to_owned()), "/conf", MsFlags::MS_RDONLY));
    guest.client.set_up_root(root(&guest, "c1", Surroundings { mounts, ..Default::default() })).unwrap();
    assert_eq!(output(&guest, "c1", "cat /conf/key"), "old\n");
    guest.client.put(shared("conf", vec![file("key", b"new\n")])).unwrap();
    assert_eq!(output(&guest, "c1", "cat /conf/key; ls -A /conf"), "new\nkey\n");
    for bad in ["root", "../x", "", "d/0"] {
        assert!(guest.client.put(shared(bad, vec![file("key", b"")])).is_err(), "{bad}");
    }
}

#[test]
fn a_port_of_the_guest_is_reached_and_each_direction_ends_on_its_own() {
    let guest = Guest::new();
    // The agent's network is its own; the server runs there.
    let script = "exec python3 -c \"
import socket
s = socket.create_server(('127.0.0.1', 4000)); print('ready', flush=True)
c, _ = s.accept(); data = b''
while (part := c.recv(4096)): data += part
c.sendall(data[::-1]); c.close()\"";
    let mut server = guest.sh(&format!("ip link set lo up 2>/dev/null; {script}"));
    let mut ready = [0; 6];
    server.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    let mut stream = guest.client.forward(4000).unwrap();
    stream.write_all(b"olleh").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
    assert_eq!(guest.client.wait(server.id, Some(SOON)).unwrap(), ExitStatus::Code(0));
    // A port of this machine's is not the guest's.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let error = guest.client.forward(listener.local_addr().unwrap().port()).unwrap_err();
    assert!(matches!(error, Error::Refused { errno: libc::ECONNREFUSED, .. }), "{error}");
}

#[test]
fn a_trial_run_leaves_this_machines_devices_alone() {
    let guest = Guest::new();
    let error = guest.client.rescan().unwrap_err();
    assert!(matches!(error, Error::Refused { kind: FailureKind::NotFound, .. }), "{error}");
    let error = guest.client.eject("no such disk").unwrap_err();
    assert_eq!(error.to_string(), "no disk has the serial no such disk");
}
