//! A tap that stands for a link: every frame that comes in on one goes out on the other.
//!
//! The link is the one a network plug-in made in a pod's name space. The guest on the tap takes its hardware address
//! and its place; the name space's own kernel no longer sees what arrives there.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mvm_devices::virtio::net::MacAddress;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use serde::{Deserialize, Serialize};

use super::netlink::{LinkEntry, Message, Netlink};
use super::scan::TUN;
use super::tap::{AnyTap, open_new_tap};
use super::{Link, Net, Netns, OpenTap};
use crate::failure::{Context, Failure};
use crate::state::{Ledger, Resource};

/// How taps of ours are called; the kernel picks a free number.
const TAP_NAME: &str = "mvm%d";
const TAP_PREFIX: &str = "mvm";
/// How often a queueing discipline that is busy is tried, and how long apart: another one is just going away.
const TRIES: u32 = 50;
const APART: Duration = Duration::from_millis(10);

/// A tap in a name space, not connected to anything: for a guest that boots before its network is there.
#[derive(Debug)]
pub struct SpareTap {
    netns: Netns,
    name: String,
    index: u32,
    nic: OpenTap,
}

impl SpareTap {
    /// Makes a tap in `netns` for a card with the address `mac`. It goes away when no one has it open any more.
    ///
    /// # Errors
    /// No rights, or no tun driver.
    pub fn make(netns: &Netns, mac: MacAddress) -> Result<Self, Failure> {
        let make = || -> Result<_, Failure> {
            let tap = open_new_tap(TAP_NAME)?;
            let index = if_nametoindex(tap.name.as_str()).context(|| format!("cannot find {}", tap.name))?;
            Ok((tap, index))
        };
        let (AnyTap { file, name }, index) = netns.run(make)??;
        let nic = OpenTap { file: Arc::new(file), mac, mtu: None, only_own_mac: false };
        Ok(Self { netns: netns.clone(), name, index, nic })
    }

    /// The guest's card.
    pub fn net(&self) -> Net {
        Net::Open(self.nic.clone())
    }

    /// The card's hardware address.
    pub fn mac(&self) -> MacAddress {
        self.nic.mac
    }

    /// Makes the tap the twin of `link`, which gets the card's hardware address if it has another one. What would
    /// outlive this process is noted in `ledger` before.
    ///
    /// # Errors
    /// The link is not there, or the kernel refuses the redirection; no traces are left then.
    pub fn connect(self, link: &Link, ledger: Option<&Ledger>) -> Result<Twin, Failure> {
        let Self { netns, name, index, nic } = self;
        let mtu = u16::try_from(link.mtu).unwrap_or(u16::MAX);
        let nic = OpenTap { mtu: Some(mtu), ..nic };
        let mac = (link.mac != nic.mac).then_some(nic.mac);
        if let (Some(ledger), Some(path)) = (ledger, netns.path()) {
            ledger.note(&Resource::Twin(TwinTrace {
                netns: path.to_path_buf(),
                link: link.name.clone(),
                mac: nic.mac.bytes(),
                tap: name.clone(),
                index,
            }))?;
        }
        let twin = Twin { netns, tap: name, link: link.name.clone(), nic, undone: false };
        twin.netns
            .run(|| join(link, &twin.tap, mac))?
            .context(|| format!("cannot connect a tap to {} in {}", link.name, twin.netns))?;
        Ok(twin)
    }
}

/// Makes a tap in `netns` that stands for `link`, with its hardware address and its MTU; noted in `ledger`.
///
/// # Errors
/// No rights, no tun driver, the link is not there, or the kernel has no `ingress`, `u32` or `mirred`.
pub fn twin(netns: &Netns, link: &Link, ledger: Option<&Ledger>) -> Result<Twin, Failure> {
    SpareTap::make(netns, link.mac)?.connect(link, ledger)
}

/// A tap and the link it stands for. Undone when dropped.
#[derive(Debug)]
pub struct Twin {
    netns: Netns,
    tap: String,
    link: String,
    nic: OpenTap,
    undone: bool,
}

impl Twin {
    /// The guest's card: the open tap, its hardware address and MTU.
    pub fn net(&self) -> Net {
        Net::Open(self.nic.clone())
    }

    /// The open tap.
    pub fn file(&self) -> &File {
        &self.nic.file
    }

    /// Hardware address of the card and the link.
    pub fn mac(&self) -> MacAddress {
        self.nic.mac
    }

    /// Name of the tap in the name space.
    pub fn tap(&self) -> &str {
        &self.tap
    }

    /// Name of the link.
    pub fn link(&self) -> &str {
        &self.link
    }

