//! The mvm command: boots kernels and runs containers, each in a micro-VM of its own.

mod args;
mod boot;
mod doctor;
mod run;
mod terminal;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use mvm_runtime::failure::Failure;

use args::{Arguments, Command};

/// `mvm` itself failed, as with docker: nothing can be said of the container.
const FAILED: u8 = 125;
/// A check of `mvm doctor` failed.
const UNFIT: u8 = 1;

fn main() -> ExitCode {
    // Bad usage ends here with clap's message and exit code 2.
    let arguments = Arguments::parse();
    mvm_vmm::log::to_stderr(arguments.verbose);
    let result = match arguments.command {
        Command::Boot(boot) => boot::boot(*boot),
        Command::Run(run) => run::run(*run),
        Command::Doctor(options) => doctor::doctor(&options),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            complain(&failure);
            ExitCode::from(run::exit_code(&failure).unwrap_or(FAILED))
        }
    }
}

/// The one printer of errors.
fn complain(failure: &Failure) {
    say(&format!("mvm: {}", failure.report()));
}

/// One line, or a few, to the user. A closed stderr is the user's wish.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
