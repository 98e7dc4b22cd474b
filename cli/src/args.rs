//! The command line: what can be said, and what it is turned into.

use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use mvm_devices::throttle::Limit;
use mvm_devices::virtio::{DeviceSpec, NAMES};
use mvm_runtime::container::{CapName, Volume};
use mvm_runtime::machine::{ConsoleKind, Disk, Net};
use mvm_runtime::net::{Choice, Publish, TcpProfile};
use mvm_runtime::state::Restart;
use mvm_runtime::template;
use mvm_vmm::config::{MachineId, MemSize};

use crate::density::args::Density;
use crate::image::args::Images;
use crate::life::args::Life;
use crate::snapshot::args::{Fork, Restore, Snapshots};
use crate::template::args::Templates;
use crate::words::{Format, Shape};

/// What is read from the environment, for the end of the help.
const ENVIRONMENT: &str = "\
Environment:
  MVM_STATE     where images, snapshots and templates are kept: /var/lib/mvm
  MVM_RUN       where containers that are there are found: /run/mvm
  MVM_TEMPLATE  whether machines are made of templates: auto, never or always
  MVM_STARTS    how many machines start at once on this host: two for each processor
  MVM_FREE_PAGE_REPORTING=off  guests keep memory that they have freed
  MVM_VMM       the program of a machine's process
  MVM_KERNEL    the guests' kernel
  MVM_AGENT     the guests' agent
  MVM_PREFIX    where share/mvm with these two is looked for first";

/// Run containers and kernels, each in a micro-VM of its own
#[derive(Debug, Parser)]
#[command(name = "mvm", version, max_term_width = 100, disable_help_subcommand = true, after_help = ENVIRONMENT)]
pub(crate) struct Arguments {
    /// Log what is otherwise passed over in silence
    #[arg(long, global = true)]
    pub(crate) verbose: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a kernel in a micro-VM
    Boot(Box<Boot>),
    /// Run a container in a micro-VM
    Run(Box<Run>),
    #[command(flatten)]
    Life(Life),
    /// List, fetch, take in and remove images
    Image(Images),
    /// Save running containers' machines, list and remove what was saved
    Snapshot(Snapshots),
    /// Have a container go on from a snapshot
    Restore(Restore),
    /// Have a second container go on from where one is
    Fork(Fork),
    /// Make, list and remove the templates that machines go on from
    Template(Templates),
    /// Start many containers and say what each costs
    Density(Density),
    /// Check whether this host can run micro-VMs
    Doctor(Doctor),
    /// Print what makes a shell complete these commands
    Completion(Completion),
    /// Say which version this is, and what its guests are made of
    Version(Version),
    /// Own a container that `run --detach` leaves behind
    #[command(hide = true)]
    Own,
    /// Write the manual's pages
    #[command(hide = true)]
    Manual(Manual),
}

/// Prints a script for a shell: bash and fish read it from a file in their completion directory, zsh from one in
/// its fpath.
#[derive(Debug, Args)]
pub(crate) struct Completion {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

/// Writes the manual's pages into a directory.
#[derive(Debug, Args)]
pub(crate) struct Manual {
    /// The directory; made if it is missing
    pub(crate) directory: PathBuf,
}

/// Boots a kernel and waits until the machine ends.
///
/// The exit code says how it ended.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: 0 powered off, 2 bad usage, 3 reboot asked, 4 guest panic, 5 triple fault, 6 stopped, 125 mvm or KVM failed"
)]
pub(crate) struct Boot {
    /// Kernel: an ELF vmlinux or a bzImage
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Disk image or block device, raw: PATH[,ro][,serial=NAME]; may be repeated
    #[arg(long, value_name = "DISK", value_parser = Disk::from_str)]
    pub(crate) disk: Vec<Disk>,
    /// Network: none, or tap=NAME[,mac=MAC]; may be repeated
    #[arg(long, value_name = "NET", value_parser = unaddressed)]
    pub(crate) net: Vec<Net>,
    /// Any other device: its name, or its configuration as JSON; may be repeated
    #[arg(long, value_name = "DEVICE", value_parser = device)]
    pub(crate) device: Vec<DeviceSpec>,
    /// How fast it may use disks and network, as of `mvm run`; may be repeated
    #[arg(long, value_name = "LIMIT", value_delimiter = ',')]
    pub(crate) limit: Vec<Limit>,
    #[command(flatten)]
    pub(crate) shape: Shape,
    /// Kernel command line; what the console needs is added
    #[arg(long, value_name = "TEXT", default_value = "panic=-1")]
    pub(crate) cmdline: String,
    /// Connect this terminal: hvc (virtio) or serial (for early messages and kernels without virtio);
    /// Ctrl-] leaves
    #[arg(long, value_name = "KIND", num_args = 0..=1, require_equals = true, default_missing_value = "hvc")]
    pub(crate) console: Option<Console>,
    /// Directory for the machine's sockets (control.sock, vsock.sock); without it there are none
    #[arg(long, value_name = "DIR")]
    pub(crate) sockets: Option<PathBuf>,
    /// Print the machine's configuration and boot nothing
    #[arg(long)]
    pub(crate) print_config: bool,
}

