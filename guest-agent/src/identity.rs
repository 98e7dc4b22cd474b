//! Who the agent says it is, and who the host says the guest is to be.

use std::fs::{self, File};

use mvm_protocol::{Hello, Identity, MAGIC, StageTimes, VERSION};
use nix::{sys::utsname::uname, unistd::sethostname};

use crate::{boot::Role, clock, kmsg, sys};

/// The hello of this agent on its `connection`th connection.
pub(crate) fn hello(connection: u32, stages: StageTimes) -> Hello {
    let kernel_release =
        uname().map(|names| names.release().to_string_lossy().into_owned()).unwrap_or_default();
    let agent_version = env!("CARGO_PKG_VERSION").to_owned();
    Hello {
        magic: MAGIC,
        version: VERSION,
        agent_version,
        kernel_release,
        boot_id: boot_id(),
        connection,
        stages,
    }
}

/// The kernel's boot id; zero if it cannot be read.
fn boot_id() -> [u8; 16] {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let mut digits = text.bytes().filter_map(|byte| char::from(byte).to_digit(16));
    let mut id = [0; 16];
    for byte in &mut id {
        let (Some(high), Some(low)) = (digits.next(), digits.next()) else {
            return [0; 16];
        };
        *byte = u8::try_from(high << 4 | low).unwrap_or(0);
    }
    id
}

/// Becomes who the host says. None of it is worth losing the machine for.
pub(crate) fn assume(identity: &Identity, role: Role) {
    if !identity.hostname.is_empty()
        && let Err(errno) = sethostname(&identity.hostname)
    {
        kmsg::say(&format!("cannot set the host name: {errno}"));
    }
    // Clock and entropy pool belong to the machine, and a trial run has no machine of its own.
    if role != Role::Init {
        return;
    }
    let credited = File::open("/dev/urandom")
        .map_err(|error| error.to_string())
        .and_then(|random| sys::credit_entropy(random, identity.entropy).map_err(|errno| errno.to_string()));
    if let Err(error) = credited {
        kmsg::say(&format!("cannot add the host's entropy: {error}"));
    }
    if identity.wall_clock_ns != 0
        && let Err(errno) = clock::set_wall_clock(identity.wall_clock_ns)
    {
        kmsg::say(&format!("cannot set the clock: {errno}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_id_is_the_kernels() {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let digits: String = boot_id().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(digits, text.trim().replace('-', ""));
    }
}
