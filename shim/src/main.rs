//! `containerd-shim-mvm-v2`: containerd's runtime io.containerd.mvm.v2.
//!
//! containerd starts this program three ways: `start` leaves a daemon behind that serves a task or a pod and answers
//! with its address, `delete` removes what a daemon left, and `-info` tells what the runtime can do.

mod actions;
mod address;
mod bootstrap;
mod bundle;
mod daemon;
mod error;
mod events;
#[cfg(debug_assertions)]
mod fake;
mod flags;
mod logging;
mod reaper;
mod service;
mod stats;
mod stdio;
mod tasks;

use std::io::Write;
use std::process::ExitCode;

use flags::{Action, Flags};
use mvm_runtime::failure::Failure;

/// The runtime's name in containerd's configuration.
const RUNTIME: &str = "io.containerd.mvm.v2";

fn main() -> ExitCode {
    match run() {
        Ok(answer) => {
            let written = std::io::stdout().write_all(&answer);
            if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(failure) => {
            let _ = writeln!(std::io::stderr(), "containerd-shim-mvm-v2: {}", failure.report());
            ExitCode::FAILURE
        }
    }
}

/// Does what the command line asks; gives what goes to standard output.
fn run() -> Result<Vec<u8>, Failure> {
    let flags = Flags::parse(std::env::args().skip(1))?;
    match flags.action {
        Action::Start => bootstrap::start(&flags),
        Action::Serve => daemon::serve(&flags).map(|()| Vec::new()),
        Action::Delete => actions::delete(&flags),
        Action::Info => actions::info(),
        Action::Version => Ok(actions::version().into_bytes()),
    }
}
