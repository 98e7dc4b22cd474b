//! Containers that go on from a snapshot while those they were saved of live.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};

use mvm_integration::vm::{image, scratch, state};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("a_container_goes_on_counting_from_its_snapshot_as_another_while_the_first_lives", counting),
    ("a_container_goes_on_from_the_changes_to_a_snapshot_that_stays_as_long_as_they_do", above),
    ("a_disk_is_saved_with_the_memory_that_belongs_to_it", disk),
    ("a_container_behind_nat_goes_on_with_a_card_and_an_address_of_its_own", network),
    ("a_container_is_forked_and_its_fork_is_forked", fork),
    ("a_snapshot_for_which_there_is_no_room_leaves_the_container_as_it_was_and_nothing_else", full),
    ("what_cannot_be_saved_or_restored_says_why_and_nothing_is_left", refused),
];

/// Counts, and ends with 7 when it is asked to.
const COUNT: &str = "echo mark > /file; trap 'exit 7' TERM; n=0; \
     while :; do n=$((n + 1)); echo $n; sleep 0.2; done";

struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

/// The `mvm` under test, whose containers nobody else lists.
fn command() -> Command {
    let mut command = crate::mvm();
    command.env("MVM_RUN", scratch().join("restored-run"));
    command
}

fn mvm(args: &[&str]) -> Said {
    let output = command().args(args).output().expect("it starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    Said { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
}

/// What a command prints that must succeed.
fn ok(args: &[&str]) -> String {
    let said = mvm(args);
    assert_eq!(said.code, Some(0), "{args:?}: {}", said.err);
    said.out
}

/// What a command says that must fail.
fn fails(args: &[&str]) -> String {
    let said = mvm(args);
    assert_eq!(said.code, Some(125), "{args:?}: {} {}", said.out, said.err);
    said.err
}

fn run(name: &str, options: &[&str], script: &str) {
    let root = image().display().to_string();
    let given = [&["run", "--detach", "--name", name], options, &[&root, "--", "sh", "-c", script]].concat();
    ok(&given);
}

/// The output of a container, as it comes.
struct Log {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Log {
    fn of(name: &str) -> Self {
        let followed = command().args(["logs", "--follow", name]).stdout(Stdio::piped()).spawn();
        let mut child = followed.expect("it starts");
        let lines = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, lines }
    }

    fn number(&mut self) -> u64 {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("a line");
        line.trim().parse().unwrap_or_else(|_| panic!("{line:?} is no number"))
    }

    /// Waits until it has counted up to `number`, one by one.
    fn reach(&mut self, number: u64) {
        let mut last = self.number();
        while last < number {
            let next = self.number();
            assert_eq!(next, last + 1);
            last = next;
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn exec(name: &str, script: &str) -> String {
    ok(&["exec", name, "--", "sh", "-c", script])
}

fn counting() {
    run("counted", &["--template", "always"], COUNT);
    let mut log = Log::of("counted");
    log.reach(3);
    // Somebody's process, which has nobody any more where the machine goes on.
    let script = "echo up; exec sleep 1000";
    let guest = command().args(["exec", "counted", "--", "sh", "-c", script]).stdout(Stdio::piped()).spawn();
    let mut guest = guest.expect("it starts");
    let mut up = String::new();
    BufReader::new(guest.stdout.take().expect("piped")).read_line(&mut up).expect("a line");
    assert_eq!(up, "up\n");
    assert_eq!(ok(&["snapshot", "create", "counted", "--name", "before"]), "before");
    // It has counted on for as long as that took: what was saved is no later than what is there now.
    let written = ok(&["logs", "counted"]);
    let reached: u64 = written.lines().last().expect("a line").parse().expect("a number");
    let listed: serde_json::Value =
        serde_json::from_str(&ok(&["snapshot", "ls", "--format", "json"])).expect("JSON");
    let row = listed.as_array().and_then(|rows| rows.iter().find(|row| row["name"] == "before"));
    assert_eq!(row.expect("it is listed")["container"], "counted", "{listed}");
    let after = log.number();
    log.reach(after + 3);

    ok(&["restore", "before", "--name", "again"]);
    let mut again = Log::of("again");
    let first = again.number();
    assert!((4..=reached + 1).contains(&first), "it counts from {first}, the first had reached {reached}");
    again.reach(first + 3);
    log.reach(after + 6);
    let who = "hostname; cat /etc/machine-id; head -c 16 /dev/urandom | busybox od -An -tx1";
    let both = ["counted", "again"].map(|name| exec(name, who));
    let [old, new] = both.each_ref().map(|text| text.lines().collect::<Vec<_>>());
    assert_eq!((old[0], new[0]), ("counted", "again"));
    assert!(old[1].len() == 32 && old[1] != new[1] && old[2] != new[2], "{both:?}");
    assert_eq!(exec("again", "cat /file"), "mark");
    let sleepers = |name| exec(name, "busybox ps | busybox grep -c 'sleep 100[0]' || true");
    assert_eq!((sleepers("counted").as_str(), sleepers("again").as_str()), ("1", "0"));

    // A copy can be saved as well, and its first process ends as one that was started there.
    assert_eq!(ok(&["snapshot", "create", "again"]), "again-1");
    let set = snapshot_file("again-1", "working-set");
    for (name, noted) in [("third", false), ("fourth", true)] {
        assert_eq!(set.is_file(), noted, "it is noted when the first of them runs");
        ok(&["restore", "again-1", "--name", name, "--prefault"]);
        Log::of(name).reach(first + 5);
    }
    let bytes = fs::read(&set).expect("it is noted");
    assert!(bytes.len() > 1000, "{} bytes", bytes.len());
    ok(&["rm", "--force", "fourth"]);
    fs::write(&set, &bytes[1..]).expect("it is ours");
    let said = fails(&["restore", "again-1", "--name", "fourth", "--prefault"]);
    assert!(said.contains("the working set is of no use") && said.contains("`working-set`"), "{said}");
    // Time enough to end by themselves on any host: what is made to end has another code.
    ok(&["stop", "--time", "120", "third", "again"]);
    for name in ["third", "again"] {
        let found: serde_json::Value = serde_json::from_str(&ok(&["inspect", name])).expect("JSON");
        assert_eq!(found[0]["condition"]["code"], 7, "{found}");
    }
    guest.kill().and_then(|()| guest.wait()).expect("it runs");
    ok(&["rm", "--force", "counted", "again", "third"]);
    ok(&["snapshot", "rm", "before", "again-1"]);
    assert!(fails(&["restore", "before"]).contains("there is no snapshot before"));
}

fn memory_bytes(name: &str) -> u64 {
    let found: serde_json::Value = serde_json::from_str(&ok(&["snapshot", "inspect", name])).expect("JSON");
    found[0]["manifest"]["run"]["machine"]["memory_bytes"].as_u64().unwrap_or_else(|| panic!("{found}"))
}

fn above() {
    run("grown", &["--template", "always"], COUNT);
    let mut log = Log::of("grown");
    log.reach(3);
    ok(&["snapshot", "create", "grown", "--name", "grown-full"]);
    exec("grown", "busybox dd if=/dev/urandom of=/more bs=64k count=32 2>/dev/null");
    let sum = exec("grown", "busybox md5sum /more");
    ok(&["snapshot", "create", "grown", "--name", "grown-later", "--base", "grown-full"]);
    let reached = log.number();
    let (full, later) = (memory_bytes("grown-full"), memory_bytes("grown-later"));
    assert!(later > 2 << 20 && later < full / 2, "{later} of {full} bytes");
    let refused = fails(&["snapshot", "create", "grown", "--base", "grown-later"]);
    assert!(refused.contains("--base grown-full"), "{refused}");
    let refused = mvm(&["snapshot", "rm", "grown-full"]);
    assert!(
        refused.code != Some(0) && refused.err.contains("mvm snapshot rm grown-later"),
        "{}",
        refused.err
    );
    ok(&["rm", "--force", "grown"]);

    ok(&["restore", "grown-later", "--name", "grown-again"]);
    let mut again = Log::of("grown-again");
    let first = again.number();
    assert!(first > 3, "it counts from {first}, the first had reached {reached}");
    assert_eq!(exec("grown-again", "busybox md5sum /more"), sum);
    // What goes on from changes is saved above the same, and goes on once more.
    ok(&["snapshot", "create", "grown-again", "--name", "grown-last", "--base", "grown-full"]);
    ok(&["restore", "grown-last", "--name", "grown-third"]);
    assert_eq!(exec("grown-third", "busybox md5sum /more"), sum);
    Log::of("grown-third").reach(first + 3);
    ok(&["rm", "--force", "grown-again", "grown-third"]);

    let (full, aside) = (snapshot_file("grown-full", ""), scratch().join("grown-aside"));
    fs::rename(&full, &aside).expect("a directory");
    let gone = fails(&["restore", "grown-last"]);
    assert!(gone.contains("snapshot grown-full, its base, is gone"), "{gone}");
    fs::rename(&aside, &full).expect("a directory");
    ok(&["snapshot", "rm", "grown-full", "grown-later", "grown-last"]);
}

fn disk() {
    let script = "[ -e /file ] || echo one > /file; echo 1; trap 'exit 7' TERM; while :; do sleep 0.2; done";
    run("disked", &["--template", "never", "--disk-size", "64M", "--restart", "on-failure:1"], script);
    Log::of("disked").reach(1);
    ok(&["snapshot", "create", "disked", "--name", "disked-before"]);
    exec("disked", "echo two > /file; sync");
    for name in ["disked-a", "disked-b"] {
        ok(&["restore", "disked-before", "--name", name]);
        assert_eq!(
            exec(name, &format!("cat /file; echo {name} > /file; sync; cat /file")),
            format!("one\n{name}")
        );
    }
    assert_eq!(exec("disked", "cat /file"), "two");
    assert_eq!(exec("disked-a", "cat /file"), "disked-a");
    let complaints = exec("disked-a", "busybox dmesg 2>/dev/null | busybox grep -i 'ext4.*error' | wc -l");
    assert_eq!(complaints, "0");
    // What fails is started again, from its image and on its disk.
    ok(&["kill", "disked-b"]);
    Log::of("disked-b").reach(1);
    assert_eq!(exec("disked-b", "cat /file"), "disked-b");
    ok(&["stop", "disked-a"]);
    ok(&["rm", "--force", "disked", "disked-a", "disked-b"]);
    ok(&["snapshot", "rm", "disked-before"]);
}

fn network() {
    run("wired", &["--net", "nat"], COUNT);
    Log::of("wired").reach(1);
    ok(&["snapshot", "create", "wired", "--name", "wired-before"]);
    ok(&["restore", "wired-before", "--name", "wired-too"]);
    Log::of("wired-too").reach(3);
    let address = "busybox ip -4 -o addr show dev eth0 | busybox awk '{print $4}'";
    let script = format!("{address}; cat /sys/class/net/eth0/address; ls /sys/class/net; cat /etc/hosts");
    let both = ["wired", "wired-too"].map(|name| exec(name, &script));
    let [old, new] = both.each_ref().map(|text| text.lines().collect::<Vec<_>>());
    assert!(old[0].contains('/') && new[0].contains('/') && old[0] != new[0], "{both:?}");
    assert_ne!(old[1], new[1]);
    assert_eq!(&old[2..4], &new[2..4], "there is one card, of the same name");
    assert!(new[4].ends_with("wired-too"), "{both:?}");
    for (name, other) in [("wired", new[0]), ("wired-too", old[0])] {
        let other = other.split('/').next().expect("an address");
        let said = exec(
            name,
            &format!("busybox ping -c 1 -W 60 {other}; busybox ip route | busybox grep -c default"),
        );
        assert!(said.contains("1 packets received") && said.ends_with('1'), "{name}: {said}");
    }
    // Saved again it has one card still, where the first had its own.
    ok(&["snapshot", "create", "wired-too", "--name", "wired-again"]);
    ok(&["restore", "wired-again", "--name", "wired-three"]);
    assert!(exec("wired-three", address).contains('/'));
    ok(&["rm", "--force", "wired", "wired-too", "wired-three"]);
    ok(&["snapshot", "rm", "wired-before", "wired-again"]);
}

fn fork() {
    let published = ["--net", "nat", "--publish", "8099:80", "--template", "always", "--disk-size", "64M"];
    run("trunk", &published, COUNT);
    let mut log = Log::of("trunk");
    log.reach(3);
    ok(&["fork", "trunk", "--name", "branch"]);
    ok(&["fork", "branch", "--name", "twig"]);
    assert_eq!(ok(&["snapshot", "ls", "--quiet"]).matches("fork-").count(), 0, "none is kept");
    let mut twig = Log::of("twig");
    assert!(twig.number() > 3);
    let names = ["trunk", "branch", "twig"];
    for name in names {
        assert_eq!(
            exec(name, &format!("cat /file; hostname; echo {name} > /file; sync; cat /file")),
            format!("mark\n{name}\n{name}")
        );
    }
    assert!(fails(&["fork", "trunk", "--name", "twig"]).contains("there is a container twig already"));
    // The first counts on, and has its port for itself.
    let next = log.number();
    log.reach(next + 3);
    let ports = |name| {
        let found: serde_json::Value = serde_json::from_str(&ok(&["inspect", name])).expect("JSON");
        found[0]["ports"].as_array().map(Vec::len)
    };
    assert_eq!(names.map(ports), [Some(1), Some(0), Some(0)]);
    ok(&["stop", "branch"]);
    ok(&["rm", "--force", "trunk", "branch", "twig"]);
}

fn full() {
    let place = scratch().join("full");
    fs::create_dir_all(&place).expect("a directory");
    mount(Some("tmpfs"), &place, Some("tmpfs"), MsFlags::empty(), Some("size=16m")).expect("root");
    run("large", &["--disk-size", "64M"], COUNT);
    let mut log = Log::of("large");
    log.reach(2);
    let create = command().args(["snapshot", "create", "large"]).env("MVM_STATE", &place).output();
    let create = create.expect("it starts");
    let said = String::from_utf8_lossy(&create.stderr).into_owned();
    assert!(create.status.code() == Some(125) && said.contains("No space left"), "{said}");
    let next = log.number();
    log.reach(next + 3);
    assert_eq!(exec("large", "echo more > /file; sync; cat /file"), "more");
    let left = fs::read_dir(place.join("snapshots")).expect("a directory").count();
    assert_eq!(left, 0);
    ok(&["snapshot", "create", "large", "--name", "large"]);
    ok(&["rm", "--force", "large"]);
    ok(&["snapshot", "rm", "large"]);
    umount2(&place, MntFlags::MNT_DETACH).expect("root");
}

fn snapshot_file(name: &str, file: &str) -> PathBuf {
    state().join("snapshots").join(name).join(file)
}

fn refused() {
    let volume = scratch().join("volume");
    fs::create_dir_all(&volume).expect("a directory");
    let mount = format!("{}:/data:ro", volume.display());
    run("volumed", &["--volume", &mount], "exec sleep 1000");
    let said = fails(&["snapshot", "create", "volumed", "--name", "none"]);
    assert!(said.contains("/data is a volume"), "{said}");
    ok(&["exec", "volumed", "--", "true"]);
    ok(&["rm", "--force", "volumed"]);
    assert!(fails(&["snapshot", "create", "volumed"]).contains("there is no container volumed"));

    run("odd", &[], COUNT);
    Log::of("odd").reach(1);
    ok(&["snapshot", "create", "odd", "--name", "odd"]);
    assert!(
        fails(&["snapshot", "create", "odd", "--name", "odd"]).contains("there is a snapshot odd already")
    );
    assert!(fails(&["restore", "odd"]).contains("there is a container odd already"));
    let manifest = snapshot_file("odd", "manifest.json");
    let text = fs::read_to_string(&manifest).expect("a manifest");
    let mut other: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    other["processor"] = "another one".into();
    fs::write(&manifest, other.to_string()).expect("a file");
    let said = fails(&["restore", "odd", "--name", "other"]);
    assert!(said.contains("it ran on another one, and this host is") && said.contains("help:"), "{said}");
    fs::write(&manifest, &text).expect("a file");
    // Of the right length, and not what was saved.
    let damaged = snapshot_file("odd", "state");
    let mut bytes = fs::read(&damaged).expect("a state");
    *bytes.last_mut().expect("bytes") ^= 1;
    fs::write(&damaged, bytes).expect("a file");
    let said = fails(&["restore", "odd", "--name", "other"]);
    assert!(said.contains("checksum"), "{said}");
    let names = ok(&["ps", "--all"]);
    assert!(names.contains("odd") && !names.contains("other"), "{names}");
    ok(&["rm", "--force", "odd"]);
    ok(&["snapshot", "rm", "odd"]);
}
