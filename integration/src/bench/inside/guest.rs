//! Runs `guest_bench` in a machine and reads what it says on the console.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use mvm_devices::virtio::vsock::dialer::DialServer;
use mvm_devices::virtio::{DeviceSpec, block, console, net, vsock};
use mvm_runtime::container::CMDLINE;
use mvm_runtime::net::open_tap;
use mvm_vmm::config::{Boot, MachineConfig, Start};
use mvm_vmm::launch::{Child, Launch};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};

use super::{Files, boot};

/// How long a guest may take, on the emulated host's clock.
const TIME: Duration = Duration::from_secs(30);
/// Most bytes a guest may say.
const MAX_WORDS: usize = 64 * 1024;

/// What a guest is to do and with what.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Job<'a> {
    /// Words for its kernel's command line.
    pub words: &'a str,
    /// A disk to read.
    pub disk: Option<&'a Path>,
    /// A vsock device.
    pub vsock: bool,
    /// A tap to be on.
    pub tap: Option<&'a str>,
}

impl Job<'_> {
    /// The whole command line.
    pub(super) fn cmdline(&self) -> String {
        format!("{CMDLINE} console=hvc0 {}", self.words)
    }
}

/// What a guest found out, by name.
pub(super) type Results = BTreeMap<String, f64>;

/// Does `job` in a machine of ours; `calls` answers the guest's vsock connections.
pub(super) fn in_mvm(files: &Files, job: &Job<'_>, calls: impl FnOnce(DialServer)) -> io::Result<Results> {
    let (words, output) = io::pipe()?;
    let mut opened = mvm_vmm::launch::Files::default();
    let kvm = opened.add(File::options().read(true).write(true).open("/dev/kvm")?);
    let kernel = opened.add(File::open(&files.kernel)?);
    let initrd = Some(opened.add(File::open(&files.initrd)?));
    let mut devices = Vec::new();
    if let Some(path) = job.disk {
        devices.push(DeviceSpec::Block(block::Config {
            disk: opened.add(File::open(path)?),
            read_only: true,
            serial: String::new(),
            queues: 1,
            cache: block::Cache::Writeback,
        }));
    }
    if let Some(name) = job.tap {
        let tap = opened.add(open_tap(name).map_err(boot::explain)?);
        devices.push(DeviceSpec::Net(net::Config { tap, mac: None, mtu: None, only_own_mac: false }));
    }
    let (server, dialer) = DialServer::pair()?;
    if job.vsock {
        let dialer = Some(opened.add(dialer));
        devices
            .push(DeviceSpec::Vsock(vsock::Config { dialer, ..vsock::Config::new(vsock::GuestCid::FIRST) }));
    }
    devices.push(DeviceSpec::Console(console::Config {
        input: None,
        output: opened.add(OwnedFd::from(output)),
        unlimited: true,
        size: None,
    }));
    let cmdline = job.cmdline().try_into().map_err(io::Error::other)?;
    let config = MachineConfig {
        memory: 128.try_into().map_err(io::Error::other)?,
        devices,
        ..MachineConfig::new(
            "bench".parse().map_err(io::Error::other)?,
            kvm,
            Start::Boot(Boot { initrd, cmdline, ..Boot::new(kernel) }),
        )
    };
    let stderr = io::stderr().as_fd().try_clone_to_owned().ok();
    let child = Launch { config, files: opened, stderr }.spawn().map_err(io::Error::other)?;
    let child = Ours(child);
    calls(server);
    let results = listen(words.into());
    drop(child);
    results
}

/// Killed when it is of no more use.
struct Ours(Child);

impl Drop for Ours {
    fn drop(&mut self) {
        // It is our child and not reaped yet; it may have ended by itself.
        let _ = kill(self.0.pid, Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

/// Reads the console until the guest is done.
pub(super) fn listen(words: OwnedFd) -> io::Result<Results> {
    let end = Instant::now() + TIME;
    let mut words = File::from(words);
    let mut said = Vec::new();
    let mut bytes = [0; 4096];
    loop {
        let left = end.saturating_duration_since(Instant::now()).as_millis();
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let ready = poll(&mut [PollFd::new(words.as_fd(), PollFlags::POLLIN)], timeout)?;
        let count = if ready == 0 { 0 } else { words.read(&mut bytes)? };
        said.extend_from_slice(&bytes[..count]);
        let text = String::from_utf8_lossy(&said);
        if text.contains("bench-end") {
            return Ok(parse(&text));
        }
        if count == 0 || said.len() > MAX_WORDS || text.contains("bench-failed") {
            let why = if ready == 0 { "in time" } else { "" };
            return Err(io::Error::other(format!(
                "the guest did not finish {why}; it said: {}",
                text.trim()
            )));
        }
    }
}

fn parse(text: &str) -> Results {
    let number = |line: &str| -> Option<(String, f64)> {
        let (name, value) = line.trim().split_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    text.lines().filter_map(number).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn results_are_the_lines_of_a_name_and_a_number() {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"[0.1] kernel talk\r\nbench-begin\r\nread4k_ns 51000\r\nbench-end\r\n").unwrap();
        let results = listen(reader.into()).unwrap();
        assert_eq!(results.get("read4k_ns"), Some(&51000.0));
        assert_eq!(results.len(), 1);
    }

    #[test]
    fn a_guest_that_fails_or_goes_away_is_an_error_with_its_words() {
        for words in [&b"bench-failed no disk\n"[..], b"bench-begin\n"] {
            let (reader, mut writer) = io::pipe().unwrap();
            writer.write_all(words).unwrap();
            drop(writer);
            assert!(listen(reader.into()).unwrap_err().to_string().contains("bench-"));
        }
    }
}
