//! Ways in to what reads bytes of others, for the fuzz targets: each says whether the bytes made sense.

pub mod owner;

pub use crate::agent::fuzzing as agent;
pub use crate::image::fuzzing as image;
pub use crate::net::fuzzing as net;
pub use crate::snapshot::fuzzing as snapshot;
pub use crate::state::fuzzing as state;
pub use crate::template::fuzzing as template;

use std::path::Path;

use crate::{cgroup, container, sandbox, usage};

/// `/proc/self/cgroup`.
pub fn cgroups(text: &str) -> bool {
    ["memory", "pids", ""].map(|controller| cgroup::find(text, controller).is_some()).contains(&true)
}

/// `/proc/self/mountinfo`: where groups account.
pub fn mountinfo(text: &str) -> bool {
    !sandbox::hierarchies(text).is_empty()
}

/// The place in a hierarchy that a specification names.
///
/// # Panics
/// It leads out of the hierarchy.
pub fn cgroup_place(text: &str) -> bool {
    let place = sandbox::place(Path::new(text));
    if let Some(place) = &place {
        let plain = place.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        assert!(plain && place.is_relative(), "{place:?}");
    }
    place.is_some()
}

/// `/proc/PID/stat`.
pub fn stat(text: &str) -> bool {
    usage::parse_stat(text).is_some()
}

/// `/proc/meminfo`, and `/proc/zoneinfo`.
pub fn meminfo(text: &str) -> bool {
    let _ = usage::kept_by_cpus(text);
    usage::KernelMemory::of(text) != usage::KernelMemory::default()
}

/// `/proc/PID/smaps` of a machine of so much memory.
pub fn smaps(text: &str, memory_bytes: u64) -> bool {
    container::Cost::sum(text, memory_bytes).total_kib() > 0
}
