//! containerd end to end: the same suites with runc, which judges them, and with mvm, on every generation at hand.
//!
//! Each generation is one run of this program in the lab (or right here, where KVM runs Linux), in name spaces of
//! its own. After every test the host is compared with what it was: what a container leaves behind fails the test. On the
//! newest generation machines go on from templates, on the others they boot.

mod checkpoints;
mod confinement;
mod context;
mod faults;
mod flat;
mod lifecycle;
mod lines;
mod network;
mod pods;
mod stdio;

use std::ffi::OsString;
use std::io::{self, Write, stderr, stdout};
use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::thread::available_parallelism;
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};
use mvm_integration::containerd::{Daemon, Installation, Runtime, surroundings};
use mvm_integration::lab;
use mvm_integration::programs::programs;
use mvm_runtime::template::{Choice, VARIABLE};

use context::{Context, Test};
use lines::Lines;

/// What the script left.
const FETCHED: &str = "MVM_TEST_CONTAINERD";
/// Generations to run, separated by spaces; all that were fetched unless given.
const GENERATIONS: &str = "MVM_TEST_GENERATIONS";
/// Runtimes to run, separated by spaces; both unless given.
const RUNTIMES: &str = "MVM_TEST_RUNTIMES";
/// Set: right here, whatever KVM there is; containers of runc need none.
const HERE: &str = "MVM_TEST_HERE";
/// Set: every suite on every generation.
const WHOLE: &str = "MVM_TEST_WHOLE";
/// Inside: the one generation of this run.
const GENERATION: &str = "MVM_TEST_GENERATION";
/// Bound of one generation's run in the lab.
const LAB_TIME: Duration = Duration::from_secs(40 * 60);

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if arguments.list || arguments.ignored {
        return ExitCode::from(u8::from(libtest_mimic::run(&arguments, trials(None)).has_failed()));
    }
    let result = match variable(GENERATION) {
        Some(generation) => here(&generation, arguments),
        None => everywhere(),
    };
    result.unwrap_or_else(|error| {
        say(&error.to_string());
        ExitCode::FAILURE
    })
}

/// One run for each generation, and what came of them.
fn everywhere() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let all = installations()?;
    let wanted = variable(GENERATIONS);
    let named: Vec<_> = wanted.as_deref().map(|list| list.split(' ').collect()).unwrap_or_default();
    let there = |name: &str| all.iter().any(|installation| installation.generation == name);
    if let Some(missing) = named.iter().find(|name| !there(name)) {
        return Err(format!("containerd {missing} is wanted and was not fetched").into());
    }
    let wanted = |generation: &str| named.is_empty() || named.contains(&generation);
    let newest = all.last().map(|installation| installation.generation.as_str()).unwrap_or_default();
    // Newest first: its run is the longest.
    let wanted: Vec<_> = all.iter().rev().filter(|installation| wanted(&installation.generation)).collect();
    // An emulated host has one CPU. Right here, they would be in each other's way.
    let at_once = if here_is_enough() { 1 } else { available_parallelism().map_or(1, NonZero::get) };
    let mut passed = !wanted.is_empty();
    for some in wanted.chunks(at_once) {
        let ends: Vec<_> = std::thread::scope(|scope| {
            let run = |installation| scope.spawn(move || generation(installation, newest));
            let runs: Vec<_> = some.iter().copied().map(run).collect();
            runs.into_iter().map(|run| run.join().expect("a run's thread does not panic")).collect()
        });
        for (installation, status) in some.iter().zip(ends) {
            let status = status?;
            passed &= status == 0;
            let end = if status == 0 { "passed" } else { "FAILED" };
            say(&format!("containerd {}: {end}", installation.version()));
        }
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The run of one generation.
fn generation(installation: &Installation, newest: &str) -> io::Result<u8> {
    let is_newest = installation.generation == newest;
    let whole = variable(WHOLE).is_some() || is_newest;
    say(&format!("containerd {}", installation.version()));
    if !whole {
        say(&format!("{} run on containerd {newest} only: {WHOLE}=1 has them here too", names(INDEPENDENT)));
    }
    // Nothing is left to chance: one that is made beside what is tested is used by some tests only.
    let templates = if is_newest { Choice::Always } else { Choice::Never };
    child(installation, whole, templates)
}

/// Whether the runs need no lab.
fn here_is_enough() -> bool {
    variable(HERE).is_some() || lab::host_runs_linux().runs_linux()
}

/// Runs this very program for one generation, in the lab unless Linux guests run here.
fn child(installation: &Installation, whole: bool, templates: Choice) -> io::Result<u8> {
    let myself = std::env::current_exe()?;
    let env: Vec<(OsString, OsString)> = vec![
        (GENERATION.into(), installation.generation.clone().into()),
        (WHOLE.into(), if whole { "1" } else { "" }.into()),
        (VARIABLE.into(), templates.to_string().into()),
        ("MVM_PREFIX".into(), programs().into()),
        // A failure's place and words say more than the way there, and a log is kept only so far.
        ("RUST_BACKTRACE".into(), "0".into()),
    ];
    let argv: Vec<_> =
        std::iter::once(myself.clone().into_os_string()).chain(std::env::args_os().skip(1)).collect();
    if here_is_enough() {
        // Processes of their own as well, with a first one that reaps; all end with it.
        let mut command = std::process::Command::new("unshare");
        command.args([
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-c",
            "\"$@\" & wait $!",
            "sh",
        ]);
        let status = command.args(argv).envs(env).status()?;
        return Ok(u8::try_from(status.code().unwrap_or(255)).unwrap_or(255));
    }
    let copy = [&installation.programs, &installation.runc, &installation.plugins].map(PathBuf::from);
    let copy = copy.into_iter().chain([myself, programs()]).collect();
    let options = lab::Options { timeout: LAB_TIME, memory_mib: 8192, copy, env, ..Default::default() };
    let name = format!("{}: ", installation.generation);
    let mut out = Lines::new(&name, stdout());
    let mut err = Lines::new(&name, stderr());
    Ok(lab::run(&options, &argv, &mut out, &mut err).map_err(io::Error::other)?.status)
}

/// Runs the suites on one generation, right here.
fn here(generation: &str, mut arguments: Arguments) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let all = installations()?;
    let installation =
        all.iter().find(|one| one.generation == generation).ok_or("no such generation was fetched")?;
    surroundings::enter()?;
    let scratch = tempfile::Builder::new().prefix("mvm-containerd.").tempdir()?;
    let daemon = Daemon::start(installation, scratch.path(), &[programs().join("bin")]);
    surroundings::default_network(installation, &daemon.dir)?;
    static DAEMON: OnceLock<Daemon> = OnceLock::new();
    let daemon = DAEMON.get_or_init(|| daemon);
    // A leak belongs to one test, and emulated machines side by side only slow each other down.
    arguments.test_threads = Some(1);
    let conclusion = libtest_mimic::run(&arguments, trials(Some(daemon)));
    if conclusion.has_failed() {
        let log = daemon.log();
        let start = log.len().saturating_sub(8000);
        say(&format!("the end of containerd's log:\n{}", log.get(start..).unwrap_or(&log)));
    }
    daemon.stop();
    Ok(conclusion.exit_code())
}

