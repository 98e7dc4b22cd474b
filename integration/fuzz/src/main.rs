//! `mvm-fuzz`: fuzzes targets one after the other and says what came of it, or has one take inputs again.
//!
//! Built with the feature `libfuzzer` and instrumented, which `make fuzz` sees to, `MVM_FUZZ_TARGET` (or `fuzz TARGET`)
//! makes it a libFuzzer program for that target, with libFuzzer's own options.

mod campaign;
#[cfg(feature = "libfuzzer")]
mod engine;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use mvm_fuzz::{Target, all, named};

const USAGE: &str = "usage: mvm-fuzz list
       mvm-fuzz seeds DIRECTORY              writes all seeds, a directory for each target
       mvm-fuzz replay TARGET FILE…          has a target take inputs again
       mvm-fuzz run DIRECTORY SECONDS [TARGET…]
       mvm-fuzz fuzz TARGET [OPTION…]        libFuzzer's options";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match (std::env::var("MVM_FUZZ_TARGET"), words.as_slice()) {
        (Ok(name), options) => wanted(&name).and_then(|target| fuzz(target, options)),
        (_, ["fuzz", name, options @ ..]) => wanted(name).and_then(|target| fuzz(target, options)),
        (_, ["list"]) => list(),
        (_, ["seeds", directory]) => {
            all().iter().try_for_each(|it| write_seeds(it, Path::new(directory)).map(drop))
        }
        (_, ["replay", name, files @ ..]) => wanted(name).and_then(|target| replay(target, files)),
        (_, ["run", directory, seconds, names @ ..]) => run(directory, seconds, names),
        _ => Err(USAGE.to_owned()),
    };
    let Err(error) = done else { return ExitCode::SUCCESS };
    let _ = writeln!(std::io::stderr(), "mvm-fuzz: {error}");
    ExitCode::FAILURE
}

fn wanted(name: &str) -> Result<Target, String> {
    named(name).ok_or_else(|| format!("there is no target {name:?}; `mvm-fuzz list` has them"))
}

fn say(line: &str) -> Result<(), String> {
    writeln!(std::io::stdout(), "{line}").map_err(|error| error.to_string())
}

fn list() -> Result<(), String> {
    all().iter().try_for_each(|target| say(&format!("{}: {}", target.name, target.reaches.join(" "))))
}

/// Writes a target's seeds into its directory, which is returned.
fn write_seeds(target: &Target, directory: &Path) -> Result<PathBuf, String> {
    let directory = directory.join(target.name);
    std::fs::create_dir_all(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    for (number, seed) in (target.seeds)().iter().enumerate() {
        let path = directory.join(format!("seed-{number:03}"));
        std::fs::write(&path, seed).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(directory)
}

fn replay(target: Target, files: &[&str]) -> Result<(), String> {
    for file in files {
        let bytes = std::fs::read(file).map_err(|error| format!("{file}: {error}"))?;
        let reach = target.once(&bytes);
        let counts: Vec<String> = reach.iter().map(|(name, n)| format!("{name} {n}")).collect();
        say(&format!("{file}: {}", counts.join(", ")))?;
    }
    Ok(())
}

fn run(directory: &str, seconds: &str, names: &[&str]) -> Result<(), String> {
    let seconds: u32 = seconds.parse().map_err(|_| format!("{seconds:?} is no number of seconds"))?;
    let targets = match names {
        [] => all(),
        names => names.iter().map(|name| wanted(name)).collect::<Result<_, _>>()?,
    };
    campaign::run(&targets, Path::new(directory), seconds)
}

#[cfg(feature = "libfuzzer")]
fn fuzz(target: Target, options: &[&str]) -> Result<(), String> {
    engine::run(target, options)
}

#[cfg(not(feature = "libfuzzer"))]
fn fuzz(_: Target, _: &[&str]) -> Result<(), String> {
    Err("this build has no libFuzzer in it; `make fuzz` makes one that has".to_owned())
}
