//! Answering other processes of mvm.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use mvm_protocol::{Get, Place, Put, SignalTarget};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use oci_spec::runtime::Process as OciProcess;

use super::exit_code::exit_code;
use super::wire::{Exec, Reply, Request, Wire};
use super::{Owner, Run};
use crate::agent::{Process, StdioSpec};
use crate::failure::{Context, Failure};

/// Processes run in a container for others at one time.
const MAX_EXECS: usize = 64;
/// Connections served at one time: more than processes, so that there is always one to stop the container by.
pub(super) const MAX_CONNECTIONS: usize = MAX_EXECS * 2;

/// One of a limited number, until this is dropped.
struct Slot(Arc<AtomicUsize>);

impl Slot {
    /// `None` if all are taken.
    fn of(taken: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let take = |count: usize| (count < most).then_some(count.saturating_add(1));
        taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).ok()?;
        Some(Self(Arc::clone(taken)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Owner {
    /// Whether a request had the container stopped.
    pub fn is_stopped(&self) -> bool {
        self.lock().stopped
    }
}

/// Serves a container's control socket on threads of their own, for as long as this process lives.
pub(super) fn begin(owner: &Owner, listener: UnixListener) -> Result<(), Failure> {
    let owner = owner.clone();
    let spawned = thread::Builder::new().name("control".to_owned()).spawn(move || {
        let (open, execs) = (Arc::default(), Arc::default());
        loop {
            match listener.accept() {
                Ok((stream, _)) if is_ours(&stream) => admit(&owner, stream, &open, &execs),
                Ok(_) => {}
                // Out of files: those who have some will be done.
                Err(_) => thread::sleep(Duration::from_millis(50)),
            }
        }
    });
    spawned.map(drop).context(|| "cannot start a thread".to_owned())
}

/// Serves a connection, or says why not: one that just ended would tell that the container has.
fn admit(owner: &Owner, stream: UnixStream, open: &Arc<AtomicUsize>, execs: &Arc<AtomicUsize>) {
    let refused = stream.try_clone();
    let served = Slot::of(open, MAX_CONNECTIONS).is_some_and(|slot| {
        let (owner, execs) = (owner.clone(), Arc::clone(execs));
        let serve = move || {
            // Whoever asked is gone, or spoke nonsense: there is nobody to tell.
            let _ = serve(&owner, Wire::new(stream), &execs);
            drop(slot);
        };
        thread::Builder::new().name("request".to_owned()).spawn(serve).is_ok()
    });
    if !served && let Ok(stream) = refused {
        let busy = Failure::new("the container's owner is asked for too much at once").help("try again");
        let _ = Wire::new(stream).send(&failed(&busy), &[]);
    }
}

/// Its user or root.
fn is_ours(stream: &UnixStream) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    getsockopt(stream, PeerCredentials).is_ok_and(|peer| peer.uid() == own || peer.uid() == 0)
}

fn serve(owner: &Owner, mut wire: Wire, execs: &Arc<AtomicUsize>) -> io::Result<()> {
    let Some((request, _)) = wire.receive::<Request>()? else { return Ok(()) };
    let done = |result: Result<(), Failure>| result.map(|()| Reply::Done);
    // An exec asks only while it is started; whoever saves waits for all who ask.
    let quiet = match request {
        Request::Exec(_) | Request::Save { .. } | Request::SaveAbove { .. } => None,
        _ => Some(owner.asks()),
    };
    let reply = match request {
        Request::Exec(exec) => match Slot::of(execs, MAX_EXECS) {
            Some(_slot) => return serve_exec(owner, &exec, wire),
            None => Err(Failure::new(format!("{MAX_EXECS} processes are run in the container already"))
                .help("try again when one of them has ended")),
        },
        Request::Save { directory } => owner.save(&directory, None).map(Reply::Saved),
        Request::SaveAbove { directory, base } => owner.save(&directory, Some(&base)).map(Reply::Saved),
        Request::Resize(_) => Err(Failure::new("this request needs a process of its connection")),
        Request::Stop { grace_s } => done(owner.stop(Duration::from_secs(grace_s.into()))),
        Request::Pause => done(owner.set_paused(true)),
        Request::Resume => done(owner.set_paused(false)),
        Request::Signal { signal, everyone } => owner.run().and_then(|run| {
            let target = if everyone { SignalTarget::Everyone } else { SignalTarget::Process };
            done(run.sandbox.signal(run.process, signal, target))
        }),
        Request::Limit(limits) => owner.run().and_then(|run| done(run.sandbox.limit(&limits))),
        Request::Stats => owner.run().and_then(|run| run.sandbox.stats(&run.container).map(Reply::Stats)),
        Request::Put(put) => owner
            .run()
            .and_then(|run| done(run.sandbox.put(Put { place: Place::Root(run.container), ..put }))),
        Request::Get(get) => owner.run().and_then(|run| {
            run.sandbox.get(Get { place: Place::Root(run.container), ..get }).map(Reply::Got)
        }),
    };
    drop(quiet);
    wire.send(&reply.unwrap_or_else(|failure| failed(&failure)), &[])
}

fn serve_exec(owner: &Owner, exec: &Exec, wire: Wire) -> io::Result<()> {
    let started = {
        let _quiet = owner.asks();
        owner.run().and_then(|run| {
            let process = start(&run, exec)?;
            Ok((run, process))
        })
    };
    let (run, process) = match started {
        Ok(started) => started,
        Err(failure) => return wire.send(&failed(&failure), &[]),
    };
    let id = process.id;
    let served = serve_process(&run, process, wire);
    // Whoever wanted to know how it ends has gone.
    run.sandbox.abandon(id);
    served
}

/// Hands the streams of a process over, and tells its end; returns once nobody listens any more.
fn serve_process(run: &Run, process: Process, mut wire: Wire) -> io::Result<()> {
    let writer = wire.writer()?;
    {
        let streams = [&process.terminal, &process.stdin, &process.stdout, &process.stderr];
        let files: Vec<_> = streams.into_iter().flatten().map(AsFd::as_fd).collect();
        writer.send(&Reply::Started, &files)?;
    }
    let Process { id, .. } = process; // the streams are the other side's alone now
    let waiting = Run { spec: OciProcess::default(), ..run.clone() };
    thread::Builder::new().name("exec".to_owned()).spawn(move || {
        let reply = match waiting.sandbox.wait(id) {
            Ok(status) => Reply::Exited(status.shell_code()),
            Err(failure) => failed(&failure),
        };
        let _ = writer.send(&reply, &[]);
    })?;
    while let Some((request, _)) = wire.receive::<Request>()? {
        // The process may just have ended; its exit is on its way.
        let _ = match request {
            Request::Resize(size) => run.sandbox.resize(id, size),
            Request::Signal { signal, .. } => run.sandbox.signal(id, signal, SignalTarget::Process),
            _ => break,
        };
    }
    Ok(())
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
    Reply::Failed { report: failure.report(), exit_code: exit_code(failure) }
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
