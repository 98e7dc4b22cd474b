//! What a machine is made of, as plain data: the JSON that `mvm-vmm` reads from file descriptor 3.
//!
//! Files are named by [`FdSlot`], the number of an inherited descriptor: the process that starts the machine opens everything. Values are checked
//! where they are parsed, so a `MachineConfig` that exists is valid by itself.

mod serial;
mod start;

use std::fmt;
use std::str::FromStr;

pub use mvm_devices::fd::FdSlot;
pub use mvm_devices::virtio::DeviceSpec;
use serde::{Deserialize, Serialize};
pub use serial::{MAX_SERIAL_BYTES, Serial};
pub use start::{Boot, Image, Protocol, Restore, Start, Userfault};

/// File descriptor on which the configuration arrives.
pub const CONFIG_FD: u32 = 3;
/// First slot: 0 to 2 are the standard streams, 3 is the configuration.
pub const FIRST_SLOT: u32 = CONFIG_FD + 1;
/// Last slot.
pub const LAST_SLOT: u32 = 1023;
/// Most bytes of a configuration.
pub const MAX_CONFIG_BYTES: u64 = 64 * 1024;
/// Most bytes of a kernel command line, before what the machine itself adds.
pub const MAX_CMDLINE_BYTES: usize = 1900;

/// A value that no machine can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Number of CPUs out of range.
    #[error("{0} is not a number of CPUs from 1 to {max}", max = VcpuCount::MAX)]
    Cpus(u64),
    /// Memory size out of range.
    #[error("{0} MiB is not a memory size from {min} MiB to {max} MiB", min = MemSize::MIN_MIB, max = MemSize::MAX_MIB)]
    Memory(u64),
    /// Memory size that is not a number with a unit.
    #[error("{0:?} is not a memory size such as 128M or 2G")]
    MemorySyntax(String),
    /// More memory that can be plugged than fits, or by more than one device.
    #[error("memory can be plugged by one device, up to {max} MiB with what the machine boots with", max = MemSize::MAX_MIB)]
    Pluggable,
    /// Identifier with a character it must not have, or of a length it must not have.
    #[error("{0:?} is not an identifier: 1 to 64 of A-Z a-z 0-9 _ . - with a letter or digit first")]
    Id(String),
    /// Command line too long, or with a NUL.
    #[error("the command line has {0} bytes or a NUL, and at most {max} bytes fit", max = MAX_CMDLINE_BYTES)]
    Cmdline(usize),
}

/// One machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Name of the machine, for messages.
    pub id: MachineId,
    /// Virtual CPUs.
    #[serde(default)]
    pub cpus: VcpuCount,
    /// RAM.
    #[serde(default, rename = "memory_mib")]
    pub memory: MemSize,
    /// MiB of addresses that are kept for memory beyond that, which a device attached later plugs. They cost nothing.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub pluggable_mib: u64,
    /// `/dev/kvm`.
    pub kvm: FdSlot,
    /// How it comes to run.
    pub start: Start,
    /// Virtio devices, in order of their PCI addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceSpec>,
    /// First serial port; absent unless given, because each character costs an exit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// Stream for [`crate::status::Event`]s, one JSON object per line. The machine ends with its reader; without
    /// one it lives on by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<FdSlot>,
    /// UNIX stream socket for [`crate::control`] requests: a listening one, or one end of a connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<FdSlot>,
    /// Directory that becomes the process's root, and with it a user of its own: [`crate::launch`] sets both if it may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<FdSlot>,
    /// File of the [`mvm_devices::throttle::Meters`] that its disks and cards are charged at. Whoever has it too sets
    /// their rates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meters: Option<FdSlot>,
}

impl MachineConfig {
    /// A machine of the size that is usual, with nothing attached.
    pub fn new(id: MachineId, kvm: FdSlot, start: Start) -> Self {
        Self {
            id,
            cpus: VcpuCount::default(),
            memory: MemSize::default(),
            pluggable_mib: 0,
            kvm,
            start,
            devices: Vec::new(),
            serial: None,
            status: None,
            control: None,
            root: None,
            meters: None,
        }
    }

