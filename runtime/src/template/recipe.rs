//! What a template is made of, and the key it is found by.

use std::fmt;
use std::path::Path;

use mvm_vmm::config::{MachineId, MemSize, VcpuCount};
use mvm_vmm::launch::find_program;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::manifest::{Ingredient, VERSION};
use super::processor::processor;
use crate::container::{CMDLINE, devices};
use crate::failure::{Context, Failure};
use crate::guest::GuestFiles;
use crate::hex::hex;
use crate::machine::{Disk, Kernel, Origin, Plan, Slot, Snapshot};

/// Digits of a key that are shown to people.
const SHORT: usize = 12;
/// Digits of a key.
const DIGITS: usize = 64;

/// The name of all templates that are alike: SHA-256 of everything that a machine restored from one must share with
/// it, in lower-case hex.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Key(String);

impl Key {
    /// All digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// As many digits as people read.
    pub fn short(&self) -> &str {
        self.0.get(..SHORT).unwrap_or(&self.0)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Text that is no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no key of a template: {DIGITS} hex digits")]
pub struct NotAKey(String);

impl TryFrom<String> for Key {
    type Error = NotAKey;

    fn try_from(text: String) -> Result<Self, NotAKey> {
        let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if text.len() == DIGITS && text.bytes().all(digit) { Ok(Self(text)) } else { Err(NotAKey(text)) }
    }
}

/// An empty machine, and everything that decides what it is like.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Virtual CPUs.
    pub cpus: VcpuCount,
    /// RAM.
    pub memory: MemSize,
    guest: GuestFiles,
    initrd: std::path::PathBuf,
}

/// The places for disks in a template, without any: one for an image, one for what is written. Looking for what was plugged
/// in takes a guest three times as long as all else that its container needs.
fn slots() -> Vec<Slot> {
    vec![Slot::empty(true), Slot::empty(false)]
}

/// The parts of a key.
#[derive(Clone, Debug)]
pub(super) struct Parts {
    pub(super) kernel: Ingredient,
    pub(super) agent: Ingredient,
    pub(super) vmm: Ingredient,
    pub(super) processor: String,
}

impl Recipe {
    /// A machine of this size, of the kernel and the agent that are installed. Its initial RAM disk is made below
    /// `state` if it is not there.
    ///
    /// # Errors
    /// Kernel or agent are missing, or the directory cannot be written.
    pub fn new(state: &Path, cpus: VcpuCount, memory: MemSize) -> Result<Self, Failure> {
        let guest = GuestFiles::find()?;
        let initrd = guest.initrd(&state.join("guest"))?;
        Ok(Self { cpus, memory, guest, initrd })
    }

    /// The guest's kernel.
    pub(super) fn kernel(&self) -> &Path {
        &self.guest.kernel
    }

    /// The machine that a template is saved of: nothing is in it but an agent that can be reached.
    pub fn plan_template(&self, id: MachineId) -> Plan {
        Plan { slots: slots(), ..self.plan(id) }
    }

    /// The machine itself, with no place for a disk: an agent can be reached and nothing else is there.
    pub fn plan(&self, id: MachineId) -> Plan {
        let kernel = Kernel {
            image: self.guest.kernel.clone(),
            initrd: Some(self.initrd.clone()),
            cmdline: CMDLINE.to_owned(),
        };
        self.plan_from(id, Origin::Kernel(kernel))
    }

    /// A machine that goes on from its template with `disks`, and those of them that found no place: they are to be
    /// plugged in.
    pub fn plan_clone(&self, id: MachineId, template: Snapshot, disks: &[Disk]) -> (Plan, Vec<Disk>) {
        let mut slots = slots();
        let others = Slot::fill(&mut slots, disks);
        (Plan { slots, ..self.plan_from(id, Origin::Saved(template)) }, others)
    }

    fn plan_from(&self, id: MachineId, origin: Origin) -> Plan {
        Plan { cpus: self.cpus, memory: self.memory, devices: devices(), ..Plan::new(id, origin) }
    }

    /// The key of its template. No file is read: all are known by where they are and when they changed.
    ///
    /// # Errors
    /// One of the files is missing, or the processor cannot be told.
    pub fn key(&self) -> Result<Key, Failure> {
        Ok(self.key_of(&self.parts()?))
    }

    pub(super) fn parts(&self) -> Result<Parts, Failure> {
        let vmm = find_program().context(|| "cannot find the machine's program".to_owned())?;
        Ok(Parts {
            kernel: Ingredient::look(&self.guest.kernel)?,
            agent: Ingredient::look(&self.guest.agent)?,
            vmm: Ingredient::look(&vmm)?,
            processor: processor().context(|| "cannot tell the host's processor".to_owned())?,
        })
    }

