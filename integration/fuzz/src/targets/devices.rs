//! Devices, the ring, the transport and the serial port, each with a hostile driver.

use mvm_devices::serial::{INPUT_SIZE, Serial, State};
use mvm_devices::testing::hostile::function::{self, Access};
use mvm_devices::testing::hostile::{self, Entry, Length, OP_BYTES, Op, Place, Reach, Stage};
use mvm_devices::testing::load;
use mvm_devices::testing::pci::PciDriver;
use mvm_devices::virtio::NAMES;

use super::target;
use crate::Target;

/// What every kind's seeds reach.
const ALL: &[&str] = &["asked", "answered", "refused", "needs_reset", "resets", "works_after"];

pub(super) const TARGETS: &[Target] = &[
    target(
        "block",
        |b, r| kind("block", b, r),
        seeds,
        &[
            "answered",
            "refused",
            "needs_reset",
            "resets",
            "works_after",
            "reads",
            "writes",
            "flushes",
            "discards",
            "errors",
        ],
    ),
    target(
        "console",
        |b, r| kind("console", b, r),
        seeds,
        &["answered", "refused", "needs_reset", "resets", "works_after", "output_bytes"],
    ),
    target(
        "net",
        |b, r| kind("net", b, r),
        seeds,
        &[
            "answered",
            "refused",
            "needs_reset",
            "resets",
            "works_after",
            "tx_frames",
            "rx_frames",
            "tx_malformed",
        ],
    ),
    target("rng", |b, r| kind("rng", b, r), seeds, ALL),
    target(
        "balloon",
        |b, r| kind("balloon", b, r),
        seeds,
        &[
            "answered",
            "refused",
            "needs_reset",
            "works_after",
            "inflated_pages",
            "reported_bytes",
            "refused_pages",
        ],
    ),
    target(
        "mem",
        |b, r| kind("mem", b, r),
        seeds,
        &["answered", "refused", "needs_reset", "works_after", "plugged_blocks", "refused_requests"],
    ),
    target(
        "vsock",
        |b, r| kind("vsock", b, r),
        seeds,
        &[
            "answered",
            "refused",
            "needs_reset",
            "works_after",
            "connections_opened",
            "bytes_from_guest",
            "bytes_to_guest",
            "packets_dropped",
        ],
    ),
    target("ring", |b, r| kind("ring", b, r), seeds, ALL),
    target("devices", together, together_seeds, ALL),
    target(
        "registers",
        registers,
        register_seeds,
        &["answered", "resets", "saved", "needs_reset", "kicks_ignored"],
    ),
    target("pci", config_space, config_seeds, &["answered", "config_writes", "window_writes", "saved"]),
    target("restore", restore, restore_seeds, &["accepted", "refused", "goes_on"]),
    target("serial", serial, serial_seeds, &["output", "input", "dropped"]),
];

fn kind(name: &str, bytes: &[u8], reach: &mut Reach) {
    reach.merge(&hostile::live_through(name, bytes));
}

/// A descriptor of the first queue.
fn entry(index: u16, part: u8, length: Length, flags: u8, next: u16) -> Op {
    Op::Describe(Entry { index, place: Place { part, queue: 0, offset: 0 }, length, flags, next })
}

