//! The threads that serve devices: one event loop each, to which tasks are handed by move.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use event_manager::{EventManager, RemoteEndpoint, SubscriberId};

use crate::task::{DeviceTask, Subscriber};

/// Stack of a loop thread: devices keep no large arrays on it.
const STACK_SIZE: usize = 128 * 1024;
/// Ready files taken per wake-up.
const READY_FILES: usize = 32;

/// A running loop thread. Dropping it ends the thread and, with it, every task still attached.
#[derive(Debug)]
pub struct IoLoop {
    handle: LoopHandle,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Hands tasks to a loop and takes them back; cheap to clone. Never use it on the loop's own thread.
#[derive(Clone)]
pub struct LoopHandle {
    endpoint: RemoteEndpoint<Subscriber>,
}

/// Names an attached task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskId(SubscriberId);

impl IoLoop {
    /// Starts a loop on a thread called `name`.
    ///
    /// # Errors
    /// The host's reason: no more files or threads.
    pub fn spawn(name: &str) -> io::Result<Self> {
        Self::spawn_with(name, || Ok(()))
    }

    /// Starts a loop on a thread called `name`, which does `first` before it serves anything, and ends if that fails.
    ///
    /// # Errors
    /// The host's reason: no more files or threads.
    pub fn spawn_with(
        name: &str,
        first: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let mut manager =
            EventManager::<Subscriber>::new_with_capacity(READY_FILES).map_err(io::Error::other)?;
        let handle = LoopHandle { endpoint: manager.remote_endpoint() };
        let ending = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&ending);
        let thread =
            std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_SIZE).spawn(move || {
                if let Err(error) = first() {
                    log::error!("an I/O loop did not begin: {error}");
                    return;
                }
                while !seen.load(Ordering::Acquire) {
                    if let Err(error) = manager.run() {
                        // epoll_wait itself failed, which no guest can bring about.
                        log::error!("an I/O loop ended: {error}");
                        return;
                    }
                }
            })?;
        Ok(Self { handle, ending, thread: Some(thread) })
    }

    /// A handle to attach tasks with.
    pub fn handle(&self) -> LoopHandle {
        self.handle.clone()
    }
}

impl Drop for IoLoop {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release);
        if self.handle.endpoint.kick().is_ok()
            && let Some(thread) = self.thread.take()
        {
            // A panic of the loop was reported where it happened.
            let _ = thread.join();
        }
    }
}

impl LoopHandle {
    /// Starts another loop, on a thread called `name` that the loop's own starts: what that one may not do it may
    /// not either.
    ///
    /// # Errors
    /// The loop has ended, or as [`IoLoop::spawn`].
    pub fn spawn(&self, name: &str) -> io::Result<IoLoop> {
        let name = name.to_owned();
        self.endpoint
            .call_blocking::<_, _, event_manager::Error>(move |_| Ok(IoLoop::spawn(&name)))
            .map_err(io::Error::other)?
    }

    /// Moves `task` into the loop and starts it; returns once it has started.
    ///
    /// # Errors
    /// The loop has ended.
    pub fn attach(&self, task: DeviceTask) -> io::Result<TaskId> {
        let subscriber = Subscriber::new(task);
        self.endpoint
            .call_blocking::<_, _, event_manager::Error>(move |ops| Ok(ops.add_subscriber(subscriber)))
            .map(TaskId)
            .map_err(io::Error::other)
    }

    /// Takes a task out of the loop, once it has finished what it is doing.
    ///
    /// # Errors
    /// The loop has ended, or the task is not attached to it.
    pub fn detach(&self, id: TaskId) -> io::Result<DeviceTask> {
        self.endpoint
            .call_blocking::<_, _, event_manager::Error>(move |ops| ops.remove_subscriber(id.0))
            .map(|subscriber| subscriber.task)
            .map_err(io::Error::other)
    }
}

impl std::fmt::Debug for LoopHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoopHandle").finish_non_exhaustive()
    }
}