    pub(super) fn key_of(&self, parts: &Parts) -> Key {
        let mut digest = Sha256::new();
        let (cpus, memory) = (self.cpus.get().to_string(), self.memory.mib().to_string());
        let version = VERSION.to_string();
        let devices = format!("{:?}{:?}", devices(), slots());
        let Parts { kernel, agent, vmm, processor } = parts;
        for part in [
            &version,
            &cpus,
            &memory,
            CMDLINE,
            &devices,
            &kernel.facts,
            &agent.facts,
            &vmm.facts,
            processor.as_str(),
        ] {
            // With its length before it no part can pass for two.
            digest.update(part.len().to_le_bytes());
            digest.update(part);
        }
        Key(hex(&digest.finalize()))
    }
}

#[cfg(test)]
impl Recipe {
    /// One of files in `directory`, which are made if they are missing.
    pub(super) fn of_files_in(directory: &Path) -> (Self, Parts) {
        let file = |name: &str| {
            let path = directory.join(name);
            if !path.exists() {
                std::fs::write(&path, name).unwrap();
            }
            path
        };
        let guest = GuestFiles { kernel: file("vmlinux"), agent: file("mvm-agent") };
        let look = |path: &Path| Ingredient::look(path).unwrap();
        let parts = Parts {
            kernel: look(&guest.kernel),
            agent: look(&guest.agent),
            vmm: look(&file("mvm-vmm")),
            processor: "a processor".to_owned(),
        };
        let initrd = directory.join("initrd");
        (Self { cpus: VcpuCount::default(), memory: MemSize::default(), guest, initrd }, parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_a_restored_machine_must_share_with_its_template_is_in_the_key() {
        let dir = tempfile::tempdir().unwrap();
        let (recipe, parts) = Recipe::of_files_in(dir.path());
        let key = recipe.key_of(&parts);
        assert_eq!(recipe.key_of(&parts.clone()), key);
        let larger = Recipe { memory: 256.try_into().unwrap(), ..recipe.clone() };
        let wider = Recipe { cpus: 2.try_into().unwrap(), ..recipe.clone() };
        let mut keys = vec![key, larger.key_of(&parts), wider.key_of(&parts)];
        for change in [
            |parts: &mut Parts| parts.kernel.facts.push('0'),
            |parts: &mut Parts| parts.agent.facts.push('0'),
            |parts: &mut Parts| parts.vmm.facts.push('0'),
            |parts: &mut Parts| parts.processor.push('0'),
            |parts: &mut Parts| std::mem::swap(&mut parts.kernel, &mut parts.agent),
        ] {
            let mut parts = parts.clone();
            change(&mut parts);
            keys.push(recipe.key_of(&parts));
        }
        keys.sort_by(|one, other| one.as_str().cmp(other.as_str()));
        keys.dedup();
        assert_eq!(keys.len(), 8);
    }

    #[test]
    fn a_template_is_empty_and_has_an_agent() {
        let dir = tempfile::tempdir().unwrap();
        let plan = Recipe::of_files_in(dir.path()).0.plan("m".parse().unwrap());
        assert!(plan.disks.is_empty() && plan.nets.is_empty() && plan.devices == devices() && plan.vsock);
        assert!(plan.slots.is_empty(), "one that boots has its disks from the beginning");
    }

    #[test]
    fn a_clone_has_the_places_of_its_template_with_disks_in_them() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = Recipe::of_files_in(dir.path()).0;
        let template = recipe.plan_template("m".parse().unwrap());
        assert!(template.slots.iter().all(|slot| slot.disk.is_none()));
        let disks = ["a,ro", "b,ro", "c"].map(|text| text.parse::<Disk>().unwrap());
        let saved = Snapshot {
            state: "s".into(),
            memory: "m".into(),
            source: None,
            base: None,
            working_set: None,
            contents: "k".into(),
        };
        let (clone, others) = recipe.plan_clone("c".parse().unwrap(), saved, &disks);
        let kinds = |plan: &Plan| plan.slots.iter().map(|slot| slot.read_only).collect::<Vec<_>>();
        assert_eq!(kinds(&clone), kinds(&template));
        assert_eq!(
            clone.slots.iter().filter_map(|slot| slot.disk.as_ref()).collect::<Vec<_>>(),
            [&disks[0], &disks[2]]
        );
        assert_eq!(others, disks[1..2]);
    }

    #[test]
    fn a_key_is_hex_digits_and_leads_nowhere() {
        for text in ["", "..", &"g".repeat(DIGITS), &"A".repeat(DIGITS), &"0".repeat(DIGITS - 1)] {
            assert!(Key::try_from((*text).to_owned()).is_err(), "{text}");
        }
        assert_eq!(Key::try_from("a".repeat(DIGITS)).unwrap().short(), "aaaaaaaaaaaa");
    }
}
