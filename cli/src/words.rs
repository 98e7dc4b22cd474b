//! What can be said to more than one command.

use clap::{Args, ValueEnum};
use mvm_vmm::config::{MemSize, VcpuCount};

/// How large a machine is.
#[derive(Debug, Args)]
pub(crate) struct Shape {
    /// Virtual CPUs, 1 to 32
    #[arg(long, value_name = "N", default_value = "1", value_parser = cpus)]
    pub(crate) cpus: VcpuCount,
    /// Memory: 128M, 2G
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    pub(crate) memory: MemSize,
}

/// A list of what has keys.
#[derive(Debug, Args)]
pub(crate) struct Keys {
    /// Print keys only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// How to print the list
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Text,
    /// For programs
    Json,
}

fn cpus(text: &str) -> Result<VcpuCount, String> {
    let count: u64 = text.parse().map_err(|_| format!("{text:?} is not a number"))?;
    VcpuCount::try_from(count).map_err(|error| error.to_string())
}

/// A number of bytes: `500M`, `20G`, `0`.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size: a number with K, M, G or T");
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits).ok_or_else(wrong)?;
    let scale = match unit.to_ascii_lowercase().trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << scale).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_numbers_with_a_unit() {
        let sizes =
            [("0", 0), ("512", 512), ("1k", 1024), ("3M", 3 << 20), ("2GiB", 2 << 30), ("1TB", 1 << 40)];
        for (text, bytes) in sizes {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "1x", "-1", "1.5G", "99999999999T"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
