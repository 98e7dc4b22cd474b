//! A network name space: found by path or made, held by descriptor, entered by threads of our own.

use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::fstat;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::failure::{Context, Failure};

/// The name space of the thread that asks.
const OWN: &str = "/proc/thread-self/ns/net";
/// The name space of the machine's first process.
const FIRST: &str = "/proc/1/ns/net";

/// A network name space. It lives at least as long as this value; copies are of the same name space.
#[derive(Clone)]
pub struct Netns {
    file: Arc<File>,
    name: Arc<str>,
}

impl Netns {
    /// Opens the name space at `path`: `/var/run/netns/NAME`, `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// The path cannot be opened or is no network name space.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let file =
            File::open(path).context(|| format!("cannot open the network name space {}", path.display()))?;
        // A name that lost its mount is an empty file: entering it would fail later, and less clearly.
        let kind = nix::sys::statfs::fstatfs(&file)
            .context(|| format!("cannot look at {}", path.display()))?
            .filesystem_type();
        if kind != nix::sys::statfs::NSFS_MAGIC {
            return Err(Failure::new(format!("{} is not a network name space", path.display())));
        }
        Ok(Self { file: Arc::new(file), name: path.display().to_string().into() })
    }

    /// The name space of the calling thread.
    ///
    /// # Errors
    /// `/proc` is not there.
    pub fn current() -> Result<Self, Failure> {
        Self::open(Path::new(OWN))
    }

    /// Makes a name space with nothing in it but a loopback that is down. It goes away with its last user.
    ///
    /// # Errors
    /// No rights.
    pub fn fresh() -> Result<Self, Failure> {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET)
                .context(|| "cannot make a network name space".to_owned())
                .map_err(|failure| failure.help("run as root"))?;
            Self::current()
        };
        let made = on_thread(make)??;
        Ok(Self { name: "a network name space of its own".into(), ..made })
    }

    /// The name space an OCI specification asks for: the one at its path, or a fresh one if it has none.
    ///
    /// # Errors
    /// It asks for the host's network, which a machine cannot share; or the path does not open.
    pub fn of(spec: &Spec) -> Result<Self, Failure> {
        let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
        let network =
            namespaces.and_then(|list| list.iter().find(|entry| entry.typ() == LinuxNamespaceType::Network));
        let Some(network) = network else { return Err(host_network()) };
        match network.path() {
            Some(path) if !path.as_os_str().is_empty() => {
                let netns = Self::open(path)?;
                if netns.is_host()? { Err(host_network()) } else { Ok(netns) }
            }
            _ => Self::fresh(),
        }
    }

    /// Where it was found; `None` if it was made here and goes away with its last user.
    pub fn path(&self) -> Option<&Path> {
        Some(Path::new(&*self.name)).filter(|path| path.is_absolute())
    }

    /// Runs `work` on a thread inside the name space and waits for it. A process started there lives in the name
    /// space; the thread ends before this returns, so such a process must not ask for a signal at its parent's end.
    ///
    /// # Errors
    /// The name space cannot be entered, for want of rights.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, Failure> {
        on_thread(|| self.enter().map(|()| work()))?
    }

    /// Moves the calling thread into the name space, for good.
    ///
    /// # Errors
    /// No rights.
    pub fn enter(&self) -> Result<(), Failure> {
        setns(&self.file, CloneFlags::CLONE_NEWNET)
            .context(|| format!("cannot enter {self}"))
            .map_err(|failure| failure.help("run as root"))
    }

    /// Whether both are the same name space.
    ///
    /// # Errors
    /// The host does not tell.
    pub fn is(&self, other: &Self) -> Result<bool, Failure> {
        Ok(self.identity()? == other.identity()?)
    }

    /// Whether this is the host's own network: that of its first process, or of this one.
    ///
    /// # Errors
    /// The host does not tell.
    pub fn is_host(&self) -> Result<bool, Failure> {
        if self.is(&Self::current()?)? {
            return Ok(true);
        }
        // Only root may look at it; whoever may not cannot have been given it either.
        Self::open(Path::new(FIRST)).map_or(Ok(false), |first| self.is(&first))
    }

    fn identity(&self) -> Result<(u64, u64), Failure> {
        let stat = fstat(&self.file).context(|| format!("cannot look at {self}"))?;
        Ok((stat.st_dev, stat.st_ino))
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Where it was found.
impl fmt::Display for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl fmt::Debug for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Netns").field(&self.name).finish()
    }
}

fn host_network() -> Failure {
    Failure::new("cannot give a machine the host's network").help(
        "a machine has a network of its own: leave --net-host or hostNetwork out, or run this container with runc",
    )
}

/// Runs `work` on a thread of its own, whose name space dies with it.
fn on_thread<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, Failure> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, work);
        let thread = thread.context(|| "cannot start a thread".to_owned())?;
        thread.join().or_else(|panic| std::panic::resume_unwind(panic))
    })
}
