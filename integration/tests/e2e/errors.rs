//! What a user reads when something is wrong: one error, why, and what to do.

use std::process::{Command, Output, Stdio};

use mvm_integration::vm::{image, initrd, scratch, state};

use crate::{Test, mvm, programs};

pub(crate) const TESTS: &[Test] = &[
    ("a_missing_command_is_127_and_one_that_cannot_run_is_126", commands),
    ("a_wrong_kernel_path_is_named", kernel),
    ("a_kernel_that_is_none_is_named", no_kernel),
    ("an_unreadable_disk_is_named", disk),
    ("a_missing_kvm_device_says_what_to_do", kvm),
    ("too_little_memory_says_how_much_it_takes", memory),
    ("an_image_that_is_none_says_what_was_tried", no_image),
];

fn report(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn boot(arguments: &[&str]) -> Output {
    mvm().arg("boot").args(arguments).stdin(Stdio::null()).output().expect("mvm is built")
}

fn commands() {
    let run = |command: &str| {
        mvm()
            .arg("run")
            .arg(image())
            .args(["--", command])
            .stdin(Stdio::null())
            .output()
            .expect("mvm is built")
    };
    let missing = run("no-such-program");
    assert_eq!(missing.status.code(), Some(127), "{}", report(&missing));
    let text = report(&missing);
    assert!(text.contains("mvm: cannot run no-such-program in the container\n  because: "), "{text}");
    assert!(text.contains("\n  help:    "), "{text}");
    let file = run("/etc/passwd");
    assert_eq!(file.status.code(), Some(126), "{}", report(&file));
    assert!(report(&file).contains("Permission denied"), "{}", report(&file));
}

fn kernel() {
    let output = boot(&["--kernel", "/no/such/vmlinux"]);
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(
        report(&output),
        "mvm: cannot open kernel image /no/such/vmlinux\n  because: No such file or directory (os error 2)\n"
    );
}

fn no_kernel() {
    let path = scratch().join("text");
    std::fs::write(&path, "this is no kernel, whatever its name says".repeat(100)).expect("a file");
    let output = boot(&["--kernel", path.to_str().expect("text")]);
    assert_eq!(output.status.code(), Some(125), "{}", report(&output));
    assert!(report(&output).contains("cannot load the kernel"), "{}", report(&output));
}

fn disk() {
    let kernel = programs().join("share/mvm/vmlinux");
    let output = boot(&["--kernel", kernel.to_str().expect("text"), "--disk", "/no/such.img"]);
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(
        report(&output),
        "mvm: cannot open disk image /no/such.img\n  because: No such file or directory (os error 2)\n"
    );
}

fn kvm() {
    // A mount name space with a /dev of its own: the rest of the tests keep theirs.
    let script = "mount -t tmpfs none /dev && exec \"$@\"";
    let kernel = programs().join("share/mvm/vmlinux");
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", script, "sh"])
        .arg(programs().join("bin/mvm"))
        .args(["boot", "--kernel"])
        .arg(kernel)
        .env("MVM_STATE", state())
        .stdin(Stdio::null())
        .output()
        .expect("util-linux");
    let text = report(&output);
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert!(
        text.starts_with("mvm: cannot open /dev/kvm\n  because: No such file or directory (os error 2)\n"),
        "{text}"
    );
    assert!(text.contains("help:    load the kvm module"), "{text}");
}

fn memory() {
    let kernel = programs().join("share/mvm/vmlinux");
    let initrd = initrd("memory", "poweroff -f");
    let arguments = [
        "--kernel",
        kernel.to_str().expect("text"),
        "--initrd",
        initrd.to_str().expect("text"),
        "--memory",
        "8M",
    ];
    let output = boot(&arguments);
    let text = report(&output);
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert!(text.contains("memory") && text.contains("help:"), "{text}");
}

fn no_image() {
    let path = scratch().join("no-image");
    std::fs::write(&path, b"neither tar nor directory").expect("a file");
    let output = mvm().arg("run").arg(&path).stdin(Stdio::null()).output().expect("mvm is built");
    let text = report(&output);
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert!(
        text.starts_with(&format!("mvm: cannot use {} as an image\n  because: ", path.display())),
        "{text}"
    );
}
