//! A process of a machine that is none: a plain one, in a session of its own.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread;

use mvm_protocol::WindowSize;
use mvm_runtime::agent::StdioSpec;
use mvm_runtime::failure::{Context, Failure};
use nix::pty::{Winsize, openpty};
use nix::unistd::Pid;
use oci_spec::runtime::Process as OciProcess;

/// The host's ends of a process's streams.
#[derive(Default)]
pub(super) struct Ours {
    pub(super) stdin: Option<UnixStream>,
    pub(super) stdout: Option<UnixStream>,
    pub(super) stderr: Option<UnixStream>,
    pub(super) terminal: Option<UnixStream>,
    pub(super) master: Option<OwnedFd>,
}

/// The command of a process and the ends of its streams.
pub(super) fn prepare(process: &OciProcess, stdio: StdioSpec) -> Result<(Command, Ours), Failure> {
    let args = process.args().clone().unwrap_or_default();
    let env = process.env().clone().unwrap_or_default();
    let program = args.first().ok_or_else(|| Failure::new("the process has no program"))?;
    let path = find(program, &env)?;
    // A session of its own, and with it the terminal.
    let mut command = Command::new("setsid");
    let mut ours = Ours::default();
    match stdio {
        StdioSpec::Pipes { stdin, stdout, stderr } => {
            command.stdin(pipe(stdin, &mut ours.stdin)?);
            command.stdout(pipe(stdout, &mut ours.stdout)?).stderr(pipe(stderr, &mut ours.stderr)?);
        }
        StdioSpec::Terminal(size) => {
            let slave = terminal(size, &mut ours)?;
            let clone = || slave.try_clone().context(|| "cannot use the terminal".to_owned());
            command.arg("--ctty").stdin(clone()?).stdout(clone()?).stderr(clone()?);
        }
    }
    let rest = args.get(1..).unwrap_or_default();
    command.args(["setpriv", "--pdeathsig", "KILL"]).arg(path).args(rest).current_dir("/").env_clear();
    command.envs(env.iter().filter_map(|pair| pair.split_once('=')));
    Ok((command, ours))
}

/// What is done with a process once it is known.
pub(super) type Watcher = Box<dyn FnOnce(Child) + Send>;

/// Starts a process that ends with this program, as a guest's would. What counts is the end of the thread that
/// started it; so that one stays to watch it.
pub(super) fn spawn(mut command: Command) -> Result<(Pid, Sender<Watcher>), Failure> {
    let (pids, pid) = channel();
    let (watchers, watcher) = channel::<Watcher>();
    thread::spawn(move || match command.spawn() {
        Err(error) => drop(pids.send(Err(error))),
        Ok(child) => {
            drop(command);
            let _ = pids.send(Ok(child.id()));
            if let Ok(watch) = watcher.recv() {
                watch(child);
            }
        }
    });
    let pid = pid.recv().context(|| "cannot start the process".to_owned())?;
    let pid = pid.context(|| "cannot start the process".to_owned())?;
    Ok((Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX)), watchers))
}

fn pipe(wanted: bool, ours: &mut Option<UnixStream>) -> Result<Stdio, Failure> {
    if !wanted {
        return Ok(Stdio::null());
    }
    let (host, guest) = UnixStream::pair().context(|| "cannot make a stream".to_owned())?;
    *ours = Some(host);
    Ok(Stdio::from(OwnedFd::from(guest)))
}

fn terminal(size: WindowSize, ours: &mut Ours) -> Result<OwnedFd, Failure> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    let pair = openpty(&size, None).context(|| "cannot make a terminal".to_owned())?;
    let (host, guest) = UnixStream::pair().context(|| "cannot make a stream".to_owned())?;
    let clone =
        || pair.master.try_clone().map(fs::File::from).context(|| "cannot use the terminal".to_owned());
    let (mut reading, mut writing) = (clone()?, clone()?);
    let mut towards = guest.try_clone().context(|| "cannot use a stream".to_owned())?;
    let mut from = guest;
    thread::spawn(move || {
        let _ = std::io::copy(&mut reading, &mut towards);
        let _ = towards.shutdown(std::net::Shutdown::Both);
    });
    thread::spawn(move || std::io::copy(&mut from, &mut writing));
    ours.terminal = Some(host);
    ours.master = Some(pair.master);
    Ok(pair.slave)
}

/// The program's path, looked for as a guest does.
fn find(program: &str, env: &[String]) -> Result<PathBuf, Failure> {
    let path = env.iter().find_map(|pair| pair.strip_prefix("PATH=")).unwrap_or("/bin:/usr/bin");
    let found = if program.contains('/') {
        Some(PathBuf::from(program)).filter(|path| path.exists())
    } else {
        path.split(':').map(|directory| Path::new(directory).join(program)).find(|path| path.exists())
    };
    found.ok_or_else(|| Failure::new(format!("cannot run {program}")))
}
