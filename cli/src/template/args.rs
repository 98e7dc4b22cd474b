//! What can be said about templates.

use std::time::Duration;

use clap::{Args, Subcommand};

use crate::words::{Format, Keys, Shape, size};

/// Makes, lists and removes the templates that machines go on from.
#[derive(Debug, Args)]
pub(crate) struct Templates {
    #[command(subcommand)]
    pub(crate) command: Template,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Template {
    /// Make a template of machines of one size
    Create(Create),
    /// List templates
    Ls(Keys),
    /// Say everything that is known of templates
    Inspect(Inspect),
    /// Remove templates
    Rm(Rm),
    /// Remove templates that are of no use any more
    Prune(Prune),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Machines of the same size are made of it, as long as kernel, agent, mvm and this host stay what they are."
)]
pub(crate) struct Create {
    #[command(flatten)]
    pub(crate) shape: Shape,
    /// Make it anew although it is there
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Print nothing but its key
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// How to print what was made
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
    /// When nothing else is to be done, and in silence
    #[arg(long, hide = true)]
    pub(crate) background: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Keys, or the beginnings of keys
    #[arg(required = true, value_name = "TEMPLATE")]
    pub(crate) templates: Vec<String>,
    /// How to print them
    #[arg(long, value_enum, default_value_t = Format::Json)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
#[command(after_help = "Machines that were made of a template go on without it.")]
pub(crate) struct Rm {
    /// Keys, or the beginnings of keys
    #[arg(required = true, value_name = "TEMPLATE")]
    pub(crate) templates: Vec<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "What always goes: templates of another kernel, agent or mvm, and those that were set aside."
)]
pub(crate) struct Prune {
    /// All templates
    #[arg(short, long)]
    pub(crate) all: bool,
    /// What was not used for this long: 12h, 30days
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) unused_for: Option<Duration>,
    /// The least recently used, until the rest takes no more than this: 500M, 20G
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) max_size: Option<u64>,
    /// How to print the report
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
}