/// Honest conversations, and one sequence for each incident that brought a machine down somewhere.
fn seeds() -> Vec<Vec<u8>> {
    let one = Length::of(64);
    let ask = |variety: u8| Op::Ask { variety, value: 0x0012_3456 ^ (u32::from(variety) << 9) };
    let offer = [Op::Offer { queue: 0, head: 0 }, Op::Kick { queue: 0 }];
    let chain = |ops: &[Op]| [ops, &offer[..]].concat();
    let mut all: Vec<Vec<Op>> = vec![
        (0..16).map(ask).collect(),
        (0..60).map(ask).collect(),
        // Whatever waits for the host: buffers, then something to put into them.
        (0..12).flat_map(|n| [ask(n), ask(12), ask(1), Op::Host { what: n, much: 600 }, Op::Poll]).collect(),
        // A call, the answer of the host, bytes both ways.
        [1, 12, 12, 12, 5, 12, 12, 6, 7, 5, 4, 3]
            .iter()
            .flat_map(|n| {
                let ask = Op::Ask { variety: *n, value: 0x1000 };
                let host = [0, 1, 2].map(|what| Op::Host { what, much: 900 });
                [ask, host[0], Op::Poll, host[1], Op::Poll]
            })
            .collect(),
        vec![
            ask(0),
            Op::Pause,
            ask(1),
            Op::Reset { event_idx: true, without: 0 },
            ask(2),
            ask(3),
            Op::Reset { event_idx: false, without: u32::MAX },
            ask(4),
        ],
        // Loops, links that lead nowhere, buffers that are not there, tables in tables.
        chain(&[entry(0, 0, one, 1, 1), entry(1, 0, one, 1, 0)]),
        chain(&[entry(0, 0, one, 1, 0xffff)]),
        chain(&[entry(0, 9, Length::short_of_4_gib(0), 2, 0)]),
        chain(&[entry(0, 2, one, 0, 0)]),
        chain(&[entry(0, 5, Length::of(4096), 2, 0)]),
        chain(&[entry(0, 8, Length::of(8), 4, 0)]),
        chain(&[entry(0, 0, one, 2, 0), entry(1, 0, one, 0, 0)]),
        vec![Op::Jump { queue: 0, by: 0x8000 }, Op::Kick { queue: 0 }],
        vec![Op::Jump { queue: 1, by: 0x8000 }, Op::Kick { queue: 1 }, ask(1)],
        vec![
            Op::Flags { queue: 0, flags: 0xffff },
            Op::UsedEvent { queue: 0, event: 0x7fff },
            ask(0),
            ask(1),
        ],
        vec![Op::Config { offset: 0, value: None }, Op::Config { offset: 0xffff, value: Some(1) }],
        (0..8).map(|token| Op::Deliver { token, events: 0 }).collect(),
    ];
    // The varieties that a kind tells apart by more than the lowest bits.
    let highs = [0, 0x10, 0x20, 0x30, 0x40, 0x80, 0xc0];
    all.extend(highs.map(|high| (0..16).map(|low| ask(low | high)).collect::<Vec<_>>()));
    all.extend([vec![Op::Ask { variety: 0x78, value: u32::MAX }], vec![]]);
    all.iter().map(|ops| hostile::encode(ops)).collect()
}

/// All kinds at a time: the last byte of an operation's queue says whose it is.
fn together(bytes: &[u8], reach: &mut Reach) {
    let mut stages: Vec<Stage> = NAMES.iter().map(|name| Stage::of(name)).collect();
    let count = stages.len();
    for (turn, (op, bytes)) in hostile::decode(bytes).into_iter().zip(bytes.chunks(OP_BYTES)).enumerate() {
        let whose = usize::from(bytes.get(5).copied().unwrap_or(0));
        // Zero is everybody, in turn.
        let whose = if whose == 0 { turn } else { whose };
        stages[whose % count].act(op);
    }
    stages.into_iter().for_each(|stage| reach.merge(&stage.finish()));
}

fn together_seeds() -> Vec<Vec<u8>> {
    seeds()
}

/// The first byte says which kind it is.
fn split(bytes: &[u8]) -> (&'static str, &[u8]) {
    let (first, rest) = bytes.split_first().unwrap_or((&0, &[]));
    (NAMES[usize::from(*first) % NAMES.len()], rest)
}

fn registers(bytes: &[u8], reach: &mut Reach) {
    let (name, rest) = split(bytes);
    reach.merge(&function::live_through(name, rest));
}

fn encoded(kind: u8, accesses: &[Access]) -> Vec<u8> {
    std::iter::once(kind).chain(accesses.iter().flat_map(|access| access.encode())).collect()
}

fn register_seeds() -> Vec<Vec<u8>> {
    let write = |which: u8, value: u32| Access::Register { which, value };
    let mut all = Vec::new();
    for kind in 0..NAMES.len() as u8 {
        all.push(encoded(kind, &[Access::Honest, Access::Change, Access::Save, Access::Honest]));
        // Queues that change while the device runs: what must be frozen.
        let changed: Vec<_> = (8..20).map(|which| write(which, 0xffff)).collect();
        all.push(encoded(
            kind,
            &[&[Access::Honest][..], &changed[..], &[Access::Kick { queue: 0 }]].concat(),
        ));
        // A ring outside memory, and ready.
        let outside = [
            write(6, 1),
            write(6, 3),
            write(2, 1),
            write(3, 1),
            write(6, 11),
            write(8, 0),
            write(14, 0xffff_ffff),
            write(11, 1),
            write(6, 15),
        ];
        all.push(encoded(kind, &outside));
    }
    all.push(encoded(0, &[write(8, 0xffff), write(10, 1), Access::Read { offset: 0x1a, width: 1 }]));
    all.push(encoded(0, &[Access::Kick { queue: 0xffff }, Access::Kick { queue: 0 }]));
    let ends = [0, 0xfff, 0x1000, 0x2fff, 0x3ffe, 0x7fff, 0xffff];
    all.push(encoded(1, &ends.map(|offset| Access::Read { offset, width: 3 })));
    all.push(encoded(1, &ends.map(|offset| Access::Write { offset, width: 3, value: 0xffff_ffff })));
    all
}

