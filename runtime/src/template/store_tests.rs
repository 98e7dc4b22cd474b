//! Templates as files: no machine is booted here.

use super::super::recipe::{Parts, Recipe};
use super::*;

/// Templates of a cache directory, and the files they are made of.
pub(in super::super) struct Cache {
    dir: tempfile::TempDir,
    pub(in super::super) templates: Templates,
}

impl Cache {
    pub(in super::super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let templates = Templates::of(dir.path());
        templates.make_root().unwrap();
        Self { dir, templates }
    }

    fn recipe(&self, memory_mib: u64) -> (Recipe, Parts) {
        let (mut recipe, parts) = Recipe::of_files_in(self.dir.path());
        recipe.memory = memory_mib.try_into().unwrap();
        (recipe, parts)
    }

    /// The key of the template with so many MiB of RAM.
    pub(in super::super) fn key(&self, memory_mib: u64) -> Key {
        let (recipe, parts) = self.recipe(memory_mib);
        recipe.key_of(&parts)
    }

    /// A template with so many MiB of RAM, of which `bytes` are written.
    pub(in super::super) fn add(&self, memory_mib: u64, bytes: usize) -> Template {
        let (recipe, parts) = self.recipe(memory_mib);
        let new = self.templates.begin().unwrap();
        for (name, bytes) in [(STATE, 10), (MEMORY, bytes)] {
            fs::write(new.path().join(name), vec![1; bytes]).unwrap();
        }
        let manifest = Manifest {
            version: super::super::VERSION,
            key: recipe.key_of(&parts),
            created: 1,
            took_ms: 2,
            cpus: 1,
            memory_mib,
            cmdline: "quiet".to_owned(),
            processor: parts.processor.clone(),
            kernel: parts.kernel,
            agent: parts.agent,
            vmm: parts.vmm,
            kernel_release: "6.12.1".to_owned(),
            agent_version: "0.1.0".to_owned(),
            memory_bytes: bytes as u64,
            state_bytes: 10,
        };
        self.templates.install(new, manifest).unwrap()
    }

    /// It was used so long ago.
    fn age(&self, template: &Template, seconds: u64) {
        let file = File::options().append(true).open(template.directory.join(MANIFEST)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(seconds)).unwrap();
    }

    fn sizes(&self) -> Vec<u64> {
        let list = self.templates.list().unwrap();
        list.iter().filter_map(|it| Some(it.manifest.as_ref()?.memory_mib)).collect()
    }
}

#[test]
fn a_template_is_found_by_its_key_and_says_where_its_machine_is() {
    let cache = Cache::new();
    let template = cache.add(128, 100);
    let key = template.manifest.key.clone();
    assert_eq!(cache.templates.find(&key).as_ref(), Some(&template));
    let snapshot = template.snapshot();
    assert_eq!(fs::read(snapshot.memory).unwrap().len(), 100);
    assert_eq!(snapshot.contents, key.to_string());
    let other = Key::try_from("0".repeat(64)).unwrap();
    assert_eq!(cache.templates.find(&other), None);
}

#[test]
fn one_that_was_of_no_use_is_not_found_until_it_is_made_again() {
    let cache = Cache::new();
    let key = cache.add(128, 100).manifest.key;
    cache.templates.set_aside(&key, "it did not call").unwrap();
    assert_eq!(cache.templates.find(&key), None);
    assert!(cache.templates.is_aside(&key));
    let entry = cache.templates.get(key.short()).unwrap();
    assert_eq!(entry.condition, Condition::Aside { reason: "it did not call".to_owned() });
    cache.add(128, 100);
    assert!(cache.templates.find(&key).is_some() && !cache.templates.is_aside(&key));
}

#[test]
fn one_that_could_not_be_made_is_noted_and_pruned() {
    let cache = Cache::new();
    let key = Key::try_from("0".repeat(64)).unwrap();
    cache.templates.set_aside(&key, "no").unwrap();
    assert!(cache.templates.is_aside(&key) && cache.templates.find(&key).is_none());
    assert_eq!(cache.templates.prune(&Keep::default()).unwrap().removed.len(), 1);
    assert!(!cache.templates.is_aside(&key));
}

