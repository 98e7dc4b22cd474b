//! Container roots: overlays, name spaces, devices, texts. Needs the right to mount.

use std::{fs, io::Read, os::unix::fs::symlink, path::Path};

use mvm_protocol::{
    Configure, ExitStatus, FailureKind, Lower, PidNamespace, SetupRoot, SignalTarget, User, WindowSize,
    Writable,
};

use super::guest::{Guest, SOON, shell};
use crate::agent::{Error, ProcessSpec, StdioSpec};

/// Programs come from this machine's /usr, which has its own bin and lib; all else is made by the test.
fn image(guest: &Guest) -> Vec<Lower> {
    let top = guest.dir.path().join("image");
    ["etc", "proc", "sys", "dev"].iter().for_each(|name| fs::create_dir_all(top.join(name)).unwrap());
    fs::write(top.join("etc/passwd"), "app:x:1000:1001::/home/app:/bin/sh\n").unwrap();
    fs::write(top.join("etc/group"), "app:x:1001:\nextra:x:1002:app\n").unwrap();
    symlink("/nowhere/resolv.conf", top.join("etc/resolv.conf")).unwrap();
    [top.as_path(), Path::new("/usr")].map(|path| Lower::Directory(path.to_str().unwrap().to_owned())).into()
}

fn with_root() -> Guest {
    let guest = Guest::new();
    let root = SetupRoot {
        id: "c1".to_owned(),
        lower: image(&guest),
        writable: Writable::Tmpfs { size: 1 << 20 },
        surroundings: Default::default(),
    };
    guest.client.set_up_root(root).unwrap();
    guest
}

fn inside(script: &str) -> ProcessSpec {
    ProcessSpec { root: Some("c1".to_owned()), pid_namespace: PidNamespace::New, ..shell(script) }
}

fn run(guest: &Guest, spec: ProcessSpec) -> (String, ExitStatus) {
    let mut process = guest.client.start(spec).unwrap();
    let mut text = String::new();
    process.stdout.as_mut().unwrap().read_to_string(&mut text).unwrap();
    (text, guest.client.wait(process.id, Some(SOON)).unwrap())
}

#[test]
fn a_process_sees_its_root_and_nothing_of_the_agents() {
    let guest = with_root();
    let script = "cat /etc/passwd; ls /run /tmp 2>&1 | wc -l; touch /new && echo writable; \
                  cut -d' ' -f5 /proc/self/mountinfo | sort";
    let (text, _) = run(&guest, inside(script));
    let expected = "app:x:1000:1001::/home/app:/bin/sh\n2\nwritable\n\
                    /\n/dev\n/dev/mqueue\n/dev/pts\n/dev/shm\n/proc\n/sys\n";
    assert_eq!(text.replace("/dev/mqueue\n", ""), expected.replace("/dev/mqueue\n", ""));
    assert!(!Path::new("/new").exists());
}

#[test]
fn the_first_process_is_pid_1_of_its_own_proc_and_others_join_it() {
    let guest = with_root();
    let mut first = guest.client.start(inside("echo $$; exec sleep 1000")).unwrap();
    let mut pid = [0; 2];
    first.stdout.as_mut().unwrap().read_exact(&mut pid).unwrap();
    assert_eq!(&pid, b"1\n");
    let joined = ProcessSpec {
        pid_namespace: PidNamespace::Join(first.id),
        ..inside("cat /proc/1/cmdline | tr '\\0' ' '")
    };
    // The shell may not have become what it was told to by now.
    let (line, _) = run(&guest, joined);
    assert!(line.ends_with("sleep 1000 "), "{line}");
    guest.client.signal(first.id, libc::SIGKILL, SignalTarget::Process).unwrap();
    assert_eq!(guest.client.wait(first.id, Some(SOON)).unwrap(), ExitStatus::Signal(9));
    assert_eq!(run(&guest, inside("echo $$; cat /proc/1/comm")).0, "1\ncat\n".replace("cat", "sh"));
}

#[test]
fn users_come_from_the_images_own_files() {
    let guest = with_root();
    let mut spec = inside("id -u; id -g; id -G; echo $HOME");
    spec.user = User::Named("app".to_owned());
    assert_eq!(run(&guest, spec).0, "1000\n1001\n1001 1002\n/home/app\n");
    let mut spec = inside("true");
    spec.user = User::Named("www-data".to_owned());
    let error = guest.client.start(spec).unwrap_err();
    assert_eq!(error.to_string(), "no user www-data in /etc/passwd of the root");
}

