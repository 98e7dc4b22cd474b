//! What is done while a process is watched: from nothing to nothing, if nobody is killed.

use super::tracer::Victim;
use super::world::Place;

/// A command that is watched, with what comes before and after.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// Which process is watched.
    pub victim: Victim,
    /// Where its files are.
    pub place: Place,
    /// Commands before.
    pub before: &'static [&'static [&'static str]],
    /// The owner of what was started is killed before.
    pub orphaned: bool,
    /// The command.
    pub command: &'static [&'static str],
    /// Commands after it, for as long as they work.
    pub after: &'static [&'static [&'static str]],
    /// Among those that are tried at every change.
    pub quick: bool,
}

/// The container's name in all scenarios.
pub(super) const NAME: &str = "x";
const DETACHED: &[&str] =
    &["run", "--detach", "--name", NAME, "--net", "none", super::world::IMAGE, "--", "sleep"];
const NAT: &[&str] = &[
    "run",
    "--detach",
    "--name",
    NAME,
    "--net",
    "nat",
    "--publish",
    "127.0.0.1:8080:80",
    super::world::IMAGE,
    "--",
    "sleep",
];
const DISK: &[&str] = &[
    "run",
    "--detach",
    "--name",
    NAME,
    "--net",
    "host-only",
    "--disk-size",
    "16M",
    super::world::IMAGE,
    "--",
    "sleep",
];
/// A container that ends at once.
pub(super) const RUN: &[&str] = &["run", "--name", NAME, "--net", "nat", super::world::IMAGE, "--", "true"];
const STOP: &[&str] = &["stop", "--time", "0", NAME];
const REMOVE: &[&str] = &["rm", NAME];

const PLAIN: Scenario = Scenario {
    name: "",
    victim: Victim::Owner,
    place: Place::Memory,
    before: &[],
    orphaned: false,
    command: NAT,
    after: &[],
    quick: false,
};

/// All of them.
pub const SCENARIOS: [Scenario; 12] = [
    Scenario { name: "owner", command: DETACHED, after: &[STOP, REMOVE], ..PLAIN },
    Scenario { name: "owner with nat", after: &[STOP, REMOVE], quick: true, ..PLAIN },
    Scenario { name: "owner with a disk", command: DISK, after: &[STOP, REMOVE], ..PLAIN },
    Scenario { name: "run --detach", victim: Victim::Command, after: &[STOP, REMOVE], quick: true, ..PLAIN },
    Scenario { name: "run", victim: Victim::Command, command: RUN, ..PLAIN },
    Scenario {
        name: "stop",
        victim: Victim::Command,
        before: &[NAT],
        command: STOP,
        after: &[REMOVE],
        quick: true,
        ..PLAIN
    },
    Scenario {
        name: "rm",
        victim: Victim::Command,
        before: &[NAT, STOP],
        command: REMOVE,
        quick: true,
        ..PLAIN
    },
    Scenario {
        name: "rm --force",
        victim: Victim::Command,
        before: &[NAT],
        command: &["rm", "--force", NAME],
        quick: true,
        ..PLAIN
    },
    Scenario {
        name: "gc",
        victim: Victim::Command,
        before: &[NAT],
        orphaned: true,
        command: &["gc"],
        after: &[REMOVE],
        quick: true,
        ..PLAIN
    },
    Scenario {
        name: "rm on a disk",
        place: Place::Disk,
        victim: Victim::Command,
        before: &[NAT, STOP],
        command: REMOVE,
        quick: true,
        ..PLAIN
    },
    Scenario { name: "image", place: Place::Cold, victim: Victim::Command, command: RUN, ..PLAIN },
    Scenario { name: "machine", victim: Victim::Machine, after: &[STOP, REMOVE], ..PLAIN },
];