/// Suites and their names: those that differ by how a generation of containerd speaks to a shim …
const DEPENDENT: &[(&str, &[Test])] = &[
    ("stdio", stdio::TESTS),
    ("lifecycle", lifecycle::TESTS),
    ("pods", pods::TESTS),
    ("faults", faults::TESTS),
];
/// … and those about what a specification asks of a runtime, which is the same from all of them.
const INDEPENDENT: &[(&str, &[Test])] =
    &[("confinement", confinement::TESTS), ("network", network::TESTS), ("rows", flat::TESTS)];

/// Those for our runtime alone.
const OURS: &[(&str, &[Test])] = &[("faults", faults::OURS), ("checkpoints", checkpoints::OURS)];

fn names(suites: &[(&str, &[Test])]) -> String {
    suites.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

fn trials(daemon: Option<&'static Daemon>) -> Vec<Trial> {
    let wanted = variable(RUNTIMES);
    let wanted = |runtime: &Runtime| {
        wanted.as_ref().is_none_or(|list| list.split(' ').any(|name| name == runtime.name()))
    };
    let mut suites = DEPENDENT.to_vec();
    if daemon.is_none() || variable(WHOLE).is_some() {
        suites.extend(INDEPENDENT);
    }
    let mut trials = Vec::new();
    for runtime in Runtime::ALL.into_iter().filter(wanted) {
        let ours: &[_] = if runtime == Runtime::Mvm { OURS } else { &[] };
        for &(suite, tests) in suites.iter().chain(ours) {
            trials.extend(tests.iter().map(|&(name, test)| {
                let name = format!("{}::{suite}::{name}", runtime.name());
                Trial::test(name.clone(), move || {
                    Context::new(daemon.ok_or("only listed")?, runtime).run(&name, test)
                })
            }));
        }
    }
    trials
}

fn installations() -> std::io::Result<Vec<Installation>> {
    let dir = variable(FETCHED)
        .unwrap_or_else(|| panic!("{FETCHED} names what was fetched: use `make containerd`"));
    Installation::all(dir.as_ref())
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn say(text: &str) {
    let _ = writeln!(stderr(), "containerd: {text}");
}
