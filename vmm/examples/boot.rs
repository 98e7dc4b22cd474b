//! Boots a kernel with its console on this terminal: `boot KERNEL [INITRD] [-- CMDLINE]`.
//!
//! MVM_CPUS, MVM_MEMORY (MiB), MVM_PROTOCOL (pvh) and MVM_IMAGE (copy) change the machine, MVM_DEVICES is a JSON
//! array of devices, MVM_DISK a list of disks; MVM_SERIAL=off leaves the console out; MVM_CONTROL is where the
//! control socket is made. Events go to standard error.
#![allow(clippy::print_stderr)]

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;

use mvm_vmm::config::{Boot, DeviceSpec, Image, MachineConfig, Protocol, Serial, Start};
use mvm_vmm::launch::{Ended, Files, Launch};

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let images: Vec<String> = arguments.by_ref().take_while(|argument| argument != "--").collect();
    let cmdline: Vec<String> = arguments.collect();
    let kernel = images.first().ok_or("usage: boot KERNEL [INITRD] [-- CMDLINE]")?;

    let mut files = Files::default();
    let kvm = files.add(File::options().read(true).write(true).open("/dev/kvm")?);
    let kernel = files.add(File::open(kernel)?);
    let initrd = images.get(1).map(File::open).transpose()?.map(|file| files.add(file));
    let serial = match std::env::var("MVM_SERIAL").as_deref() {
        Ok("off") => None,
        _ => Some(Serial { output: files.add(io::stdout().as_fd().try_clone_to_owned()?), input: None }),
    };
    let protocol = match std::env::var("MVM_PROTOCOL").as_deref() {
        Ok("pvh") => Protocol::Pvh,
        _ => Protocol::Linux64,
    };
    let image = match std::env::var("MVM_IMAGE").as_deref() {
        Ok("copy") => Image::Copy,
        _ => Image::Map,
    };
    let control = std::env::var_os("MVM_CONTROL").map(UnixListener::bind).transpose()?;
    let config = MachineConfig {
        cpus: number("MVM_CPUS", 1)?.try_into()?,
        memory: number("MVM_MEMORY", 256)?.try_into()?,
        devices: devices(&mut files)?,
        serial,
        control: control.map(|listener| files.add(listener)),
        ..MachineConfig::new(
            "boot".parse()?,
            kvm,
            Start::Boot(Boot { kernel, initrd, cmdline: cmdline.join(" ").try_into()?, protocol, image }),
        )
    };
    let stderr = Some(io::stderr().as_fd().try_clone_to_owned()?);
    let mut child = Launch { config, files, stderr }.spawn()?;
    for event in child.events.by_ref() {
        eprintln!("boot: {:?}", event?);
    }
    let ended = child.wait()?;
    eprintln!("boot: {ended:?}");
    Ok(match ended {
        Ended::Exit(exit) => exit.code().into(),
        _ => ExitCode::FAILURE,
    })
}

/// Disks named by MVM_DISK, separated by commas.
fn devices(files: &mut Files) -> Result<Vec<DeviceSpec>, Box<dyn Error>> {
    let mut devices = Vec::new();
    for path in std::env::var("MVM_DISK").unwrap_or_default().split_terminator(',') {
        let disk = files.add(File::options().read(true).write(true).open(path)?);
        devices.push(serde_json::from_value(serde_json::json!({"type": "block", "disk": disk}))?);
    }
    if let Ok(json) = std::env::var("MVM_DEVICES") {
        devices.extend(serde_json::from_str::<Vec<DeviceSpec>>(&json)?);
    }
    Ok(devices)
}

fn number(variable: &str, default: u64) -> Result<u64, Box<dyn Error>> {
    Ok(std::env::var(variable).map_or(Ok(default), |text| text.parse())?)
}
