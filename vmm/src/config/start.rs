//! How a machine comes to run: a kernel boots, or a snapshot goes on.

use serde::{Deserialize, Serialize};

use super::{Cmdline, FdSlot};

/// How a machine comes to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Start {
    /// A kernel boots.
    Boot(Boot),
    /// A saved machine goes on where it was.
    Restore(Restore),
}

/// A kernel and what it is given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// Kernel image: an ELF `vmlinux` or a bzImage.
    pub kernel: FdSlot,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<FdSlot>,
    /// Kernel command line.
    #[serde(default)]
    pub cmdline: Cmdline,
    /// How the kernel is entered.
    #[serde(default)]
    pub protocol: Protocol,
    /// How an ELF kernel gets into memory.
    #[serde(default)]
    pub image: Image,
}

impl Boot {
    /// A kernel alone, entered and brought into memory as most are.
    pub fn new(kernel: FdSlot) -> Self {
        Self {
            kernel,
            initrd: None,
            cmdline: Cmdline::default(),
            protocol: Protocol::default(),
            image: Image::default(),
        }
    }
}

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// The 64-bit Linux boot protocol.
    #[default]
    Linux64,
    /// PVH: 32-bit protected mode at the entry that the image's note names.
    Pvh,
}

/// How an ELF kernel gets into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Image {
    /// Code and constants are mapped copy-on-write: what no guest has changed is in memory once for all of them.
    #[default]
    Map,
    /// Read into the guest's own memory: costs each guest the whole image, and boots sooner where the host
    /// backs guests with huge pages, because it then faults once per 2 MiB.
    Copy,
}

/// A snapshot, as [`crate::control::Request::Snapshot`] wrote it. Any number of machines may go on from one.
///
/// The machine's CPUs and memory must be as many as were saved, and its devices the same kinds in the same order.
/// What is behind devices may be another: a tap, a disk of another size, a vsock's sockets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Restore {
    /// CPUs and devices.
    pub state: FdSlot,
    /// RAM: mapped privately, so that the file is shared by all machines and never written. Nobody may make it
    /// shorter while one of them runs. With `userfault`, a UNIX stream socket that is connected to whoever has it.
    pub memory: FdSlot,
    /// The memory is elsewhere, and each page is brought when it is first touched. It has no base then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub userfault: Option<Userfault>,
    /// The whole memory that the other is changes to, if it is: mapped in the same way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<FdSlot>,
    /// The pages that are brought in before the machine goes on, as [`crate::snapshot::record`] wrote them; none unless
    /// given, and each comes when it is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_set: Option<FdSlot>,
    /// What must be in the snapshot, in the words of whoever made it.
    #[serde(default)]
    pub contents: String,
}

impl Restore {
    /// One whose memory is whole, in a file, and of which nothing is said.
    pub fn new(state: FdSlot, memory: FdSlot) -> Self {
        Self { state, memory, userfault: None, base: None, working_set: None, contents: String::new() }
    }
}

/// By what a machine has the pages reported that are missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Userfault {
    /// `/dev/userfaultfd`; without it the process asks by its own right, before it gives that up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<FdSlot>,
}
