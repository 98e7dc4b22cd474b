//! `mvm version`: what this is, and what its guests are made of.

use std::path::PathBuf;

use mvm_runtime::failure::Failure;
use mvm_runtime::guest::GuestFiles;
use serde::Serialize;

use crate::args::Version;
use crate::life::{json, print};
use crate::words::Format;

#[derive(Serialize)]
struct Report {
    version: &'static str,
    /// What is spoken with agents.
    agent_protocol: String,
    /// The guest's kernel, if it is there.
    kernel: Option<PathBuf>,
    /// The guest's agent, if it is there.
    agent: Option<PathBuf>,
}

pub(crate) fn version(options: &Version) -> Result<u8, Failure> {
    let guest = GuestFiles::find().ok();
    let protocol = mvm_protocol::VERSION;
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        agent_protocol: format!("{}.{}", protocol.major, protocol.minor),
        kernel: guest.as_ref().map(|guest| guest.kernel.clone()),
        agent: guest.map(|guest| guest.agent),
    };
    if options.format == Format::Json {
        return print(&json(&report)?).map(|()| 0);
    }
    let path = |path: &Option<PathBuf>| match path {
        Some(path) => path.display().to_string(),
        None => "not found; mvm doctor says more".to_owned(),
    };
    let (kernel, agent) = (path(&report.kernel), path(&report.agent));
    let Report { version, agent_protocol, .. } = report;
    let text = format!("mvm {version}\nagent protocol {agent_protocol}\nkernel {kernel}\nagent {agent}\n");
    print(&text).map(|()| 0)
}
