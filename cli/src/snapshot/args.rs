//! What can be said about snapshots.

use clap::{Args, Subcommand};
use mvm_runtime::machine::MemorySource;
use mvm_vmm::config::MachineId;

use crate::words::Format;

/// Saves, lists and removes snapshots of running containers' machines.
#[derive(Debug, Args)]
pub(crate) struct Snapshots {
    #[command(subcommand)]
    pub(crate) command: Snapshot,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Snapshot {
    /// Save a running container's machine; it goes on
    Create(Create),
    /// List snapshots
    Ls(Ls),
    /// Say everything that is known of snapshots
    Inspect(Inspect),
    /// Remove snapshots
    Rm(Rm),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Its memory, CPUs and disks are saved as of one moment. Containers can be saved that have no volumes and run with --net none, nat or host-only."
)]
pub(crate) struct Create {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: String,
    /// Name of the snapshot; made of the container's if none is given
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<MachineId>,
    /// Keep of its memory only what differs from this snapshot's, which must stay
    #[arg(long, value_name = "SNAPSHOT")]
    pub(crate) base: Option<MachineId>,
}

#[derive(Debug, Args)]
pub(crate) struct Ls {
    /// Print names only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// How to print the list
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Names of snapshots
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Containers that were restored from a snapshot go on without it. One that is the base of others stays until those are removed."
)]
pub(crate) struct Rm {
    /// Names of snapshots
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

/// Has a second container go on from where one is, and prints its id.
///
/// It is a snapshot that is restored at once and not kept. The one it is of goes on, and keeps its published ports for
/// itself.
#[derive(Debug, Args)]
pub(crate) struct Fork {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: String,
    /// Name of the new container; its id if none is given
    #[arg(long, value_name = "NEW")]
    pub(crate) name: Option<MachineId>,
}

/// Has a container go on from a snapshot, and prints its id.
///
/// What it writes from there on is in a log of its own. A snapshot may be restored any number of times.
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// Name of the snapshot
    #[arg(value_name = "NAME")]
    pub(crate) snapshot: String,
    /// Name of the container; that of the one that was saved if none is given
    #[arg(long, value_name = "CONTAINER")]
    pub(crate) name: Option<MachineId>,
    /// Bring in beforehand the memory that the first one restored so needed; the first one notes it
    #[arg(long)]
    pub(crate) prefault: bool,
    /// Have its memory brought, page by page, by whoever listens there: unix:PATH
    #[arg(long, value_name = "ADDRESS", conflicts_with = "prefault")]
    pub(crate) memory_source: Option<MemorySource>,
}
