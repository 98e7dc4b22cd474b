//! `mvm exec`: another process in a container, on this terminal, with its exit code as ours.

use mvm_protocol::WindowSize;
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::owner::{Client, Control, Exec as Asked, Started};
use mvm_runtime::state::Home;
use nix::sys::signal::Signal;

use super::args::Exec;
use crate::stdio::{self, Streams, Target};
use crate::terminal::size;

pub(super) fn exec(home: &Home, options: Exec) -> Result<u8, Failure> {
    stdio::check_terminal(options.tty)?;
    let seen = home.find(&options.name)?;
    let asked = Asked {
        args: options.command,
        env: crate::run::passed_on(&options.env),
        cwd: options.workdir,
        user: options.user,
        terminal: options.tty.then(size),
        stdin: options.interactive,
    };
    let connected = (options.tty, options.interactive);
    let signals = stdio::hold_signals()?;
    let mut started = Client::connect(&seen)?.exec(asked)?;
    let streams = streams(&mut started, connected);
    let control = started.control().context(|| "cannot talk to the container's owner".to_owned())?;
    stdio::serve(streams, signals, Told(control), || started.wait())
}

/// The streams in the order they are sent in.
fn streams(started: &mut Started, (terminal, stdin): (bool, bool)) -> Streams {
    let mut files = std::mem::take(&mut started.streams).into_iter();
    if terminal {
        return Streams { terminal: files.next(), ..Streams::default() };
    }
    let stdin = if stdin { files.next() } else { None };
    Streams { stdin, stdout: files.next(), stderr: files.next(), ..Streams::default() }
}

struct Told(Control);

impl Target for Told {
    fn resize(&self, size: WindowSize) {
        self.0.resize(size);
    }

    fn signal(&self, signal: Signal) {
        self.0.signal(signal as i32);
    }

    fn give_up(&self) {
        self.0.signal(Signal::SIGKILL as i32);
    }
}