#[test]
fn one_whose_kernel_was_replaced_is_outdated_and_pruned() {
    let cache = Cache::new();
    let template = cache.add(128, 100);
    fs::write(&template.manifest.kernel.path, "another").unwrap();
    let entry = cache.templates.get(template.manifest.key.as_str()).unwrap();
    assert_eq!(entry.condition, Condition::Outdated);
    assert_eq!(cache.templates.prune(&Keep::default()).unwrap().removed, [entry]);
    assert!(cache.templates.list().unwrap().is_empty());
}

#[test]
fn the_least_recently_used_go_until_the_rest_fits() {
    let cache = Cache::new();
    let (old, new, middle) = (cache.add(128, 100_000), cache.add(256, 100_000), cache.add(512, 100_000));
    for (template, age) in [(&old, 300), (&middle, 200), (&new, 100)] {
        cache.age(template, age);
    }
    assert_eq!(cache.sizes(), [256, 512, 128]);
    old.touch();
    assert_eq!(cache.sizes(), [128, 256, 512]);
    let each = cache.templates.list().unwrap()[0].disk_bytes;
    assert!(each >= 100_000, "{each}");
    let pruned = cache.templates.prune(&Keep { bytes: Some(2 * each), ..Keep::default() }).unwrap();
    assert_eq!((pruned.removed.len(), pruned.freed_bytes), (1, each));
    assert_eq!(cache.sizes(), [128, 256]);
    let keep = Keep { unused: Some(Duration::from_secs(50)), ..Keep::default() };
    cache.templates.prune(&keep).unwrap();
    assert_eq!(cache.sizes(), [128]);
    cache.templates.prune(&Keep { nothing: true, ..Keep::default() }).unwrap();
    assert!(cache.sizes().is_empty());
}

#[test]
fn the_beginning_of_a_key_names_a_template_if_it_names_only_one() {
    let cache = Cache::new();
    let [zero, one] = ["0", "1"].map(|digit| Key::try_from(format!("a{}", digit.repeat(63))).unwrap());
    for key in [&zero, &one] {
        cache.templates.set_aside(key, "").unwrap();
    }
    assert_eq!(cache.templates.get("a0").unwrap().key, zero);
    for (beginning, text) in [("a", "several"), ("b", "no template b"), ("", "no template")] {
        let report = cache.templates.get(beginning).unwrap_err().report();
        assert!(report.contains(text), "{report}");
    }
    assert_eq!(cache.templates.remove("a1").unwrap().key, one);
    assert!(cache.templates.get("a1").is_err());
}

#[test]
fn only_one_is_made_at_a_time() {
    let cache = Cache::new();
    let lock = cache.templates.lock_now().unwrap();
    assert!(lock.is_some() && cache.templates.lock_now().unwrap().is_none());
    drop(lock);
    assert!(cache.templates.lock_now().unwrap().is_some());
}

#[test]
fn where_there_are_no_templates_none_are_listed_and_nothing_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let templates = Templates::of(dir.path());
    assert!(templates.list().unwrap().is_empty());
    assert!(!dir.path().join(DIRECTORY).exists());
}

#[test]
fn a_manifest_that_somebody_changed_is_none_or_leads_to_the_same_machine() {
    let cache = Cache::new();
    let template = cache.add(128, 100);
    let (key, path) = (&template.manifest.key, template.directory.join(MANIFEST));
    let whole = fs::read(&path).unwrap();
    let found = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        assert_eq!(cache.templates.list().unwrap().len(), 1, "it is listed, and can be removed");
        cache.templates.find(key)
    };
    let mut refused = 0;
    for at in 0..whole.len() {
        let mut changed = whole.clone();
        changed[at] ^= 1 << (at % 8);
        match found(&changed) {
            None => refused += 1,
            Some(other) => {
                let (snapshot, same) = (other.snapshot(), template.snapshot());
                assert_eq!((&snapshot.state, &snapshot.memory), (&same.state, &same.memory));
                assert_eq!(snapshot.contents, same.contents, "which the state has to name as well");
            }
        }
        assert!(found(&whole[..at]).is_none(), "cut to {at} bytes");
    }
    assert!(refused > key.as_str().len() && refused < whole.len(), "{refused}");
    assert!(found(&[&whole[..], b"{}"].concat()).is_none());
    assert_eq!(found(&whole), Some(template.clone()));
    // One of any length is not read into memory.
    File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    assert!(cache.templates.find(key).is_none());
}
