//! The mvm command: boots kernels and runs containers, each in a micro-VM of its own.

mod args;
mod boot;
mod density;
mod doctor;
mod image;
mod life;
mod run;
mod snapshot;
mod stdio;
mod table;
mod template;
mod terminal;
mod version;
mod words;

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::owner::exit_code;

use args::{Arguments, Command};

/// A check of `mvm doctor` failed.
const UNFIT: u8 = 1;

fn main() -> ExitCode {
    // Bad usage ends here with clap's message and exit code 2.
    let arguments = Arguments::parse();
    mvm_vmm::log::to_stderr(arguments.verbose);
    let result = match arguments.command {
        Command::Boot(boot) => boot::boot(*boot),
        Command::Run(run) => run::run(*run),
        Command::Life(command) => life::life(command),
        Command::Image(images) => image::image(images.command),
        Command::Snapshot(snapshots) => snapshot::snapshot(snapshots.command),
        Command::Restore(options) => snapshot::restore(&options),
        Command::Fork(options) => snapshot::fork(&options),
        Command::Template(templates) => template::template(templates.command),
        Command::Density(options) => density::density(options),
        Command::Doctor(options) => doctor::doctor(&options),
        Command::Version(options) => version::version(&options),
        Command::Completion(options) => {
            complete(options.shell);
            Ok(0)
        }
        Command::Own => run::left_behind(),
        Command::Manual(options) => manual(&options.directory),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            complain(&failure);
            ExitCode::from(exit_code(&failure))
        }
    }
}

/// Prints what makes a shell complete our commands.
fn complete(shell: clap_complete::Shell) {
    clap_complete::generate(shell, &mut Arguments::command(), "mvm", &mut std::io::stdout());
}

/// Writes a page for `mvm` and one for each command.
fn manual(directory: &std::path::Path) -> Result<u8, Failure> {
    let written = std::fs::create_dir_all(directory)
        .and_then(|()| clap_mangen::generate_to(Arguments::command(), directory));
    written.context(|| format!("cannot write the manual into {}", directory.display()))?;
    Ok(0)
}

/// The one printer of errors.
fn complain(failure: &Failure) {
    say(&format!("mvm: {}", failure.report()));
}

/// One line, or a few, to the user. A closed stderr is the user's wish.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
