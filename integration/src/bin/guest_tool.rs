//! `guest_tool`: what the tests run inside a guest and busybox cannot: vsock, both ways, and the clock.
//!
//! `guest_tool dial PORT` connects to the host, sends its standard input and prints the answer.
//! `guest_tool echo PORT` says `listening`, takes one connection and sends back what comes.
//! `guest_tool clock` answers each line with the wall clock, in nanoseconds since the Unix epoch.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, VsockAddr, accept, bind, connect, listen, shutdown,
    socket,
};

/// The host, and whoever calls.
const HOST: u32 = 2;
const ANYONE: u32 = u32::MAX;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "guest_tool: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (verb, port) = (arguments.next(), arguments.next());
    if verb.as_deref() == Some("clock") {
        return clock();
    }
    let port = port.and_then(|port| port.parse().ok()).ok_or_else(|| io::Error::other("no port"))?;
    let stream = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    match verb.as_deref() {
        Some("dial") => dial(stream, port),
        Some("echo") => echo(&stream, port),
        _ => Err(io::Error::other("clock, or dial or echo and a port")),
    }
}

fn clock() -> io::Result<()> {
    for line in io::stdin().lines() {
        line?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        writeln!(io::stdout(), "{}", now.as_nanos())?;
    }
    Ok(())
}

fn dial(stream: OwnedFd, port: u32) -> io::Result<()> {
    connect(stream.as_raw_fd(), &VsockAddr::new(HOST, port))?;
    let mut stream = File::from(stream);
    io::copy(&mut io::stdin(), &mut stream)?;
    shutdown(stream.as_raw_fd(), Shutdown::Write)?;
    io::copy(&mut stream, &mut io::stdout())?;
    Ok(())
}

fn echo(listener: &OwnedFd, port: u32) -> io::Result<()> {
    bind(listener.as_raw_fd(), &VsockAddr::new(ANYONE, port))?;
    listen(listener, Backlog::new(1)?)?;
    writeln!(io::stdout(), "listening")?;
    let connection = accept(listener.as_raw_fd())?;
    let mut from = own(connection);
    let mut to = from.try_clone()?;
    io::copy(&mut from, &mut to)?;
    shutdown(to.as_raw_fd(), Shutdown::Write)?;
    Ok(())
}

/// The descriptor `accept` has just given us.
#[allow(unsafe_code)]
fn own(descriptor: i32) -> File {
    use std::os::fd::FromRawFd;
    // SAFETY: accept returned it, and nothing else has it.
    unsafe { File::from_raw_fd(descriptor) }
}
