//! The agent's own messages: lines in the kernel's log, or on standard error outside a guest.

use std::{fs::OpenOptions, io::Write};

/// Says something once. Never fails and never waits for a reader.
pub(crate) fn say(message: &str) {
    let line = format!("mvm-agent: {message}\n");
    if std::process::id() == 1
        && let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg")
    {
        let _ = log.write_all(line.as_bytes());
        return;
    }
    let _ = std::io::stderr().write_all(line.as_bytes());
}
