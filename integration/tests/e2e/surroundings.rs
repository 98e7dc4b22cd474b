//! Containers beside one another in one machine: what surrounds them, what confines them, what they may use.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use mvm_integration::vm::{PATIENCE, TestVm, Vm, drain, scratch, spec, state};
use mvm_protocol::{
    Capabilities, Confinement, ContainerMount, ContainerSource, DeviceKind, DeviceNode, DeviceRule,
    DiskFilesystem, ExitStatus, Get, GotContent, Limits, Lower, Namespace, Namespaces, PidNamespace, Place,
    Put, PutContent, PutEntry, Rlimit, SetupRoot, Surroundings, Writable,
};
use mvm_runtime::agent::{ProcessSpec, StdioSpec};
use mvm_runtime::container::{ROOT, root_file_system};
use mvm_runtime::machine::Disk;
use nix::mount::MsFlags;

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("a_container_finds_the_surroundings_an_engine_describes", surroundings),
    ("device_rules_decide_which_container_may_open_a_device", device_rules),
    ("a_containers_process_has_the_capabilities_and_system_calls_it_was_given", confinement),
    ("a_containers_limits_hold_can_be_changed_and_are_reported", limits),
    ("a_frozen_container_stands_still_and_a_removed_one_is_gone", freeze_and_remove),
    ("files_and_ports_of_a_container_are_reached", files_and_ports),
    ("disks_come_with_a_container_and_go_with_it", disks),
];

const OUTPUT: StdioSpec = StdioSpec::Pipes { stdin: false, stdout: true, stderr: true };

fn mount(kind: &str, target: &str, flags: MsFlags, data: &str) -> ContainerMount {
    let source = ContainerSource::Filesystem(kind.to_owned());
    let (target, data) = (target.to_owned(), data.to_owned());
    ContainerMount { source, target, flags: flags.bits(), propagation: 0, data }
}

/// The mounts containerd asks for.
fn usual_mounts() -> Vec<ContainerMount> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let all = plain | MsFlags::MS_NODEV;
    vec![
        mount("proc", "/proc", all, ""),
        mount("tmpfs", "/dev", MsFlags::MS_NOSUID | MsFlags::MS_STRICTATIME, "mode=755,size=65536k"),
        mount("devpts", "/dev/pts", plain, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
        mount("mqueue", "/dev/mqueue", all, ""),
        mount("sysfs", "/sys", all | MsFlags::MS_RDONLY, ""),
        mount("cgroup2", "/sys/fs/cgroup", all | MsFlags::MS_RDONLY, ""),
    ]
}

fn own_spaces() -> Namespaces {
    Namespaces { ipc: Namespace::Own, uts: Namespace::Own, cgroup: Namespace::Own }
}

fn limit(name: &str, text: &str) -> (String, String) {
    (name.to_owned(), text.to_owned())
}

fn set_up(vm: &Vm, id: &str, surroundings: Surroundings) {
    let lower = vec![Lower::Disk { serial: "root".to_owned(), filesystem: DiskFilesystem::Erofs }];
    let writable = Writable::Tmpfs { size: 16 << 20 };
    let root = SetupRoot { id: id.to_owned(), lower, writable, surroundings };
    vm.container.agent.set_up_root(root).expect("the root is made");
}

fn inside(id: &str, script: &str) -> ProcessSpec {
    ProcessSpec { root: Some(id.to_owned()), ..spec(&["sh", "-c", script], OUTPUT) }
}

fn run(vm: &Vm, spec: ProcessSpec) -> (String, ExitStatus) {
    let process = vm.container.agent.start(spec).expect("it starts");
    let stderr = drain(process.stderr.expect("asked for"));
    let mut bytes = drain(process.stdout.expect("asked for")).join().expect("no panic");
    bytes.extend(stderr.join().expect("no panic"));
    let status = vm.container.agent.wait(process.id, Some(PATIENCE)).expect("it ends");
    (String::from_utf8_lossy(&bytes).into_owned(), status)
}

fn output(vm: &Vm, id: &str, script: &str) -> String {
    run(vm, inside(id, script)).0
}

