//! `crash_matrix`: kills each process of ours at each change it makes to the host, and has each change fail, one run for each.
//!
//! `crash_matrix [--quick] [--faults] [--list] [--only NAME]`

use std::io::{Write, stderr, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use mvm_integration::crash::tracer::Act;
use mvm_integration::crash::{Matrix, SCENARIOS, Scenario, faults, world};
use mvm_integration::programs::programs;

/// In a quick matrix each so-many-th change is tried.
const QUICK_STEP: usize = 5;

#[derive(Debug, Parser)]
#[command(about = "Kills each process at each change it makes to the host; nothing may be left.")]
struct Arguments {
    /// A sample: some scenarios, and each fifth of their changes
    #[arg(long)]
    quick: bool,
    /// Have changes fail instead
    #[arg(long)]
    faults: bool,
    /// Name the changes of each scenario and do nothing else
    #[arg(long)]
    list: bool,
    /// One scenario
    #[arg(long)]
    only: Option<String>,
}

fn main() -> ExitCode {
    let machine = std::env::current_exe().map(|own| own.with_file_name("fake_machine"));
    let result = match (world::inside(), machine) {
        (true, _) => matrix(programs().join("bin/mvm"), &Arguments::parse()),
        (false, Ok(machine)) => match world::enter(&machine, std::env::args_os().skip(1)) {
            Ok(status) => return ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)),
            Err(error) => Err(format!("cannot have name spaces of its own: {error}")),
        },
        (false, Err(error)) => Err(error.to_string()),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(stderr(), "crash_matrix: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing was left and nothing went wrong.
fn matrix(program: PathBuf, arguments: &Arguments) -> Result<bool, String> {
    let mut matrix = Matrix::new(program)?;
    let step = if arguments.quick { QUICK_STEP } else { 1 };
    let wanted = |it: &&Scenario| match &arguments.only {
        Some(name) => it.name == name,
        None => it.quick || !arguments.quick,
    };
    for scenario in SCENARIOS.iter().filter(wanted) {
        if arguments.list {
            for (index, change) in matrix.changes(scenario)?.iter().enumerate() {
                say(&format!("{} {}: {change}", scenario.name, index + 1));
            }
            continue;
        }
        let before = matrix.totals;
        matrix.sweep(
            scenario,
            step,
            |change| if arguments.faults { faults(change) } else { Some(Act::Kill) },
        )?;
        let after = matrix.totals;
        say(&format!(
            "{}: {} runs, {} leaks, {} wrong",
            scenario.name,
            after.runs - before.runs,
            after.leaks - before.leaks,
            after.wrong - before.wrong
        ));
    }
    let totals = matrix.totals;
    let kind = if arguments.faults { "fault" } else { "crash" };
    if !arguments.list {
        say(&format!("{kind} matrix: {} runs, {} leaks, {} wrong", totals.runs, totals.leaks, totals.wrong));
    }
    Ok(totals.leaks == 0 && totals.wrong == 0)
}

fn say(line: &str) {
    let _ = writeln!(stdout(), "{line}");
}
