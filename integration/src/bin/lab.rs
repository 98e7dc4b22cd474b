//! `lab`: runs a command inside an emulated host with AMD-V and KVM.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use mvm_integration::lab::{self, Error, Options};

/// Run a command inside an emulated host with AMD-V and KVM, this host's files at their own paths.
#[derive(Debug, Parser)]
#[command(name = "lab", version)]
struct Arguments {
    /// One CPU on virtual time (one instruction is one nanosecond); output comes at the end
    #[arg(long)]
    deterministic: bool,
    /// Emulated CPUs
    #[arg(long, default_value_t = 1, value_name = "N")]
    cpus: u8,
    /// Memory of the emulated host in MiB
    #[arg(long, default_value_t = 4096, value_name = "MIB")]
    memory: u32,
    /// Wall-clock bound in seconds
    #[arg(long, default_value_t = 300, value_name = "S")]
    timeout: u64,
    /// Copy a file or directory into the emulated host's memory first (its view of this host is slow and has no /tmp)
    #[arg(long, value_name = "PATH")]
    copy: Vec<PathBuf>,
    /// Share a directory writable, at the same path; its name is in MVM_LAB_OUT
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Set an environment variable
    #[arg(long, value_name = "K=V", value_parser = variable)]
    env: Vec<(OsString, OsString)>,
    /// Keep the emulated kernel's console in a file
    #[arg(long, value_name = "FILE")]
    console_log: Option<PathBuf>,
    /// Add a parameter to the emulated kernel's command line
    #[arg(long, value_name = "PARAM")]
    kernel_arg: Vec<String>,
    /// Add an argument to QEMU's command line; the last of a kind counts
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    qemu_arg: Vec<OsString>,
    /// Say how often the run was repeated, how long boot and command took; always with --deterministic
    #[arg(long, short)]
    verbose: bool,
    /// The command
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

fn variable(text: &str) -> Result<(OsString, OsString), String> {
    match text.split_once('=') {
        Some((name, value)) => Ok((name.into(), value.into())),
        None => Err("expected K=V".to_owned()),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let options = Options {
        deterministic: arguments.deterministic,
        cpus: arguments.cpus,
        memory_mib: arguments.memory,
        timeout: Duration::from_secs(arguments.timeout),
        copy: arguments.copy,
        out: arguments.out,
        env: arguments.env,
        cwd: None,
        console_log: arguments.console_log,
        kernel_args: arguments.kernel_arg,
        qemu_args: arguments.qemu_arg,
    };
    let result = lab::run(&options, &arguments.command, &mut io::stdout(), &mut io::stderr());
    match result {
        Ok(outcome) => {
            if arguments.verbose || arguments.deterministic {
                say(&format!(
                    "reruns {}, boot {:.2} s, command {:.2} s",
                    outcome.reruns,
                    outcome.boot.as_secs_f64(),
                    outcome.command.as_secs_f64()
                ));
            }
            ExitCode::from(outcome.status)
        }
        Err(error) => {
            say(&chain(&error));
            ExitCode::from(125)
        }
    }
}

/// The error and what caused it, on one line.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

fn say(text: &str) {
    // There is nobody left to tell when standard error is gone.
    let _ = io::stderr().write_all(OsStr::new(&format!("lab: {text}\n")).as_bytes());
}
