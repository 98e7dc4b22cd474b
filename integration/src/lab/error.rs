//! What can go wrong before and around the command.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

/// Why the lab could not run a command to its end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program is not installed.
    #[error("{program} not found: install the package {package}")]
    Missing {
        /// The program looked for in PATH.
        program: &'static str,
        /// Its Debian package.
        package: &'static str,
    },
    /// No kernel package could be had.
    #[error(
        "no kernel for the emulated host: {reason}; run `apt-get update`, or set MVM_LAB_KERNEL to a linux-image .deb"
    )]
    NoKernel {
        /// apt's last word.
        reason: String,
    },
    /// No emulator could be had.
    #[error(
        "no QEMU {oldest} or newer, which the emulated host needs: {reason}; set MVM_LAB_QEMU to one to use that"
    )]
    NoEmulator {
        /// Oldest version that will do.
        oldest: u32,
        /// What kept a newer one from being downloaded.
        reason: String,
    },
    /// A program needed to make the image failed.
    #[error("{program} {operand}: {status}: {stderr}")]
    Program {
        /// The program.
        program: &'static str,
        /// What it worked on.
        operand: String,
        /// How it ended.
        status: ExitStatus,
        /// The last line it said.
        stderr: String,
    },
    /// An operation on a file failed.
    #[error("{operation} {}", .path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel package holds something the lab cannot take apart.
    #[error("kernel image {}: {reason}", .path.display())]
    KernelFormat {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A system call on the lab's own channels failed.
    #[error("{0}")]
    Channel(&'static str, #[source] io::Error),
    /// The caller's writer refused the command's output.
    #[error("write the command's output")]
    Sink(#[source] io::Error),
    /// The bound on wall-clock time was reached.
    #[error("timed out after {} s; last kernel lines:{}", .after.as_secs(), lines(.console))]
    TimedOut {
        /// The bound.
        after: Duration,
        /// The end of the kernel's console.
        console: Vec<String>,
    },
    /// The emulated host is stuck.
    #[error("the emulated host hung after {} s; last kernel lines:{}", .after.as_secs(), lines(.console))]
    Hung {
        /// Time since the start of QEMU.
        after: Duration,
        /// The end of the kernel's console.
        console: Vec<String>,
    },
    /// QEMU ended before the command did.
    #[error("the emulated host ended before the command; qemu said: {said}; last kernel lines:{}", lines(.console))]
    Died {
        /// QEMU's standard error.
        said: String,
        /// The end of the kernel's console.
        console: Vec<String>,
    },
}

impl Error {
    /// The emulated host failed, not the command and not this machine. A QEMU that ends before its kernel speaks was
    /// given something it does not take.
    pub(super) fn is_the_hosts(&self) -> bool {
        match self {
            Self::Hung { .. } => true,
            Self::Died { console, .. } => !console.is_empty(),
            _ => false,
        }
    }

    /// For `map_err` of an operation on a file.
    pub(super) fn file(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { operation, path, source }
    }
}

fn lines(console: &[String]) -> String {
    if console.is_empty() {
        return " (none)".to_owned();
    }
    console.iter().map(|line| format!("\n  {line}")).collect()
}
