//! What a container may and may not.

use std::fs;

use mvm_integration::containerd::{AS_USER, Runtime};

use crate::context::{Context, Test};

pub(crate) const TESTS: &[Test] = &[
    ("a_read_only_root_refuses_writes", read_only),
    ("the_images_user_and_directory_hold", user),
    ("capabilities_are_added_and_dropped", capabilities),
    ("a_seccomp_profile_is_in_force", seccomp),
    ("variables_and_directory_are_set", environment),
    ("a_small_file_is_mounted_read_only", file_mount),
    ("a_writable_directory_is_mounted_or_refused_clearly", directory_mount),
    ("paths_of_the_kernel_are_hidden", masked),
    ("a_unix_socket_connects_two_processes", unix_socket),
];

fn read_only(context: &Context) {
    let script = "touch /new 2>&1; mount | head -n 1";
    let text = context.sh(&["--read-only"], script);
    assert!(text.contains("Read-only file system"), "{text}");
}

fn user(context: &Context) {
    let id = context.id();
    let words = ["run", "--rm", "--runtime", context.runtime.id(), AS_USER, &id, "sh", "-c"];
    let text = context.ctr.must(&[&words[..], &["id -u; id -G; pwd; touch /root/x 2>&1 || true"]].concat());
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], "1000", "{text}");
    assert!(lines[1].split(' ').any(|group| group == "1000"), "{text}");
    assert_eq!(lines[2], "/home/app");
    assert!(text.contains("Permission denied"), "{text}");
}

/// Bits of capabilities(7).
const CAP_NET_RAW: u32 = 13;
const CAP_SYS_TIME: u32 = 25;

fn capabilities(context: &Context) {
    let effective = |flags: &[&str]| {
        let text = context.sh(flags, "awk '$1 == \"CapEff:\" {print $2}' /proc/self/status");
        u64::from_str_radix(text.trim(), 16).expect("a mask")
    };
    let has = |mask: u64, capability: u32| mask >> capability & 1 == 1;
    let plain = effective(&[]);
    assert!(has(plain, CAP_NET_RAW) && !has(plain, CAP_SYS_TIME), "{plain:x}");
    let changed = effective(&["--cap-add", "CAP_SYS_TIME", "--cap-drop", "CAP_NET_RAW"]);
    assert!(!has(changed, CAP_NET_RAW) && has(changed, CAP_SYS_TIME), "{changed:x}");
}

fn seccomp(context: &Context) {
    let script = "awk '$1 == \"Seccomp:\" {print $2}' /proc/self/status; unshare -U true 2>&1 || true";
    let with = context.sh(&["--seccomp"], script);
    assert!(with.starts_with("2\n"), "{with}");
    assert!(with.contains("Operation not permitted"), "{with}");
    let without = context.sh(&[], script);
    assert!(without.starts_with("0\n"), "{without}");
}

fn environment(context: &Context) {
    let flags = ["--env", "GREETING=it's $HOME", "--cwd", "/work"];
    assert_eq!(context.sh(&flags, "echo \"$GREETING\"; pwd"), "it's $HOME\n/work\n");
}

fn file_mount(context: &Context) {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("note");
    fs::write(&file, "from the host\n").expect("a file");
    let mount = format!("type=bind,src={},dst=/etc/note,options=rbind:ro", file.display());
    let text = context.sh(&["--mount", &mount], "cat /etc/note; echo x 2>&1 > /etc/note || echo refused");
    assert!(text.starts_with("from the host\n") && text.ends_with("refused\n"), "{text}");
    assert_eq!(fs::read_to_string(file).expect("text"), "from the host\n");
}

fn directory_mount(context: &Context) {
    let dir = tempfile::tempdir().expect("a directory");
    let mount = format!("type=bind,src={},dst=/shared,options=rbind:rw", dir.path().display());
    let output = context.ctr_run(&["--mount", &mount], &["sh", "-c", "echo yes > /shared/file"]);
    match context.runtime {
        Runtime::Runc => {
            assert_eq!(output.code, Some(0), "{}", output.stderr);
            assert_eq!(fs::read_to_string(dir.path().join("file")).expect("text"), "yes\n");
        }
        // It must be told apart from any other failure: by place and by what to do.
        Runtime::Mvm => {
            assert_ne!(output.code, Some(0));
            assert!(output.stderr.contains("/shared"), "{}", output.stderr);
            let why = "directory of the host that the container may write to";
            assert!(output.stderr.contains(why), "{}", output.stderr);
        }
    }
}

fn masked(context: &Context) {
    let script = "cat /proc/timer_list | wc -c; ls /sys/firmware | wc -l; echo 1 2>&1 > /proc/sys/kernel/panic || echo refused";
    let text = context.sh(&[], script);
    assert!(text.starts_with("0\n0\n") && text.ends_with("refused\n"), "{text}");
}

fn unix_socket(context: &Context) {
    let task = context.start(&[], "syslogd -n -O /tmp/log & exec sleep 1000");
    task.sh("while ! test -S /dev/log; do sleep 0.1; done; logger hello through a socket");
    let text = task.sh("while ! grep socket /tmp/log; do sleep 0.1; done");
    assert!(text.contains("hello through a socket"), "{text}");
    task.end();
}
