//! How a machine that is none misbehaves: as files in its directory say, one a call.
//!
//! `signal.fault` that holds `fail` has each signal fail at once, `silent` unanswered until a call's time is up,
//! `ignore` acknowledged and not done; with `wait` it is done once the file is gone, and `signal.waits` tells that
//! one waits.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mvm_runtime::failure::Failure;

use super::Shared;

/// How long a call waits for an answer.
const ANSWER_TIME: Duration = Duration::from_secs(1);
/// How long such a file may stay that has a call wait.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked for: nothing tells.
const LOOK: Duration = Duration::from_millis(5);

/// What is wrong with the calls of one machine.
pub(super) struct Faults {
    pub(super) directory: PathBuf,
}

impl Faults {
    /// Misbehaves as is asked for. True is a call to be acknowledged and not done.
    pub(super) fn of(&self, call: &str, shared: &Shared) -> Result<bool, Failure> {
        let path = self.directory.join(format!("{call}.fault"));
        let fault = fs::read_to_string(&path).unwrap_or_default();
        let silent = || Failure::new("the guest did not answer in time");
        match fault.trim() {
            "fail" => Err(Failure::new(format!("cannot {call}: the guest refuses"))),
            "ignore" => Ok(true),
            "silent" => {
                shared.wait_down(ANSWER_TIME);
                Err(silent())
            }
            "wait" => {
                let begun = Instant::now();
                let _ = fs::write(self.directory.join(format!("{call}.waits")), "");
                while path.exists() && begun.elapsed() < PATIENCE {
                    if shared.wait_down(LOOK) {
                        return Err(silent());
                    }
                }
                Ok(false)
            }
            _ => Ok(false),
        }
    }
}