    /// Bytes that can be plugged beyond [`MachineConfig::memory`] at most: by the device for it, or by one that is
    /// attached later.
    ///
    /// # Errors
    /// There is more than one, or it is too large: [`Invalid::Pluggable`].
    pub fn pluggable(&self) -> Result<u64, Invalid> {
        let mut sizes = self.devices.iter().filter_map(|device| match device {
            DeviceSpec::Mem(mem) => Some(mem.size_mib),
            _ => None,
        });
        match (sizes.next().unwrap_or(0).max(self.pluggable_mib), sizes.next()) {
            (mib, None) if mib <= MemSize::MAX_MIB.saturating_sub(self.memory.mib()) => Ok(mib << 20),
            _ => Err(Invalid::Pluggable),
        }
    }
}

fn is_zero(mib: &u64) -> bool {
    *mib == 0
}

/// Number of virtual CPUs, 1 to 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct VcpuCount(u8);

impl VcpuCount {
    /// Most CPUs of a machine.
    pub const MAX: u8 = 32;

    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl Default for VcpuCount {
    fn default() -> Self {
        Self(1)
    }
}

impl TryFrom<u64> for VcpuCount {
    type Error = Invalid;
    fn try_from(count: u64) -> Result<Self, Invalid> {
        match u8::try_from(count) {
            Ok(small) if (1..=Self::MAX).contains(&small) => Ok(Self(small)),
            _ => Err(Invalid::Cpus(count)),
        }
    }
}

impl From<VcpuCount> for u64 {
    fn from(count: VcpuCount) -> u64 {
        count.0.into()
    }
}

/// Size of RAM: whole MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct MemSize(u64);

impl MemSize {
    /// Least RAM, in MiB: room for the first MiB and a flat guest.
    pub const MIN_MIB: u64 = 4;
    /// Most RAM, in MiB.
    pub const MAX_MIB: u64 = 512 * 1024;

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        self.0 << 20
    }

    /// The size in MiB.
    pub fn mib(self) -> u64 {
        self.0
    }
}

impl Default for MemSize {
    fn default() -> Self {
        Self(128)
    }
}

impl TryFrom<u64> for MemSize {
    type Error = Invalid;
    fn try_from(mib: u64) -> Result<Self, Invalid> {
        if (Self::MIN_MIB..=Self::MAX_MIB).contains(&mib) { Ok(Self(mib)) } else { Err(Invalid::Memory(mib)) }
    }
}

impl From<MemSize> for u64 {
    fn from(size: MemSize) -> u64 {
        size.0
    }
}

impl FromStr for MemSize {
    type Err = Invalid;

    /// `128`, `128M` and `128MiB` are MiB; `2G` and `2GiB` are GiB.
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let syntax = || Invalid::MemorySyntax(text.to_owned());
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at_checked(digits).ok_or_else(syntax)?;
        let number: u64 = number.parse().map_err(|_| syntax())?;
        let scale = match unit.to_ascii_lowercase().as_str() {
            "" | "m" | "mib" => 1,
            "g" | "gib" => 1024,
            _ => return Err(syntax()),
        };
        number.checked_mul(scale).ok_or_else(syntax)?.try_into()
    }
}

impl fmt::Display for MemSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}M", self.0)
    }
}

/// Name of a machine.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineId(String);

impl MachineId {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for MachineId {
    type Error = Invalid;
    fn try_from(text: String) -> Result<Self, Invalid> {
        let first_ok = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        let all_ok = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
        if first_ok && all_ok && text.len() <= 64 { Ok(Self(text)) } else { Err(Invalid::Id(text)) }
    }
}

impl FromStr for MachineId {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        text.to_owned().try_into()
    }
}

impl From<MachineId> for String {
    fn from(id: MachineId) -> String {
        id.0
    }
}

impl fmt::Display for MachineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A kernel command line that fits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cmdline(String);

