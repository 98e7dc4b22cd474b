//! Answering other processes of mvm.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use mvm_protocol::SignalTarget;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use oci_spec::runtime::Process as OciProcess;

use super::wire::{Exec, Reply, Request, Wire};
use super::{Owner, Run};
use crate::agent::{Process, StdioSpec};
use crate::container::NotRunnable;
use crate::failure::{Context, Failure};

/// Connections served at one time; more wait in the socket's queue.
const MAX_CONNECTIONS: usize = 64;
/// How mvm's own failures are told from a program's.
const FAILED: u8 = 125;

/// Serves a container's control socket on threads of their own, for as long as this process lives.
pub(super) fn begin(owner: &Owner, listener: UnixListener) -> Result<(), Failure> {
    let owner = owner.clone();
    let spawned = thread::Builder::new().name("control".to_owned()).spawn(move || {
        let open = Arc::new(AtomicUsize::new(0));
        loop {
            let Ok((stream, _)) = listener.accept() else {
                // Out of files: those who have some will be done.
                thread::sleep(Duration::from_millis(50));
                continue;
            };
            if !is_ours(&stream) || open.load(Ordering::Acquire) >= MAX_CONNECTIONS {
                continue;
            }
            open.fetch_add(1, Ordering::AcqRel);
            let (owner, count) = (owner.clone(), Arc::clone(&open));
            let served = thread::Builder::new().name("request".to_owned()).spawn(move || {
                // Whoever asked is gone, or spoke nonsense: there is nobody to tell.
                let _ = serve(&owner, Wire::new(stream));
                count.fetch_sub(1, Ordering::AcqRel);
            });
            if served.is_err() {
                open.fetch_sub(1, Ordering::AcqRel);
            }
        }
    });
    spawned.map(drop).context(|| "cannot start a thread".to_owned())
}

/// Its user or root.
fn is_ours(stream: &UnixStream) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    getsockopt(stream, PeerCredentials).is_ok_and(|peer| peer.uid() == own || peer.uid() == 0)
}

fn serve(owner: &Owner, mut wire: Wire) -> io::Result<()> {
    let Some((request, _)) = wire.receive::<Request>()? else { return Ok(()) };
    let reply = match request {
        Request::Exec(exec) => return serve_exec(owner, &exec, wire),
        other => answer(owner, other),
    };
    wire.send(&reply.unwrap_or_else(|failure| failed(&failure)), &[])
}

fn answer(owner: &Owner, request: Request) -> Result<Reply, Failure> {
    let done = |result: Result<(), Failure>| result.map(|()| Reply::Done);
    match request {
        Request::Stop { grace_s } => done(owner.stop(Duration::from_secs(grace_s.into()))),
        Request::Pause => done(owner.set_paused(true)),
        Request::Resume => done(owner.set_paused(false)),
        Request::Signal { signal, everyone } => {
            let run = owner.run()?;
            let target = if everyone { SignalTarget::Everyone } else { SignalTarget::Process };
            done(run.sandbox.signal(run.process, signal, target))
        }
        Request::Stats => {
            let run = owner.run()?;
            run.sandbox.stats(&run.container).map(Reply::Stats)
        }
        Request::Put(mut put) => {
            let run = owner.run()?;
            put.place = mvm_protocol::Place::Root(run.container);
            done(run.sandbox.put(put))
        }
        Request::Get(mut get) => {
            let run = owner.run()?;
            get.place = mvm_protocol::Place::Root(run.container);
            run.sandbox.get(get).map(Reply::Got)
        }
        Request::Exec(_) | Request::Resize(_) => Err(Failure::new("this request needs a process")),
    }
}

fn serve_exec(owner: &Owner, exec: &Exec, mut wire: Wire) -> io::Result<()> {
    let started = owner.run().and_then(|run| {
        let process = start(&run, exec)?;
        Ok((run, process))
    });
    let (run, process) = match started {
        Ok(started) => started,
        Err(failure) => return wire.send(&failed(&failure), &[]),
    };
    let writer = wire.writer()?;
    {
        let streams = [&process.terminal, &process.stdin, &process.stdout, &process.stderr];
        let files: Vec<_> = streams.into_iter().flatten().map(AsFd::as_fd).collect();
        writer.send(&Reply::Started, &files)?;
    }
    let Process { id, .. } = process; // the streams are the other side's alone now
    let waiting = Run { spec: OciProcess::default(), ..run.clone() };
    let waiter = thread::Builder::new().name("exec".to_owned()).spawn(move || {
        let reply = match waiting.sandbox.wait(id) {
            Ok(status) => Reply::Exited(status.shell_code()),
            Err(failure) => failed(&failure),
        };
        let _ = writer.send(&reply, &[]);
    });
    while let Some((request, _)) = wire.receive::<Request>()? {
        // The process may just have ended; its exit is on its way.
        let _ = match request {
            Request::Resize(size) => run.sandbox.resize(id, size),
            Request::Signal { signal, .. } => run.sandbox.signal(id, signal, SignalTarget::Process),
            _ => break,
        };
    }
    waiter.map(drop)
}

fn start(run: &Run, exec: &Exec) -> Result<Process, Failure> {
    let stdio = match exec.terminal {
        Some(size) => StdioSpec::Terminal(size),
        None => StdioSpec::Pipes { stdin: exec.stdin, stdout: true, stderr: true },
    };
    run.sandbox.start(&run.container, &process(&run.spec, exec), stdio)
}

/// What `exec` asks for, and of the container's first process what it leaves open.
fn process(first: &OciProcess, exec: &Exec) -> OciProcess {
    let mut process = first.clone();
    process.set_args(Some(exec.args.clone())).set_terminal(Some(exec.terminal.is_some()));
    let mut env = process.env().clone().unwrap_or_default();
    for variable in &exec.env {
        let name = variable.split_once('=').map_or(variable.as_str(), |(name, _)| name);
        env.retain(|other| other.split_once('=').is_none_or(|(it, _)| it != name));
        env.push(variable.clone());
    }
    process.set_env(Some(env));
    if let Some(cwd) = &exec.cwd {
        process.set_cwd(cwd.into());
    }
    if let Some(user) = &exec.user {
        process.user_mut().set_username(Some(user.clone()));
    }
    process
}

fn failed(failure: &Failure) -> Reply {
    Reply::Failed { report: failure.report(), exit_code: exit_code(failure).unwrap_or(FAILED) }
}

/// The exit code a failure stands for, if it is about a container's program.
pub(crate) fn exit_code(failure: &Failure) -> Option<u8> {
    let mut cause = std::error::Error::source(failure);
    while let Some(error) = cause {
        if let Some(program) = error.downcast_ref::<NotRunnable>() {
            return Some(program.exit_code);
        }
        cause = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_exec_leaves_open_is_as_in_the_first_process() {
        let mut first = OciProcess::default();
        first.set_env(Some(vec!["A=1".into(), "B=2".into()])).set_cwd("/work".into());
        let exec = Exec { args: vec!["sh".into()], env: vec!["B=3".into(), "C=".into()], ..Exec::default() };
        let made = process(&first, &exec);
        assert_eq!(made.args().as_deref(), Some(&["sh".to_owned()][..]));
        assert_eq!(made.env().as_deref(), Some(&["A=1".to_owned(), "B=3".into(), "C=".into()][..]));
        assert_eq!(made.cwd().to_str(), Some("/work"));
        let other = Exec { cwd: Some("/".into()), user: Some("app".into()), ..exec };
        let made = process(&first, &other);
        assert_eq!((made.cwd().to_str(), made.user().username().as_deref()), (Some("/"), Some("app")));
    }
}
