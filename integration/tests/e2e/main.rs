//! End to end: real Linux guests under the real programs.
//!
//! Where KVM runs Linux the tests run right here; where it does not, this program runs itself once in the
//! lab and all tests share that boot. A test is skipped nowhere.

mod boot;
mod containers;
mod detached;
mod errors;
mod files;
mod hotplug;
mod limits;
mod memory;
mod network;
mod networks;
mod restored;
mod sandbox;
mod sandbox_network;
mod snapshot;
mod surroundings;
mod templates;
mod traces;
mod vsock;

use std::ffi::OsString;
use std::io::{Write, stderr, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};
use mvm_integration::lab;
use mvm_integration::programs::programs;
use mvm_integration::witness::watched;

/// Bound of the whole run in the lab.
const LAB_TIME: Duration = Duration::from_secs(40 * 60);

fn main() -> ExitCode {
    if lab::inside() || lab::host_runs_linux().runs_linux() || std::env::args().any(|arg| arg == "--list") {
        return run();
    }
    match in_the_lab() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            say(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

fn run() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Emulated machines side by side only slow each other down.
    arguments.test_threads.get_or_insert(2);
    let trials = [
        boot::TESTS,
        containers::TESTS,
        detached::TESTS,
        errors::TESTS,
        files::TESTS,
        limits::TESTS,
        hotplug::TESTS,
        memory::TESTS,
        network::TESTS,
        networks::TESTS,
        restored::TESTS,
        sandbox::TESTS,
        sandbox_network::TESTS,
        snapshot::TESTS,
        surroundings::TESTS,
        templates::TESTS,
        traces::TESTS,
        vsock::TESTS,
    ];
    let trials = trials.concat().into_iter().map(|(name, test)| {
        Trial::test(name, move || {
            // The panic has told what is wrong.
            watched(name, test).map_err(|_| "it panicked".into())
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// Runs this very program in the lab, with the programs under test copied to its memory.
fn in_the_lab() -> Result<u8, Box<dyn std::error::Error>> {
    let myself = std::env::current_exe()?;
    let mut copy = vec![myself.clone(), programs(), env!("CARGO_BIN_EXE_guest_tool").into()];
    copy.extend(extra_files().into_iter().map(|(_, path)| path));
    let mut env: Vec<(OsString, OsString)> =
        vec![("MVM_PREFIX".into(), programs().into()), ("RUST_BACKTRACE".into(), "0".into())];
    env.extend(extra_files().into_iter().map(|(name, path)| (name.into(), path.into())));
    let options = lab::Options { timeout: LAB_TIME, memory_mib: 6144, copy, env, ..Default::default() };
    let arguments = std::iter::once(myself.into_os_string()).chain(std::env::args_os().skip(1));
    say(&format!("{}: running in the lab", lab::host_runs_linux().reason()));
    let argv: Vec<_> = arguments.collect();
    Ok(lab::run(&options, &argv, &mut stdout(), &mut stderr())?.status)
}

fn say(text: &str) {
    let _ = writeln!(stderr(), "e2e: {text}");
}

/// Files some tests need besides, by the variable that names them.
fn extra_files() -> Vec<(&'static str, PathBuf)> {
    ["MVM_TEST_DEBIAN_KERNEL"]
        .into_iter()
        .filter_map(|name| Some((name, PathBuf::from(std::env::var_os(name)?))))
        .collect()
}

/// The `mvm` under test.
pub(crate) fn mvm() -> std::process::Command {
    let mut command = std::process::Command::new(programs().join("bin/mvm"));
    command.env("MVM_STATE", mvm_integration::vm::state());
    command
}

/// A test and its name.
pub(crate) type Test = (&'static str, fn());