/// Runs a container and exits with its exit code.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: the container's own; 2 bad usage, 125 mvm failed, 126 the command cannot be executed, 127 it is not there, 128+n signal n. Signals go to the container; the third that asks it to end kills its machine"
)]
pub(crate) struct Run {
    /// OCI layout directory, OCI or docker archive, or a root directory; PATH:TAG picks one of several images.
    /// Or the name of an image that was pulled or imported
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
    /// Command and arguments, instead of the image's
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
    /// Keep stdin open
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the container a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Leave the container running and print its id; `mvm logs` shows what it writes
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Remove a detached container when it has ended; one that is not detached always is
    #[arg(long)]
    pub(crate) rm: bool,
    /// When to start a detached container again: no, on-failure[:N] or always
    #[arg(long, value_name = "POLICY", default_value = "no")]
    pub(crate) restart: Restart,
    /// Mark the container: NAME or NAME=VALUE; may be repeated
    #[arg(short, long, value_name = "LABEL")]
    pub(crate) label: Vec<String>,
    /// Environment: NAME=VALUE, or NAME to pass this one's on; may be repeated
    #[arg(short, long, value_name = "VAR")]
    pub(crate) env: Vec<String>,
    /// Environment from a file, one variable a line; may be repeated
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// A file, directory or disk of the host: HOST:CONTAINER[:ro]; may be repeated
    #[arg(short, long, value_name = "VOLUME")]
    pub(crate) volume: Vec<Volume>,
    /// Working directory in the container
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User[:group] in the container, names or numbers
    #[arg(short, long, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// Program to run instead of the image's entry point
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,
    /// Name of the container
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<MachineId>,
    /// Host name in the container; its name if none is given
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<String>,
    /// Most processes it may have
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
    pub(crate) pids: Option<i64>,
    /// Keep what it writes on a disk of this size instead of in its memory: 512M, 8G
    #[arg(long, value_name = "SIZE")]
    pub(crate) disk_size: Option<MemSize>,
    /// Give it a capability besides the usual ones, or ALL; may be repeated
    #[arg(long, value_name = "CAP")]
    pub(crate) cap_add: Vec<CapName>,
    /// Take a capability away, or ALL; may be repeated
    #[arg(long, value_name = "CAP")]
    pub(crate) cap_drop: Vec<CapName>,
    /// Refuse writes to the root file system
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Network: none, nat[:SUBNET], host-only[:SUBNET], bridge:NAME[,ip=ADDR/PREFIX][,gateway=ADDR],
    /// netns:PATH, or tap=NAME[,ip=ADDR/PREFIX][,gateway=ADDR]; the last, and bridge, may have ,mac=MAC
    #[arg(long, value_name = "NET", value_parser = Choice::from_str, default_value = "none")]
    pub(crate) net: Choice,
    /// Make a port of the guest one of this host: [IP:]HOST:GUEST[/tcp|udp]; may be repeated; needs --net nat
    #[arg(short, long, value_name = "PORT", value_parser = Publish::from_str)]
    pub(crate) publish: Vec<Publish>,
    /// Name server of the guest, instead of this host's; may be repeated
    #[arg(long, value_name = "IP")]
    pub(crate) dns: Vec<IpAddr>,
    /// Largest packet of the guest's network, in bytes
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(68..))]
    pub(crate) mtu: Option<u16>,
    /// How the guest's TCP behaves: default, or wan for long or lossy ways (BBR, fast open, large buffers)
    #[arg(long, value_name = "PROFILE", value_parser = TcpProfile::from_str, default_value = "default")]
    pub(crate) tcp_profile: TcpProfile,
    /// How fast its machine may use disks and network: disk-read, disk-write, net-send or net-receive, with bytes per
    /// second or operations, and what may come at once: disk-read=10M:40M, net-send=500ops; may be repeated
    #[arg(long, value_name = "LIMIT", value_delimiter = ',')]
    pub(crate) limit: Vec<Limit>,
    #[command(flatten)]
    pub(crate) shape: Shape,
    /// Whether its machine goes on from a template: auto (from one that is there; else it boots and one is made
    /// meanwhile), never or always. Without it as MVM_TEMPLATE says, or auto
    #[arg(long, value_name = "CHOICE", value_parser = template::Choice::from_str)]
    pub(crate) template: Option<template::Choice>,
    /// Say at the end how long each stage took and what the machine cost
    #[arg(long)]
    pub(crate) stats: bool,
    /// Write a trace of its start, stage by stage, to this file; chrome://tracing and ui.perfetto.dev show it
    #[arg(long, value_name = "FILE")]
    pub(crate) trace_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "Exit codes: 0 machines can run here, 1 a check failed, 2 bad usage")]
pub(crate) struct Doctor {
    /// Check the limits that so many containers at once would meet, too
    #[arg(long, value_name = "N")]
    pub(crate) density: Option<u64>,
    /// How to print the report
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct Version {
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Console {
    /// virtio console, hvc0
    Hvc,
    /// First serial port, ttyS0
    Serial,
}

impl From<Console> for ConsoleKind {
    fn from(console: Console) -> Self {
        match console {
            Console::Hvc => Self::Virtio,
            Console::Serial => Self::Serial,
        }
    }
}

/// A network whose guest gets its addresses by itself: no agent of ours runs there to set them.
fn unaddressed(text: &str) -> Result<Net, String> {
    let net = Net::from_str(text).map_err(|error| error.to_string())?;
    match &net {
        Net::Tap(tap) if tap.address.is_some() || tap.gateway.is_some() => {
            Err("ip= and gateway= are for `mvm run`; give a kernel its address with --cmdline".to_owned())
        }
        _ => Ok(net),
    }
}

/// `rng`, or `{"type": "rng", …}`.
fn device(text: &str) -> Result<DeviceSpec, String> {
    let json = if text.trim_start().starts_with('{') {
        text.to_owned()
    } else if NAMES.contains(&text) {
        serde_json::json!({ "type": text }).to_string()
    } else {
        return Err(format!("there is no such device: use one of {}", NAMES.join(", ")));
    };
    serde_json::from_str(&json).map_err(|error| error.to_string())
}
