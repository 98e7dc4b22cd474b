//! Connects this process's standard streams and signals to the container's process, until that ends.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use mvm_protocol::{ExitStatus, SignalTarget};
use mvm_runtime::agent::Process;
use mvm_runtime::container::Container;
use mvm_runtime::failure::{Context, Failure};
use nix::sys::signal::{SigSet, Signal};

use crate::terminal;

/// How often a user asks the container to end before its machine is ended instead.
const LAST_WORD: u32 = 3;

/// Pumps until the process has ended and all it wrote is out.
pub(super) fn serve(
    container: &Container,
    mut process: Process,
    signals: SigSet,
) -> Result<ExitStatus, Failure> {
    let terminal = process.terminal.take();
    let mut outputs = Vec::new();
    if let Some(stream) = &terminal {
        outputs.push(copy_out(clone(stream)?, io::stdout()));
        feed(clone(stream)?, false);
    }
    outputs.extend(process.stdout.take().map(|stream| copy_out(stream, io::stdout())));
    outputs.extend(process.stderr.take().map(|stream| copy_out(stream, io::stderr())));
    if let Some(stream) = process.stdin.take() {
        feed(stream, true);
    }
    let agent = Arc::clone(&container.agent);
    let id = process.id;
    let has_terminal = terminal.is_some();
    let machine = nix::unistd::Pid::from_raw(container.machine.pid());
    std::thread::spawn(move || {
        let mut asked = 0;
        while let Ok(signal) = signals.wait() {
            if matches!(signal, Signal::SIGINT | Signal::SIGTERM | Signal::SIGHUP | Signal::SIGQUIT) {
                asked += 1;
            }
            if asked >= LAST_WORD {
                // The guest had its chance: a user can always get rid of it.
                let _ = nix::sys::signal::kill(machine, Signal::SIGKILL);
            }
            // The process may have ended just now; then there is nobody to tell.
            let _ = match signal {
                Signal::SIGWINCH if has_terminal => agent.resize(id, terminal::size()),
                Signal::SIGWINCH => Ok(()),
                other => agent.signal(id, other as i32, SignalTarget::Process),
            };
        }
    });
    let status =
        container.agent.wait(id, None).context(|| "cannot learn how the process ended".to_owned())?;
    for output in outputs {
        // A panic of a pump was reported where it happened.
        let _ = output.join();
    }
    Ok(status)
}

fn clone(stream: &UnixStream) -> Result<UnixStream, Failure> {
    stream.try_clone().context(|| "cannot use the process's terminal".to_owned())
}

/// Copies until the process's stream ends. If nobody reads ours, the stream is closed: the process learns of it.
fn copy_out(mut from: UnixStream, mut to: impl Write + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut bytes = [0; 32 * 1024];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            if to.write_all(&bytes[..count]).and_then(|()| to.flush()).is_err() {
                return;
            }
        }
    })
}

/// Copies our input to the process. The thread is left behind when the process ends: a read cannot be
/// called off, and the program ends with it.
fn feed(mut to: UnixStream, close_at_end: bool) {
    std::thread::spawn(move || {
        let _ = io::copy(&mut io::stdin().lock(), &mut to);
        if close_at_end {
            let _ = to.shutdown(Shutdown::Write);
        }
    });
}
