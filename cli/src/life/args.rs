//! What can be said about containers that are there.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use mvm_devices::throttle::Limit;
use nix::sys::signal::Signal;

use crate::words::{Format, size};

#[derive(Debug, Subcommand)]
pub(crate) enum Life {
    /// List containers
    Ps(Ps),
    /// Run a command in a running container
    Exec(Box<Exec>),
    /// Show what a detached container has written
    Logs(Logs),
    /// Ask containers to end, and after a time make them
    Stop(Stop),
    /// Send containers a signal
    Kill(Kill),
    /// Remove containers that have ended
    Rm(Rm),
    /// Say everything that is known of containers
    Inspect(Inspect),
    /// Show what containers use
    Stats(Listing),
    /// Follow what happens to containers
    Events(Events),
    /// Copy files from or to a running container
    Cp(Cp),
    /// Hold the processes of containers
    Pause(Names),
    /// Let the processes of containers go on
    Unpause(Names),
    /// Change how fast the machines of containers may use disks and network
    Update(Update),
    /// Clean up after containers whose owner died, and nothing else
    Gc(Gc),
}

#[derive(Debug, Args)]
pub(crate) struct Names {
    /// Names, ids, or the beginnings of ids
    #[arg(required = true, value_name = "CONTAINER")]
    pub(crate) names: Vec<String>,
}

/// Changes limits of running containers, until they end or are started again.
#[derive(Debug, Args)]
pub(crate) struct Update {
    #[command(flatten)]
    pub(crate) names: Names,
    /// A limit as of `mvm run`, or none for no limit: disk-read=10M:40M, net-send=none; may be repeated
    #[arg(long, required = true, value_name = "LIMIT", value_delimiter = ',')]
    pub(crate) limit: Vec<Limit>,
}

#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// Those that have ended too
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Print ids only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Only those with this label: NAME or NAME=VALUE; may be repeated
    #[arg(long, value_name = "LABEL")]
    pub(crate) label: Vec<String>,
    /// How to print the list
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: the command's own; 2 bad usage, 125 mvm failed, 126 the command cannot be executed, 127 it is not there, 128+n signal n"
)]
pub(crate) struct Exec {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "CONTAINER")]
    pub(crate) name: String,
    /// Command and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
    /// Keep stdin open
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Environment: NAME=VALUE, or NAME to pass this one's on; may be repeated
    #[arg(short, long, value_name = "VAR")]
    pub(crate) env: Vec<String>,
    /// Working directory in the container
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User[:group] in the container, names or numbers
    #[arg(short, long, value_name = "USER")]
    pub(crate) user: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "CONTAINER")]
    pub(crate) name: String,
    /// Go on until the container ends
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only the last N lines
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) tail: Option<usize>,
    /// Say when each line was written
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// How to print lines
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct Stop {
    #[command(flatten)]
    pub(crate) names: Names,
    /// Seconds between being asked to end (SIGTERM) and being made to (SIGKILL)
    #[arg(short, long, value_name = "SECONDS", default_value = "10")]
    pub(crate) time: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Kill {
    #[command(flatten)]
    pub(crate) names: Names,
    /// The signal, name or number
    #[arg(short, long, default_value = "KILL", value_parser = super::signal)]
    pub(crate) signal: Signal,
    /// Every process of the container gets it, not the first alone
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Rm {
    #[command(flatten)]
    pub(crate) names: Names,
    /// Kill those that run
    #[arg(short, long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    #[command(flatten)]
    pub(crate) names: Names,
}

#[derive(Debug, Args)]
pub(crate) struct Listing {
    /// Names, ids, or the beginnings of ids; all that run if there are none
    #[arg(value_name = "CONTAINER")]
    pub(crate) names: Vec<String>,
    /// How to print the list
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Print what is on record and do not wait for more
    #[arg(long)]
    pub(crate) past: bool,
    /// How to print events
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

/// Copies a file, or a directory with all in it.
#[derive(Debug, Args)]
pub(crate) struct Cp {
    /// PATH, or CONTAINER:PATH
    #[arg(value_name = "FROM")]
    pub(crate) from: PathBuf,
    /// PATH, or CONTAINER:PATH; a directory that is there gets the copy into it
    #[arg(value_name = "TO")]
    pub(crate) to: PathBuf,
    /// Most that is taken from a container: 500M, 20G
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "16G")]
    pub(crate) max_size: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Gc {
    /// How to print the report
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}
