//! The wire format, held by bytes: one fixture per kind of message.
//!
//! After a deliberate change, `MVM_BLESS=1 cargo test -p mvm-protocol` rewrites `tests/golden.txt`; the
//! diff is the change of protocol and decides which part of the version rises.

use std::{
    env,
    fmt::{Debug, Write},
    fs,
    path::Path,
};

use mvm_protocol::*;
use serde::{Serialize, de::DeserializeOwned};

fn address(ip: &str, prefix: u8) -> Address {
    Address { ip: ip.parse().unwrap(), prefix }
}

fn hello() -> Hello {
    let stamp = |ns| Stamp { monotonic_ns: ns, boottime_ns: ns + 1 };
    Hello {
        magic: MAGIC,
        version: VERSION,
        agent_version: "0.1.0".into(),
        kernel_release: "6.12.1".into(),
        connection: 2,
        stages: StageTimes {
            agent_start: stamp(1_000_000),
            mounts_done: stamp(2_000_000),
            dialled: stamp(3_000_000),
        },
    }
}

fn configure() -> Configure {
    Configure {
        hostname: Some("otter".into()),
        interfaces: vec![Interface {
            mac: [2, 0, 0, 0, 0, 1],
            name: "eth0".into(),
            mtu: 1500,
            addresses: vec![address("10.0.0.2", 24), address("fd00::2", 64)],
        }],
        routes: vec![Route {
            destination: None,
            gateway: Some("10.0.0.1".parse().unwrap()),
            interface: "eth0".into(),
            metric: 0,
            on_link: false,
        }],
        neighbours: vec![Neighbour {
            ip: "10.0.0.1".parse().unwrap(),
            mac: [2, 0, 0, 0, 0, 9],
            interface: "eth0".into(),
        }],
        resolv_conf: Some("nameserver 10.0.0.1\n".into()),
        hosts: None,
    }
}

fn start(user: User, stdio: Stdio, pid_namespace: PidNamespace) -> Start {
    Start {
        process: 9,
        root: Some("c1".into()),
        args: vec!["echo".into(), "hi".into()],
        env: vec!["PATH=/bin".into()],
        cwd: "/".into(),
        user,
        stdio,
        pid_namespace,
        oom_score_adj: -5,
        confinement: Confinement::default(),
    }
}

fn requests() -> Vec<(&'static str, Request)> {
    let pipes = Stdio::Pipes { stdin: Some(Token(1)), stdout: Some(Token(u64::MAX)), stderr: None };
    let terminal = Stdio::Terminal { stream: Token(3), size: WindowSize { rows: 24, columns: 80 } };
    let disk = |serial: &str| Lower::Disk { serial: serial.into(), filesystem: DiskFilesystem::Erofs };
    let mount = |source, read_only| Mount { source, target: "/run/mvm/disk/a".into(), read_only };
    vec![
        ("ping", Request::Ping),
        (
            "mount",
            Request::Mount(vec![
                mount(MountSource::Disk { serial: "d0".into(), filesystem: DiskFilesystem::Ext4 }, true),
                mount(MountSource::Tmpfs { size: 65536 }, false),
                mount(MountSource::Overlay { lower: vec!["/a".into()], upper: None }, true),
            ]),
        ),
        (
            "setup-root",
            Request::SetupRoot(Box::new(SetupRoot {
                id: "c1".into(),
                lower: vec![disk("layer0"), Lower::Directory("/run/mvm/disk/a".into())],
                writable: Writable::Tmpfs { size: 1 << 26 },
                surroundings: Surroundings::default(),
            })),
        ),
        ("configure", Request::Configure(configure())),
        (
            "start-pipes",
            Request::Start(Box::new(start(User::Named("nobody".into()), pipes, PidNamespace::New))),
        ),
        (
            "start-terminal",
            Request::Start(Box::new(start(
                User::Ids { uid: 1, gid: 2, groups: vec![3, 4] },
                terminal,
                PidNamespace::Join(8),
            ))),
        ),
        ("signal", Request::Signal { process: 9, signal: 15, target: SignalTarget::Everyone }),
        ("resize", Request::Resize { process: 9, size: WindowSize { rows: 50, columns: 132 } }),
        ("close-stdin", Request::CloseStdin { process: 9 }),
        ("forget", Request::Forget { process: 9 }),
        ("list", Request::List),
        ("stats", Request::Stats),
        ("sync", Request::Sync),
        ("shutdown", Request::Shutdown { mode: ShutdownMode::Reboot, grace_ms: 2000 }),
    ]
}

