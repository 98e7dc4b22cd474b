//! `demo`: makes a small OCI image and runs a container of it in a micro-VM, in the lab where KVM cannot.

use std::ffi::OsString;
use std::io::{Write, stderr, stdout};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use mvm_integration::lab;
use mvm_integration::programs::demo_image;

type Failure = Box<dyn std::error::Error>;

/// What the container does: enough to see whose kernel, whose file system and whose user it has.
const SCRIPT: &str = "echo \"Hello from a container in a machine of its own.\"; \
    echo \"kernel $(uname -r), $(nproc) CPU, $(awk '/MemTotal/ {print $2}' /proc/meminfo) KiB, \
user $(id -un), root $(awk '$2 == \"/\" {print $3}' /proc/mounts)\"; exit 42";

fn main() -> ExitCode {
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let _ = writeln!(stderr(), "demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<u8, Failure> {
    let prefix =
        PathBuf::from(std::env::var_os("MVM_PREFIX").ok_or("MVM_PREFIX is not set: use `make demo`")?);
    let scratch = tempfile::tempdir()?;
    let image = scratch.path().join("image");
    say("making an OCI image of busybox")?;
    demo_image(&image)?;
    let mut container: Vec<OsString> = vec![prefix.join("bin/mvm").into(), "run".into(), "--stats".into()];
    container.extend([format!("{}:busybox", image.display()).into(), "--".into()]);
    container.extend(["sh", "-c", SCRIPT].map(OsString::from));
    let code = in_a_machine(&prefix, &image, &container)?;
    say(&format!("the container exited with {code}"))?;
    if code == 42 { Ok(0) } else { Err("it should have exited with 42".into()) }
}

/// Runs the command here if KVM runs Linux, else in the lab.
fn in_a_machine(prefix: &Path, image: &Path, command: &[OsString]) -> Result<u8, Failure> {
    let verdict = lab::host_runs_linux();
    let state: OsString = "/tmp/mvm-demo-state".into();
    if verdict.runs_linux() {
        let state = tempfile::tempdir()?;
        let status = Command::new(&command[0]).args(&command[1..]).env("MVM_STATE", state.path()).status()?;
        return Ok(u8::try_from(status.code().unwrap_or(255)).unwrap_or(255));
    }
    say(&format!("{}: using the lab, an emulated host, about thirty times slower", verdict.reason()))?;
    let options = lab::Options {
        copy: vec![prefix.to_path_buf(), image.to_path_buf()],
        env: vec![("MVM_STATE".into(), state), ("MVM_PREFIX".into(), prefix.into())],
        ..Default::default()
    };
    Ok(lab::run(&options, command, &mut stdout(), &mut stderr())?.status)
}

fn say(text: &str) -> std::io::Result<()> {
    writeln!(stdout(), "demo: {text}")
}