#[test]
fn the_devices_are_there_and_work_for_everybody() {
    let guest = with_root();
    let mut spec =
        inside("ls -l /dev | grep -c ^c; echo x > /dev/null && head -c 3 /dev/zero | wc -c; ls -d /dev/ptmx");
    spec.user = User::Ids { uid: 1000, gid: 1000, groups: vec![] };
    assert_eq!(run(&guest, spec).0, "6\n3\n/dev/ptmx\n");
}

#[test]
fn a_terminal_is_the_first_of_the_containers_own() {
    let guest = with_root();
    let size = WindowSize { rows: 5, columns: 6 };
    let spec = ProcessSpec { stdio: StdioSpec::Terminal(size), ..inside("tty; stty size; echo /dev/pts/*") };
    let mut process = guest.client.start(spec).unwrap();
    let mut text = String::new();
    // A terminal's stream may end in a reset where another stream ends.
    let _ = process.terminal.as_mut().unwrap().read_to_string(&mut text);
    assert_eq!(text, "/dev/pts/0\r\n5 6\r\n/dev/pts/0 /dev/pts/ptmx\r\n");
}

#[test]
fn the_writable_layer_is_bounded_and_a_read_only_root_refuses_writes() {
    let guest = with_root();
    let (text, _) = run(&guest, inside("head -c 3000000 /dev/zero > /big; stat -c %s /big"));
    let written: u64 = text.trim().parse().unwrap();
    assert!(written <= 1 << 20, "{written}");
    let root = SetupRoot {
        id: "ro".to_owned(),
        lower: image_again(&guest),
        writable: Writable::No,
        surroundings: Default::default(),
    };
    guest.client.set_up_root(root).unwrap();
    let spec = ProcessSpec { root: Some("ro".to_owned()), ..inside("touch /x 2>&1; cat /etc/passwd") };
    assert!(run(&guest, spec).0.starts_with("touch: cannot touch '/x': Read-only file system\napp:"));
}

fn image_again(guest: &Guest) -> Vec<Lower> {
    fs::remove_dir_all(guest.dir.path().join("image")).unwrap();
    image(guest)
}

#[test]
fn host_names_and_resolver_reach_roots_made_before_and_after() {
    let guest = with_root();
    let configure = |name: &str| Configure {
        hostname: Some(name.to_owned()),
        resolv_conf: Some("nameserver 10.0.0.1\n".to_owned()),
        hosts: Some("127.0.0.1 localhost\n".to_owned()),
        ..Configure::default()
    };
    guest.client.configure(configure("before")).unwrap();
    let read = "cat /etc/hostname /etc/resolv.conf /etc/hosts; uname -n";
    let expected = "before\nnameserver 10.0.0.1\n127.0.0.1 localhost\nbefore\n";
    assert_eq!(run(&guest, inside(read)).0, expected);
    let root = SetupRoot {
        id: "c2".to_owned(),
        lower: image_again(&guest),
        writable: Writable::Tmpfs { size: 0 },
        surroundings: Default::default(),
    };
    guest.client.set_up_root(root).unwrap();
    let spec = ProcessSpec { root: Some("c2".to_owned()), ..inside(read) };
    assert_eq!(run(&guest, spec).0, expected);
}

#[test]
fn a_root_is_made_once_and_a_process_needs_one_that_exists() {
    let guest = with_root();
    let root = SetupRoot {
        id: "c1".to_owned(),
        lower: vec![],
        writable: Writable::No,
        surroundings: Default::default(),
    };
    let error = guest.client.set_up_root(root).unwrap_err();
    assert!(matches!(error, Error::Refused { kind: FailureKind::Exists, .. }), "{error}");
    let spec = ProcessSpec { root: Some("nope".to_owned()), ..inside("true") };
    let error = guest.client.start(spec).unwrap_err();
    assert!(matches!(error, Error::Refused { kind: FailureKind::NotFound, .. }), "{error}");
}

#[test]
fn a_missing_program_of_a_root_is_127_although_this_machine_has_it() {
    let guest = with_root();
    let error =
        guest.client.start(ProcessSpec { args: vec!["/usr/bin/env".to_owned()], ..inside("") }).unwrap_err();
    assert_eq!(error.exec_exit_code(), Some(127));
}
