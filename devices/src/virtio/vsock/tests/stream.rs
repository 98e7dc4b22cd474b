//! P-11: bytes in are bytes out, both ways, however they are cut up, and whoever ends first.

use super::*;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    HostWrites(usize),
    HostReads(usize),
    GuestSends(usize, Vec<usize>),
    GuestReads,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (1..100_000usize).prop_map(Step::HostWrites),
        (1..100_000usize).prop_map(Step::HostReads),
        (1..=65_536usize, prop::collection::vec(1..5000usize, 0..20))
            .prop_map(|(n, pieces)| Step::GuestSends(n, pieces)),
        Just(Step::GuestReads),
    ];
    prop::collection::vec(step, 1..40)
}

/// An honest guest on one connection, and what both sides have sent and got.
struct Session {
    vm: Vm,
    key: Key,
    host: UnixStream,
    buffer: u32,
    to_host: Vec<u8>,
    at_host: Vec<u8>,
    to_guest: Vec<u8>,
    at_guest: Vec<u8>,
    /// Bytes the guest's program has taken.
    taken: u32,
    /// What the guest knows of the device's count.
    forwarded: u32,
    guest_end: bool,
}

impl Session {
    fn new(mut vm: Vm, buffer: u32) -> Self {
        let key = key(7, 7);
        let host = vm.guest_dials(key);
        host.set_nonblocking(true).unwrap();
        let mut this = Self {
            vm,
            key,
            host,
            buffer,
            to_host: Vec::new(),
            at_host: Vec::new(),
            to_guest: Vec::new(),
            at_guest: Vec::new(),
            taken: 0,
            forwarded: 0,
            guest_end: false,
        };
        this.acknowledge();
        this
    }

    fn header(&self, op: Op) -> Header {
        Header { buf_alloc: self.buffer, fwd_cnt: self.taken, ..from_guest(self.key, op) }
    }

    fn acknowledge(&mut self) {
        self.taken = u32::try_from(self.at_guest.len()).unwrap();
        let header = self.header(Op::CreditUpdate);
        self.vm.send(header, b"");
    }

    fn host_writes(&mut self, n: usize) {
        let start = self.to_guest.len();
        let bytes: Vec<u8> = (start..start + n).map(|i| (i % 251) as u8).collect();
        let done = self.host.write(&bytes).unwrap_or(0);
        self.to_guest.extend(&bytes[..done]);
    }

    fn host_reads(&mut self, n: usize) -> bool {
        let mut bytes = vec![0; n];
        match self.host.read(&mut bytes) {
            Ok(0) => true,
            Ok(done) => {
                self.at_host.extend(&bytes[..done]);
                false
            }
            Err(_) => false,
        }
    }

    fn guest_sends(&mut self, n: usize, pieces: &[usize]) {
        let start = self.to_host.len();
        let in_flight = start - self.forwarded as usize;
        let n = n.min(BUFFER as usize - in_flight);
        let bytes: Vec<u8> = (start..start + n).map(|i| (i % 241) as u8).collect();
        let header = Header { len: u32::try_from(n).unwrap(), ..self.header(Op::ReadWrite) };
        self.vm.send_in_pieces(header, &bytes, pieces);
        self.to_host.extend(bytes);
    }

    fn guest_receives(&mut self) {
        while let Some((header, payload)) = self.vm.receive() {
            self.forwarded = header.fwd_cnt;
            match header.op.unwrap() {
                Op::ReadWrite => self.at_guest.extend(payload),
                Op::CreditUpdate => {}
                Op::Shutdown if header.flags & SHUTDOWN_SEND != 0 => self.guest_end = true,
                other => panic!("unexpected {other:?}"),
            }
            let unread = self.at_guest.len() - self.taken as usize;
            assert!(unread <= self.buffer as usize, "C-126: more than the guest has room for");
        }
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::HostWrites(n) => self.host_writes(n),
            Step::HostReads(n) => drop(self.host_reads(n)),
            Step::GuestSends(n, pieces) => self.guest_sends(n, &pieces),
            Step::GuestReads => self.acknowledge(),
        }
        self.guest_receives();
    }

    /// Everything under way arrives.
    fn drain(&mut self) {
        for _ in 0..1000 {
            self.host_reads(1 << 20);
            self.guest_receives();
            self.acknowledge();
            if self.at_host.len() == self.to_host.len() && self.at_guest.len() == self.to_guest.len() {
                return;
            }
        }
        panic!(
            "bytes are stuck: {} of {}, {} of {}",
            self.at_host.len(),
            self.to_host.len(),
            self.at_guest.len(),
            self.to_guest.len()
        );
    }

    fn end(&mut self, guest_first: bool) {
        for guest in [guest_first, !guest_first] {
            if guest {
                let header = Header { flags: SHUTDOWN_SEND, ..self.header(Op::Shutdown) };
                self.vm.send(header, b"");
            } else {
                self.host_writes(3);
                self.host.shutdown(std::net::Shutdown::Write).unwrap();
            }
        }
        self.drain();
        self.guest_receives();
        assert!(self.guest_end && self.host_reads(1), "both sides see the end");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn p11_streams_arrive_whole_and_in_order(
        steps in steps(),
        // At most 19 chains of 6: the driver must not write over descriptors that the device has.
        buffers in prop::collection::vec(prop::collection::vec(1..3000u32, 1..6), 1..20),
        buffer in 1..300_000u32,
        guest_first: bool,
    ) {
        let mut vm = Vm::starved();
        for mut pieces in buffers {
            pieces.push(64);
            vm.post_in_pieces(&pieces);
        }
        vm.harness.kick(RX);
        let mut session = Session::new(vm, buffer);
        for step in steps {
            session.run(step);
        }
        // With a tiny buffer the rest would take for ever.
        session.buffer = 256 * 1024;
        session.acknowledge();
        session.drain();
        session.end(guest_first);
        prop_assert!(session.at_host == session.to_host);
        prop_assert!(session.at_guest == session.to_guest);
        prop_assert!(!session.vm.harness.asked_for_reset());
    }
}