impl Cmdline {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Cmdline {
    type Error = Invalid;
    fn try_from(text: String) -> Result<Self, Invalid> {
        if text.len() > MAX_CMDLINE_BYTES || text.contains('\0') {
            return Err(Invalid::Cmdline(text.len()));
        }
        Ok(Self(text))
    }
}

impl From<Cmdline> for String {
    fn from(cmdline: Cmdline) -> String {
        cmdline.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEAST: &str = r#"{"id":"a","kvm":4,"start":{"boot":{"kernel":5}}}"#;

    #[test]
    fn the_least_config_gets_every_default() {
        let config: MachineConfig = serde_json::from_str(LEAST).unwrap();
        assert_eq!(config.cpus.get(), 1);
        assert_eq!(config.memory.bytes(), 128 << 20);
        assert_eq!(boot(&config).protocol, Protocol::Linux64);
        assert_eq!(config.serial, None);
    }

    #[test]
    fn memory_is_plugged_by_one_device_and_has_an_end() {
        let pluggable = |devices: &str| {
            let text = LEAST.replace("\"id\"", &format!(r#""devices":[{devices}],"id""#));
            serde_json::from_str::<MachineConfig>(&text).unwrap().pluggable()
        };
        assert_eq!(pluggable(""), Ok(0));
        assert_eq!(pluggable(r#"{"type":"rng"},{"type":"mem","size_mib":256}"#), Ok(256 << 20));
        assert_eq!(pluggable(r#"{"type":"mem","size_mib":524160}"#), Ok(524_160 << 20));
        let mut later: MachineConfig = serde_json::from_str(LEAST).unwrap();
        later.pluggable_mib = 1000;
        assert_eq!(later.pluggable(), Ok(1000 << 20));
        for wrong in ["524161", "18446744073709551615", r#"128},{"type":"mem","size_mib":128"#] {
            let device = format!(r#"{{"type":"mem","size_mib":{wrong}}}"#);
            assert_eq!(pluggable(&device), Err(Invalid::Pluggable), "{wrong}");
        }
    }

    #[test]
    fn unknown_fields_are_refused() {
        let text = LEAST.replace("\"id\"", "\"colour\":1,\"id\"");
        let error = serde_json::from_str::<MachineConfig>(&text).unwrap_err();
        assert!(error.to_string().contains("colour"), "{error}");
    }

    #[test]
    fn cpus_are_1_to_32() {
        assert!(VcpuCount::try_from(0).is_err());
        assert_eq!(VcpuCount::try_from(32).unwrap().get(), 32);
        assert_eq!(VcpuCount::try_from(33), Err(Invalid::Cpus(33)));
        assert_eq!(VcpuCount::try_from(257), Err(Invalid::Cpus(257)));
    }

    #[test]
    fn memory_sizes_parse_with_units_and_never_wrap() {
        assert_eq!("128".parse::<MemSize>().unwrap().mib(), 128);
        assert_eq!("2G".parse::<MemSize>().unwrap().mib(), 2048);
        assert_eq!("64MiB".parse::<MemSize>().unwrap().mib(), 64);
        for wrong in ["", "G", "12T", "18446744073709551615G", "1e3", "3M"] {
            assert!(wrong.parse::<MemSize>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn identifiers_cannot_name_a_path() {
        for wrong in ["", ".", "..", "a/b", "-a", "a b", &"x".repeat(65)] {
            assert!(wrong.parse::<MachineId>().is_err(), "{wrong}");
        }
        assert!("a.b-c_9".parse::<MachineId>().is_ok());
    }

    #[test]
    fn command_lines_are_bounded_and_have_no_nul() {
        assert!(Cmdline::try_from("x".repeat(MAX_CMDLINE_BYTES)).is_ok());
        assert!(Cmdline::try_from("x".repeat(MAX_CMDLINE_BYTES + 1)).is_err());
        assert!(Cmdline::try_from("a\0b".to_owned()).is_err());
    }

    fn boot(config: &MachineConfig) -> Boot {
        match &config.start {
            Start::Boot(boot) => boot.clone(),
            Start::Restore(_) => panic!("{config:?}"),
        }
    }

    proptest! {
        #[test]
        fn printing_then_parsing_is_the_identity(
            cpus in 1u64..=32, mib in MemSize::MIN_MIB..=MemSize::MAX_MIB, slot in 4u32..=1023,
        ) {
            let mut config: MachineConfig = serde_json::from_str(LEAST).unwrap();
            config.cpus = cpus.try_into().unwrap();
            config.memory = mib.try_into().unwrap();
            config.start = Start::Boot(Boot { initrd: Some(FdSlot(slot)), ..boot(&config) });
            let text = serde_json::to_string(&config).unwrap();
            prop_assert_eq!(serde_json::from_str::<MachineConfig>(&text).unwrap(), config);
        }
    }
}
