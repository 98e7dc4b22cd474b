//! The end of a sandbox's machine: its guest is asked what is kept of it, for a time, and to end.

use std::time::{Duration, Instant};

use mvm_protocol::ShutdownMode;

use super::machine::MachineSandbox;
use super::member::Member;
use super::stage::Live;
use crate::container::{END_TIME, GRACE};
use crate::failure::Failure;
use crate::timeline::Track;

/// Time a guest gets, for all of it together, to tell what is kept of it and to let go of what is the host's.
pub(super) const ASKING_TIME: Duration = Duration::from_secs(20);

impl MachineSandbox {
    /// Ends the machine, in order if it has disks whose content is kept. A guest that has not told by `end` what else
    /// is kept, and begun to end, ends there.
    pub(super) fn end_machine(&self, end: Instant) -> Result<(), Failure> {
        self.stages.abandon("it was never started");
        let Some(live) = self.stages.live() else { return Ok(()) };
        let _stage = self.timeline.begin(Track::Host, "end machine");
        let keeps = self.members().values().any(Member::keeps_writes);
        let ends = self.stages.ask_by(&live, end, || {
            self.write_back(&live, end);
            self.stages.expect_end();
            keeps && live.agent.shut_down(ShutdownMode::PowerOff, GRACE).is_ok()
        });
        let in_order = ends && self.stages.wait_at_most(GRACE + END_TIME);
        if !in_order {
            self.stages.kill(&live)?;
        }
        self.stages.wait();
        Ok(())
    }

    /// Brings what containers wrote to the host's files there. Whoever makes or removes one at this moment is waited
    /// for only if the guest answers: else it may take a minute.
    fn write_back(&self, live: &Live, end: Instant) {
        match self.changing.try_lock() {
            Ok(mut shares) => shares.write_back(&live.agent, None, end),
            Err(_) if live.agent.answers() => self.changing().write_back(&live.agent, None, end),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::mpsc;

    use mvm_protocol::{GuestMessage, Reply, encode};

    use super::*;
    use crate::agent::tests::hostile::{client, read_frames};
    use crate::machine::machine;
    use crate::sandbox::Sandbox;
    use crate::sandbox::machine::tests::{alone, planned};

    #[test]
    fn a_machine_ends_in_time_though_its_guest_answers_and_its_containers_are_being_changed() {
        let dir = tempfile::tempdir().unwrap();
        let sandbox = planned(dir.path(), alone()).unwrap();
        let (agent, mut guest) = client();
        sandbox.stages.start(machine("/bin/sleep", 60), agent).unwrap();
        let (held, is_held) = mpsc::channel();
        std::thread::scope(|scope| {
            // Whoever has it is done with the guest when there is none any more.
            scope.spawn(|| {
                let changing = sandbox.changing();
                held.send(()).unwrap();
                sandbox.stages.wait();
                drop(changing);
            });
            is_held.recv().unwrap();
            scope.spawn(|| {
                // The answer to its hello, and one question.
                read_frames(&mut guest, 2);
                let answer = GuestMessage::Response { id: 1, result: Ok(Reply::Done) };
                guest.write_all(&encode(&answer).unwrap()).unwrap();
            });
            sandbox.end_machine(Instant::now() + Duration::from_millis(200)).unwrap();
        });
        assert_eq!(sandbox.wait_machine(), "it was ended");
    }
}
