//! The processes a guest has on record, as far as its host knows: those that were started and whose end was not fetched.

use std::collections::{BTreeMap, HashMap};

use mvm_protocol::{ExitStatus, limits::MAX_PROCESSES};

use super::error::{Error, Result};

/// Bounded, whatever the guest says of its own bounds.
#[derive(Default)]
pub(super) struct Lives {
    lives: BTreeMap<u64, Life>,
    /// Exits that were reported and not fetched; bounded, because a guest may report processes nobody started.
    exits: HashMap<u64, ExitStatus>,
}

/// What is wanted of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    /// How it ends.
    Awaited,
    /// Nothing any more; the guest has not said that it ended.
    Abandoned,
    /// Nothing any more, and it has ended: the guest is to drop its record.
    Over,
}

impl Lives {
    /// A process is about to be started, or another host has started it.
    ///
    /// # Errors
    /// The guest may have no more.
    pub(super) fn begin(&mut self, process: u64) -> Result<()> {
        if self.lives.len() >= MAX_PROCESSES && !self.lives.contains_key(&process) {
            return Err(Error::Crowded);
        }
        self.lives.insert(process, Life::Awaited);
        Ok(())
    }

    /// The guest has no record of a process, or drops it.
    pub(super) fn forget(&mut self, process: u64) {
        self.lives.remove(&process);
    }

    /// Nobody wants to know of a process any more. One whose end was fetched is not known here.
    pub(super) fn abandon(&mut self, process: u64) {
        if let Some(life @ Life::Awaited) = self.lives.get_mut(&process) {
            *life = if self.exits.remove(&process).is_some() { Life::Over } else { Life::Abandoned };
        }
    }

    /// The guest reports an exit; an error is a breach of the protocol.
    pub(super) fn exited(&mut self, process: u64, status: ExitStatus) -> Result<(), &'static str> {
        if let Some(life @ (Life::Abandoned | Life::Over)) = self.lives.get_mut(&process) {
            *life = Life::Over;
            return Ok(());
        }
        if self.exits.len() >= 2 * MAX_PROCESSES && !self.exits.contains_key(&process) {
            return Err("it reported more exits than it may have processes");
        }
        self.exits.entry(process).or_insert(status);
        Ok(())
    }

    /// How a process ended, once; `None` while that is not known.
    pub(super) fn fetch(&mut self, process: u64) -> Option<Result<ExitStatus>> {
        if let Some(Life::Abandoned | Life::Over) = self.lives.get(&process) {
            return Some(Err(Error::Abandoned));
        }
        let status = self.exits.remove(&process)?;
        self.lives.remove(&process);
        Some(Ok(status))
    }

    /// Those that were given up and have ended since.
    pub(super) fn over(&self) -> Vec<u64> {
        self.lives.iter().filter(|(_, life)| **life == Life::Over).map(|(process, _)| *process).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OK: ExitStatus = ExitStatus::Code(0);

    #[test]
    fn a_guest_has_no_more_processes_than_it_may_whether_they_are_given_up_or_not() {
        let mut lives = Lives::default();
        for process in 0..MAX_PROCESSES as u64 {
            lives.begin(process).unwrap();
            lives.abandon(process);
        }
        assert!(matches!(lives.begin(9999), Err(Error::Crowded)));
        lives.exited(7, OK).unwrap();
        assert!(matches!(lives.begin(9999), Err(Error::Crowded)), "it is still on the guest's record");
        assert_eq!(lives.over(), [7]);
        lives.forget(7);
        lives.begin(9999).unwrap();
    }

    #[test]
    fn an_end_that_was_fetched_makes_room() {
        let mut lives = Lives::default();
        for process in 0..3 * MAX_PROCESSES as u64 {
            lives.begin(process).unwrap();
            assert!(lives.fetch(process).is_none());
            lives.exited(process, OK).unwrap();
            assert_eq!(lives.fetch(process).unwrap().unwrap(), OK);
            lives.abandon(process);
            assert!(lives.fetch(process).is_none(), "it is not known any more");
        }
    }

    #[test]
    fn the_end_of_a_process_that_was_given_up_is_nobodys_whenever_it_comes() {
        let mut lives = Lives::default();
        for process in [1, 2] {
            lives.begin(process).unwrap();
        }
        lives.exited(1, OK).unwrap();
        lives.abandon(1);
        lives.abandon(2);
        assert_eq!(lives.over(), [1]);
        lives.exited(2, OK).unwrap();
        lives.exited(2, OK).unwrap();
        assert_eq!(lives.over(), [1, 2]);
        for process in [1, 2] {
            assert!(matches!(lives.fetch(process), Some(Err(Error::Abandoned))));
        }
    }

    #[test]
    fn exits_of_processes_nobody_started_are_bounded() {
        let mut lives = Lives::default();
        let flood = (0..10_000).find(|&process| lives.exited(process, OK).is_err());
        assert_eq!(flood, Some(2 * MAX_PROCESSES as u64));
    }
}
