//! The record of processes: who runs, who has exited, and which exits the host has been told.
//!
//! An exit is reported once its output streams are done, and again on every new control connection until
//! the host forgets the process.

use std::collections::BTreeMap;

use mvm_protocol::{Event, ExitStatus, ProcessEntry, Stamp, limits::MAX_PROCESSES};
use nix::unistd::Pid;

use crate::error::{Error, Result};

/// All processes the host has started and not yet forgotten.
#[derive(Debug, Default)]
pub(crate) struct Table {
    processes: BTreeMap<u64, Process>,
}

#[derive(Debug)]
struct Process {
    pid: Pid,
    root: Option<String>,
    /// Output streams that may still carry bytes of it.
    outputs: usize,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Running,
    /// Reaped; its output is on the way. Reported when that is done.
    Draining(ExitStatus, Stamp),
    Exited(ExitStatus, Stamp),
}

impl Table {
    /// Whether a process may be started under this id.
    pub(crate) fn check_free(&self, process: u64) -> Result<()> {
        if self.processes.contains_key(&process) {
            return Err(Error::Exists(format!("process {process} exists")));
        }
        if self.processes.len() >= MAX_PROCESSES {
            return Err(Error::Busy("the guest has as many processes on record as it may"));
        }
        Ok(())
    }

    /// Records a process that has just been started.
    pub(crate) fn started(&mut self, process: u64, pid: Pid, root: Option<String>, outputs: usize) {
        self.processes.insert(process, Process { pid, root, outputs, state: State::Running });
    }

    /// Notes that a child was reaped; which process it was, if it was one of the host's.
    pub(crate) fn reaped(&mut self, pid: Pid, status: ExitStatus, at: Stamp) -> Option<u64> {
        let (id, process) = self
            .processes
            .iter_mut()
            .find(|(_, process)| process.pid == pid && matches!(process.state, State::Running))?;
        process.state = State::Draining(status, at);
        Some(*id)
    }

    /// Notes that an output stream has ended, and says so if the exit can now be reported.
    pub(crate) fn output_ended(&mut self, process: u64) -> Option<Event> {
        let entry = self.processes.get_mut(&process)?;
        entry.outputs = entry.outputs.saturating_sub(1);
        self.report(process)
    }

    /// The exit of a process, once, when it has exited and its output is done.
    pub(crate) fn report(&mut self, process: u64) -> Option<Event> {
        let entry = self.processes.get_mut(&process)?;
        let State::Draining(status, at) = entry.state else {
            return None;
        };
        if entry.outputs > 0 {
            return None;
        }
        entry.state = State::Exited(status, at);
        Some(Event::Exited { process, status, at })
    }

    /// All exits the host may have missed.
    pub(crate) fn unforgotten(&self) -> Vec<Event> {
        self.processes
            .iter()
            .filter_map(|(&process, entry)| match entry.state {
                State::Exited(status, at) => Some(Event::Exited { process, status, at }),
                _ => None,
            })
            .collect()
    }

    /// Drops the record of a process whose exit was reported.
    pub(crate) fn forget(&mut self, process: u64) -> Result<()> {
        match self.processes.get(&process) {
            None => Err(not_found(process)),
            Some(Process { state: State::Exited(..), .. }) => {
                self.processes.remove(&process);
                Ok(())
            }
            Some(_) => Err(Error::Busy("the process has not exited")),
        }
    }

    /// The PID of a process that has not been reaped, so that the number is surely its own.
    pub(crate) fn running(&self, process: u64) -> Result<Pid> {
        match self.processes.get(&process) {
            Some(Process { pid, state: State::Running, .. }) => Ok(*pid),
            _ => Err(not_found(process)),
        }
    }

    /// The root a process was started in.
    pub(crate) fn root_of(&self, process: u64) -> Option<&str> {
        self.processes.get(&process)?.root.as_deref()
    }

    /// The PIDs of all processes that have not been reaped.
    pub(crate) fn all_running(&self) -> impl Iterator<Item = Pid> {
        self.processes
            .values()
            .filter(|process| matches!(process.state, State::Running))
            .map(|process| process.pid)
    }

    /// Those of them that were started in this root.
    pub(crate) fn running_in(&self, root: &str) -> impl Iterator<Item = Pid> {
        self.processes
            .values()
            .filter(move |it| matches!(it.state, State::Running) && it.root.as_deref() == Some(root))
            .map(|process| process.pid)
    }

    /// Every process on record.
    pub(crate) fn entries(&self) -> Vec<ProcessEntry> {
        let entry = |(&process, entry): (&u64, &Process)| ProcessEntry {
            process,
            pid: entry.pid.as_raw().unsigned_abs(),
            exited: match entry.state {
                State::Running => None,
                State::Draining(status, _) | State::Exited(status, _) => Some(status),
            },
        };
        self.processes.iter().map(entry).collect()
    }
}

