//! A process's standard streams as containerd's clients name them: fifos, files or a logging program.

mod logger;
mod pump;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use mvm_protocol::WindowSize;
use mvm_runtime::agent::StdioSpec;
use nix::libc::O_NONBLOCK;

use crate::error::{Error, Result};
use logger::Logger;
pub(crate) use pump::{Progress, Pumps};

/// Where a process's streams go, by the client's words; empty is nowhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Paths {
    /// A fifo.
    pub(crate) stdin: String,
    /// A fifo, `file://PATH` or `binary://PROGRAM?ARGUMENTS`.
    pub(crate) stdout: String,
    /// As `stdout`; nowhere if the process has a terminal.
    pub(crate) stderr: String,
    /// The process has a terminal: one stream both ways.
    pub(crate) terminal: bool,
}

/// Whose streams they are, for a logging program.
#[derive(Clone, Debug)]
pub(crate) struct Owner {
    /// containerd's name space.
    pub(crate) namespace: String,
    /// The container's id.
    pub(crate) container: String,
}

/// The host's ends of the output streams, open.
#[derive(Debug, Default)]
pub(crate) struct Outputs {
    stdout: Option<Output>,
    stderr: Option<Output>,
    logger: Option<Logger>,
}

/// Standard input: a fifo, and a writing end of our own. As long as that is open no client that goes away, and no
/// restart of containerd, ends the input; a client that means it says so, and then ours is closed.
#[derive(Debug)]
pub(crate) struct Input {
    fifo: File,
    hold: File,
}

/// Where output goes.
#[derive(Debug)]
enum Output {
    /// A fifo or a pipe.
    Pipe(File),
    /// A regular file.
    File(File),
}

/// One output, parsed.
#[derive(Debug, PartialEq, Eq)]
enum Target<'a> {
    Path(&'a Path),
    File(PathBuf),
    Program { program: PathBuf, arguments: Vec<String> },
}

impl Paths {
    /// Opens what the output goes to. Blocks while a logging program gets ready.
    pub(crate) fn open_outputs(&self, owner: &Owner) -> Result<Outputs> {
        if let Some(Target::Program { program, arguments }) = target(&self.stdout)? {
            let (logger, [stdout, stderr]) = Logger::start(&program, &arguments, owner)?;
            return Ok(Outputs {
                logger: Some(logger),
                stdout: Some(Output::Pipe(stdout)),
                stderr: (!self.terminal).then_some(Output::Pipe(stderr)),
            });
        }
        let stdout = open_output("standard output", &self.stdout)?;
        let stderr = if self.terminal { None } else { open_output("standard error", &self.stderr)? };
        Ok(Outputs { stdout, stderr, logger: None })
    }

    /// Opens standard input, which must not be before the process starts: until somebody reads, a client's first
    /// write waits, and clients rely on that to learn of the task before they are through with their input.
    pub(crate) fn open_input(&self) -> Result<Option<Input>> {
        if self.stdin.is_empty() {
            return Ok(None);
        }
        let input = Input::open(Path::new(&self.stdin));
        input.map(Some).map_err(|error| cannot_open("standard input", &self.stdin, &error))
    }

    /// What the guest is asked for.
    pub(crate) fn spec(&self, size: WindowSize) -> StdioSpec {
        if self.terminal {
            return StdioSpec::Terminal(size);
        }
        StdioSpec::Pipes {
            stdin: !self.stdin.is_empty(),
            stdout: !self.stdout.is_empty(),
            // A logging program takes both streams whatever standard error says.
            stderr: !self.stderr.is_empty() || self.stdout.starts_with("binary:"),
        }
    }
}

impl Input {
    fn open(path: &Path) -> io::Result<Self> {
        let fifo = OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open(path)?;
        if !fifo.metadata()?.file_type().is_fifo() {
            return Err(io::Error::other("it is no fifo"));
        }
        let hold = OpenOptions::new().write(true).custom_flags(O_NONBLOCK).open(path)?;
        Ok(Self { fifo, hold })
    }
}

fn open_output(stream: &str, name: &str) -> Result<Option<Output>> {
    let opened = match target(name)? {
        None => return Ok(None),
        Some(Target::Path(path)) => open_path(path),
        Some(Target::File(path)) => open_file(&path),
        Some(Target::Program { .. }) => {
            return Err(Error::invalid_argument(format!("{stream} alone cannot go to a program: {name}")));
        }
    };
    opened.map(Some).map_err(|error| cannot_open(stream, name, &error))
}

