//! P-10: for any run of guest packets, host events and time, the device answers as a small model does.

use super::*;
use proptest::prelude::*;

#[derive(Clone, Copy, Debug)]
enum Step {
    Guest(Op),
    GuestShuts(u32),
    GuestNonsense,
    ParentAccepts,
    ParentRefuses,
    HostCalls,
    HostWrites,
    HostShuts,
    HostCloses,
    TwoSeconds,
}

fn step() -> impl Strategy<Value = Step> {
    use Step::*;
    prop_oneof![
        4 => Just(Guest(Op::Request)),
        2 => Just(Guest(Op::Response)),
        1 => Just(Guest(Op::Reset)),
        3 => Just(Guest(Op::ReadWrite)),
        1 => Just(Guest(Op::CreditUpdate)),
        1 => Just(Guest(Op::CreditRequest)),
        3 => (0..=3u32).prop_map(GuestShuts),
        1 => Just(GuestNonsense),
        5 => Just(ParentAccepts),
        1 => Just(ParentRefuses),
        3 => Just(HostCalls),
        3 => Just(HostWrites),
        2 => Just(HostShuts),
        2 => Just(HostCloses),
        1 => Just(TwoSeconds),
    ]
}

/// What the model thinks of the one pair of ports.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Model {
    Absent,
    Dialing,
    Requesting,
    /// Directions ended by the guest and by the host.
    Open(u32, u32),
    Closing(u32),
}

/// What the guest should get for a step: operation, flags of a shutdown, bytes of payload.
type Answers = Vec<(Op, u32, usize)>;

fn reset() -> (Model, Answers) {
    (Model::Absent, vec![(Op::Reset, 0, 0)])
}

impl Model {
    fn guest(self, op: Option<Op>, flags: u32) -> (Self, Answers) {
        use Model::*;
        match (self, op) {
            (_, Some(Op::Reset)) => (Absent, vec![]),
            (Absent, Some(Op::Request)) => (Dialing, vec![]),
            (Requesting, Some(Op::Response)) => (Open(0, 0), vec![]),
            (Open(..) | Closing(..), Some(Op::CreditUpdate)) => (self, vec![]),
            (Open(..) | Closing(..), Some(Op::CreditRequest)) => (self, vec![(Op::CreditUpdate, 0, 0)]),
            (Open(guest, _) | Closing(guest), Some(Op::ReadWrite)) if guest & SHUTDOWN_SEND == 0 => {
                (self, vec![])
            }
            (Open(guest, _) | Closing(guest), Some(Op::Shutdown)) if guest | flags == SHUTDOWN_BOTH => {
                reset()
            }
            (Closing(guest), Some(Op::Shutdown)) => (Closing(guest | flags), vec![]),
            (Open(guest, host), Some(Op::Shutdown)) => Self::shuts(guest | flags, host, host),
            _ => reset(),
        }
    }

    /// An open connection after a shutdown; `told` is what the guest knows of the host's side.
    fn shuts(guest: u32, host: u32, told: u32) -> (Self, Answers) {
        // Nothing is sent to a guest that receives no more.
        let host = if guest & SHUTDOWN_RECEIVE != 0 { host | SHUTDOWN_SEND } else { host };
        // Both directions of the host's socket have ended.
        let over = guest == SHUTDOWN_SEND && host == SHUTDOWN_SEND;
        let host = if over { SHUTDOWN_BOTH } else { host };
        let answers = if host == told { vec![] } else { vec![(Op::Shutdown, host, 0)] };
        if host == SHUTDOWN_BOTH {
            (Self::Closing(guest), answers)
        } else {
            (Self::Open(guest, host), answers)
        }
    }

    fn time(self) -> (Self, Answers) {
        match self {
            Self::Dialing | Self::Requesting | Self::Closing(_) => reset(),
            Self::Absent | Self::Open(..) => (self, vec![]),
        }
    }
}

struct World {
    vm: Vm,
    model: Model,
    key: Key,
    host: Option<UnixStream>,
}

