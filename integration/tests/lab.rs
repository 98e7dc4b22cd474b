//! The lab itself: what comes out of it is what the command said, and its end is the command's.

use std::ffi::OsString;
use std::time::Duration;

use mvm_integration::lab::{self, Error, Options};
use sha2::{Digest, Sha256};

/// Everything that one boot can show, one line each; the bulk goes last.
const SCRIPT: &str = r#"
echo "kvm $(test -c /dev/kvm && echo yes)"
echo "tun $(test -c /dev/net/tun && echo yes)"
echo "controllers $(cat /sys/fs/cgroup/cgroup.controllers)"
echo "delegated $(cat /sys/fs/cgroup/cgroup.subtree_control)"
echo "svm $(grep -c -w svm /proc/cpuinfo)"
echo "cwd $(pwd)"
echo "env $GREETING"
echo "inside $MVM_LAB"
echo "copied $(cat "$COPIED")"
echo "bridge $(ip link add br9 type bridge && ip link set br9 up && echo yes)"
echo "loopback $(ip -o addr show lo | grep -q 127.0.0.1 && echo yes)"
echo "only on stderr" >&2
cp "$COPIED" "$MVM_LAB_OUT/result"
touch /root-is-writable && echo "root writable"
(seq 1 100000; yes "mvm lab") | head -c 20971520 > /tmp/bulk
sha256sum /tmp/bulk > "$MVM_LAB_OUT/sha256"
echo bulk
cat /tmp/bulk
exit 7
"#;

fn shell(script: &str) -> Vec<OsString> {
    ["sh", "-c", script].map(OsString::from).to_vec()
}

#[test]
fn a_command_in_the_lab_behaves_as_it_would_at_home_but_with_kvm() {
    lab::available().unwrap();
    let copied = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(copied.path(), "a file of /tmp\n").unwrap();
    let out = tempfile::tempdir().unwrap();
    let options = Options {
        timeout: Duration::from_secs(180),
        copy: vec![copied.path().to_owned()],
        out: Some(out.path().to_owned()),
        env: vec![
            ("GREETING".into(), "it's 'quoted' $HOME".into()),
            ("COPIED".into(), copied.path().as_os_str().to_owned()),
        ],
        ..Options::default()
    };
    let captured = lab::run_captured(&options, &shell(SCRIPT)).unwrap();

    let stderr = String::from_utf8_lossy(&captured.stderr).into_owned();
    assert_eq!(captured.outcome.status, 7, "stderr: {stderr}");
    assert_eq!(stderr, "only on stderr\n");
    let split = captured.stdout.windows(6).position(|window| window == b"\nbulk\n").unwrap();
    let (head, bulk) = (&captured.stdout[..split], &captured.stdout[split + 6..]);
    let head = String::from_utf8(head.to_vec()).unwrap();
    let fact = |name: &str| {
        let mut lines = head.lines();
        lines
            .find_map(|line| line.strip_prefix(name))
            .map(str::trim)
            .unwrap_or_else(|| panic!("no {name}: {head}"))
    };
    for name in ["kvm", "tun", "bridge", "loopback"] {
        assert_eq!(fact(name), "yes", "{name}");
    }
    for controller in ["cpu", "cpuset", "memory", "io", "pids"] {
        assert!(fact("controllers").split(' ').any(|word| word == controller), "{controller}");
        assert!(fact("delegated").split(' ').any(|word| word == controller), "{controller}");
    }
    assert_eq!(fact("svm"), "1");
    assert_eq!(fact("cwd"), std::env::current_dir().unwrap().to_str().unwrap());
    assert_eq!(fact("env"), "it's 'quoted' $HOME");
    assert_eq!(fact("inside"), "fast");
    assert_eq!(fact("copied"), "a file of /tmp");
    assert_eq!(fact("root"), "writable");
    assert_eq!(std::fs::read(out.path().join("result")).unwrap(), b"a file of /tmp\n");
    assert!(!std::path::Path::new("/root-is-writable").exists());

    assert_eq!(bulk.len(), 20 << 20);
    let hash: String = Sha256::digest(bulk).iter().map(|byte| format!("{byte:02x}")).collect();
    let inside = std::fs::read_to_string(out.path().join("sha256")).unwrap();
    assert_eq!(inside.split_whitespace().next(), Some(hash.as_str()));
}

#[test]
fn a_command_that_does_not_end_is_one_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        timeout: Duration::from_secs(2),
        console_log: Some(dir.path().join("console")),
        ..Options::default()
    };
    let error = lab::run_captured(&options, &shell("sleep 1000")).unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    assert!(error.to_string().starts_with("timed out after 2 s; last kernel lines:"), "{error}");
    assert!(dir.path().join("console").exists());
}

#[test]
fn a_command_whose_host_dies_is_run_again_and_that_is_counted() {
    let out = tempfile::tempdir().unwrap();
    let options = Options { out: Some(out.path().to_owned()), ..Options::default() };
    let script = r#"test -e "$MVM_LAB_OUT/once" && exec echo again
        touch "$MVM_LAB_OUT/once"; echo c >/proc/sysrq-trigger"#;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let outcome = lab::run(&options, &shell(script), &mut stdout, &mut stderr).unwrap();
    assert_eq!((outcome.status, outcome.reruns), (0, 1));
    assert_eq!(stdout, b"again\n");
    let note = String::from_utf8(stderr).unwrap();
    assert!(note.starts_with("lab: rerun 1 of at most 3: the emulated host ended"), "{note}");
    assert!(note.contains("Kernel panic - not syncing: sysrq triggered crash"), "{note}");
}
