//! The stages of a container's start: what was done, on whose part, from when to when.
//!
//! Whoever does something opens a stage and closes it by dropping it, so that stages of one track lie within or
//! behind each other, and one that fails has its end too. What people read ([`Timeline`]'s `Display`) and what
//! programs draw are made of the same list.

mod machine;
mod text;

use std::borrow::Cow;
use std::cmp::Reverse;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mvm_vmm::status::now;
use serde::{Deserialize, Serialize};

/// Most stages that are written down: a sandbox may live on for months after its start.
const MOST: usize = 512;

/// The start of a machine's process; [`Timeline::since_spawn`] counts from there.
pub(crate) const SPAWN: &str = "spawn mvm-vmm";
/// From the agent's call until it was answered; its end is the agent's hello.
pub const GREET: &str = "greet agent";
/// What a machine that was made of a template gets afterwards.
pub const PLUG: &str = "plug disks and cards in";
/// A machine that was made of a template is told the time; how sure it is after that is its detail.
pub const CLOCK: &str = "put clock right";
/// The guest, as long as the machine's process lives.
pub const GUEST: &str = "run guest";
/// The request that starts a process.
pub const START: &str = "start process";

/// On whose part something is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Track {
    /// The process that starts the container.
    Host,
    /// The same process, beside that.
    Beside,
    /// The machine's process, by its own account.
    Machine,
    /// The guest, by its own clock, put onto the host's.
    Guest,
    /// The guest as the host sees it: what it was asked until it answered.
    Agent,
}

/// Something that took time, or happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// On whose part.
    pub track: Track,
    /// What.
    pub name: Cow<'static, str>,
    /// What else there is to say of it.
    pub detail: Option<String>,
    /// When it began, on CLOCK_MONOTONIC in nanoseconds.
    pub begin_ns: u64,
    /// When it ended, on the same clock; `None` as long as it has not. What ended as it began is a moment.
    pub end_ns: Option<u64>,
}

impl Stage {
    /// Whether it merely happened.
    pub fn is_moment(&self) -> bool {
        self.end_ns == Some(self.begin_ns)
    }
}

/// Stages, written down as they begin and end. Clones write to the same list.
#[derive(Clone, Debug, Default)]
pub struct Timeline(Arc<Mutex<Vec<Stage>>>);

/// A stage that has not ended; it does when this is dropped.
#[derive(Debug)]
#[must_use = "the stage ends when this is dropped"]
pub struct Open {
    timeline: Timeline,
    /// Its place in the list; `None` if the list was full.
    place: Option<usize>,
}

impl Timeline {
    fn list(&self) -> MutexGuard<'_, Vec<Stage>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, stage: Stage) -> Option<usize> {
        let mut list = self.list();
        let place = list.len();
        (place < MOST).then(|| {
            list.push(stage);
            place
        })
    }

    /// A stage begins now.
    pub fn begin(&self, track: Track, name: impl Into<Cow<'static, str>>) -> Open {
        self.begin_at(track, name, now())
    }

    /// A stage that began at `begin_ns` and has not ended.
    pub fn begin_at(&self, track: Track, name: impl Into<Cow<'static, str>>, begin_ns: u64) -> Open {
        let place = self.push(Stage { track, name: name.into(), detail: None, begin_ns, end_ns: None });
        Open { timeline: self.clone(), place }
    }

    /// A stage that has ended. One that ends before it begins is a moment.
    pub fn note(&self, track: Track, name: impl Into<Cow<'static, str>>, (begin_ns, end_ns): (u64, u64)) {
        let end_ns = Some(end_ns.max(begin_ns));
        self.push(Stage { track, name: name.into(), detail: None, begin_ns, end_ns });
    }

    /// Something happens now.
    pub fn moment(&self, track: Track, name: impl Into<Cow<'static, str>>) {
        let now = now();
        self.note(track, name, (now, now));
    }

    /// Adds what another process has written down.
    pub fn extend(&self, stages: Vec<Stage>) {
        for stage in stages {
            self.push(stage);
        }
    }

    /// All stages, in the order in which they began; one that lies within another comes after it.
    pub fn stages(&self) -> Vec<Stage> {
        let mut stages = self.list().clone();
        let last = |stage: &Stage| Reverse(stage.end_ns.unwrap_or(u64::MAX));
        stages.sort_by_key(|stage| (stage.begin_ns, stage.track, last(stage)));
        stages
    }

    /// The stages that have ended, by their ends since the last start of a machine's process, in nanoseconds.
    pub fn since_spawn(&self) -> Vec<(Cow<'static, str>, u64)> {
        let stages = self.stages();
        let spawned = stages.iter().rev().find(|stage| stage.name == SPAWN).map_or(0, |stage| stage.begin_ns);
        let ends =
            stages.into_iter().filter_map(|stage| Some((stage.end_ns?.checked_sub(spawned)?, stage.name)));
        let mut ends: Vec<_> = ends.map(|(end, name)| (name, end)).collect();
        ends.sort_by_key(|(_, end)| *end);
        ends
    }
}

