//! A machine's guest is given memory, and asked to give it back.
//!
//! Whatever fails on the way, what is known of it stays true, so that the next change can go on from there.

use std::io::ErrorKind;
use std::thread;
use std::time::{Duration, Instant};

use mvm_vmm::config::MemSize;

use crate::agent::AgentClient;
use crate::failure::{Context, Failure};
use crate::machine::{Control, Memory};
use crate::snapshot::SavedGrowth;

/// How often it is looked whether a guest has plugged what it was given, and how far apart what is busy is asked again.
const INTERVAL: Duration = Duration::from_millis(10);
/// How long something may be busy before a machine is not saved for it, or does not go on.
const BUSY_TIME: Duration = Duration::from_secs(2);

/// What a machine was given beyond its size. It has been asked for more than its guest has only if a growth failed, and
/// could not be taken back either.
#[derive(Debug, Default)]
pub(super) struct Growth {
    /// It has the device for it.
    pub(super) is_attached: bool,
    /// What its guest has had in all, in MiB, if that is more than its size.
    mib: u64,
    /// What it was asked to have in all, in MiB, if that is more than its size.
    asked_mib: u64,
}

/// Who is given memory.
#[derive(Debug)]
pub(super) struct Guest<'a> {
    pub(super) control: &'a Control,
    pub(super) agent: &'a AgentClient,
    /// How long it may take to plug it.
    pub(super) patience: Duration,
}

impl Growth {
    /// Gives the guest `wanted` MiB in all, if it has less, and waits until it has them. At first it is given what plugs
    /// them: up to `pluggable` MiB.
    pub(super) fn grow(&mut self, guest: &Guest<'_>, pluggable: u64, wanted: u64) -> Result<(), Failure> {
        if wanted <= self.mib {
            return Ok(());
        }
        self.attach(guest, pluggable)?;
        let found = guest.agent.rescan().context(|| "cannot have the guest look for its memory".to_owned());
        self.asked_mib = self.asked_mib.max(wanted);
        if let Err(failure) = found.and_then(|()| guest.plug(wanted)) {
            // What it has plugged is of no use to anybody now.
            if let Err(failure) = self.ask(guest.control, self.mib) {
                log::warn!("{}", failure.report());
            }
            return Err(failure);
        }
        (self.mib, self.asked_mib) = (wanted, wanted);
        Ok(())
    }

    /// Has the guest give back what makes it more than `wanted` MiB.
    pub(super) fn shrink(&mut self, control: &Control, wanted: u64) -> Result<(), Failure> {
        if wanted >= self.asked_mib { Ok(()) } else { self.ask(control, wanted) }
    }

    /// Has the guest have no more than `mib` in all.
    fn ask(&mut self, control: &Control, mib: u64) -> Result<(), Failure> {
        control.memory(Some(mib))?;
        (self.mib, self.asked_mib) = (self.mib.min(mib), mib);
        Ok(())
    }

    /// That of a machine of `ram` that goes on with what it had been given.
    pub(super) fn going(control: &Control, ram: MemSize) -> Result<Self, Failure> {
        let end = Instant::now() + BUSY_TIME;
        let Memory { size_mib, plugged_mib, .. } = patiently(end, || control.memory(None))?;
        let beyond = |mib: u64| if mib > ram.mib() { mib } else { 0 };
        // One that was still plugging when it was saved has less than it was asked to have.
        Ok(Self {
            is_attached: true,
            mib: beyond(size_mib.min(plugged_mib)),
            asked_mib: beyond(size_mib.max(plugged_mib)),
        })
    }

    /// What is saved of it with a machine of `ram`.
    pub(super) fn saved(&self, control: &Control, ram: MemSize) -> Result<Option<SavedGrowth>, Failure> {
        if !self.is_attached {
            return Ok(None);
        }
        let end = Instant::now() + BUSY_TIME;
        let Memory { max_mib, usable_mib, .. } = patiently(end, || control.memory(None))?;
        let [most_mib, usable_mib] = [max_mib, usable_mib].map(|mib| mib.saturating_sub(ram.mib()));
        Ok(Some(SavedGrowth { most_mib, usable_mib }))
    }

