//! `guest_bench`: what the benches run inside a guest, as its first process, under every VMM alike.
//!
//! The kernel command line says what to do (`bench.read4k=COUNT`, `bench.read1m=COUNT`, `bench.vsock=PORT`,
//! `bench.tap=ADDRESS`). Results go to the console, one `name value` per line between `bench-begin` and
//! `bench-end`; all times are CLOCK_MONOTONIC of the guest, in nanoseconds.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Instant;

use mvm_integration::bench::exchange::{MESSAGE, ROUND_TRIPS, STREAM};
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

/// What direct I/O wants buffers aligned to.
const PAGE: usize = 4096;

fn main() {
    let result = run();
    say(&format!("bench-{}", result.map_or_else(|error| format!("failed {error}"), |()| "end".to_owned())));
    // The first process must not return; without power management a reset ends the machine as well.
    let _ = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT);
}

fn run() -> io::Result<()> {
    for (kind, at) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        fs::create_dir_all(at)?;
        // Some kernels mount /dev by themselves.
        let _ = mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>);
    }
    say("bench-begin");
    let line = fs::read_to_string("/proc/cmdline")?;
    for word in line.split_whitespace() {
        match word.split_once('=') {
            Some(("bench.read4k", count)) => read_random(parse(count)?)?,
            Some(("bench.read1m", count)) => read_sequential(parse(count)?)?,
            Some(("bench.vsock", port)) => exchange("vsock", vsock(parse(port)?)?)?,
            Some(("bench.tap", address)) => exchange("tap", tap(address)?)?,
            _ => {}
        }
    }
    Ok(())
}

fn parse<T: std::str::FromStr>(text: &str) -> io::Result<T> {
    text.parse().map_err(|_| io::Error::other(format!("{text:?} is not a number")))
}

/// A line on the console, whatever device that is.
fn say(text: &str) {
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = writeln!(console, "{text}");
    }
}

fn report(name: &str, value: u128) {
    say(&format!("{name} {value}"));
}

/// The first disk, past the page cache.
fn disk() -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open("/dev/vda")
}

/// A buffer that direct I/O accepts, for ever.
fn aligned(len: usize) -> &'static mut [u8] {
    let spare = vec![0; len + PAGE].leak();
    let skip = spare.as_ptr().align_offset(PAGE);
    &mut spare[skip..skip + len]
}

/// 4 KiB reads, one at a time, at offsets a fixed generator gives.
fn read_random(count: u64) -> io::Result<()> {
    let disk = disk()?;
    let blocks = size(&disk)? / 4096;
    let buffer = aligned(4096);
    let mut place = 1u64;
    let mut next = || {
        place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (place >> 33) % blocks * 4096
    };
    disk.read_exact_at(buffer, next())?; // the first one also sets things up
    let start = Instant::now();
    for _ in 0..count {
        disk.read_exact_at(buffer, next())?;
    }
    report("read4k_ns", start.elapsed().as_nanos() / u128::from(count));
    Ok(())
}

/// 1 MiB reads in order.
fn read_sequential(count: u64) -> io::Result<()> {
    let disk = disk()?;
    let buffer = aligned(1 << 20);
    let span = size(&disk)? >> 20;
    disk.read_exact_at(buffer, 0)?;
    let start = Instant::now();
    for i in 0..count {
        disk.read_exact_at(buffer, (i % span) << 20)?;
    }
    report("read1m_ns", start.elapsed().as_nanos() / u128::from(count));
    Ok(())
}

fn size(disk: &File) -> io::Result<u64> {
    nix::unistd::lseek64(disk, 0, nix::unistd::Whence::SeekEnd)
        .map_err(io::Error::from)
        .and_then(|end| u64::try_from(end).map_err(io::Error::other))
}

/// The host's side echoes [`ROUND_TRIPS`] messages, then swallows [`STREAM`] bytes and answers with one.
fn exchange(name: &str, mut peer: impl Read + Write) -> io::Result<()> {
    let mut message = [7; MESSAGE];
    peer.write_all(&message)?;
    peer.read_exact(&mut message)?;
    let start = Instant::now();
    for _ in 0..ROUND_TRIPS {
        peer.write_all(&message)?;
        peer.read_exact(&mut message)?;
    }
    report(&format!("{name}_rtt_ns"), start.elapsed().as_nanos() / ROUND_TRIPS as u128);
    let data = vec![1; 256 * 1024];
    let start = Instant::now();
    for _ in 0..STREAM / data.len() {
        peer.write_all(&data)?;
    }
    peer.read_exact(&mut message[..1])?;
    report(&format!("{name}_stream_ns"), start.elapsed().as_nanos());
    report(&format!("{name}_stream_bytes"), STREAM as u128);
    Ok(())
}

/// A stream to port `port` of the host.
fn vsock(port: u32) -> io::Result<File> {
    let stream = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::empty(), None)?;
    connect(stream.as_raw_fd(), &VsockAddr::new(2, port))?;
    Ok(File::from(stream))
}

/// A TCP connection to the host over the first interface; the guest takes the host's address plus one.
fn tap(address: &str) -> io::Result<TcpStream> {
    let host: SocketAddr = address.parse().map_err(io::Error::other)?;
    let SocketAddr::V4(host4) = host else { return Err(io::Error::other("not an IPv4 address")) };
    let guest = std::net::Ipv4Addr::from_bits(host4.ip().to_bits() + 1);
    bring_up("eth0", guest)?;
    let stream = TcpStream::connect(host)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn bring_up(name: &str, address: std::net::Ipv4Addr) -> io::Result<()> {
    let control = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let set = |request: libc::Ioctl, fill: &dyn Fn(&mut libc::ifreq)| {
        // SAFETY: all-zero bytes are a valid ifreq.
        let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in ifreq.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        fill(&mut ifreq);
        // SAFETY: the descriptor is open and the pointer is to an ifreq, as these requests take it.
        if unsafe { libc::ioctl(control.as_raw_fd(), request, &raw const ifreq) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // A sockaddr_in: two bytes of port, then the address.
    let internet = |ip: std::net::Ipv4Addr| {
        let mut address = libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: [0; 14] };
        for (to, from) in address.sa_data[2..6].iter_mut().zip(ip.octets()) {
            *to = from.cast_signed();
        }
        address
    };
    set(libc::SIOCSIFADDR, &|ifreq| ifreq.ifr_ifru.ifru_addr = internet(address))?;
    set(libc::SIOCSIFNETMASK, &|ifreq| {
        ifreq.ifr_ifru.ifru_netmask = internet(std::net::Ipv4Addr::new(255, 255, 255, 0));
    })?;
    set(libc::SIOCSIFFLAGS, &|ifreq| {
        ifreq.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short
    })
}
