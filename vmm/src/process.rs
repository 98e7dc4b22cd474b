//! A machine's process from `main` to its exit code.

use std::fs::File;
use std::io::{Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::config::{MAX_CONFIG_BYTES, MachineConfig, Restore, Start};
use crate::error::{Error, Result, causes};
use crate::exit::Exit;
use crate::fds::{Slots, duplicate_above};
use crate::jail::{self, Thread};
use crate::log;
use crate::machine::{Machine, set_nonblocking};
use crate::status::{Event, Stages, Stream, now};
use crate::supervisor::{Supervisor, block_signals};
use crate::userfault::Userfault;

/// Descriptors the table has room for from the start: growing it once there are threads waits for a grace
/// period in the host's kernel.
const DESCRIPTORS: i32 = 255;

/// Argument: calls that are not allowed are told to the kernel's log, and made. Nothing a guest can say is an argument.
pub(crate) const LOG_ONLY: &str = "seccomp=log";

/// Bytes that few configurations exceed.
const USUAL_CONFIG_BYTES: usize = 4096;

/// Runs the machine that descriptor 3 describes. Returns the process's exit code.
///
/// The program's arguments are the number of slots that follow the configuration, then, if more than warnings are to
/// be logged, the level, and [`LOG_ONLY`] if the jail is to tell rather than to hold.
pub fn run() -> u8 {
    let mut stages = Stages { entered_ns: now(), ..Stages::default() };
    let level = std::env::args().skip(2).find_map(|argument| argument.parse().ok());
    log::install(level.unwrap_or(::log::LevelFilter::Warn));
    if std::env::args().skip(2).any(|argument| argument == LOG_ONLY) {
        ::log::warn!("the machine's process may make any system call ({LOG_ONLY})");
        jail::log_only();
    }
    let mut slots = Slots::default();
    let config = match read_config(&mut slots) {
        Ok(config) => config,
        Err(error) => return fail(&error, &Stream::default()),
    };
    let userfault = userfault(&config, &mut slots);
    if let Err(error) = slots.take_optional(config.root, "root directory").and_then(jail::enter) {
        return fail(&error, &Stream::default());
    }
    stages.config_ns = now();
    let status = match status_stream(&config, &mut slots) {
        Ok(status) => Arc::new(status),
        Err(error) => return fail(&error, &Stream::default()),
    };
    match run_machine(&config, (&mut slots, userfault), &status, stages) {
        Ok(exit) => {
            let code = exit.code();
            // Whoever reads the status stream tells the user.
            if let (Exit::InternalError { detail }, false) = (&exit, status.has_sink()) {
                complain(&format!(
                    "mvm-vmm: machine {:?} cannot go on\n  because: {detail}\n",
                    config.id.as_str()
                ));
            }
            status.send(&Event::Exit { exit, ns: now() });
            code
        }
        Err(error) => fail(&error, &status),
    }
}

fn run_machine(
    config: &MachineConfig,
    (slots, userfault): (&mut Slots, Result<Option<Userfault>>),
    status: &Arc<Stream>,
    mut stages: Stages,
) -> Result<Exit> {
    let userfault = userfault?;
    let signals = block_signals()?;
    let control = slots.take_optional(config.control, "control socket")?;
    let mut machine = Machine::build(config, (slots, userfault), status, &mut stages)?;
    let vcpus = machine.start()?;
    status.send(&Event::Started { stages });
    machine.complete(&config.start)?;
    if let Some(source) = &machine.source {
        source.serving();
    }
    // Never dropped: the process ends next, and taking its threads down in order would only take time.
    let mut supervisor = ManuallyDrop::new(Supervisor::new(config, machine, vcpus, &signals, control)?);
    jail::confine(Thread::Main).map_err(Error::system("give up system calls"))?;
    Ok(supervisor.run())
}

/// By what missing memory is reported, if any is elsewhere. Later the process has no right to it.
fn userfault(config: &MachineConfig, slots: &mut Slots) -> Result<Option<Userfault>> {
    let Start::Restore(Restore { userfault: Some(by), .. }) = &config.start else { return Ok(None) };
    let device = slots.take_optional(by.device, "/dev/userfaultfd")?.map(File::from);
    Userfault::new(device.as_ref()).map(Some).map_err(Error::Userfault)
}

fn read_config(slots: &mut Slots) -> Result<MachineConfig> {
    if let Some(count) = std::env::args().nth(1).and_then(|count| count.parse().ok()) {
        slots
            .close_beyond(count)
            .map_err(Error::system("close descriptors that were not meant to be passed"))?;
    }
    let fd = slots.take_config().map_err(Error::ReadConfig)?;
    reserve_descriptors(&fd).map_err(Error::ReadConfig)?;
    // Room for most configurations, which are then read at once.
    let mut text = Vec::with_capacity(USUAL_CONFIG_BYTES);
    File::from(fd).take(MAX_CONFIG_BYTES).read_to_end(&mut text).map_err(Error::ReadConfig)?;
    serde_json::from_slice(&text).map_err(Error::ParseConfig)
}

fn reserve_descriptors(any: &OwnedFd) -> std::io::Result<()> {
    duplicate_above(any, DESCRIPTORS).map(drop)
}

fn status_stream(config: &MachineConfig, slots: &mut Slots) -> Result<Stream> {
    let fd = slots.take_optional(config.status, "status stream")?;
    if let Some(fd) = &fd {
        set_nonblocking(fd)?;
    }
    Ok(Stream::new(fd.map(File::from)))
}

/// Says what went wrong, to the parent and to people.
fn fail(error: &Error, status: &Stream) -> u8 {
    let (message, because, help) = (error.to_string(), causes(error), error.hint());
    let mut text = format!("mvm-vmm: {message}\n");
    for cause in &because {
        text.push_str(&format!("  because: {cause}\n"));
    }
    if let Some(help) = &help {
        text.push_str(&format!("  help:    {help}\n"));
    }
    if !status.has_sink() {
        complain(&text);
    }
    status.send(&Event::Error { message, because, help });
    Exit::FAILED_TO_START
}

pub(crate) fn complain(text: &str) {
    // If nobody listens there is nobody to tell.
    let _ = std::io::stderr().write_all(text.as_bytes());
}
