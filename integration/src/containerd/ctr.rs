//! `ctr`, containerd's own client.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

/// Bound of one call in seconds: nothing a suite asks for takes this long, even emulated.
const BOUND: &str = "240";

/// `ctr` for one daemon and one namespace of its.
#[derive(Clone, Debug)]
pub struct Ctr {
    program: PathBuf,
    socket: PathBuf,
    namespace: String,
}

/// How a call came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The exit status; that of the process for `run` and `task exec`.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: Vec<u8>,
    /// What it complained.
    pub stderr: String,
}

impl Output {
    /// What it printed, as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl Ctr {
    pub(super) fn new(program: &Path, socket: &Path, namespace: &str) -> Self {
        Self { program: program.into(), socket: socket.into(), namespace: namespace.into() }
    }

    /// The call of these arguments, bounded in time, without input.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.args(["-s", "KILL", BOUND]).args(self.words(args)).stdin(Stdio::null());
        command
    }

    /// The words of the call.
    #[must_use]
    pub fn words(&self, args: &[&str]) -> Vec<String> {
        let words = [
            &self.program.to_string_lossy(),
            "--address",
            &self.socket.to_string_lossy(),
            "-n",
            &self.namespace,
        ]
        .map(str::to_owned);
        words.into_iter().chain(args.iter().map(|arg| (*arg).to_owned())).collect()
    }

    /// Makes the call.
    ///
    /// # Panics
    /// It cannot be made.
    #[must_use]
    pub fn call(&self, args: &[&str]) -> Output {
        collect(self.command(args), None)
    }

    /// Makes the call with `input`, which ends where it ends.
    ///
    /// # Panics
    /// It cannot be made.
    #[must_use]
    pub fn feed(&self, args: &[&str], input: &[u8]) -> Output {
        collect(self.command(args), Some(input))
    }

    /// Makes the call on a terminal of 33 rows and 77 columns.
    ///
    /// # Panics
    /// util-linux's `script` is not there.
    #[must_use]
    pub fn on_terminal(&self, args: &[&str]) -> Output {
        let quoted: Vec<_> =
            self.words(args).iter().map(|word| format!("'{}'", word.replace('\'', "'\\''"))).collect();
        let mut command = Command::new("timeout");
        let line = format!("stty rows 33 cols 77; exec {}", quoted.join(" "));
        command.args(["-s", "KILL", BOUND, "script", "-q", "-e", "-E", "never", "-c", &line, "/dev/null"]);
        collect(command, Some(b""))
    }

    /// What a call prints; it must succeed.
    ///
    /// # Panics
    /// It fails.
    pub fn must(&self, args: &[&str]) -> String {
        let output = self.call(args);
        assert_eq!(output.code, Some(0), "ctr {args:?}: {}", output.stderr);
        output.text()
    }
}

/// Runs a command, feeding it on the way. An empty input ends with the command, as a person's does.
fn collect(mut command: Command, input: Option<&[u8]>) -> Output {
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child =
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("coreutils");
    let mut stdin = child.stdin.take();
    let output = thread::scope(|scope| {
        if let Some(input) = input.filter(|input| !input.is_empty())
            && let Some(mut stdin) = stdin.take()
        {
            // The process may end without reading it all.
            scope.spawn(move || stdin.write_all(input));
        }
        child.wait_with_output().expect("it ends")
    });
    drop(stdin);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    Output { code: output.status.code(), stdout: output.stdout, stderr }
}
