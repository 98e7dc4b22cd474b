//! The owner has its container's machine saved.

use std::path::Path;
use std::sync::{PoisonError, RwLockReadGuard};

use mvm_protocol::limits::MAX_FRAME;

use super::Owner;
use crate::failure::{Context, Failure};
use crate::snapshot::{BaseMemory, SavedRun};
use crate::state::Condition;

/// Longest text of what was saved: a frame of the answer has to hold it.
const MOST_BYTES: usize = MAX_FRAME - 64;

impl Owner {
    /// Whoever asks something of the guest holds this meanwhile: it is not saved in between.
    pub(super) fn asks(&self) -> RwLockReadGuard<'_, ()> {
        self.0.quiet.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Saves the machine into files in `directory`; what was saved, as JSON.
    pub(super) fn save(&self, directory: &Path, base: Option<&BaseMemory>) -> Result<String, Failure> {
        let _quiet = self.0.quiet.write().unwrap_or_else(PoisonError::into_inner);
        let run = self.run()?;
        let name = self.record().name;
        if matches!(self.record().condition, Condition::Paused) {
            return Err(
                Failure::new(format!("container {name} is paused")).help(format!("mvm unpause {name}"))
            );
        }
        let failed = || format!("cannot save container {name}");
        let machine = run.sandbox.save(&run.container, directory, base).context(failed)?;
        let saved = SavedRun { job: (*run.job).clone(), process: run.process, machine };
        let text = serde_json::to_string(&saved).context(failed)?;
        if text.len() > MOST_BYTES {
            let why = format!(
                "its arguments and variables take {} bytes, and at most {MOST_BYTES} are kept",
                text.len()
            );
            return Err(Failure::because(failed(), Failure::new(why)));
        }
        Ok(text)
    }
}
