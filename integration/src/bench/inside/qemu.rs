//! The same guests under QEMU's microvm.

use std::io;
use std::process::{Child, Command, Stdio};

use super::Files;
use super::guest::{Job, Results, listen};

/// Address of QEMU's guest; our own guests are not reached by the host's vsock.
const CID: u32 = 7;
/// Who reads the disk for QEMU.
pub(super) const READERS: [&str; 2] = ["threads", "io_uring"];

/// Killed when it is of no more use.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        // It is our child and not reaped yet; it may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Does `job` in QEMU, disk requests served as `reader` says, the tap by the kernel if `vhost`.
pub(super) fn in_qemu(files: &Files, job: &Job<'_>, reader: &str, vhost: bool) -> io::Result<Results> {
    let (words, output) = io::pipe()?;
    let mut command = Command::new("qemu-system-x86_64");
    let machine = "microvm,accel=kvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=off";
    command.args([
        "-M",
        machine,
        "-cpu",
        "host",
        "-m",
        "128M",
        "-smp",
        "1",
        "-nodefaults",
        "-no-user-config",
    ]);
    command.args(["-display", "none", "-no-reboot", "-append", &job.cmdline()]);
    command.arg("-kernel").arg(&files.kernel).arg("-initrd").arg(&files.initrd);
    // One port: then the guest has its console before its first process starts.
    command.args(["-device", "virtio-serial-device,max_ports=1", "-device", "virtconsole,chardev=words"]);
    command.args(["-chardev", "file,id=words,path=/proc/self/fd/1"]);
    if let Some(path) = job.disk {
        let drive = format!("id=disk,if=none,format=raw,readonly=on,aio={reader},file={}", path.display());
        command.args(["-object", "iothread,id=io", "-drive", &drive]);
        command.args(["-device", "virtio-blk-device,drive=disk,iothread=io"]);
    }
    if let Some(name) = job.tap {
        let vhost = if vhost { "on" } else { "off" };
        let tap = format!("tap,id=net,ifname={name},script=no,downscript=no,vhost={vhost}");
        command.args(["-netdev", &tap, "-device", "virtio-net-device,netdev=net"]);
    }
    if job.vsock {
        command.args(["-device", &format!("vhost-vsock-device,guest-cid={CID}")]);
    }
    let child = command.stdin(Stdio::null()).stdout(output).spawn()?;
    // The command holds the pipe's other end.
    drop(command);
    let child = Qemu(child);
    let results = listen(words.into());
    drop(child);
    results
}