    /// Undoes the redirection and the tap, whoever has it open. What is gone already is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove(mut self) -> Result<(), Failure> {
        self.undone = true;
        self.undo()
    }

    fn undo(&self) -> Result<(), Failure> {
        self.netns
            .run(|| part(&self.link, &self.tap))?
            .context(|| format!("cannot disconnect {} from {} in {}", self.tap, self.link, self.netns))
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        if !self.undone
            && let Err(failure) = self.undo()
        {
            log::warn!("{}", failure.report());
        }
    }
}

/// What a twin leaves behind if its process dies: the redirection, and the tap while a machine has it open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TwinTrace {
    /// Where the network name space is.
    pub netns: PathBuf,
    /// Name of the link.
    pub link: String,
    /// Its hardware address, which a later link of its name has not.
    pub mac: [u8; 6],
    /// Name of the tap.
    pub tap: String,
    /// Its number, which a later tap of its name has not.
    pub index: u32,
}

impl TwinTrace {
    /// Removes it. What is gone already, the name space above all, is no error; what another machine has made in
    /// its place is left alone.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove(&self) -> Result<(), Failure> {
        let netns = match Netns::open(&self.netns) {
            // A process whose name space it was is gone, or a name has lost its mount.
            Err(_) => return Ok(()),
            Ok(netns) => netns,
        };
        netns
            .run(|| self.remove_here())?
            .context(|| format!("cannot disconnect {} from {} in {netns}", self.tap, self.link))
    }

    fn remove_here(&self) -> nix::Result<()> {
        let mut kernel = Netlink::open()?;
        let links = kernel.list(Message::links(), LinkEntry::parse)?;
        let taps = links.iter().filter(|link| link.kind == TUN && link.name.starts_with(TAP_PREFIX));
        let (own, others): (Vec<_>, Vec<_>) =
            taps.partition(|tap| tap.index == self.index && tap.name == self.tap);
        for tap in own {
            gone_or(kernel.perform(Message::remove_link(tap.index)))?;
        }
        if !others.is_empty() {
            // Of a machine that came later: if the link leads to it, it has replaced what was there.
            return Ok(());
        }
        match links.iter().find(|link| link.name == self.link && link.mac == self.mac) {
            Some(link) => gone_or(kernel.perform(Message::remove_ingress(link.index))),
            None => Ok(()),
        }
    }
}

/// In the name space: connects the link and the tap.
fn join(link: &Link, tap: &str, mac: Option<MacAddress>) -> nix::Result<()> {
    let mut kernel = Netlink::open()?;
    let tap = if_nametoindex(tap)?;
    // Without IPv6 in the kernel there is nothing to keep quiet.
    let _ = kernel.perform(Message::without_ipv6(tap));
    kernel.perform(Message::raise(tap, Some(link.mtu)))?;
    if let Some(mac) = mac {
        kernel.perform(Message::set_mac(link.index, mac.bytes()))?;
    }
    add_ingress(&mut kernel, tap)?;
    add_ingress(&mut kernel, link.index)?;
    kernel.perform(Message::redirect(tap, link.index))?;
    kernel.perform(Message::redirect(link.index, tap))
}

/// Adds the queueing discipline. One that is there was left by a machine that crashed, and what it held with it.
fn add_ingress(kernel: &mut Netlink, index: u32) -> nix::Result<()> {
    for _ in 0..TRIES {
        match kernel.perform(Message::add_ingress(index)) {
            Err(Errno::EBUSY) => std::thread::sleep(APART),
            Err(Errno::EEXIST) => gone_or(kernel.perform(Message::remove_ingress(index)))?,
            result => return result,
        }
    }
    Err(Errno::EBUSY)
}

/// In the name space: undoes what [`join`] did.
fn part(link: &str, tap: &str) -> nix::Result<()> {
    let mut kernel = Netlink::open()?;
    let link = match if_nametoindex(link) {
        Ok(link) => gone_or(kernel.perform(Message::remove_ingress(link))),
        Err(error) => gone_or(Err(error)),
    };
    let tap = match if_nametoindex(tap) {
        Ok(tap) => gone_or(kernel.perform(Message::remove_link(tap))),
        Err(error) => gone_or(Err(error)),
    };
    link.and(tap)
}

/// Passes over what says that there is nothing to undo.
fn gone_or(result: nix::Result<()>) -> nix::Result<()> {
    match result {
        // A link without the discipline: ENOENT, of old EINVAL.
        Err(Errno::ENODEV | Errno::ENXIO | Errno::ENOENT | Errno::EINVAL) => Ok(()),
        result => result,
    }
}