    fn attach(&mut self, guest: &Guest<'_>, pluggable: u64) -> Result<(), Failure> {
        if self.is_attached {
            return Ok(());
        }
        let end = Instant::now() + guest.patience;
        let attached = patiently(end, || guest.control.attach_memory(pluggable));
        // It may be there in spite of that: whoever attached it may not have come to know.
        if let Err(failure) = attached
            && patiently(end, || guest.control.memory(None)).is_err()
        {
            return Err(failure);
        }
        self.is_attached = true;
        Ok(())
    }
}

impl Guest<'_> {
    /// Waits until it has plugged what makes it `mib` in all.
    fn plug(&self, mib: u64) -> Result<(), Failure> {
        let end = Instant::now() + self.patience;
        let mut now = patiently(end, || self.control.memory(Some(mib)))?;
        while now.plugged_mib < now.size_mib {
            if Instant::now() >= end {
                let has =
                    format!("the guest has {} of the {} MiB it was given", now.plugged_mib, now.size_mib);
                return Err(Failure::new(has).help("its kernel needs CONFIG_VIRTIO_MEM: use the one of mvm"));
            }
            thread::sleep(INTERVAL);
            now = patiently(end, || self.control.memory(None))?;
        }
        Ok(())
    }
}

/// Asks until the answer is another than that something is busy, or `end` has come.
fn patiently<T>(end: Instant, mut ask: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
    loop {
        match ask() {
            Err(failure)
                if failure.source_kind() == Some(ErrorKind::ResourceBusy) && Instant::now() < end =>
            {
                thread::sleep(INTERVAL);
            }
            answer => return answer,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use mvm_protocol::{Failure as Refusal, FailureKind, GuestMessage, Reply, encode};

    use super::*;
    use crate::agent::tests::hostile::{client, read_frames};
    use crate::machine::{answering, busy};

    const ATTACHED: &str = r#"{"ok":{"device":5}}"#;
    const BUSY: &str = r#"{"busy":"a device is busy"}"#;
    const THERE: &str = r#"{"error":"there is such a device already"}"#;
    const NONE: &str = r#"{"ok":{"size_mib":128,"plugged_mib":128,"max_mib":1152,"usable_mib":640}}"#;
    const ASKED: &str = r#"{"ok":{"size_mib":640,"plugged_mib":128,"max_mib":1152,"usable_mib":640}}"#;
    const HALF: &str = r#"{"ok":{"size_mib":640,"plugged_mib":512,"max_mib":1152,"usable_mib":640}}"#;
    const WHOLE: &str = r#"{"ok":{"size_mib":640,"plugged_mib":640,"max_mib":1152,"usable_mib":640}}"#;

    const ATTACH: &str = r#"{"command":"attach","device":{"type":"mem","size_mib":1024}}"#;
    const GIVE: &str = r#"{"command":"memory","size_mib":640}"#;
    const TAKE: &str = r#"{"command":"memory","size_mib":0}"#;
    const LOOK: &str = r#"{"command":"memory"}"#;

    /// An agent that looks for devices as often as it is asked to, and of which these attempts fail.
    fn agent(failing: &'static [u64]) -> AgentClient {
        let (client, mut agent) = client();
        // The answer to its hello comes first.
        read_frames(&mut agent, 1);
        thread::spawn(move || {
            for id in 1.. {
                if !heard(&mut agent) {
                    return;
                }
                let message = "cannot look".to_owned();
                let refusal = Refusal { kind: FailureKind::System, errno: 0, message };
                let result = if failing.contains(&id) { Err(refusal) } else { Ok(Reply::Done) };
                let _ = agent.write_all(&encode(&GuestMessage::Response { id, result }).unwrap());
            }
        });
        client
    }

    /// Whether there was another request, or the client has gone.
    fn heard(agent: &mut UnixStream) -> bool {
        let mut length = [0; 4];
        let more = std::io::Read::read_exact(agent, &mut length).is_ok();
        let mut payload = vec![0; u32::from_le_bytes(length) as usize];
        more && std::io::Read::read_exact(agent, &mut payload).is_ok()
    }

    /// Grows by these growths one after another, to the answers; what came of each, and what was asked.
    fn grow(
        growth: &mut Growth,
        (agent, patience): (&AgentClient, Duration),
        answers: &'static [&str],
        wanted: &[u64],
    ) -> (Vec<String>, Vec<String>) {
        let (control, host) = answering(answers);
        let guest = Guest { control: &control, agent, patience };
        let said = wanted.iter().map(|wanted| match growth.grow(&guest, 1024, *wanted) {
            Ok(()) => String::new(),
            Err(failure) => failure.report(),
        });
        let said = said.collect();
        drop(control);
        (said, host.join().unwrap())
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_guest_is_waited_for_until_it_has_what_it_was_given() {
        let (agent, mut growth) = (agent(&[]), Growth::default());
        let answers = &[ATTACHED, ASKED, HALF, WHOLE];
        let (said, asked) = grow(&mut growth, (&agent, LONG), answers, &[640, 640, 600]);
        assert_eq!(said, ["", "", ""]);
        assert_eq!(asked, [ATTACH, GIVE, LOOK, LOOK], "what it has is not asked for again");
        assert!(growth.is_attached);
    }

    #[test]
    fn what_is_busy_for_a_moment_is_asked_again() {
        let (agent, mut growth) = (agent(&[]), Growth::default());
        let answers = &[BUSY, ATTACHED, BUSY, ASKED, BUSY, BUSY, WHOLE];
        let (said, asked) = grow(&mut growth, (&agent, LONG), answers, &[640]);
        assert_eq!(said, [""]);
        assert_eq!(asked, [ATTACH, ATTACH, GIVE, GIVE, LOOK, LOOK, LOOK]);
    }

    #[test]
    fn what_is_busy_for_ever_is_waited_for_no_longer_than_a_guest_and_can_be_given_later() {
        let (agent, mut growth) = (agent(&[]), Growth::default());
        growth.is_attached = true;
        let short = Duration::from_millis(50);
        let (control, host) = busy();
        let failure = growth.grow(&Guest { control: &control, agent: &agent, patience: short }, 1024, 640);
        let report = failure.unwrap_err().report();
        assert!(report.contains("a device is busy"), "{report}");
        drop(control);
        assert_eq!(
            host.join().unwrap().last().map(String::as_str),
            Some(TAKE),
            "what it may have is taken back"
        );
        // It could not be, and is before long.
        assert_eq!((growth.mib, growth.asked_mib), (0, 640));
        let (control, host) = answering(&[NONE, ASKED, WHOLE]);
        growth.shrink(&control, 128).unwrap();
        growth.shrink(&control, 128).unwrap();
        growth.grow(&Guest { control: &control, agent: &agent, patience: LONG }, 1024, 640).unwrap();
        assert_eq!(host.join().unwrap(), [r#"{"command":"memory","size_mib":128}"#, GIVE, LOOK]);
    }

    #[test]
    fn a_guest_that_plugs_nothing_is_given_nothing_and_may_plug_later() {
        let (agent, mut growth) = (agent(&[]), Growth::default());
        let short = (&agent, Duration::ZERO);
        let (said, asked) = grow(&mut growth, short, &[ATTACHED, ASKED, NONE], &[640]);
        assert!(
            said[0].contains("has 128 of the 640 MiB") && said[0].contains("CONFIG_VIRTIO_MEM"),
            "{said:?}"
        );
        assert_eq!(asked, [ATTACH, GIVE, TAKE]);
        assert!(growth.is_attached, "by one alone");
        let (said, asked) = grow(&mut growth, (&agent, LONG), &[ASKED, WHOLE], &[640]);
        assert_eq!((said, asked), (vec![String::new()], vec![GIVE.to_owned(), LOOK.to_owned()]));
    }

    #[test]
    fn a_guest_whose_agent_fails_is_given_no_second_device() {
        let (agent, mut growth) = (agent(&[1]), Growth::default());
        let answers = &[ATTACHED, NONE, ASKED, WHOLE];
        let (said, asked) = grow(&mut growth, (&agent, LONG), answers, &[640, 640]);
        assert!(said[0].contains("cannot have the guest look for its memory"), "{said:?}");
        assert_eq!(said[1], "");
        assert_eq!(asked, [ATTACH, TAKE, GIVE, LOOK]);
    }

    #[test]
    fn a_device_that_is_there_in_spite_of_a_failure_is_used_and_one_that_is_not_is_attached_next_time() {
        let (agent, mut growth) = (agent(&[]), Growth::default());
        let (said, asked) = grow(&mut growth, (&agent, LONG), &[THERE, NONE, WHOLE], &[640]);
        assert_eq!(said, [""]);
        assert_eq!(asked, [ATTACH, LOOK, GIVE]);
        let (full, none) = (r#"{"error":"the bus is full"}"#, r#"{"error":"it is without the device"}"#);
        let mut growth = Growth::default();
        let answers = [full, none, ATTACHED, WHOLE].to_vec().leak();
        let (said, asked) = grow(&mut growth, (&agent, LONG), answers, &[640, 640]);
        assert!(said[0].contains("the bus is full") && said[1].is_empty(), "{said:?}");
        assert_eq!(asked, [ATTACH, LOOK, ATTACH, GIVE]);
    }

    #[test]
    fn after_an_answer_that_was_lost_nothing_is_attached_a_second_time() {
        let (agent, mut growth) = (agent(&[]), Growth::default());
        let (control, host) = answering(&[]);
        host.join().unwrap();
        let guest = Guest { control: &control, agent: &agent, patience: LONG };
        for _ in 0..2 {
            let report = growth.grow(&guest, 1024, 640).unwrap_err().report();
            assert!(report.contains("cannot attach more memory"), "{report}");
        }
        assert!(!growth.is_attached);
    }

    #[test]
    fn what_is_refused_is_not_waited_for_and_what_cannot_be_taken_back_is_tried_again() {
        let (agent, mut growth) = (agent(&[]), Growth::default());
        let refused = r#"{"error":"640 MiB are more than this machine can have"}"#;
        let answers = [ATTACHED, refused, NONE].to_vec().leak();
        let (said, _) = grow(&mut growth, (&agent, LONG), answers, &[640]);
        assert!(said[0].contains("more than this machine can have"), "{said:?}");
        let (said, _) = grow(&mut growth, (&agent, LONG), &[WHOLE], &[640]);
        assert_eq!(said, [""]);
        let (control, host) = answering(&[BUSY, NONE]);
        growth.shrink(&control, 640).unwrap();
        growth.shrink(&control, 128).unwrap_err();
        growth.shrink(&control, 128).unwrap();
        growth.shrink(&control, 128).unwrap();
        let take = r#"{"command":"memory","size_mib":128}"#;
        assert_eq!(host.join().unwrap(), [take, take]);
        assert_eq!((growth.mib, growth.asked_mib), (128, 128));
    }

    #[test]
    fn a_machine_that_goes_on_has_what_it_was_given_when_it_was_saved_and_the_same_device() {
        let ram = MemSize::try_from(128).unwrap();
        let unplugged = Growth::default();
        let (control, host) = answering(&[WHOLE, BUSY, HALF, NONE, BUSY, WHOLE]);
        assert_eq!(unplugged.saved(&control, ram).unwrap(), None, "nothing is asked");
        let known = |growth: &Growth| (growth.is_attached, growth.mib, growth.asked_mib);
        let mut growth = Growth::going(&control, ram).unwrap();
        assert_eq!(known(&growth), (true, 640, 640));
        assert_eq!(known(&Growth::going(&control, ram).unwrap()), (true, 512, 640));
        assert_eq!(known(&Growth::going(&control, ram).unwrap()), (true, 0, 0));
        let saved = growth.saved(&control, ram).unwrap();
        assert_eq!(saved, Some(SavedGrowth { most_mib: 1024, usable_mib: 512 }));
        drop(control);
        assert_eq!(host.join().unwrap(), [LOOK; 6]);
        let agent = agent(&[]);
        let (said, asked) = grow(&mut growth, (&agent, LONG), &[], &[640]);
        assert_eq!((said, asked), (vec![String::new()], Vec::new()), "it has that");
    }
}
