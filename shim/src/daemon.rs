//! The daemon that serves a task or a pod, from `start` until its last container is deleted.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::ttrpc::r#async::Server;
use containerd_shim_protos::ttrpc::r#async::transport::Listener;
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::sandbox::{Launcher, MachineLauncher};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, setsid};
use tokio::signal::unix::{SignalKind, signal};

use crate::bootstrap::READY;
use crate::events::Publisher;
use crate::flags::Flags;
use crate::tasks::{Handle, Place, Tasks};
use crate::{logging, reaper, service};

/// Threads for calls that block, at most: each is a call into the guest that has not come back.
const BLOCKING_THREADS: usize = 64;
/// Stack of such a thread, in bytes. Only what is touched costs.
const BLOCKING_STACK: usize = 2 << 20;
/// How long such a thread stays without work.
const KEEP_ALIVE: Duration = Duration::from_millis(500);
/// How long the end waits for answers and events to be out.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Serves until there is nothing left to serve. Standard input is the listening socket.
pub(crate) fn serve(flags: &Flags) -> Result<(), Failure> {
    let listener = io::stdin().as_fd().try_clone_to_owned();
    let listener = UnixListener::from(listener.context(|| "cannot take over the socket".to_owned())?);
    let address = listener.local_addr().context(|| "standard input is no socket".to_owned())?;
    let socket = address.as_pathname().map(Path::to_path_buf);
    let socket = socket.ok_or_else(|| Failure::new("the socket has no path"))?;
    // Nobody's terminal, and nobody's group: what ends containerd does not end its tasks.
    let _ = setsid();
    let _ = nix::sys::prctl::set_child_subreaper(true);
    logging::install(Path::new("."), &flags.id, flags.debug);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_stack_size(BLOCKING_STACK)
        .thread_keep_alive(KEEP_ALIVE)
        .thread_name("call")
        .build()
        .context(|| "cannot start the runtime".to_owned())?;
    runtime.block_on(run(flags, listener, socket))?;
    // A call that never comes back does not hold up the end.
    runtime.shutdown_background();
    Ok(())
}

async fn run(flags: &Flags, listener: UnixListener, socket: PathBuf) -> Result<(), Failure> {
    let events = std::env::var("TTRPC_ADDRESS").ok().filter(|address| !address.is_empty());
    let events = events.map(|address| address.trim_start_matches("unix://").to_owned());
    let publisher = Publisher::new(&flags.namespace, events);
    let place = Place { namespace: flags.namespace.clone(), group: flags.id.clone(), socket };
    // Before there is anything: whatever ends this daemon, `delete` finds what it had.
    place.record(Path::new("."), None)?;
    let (tasks, mut finished) = Tasks::spawn(launcher(), publisher, place);
    let listener = Listener::try_from(listener).context(|| "cannot use the socket".to_owned())?;
    let mut server = Server::new().add_listener(listener).register_service(service::services(&tasks));
    server.start().await.context(|| "cannot serve the socket".to_owned())?;
    tokio::spawn(reaper::run());
    tokio::spawn(heed_signals(tasks.clone()));
    say_ready()?;
    log::info!("shim {} serves {}", env!("CARGO_PKG_VERSION"), flags.id);
    // The sender lives as long as the actor.
    let _ = finished.wait_for(|finished| *finished).await;
    let flushed = tasks.ask(|tasks, reply| drop(reply.send(Ok(tasks.flushed())))).await;
    let _ = tokio::time::timeout(LAST_WORDS, async {
        if let Ok(flushed) = flushed {
            let _ = flushed.await;
        }
        let _ = server.shutdown().await;
    })
    .await;
    Ok(())
}

/// What makes machines.
fn launcher() -> Arc<dyn Launcher> {
    #[cfg(debug_assertions)]
    if let Some(launcher) = crate::fake::chosen() {
        return launcher;
    }
    Arc::new(MachineLauncher::default())
}

/// Tells `start`, which waits for the end of this output, and lets go of it.
fn say_ready() -> Result<(), Failure> {
    let mut stdout = io::stdout();
    let said = writeln!(stdout, "{READY}").and_then(|()| stdout.flush());
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    let null = said.and(null).context(|| "cannot let go of the standard streams".to_owned())?;
    let replaced = dup2_stdin(&null).and_then(|()| dup2_stdout(&null)).and_then(|()| dup2_stderr(&null));
    replaced.context(|| "cannot replace the standard streams".to_owned())
}

/// A service that is stopped tells all its processes to end. A shim does so only if it serves no container.
async fn heed_signals(tasks: Handle) {
    let kinds = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()];
    for kind in kinds {
        let Ok(mut signals) = signal(kind) else { continue };
        let tasks = tasks.clone();
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                let ends = tasks.ask(|tasks, reply| drop(reply.send(Ok(tasks.shut_down())))).await;
                if ends == Ok(false) {
                    log::warn!("told to end while there are containers: not done");
                }
            }
        });
    }
}