/// A fifo is opened for both directions, so that a client may come and go: while none reads, output waits.
fn open_path(path: &Path) -> io::Result<Output> {
    if !fs::metadata(path)?.file_type().is_fifo() {
        return Ok(Output::File(OpenOptions::new().append(true).open(path)?));
    }
    let fifo = OpenOptions::new().read(true).write(true).custom_flags(O_NONBLOCK).open(path)?;
    Ok(Output::Pipe(fifo))
}

fn open_file(path: &Path) -> io::Result<Output> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    Ok(Output::File(OpenOptions::new().append(true).create(true).mode(0o644).open(path)?))
}

fn cannot_open(stream: &str, name: &str, error: &io::Error) -> Error {
    let text = format!("cannot open {stream} {name}: {error}");
    if error.kind() == io::ErrorKind::NotFound {
        Error::not_found(text)
    } else {
        Error::invalid_argument(text)
    }
}

/// What an output's name means.
fn target(name: &str) -> Result<Option<Target<'_>>> {
    let invalid = || Error::invalid_argument(format!("no stream goes to {name}"));
    let absolute = |path: &str| {
        let path = PathBuf::from(decoded(path, false));
        if path.is_absolute() { Ok(path) } else { Err(invalid()) }
    };
    if name.is_empty() {
        return Ok(None);
    }
    let Some((scheme, rest)) = name.split_once("://") else {
        let path = Path::new(name);
        return if path.is_absolute() { Ok(Some(Target::Path(path))) } else { Err(invalid()) };
    };
    match scheme {
        "fifo" if rest.starts_with('/') => Ok(Some(Target::Path(Path::new(rest)))),
        "file" => Ok(Some(Target::File(absolute(rest)?))),
        "binary" => {
            let (program, query) = rest.split_once('?').unwrap_or((rest, ""));
            let arguments = query.split('&').filter(|pair| !pair.is_empty()).flat_map(argument).collect();
            Ok(Some(Target::Program { program: absolute(program)?, arguments }))
        }
        _ => Err(invalid()),
    }
}

/// `name=value` of a query gives the program two arguments, a name alone one.
fn argument(pair: &str) -> Vec<String> {
    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
    let mut arguments = vec![decoded(name, true)];
    if !value.is_empty() {
        arguments.push(decoded(value, true));
    }
    arguments
}

/// Undoes the percent encoding of a URL (RFC 3986 §2.1), and in a query the plus sign for a space.
fn decoded(text: &str, query: bool) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let code = after.get(..2).and_then(|code| std::str::from_utf8(code).ok());
        let code = code.and_then(|code| u8::from_str_radix(code, 16).ok());
        rest = match (byte, code) {
            (b'%', Some(code)) => {
                bytes.push(code);
                &after[2..]
            }
            (b'+', _) if query => {
                bytes.push(b' ');
                after
            }
            _ => {
                bytes.push(byte);
                after
            }
        };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_outputs_mean_what_containerd_means() {
        let program = Target::Program {
            program: "/bin/log er".into(),
            arguments: ["-x", "a b", "flag"].map(str::to_owned).to_vec(),
        };
        for (name, expected) in [
            ("", None),
            ("/run/fifo/a", Some(Target::Path(Path::new("/run/fifo/a")))),
            ("fifo:///run/a", Some(Target::Path(Path::new("/run/a")))),
            ("file:///var/log/a%20b", Some(Target::File("/var/log/a b".into()))),
            ("binary:///bin/log%20er?-x=a+b&flag", Some(program)),
        ] {
            assert_eq!(target(name).unwrap(), expected, "{name}");
        }
        for name in ["relative", "file://relative", "http://host/x", "binary://x?y", "fifo://x"] {
            assert!(target(name).is_err(), "{name}");
        }
    }

    #[test]
    fn broken_percent_encoding_is_text() {
        assert_eq!(decoded("%zz%4", true), "%zz%4");
        assert_eq!(decoded("%41+%", true), "A %");
        assert_eq!(decoded("a+b", false), "a+b");
    }

    #[test]
    fn the_guest_is_asked_for_what_has_a_place_to_go() {
        let size = WindowSize { rows: 3, columns: 4 };
        let paths = Paths { stdout: "/x".to_owned(), ..Paths::default() };
        assert_eq!(paths.spec(size), StdioSpec::Pipes { stdin: false, stdout: true, stderr: false });
        let paths = Paths { stdout: "binary:///x".to_owned(), ..Paths::default() };
        assert_eq!(paths.spec(size), StdioSpec::Pipes { stdin: false, stdout: true, stderr: true });
        let paths = Paths { terminal: true, ..Paths::default() };
        assert_eq!(paths.spec(size), StdioSpec::Terminal(size));
    }
}
