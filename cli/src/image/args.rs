//! What can be said about images.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use crate::words::{Format, Keys, size};

/// Lists, fetches, takes in and removes images.
#[derive(Debug, Args)]
pub(crate) struct Images {
    #[command(subcommand)]
    pub(crate) command: Image,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    /// List images
    Ls(Keys),
    /// Fetch images from registries
    Pull(Pull),
    /// Take in an archive, an OCI layout or a root directory under a name
    Import(Import),
    /// Remove images
    Rm(Rm),
    /// Remove what is not needed: images without a name, layers of snapshots that are gone
    Prune(Prune),
}

#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// Names: [REGISTRY/]NAME[:TAG][@DIGEST], of docker.io if no registry is named
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Log in as this user; without it as docker's configuration says
    #[arg(long, value_name = "USER", requires = "password_stdin")]
    pub(crate) username: Option<String>,
    /// Read the user's password from standard input
    #[arg(long, requires = "username")]
    pub(crate) password_stdin: bool,
    /// Certificates of authorities to trust besides this host's, PEM
    #[arg(long, value_name = "FILE")]
    pub(crate) ca_file: Option<PathBuf>,
    /// Do without TLS: for registries on this host only
    #[arg(long)]
    pub(crate) insecure_http: bool,
    /// Print nothing but keys
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Import {
    /// OCI layout directory, OCI or docker archive, or a root directory; PATH:TAG picks one of several images
    #[arg(value_name = "PATH")]
    pub(crate) path: String,
    /// Name to give it; without it what the image calls itself
    #[arg(value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Print nothing but the key
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// Names, or keys or digests or the beginnings of these
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "Nothing goes that a machine uses. Without options nothing goes that has a name.")]
pub(crate) struct Prune {
    /// Images with a name too
    #[arg(short, long)]
    pub(crate) all: bool,
    /// What was not used for this long, with or without a name: 12h, 30days
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) unused_for: Option<Duration>,
    /// The least recently used, until images and layers each take no more than this: 500M, 20G
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) max_size: Option<u64>,
    /// How to print the report
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}
