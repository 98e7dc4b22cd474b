//! QEMU's command line: which machine, which channels, which shared directories.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::{Command, Stdio};

use super::emulator::Emulator;
use super::kernel::which;
use super::workdir::Workdir;
use super::{Error, Image, Options};

/// Channels of the job, in the order of their port numbers from 1.
pub(super) const CHANNELS: [&str; 3] = ["out", "err", "control"];
/// Kernel parameters of both modes. Mitigations, write protection and certificates guard nothing here and cost emulated
/// instructions, as do the blacklisted initcalls (tracing, a self-tested entropy source, BPF type information): together
/// a fifth of the boot. The tests of ciphers, which come with the modules of networks, went on for 0.6 virtual seconds
/// beside whatever was measured. A panic ends QEMU; so does a CPU that is stuck in the kernel for 20 s, and an oops.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 oops=panic softlockup_panic=1 nokaslr mitigations=off rodata=off random.trust_cpu=on audit=0 no_timer_check \
    initcall_blacklist=load_system_certificate_list,jent_mod_init,trace_eval_init,init_kprobe_trace,\
    bpf_dummy_struct_ops_init,bpf_tcp_ca_kfunc_init cryptomgr.notests=1";

/// The QEMU of one run; its standard output is the kernel's console.
pub(super) fn command(options: &Options, image: &Image, dir: &Workdir) -> Result<Command, Error> {
    // setpriv ends QEMU with us even when we are killed.
    let mut command =
        Command::new(which("setpriv").ok_or(Error::Missing { program: "setpriv", package: "util-linux" })?);
    let emulator = match options.deterministic {
        true => Emulator::of_virtual_time()?,
        false => image.emulator.clone(),
    };
    command.args(["--pdeathsig", "KILL"]).arg(&emulator.program);
    for firmware in &emulator.firmware {
        command.arg("-L").arg(firmware);
    }
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-M", "q35"]);
    if options.deterministic {
        command.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=on"]);
        command.args(["-smp", "1", "-cpu", "max,-erms"]);
    } else {
        command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", &options.cpus.to_string()]);
    }
    command.args(["-m", &options.memory_mib.to_string(), "-serial", "stdio"]);
    let parameters = std::iter::once(CMDLINE).chain(options.kernel_args.iter().map(String::as_str));
    command.args(["-append", &parameters.collect::<Vec<_>>().join(" ")]);
    command.arg("-kernel").arg(&image.kernel).arg("-initrd").arg(&image.initramfs);
    command.args(["-device", "virtio-serial-pci"]);
    for (number, name) in (1..).zip(CHANNELS) {
        command.arg("-chardev").arg(option(&format!("socket,id={name},path="), &dir.socket(name), ""));
        command.args(["-device", &format!("virtserialport,nr={number},chardev={name},name=lab.{name}")]);
    }
    command.arg("-virtfs").arg(share("job", &dir.job(), "readonly=on"));
    command.arg("-virtfs").arg(share("hostroot", Path::new("/"), "readonly=on,multidevs=remap"));
    if let Some(out) = &dir.out {
        command.arg("-virtfs").arg(share("out", out, "multidevs=remap"));
    }
    command.args(&options.qemu_args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

fn share(tag: &str, path: &Path, rest: &str) -> OsString {
    option("local,path=", path, &format!(",mount_tag={tag},security_model=none,{rest}"))
}

/// An option with a path in it; QEMU reads a doubled comma as a comma.
fn option(before: &str, path: &Path, after: &str) -> OsString {
    let mut bytes = before.as_bytes().to_vec();
    for &byte in path.as_os_str().as_bytes() {
        bytes.push(byte);
        if byte == b',' {
            bytes.push(byte);
        }
    }
    bytes.extend_from_slice(OsStr::new(after).as_bytes());
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_in_a_path_is_doubled() {
        assert_eq!(option("path=", Path::new("/a,b"), ",x=y"), "path=/a,,b,x=y");
    }
}
