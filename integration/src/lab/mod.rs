//! The lab: QEMU (TCG) emulates a host with AMD-V, where unmodified Linux guests run on real KVM semantics whatever
//! machine this is. [`run`] executes one command inside; the outer host's files are there at their own paths.

mod emulator;
mod error;
mod host;
mod initramfs;
mod kernel;
mod modules;
mod pulse;
mod qemu;
mod session;
mod stream;
mod workdir;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use emulator::Emulator;
pub use error::Error;
pub use host::{Verdict, host_runs_linux};
pub use initramfs::Image;

/// Set inside the lab: `fast` or `deterministic`.
pub const INSIDE: &str = "MVM_LAB";
/// Set inside the lab when [`Options::out`] is given: the shared directory's path.
pub const OUT: &str = "MVM_LAB_OUT";
/// A run whose emulated host hung or died is repeated this often before the lab gives up.
pub const MAX_RERUNS: u32 = 3;

/// How a command is run in the lab.
#[derive(Debug, Clone)]
pub struct Options {
    /// One emulated CPU on virtual time: one instruction is one nanosecond, repeatable under any load.
    pub deterministic: bool,
    /// Emulated CPUs; deterministic runs always have one. With more than one, guests now and then die of the emulation.
    pub cpus: u8,
    /// Memory of the emulated host in MiB, taken from this host as it is touched.
    pub memory_mib: u32,
    /// Wall-clock bound of one try, from the start of QEMU.
    pub timeout: Duration,
    /// Files and directories copied into the emulated host's memory before the command starts.
    pub copy: Vec<PathBuf>,
    /// A directory of this host shared writable at the same path.
    pub out: Option<PathBuf>,
    /// Environment on top of the little that is passed on by itself.
    pub env: Vec<(OsString, OsString)>,
    /// The command's directory; by default the caller's.
    pub cwd: Option<PathBuf>,
    /// Where the emulated kernel's console is kept.
    pub console_log: Option<PathBuf>,
    /// Further kernel parameters.
    pub kernel_args: Vec<String>,
    /// Further QEMU arguments; the last of a kind counts.
    pub qemu_args: Vec<OsString>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            deterministic: false,
            cpus: 1,
            memory_mib: 4096,
            timeout: Duration::from_secs(300),
            copy: Vec::new(),
            out: None,
            env: Vec::new(),
            cwd: None,
            console_log: None,
            kernel_args: Vec::new(),
            qemu_args: Vec::new(),
        }
    }
}

/// How a command ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The command's exit status; 128+n after signal n.
    pub status: u8,
    /// Tries whose emulated host hung or died, and that were repeated.
    pub reruns: u32,
    /// From the start of QEMU to the start of the command, in the try that counted.
    pub boot: Duration,
    /// From the start of the command to its end, in the try that counted.
    pub command: Duration,
}

/// What [`run_captured`] hands back.
#[derive(Debug, Clone)]
pub struct Captured {
    /// How the command ended.
    pub outcome: Outcome,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
}

/// Whether this process runs inside the lab.
#[must_use]
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Whether the programs the lab needs are there; the error names what to install.
///
/// # Errors
///
/// [`Error::Missing`] with the program and its Debian package.
pub fn available() -> Result<(), Error> {
    emulator::installed()?;
    kernel::find_programs()
}

/// Runs `argv` in the lab, its standard output and error streamed to `stdout` and `stderr`.
///
/// When the emulated host hangs or dies the command is run again, at most [`MAX_RERUNS`] times, and `stderr` is told so;
/// what it says or how it ends never leads to another try. A deterministic run's output is held back until a try has
/// finished; otherwise that of every try is passed on.
///
/// # Errors
///
/// Any [`Error`]: something is missing, the image could not be made, the run timed out or the emulated host died
/// again and again. A command that fails is no error, see [`Outcome::status`].
pub fn run(
    options: &Options,
    argv: &[OsString],
    stdout: &mut dyn Write,
    stderr: &mut dyn Write,
) -> Result<Outcome, Error> {
    if options.deterministic {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let result = run_held(options, argv, (&mut out, &mut err), stderr);
        // What a failed try had said is of use too.
        stdout.write_all(&out).map_err(Error::Sink)?;
        stderr.write_all(&err).map_err(Error::Sink)?;
        return result;
    }
    let image = Image::prepare()?;
    let mut reruns = 0;
    loop {
        let sinks = &mut session::Sinks { stdout: &mut *stdout, stderr: &mut *stderr };
        let result = try_once(options, argv, &image, sinks);
        if let Some(outcome) = settle(result, &mut reruns, stderr)? {
            return Ok(outcome);
        }
    }
}

/// [`run`] with the output of the last try kept in memory; reruns are told on this process's standard error.
///
/// # Errors
///
/// As [`run`].
pub fn run_captured(options: &Options, argv: &[OsString]) -> Result<Captured, Error> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let outcome = run_held(options, argv, (&mut stdout, &mut stderr), &mut std::io::stderr())?;
    Ok(Captured { outcome, stdout, stderr })
}

/// Tries until the emulated host lasts; the two buffers hold the last try's output.
fn run_held(
    options: &Options,
    argv: &[OsString],
    (stdout, stderr): (&mut Vec<u8>, &mut Vec<u8>),
    notes: &mut dyn Write,
) -> Result<Outcome, Error> {
    let image = Image::prepare()?;
    let mut reruns = 0;
    loop {
        stdout.clear();
        stderr.clear();
        let sinks = &mut session::Sinks { stdout: &mut *stdout, stderr: &mut *stderr };
        let result = try_once(options, argv, &image, sinks);
        if let Some(outcome) = settle(result, &mut reruns, notes)? {
            return Ok(outcome);
        }
    }
}

/// What a try comes to; nothing when there should be another, which is counted and told.
fn settle(
    result: Result<Outcome, Error>,
    reruns: &mut u32,
    notes: &mut dyn Write,
) -> Result<Option<Outcome>, Error> {
    match result {
        Err(error) if error.is_the_hosts() && *reruns < MAX_RERUNS => {
            *reruns += 1;
            writeln!(notes, "lab: rerun {reruns} of at most {MAX_RERUNS}: {error}").map_err(Error::Sink)?;
            Ok(None)
        }
        result => result.map(|outcome| Some(Outcome { reruns: *reruns, ..outcome })),
    }
}

fn try_once(
    options: &Options,
    argv: &[OsString],
    image: &Image,
    sinks: &mut session::Sinks<'_>,
) -> Result<Outcome, Error> {
    let dir = workdir::Workdir::create(options, argv, image)?;
    let started = Instant::now();
    let mut session = session::Session::start(options, image, &dir)?;
    let outcome = session.drive(started + options.timeout, sinks);
    if let Some(path) = &options.console_log {
        session.console().save(path)?;
    }
    outcome
}