/// Only what configuration space is about, between honest starts.
fn config_space(bytes: &[u8], reach: &mut Reach) {
    let (name, rest) = split(bytes);
    let mut rest = rest.to_vec();
    for access in rest.chunks_mut(8) {
        access[0] = [0, 8, 9, 10, 11, 12, 15][usize::from(access[0] % 7)];
    }
    reach.merge(&function::live_through(name, &rest));
}

fn config_seeds() -> Vec<Vec<u8>> {
    // 0 is an honest start, 1 configuration space, 3 its window, 5 a vector, 6 a save.
    let word = |tag: u8, part: u8, near: u16, value: u32| {
        [&[tag, part][..], &near.to_le_bytes(), &value.to_le_bytes()].concat()
    };
    let seed = |kind: u8, words: &[Vec<u8>]| [&[kind][..], &words.concat()].concat();
    let all_ones: Vec<_> = (0..64).map(|at| word(1, 2, at * 4, u32::MAX)).collect();
    let window =
        [word(3, 0, 0, 0), word(3, 1, 0, 0x14), word(3, 2, 0, 1), word(3, 3, 0, 0), word(0, 0, 0, 0)];
    let wrong =
        [word(3, 0, 0, 9), word(3, 1, 0, u32::MAX), word(3, 2, 0, 3), word(3, 3, 0, 1), word(6, 0, 0, 0)];
    let sizes: Vec<_> = (4..10).map(|bar| word(1, 2, bar * 4, u32::MAX)).collect();
    (0..NAMES.len() as u8)
        .flat_map(|kind| {
            [
                seed(kind, &all_ones),
                seed(kind, &window),
                seed(kind, &wrong),
                seed(kind, &sizes),
                seed(kind, &[word(5, 1, 2047, 7), word(6, 0, 0, 0)]),
            ]
        })
        .collect()
}

/// A saved state of a kind: refused, or the function goes on from it and works again after a reset.
fn restore(bytes: &[u8], reach: &mut Reach) {
    let (name, rest) = split(bytes);
    let Ok((state, _)) = postcard::take_from_bytes(rest) else { return reach.add("refused", 1) };
    let mut load = load::named(name);
    let mut vm = PciDriver::new(load.device());
    let restored = vm.function.restore(&state);
    reach.add(if restored.is_ok() { "accepted" } else { "refused" }, 1);
    if restored.is_err() {
        return;
    }
    vm.function.resume().expect("there is a loop");
    let _ = vm.function.pause();
    if vm.function.save().is_ok() {
        reach.add("goes_on", 1);
    }
    vm.function.resume().expect("there is a loop");
    vm.set_status(0);
    assert_eq!(vm.status(), 0, "a reset is over at once");
    load.host(0, 1);
    load.intact();
}

fn restore_seeds() -> Vec<Vec<u8>> {
    let saved = |(kind, name): (usize, &&str), running: bool| {
        let mut vm = PciDriver::new(load::named(name).device());
        if running {
            vm.start(false);
        }
        vm.function.pause().expect("there is a loop");
        let state = vm.function.save().expect("it is at rest");
        let mut bytes = vec![kind as u8];
        bytes.extend(postcard::to_stdvec(&state).expect("a state can be written"));
        bytes
    };
    let mut all: Vec<_> =
        NAMES.iter().enumerate().flat_map(|it| [saved(it, false), saved(it, true)]).collect();
    all.extend([vec![], vec![3; 40]]);
    all
}

/// Pairs of bytes: a register and how, a value.
fn serial(bytes: &[u8], reach: &mut Reach) {
    let mut port = Serial::new(Box::new(std::io::sink()));
    for pair in bytes.chunks_exact(2) {
        let (how, value) = (pair[0], pair[1]);
        match how >> 3 {
            0..=12 => {
                port.write(how & 7, value);
                reach.add("output", (how & 7 == 0).into());
            }
            13..=24 => drop(port.read(how & 7)),
            25..=29 => {
                let taken = port.push_input(&vec![value; usize::from(value)]);
                assert!(taken <= INPUT_SIZE);
                reach.add("input", taken as u64);
            }
            30 => (0..=u16::MAX).for_each(|_| port.write(0, value)),
            _ => {
                let state: State = port.state();
                port.restore(&state);
                assert_eq!(port.state(), state);
            }
        }
    }
    reach.add("dropped", port.dropped().get());
}

fn serial_seeds() -> Vec<Vec<u8>> {
    // As Linux finds and opens a port, then text both ways, then more than it lets through.
    let open = [1, 0, 3, 0x80, 0, 1, 1, 0, 3, 3, 2, 7, 4, 0xb, 104 + 5, 0, 104 + 2, 0];
    let flood = vec![240, b'x', 240, b'x', 248, 0];
    vec![open.to_vec(), b"\0h\0e\0l\0l\0o".to_vec(), vec![200, 255, 104, 0, 200, 255, 248, 0], flood]
}
