//! Memory that is elsewhere: whoever is at the other end of a socket brings each page when it is first touched.
//!
//! It is told once, as by Firecracker: a JSON array of what lies where in this process and in the memory's file, and with it
//! (`SCM_RIGHTS`) the descriptor that missing pages are reported on. Nothing is said after that, but the connection
//! stays: who closes it says that no page will come any more, and the machine ends.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mvm_devices::memory::{GuestMemoryBackend, GuestMemoryRegion, Memory};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};
use serde::Serialize;

use super::pages::Backed;
use crate::error::{Error, Result};
use crate::exit::Exit;
use crate::jail::{self, Thread};
use crate::layout::PAGE_SIZE;
use crate::memory::{self, Extent};
use crate::status::{Event, Stream, now};
use crate::userfault::Userfault;

/// How long the pages that are touched before the machine listens to anybody may take. Generous: an emulated host is
/// thirty times slower.
const START_TIME: Duration = Duration::from_secs(60);
/// How often it is looked whether the machine does.
const INTERVAL: Duration = Duration::from_millis(100);

const SOURCE: u64 = 0;
const ORPHANED: u64 = 1;

/// Where a part of the memory is.
#[derive(Debug, Serialize)]
struct Mapping {
    /// Address in this process.
    base_host_virt_addr: u64,
    /// Bytes.
    size: u64,
    /// Offset in the memory's file.
    offset: u64,
    /// Bytes that come at a time.
    page_size: u64,
    /// The same number: those who came first called it so.
    page_size_kib: u64,
}

/// Whoever has the memory.
#[derive(Debug)]
pub(crate) struct Source {
    socket: OwnedFd,
    /// Kept open: without it what is missing would be zeroes.
    _userfault: Userfault,
    /// The machine can be asked to end.
    is_serving: Arc<AtomicBool>,
}

/// Memory of `extent` whose pages `socket` brings. All of it is the source's until it is touched.
pub(crate) fn map(
    extent: Extent,
    socket: OwnedFd,
    userfault: Userfault,
) -> Result<(Memory, Vec<Backed>, Source)> {
    let memory = memory::create(extent)?;
    let (mut offset, mut mappings, mut backed) = (0, Vec::new(), Vec::new());
    for (region, (start, size)) in memory.iter().zip(extent.regions()) {
        let host = region.as_ptr() as u64;
        userfault.register(host, size).map_err(Error::system("have missing memory reported"))?;
        mappings.push(Mapping {
            base_host_virt_addr: host,
            size,
            offset,
            page_size: PAGE_SIZE,
            page_size_kib: PAGE_SIZE,
        });
        // Whoever saves the machine has to read it all.
        backed.push(Backed { range: start..start.saturating_add(region.len()), file: None });
        offset = offset.saturating_add(size);
    }
    let text = serde_json::to_vec(&mappings).map_err(|error| Error::MemorySource(error.into()))?;
    hand_over(&socket, &text, &userfault).map_err(Error::MemorySource)?;
    Ok((memory, backed, Source { socket, _userfault: userfault, is_serving: Arc::default() }))
}

/// Says it in one message, which a socket that is new has room for.
fn hand_over(socket: &OwnedFd, text: &[u8], userfault: &Userfault) -> io::Result<()> {
    let fds = [userfault.as_fd().as_raw_fd()];
    let (text, rights) = ([IoSlice::new(text)], [ControlMessage::ScmRights(&fds)]);
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    loop {
        return match sendmsg::<()>(socket.as_raw_fd(), &text, &rights, flags, None) {
            Err(Errno::EINTR) => continue,
            Ok(sent) if text.first().is_some_and(|text| sent == text.len()) => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(error) => Err(error.into()),
        };
    }
}

