//! One run's private directory: the scripts that tell the emulated host its job, and QEMU's sockets.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::{Error, Image, Options};

/// Passed on without being asked for, as are names with one of the [`PREFIXES`].
const NAMES: [&str; 7] = ["PATH", "HOME", "USER", "LANG", "LC_ALL", "TERM", "NO_COLOR"];
const PREFIXES: [&str; 5] = ["MVM_", "RUST_", "CARGO_", "NEXTEST", "PROPTEST_"];

/// Removed with all it holds when dropped.
#[derive(Debug)]
pub(super) struct Workdir {
    dir: tempfile::TempDir,
    pub(super) token: String,
    pub(super) out: Option<PathBuf>,
}

impl Workdir {
    pub(super) fn create(options: &Options, argv: &[OsString], image: &Image) -> Result<Self, Error> {
        let dir = tempfile::Builder::new()
            .prefix("mvm-lab.")
            .tempdir()
            .map_err(Error::file("create", "mvm-lab"))?;
        let token = token()?;
        let out = options.out.as_deref().map(directory).transpose()?;
        let this = Self { dir, token, out };
        let job = this.job();
        fs::DirBuilder::new().mode(0o700).create(&job).map_err(Error::file("create", &job))?;
        write(&job.join("setup"), &this.setup(options, image)?)?;
        write(&job.join("job"), &this.command(options, argv)?)?;
        Ok(this)
    }

    /// The directory the emulated host reads its job from.
    pub(super) fn job(&self) -> PathBuf {
        self.dir.path().join("job")
    }

    pub(super) fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Sourced by the first stage.
    fn setup(&self, options: &Options, image: &Image) -> Result<Vec<u8>, Error> {
        let mut script = format!("LAB_TOKEN={}\nLAB_KERNEL=", self.token).into_bytes();
        script.extend(quoted(OsStr::new(&image.release)));
        script.extend_from_slice(b"\nLAB_CWD=");
        script.extend(quoted(cwd(options)?.as_os_str()));
        for path in &options.copy {
            let path = fs::canonicalize(path).map_err(Error::file("copy", path))?;
            script.extend_from_slice(b"\ncopy ");
            script.extend(quoted(path.as_os_str()));
        }
        if let Some(out) = &self.out {
            script.extend_from_slice(b"\nout ");
            script.extend(quoted(out.as_os_str()));
        }
        script.push(b'\n');
        Ok(script)
    }

    /// Run by the second stage as the job.
    fn command(&self, options: &Options, argv: &[OsString]) -> Result<Vec<u8>, Error> {
        let mode = if options.deterministic { "deterministic" } else { "fast" };
        let mut env: Vec<(OsString, OsString)> =
            std::env::vars_os().filter(|(name, _)| passes(name)).collect();
        env.push((super::INSIDE.into(), mode.into()));
        if let Some(out) = &self.out {
            env.push((super::OUT.into(), out.into()));
        }
        env.extend_from_slice(&options.env);
        let mut script = Vec::new();
        for (name, value) in env.iter().filter(|(name, _)| is_identifier(name)) {
            script.extend_from_slice(b"export ");
            script.extend_from_slice(name.as_bytes());
            script.push(b'=');
            script.extend(quoted(value));
            script.push(b'\n');
        }
        script.extend_from_slice(b"cd ");
        script.extend(quoted(cwd(options)?.as_os_str()));
        script.extend_from_slice(b" || exit 126\nexec");
        for word in argv {
            script.push(b' ');
            script.extend(quoted(word));
        }
        script.push(b'\n');
        Ok(script)
    }
}

fn cwd(options: &Options) -> Result<PathBuf, Error> {
    match &options.cwd {
        Some(path) => Ok(path.clone()),
        None => std::env::current_dir().map_err(Error::file("find", "the current directory")),
    }
}

/// 128 random bits in hex.
fn token() -> Result<String, Error> {
    let mut bytes = [0; 16];
    let path = Path::new("/dev/urandom");
    let mut file = fs::File::open(path).map_err(Error::file("open", path))?;
    file.read_exact(&mut bytes).map_err(Error::file("read", path))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn directory(path: &Path) -> Result<PathBuf, Error> {
    fs::create_dir_all(path).map_err(Error::file("create", path))?;
    fs::canonicalize(path).map_err(Error::file("open", path))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    fs::write(path, bytes).map_err(Error::file("write", path))
}

fn passes(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    NAMES.contains(&name.as_ref()) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// A name the shell can export.
fn is_identifier(name: &OsStr) -> bool {
    let bytes = name.as_bytes();
    bytes.first().is_some_and(|b| b.is_ascii_alphabetic() || *b == b'_')
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_')
}

/// One shell word, whatever bytes it has.
fn quoted(word: &OsStr) -> Vec<u8> {
    let mut out = vec![b'\''];
    for &byte in word.as_bytes() {
        if byte == b'\'' { out.extend_from_slice(b"'\\''") } else { out.push(byte) }
    }
    out.push(b'\'');
    out
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn a_word_survives_the_shell_whatever_it_holds() {
        let word = OsStr::from_bytes(b"it's $HOME `x` \\ \"q\" *\n\xff end");
        let mut script = b"printf %s ".to_vec();
        script.extend(quoted(word));
        let output =
            std::process::Command::new("sh").arg("-c").arg(OsString::from_vec(script)).output().unwrap();
        assert_eq!(output.stdout, word.as_bytes());
    }

    #[test]
    fn only_names_a_shell_can_export_are_exported() {
        assert!(is_identifier(OsStr::new("_A1")));
        for name in ["", "1A", "A-B", "A B", "BASH_FUNC_x%%"] {
            assert!(!is_identifier(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn the_environment_passed_on_is_small() {
        assert!(passes(OsStr::new("PATH")) && passes(OsStr::new("RUST_BACKTRACE")));
        assert!(!passes(OsStr::new("AWS_SECRET_ACCESS_KEY")) && !passes(OsStr::new("LD_LIBRARY_PATH")));
    }
}