fn surroundings() -> Surroundings {
    let mount = |source| ContainerMount {
        source,
        target: "/proc".into(),
        flags: 14,
        propagation: 1 << 18,
        data: "ro".into(),
    };
    Surroundings {
        namespaces: Namespaces {
            ipc: Namespace::Own,
            uts: Namespace::Of("pod".into()),
            cgroup: Namespace::Guest,
        },
        hostname: Some("otter".into()),
        domainname: None,
        mounts: vec![
            mount(ContainerSource::Filesystem("proc".into())),
            mount(ContainerSource::Shared("volumes/a".into())),
            mount(ContainerSource::Inside("/dev/shm".into())),
            mount(ContainerSource::Disk { serial: "d0".into(), filesystem: DiskFilesystem::Ext4 }),
        ],
        devices: vec![DeviceNode {
            path: "/dev/fuse".into(),
            kind: DeviceKind::Char,
            major: 10,
            minor: 229,
            mode: 0o666,
            uid: 1,
            gid: 2,
        }],
        device_rules: vec![DeviceRule {
            allow: true,
            kind: Some(DeviceKind::Block),
            major: None,
            minor: Some(3),
            access: "rwm".into(),
        }],
        disks: vec![DiskNode { path: "/dev/data".into(), serial: "d1".into(), mode: 0o660, uid: 1, gid: 2 }],
        masked_paths: vec!["/proc/kcore".into()],
        read_only_paths: vec!["/proc/sys".into()],
        read_only_root: true,
        root_propagation: 1 << 19,
        sysctls: vec![("net.core.somaxconn".into(), "1024".into())],
        limits: Limits { files: vec![("memory.max".into(), "67108864".into())] },
    }
}

fn confined() -> Start {
    let sets = Capabilities { bounding: 1, effective: 2, inheritable: 3, permitted: 4, ambient: 5 };
    let confinement = Confinement {
        capabilities: Some(sets),
        no_new_privileges: true,
        rlimits: vec![Rlimit { resource: 7, soft: 1024, hard: u64::MAX }],
        umask: Some(0o77),
        seccomp: vec![6, 0, 0, 0, 0, 0, 0xff, 0x7f],
        seccomp_flags: 2,
        io_priority: Some(0x4007),
        scheduler: Some(Scheduler { policy: 3, nice: -5, priority: 1 }),
    };
    let stdio = Stdio::Pipes { stdin: None, stdout: None, stderr: None };
    Start { confinement, ..start(User::Named(String::new()), stdio, PidNamespace::Agent) }
}