impl Source {
    /// Ends the process when no page comes any more. On a thread of its own, because any other may be waiting for one.
    pub(crate) fn watch(&self, status: &Arc<Stream>) -> Result<()> {
        let failed = Error::system("watch whoever has the memory");
        let socket = self.socket.try_clone().map_err(Error::system("copy a descriptor"))?;
        let watch = Watch { socket, is_serving: Arc::clone(&self.is_serving), time: START_TIME };
        let status = Arc::clone(status);
        let watching = move || {
            let ended = jail::confine(Thread::Memory).and_then(|()| watch.end(&status));
            let exit = ended.unwrap_or_else(|error| Exit::MemoryLost {
                detail: format!("cannot watch whoever has the memory: {error}"),
            });
            let code = exit.code();
            if !status.has_sink() {
                crate::process::complain(&format!("mvm-vmm: the machine cannot go on\n  because: {exit}\n"));
            }
            status.send(&Event::Exit { exit, ns: now() });
            std::process::exit(code.into());
        };
        let thread = std::thread::Builder::new().name("memory".to_owned());
        thread.spawn(watching).map(drop).map_err(failed)
    }

    /// From now on the machine ends when it is asked to.
    pub(crate) fn serving(&self) {
        self.is_serving.store(true, Ordering::Release);
    }
}

/// What the thread has of a [`Source`].
struct Watch {
    socket: OwnedFd,
    is_serving: Arc<AtomicBool>,
    time: Duration,
}

impl Watch {
    /// Waits until the machine has to end.
    fn end(&self, status: &Stream) -> io::Result<Exit> {
        let lost = |detail: String| Ok(Exit::MemoryLost { detail });
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let readable = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP;
        epoll.add(&self.socket, EpollEvent::new(readable, SOURCE))?;
        status.watch_reader(&epoll, ORPHANED);
        let limit = Instant::now() + self.time;
        loop {
            let is_serving = self.is_serving.load(Ordering::Acquire);
            if !is_serving && Instant::now() >= limit {
                let seconds = self.time.as_secs();
                return lost(format!(
                    "whoever has its memory did not bring what it needs to go on in {seconds} s"
                ));
            }
            let timeout = if is_serving {
                EpollTimeout::NONE
            } else {
                EpollTimeout::try_from(INTERVAL).unwrap_or(EpollTimeout::ZERO)
            };
            let mut events = [EpollEvent::empty(); 2];
            let count = match epoll.wait(&mut events, timeout) {
                Err(Errno::EINTR) => 0,
                waited => waited?,
            };
            for event in events.iter().take(count) {
                match event.data() {
                    ORPHANED => return Ok(Exit::Stopped),
                    _ if self.is_closed() => {
                        return lost("whoever has its memory closed the connection".to_owned());
                    }
                    _ => {}
                }
            }
        }
    }

    /// What is said is passed over.
    fn is_closed(&self) -> bool {
        match recv(self.socket.as_raw_fd(), &mut [0; 256], MsgFlags::MSG_DONTWAIT) {
            Ok(count) => count == 0,
            Err(error) => !matches!(error, Errno::EAGAIN | Errno::EINTR),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn watch(time: Duration) -> (UnixStream, Watch) {
        let (near, far) = UnixStream::pair().unwrap();
        (near, Watch { socket: far.into(), is_serving: Arc::default(), time })
    }

    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn a_machine_whose_memory_is_not_brought_in_time_ends_unless_it_can_be_asked_to() {
        let (_near, slow) = watch(Duration::from_millis(1));
        let Exit::MemoryLost { detail } = slow.end(&Stream::default()).unwrap() else { panic!() };
        assert!(detail.contains("did not bring what it needs"), "{detail}");

        let (near, served) = watch(Duration::ZERO);
        served.is_serving.store(true, Ordering::Release);
        let thread = std::thread::spawn(move || served.end(&Stream::default()).unwrap());
        drop(near);
        let Exit::MemoryLost { detail } = thread.join().unwrap() else { panic!() };
        assert!(detail.contains("closed the connection"), "{detail}");
    }

    #[test]
    fn what_is_said_is_passed_over_and_an_end_is_not() {
        let (mut near, watch) = watch(LONG);
        near.write_all(&[1; 1000]).unwrap();
        drop(near);
        assert!(matches!(watch.end(&Stream::default()).unwrap(), Exit::MemoryLost { .. }));
    }

    #[test]
    fn a_machine_that_waits_for_memory_ends_with_whoever_started_it() {
        let (_near, watch) = watch(LONG);
        let (reader, writer) = io::pipe().unwrap();
        let status = Stream::new(Some(File::from(OwnedFd::from(writer))));
        drop(reader);
        assert_eq!(watch.end(&status).unwrap(), Exit::Stopped);
    }
}