fn not_found(process: u64) -> Error {
    Error::NotFound(format!("no process {process} is running"))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const AT: Stamp = Stamp { monotonic_ns: 1, boottime_ns: 2 };
    const OK: ExitStatus = ExitStatus::Code(0);

    fn table_with(process: u64, pid: i32, outputs: usize) -> Table {
        let mut table = Table::default();
        table.started(process, Pid::from_raw(pid), None, outputs);
        table
    }

    #[test]
    fn an_exit_is_reported_when_the_last_output_has_ended() {
        let mut table = table_with(1, 10, 2);
        assert_eq!(table.reaped(Pid::from_raw(10), OK, AT), Some(1));
        assert_eq!(table.report(1), None);
        assert_eq!(table.output_ended(1), None);
        assert_eq!(table.output_ended(1), Some(Event::Exited { process: 1, status: OK, at: AT }));
        assert_eq!(table.report(1), None, "only once");
    }

    #[test]
    fn outputs_that_end_before_the_process_does_are_not_waited_for() {
        let mut table = table_with(1, 10, 1);
        assert_eq!(table.output_ended(1), None);
        table.reaped(Pid::from_raw(10), OK, AT);
        assert!(table.report(1).is_some());
    }

    #[test]
    fn a_pid_that_is_used_again_belongs_to_the_new_process() {
        let mut table = table_with(1, 10, 0);
        table.reaped(Pid::from_raw(10), OK, AT);
        table.report(1);
        table.started(2, Pid::from_raw(10), None, 0);
        assert_eq!(table.reaped(Pid::from_raw(10), ExitStatus::Code(3), AT), Some(2));
        assert!(table.running(1).is_err());
    }

    #[test]
    fn an_orphan_that_was_adopted_is_nobodys_exit() {
        assert_eq!(table_with(1, 10, 0).reaped(Pid::from_raw(11), OK, AT), None);
    }

    #[test]
    fn an_exit_is_repeated_until_it_is_forgotten() {
        let mut table = table_with(1, 10, 0);
        assert!(matches!(table.forget(1), Err(Error::Busy(_))));
        table.reaped(Pid::from_raw(10), OK, AT);
        table.report(1);
        assert_eq!(table.unforgotten().len(), 1);
        assert_eq!(table.unforgotten().len(), 1);
        table.forget(1).unwrap();
        assert_eq!(table.unforgotten(), []);
        assert!(matches!(table.forget(1), Err(Error::NotFound(_))));
    }

    #[test]
    fn a_full_table_refuses_more_and_an_id_is_not_used_twice() {
        let mut table = Table::default();
        for process in 0..MAX_PROCESSES as u64 {
            table.check_free(process).unwrap();
            table.started(process, Pid::from_raw(1), None, 0);
        }
        assert!(matches!(table.check_free(1), Err(Error::Exists(_))));
        assert!(matches!(table.check_free(9999), Err(Error::Busy(_))));
    }

    /// One thing that can happen to the table.
    #[derive(Clone, Debug)]
    enum Happening {
        Started { outputs: usize },
        Reaped { nth: usize },
        OutputEnded { nth: usize },
        Forgotten { nth: usize },
    }

    fn happening() -> impl Strategy<Value = Happening> {
        prop_oneof![
            (0..3_usize).prop_map(|outputs| Happening::Started { outputs }),
            (0..20_usize).prop_map(|nth| Happening::Reaped { nth }),
            (0..20_usize).prop_map(|nth| Happening::OutputEnded { nth }),
            (0..20_usize).prop_map(|nth| Happening::Forgotten { nth }),
        ]
    }

    /// A process as the kernel and the pumps know it.
    struct Real {
        pid: i32,
        alive: bool,
        outputs: usize,
        reports: usize,
    }

    proptest! {
        /// P-23: whatever the order, each exit is reported exactly once, and never before its output.
        #[test]
        fn every_exit_is_reported_once_and_after_its_output(happenings in vec(happening(), 0..80)) {
            let mut table = Table::default();
            let mut real: Vec<Real> = Vec::new();
            for it in happenings {
                let mut event = None;
                match it {
                    Happening::Started { outputs } => {
                        // The kernel gives a number again once its process is reaped.
                        let pid = (1..).find(|pid| !real.iter().any(|it| it.alive && it.pid == *pid)).unwrap();
                        table.started(real.len() as u64, Pid::from_raw(pid), None, outputs);
                        real.push(Real { pid, alive: true, outputs, reports: 0 });
                    }
                    Happening::Reaped { nth } => if let Some(process) = real.get_mut(nth).filter(|it| it.alive) {
                        process.alive = false;
                        let id = table.reaped(Pid::from_raw(process.pid), OK, AT);
                        prop_assert_eq!(id, Some(nth as u64));
                        event = table.report(nth as u64);
                    },
                    Happening::OutputEnded { nth } => if let Some(process) = real.get_mut(nth).filter(|it| it.outputs > 0) {
                        process.outputs -= 1;
                        event = table.output_ended(nth as u64);
                    },
                    Happening::Forgotten { nth } => {
                        let reported = real.get(nth).is_some_and(|it| it.reports > 0);
                        let forgotten = table.forget(nth as u64).is_ok();
                        prop_assert!(!forgotten || reported);
                    }
                }
                if let Some(Event::Exited { process, .. }) = event {
                    real[process as usize].reports += 1;
                }
            }
            for process in &real {
                let over = !process.alive && process.outputs == 0;
                prop_assert_eq!(process.reports, usize::from(over));
            }
            prop_assert_eq!(table.all_running().count(), real.iter().filter(|it| it.alive).count());
        }
    }
}