impl World {
    /// Does one step to the device and returns what the model expects of it.
    fn step(&mut self, step: Step) -> Answers {
        let (model, answers) = match step {
            Step::Guest(op) => self.guest(op),
            Step::GuestShuts(flags) => {
                self.vm.send(shutdown(self.key, flags), b"");
                self.model.guest(Some(Op::Shutdown), flags)
            }
            Step::GuestNonsense => {
                self.vm.send(Header { op: None, ..from_guest(self.key, Op::Reset) }, b"");
                self.model.guest(None, 0)
            }
            Step::ParentAccepts | Step::ParentRefuses => self.parent(matches!(step, Step::ParentAccepts)),
            Step::HostCalls => self.call(),
            Step::HostWrites | Step::HostShuts | Step::HostCloses => self.host_acts(step),
            Step::TwoSeconds => {
                self.vm.pass(2001);
                self.model.time()
            }
        };
        self.model = model;
        answers
    }

    fn guest(&mut self, op: Op) -> (Model, Answers) {
        match op {
            Op::ReadWrite => self.vm.send(data(self.key, 3), b"abc"),
            op => self.vm.send(from_guest(self.key, op), b""),
        }
        self.model.guest(Some(op), 0)
    }

    /// The parent answers every question it has; only the last can still be waited for.
    fn parent(&mut self, accept: bool) -> (Model, Answers) {
        while self.vm.asked() {
            let dial = self.vm.question();
            if accept {
                let (near, far) = UnixStream::pair().unwrap();
                self.vm.server.accept(dial.id, far.as_fd()).unwrap();
                if self.model == Model::Dialing {
                    self.host = Some(near);
                }
            } else {
                self.vm.server.refuse(dial.id).unwrap();
            }
        }
        match self.model {
            Model::Dialing if accept => (Model::Open(0, 0), vec![(Op::Response, 0, 0)]),
            Model::Dialing => reset(),
            other => (other, vec![]),
        }
    }

    fn call(&mut self) -> (Model, Answers) {
        if self.model != Model::Absent {
            return (self.model, vec![]);
        }
        let mut stream = UnixStream::connect(&self.vm.socket).unwrap();
        stream.write_all(b"CONNECT 77\n").unwrap();
        self.host = Some(stream);
        self.vm.settle();
        self.key = self.vm.inbox.back().unwrap().0.key_of_guest();
        (Model::Requesting, vec![(Op::Request, 0, 0)])
    }

    fn host_acts(&mut self, step: Step) -> (Model, Answers) {
        let Model::Open(guest, host) = self.model else { return (self.model, vec![]) };
        let Some(stream) = self.host.as_mut() else { return (self.model, vec![]) };
        match step {
            Step::HostWrites => {
                let written = stream.write(b"defg").unwrap_or(0);
                let expected = if host & SHUTDOWN_SEND == 0 { 4 } else { 0 };
                assert_eq!(written, expected);
                let answers = if written > 0 { vec![(Op::ReadWrite, 0, 4)] } else { vec![] };
                (self.model, answers)
            }
            Step::HostShuts => {
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                Model::shuts(guest, host | SHUTDOWN_SEND, host)
            }
            _ => {
                self.host = None;
                (Model::Closing(guest), vec![(Op::Shutdown, SHUTDOWN_BOTH, 0)])
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn p10_connections_live_and_end_as_the_model_says(steps in prop::collection::vec(step(), 1..40)) {
        let vm = Vm::new();
        let mut world = World { vm, model: Model::Absent, key: key(10, 20), host: None };
        for step in steps {
            let before = world.model;
            let expected = world.step(step);
            world.vm.settle();
            let got: Answers = world.vm.inbox.drain(..)
                .map(|(header, payload)| {
                    let op = header.op.unwrap();
                    (op, if op == Op::Shutdown { header.flags } else { 0 }, payload.len())
                })
                .collect();
            prop_assert_eq!(got, expected, "{:?} in {:?}", step, before);
            if world.model == Model::Absent && let Some(mut host) = world.host.take() {
                let mut rest = Vec::new();
                let _ = host.read_to_end(&mut rest);
                prop_assert_eq!(world.vm.harness.watched_files(), 3, "the stream is closed and not watched");
            }
        }
        // Whatever it was in the middle of: without a host process and with time it ends.
        world.host = None;
        world.vm.pass(2001);
        world.vm.pass(2001);
        prop_assert_eq!(world.vm.harness.watched_files(), 3);
        prop_assert!(!world.vm.harness.asked_for_reset());
    }
}
