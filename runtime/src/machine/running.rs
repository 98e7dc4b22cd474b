//! A machine that runs: what it tells, what its agent is reached by, how it ends.

use std::io::{PipeReader, PipeWriter};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use mvm_protocol::Identity;
use mvm_vmm::config::MachineId;
use mvm_vmm::exit::Exit;
use mvm_vmm::launch::{Child, Ended};
use mvm_vmm::status::{Event, Stages};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};

use super::calls::Calls;
use super::control::Control;
use crate::agent::{AgentClient, Error as AgentError};
use crate::failure::{Context, Failure};
use crate::timeline::Open;

/// Time a guest without an agent has to end by itself, so that it can tell why: a kernel that panics restarts.
pub(crate) const LOST_TIME: Duration = Duration::from_secs(2);

/// What kills a process that makes a system call its filter denies.
const SIGSYS: i32 = Signal::SIGSYS as i32;

/// Our ends of the machine's console.
#[derive(Debug)]
pub struct Console {
    /// What is written here the guest reads.
    pub to_guest: PipeWriter,
    /// What the guest writes arrives here.
    pub from_guest: PipeReader,
}

/// A machine's process and everything that leads to it. Dropping it kills the machine.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    control: Control,
    spawned_ns: u64,
    stages: Option<Stages>,
    first_exit: Option<(u64, u64)>,
    called_ns: Option<u64>,
    ended: bool,
    /// A stage that ends with the machine's process.
    guest: Option<Open>,
    /// The console, if the plan had one.
    pub console: Option<Console>,
    /// The guest's calls, if the plan had a vsock.
    pub calls: Option<Calls>,
}

impl Machine {
    pub(super) fn new(
        child: Child,
        spawned_ns: u64,
        console: Option<Console>,
        calls: Option<Calls>,
        control: Control,
    ) -> Self {
        Self {
            child,
            control,
            spawned_ns,
            stages: None,
            first_exit: None,
            called_ns: None,
            ended: false,
            guest: None,
            console,
            calls,
        }
    }

    /// Its name.
    pub fn id(&self) -> &MachineId {
        self.control.id()
    }