fn surroundings() {
    let vm = TestVm::new().boot();
    let own = |path: &str| path.to_owned();
    let surroundings = Surroundings {
        namespaces: own_spaces(),
        hostname: Some(own("pod")),
        mounts: usual_mounts(),
        masked_paths: vec![own("/proc/timer_list"), own("/sys/block"), own("/etc/passwd")],
        read_only_paths: vec![own("/proc/sys"), own("/proc/sysrq-trigger")],
        read_only_root: true,
        sysctls: vec![limit("net.core.somaxconn", "777"), limit("kernel.shmmni", "99")],
        ..Default::default()
    };
    set_up(&vm, "pod", surroundings);
    let app =
        Namespaces { ipc: Namespace::Of(own("pod")), uts: Namespace::Of(own("pod")), cgroup: Namespace::Own };
    set_up(&vm, "app", Surroundings { namespaces: app, mounts: usual_mounts(), ..Default::default() });
    let script = "hostname; cat /proc/sys/net/core/somaxconn /proc/sys/kernel/shmmni; cat /proc/self/cgroup; \
                  ls /sys/fs/cgroup/cgroup.procs; touch /x; cat /proc/timer_list /etc/passwd; ls /sys/block; \
                  echo x > /proc/sys/kernel/hostname; ls -d /proc/[0-9]*; ls -l /dev | grep -c ^c";
    let expected = "pod\n777\n99\n0::/\n/sys/fs/cgroup/cgroup.procs\n/proc/1\n6\n";
    let text = output(&vm, "pod", script);
    assert!(text.starts_with(expected), "{text}");
    let complaints =
        ["touch: /x: Read-only file system", "can't create /proc/sys/kernel/hostname: Read-only"];
    assert!(complaints.iter().all(|it| text.contains(it)), "{text}");
    let text = output(&vm, "app", "hostname; cat /proc/sys/kernel/shmmni; touch /x && echo writable");
    assert_eq!(text, "pod\n99\nwritable\n");
}

fn device_rules() {
    let vm = TestVm::new().boot();
    // The kernel's log, which can be opened both ways and is not one of the devices every container has.
    let (major, minor) = (1, 11);
    let device = DeviceNode {
        path: "/dev/log".to_owned(),
        kind: DeviceKind::Char,
        major,
        minor,
        mode: 0o666,
        uid: 0,
        gid: 0,
    };
    let rule = |allow, kind, access: &str| {
        let number = |it| if kind == Some(DeviceKind::Char) { Some(it) } else { None };
        DeviceRule { allow, kind, major: number(major), minor: number(minor), access: access.to_owned() }
    };
    let deny = rule(false, None, "rwm");
    let some = rule(true, Some(DeviceKind::Char), "r");
    let container = |id: &str, device_rules| {
        let surroundings = Surroundings { devices: vec![device.clone()], device_rules, ..Default::default() };
        set_up(&vm, id, surroundings);
    };
    container("free", vec![]);
    container("denied", vec![deny.clone()]);
    container("reader", vec![deny.clone(), some.clone()]);
    container("late", vec![some, deny]);
    let script = "(: < /dev/log) && echo read; (: <> /dev/log) && echo opened; \
                  head -c 2 /dev/zero | wc -c; mknod /x c 1 3 && echo made";
    assert_eq!(output(&vm, "free", script), "read\nopened\n2\nmade\n");
    let refused = "Operation not permitted";
    let text = output(&vm, "denied", script);
    assert!(text.starts_with("2\nmade\n") && text.matches(refused).count() == 2, "{text}");
    let text = output(&vm, "reader", script);
    assert!(text.starts_with("read\n2\nmade\n") && text.matches(refused).count() == 1, "{text}");
    let text = output(&vm, "late", script);
    assert!(text.starts_with("2\nmade\n"), "{text}");
}

/// A filter under which mkdir(2) is not permitted.
fn no_mkdir() -> Vec<u8> {
    let load_number: [u8; 8] = [0x20, 0, 0, 0, 0, 0, 0, 0];
    let is_mkdir: [u8; 8] = [0x15, 0, 0, 1, 83, 0, 0, 0];
    let refuse: [u8; 8] = [0x06, 0, 0, 0, 1, 0, 5, 0];
    let allow: [u8; 8] = [0x06, 0, 0, 0, 0, 0, 0xff, 0x7f];
    [load_number, is_mkdir, refuse, allow].concat()
}

fn confinement() {
    let vm = TestVm::new().boot();
    let script = "grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status | tr '\\t' ' '; ulimit -n; mkdir /tmp/x; chown 1 /tmp";
    let mut spec = inside(ROOT, script);
    let some = 1 << 7 | 1 << 6;
    let sets = Capabilities { bounding: some, effective: some, permitted: some, ..Default::default() };
    spec.confinement = Confinement {
        capabilities: Some(sets),
        no_new_privileges: true,
        rlimits: vec![Rlimit { resource: 7, soft: 77, hard: 77 }],
        seccomp: no_mkdir(),
        ..Default::default()
    };
    let (text, status) = run(&vm, spec);
    let (set, none) = ("00000000000000c0", "0000000000000000");
    let expected = format!(
        "CapInh: {none}\nCapPrm: {set}\nCapEff: {set}\nCapBnd: {set}\nCapAmb: {none}\nNoNewPrivs: 1\nSeccomp: 2\n77\n\
         mkdir: can't create directory '/tmp/x': Operation not permitted\nchown: /tmp: Operation not permitted\n"
    );
    assert_eq!(text, expected);
    assert_eq!(status, ExitStatus::Code(1));
}

