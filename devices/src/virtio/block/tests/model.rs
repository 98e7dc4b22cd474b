//! A disk is an array of bytes, under any interleaving of requests, and after a loss of power.

use super::faults::TestDisk;
use super::*;
use proptest::collection::vec;
use proptest::prelude::*;

const SECTORS: usize = 16;

#[derive(Clone, Copy, Debug)]
enum Op {
    Read,
    Write(u8),
    Zero { unmap: bool },
    Discard,
    Flush,
}

/// One request: what, where, how long, on which queue and cut into buffers of what size.
#[derive(Clone, Copy, Debug)]
struct Ask {
    op: Op,
    sector: usize,
    sectors: usize,
    queue: u16,
    piece: usize,
}

fn asks() -> impl Strategy<Value = Vec<Vec<Ask>>> {
    let op = prop_oneof![
        3 => Just(Op::Read),
        3 => any::<u8>().prop_map(Op::Write),
        1 => any::<bool>().prop_map(|unmap| Op::Zero { unmap }),
        1 => Just(Op::Discard),
        1 => Just(Op::Flush),
    ];
    let piece = prop::sample::select(vec![97, 512, 700, 8192]);
    let ask = (op, 0..SECTORS + 2, 0..6usize, 0..2u16, piece)
        .prop_map(|(op, sector, sectors, queue, piece)| Ask { op, sector, sectors, queue, piece });
    vec(vec(ask, 1..6), 1..12)
}

/// What each sector may hold. Bytes are uniform within a write, so one byte stands for a sector.
#[derive(Clone, Debug)]
struct Model {
    /// `None`: discarded, so anything.
    current: Vec<Option<u8>>,
    /// Values a loss of power may leave.
    possible: Vec<Vec<Option<u8>>>,
}

impl Model {
    fn new() -> Self {
        Self { current: vec![Some(0); SECTORS], possible: vec![vec![Some(0)]; SECTORS] }
    }

    fn set(&mut self, ask: Ask, value: Option<u8>) {
        for sector in ask.sector..ask.sector + ask.sectors {
            self.current[sector] = value;
            self.possible[sector].push(value);
        }
    }

    /// Follows one request; returns the status it must get.
    fn follow(&mut self, ask: Ask) -> u8 {
        let inside = ask.sector + ask.sectors <= SECTORS;
        match ask.op {
            Op::Flush => {
                self.possible = self.current.iter().map(|value| vec![*value]).collect();
                return OK;
            }
            _ if !inside => return IOERR,
            Op::Read => {}
            Op::Write(value) => self.set(ask, Some(value)),
            Op::Zero { .. } => self.set(ask, Some(0)),
            Op::Discard => self.set(ask, None),
        }
        OK
    }

    fn check_read(&self, ask: Ask, data: &[u8]) {
        for (sector, bytes) in (ask.sector..).zip(data.chunks(512)) {
            if let Some(value) = self.current[sector] {
                assert!(bytes.iter().all(|byte| *byte == value), "sector {sector}");
            }
        }
    }
}

fn post(vm: &mut Harness, ask: Ask) -> Posted {
    let len = ask.sectors * 512;
    let sector = ask.sector as u64;
    let range = |flags| segment(sector, ask.sectors as u32, flags);
    let (head, body, room) = match ask.op {
        Op::Read => (header(IN, sector), vec![], len),
        Op::Write(value) => (header(OUT, sector), vec![value; len], 0),
        Op::Zero { unmap } => (header(WRITE_ZEROES, 0), range(unmap.into()).to_vec(), 0),
        Op::Discard => (header(DISCARD, 0), range(0).to_vec(), 0),
        Op::Flush => (header(FLUSH, 0), vec![], 0),
    };
    let whole = [&head[..], &body].concat();
    let readable: Vec<&[u8]> = whole.chunks(ask.piece).collect();
    let writable: Vec<u32> = vec![0; room + 1].chunks(ask.piece).map(|part| part.len() as u32).collect();
    vm.driver(ask.queue).post(&readable, &writable)
}

/// Plays `batches` on a device: each batch is posted as a whole, then the queues are kicked in turn.
fn play(vm: &mut Harness, batches: &[Vec<Ask>], model: &mut Model) {
    for batch in batches {
        let posted: Vec<_> = batch.iter().map(|ask| (*ask, post(vm, *ask))).collect();
        for queue in 0..2 {
            vm.kick(queue);
            for (ask, posted) in posted.iter().filter(|(ask, _)| ask.queue == queue) {
                let got = answer(vm, queue, posted);
                assert_eq!(got.status, model.follow(*ask), "{ask:?}");
                if got.status == OK {
                    assert_eq!(got.len as usize, got.data.len() + 1);
                    // Later requests of the batch may have changed the disk, not this buffer.
                    model.check_read(*ask, &got.data);
                }
            }
        }
    }
}

fn two_queues() -> Config {
    Config { queues: 2, ..config() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn p07_an_image_behaves_like_an_array_of_bytes(batches in asks()) {
        let file = tempfile::tempfile().unwrap();
        file.set_len((SECTORS * 512) as u64).unwrap();
        let mut vm = Harness::new(build(&two_queues(), &file));
        let mut model = Model::new();
        play(&mut vm, &batches, &mut model);
        model.check_read(Ask { op: Op::Read, sector: 0, sectors: SECTORS, queue: 0, piece: 1 }, &contents(&file));
        prop_assert_eq!(file.metadata().unwrap().len(), (SECTORS * 512) as u64);
    }

    #[test]
    fn p07_a_loss_of_power_keeps_what_was_flushed(batches in asks(), kept in vec(any::<bool>(), SECTORS)) {
        let disk = TestDisk::new(SECTORS);
        let mut vm = Harness::new(disk.device(&two_queues()));
        let mut model = Model::new();
        play(&mut vm, &batches, &mut model);
        // Each sector comes back as it was at the last sync or as it was written last.
        let platter = disk.platter();
        for (sector, kept) in kept.iter().enumerate() {
            let place = sector * 512..(sector + 1) * 512;
            let bytes = if *kept { &platter.current[place] } else { &platter.stable[place] };
            let allowed = model.possible[sector]
                .iter()
                .any(|value| value.is_none_or(|value| bytes.iter().all(|byte| *byte == value)));
            prop_assert!(allowed, "sector {} holds {}", sector, bytes[0]);
        }
    }
}
