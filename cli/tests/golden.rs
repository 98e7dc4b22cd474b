//! What the command line says, word for word. `MVM_BLESS=1 cargo test -p mvm-cli` rewrites the texts.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn mvm(arguments: &[&str]) -> Output {
    // The width of help depends on the terminal, if there is one.
    Command::new(env!("CARGO_BIN_EXE_mvm"))
        .args(arguments)
        .env("COLUMNS", "100")
        .env("MVM_STATE", "/no/such/state")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Compares what `mvm arguments` prints and returns with the file `golden/NAME.txt`.
fn golden(name: &str, arguments: &[&str]) {
    let output = mvm(arguments);
    let text = format!(
        "$ mvm {}\n{}{}[{}]\n",
        arguments.join(" "),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
        output.status.code().unwrap()
    );
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.txt"));
    if std::env::var_os("MVM_BLESS").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let wanted = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, wanted, "{} differs: if this is wanted, MVM_BLESS=1 rewrites it", path.display());
}

#[test]
fn help_is_as_written() {
    golden("help", &["--help"]);
    golden("help-run", &["run", "--help"]);
    golden("help-boot", &["boot", "--help"]);
    golden("help-density", &["density", "--help"]);
    golden("help-doctor", &["doctor", "--help"]);
    golden("help-image", &["image", "--help"]);
    golden("help-image-pull", &["image", "pull", "--help"]);
    golden("help-image-prune", &["image", "prune", "--help"]);
    golden("help-fork", &["fork", "--help"]);
    golden("help-restore", &["restore", "--help"]);
    golden("help-snapshot", &["snapshot", "--help"]);
    golden("help-snapshot-create", &["snapshot", "create", "--help"]);
    golden("help-snapshot-rm", &["snapshot", "rm", "--help"]);
    golden("help-update", &["update", "--help"]);
    golden("help-template", &["template", "--help"]);
    golden("help-template-create", &["template", "create", "--help"]);
    golden("help-template-prune", &["template", "prune", "--help"]);
}

#[test]
fn bad_usage_exits_with_2_and_says_what_would_do() {
    golden("no-command", &[]);
    golden("unknown-command", &["fly"]);
    golden("no-kernel", &["boot"]);
    golden("too-many-cpus", &["boot", "--kernel", "k", "--cpus", "33"]);
    golden("bad-memory", &["boot", "--kernel", "k", "--memory", "lots"]);
    golden("bad-disk", &["boot", "--kernel", "k", "--disk", "a.img,rw"]);
    golden("bad-net", &["boot", "--kernel", "k", "--net", "wifi"]);
    golden("bad-net-address", &["boot", "--kernel", "k", "--net", "tap=t0,ip=10.0.0.2/24"]);
    golden("bad-template", &["run", "--template", "sometimes", "image"]);
    golden("bad-snapshot-name", &["snapshot", "create", "web", "--name", "../x"]);
    golden("bad-snapshot-base", &["snapshot", "create", "web", "--base", "../x"]);
    golden("bad-limit", &["run", "--limit", "disk=1M", "image"]);
    golden("bad-name", &["run", "--name", "../x", "image"]);
}

/// No golden text: a new device must not have to be named here.
#[test]
fn an_unknown_device_is_refused_with_the_names_of_those_there_are() {
    let output = mvm(&["boot", "--kernel", "k", "--device", "toaster"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{text}");
    for name in mvm_devices::virtio::NAMES {
        assert!(text.contains(name), "{name} is not offered: {text}");
    }
}

#[test]
fn failures_exit_with_125_and_name_the_operand() {
    golden("no-image", &["run", "/no/such/image"]);
    golden("no-trace", &["run", "--trace-file", "/no/such/directory/t.json", "/no/such/image"]);
    golden("no-snapshot", &["restore", "before"]);
    golden("no-template", &["template", "inspect", "0123abc"]);
    golden("terminal-without-one", &["run", "-t", "/no/such/image"]);
}

#[test]
fn the_version_is_said_to_people_and_programs() {
    let version = env!("CARGO_PKG_VERSION");
    let output = mvm(&["version", "--format", "json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), report["version"].as_str()), (Some(0), Some(version)));
    assert!(report["agent_protocol"].as_str().unwrap().contains('.'), "{report}");
    let text = String::from_utf8(mvm(&["version"]).stdout).unwrap();
    assert!(text.starts_with(&format!("mvm {version}\n")), "{text}");
}

#[test]
fn the_doctors_report_is_a_list_of_rows_in_json() {
    let output = mvm(&["doctor", "--format", "json"]);
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    let failed = rows.iter().any(|row| row["status"] == "fail");
    assert_eq!(output.status.code(), Some(i32::from(failed)));
    for check in ["kvm", "guest", "rights", "tun", "cgroups", "open files", "memory"] {
        let row = rows.iter().find(|row| row["check"] == check).unwrap_or_else(|| panic!("no row {check}"));
        assert!(["ok", "warn", "fail"].contains(&row["status"].as_str().unwrap()), "{row}");
        assert_eq!(row["status"] == "ok", row["remedy"] == "", "{row}");
    }
}