fn limits() {
    let vm = TestVm::new().boot();
    let agent = &vm.container.agent;
    let (killed, kills) = mpsc::channel();
    agent.on_memory_kill(move |root, count| {
        let _ = killed.send((root.to_owned(), count));
    });
    let files =
        vec![limit("memory.max", "16777216"), limit("pids.max", "8"), limit("cpu.max", "50000 100000")];
    let mut mounts = usual_mounts();
    mounts.push(mount("cgroup2", "/cgroup", MsFlags::empty(), ""));
    let namespaces = own_spaces();
    set_up(&vm, "small", Surroundings { namespaces, limits: Limits { files }, mounts, ..Default::default() });
    // One that sees all cgroups mounts them once more.
    set_up(&vm, "all", Surroundings { mounts: usual_mounts(), ..Default::default() });
    let (_, status) = run(&vm, inside("small", "exec tail /dev/zero"));
    assert_eq!(status, ExitStatus::Signal(9));
    assert_eq!(kills.recv_timeout(PATIENCE).expect("it is reported"), ("small".to_owned(), 1));
    let text = output(&vm, "small", "for i in 1 2 3 4 5 6 7 8 9; do sleep 1 & done; wait");
    assert!(text.contains("can't fork"), "{text}");

    let stats = agent.root_stats("small").expect("it answers");
    let stat = |name: &str| {
        let found = stats.files.iter().find(|(it, _)| it == name);
        found.unwrap_or_else(|| panic!("no {name}")).1.trim().to_owned()
    };
    assert_eq!((stat("memory.max"), stat("pids.max")), ("16777216".to_owned(), "8".to_owned()));
    assert_eq!(stat("cpu.max"), "50000 100000");
    assert!(stat("cpu.stat").contains("nr_throttled") && stat("memory.stat").starts_with("anon "));
    assert!(stat("memory.events").contains("oom_kill 1"), "{}", stat("memory.events"));
    assert!(stats.pids.is_empty());

    let update = |files| agent.update("small", Limits { files });
    update(vec![limit("memory.max", "67108864"), limit("pids.max", "max")]).expect("limits change");
    let script =
        "head -c 32000000 /dev/zero | tail -c 32000000 | wc -c; for i in 1 2 3 4 5 6 7 8 9; do true & done";
    assert_eq!(output(&vm, "small", script), "32000000\n");
    for bad in ["../memory.max", "cgroup.procs", "memory", ""] {
        assert!(update(vec![limit(bad, "1")]).is_err(), "{bad}");
    }
    assert!(update(vec![limit("memory.max", "lots")]).is_err());
    assert!(agent.update("nobody", Limits::default()).is_err());

    let script =
        "mkdir -p /cgroup/in/ner && echo made; echo max > /cgroup/memory.max; cat /cgroup/memory.max";
    let text = output(&vm, "small", script);
    assert!(text.starts_with("made\n67108864\n") && text.contains("Operation not permitted"), "{text}");
    agent.remove_root("small").expect("with what was made in it");
    set_up(&vm, "small", Surroundings::default());
    assert_eq!(agent.root_stats("small").expect("a new one").pids, Vec::<u32>::new());
}

fn freeze_and_remove() {
    let vm = TestVm::new().boot();
    let agent = &vm.container.agent;
    set_up(&vm, "a", Surroundings { namespaces: own_spaces(), mounts: usual_mounts(), ..Default::default() });
    set_up(&vm, "b", Surroundings::default());
    let script = "while :; do echo tick; usleep 20000; done";
    let mut ticking = agent.start(inside("a", script)).expect("it starts");
    let stdout = ticking.stdout.as_mut().expect("asked for");
    let mut tick = [0; 5];
    stdout.read_exact(&mut tick).expect("it ticks");
    agent.freeze("a", true).expect("it freezes");
    assert!(agent.start(inside("a", "true")).is_err(), "a process could not begin");
    let usage = || {
        let stats = agent.root_stats("a").expect("it answers");
        let cpu = stats.files.into_iter().find(|(name, _)| name == "cpu.stat").expect("cpu.stat").1;
        (cpu.lines().next().expect("usage").to_owned(), stats.pids.len())
    };
    let before = usage();
    assert!(before.1 >= 1);
    assert_eq!(output(&vm, "b", "sleep 1; echo others go on"), "others go on\n");
    assert_eq!(usage(), before, "no process has run");
    agent.freeze("a", false).expect("it thaws");
    stdout.read_exact(&mut tick).expect("it ticks again");

    agent.freeze("a", true).expect("it freezes");
    agent.remove_root("a").expect("a frozen container can be removed");
    assert_eq!(agent.wait(ticking.id, Some(PATIENCE)).expect("it ends"), ExitStatus::Signal(9));
    assert!(agent.root_stats("a").is_err());
    let left = output(&vm, "b", "cat /proc/self/mountinfo | wc -l");
    for _ in 0..3 {
        set_up(&vm, "a", Surroundings { mounts: usual_mounts(), ..Default::default() });
        let spec =
            ProcessSpec { pid_namespace: PidNamespace::New, ..inside("a", "sleep 1000 & exec sleep 1000") };
        agent.start(spec).expect("it starts");
        agent.remove_root("a").expect("it goes");
    }
    assert_eq!(output(&vm, "b", "cat /proc/self/mountinfo | wc -l"), left);
    agent.remove_root("b").expect("it goes");
    assert_eq!(output(&vm, ROOT, "echo here"), "here\n");
}

