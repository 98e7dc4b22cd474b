//! Every seed of every target once, without libFuzzer: none panics, and together they reach what the target declares.

use std::collections::BTreeSet;

use mvm_fuzz::{Reach, all};

#[test]
fn every_seed_is_survived_and_together_they_reach_what_they_must() {
    let mut unreached = Vec::new();
    for target in all() {
        let mut reach = Reach::default();
        for seed in (target.seeds)() {
            reach.merge(&target.once(&seed));
        }
        let missing = target.reaches.iter().filter(|name| reach.get(name) == 0);
        unreached.extend(missing.map(|name| format!("{}: {name} of {reach:?}", target.name)));
    }
    assert!(unreached.is_empty(), "{unreached:#?}");
}

#[test]
fn every_target_has_a_name_of_its_own_and_declares_what_it_reaches() {
    let names: BTreeSet<_> = all().iter().map(|target| target.name).collect();
    assert_eq!(names.len(), all().len());
    assert!(names.len() >= 30, "{names:?}");
    assert!(all().iter().all(|target| !target.reaches.is_empty()));
}
