//! Why a machine ended, and the exit code of its process for each reason: the one table.

use serde::{Deserialize, Serialize};

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum Exit {
    /// The guest powered off.
    Shutdown,
    /// The guest asked for a reset.
    Reboot,
    /// The guest's kernel reported a panic.
    GuestPanic,
    /// A virtual CPU shut down on a triple fault.
    TripleFault,
    /// The machine was stopped from outside: control socket or SIGTERM.
    Stopped,
    /// KVM could not go on.
    InternalError {
        /// What KVM reported, with a remedy where one is known.
        detail: String,
    },
    /// The memory it was to go on with does not come any more.
    MemoryLost {
        /// What became of whoever has it.
        detail: String,
    },
}

impl Exit {
    /// Exit code of a machine that could not be started.
    pub const FAILED_TO_START: u8 = 1;

    /// The exit code of `mvm-vmm`.
    pub fn code(&self) -> u8 {
        match self {
            Exit::Shutdown => 0,
            Exit::Reboot => 10,
            Exit::GuestPanic => 11,
            Exit::TripleFault => 12,
            Exit::Stopped => 13,
            Exit::InternalError { .. } => 14,
            Exit::MemoryLost { .. } => 15,
        }
    }

    /// The reason an exit code stands for; `None` if `mvm-vmm` never ran a guest or died otherwise.
    pub fn from_code(code: u8) -> Option<Exit> {
        Some(match code {
            0 => Exit::Shutdown,
            10 => Exit::Reboot,
            11 => Exit::GuestPanic,
            12 => Exit::TripleFault,
            13 => Exit::Stopped,
            14 => Exit::InternalError { detail: String::new() },
            15 => Exit::MemoryLost { detail: String::new() },
            _ => return None,
        })
    }
}

impl std::fmt::Display for Exit {
    /// What happened to the machine, to follow its name.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Exit::Shutdown => "powered off",
            Exit::Reboot => "asked for a reboot",
            Exit::GuestPanic => "its kernel panicked",
            Exit::TripleFault => "a triple fault ended it",
            Exit::Stopped => "stopped",
            Exit::InternalError { detail } if detail.is_empty() => "KVM could not go on",
            Exit::MemoryLost { detail } if detail.is_empty() => "its memory does not come any more",
            Exit::InternalError { detail } | Exit::MemoryLost { detail } => detail,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_exit_has_its_own_code_and_the_code_names_it() {
        let all = [
            Exit::Shutdown,
            Exit::Reboot,
            Exit::GuestPanic,
            Exit::TripleFault,
            Exit::Stopped,
            Exit::InternalError { detail: String::new() },
            Exit::MemoryLost { detail: String::new() },
        ];
        for exit in all {
            assert_ne!(exit.code(), Exit::FAILED_TO_START);
            assert_eq!(Exit::from_code(exit.code()), Some(exit));
        }
    }
}