fn files_and_ports() {
    let vm = TestVm::new().boot();
    let agent = &vm.container.agent;
    let file = |path: &str, text: &str| PutEntry {
        path: path.to_owned(),
        mode: 0o600,
        uid: 0,
        gid: 0,
        content: PutContent::File { offset: 0, bytes: text.as_bytes().to_vec(), last: true },
    };
    let put = |place, entries| agent.put(Put { place, entries }).expect("it is put");
    put(Place::Shared("volumes/conf".to_owned()), vec![file("key", "value\n")]);
    let mut mounts = usual_mounts();
    mounts.push(ContainerMount {
        source: ContainerSource::Shared("volumes/conf".to_owned()),
        ..mount("", "/etc/conf", MsFlags::MS_BIND | MsFlags::MS_RDONLY, "")
    });
    set_up(&vm, "c", Surroundings { mounts, ..Default::default() });
    put(Place::Root("c".to_owned()), vec![file("work/new", "put\n")]);
    assert_eq!(output(&vm, "c", "cat /etc/conf/key /work/new; echo from inside > /tmp/out"), "value\nput\n");
    let get = Get { place: Place::Root("c".to_owned()), path: "tmp/out".to_owned(), offset: 0 };
    assert_eq!(agent.get(get).expect("it is read").content, GotContent::File(b"from inside\n".to_vec()));

    let server = agent.start(inside("c", "echo ready; nc -l -p 4000 -e sh -c 'read x; echo got $x'"));
    let mut server = server.expect("it starts");
    let mut ready = [0; 6];
    server.stdout.as_mut().expect("asked for").read_exact(&mut ready).expect("it says so");
    // It says so before it does.
    let deadline = Instant::now() + PATIENCE;
    let mut stream = loop {
        match agent.forward(4000) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "it never listens: {error}"),
        }
        thread::sleep(Duration::from_millis(20));
    };
    stream.write_all(b"a line\n").expect("it reads");
    stream.shutdown(Shutdown::Write).expect("it ends");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("it answers");
    assert_eq!(text, "got a line\n");
    agent.rescan().expect("the bus is looked at");
    let error = agent.eject("root").expect_err("it is mounted");
    assert_eq!(error.to_string(), "the disk is mounted");
}

fn disks() {
    let vm = TestVm::new().cpus(2).boot();
    let agent = &vm.container.agent;
    let directory = scratch().join("otter.root");
    std::fs::create_dir_all(&directory).expect("a directory");
    std::fs::write(directory.join("word"), "otter\n").expect("a file");
    let image = root_file_system(&directory.display().to_string(), &state(), &mut ());
    let path = image.unwrap_or_else(|failure| panic!("{}", failure.report())).path;
    let disk = Disk { path, read_only: true, serial: "extra".to_owned(), throwaway: false };
    for round in 0..2 {
        let attached = vm.container.machine.control().attach_disk(&disk);
        attached.unwrap_or_else(|failure| panic!("{}", failure.report()));
        // Nobody has told the guest; its agent looks when it misses the disk.
        let source = ContainerSource::Disk { serial: "extra".to_owned(), filesystem: DiskFilesystem::Erofs };
        let mut mounts = usual_mounts();
        mounts.push(ContainerMount { source, ..mount("", "/data", MsFlags::MS_RDONLY, "") });
        set_up(&vm, "c", Surroundings { mounts, ..Default::default() });
        assert_eq!(output(&vm, "c", "cat /data/word"), "otter\n", "{round}");
        assert_eq!(agent.eject("extra").expect_err("it is mounted").to_string(), "the disk is mounted");
        agent.remove_root("c").expect("it goes");
        agent.eject("extra").expect("nobody uses it");
        assert_eq!(agent.eject("extra").expect_err("it is gone").to_string(), "no disk has the serial extra");
        let detached = vm.container.machine.control().detach_disk("extra");
        detached.unwrap_or_else(|failure| panic!("{}", failure.report()));
    }
    assert_eq!(output(&vm, ROOT, "echo here"), "here\n");
}