    /// By which devices are attached and detached while it runs.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.child.pid.as_raw()
    }

    /// When it was spawned, on CLOCK_MONOTONIC in nanoseconds.
    pub fn spawned_ns(&self) -> u64 {
        self.spawned_ns
    }

    /// When its process reached each stage of starting, once it has.
    pub fn stages(&self) -> Option<&Stages> {
        self.stages.as_ref()
    }

    /// When the guest ran first, and first returned, on CLOCK_MONOTONIC in nanoseconds, once it has.
    pub fn first_exit(&self) -> Option<(u64, u64)> {
        self.first_exit
    }

    /// When the agent called, on CLOCK_MONOTONIC in nanoseconds, once it has.
    pub fn called_ns(&self) -> Option<u64> {
        self.called_ns
    }

    /// Has a stage end with the machine's process.
    pub(crate) fn hold(&mut self, guest: Open) {
        self.guest = (!self.ended).then_some(guest);
    }

    /// The next thing the machine tells; `None` once its process has closed the stream.
    ///
    /// # Errors
    /// The machine could not start: what failed, as its process reports it.
    pub fn next_event(&mut self) -> Result<Option<Event>, Failure> {
        let Some(event) = self.child.events.next() else { return Ok(None) };
        let event = event.context(|| format!("cannot understand machine {}", self.id()))?;
        match &event {
            Event::Started { stages } => self.stages = Some(*stages),
            Event::FirstExit { run_ns, ns } => self.first_exit = Some((*run_ns, *ns)),
            Event::Error { message, because, help } => {
                return Err(refused(self.id(), message, because, help.as_deref()));
            }
            _ => {}
        }
        Ok(Some(event))
    }

    /// Takes in what the machine tells of its start, for no longer than `time`: a guest that has all its
    /// exits on another CPU never returns from its first one.
    ///
    /// # Errors
    /// As [`Machine::next_event`].
    pub fn hear_of_start(&mut self, time: Duration) -> Result<(), Failure> {
        let end = Instant::now() + time;
        while self.first_exit.is_none() {
            let left = end.saturating_duration_since(Instant::now());
            let there = self.child.events.wait(left);
            let there = there.context(|| format!("cannot listen to machine {}", self.id()))?;
            if !there || self.next_event()?.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Waits until the machine has ended.
    ///
    /// # Errors
    /// It could not start, or its process died otherwise than by a machine's end.
    pub fn wait(&mut self) -> Result<Exit, Failure> {
        let mut last = None;
        while let Some(event) = self.next_event()? {
            if let Event::Exit { exit, .. } = event {
                last = Some(exit);
            }
        }
        let ended = self.reap()?;
        match (last, ended) {
            (Some(exit), _) | (None, Ended::Exit(exit)) => Ok(exit),
            (None, ended) => {
                Err(Failure::new(format!("machine {} ended abnormally: {}", self.id(), describe(&ended)))
                    .help(help(&ended)))
            }
        }
    }

    /// Waits until the machine has ended, but no longer than `time`: a guest that was asked to power off may
    /// not. It is killed then.
    ///
    /// # Errors
    /// As [`Machine::wait`], or it had to be killed.
    pub fn wait_at_most(&mut self, time: Duration) -> Result<Exit, Failure> {
        let end = Instant::now() + time;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut ended = [PollFd::new(self.child.pidfd.as_fd(), PollFlags::POLLIN)];
            let timeout =
                PollTimeout::try_from(left.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut ended, timeout) {
                Ok(1..) => return self.wait(),
                Ok(_) | Err(nix::errno::Errno::EINTR) if !left.is_zero() => {}
                Ok(_) | Err(nix::errno::Errno::EINTR) => {
                    self.kill()?;
                    return Err(Failure::new(format!("machine {} did not end within {time:?}", self.id())));
                }
                Err(error) => {
                    return Err(Failure::because(format!("cannot wait for machine {}", self.id()), error));
                }
            }
        }
    }

    /// Ends the machine now, without asking the guest.
    ///
    /// # Errors
    /// Its process cannot be waited for.
    pub fn kill(&mut self) -> Result<(), Failure> {
        if !self.ended {
            // The process is ours and not yet reaped: its number is not another's.
            let _ = kill(self.child.pid, Signal::SIGKILL);
            self.reap()?;
        }
        Ok(())
    }

    /// Readable once the machine's process has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.child.pidfd.as_fd()
    }

    /// What was asked of the agent failed: if that is because the machine has ended, that is why.
    pub(crate) fn explain(&mut self, failure: Failure) -> Failure {
        explain(failure, || {
            let time = PollTimeout::try_from(LOST_TIME).unwrap_or(PollTimeout::MAX);
            let mut ended = [PollFd::new(self.child.pidfd.as_fd(), PollFlags::POLLIN)];
            let ended = matches!(poll(&mut ended, time), Ok(1..));
            ended.then(|| self.wait().map_or_else(|end| end.to_string(), |exit| exit.to_string()))
        })
    }

    /// Asks the machine's process to end the machine in order.
    pub fn stop(&self) {
        if !self.ended {
            let _ = kill(self.child.pid, Signal::SIGTERM);
        }
    }

    /// The agent, once it has called and said hello, within `deadline`.
    ///
    /// # Errors
    /// The machine ended before its agent called, or the agent did not call in time, or spoke nonsense.
    pub fn agent(&mut self, identity: Identity, deadline: Duration) -> Result<AgentClient, Failure> {
        let help = "see what its kernel says: mvm boot --console=serial with a debug kernel";
        let calls = self.calls.take().ok_or_else(|| Failure::new("the machine has no vsock"))?;
        let end = Instant::now() + deadline;
        let waited = calls.control(deadline);
        match waited {
            Ok(Some(control)) => {
                self.called_ns = Some(mvm_vmm::status::now());
                let left = end.saturating_duration_since(Instant::now());
                AgentClient::connect(control, calls, identity, left)
                    .context(|| format!("cannot talk to the agent of machine {}", self.id()))
            }
            Ok(None) => {
                let exit = self.wait()?;
                Err(Failure::new(format!("machine {} ended before its agent was ready: {}", self.id(), exit))
                    .help(help))
            }
            Err(error) if error.kind() == std::io::ErrorKind::TimedOut => Err(Failure::new(format!(
                "the agent of machine {} did not call within {deadline:?}",
                self.id()
            ))
            .help(help)),
            Err(error) => {
                Err(Failure::because(format!("cannot answer the calls of machine {}", self.id()), error))
            }
        }
    }

    fn reap(&mut self) -> Result<Ended, Failure> {
        let ended = self.child.wait().context(|| format!("cannot wait for machine {}", self.id()))?;
        self.ended = true;
        self.guest = None;
        Ok(ended)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(failure) = self.kill() {
            log::warn!("{}", failure.report());
        }
    }
}