fn container_requests() -> Vec<(&'static str, Request)> {
    let root = || "c1".to_owned();
    let entry = |content| PutEntry { path: "etc/a".into(), mode: 0o644, uid: 1, gid: 2, content };
    let entries = vec![
        entry(PutContent::Directory),
        entry(PutContent::File { offset: 300, bytes: vec![1, 2, 3], last: true }),
        entry(PutContent::Link("b".into())),
        entry(PutContent::Remove),
    ];
    let attached = Stdio::Pipes { stdin: None, stdout: Some(Token(5)), stderr: Some(Token(6)) };
    let set_up = SetupRoot {
        id: root(),
        lower: vec![],
        writable: Writable::Whole { serial: "d0".into() },
        surroundings: surroundings(),
    };
    vec![
        ("setup-root-surroundings", Request::SetupRoot(Box::new(set_up))),
        ("start-confined", Request::Start(Box::new(confined()))),
        ("update", Request::Update { root: root(), limits: surroundings().limits }),
        ("freeze", Request::Freeze { root: root(), frozen: true }),
        ("root-stats", Request::RootStats { root: root() }),
        ("remove-root", Request::RemoveRoot { root: root() }),
        ("put", Request::Put(Put { place: Place::Shared("volumes/a".into()), entries })),
        ("get", Request::Get(Get { place: Place::Root(root()), path: "etc/a".into(), offset: 7 })),
        ("forward", Request::Forward { port: 8080, stream: Token(9) }),
        ("rescan", Request::Rescan),
        ("eject", Request::Eject { serial: "d0".into() }),
        ("prepare", Request::Prepare),
        ("clock", Request::Clock),
        ("adjust-clock", Request::AdjustClock { by_ns: -1_500_000 }),
        ("hold", Request::Hold),
        ("release", Request::Release),
        ("attach", Request::Attach { process: 9, stdio: attached }),
        ("rename", Request::Rename { root: root(), hostname: Some("badger".into()) }),
        ("eject-card", Request::EjectCard { mac: [2, 0, 0, 0, 0, 1] }),
    ]
}

fn container_replies() -> Vec<(&'static str, GuestMessage)> {
    let response = |result| GuestMessage::Response { id: 300, result: Ok(result) };
    let stats = RootStats { files: vec![("pids.max".into(), "max\n".into())], pids: vec![1, 70_000] };
    let got = |content| response(Reply::Got(Got { mode: 0o100_644, uid: 1, gid: 2, size: 3, content }));
    vec![
        ("reply-root-stats", response(Reply::RootStats(stats))),
        ("reply-got-file", got(GotContent::File(vec![1, 2, 3]))),
        ("reply-got-directory", got(GotContent::Directory(vec!["a".into()]))),
        ("reply-got-link", got(GotContent::Link("b".into()))),
        ("reply-got-other", got(GotContent::Other)),
        ("reply-clock", response(Reply::Clock(1_700_000_000_000_000_000))),
    ]
}

fn guest_messages() -> Vec<(&'static str, GuestMessage)> {
    let response = |result| GuestMessage::Response { id: 300, result };
    let failure = Failure { kind: FailureKind::Exec, errno: 2, message: "execute nope".into() };
    let stats = Stats { memory_total: 1 << 27, cpu_user_ns: 10_000_000, processes: 1, ..Stats::default() };
    let entry = |exited| ProcessEntry { process: 9, pid: 77, exited };
    let at = Stamp { monotonic_ns: 5, boottime_ns: 6 };
    vec![
        ("hello", GuestMessage::Hello(hello())),
        ("reply-done", response(Ok(Reply::Done))),
        ("reply-started", response(Ok(Reply::Started { pid: 77 }))),
        (
            "reply-processes",
            response(Ok(Reply::Processes(vec![entry(None), entry(Some(ExitStatus::Signal(9)))]))),
        ),
        ("reply-stats", response(Ok(Reply::Stats(stats)))),
        ("failure", response(Err(failure))),
        ("event-exited", GuestMessage::Event(Event::Exited { process: 9, status: ExitStatus::Code(3), at })),
        ("event-oom", GuestMessage::Event(Event::OutOfMemory { root: "c1".into(), kills: 1 })),
    ]
}