impl Open {
    /// It ended then, not now.
    pub(crate) fn end_at(mut self, end_ns: u64) {
        let mut list = self.timeline.list();
        if let Some(stage) = self.place.and_then(|place| list.get_mut(place)) {
            stage.end_ns = Some(end_ns.max(stage.begin_ns));
        }
        drop(list);
        self.place = None;
    }

    /// Says more about it.
    pub fn detail(&self, text: impl Into<String>) {
        let mut list = self.timeline.list();
        if let Some(stage) = self.place.and_then(|place| list.get_mut(place)) {
            stage.detail = Some(text.into());
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let now = now();
        let mut list = self.timeline.list();
        if let Some(stage) = self.place.and_then(|place| list.get_mut(place)) {
            // One nanosecond at least: what a coarse clock saw end at once was no moment.
            stage.end_ns = Some(now.max(stage.begin_ns.saturating_add(1)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(timeline: &Timeline) -> Vec<String> {
        timeline.stages().into_iter().map(|stage| stage.name.into_owned()).collect()
    }

    #[test]
    fn a_stage_ends_when_it_is_dropped_also_by_a_failure() {
        let timeline = Timeline::default();
        let fails = || -> Option<()> {
            let _outer = timeline.begin(Track::Host, "outer");
            let inner = timeline.begin(Track::Host, "inner");
            inner.detail("deep");
            assert!(timeline.stages().iter().all(|stage| stage.end_ns.is_none()));
            None?
        };
        assert!(fails().is_none());
        let stages = timeline.stages();
        assert_eq!(names(&timeline), ["outer", "inner"]);
        assert_eq!(stages[1].detail.as_deref(), Some("deep"));
        assert!(stages[0].end_ns >= stages[1].end_ns && stages[1].end_ns > Some(stages[1].begin_ns));
        assert!(stages.iter().all(|stage| !stage.is_moment()));
    }

    #[test]
    fn stages_are_told_in_the_order_they_began_the_outer_one_first() {
        let timeline = Timeline::default();
        timeline.note(Track::Machine, "third", (7, 9));
        timeline.note(Track::Host, "second", (5, 6));
        timeline.note(Track::Host, "first", (5, 8));
        let open = timeline.begin_at(Track::Host, "all", 5);
        timeline.note(Track::Host, "backwards", (9, 1));
        assert_eq!(names(&timeline), ["all", "first", "second", "third", "backwards"]);
        assert!(timeline.stages()[4].is_moment());
        drop(open);
    }

    #[test]
    fn ends_are_counted_from_the_last_machine_that_was_started() {
        let timeline = Timeline::default();
        timeline.note(Track::Host, SPAWN, (10, 20));
        timeline.note(Track::Host, GREET, (20, 25));
        timeline.note(Track::Host, SPAWN, (30, 31));
        timeline.note(Track::Host, GREET, (40, 55));
        timeline.note(Track::Machine, "load", (32, 35));
        let _open = timeline.begin_at(Track::Host, "open", 33);
        let ends = timeline.since_spawn();
        assert_eq!(ends, [(SPAWN.into(), 1), ("load".into(), 5), (GREET.into(), 25)]);
    }

    #[test]
    fn a_sandbox_that_lives_long_does_not_write_for_ever() {
        let timeline = Timeline::default();
        for _ in 0..2 * MOST {
            timeline.moment(Track::Host, "again");
        }
        timeline.begin(Track::Host, "late").detail("nowhere");
        assert_eq!(timeline.stages().len(), MOST);
    }

    #[test]
    fn what_another_process_wrote_down_reads_as_it_was() {
        let (ours, theirs) = (Timeline::default(), Timeline::default());
        theirs.note(Track::Agent, "set up container", (1, 2));
        let _open = theirs.begin_at(Track::Machine, GUEST, 3);
        let text = serde_json::to_string(&theirs.stages()).unwrap();
        ours.extend(serde_json::from_str(&text).unwrap());
        assert_eq!(ours.stages(), theirs.stages());
    }
}
