//! The device on a real event loop, as in a machine: what it watches is what the kernel reports.

use std::sync::{Arc, mpsc};

use super::*;
use crate::interrupt::Interrupt;
use crate::io_loop::IoLoop;
use crate::task::{DeviceTask, TaskParts};
use crate::testing::Driver;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Sends the number of each queue that is announced.
struct Announcements(mpsc::SyncSender<u16>);

impl Interrupt for Announcements {
    fn queue(&self, index: u16) {
        // The test may be over.
        let _ = self.0.send(index);
    }
    fn config_changed(&self) {}
    fn needs_reset(&self) {
        let _ = self.0.send(u16::MAX);
    }
}

/// A guest on the test's thread, the device on its own.
struct Guest {
    drivers: Vec<Driver>,
    kicks: Vec<Arc<EventFd>>,
    announced: mpsc::Receiver<u16>,
    posted: HashMap<u16, Posted>,
    server: DialServer,
    socket: PathBuf,
    // The loop ends before the directory goes.
    _loop: IoLoop,
    _directory: tempfile::TempDir,
}

impl Guest {
    fn start() -> Self {
        let (device, server, _, directory) = device(256);
        let memory = crate::testing::memory();
        let (sender, announced) = mpsc::sync_channel(4096);
        let drivers: Vec<_> = (0u16..)
            .zip(device.queues())
            .map(|(index, size)| Driver::new(index, *size, Arc::clone(&memory), true))
            .collect();
        let kicks: Vec<_> = drivers.iter().map(|_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())).collect();
        let task = DeviceTask::new(TaskParts {
            device: Box::new(device),
            features: F_STREAM,
            rings: drivers.iter().map(|driver| Some(driver.ring())).collect(),
            kicks: kicks.clone(),
            interrupt: Arc::new(Announcements(sender)),
            memory,
        });
        let io_loop = IoLoop::spawn("vsock").unwrap();
        io_loop.handle().attach(task).unwrap();
        let socket = directory.path().join("vsock");
        let posted = HashMap::new();
        let mut this =
            Self { drivers, kicks, announced, posted, server, socket, _loop: io_loop, _directory: directory };
        for _ in 0..32 {
            let posted = this.drivers[usize::from(RX)].post(&[], &[4096]);
            this.posted.insert(posted.head, posted);
        }
        this.kicks[usize::from(RX)].write(1).unwrap();
        this
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        self.drivers[usize::from(TX)].post(&[&header.to_wire(), payload], &[]);
        self.kicks[usize::from(TX)].write(1).unwrap();
    }

    /// Waits for the next packet.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let driver = &mut self.drivers[usize::from(RX)];
        loop {
            driver.set_used_event(driver.used_index());
            if let Some((head, len)) = driver.take() {
                let posted = self.posted.remove(&head).unwrap();
                let bytes = driver.written(&posted);
                let again = driver.post(&[], &[4096]);
                self.posted.insert(again.head, again);
                self.kicks[usize::from(RX)].write(1).unwrap();
                let header = Header::from_wire(bytes[..44].try_into().unwrap());
                return (header, bytes[44..len as usize].to_vec());
            }
            let queue = self.announced.recv_timeout(Duration::from_secs(20)).expect("nothing comes");
            assert_ne!(queue, u16::MAX, "the device asked for a reset");
        }
    }
}

#[test]
fn a_connection_lives_and_ends_on_a_real_event_loop() {
    let mut guest = Guest::start();
    let key = key(1024, 7);
    guest.send(from_guest(key, Op::Request), b"");
    let dial = guest.server.recv().unwrap().unwrap();
    let (host, far) = UnixStream::pair().unwrap();
    let mut host = patient(host);
    guest.server.accept(dial.id, far.as_fd()).unwrap();
    drop(far);
    assert_eq!(guest.receive().0.op, Some(Op::Response));
    for round in 0..200u8 {
        guest.send(data(key, 3), &[round; 3]);
        let mut bytes = [0; 3];
        host.read_exact(&mut bytes).unwrap();
        host.write_all(&bytes).unwrap();
        let (header, payload) = guest.receive();
        assert_eq!((header.op, payload), (Some(Op::ReadWrite), vec![round; 3]));
    }
    // A half-closed connection is watched for nothing but its end.
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let (header, _) = guest.receive();
    assert_eq!((header.op, header.flags), (Some(Op::Shutdown), SHUTDOWN_SEND));
    drop(host);
    let (header, _) = guest.receive();
    assert_eq!((header.op, header.flags), (Some(Op::Shutdown), SHUTDOWN_BOTH));
    // Nobody confirms: the timer ends it.
    assert_eq!(guest.receive().0.op, Some(Op::Reset));
}

#[test]
fn a_full_socket_and_a_call_work_on_a_real_event_loop() {
    let mut guest = Guest::start();
    let mut host = patient(UnixStream::connect(&guest.socket).unwrap());
    host.write_all(b"CONNECT 9\n").unwrap();
    let (request, _) = guest.receive();
    let key = request.key_of_guest();
    guest.send(from_guest(key, Op::Response), b"");
    let mut line = [0; 14];
    host.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK 1073741824\n");
    // The guest fills socket and backlog; then the host reads it all, woken by nothing but readiness.
    let (mut sent, mut forwarded) = (0usize, 0usize);
    while sent - forwarded < BUFFER as usize {
        let n = (BUFFER as usize - (sent - forwarded)).min(16_384);
        guest.send(data(key, n), &vec![5; n]);
        sent += n;
        guest.send(from_guest(key, Op::CreditRequest), b"");
        forwarded = guest.receive().0.fwd_cnt as usize;
    }
    guest.send(shutdown(key, SHUTDOWN_SEND), b"");
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), sent);
}
