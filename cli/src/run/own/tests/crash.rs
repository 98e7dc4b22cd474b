//! Owners that are killed: whatever they had by then is found by their ledger, and nothing else is touched.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use mvm_runtime::net::sweep;
use mvm_runtime::state::{ProcessId, collect};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::fake::{FakeLauncher, Stage};
use super::*;

/// How far a process that owns a container goes before it waits to be killed, with which network, and its home.
const ORDERS: [&str; 3] = ["MVM_TEST_STAGE", "MVM_TEST_NET", "MVM_TEST_HOME"];
/// What it says there.
const REACHED: &str = "reached";

fn name(stage: &Stage<'_>) -> &'static str {
    match stage {
        Stage::Directory => "directory",
        Stage::Network => "network",
        Stage::Machine => "machine",
        Stage::Container => "container",
        Stage::Runs(_) => "runs",
        Stage::Ended => "ended",
        Stage::Signal(_) => "signal",
        Stage::Ends => "ends",
        Stage::Abandoned(_) => "abandoned",
    }
}

#[test]
#[ignore = "it is run by the next test, and killed"]
fn an_owner_that_is_about_to_be_killed() {
    let [last, net, home] = ORDERS.map(|name| std::env::var(name).unwrap());
    let launcher = FakeLauncher::new(move |stage| {
        if name(&stage) == last {
            writeln!(std::io::stdout(), "\n{REACHED}").unwrap();
            loop {
                std::thread::park();
            }
        }
        if let Stage::Runs(process) = stage {
            process.exit(0);
        }
    });
    let mut job = job("c");
    job.remove = true;
    job.net.choice = net;
    let result = own(&order(job), &Home::at(home), &launcher, Audience::Log, || ());
    panic!("it was not killed: {result:?}");
}

/// Starts it and kills it where it was told to stop; the processes it had started by then.
fn kill_at(stage: &str, net: &str, home: &Home) -> Vec<ProcessId> {
    let test = "run::own::tests::crash::an_owner_that_is_about_to_be_killed";
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture"]).stdout(Stdio::piped());
    command.envs(ORDERS.into_iter().zip([stage, net, home.path().to_str().unwrap()]));
    let mut owner = command.spawn().unwrap();
    let mut lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == REACHED), "{stage} is not reached with {net}");
    let children = sh(&format!("cat /proc/{}/task/*/children 2>/dev/null || true", owner.id()));
    let children = children.split_whitespace().filter_map(|pid| ProcessId::of(pid.parse().unwrap()));
    let children = children.collect();
    owner.kill().unwrap();
    owner.wait().unwrap();
    children
}

fn sh(script: &str) -> String {
    let output = Command::new("/bin/sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Gives this thread a network and a /run of its own, with things in them that are nobody's business.
fn alone() -> bool {
    if !nix::unistd::geteuid().is_root() {
        writeln!(std::io::stderr(), "not tested: only root can have a network of its own").unwrap();
        return false;
    }
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    sh("ip link set lo up; ip link add br-other type bridge; ip link add mvmother type bridge
        nft add table inet other; mkdir /run/mvm; echo other > /run/mvm/other");
    true
}

/// A name space that has a link, as a network plug-in leaves it; its path.
fn pod() -> PathBuf {
    sh("ip netns add pod; ip link add eth0 netns pod type veth peer name out0
        ip -n pod addr add 10.1.0.2/24 dev eth0; ip -n pod link set eth0 up; ip link set out0 up");
    "/run/netns/pod".into()
}

/// Everything on this host that owners change.
fn host(home: &Home) -> String {
    let home = home.path().display();
    sh(&format!(
        "ip -br link | cut -c -17; tc qdisc show; nft list ruleset
         ip -n pod -br link | cut -c -17; tc -n pod qdisc show; tc -n pod filter show dev eth0 ingress
         find /run/mvm {home} -not -name lock -not -name events -not -path '*/net*' | sort"
    ))
}

#[test]
fn whenever_an_owner_is_killed_what_it_had_is_cleaned_up_once_and_nothing_else() {
    if !alone() {
        return;
    }
    let pod = format!("netns:{}", pod().display());
    let dir = tempfile::tempdir().unwrap();
    let home = Home::at(dir.path());
    let neighbour = home.create("neighbour").unwrap();
    let record = Record { id: "neighbour".into(), condition: Condition::Running, ..Record::default() };
    neighbour.write(&record).unwrap();
    neighbour.ledger().unwrap().note(&Resource::Process(ProcessId::own())).unwrap();
    let before = host(&home);
    for net in ["none", "nat", "host-only", &pod] {
        for stage in ["directory", "network", "machine", "container", "runs", "ended"] {
            let processes = kill_at(stage, net, &home);
            let expected = usize::from(!matches!(stage, "directory" | "network"));
            assert_eq!(processes.len(), expected, "{stage} {net}");
            let dirty = host(&home);
            assert_ne!(dirty, before, "{stage} {net}");
            let cleaned = collect(&home).unwrap();
            sweep().unwrap();
            assert_eq!(cleaned.len(), 1, "{stage} {net}: {cleaned:?}");
            assert_eq!((cleaned[0].removed, &cleaned[0].problem), (true, &None), "{stage} {net}");
            assert!(processes.iter().all(|process| !process.is_alive()), "{stage} {net}");
            assert_eq!(host(&home), before, "{stage} {net}; it was\n{dirty}");
            assert_eq!(collect(&home).unwrap(), [], "{stage} {net}");
            sweep().unwrap();
            assert_eq!(host(&home), before, "{stage} {net}");
        }
    }
    drop(neighbour);
}
