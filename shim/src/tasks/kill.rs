//! Kill: signals, and what becomes of who does not end although it was killed.

use std::sync::Arc;
use std::time::Duration;

use mvm_protocol::SignalTarget;
use mvm_runtime::sandbox::Sandbox;
use nix::libc::{SIGCHLD, SIGCONT, SIGINT, SIGKILL, SIGTERM, SIGURG, SIGWINCH};

use super::{Exit, Name, Reply, State, Tasks, Ticket, now};
use crate::bundle::Role;
use crate::error::Error;

/// Highest signal number of Linux.
const MAX_SIGNAL: i32 = 64;
/// How long a process may live on after it was killed. Then it is said to have ended, whatever its guest says of it.
const KILL_TIME: Duration = Duration::from_secs(10);

impl Tasks {
    /// Sends a signal to a process, or to all of its container.
    pub(crate) fn kill(&mut self, name: Name, signal: u32, all: bool, reply: Reply<()>) {
        let Some(signal) = i32::try_from(signal).ok().filter(|signal| *signal <= MAX_SIGNAL) else {
            return drop(reply.send(Err(Error::invalid_argument(format!("no signal has number {signal}")))));
        };
        let is_starting = self.process(&name).is_ok_and(|p| matches!(p.state, State::Starting));
        let container = name.container.clone();
        let job = move |tasks: &mut Self| tasks.kill_now(&name, signal, all, reply);
        match signal {
            _ if is_starting => self.when_idle(&container, job),
            // Who is to die need not be saved.
            SIGKILL => job(self),
            _ => self.when_saved(&container, job),
        }
    }

    fn kill_now(&mut self, name: &Name, signal: i32, all: bool, reply: Reply<()>) {
        let is_init = name.exec.is_empty();
        let answer = match self.process(name).map(|process| &process.state) {
            Err(error) => Err(error),
            Ok(State::Ending { .. } | State::Stopped { .. }) => {
                Err(Error::not_found("process already finished"))
            }
            Ok(State::Starting) => Err(Error::failed_precondition("process is being started")),
            Ok(State::Created { .. }) if !is_init => Err(Error::failed_precondition("process not created")),
            Ok(State::Created { .. } | State::Virtual) => {
                if let Some(status) = self.end_without_guest(name, signal) {
                    self.init_without_guest_is_over(name, Exit { status, at: now() });
                }
                Ok(())
            }
            Ok(State::Running { id, .. }) => {
                let (id, target) = (*id, if all { SignalTarget::Everyone } else { SignalTarget::Process });
                return self.signal(name, (id, signal, target), reply);
            }
        };
        let _ = reply.send(answer);
    }

    /// What a signal makes of an init that no guest runs: one not started yet dies of what kills by default; a pod's
    /// sandbox does what a pause program does, which ends well when asked to.
    fn end_without_guest(&mut self, name: &Name, signal: i32) -> Option<u32> {
        let role = self.container(&name.container).ok()?.role;
        match signal {
            0 | SIGCHLD | SIGCONT | SIGURG | SIGWINCH => None,
            SIGTERM | SIGINT if role == Role::Sandbox => Some(0),
            fatal => u32::try_from(fatal).ok().map(|fatal| 128 + fatal),
        }
    }

    /// Has the guest send a signal to a process that runs.
    pub(super) fn signal(&mut self, name: &Name, what: (u64, i32, SignalTarget), reply: Reply<()>) {
        let (Ok(sandbox), Ok(ticket)) = (self.sandbox(), self.ticket(name)) else {
            return drop(reply.send(Err(Error::not_found("process already finished"))));
        };
        let (id, signal, target) = what;
        let kills = signal == SIGKILL;
        let may_end_machine = kills && self.owns_machine(name);
        if kills {
            self.expect_end(ticket);
        }
        let asked = Arc::clone(&sandbox);
        self.blocking(
            move || asked.signal(id, signal, target),
            move |tasks, sent| {
                let sent = match sent {
                    Err(failure) if may_end_machine => {
                        // Who may not refuse to die cannot hide in a guest that does not answer.
                        log::error!("the machine is killed: {}", failure.report());
                        tasks.kill_machine(sandbox);
                        Ok(())
                    }
                    sent => sent.map_err(Error::from),
                };
                let _ = reply.send(sent);
            },
        );
    }

    /// Whether nobody else lives in the machine of this process: it is the init of a container alone.
    fn owns_machine(&self, name: &Name) -> bool {
        let role = self.containers.get(&name.container).map(|container| container.role);
        name.exec.is_empty() && role == Some(Role::Alone)
    }

    /// What is killed is over in time, whatever becomes of the signal.
    fn expect_end(&mut self, ticket: Ticket) {
        let Some(process) = self.holder(&ticket) else { return };
        if std::mem::replace(&mut process.killed, true) {
            return;
        }
        let me = self.me.clone();
        tokio::spawn(async move {
            tokio::time::sleep(KILL_TIME).await;
            me.tell(move |tasks| tasks.time_to_die_is_up(ticket));
        });
    }

    fn time_to_die_is_up(&mut self, ticket: Ticket) {
        let lives =
            self.holder(&ticket).is_some_and(|process| matches!(process.state, State::Running { .. }));
        let (true, Ok(sandbox)) = (lives, self.sandbox()) else { return };
        let name = &ticket.name;
        log::error!("process {name:?} was killed, and its guest has not said in {KILL_TIME:?} that it ended");
        if self.owns_machine(name) {
            return self.kill_machine(sandbox);
        }
        if !name.exec.is_empty() {
            return self.give_up(&ticket);
        }
        let asked = Arc::clone(&sandbox);
        self.blocking(
            move || asked.answers(),
            move |tasks, answers| match answers {
                true => tasks.make_up_end(&ticket, sandbox),
                // Nobody in it can be reached any more.
                false => tasks.kill_machine(sandbox),
            },
        );
    }

    /// A pod's container that does not end is taken from its guest, and said to have ended.
    fn make_up_end(&mut self, ticket: &Ticket, sandbox: Arc<dyn Sandbox>) {
        self.give_up(ticket);
        let id = ticket.name.container.clone();
        self.blocking(
            move || sandbox.remove(&id),
            |_, removed| {
                if let Err(failure) = removed {
                    log::error!("{}", failure.report());
                }
            },
        );
    }

    /// Everything in the machine is told to have ended once it is gone.
    fn kill_machine(&self, sandbox: Arc<dyn Sandbox>) {
        self.apart("kill", move || sandbox.kill_machine(), |_, ()| {});
    }

    /// An init that no guest runs is over.
    pub(super) fn init_without_guest_is_over(&mut self, name: &Name, exit: Exit) {
        match self.container(&name.container).map(|container| container.role) {
            Ok(Role::Sandbox) => self.sandbox_is_over(name, exit),
            _ => self.process_is_over(name, exit),
        }
    }
}
