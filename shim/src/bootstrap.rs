//! `start`: find the daemon of a task's group or leave a new one behind, and tell containerd where it is.
//!
//! containerd reads standard output and standard error together until both are closed, so that the answer must be
//! the only thing on them and the daemon must hold neither.

use std::fs;
use std::io::{self, IsTerminal, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use mvm_runtime::failure::{Context, Failure};

use crate::address::{self, Socket};
use crate::bundle;
use crate::flags::Flags;

/// What a daemon says once it serves.
pub(crate) const READY: &str = "ready";
/// Largest input that is read, in bytes.
const MAX_INPUT: u64 = 16 << 20;

/// Finds or starts the daemon; gives the answer for containerd.
pub(crate) fn start(flags: &Flags) -> Result<Vec<u8>, Failure> {
    let params = params(flags)?;
    let directory = params.as_ref().and_then(|params| params.socket_dir.as_deref());
    let group = bundle::group(Path::new("."), &flags.id)?;
    let path = address::path(directory, &flags.address, &flags.namespace, &group);
    let socket =
        address::bind(&path).context(|| format!("cannot make the shim's socket {}", path.display()))?;
    if let Socket::Bound(listener) = socket
        && let Err(failure) = leave_daemon(flags, params.as_ref(), &group, listener)
    {
        address::remove_stale(&path);
        return Err(failure);
    }
    let address = format!("unix://{}", path.display());
    // containerd 1.x finds its shims by this file after a restart.
    bundle::replace(Path::new("address"), address.as_bytes())
        .context(|| "cannot write the bundle's address file".to_owned())?;
    answer(address, params.is_some())
}

/// What containerd 2.3 and later say on standard input. Earlier ones put the runtime's options there, which may
/// happen to parse: only parameters that repeat the command line are parameters.
fn params(flags: &Flags) -> Result<Option<BootstrapParams>, Failure> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Ok(None);
    }
    let mut input = Vec::new();
    stdin
        .lock()
        .take(MAX_INPUT)
        .read_to_end(&mut input)
        .context(|| "cannot read standard input".to_owned())?;
    Ok(parse_params(&input, flags))
}

fn parse_params(input: &[u8], flags: &Flags) -> Option<BootstrapParams> {
    let params = BootstrapParams::parse_from_bytes(input).ok()?;
    (params.instance_id == flags.id && params.namespace == flags.namespace).then_some(params)
}

/// An address alone means task service version 2 to every containerd; version 3 is understood where parameters are.
fn answer(address: String, has_params: bool) -> Result<Vec<u8>, Failure> {
    if !has_params {
        return Ok(address.into_bytes());
    }
    let result = BootstrapResult { version: 3, address, protocol: "ttrpc".to_owned(), ..Default::default() };
    result.write_to_bytes().context(|| "cannot encode the answer".to_owned())
}

/// Starts this program again as the daemon, which inherits the socket as its standard input, and waits until it
/// serves or says why it cannot.
fn leave_daemon(
    flags: &Flags,
    params: Option<&BootstrapParams>,
    group: &str,
    listener: UnixListener,
) -> Result<(), Failure> {
    let (mut words, mouth) = io::pipe().context(|| "cannot make a pipe".to_owned())?;
    let other_mouth = mouth.try_clone().context(|| "cannot make a pipe".to_owned())?;
    let program = std::env::current_exe().context(|| "cannot find the shim's program".to_owned())?;
    let mut command = Command::new(program);
    command
        .args(["-namespace", &flags.namespace, "-id", group, "-address", &flags.address])
        .args(flags.debug.then_some("-debug"))
        .arg("serve")
        .stdin(OwnedFd::from(listener))
        .stdout(mouth)
        .stderr(other_mouth)
        // One heap for all threads, given back early: a shim is paid for once a container.
        .env("MALLOC_ARENA_MAX", "1")
        .env("MALLOC_TRIM_THRESHOLD_", "131072")
        .env("MALLOC_MMAP_THRESHOLD_", "131072");
    if let Some(params) = params {
        command.env("TTRPC_ADDRESS", &params.containerd_ttrpc_address);
    }
    let mut child = command.spawn().context(|| "cannot start the shim's daemon".to_owned())?;
    adjust_oom_score(child.id());
    // Else its end of the pipe would never be the last.
    drop(command);
    let mut said = String::new();
    words.read_to_string(&mut said).context(|| "cannot hear the shim's daemon".to_owned())?;
    if said.trim_end() == READY {
        return Ok(());
    }
    let _ = child.wait();
    let said = if said.is_empty() { "it died" } else { said.trim_end() };
    Err(Failure::because("the shim's daemon did not start", said.to_owned()))
}

/// As every shim: killed for want of memory before containerd, but long after any container. What it lacks the right
/// to do is left.
fn adjust_oom_score(pid: u32) {
    let parent = nix::unistd::getppid();
    let score = fs::read_to_string(format!("/proc/{parent}/oom_score_adj"));
    if let Some(score) = score.ok().and_then(|text| text.trim().parse::<i32>().ok()) {
        let score = score.saturating_add(1).min(1000);
        let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    fn flags() -> Flags {
        let line = "-namespace default -id c1 -address /run/c.sock start";
        Flags::parse(line.split(' ').map(str::to_owned)).unwrap()
    }

    #[test]
    fn parameters_that_repeat_the_command_line_get_a_result_of_version_3() {
        let sent = BootstrapParams {
            instance_id: "c1".to_owned(),
            namespace: "default".to_owned(),
            containerd_ttrpc_address: "/run/c.sock.ttrpc".to_owned(),
            ..Default::default()
        };
        let params = parse_params(&sent.write_to_bytes().unwrap(), &flags()).unwrap();
        assert_eq!(params, sent);
        let result =
            BootstrapResult::parse_from_bytes(&answer("unix:///s".to_owned(), true).unwrap()).unwrap();
        assert_eq!(
            (result.version, result.address.as_str(), result.protocol.as_str()),
            (3, "unix:///s", "ttrpc")
        );
    }

    #[test]
    fn options_of_earlier_versions_are_no_parameters_although_they_parse() {
        let options = Any {
            type_url: "runtimeoptions.v1.Options".to_owned(),
            value: b"\x0a\x03abc".to_vec(),
            ..Default::default()
        };
        let input = options.write_to_bytes().unwrap();
        assert!(BootstrapParams::parse_from_bytes(&input).is_ok(), "else the test shows nothing");
        assert_eq!(parse_params(&input, &flags()), None);
        assert_eq!(parse_params(b"", &flags()), None);
        assert_eq!(parse_params(b"\xff\xff\xff", &flags()), None);
        assert_eq!(answer("unix:///s".to_owned(), false).unwrap(), b"unix:///s");
    }
}
