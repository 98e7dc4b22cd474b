//! Templates: machines that were saved when their agent was ready, and that others go on from.
//!
//! A template is an empty machine: no disk, no card, no container. What makes a container's machine of it is
//! plugged in afterwards, as with any machine of a pod. It fits machines of the same kernel, agent, VMM,
//! processor, size and command line; all of that is its key. Below the cache directory:
//!
//! ```text
//! templates/lock                held while one is made or removed
//! templates/<key>/manifest.json what it is made of and when; its time of change is that of its last use
//! templates/<key>/state         CPUs and devices
//! templates/<key>/memory        RAM, with holes
//! templates/<key>/working-set   which of the RAM a machine writes first, brought in for each
//! templates/<key>/aside         why it is of no use, if it is not
//! templates/.new-*              one being made or removed
//! ```
//!
//! A template appears whole, by a rename. It may be removed while machines live that were made of it: their
//! files stay until they end.

mod choice;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod make;
mod manifest;
mod processor;
mod recipe;
mod store;

pub use choice::{Choice, Maker, Source, VARIABLE, Ways};
pub use make::{Phase, make, make_in_background, make_when_idle};
pub use manifest::{Ingredient, Manifest, VERSION};
pub(crate) use processor::processor;
pub use recipe::{Key, Recipe};
pub use store::{Condition, Entry, Keep, Pruned, Template, Templates};
