//! The list of targets, and what they have in common.

mod agent;
mod devices;
mod images;
mod machine;
mod records;
mod specs;
mod texts;

use mvm_devices::testing::hostile::Reach;

use crate::Target;

/// Every target there is.
pub fn all() -> Vec<Target> {
    [
        devices::TARGETS,
        machine::TARGETS,
        agent::TARGETS,
        images::TARGETS,
        records::TARGETS,
        specs::TARGETS,
        texts::TARGETS,
    ]
    .concat()
}

/// Most MiB that a text or a document takes.
const LITTLE: usize = 16;

/// A target without an opinion of its own about memory.
const fn target(
    name: &'static str,
    run: fn(&[u8], &mut Reach),
    seeds: fn() -> Vec<Vec<u8>>,
    reaches: &'static [&'static str],
) -> Target {
    Target { name, run, seeds, reaches, most_mib: LITTLE }
}

/// Counts whether something was accepted or refused.
fn told(reach: &mut Reach, accepted: bool) {
    reach.add(if accepted { "accepted" } else { "refused" }, 1);
}

/// What [`told`] must have counted.
const BOTH: &[&str] = &["accepted", "refused"];

/// Texts as seeds.
fn texts(all: &[&str]) -> Vec<Vec<u8>> {
    all.iter().map(|text| text.as_bytes().to_vec()).collect()
}
