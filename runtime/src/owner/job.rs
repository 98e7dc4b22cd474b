//! What a container is run of: everything that was found out about it before its machine is started.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use mvm_protocol::WindowSize;
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

use crate::agent::StdioSpec;
use crate::failure::{Context, Failure};
use crate::net::NetRequest;
use crate::state::{Condition, ProcessId, Record, Restart, now};

/// A container to be run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What its user marked it with.
    pub labels: BTreeMap<String, String>,
    /// The image as it was named.
    pub image: String,
    /// Its root file system, an EROFS image.
    pub rootfs: PathBuf,
    /// All else of it.
    pub spec: Spec,
    /// Whether it is started again when it has ended.
    pub restart: Restart,
    /// It is removed once it has ended.
    pub remove: bool,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Its network.
    pub net: JobNetwork,
    /// Standard input is connected.
    pub stdin: bool,
    /// Say at the end how long each stage took and what the machine cost.
    pub stats: bool,
}

/// A container's network, as its user named it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobNetwork {
    /// Which one.
    pub choice: String,
    /// Ports of the host that lead to it.
    pub publish: Vec<String>,
    /// Name servers, instead of the host's.
    pub dns: Vec<IpAddr>,
    /// Largest packet in bytes, if it is not the network's choice.
    pub mtu: Option<u16>,
}

impl JobNetwork {
    /// The same as the host is asked for it.
    ///
    /// # Errors
    /// It cannot be understood.
    pub fn request(&self) -> Result<NetRequest, Failure> {
        let publish: Result<Vec<_>, _> = self.publish.iter().map(|text| text.parse()).collect();
        Ok(NetRequest {
            choice: self.choice.parse().context(|| "cannot understand the network".to_owned())?,
            publish: publish.context(|| "cannot understand a published port".to_owned())?,
            dns: self.dns.clone(),
            mtu: self.mtu,
            ..NetRequest::default()
        })
    }
}

impl Job {
    /// The record of a container that this process begins to own.
    pub fn record(&self) -> Record {
        let process = self.spec.process().as_ref();
        Record {
            id: self.id.clone(),
            name: self.name.clone(),
            labels: self.labels.clone(),
            image: self.image.clone(),
            command: process.and_then(|it| it.args().clone()).unwrap_or_default(),
            created: now(),
            condition: Condition::Starting,
            owner: ProcessId::own(),
            remove: self.remove,
            restart: self.restart,
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            ports: self.net.publish.clone(),
            ..Record::default()
        }
    }

    /// The standard streams of its process; `size` is that of its terminal, if it has one.
    pub fn stdio(&self, size: impl FnOnce() -> WindowSize) -> StdioSpec {
        if self.spec.process().as_ref().and_then(|it| it.terminal()).unwrap_or(false) {
            StdioSpec::Terminal(size())
        } else {
            StdioSpec::Pipes { stdin: self.stdin, stdout: true, stderr: true }
        }
    }
}