/// What was asked of a guest failed: if its agent is lost, how its machine ended is why. `ended` waits for that and
/// tells it, unless the machine goes on.
pub(crate) fn explain(failure: Failure, ended: impl FnOnce() -> Option<String>) -> Failure {
    let is_lost = matches!(failure.caused_by(), Some(AgentError::Lost { .. }));
    match is_lost.then(ended).flatten() {
        Some(how) => {
            Failure::because(failure.to_string(), Failure::new(format!("the machine has ended: {how}")))
        }
        None => failure,
    }
}

/// The machine's own account of why it could not start, as if it had happened here.
fn refused(id: &MachineId, message: &str, because: &[String], help: Option<&str>) -> Failure {
    let mut chain: Option<Failure> = None;
    for text in because.iter().rev() {
        chain = Some(match chain {
            None => Failure::new(text.clone()),
            Some(cause) => Failure::because(text.clone(), cause),
        });
    }
    let inner = match chain {
        None => Failure::new(message),
        Some(cause) => Failure::because(message, cause),
    };
    let failure = Failure::because(format!("cannot start machine {id}"), inner);
    match help {
        Some(help) => failure.help(help),
        None => failure,
    }
}

fn describe(ended: &Ended) -> String {
    match ended {
        Ended::Exit(exit) => exit.to_string(),
        Ended::FailedToStart => "it could not start and did not say why".to_owned(),
        Ended::Code(code) => format!("its process exited with {code}"),
        Ended::Signal(SIGSYS) => {
            "its process made a system call that it may not make (seccomp), and was killed".to_owned()
        }
        Ended::Signal(signal) => format!("signal {signal} killed its process"),
    }
}

fn help(ended: &Ended) -> &'static str {
    match ended {
        Ended::Signal(SIGSYS) => {
            "either something took the process over, or this is a bug: report it with the line of the kernel's log that \
             names the call (dmesg, type=1326)"
        }
        _ => "run it again with --verbose; if it persists, report it with that output",
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    use mvm_devices::fd::FdSlot;
    use mvm_devices::throttle::Meters;
    use mvm_vmm::config::{Boot, MachineConfig, Start};
    use mvm_vmm::launch::{Files, Launch};

    use super::*;

    /// A machine whose process is `program`. Its argument is the number of files: what it makes of that is its own.
    pub(crate) fn machine(program: &str, files: usize) -> Machine {
        let id: MachineId = "m".parse().unwrap();
        let boot = Boot::new(FdSlot(4));
        let config = MachineConfig::new(id.clone(), FdSlot(4), Start::Boot(boot));
        let mut passed = Files::default();
        for _ in 0..files {
            passed.add(File::open("/dev/null").unwrap());
        }
        let launch = Launch { config, files: passed, stderr: None };
        let (near, _) = UnixStream::pair().unwrap();
        let control = Control::new(id, near, Meters::default()).unwrap();
        Machine::new(launch.spawn_program(Path::new(program)).unwrap(), 0, None, None, control)
    }

    #[test]
    fn a_guest_that_does_not_power_off_is_killed_when_its_time_is_up() {
        let mut machine = machine("/bin/sleep", 60);
        let begun = Instant::now();
        let failure = machine.wait_at_most(Duration::from_millis(50)).unwrap_err();
        assert!(failure.report().contains("did not end within 50ms"), "{}", failure.report());
        assert!(begun.elapsed() < Duration::from_secs(30), "it was waited for");
    }

    #[test]
    fn a_guest_that_never_returns_from_its_first_cpu_is_not_waited_for() {
        let mut machine = machine("/bin/sleep", 60);
        let begun = Instant::now();
        machine.hear_of_start(Duration::from_millis(50)).unwrap();
        assert_eq!(machine.first_exit(), None);
        assert!(begun.elapsed() < Duration::from_secs(30), "it was waited for");
    }

    #[test]
    fn a_guest_that_powers_off_in_time_is_not_killed() {
        let ended = machine("/bin/true", 0).wait_at_most(Duration::from_secs(60));
        assert_eq!(ended.unwrap(), Exit::Shutdown);
    }

    #[test]
    fn a_system_call_that_is_denied_is_told_from_other_signals() {
        let mut machine = machine("/bin/sleep", 60);
        kill(machine.child.pid, Signal::SIGSYS).unwrap();
        let end = machine.wait().unwrap_err();
        let text = end.report();
        assert!(text.contains("made a system call that it may not make (seccomp)"), "{text}");
        assert!(text.contains("type=1326"), "{text}");
    }
}
