//! What can be said about many containers.

use std::path::PathBuf;

use clap::Args;
use mvm_runtime::template;
use mvm_vmm::config::MemSize;

use crate::words::Format;

/// Starts many containers, says what each cost, and removes them again.
///
/// Each is started by `mvm run --detach` without a network, so that everything a user gets is in the figures.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: 0 all started and nothing is left of them, 1 otherwise, 2 bad usage, 125 mvm failed"
)]
pub(crate) struct Density {
    /// Containers
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) count: u32,
    /// Starts at the same time
    #[arg(long, value_name = "P", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) parallel: u32,
    /// Image, as for `mvm run`; without one a root of this host's /bin/busybox
    #[arg(long, value_name = "IMAGE")]
    pub(crate) image: Option<String>,
    /// Command that idles, instead of the image's
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
    /// Memory of each container's machine, as for `mvm run`
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    pub(crate) memory: MemSize,
    /// Whether machines go on from a template: auto, never or always
    #[arg(long, value_name = "WHEN", default_value = "always")]
    pub(crate) template: template::Choice,
    /// Seconds for which the processor time of all of them is watched
    #[arg(long, value_name = "S", default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=86_400))]
    pub(crate) hold: u32,
    /// Draw start times and memory into this file, as SVG
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,
    /// How to print the figures
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}