fn hello_ack() -> HostMessage {
    HostMessage::HelloAck(HelloAck {
        magic: MAGIC,
        version: VERSION,
        features: 0,
        identity: Identity {
            hostname: "otter".into(),
            machine_id: 7,
            wall_clock_ns: 1_700_000_000_000_000_000,
            entropy: [9; 32],
        },
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap()).collect()
}

/// One kind of message.
struct Fixture {
    name: &'static str,
    frame: Vec<u8>,
    /// What the message looks like, and what a frame's bytes decode to.
    shown: String,
    decode: fn(&[u8]) -> String,
}

impl Fixture {
    fn of<T: Serialize + DeserializeOwned + Debug>(name: &'static str, message: &T) -> Self {
        fn decode<T: DeserializeOwned + Debug>(bytes: &[u8]) -> String {
            let mut decoder = Decoder::new();
            decoder.push(bytes);
            format!("{:?}", decoder.next_message::<T>().unwrap().unwrap())
        }
        Self { name, frame: encode(message).unwrap(), shown: format!("{message:?}"), decode: decode::<T> }
    }
}

fn fixtures() -> Vec<Fixture> {
    let request = |(name, request)| Fixture::of(name, &HostMessage::Request { id: 1, request });
    let mut all = vec![Fixture::of("hello-ack", &hello_ack())];
    all.extend(requests().into_iter().chain(container_requests()).map(request));
    all.extend(
        guest_messages().iter().chain(&container_replies()).map(|(name, message)| Fixture::of(name, message)),
    );
    all
}

#[test]
fn every_kind_of_message_has_the_bytes_on_record() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden.txt");
    let fixtures = fixtures();
    let now: String = fixtures.iter().map(|it| format!("{} {}\n", it.name, hex(&it.frame))).collect();
    if env::var_os("MVM_BLESS").is_some() {
        fs::write(&path, &now).unwrap();
    }
    assert_eq!(now, fs::read_to_string(&path).unwrap(), "the wire format has changed");
}

#[test]
fn the_bytes_on_record_decode_to_the_messages() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden.txt");
    let recorded = fs::read_to_string(path).unwrap();
    let fixtures = fixtures();
    assert_eq!(recorded.lines().count(), fixtures.len());
    for (line, it) in recorded.lines().zip(fixtures) {
        let (name, bytes) = line.split_once(' ').unwrap();
        assert_eq!(name, it.name);
        assert_eq!((it.decode)(&unhex(bytes)), it.shown, "{name}");
    }
}

#[test]
fn the_stream_header_has_the_bytes_on_record() {
    let header = StreamHeader { token: Token(0x0102_0304_0506_0708) };
    assert_eq!(hex(&header.encode()), "6d766d53010000000807060504030201");
    assert_eq!(StreamHeader::decode(&header.encode()), Ok(header));
}

#[test]
fn a_stream_header_with_any_other_first_byte_version_or_reserved_bit_is_refused() {
    let good = StreamHeader { token: Token(1) }.encode();
    for at in 0..8 {
        let mut bad = good;
        bad[at] ^= 0x80;
        assert!(StreamHeader::decode(&bad).is_err(), "byte {at}");
    }
}

#[test]
fn the_version_of_a_hello_is_readable_whatever_follows_it() {
    let frame = encode(&GuestMessage::Hello(hello())).unwrap();
    let payload = &frame[HEADER_LEN..];
    assert_eq!(Hello::version_in(payload), Some(VERSION));
    assert_eq!(Hello::version_in(&payload[..7]), Some(VERSION), "message number, magic, major, minor");
    assert_eq!(Hello::version_in(&payload[..6]), None);
    assert_eq!(Hello::version_in(b"GET / HTTP/1.1"), None);
    assert_eq!(Hello::version_in(&[]), None);
}

#[test]
fn the_id_of_a_request_is_readable_although_its_verb_is_unknown() {
    let mut frame = encode(&HostMessage::Request { id: 300, request: Request::Ping }).unwrap();
    *frame.last_mut().unwrap() = 0x7f;
    assert_eq!(decode::<HostMessage>(&frame[HEADER_LEN..]), Err(DecodeError::Malformed));
    assert_eq!(HostMessage::request_id_in(&frame[HEADER_LEN..]), Some(300));
    assert_eq!(HostMessage::request_id_in(&encode(&hello_ack()).unwrap()[HEADER_LEN..]), None);
}
