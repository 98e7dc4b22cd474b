//! What of the host's processor and kernel a saved machine depends on.

use std::fs::File;
use std::io::{self, Read};

use nix::sys::utsname::uname;
use sha2::{Digest, Sha256};

use crate::hex::hex;

/// Most of `/proc/cpuinfo` that is read: the first processor is well within it, and the others are alike.
const MOST: u64 = 16 * 1024;

/// The processor and the kernel above it, in one line: `GenuineIntel 6/85/7 microcode 0x5003604 flags …, Linux 6.12`.
///
/// A machine that was saved has seen its CPU's features, and the kernel's KVM had its say in them.
///
/// # Errors
/// `/proc/cpuinfo` cannot be read.
pub(crate) fn processor() -> io::Result<String> {
    let mut text = String::new();
    File::open("/proc/cpuinfo")?.take(MOST).read_to_string(&mut text)?;
    let kernel = uname().map_err(io::Error::from)?;
    let (name, release) = (kernel.sysname().to_string_lossy(), kernel.release().to_string_lossy());
    Ok(format!("{}, {name} {release}", describe(&text)))
}

/// The first processor of a `/proc/cpuinfo`.
pub(super) fn describe(cpuinfo: &str) -> String {
    let first = cpuinfo.split("\n\n").next().unwrap_or_default();
    let field = |wanted: &str| {
        let mut pairs = first.lines().filter_map(|line| line.split_once(':'));
        pairs.find(|(name, _)| name.trim_end() == wanted).map_or("?", |(_, value)| value.trim())
    };
    let mut features = Sha256::new();
    for name in ["flags", "bugs"] {
        let mut words: Vec<_> = field(name).split_whitespace().collect();
        words.sort_unstable();
        features.update(words.join(" "));
        features.update([0]);
    }
    let features = hex(features.finalize().iter().take(6));
    format!(
        "{} {}/{}/{} microcode {} flags {features}",
        field("vendor_id"),
        field("cpu family"),
        field("model"),
        field("stepping"),
        field("microcode")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n\
         model name\t: AMD EPYC\nstepping\t: 1\nmicrocode\t: 0xa10113e\ncpu MHz\t\t: 3699.9\nflags\t\t: fpu vme de\n\
         bugs\t\t: sysret_ss_attrs\n\nprocessor\t: 1\nvendor_id\t: Other\n";

    #[test]
    fn the_first_processor_is_described_and_its_speed_of_the_moment_is_left_out() {
        let text = describe(ONE);
        assert!(text.starts_with("AuthenticAMD 25/17/1 microcode 0xa10113e flags "), "{text}");
        assert_eq!(describe(&ONE.replace("3699.9", "1200.0")), text);
        assert_eq!(describe(&ONE.replace("fpu vme de", "de fpu vme")), text);
    }

    #[test]
    fn another_feature_bug_or_microcode_is_another_processor() {
        for (old, new) in
            [("vme de", "vme"), ("sysret_ss_attrs", "none"), ("0xa10113e", "0xa10113f"), ("17", "18")]
        {
            assert_ne!(describe(&ONE.replace(old, new)), describe(ONE), "{old}");
        }
    }

    #[test]
    fn this_hosts_processor_is_known() {
        let text = processor().unwrap();
        assert!(!text.starts_with('?') && text.contains(", Linux "), "{text}");
    }
}
