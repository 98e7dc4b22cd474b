//! The walk against tables that make no sense, and against a reference that knows only the rules.

use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::Buffers;
use super::{Chain, Table};
use crate::error::ChainError;
use crate::memory::{Bytes, GuestAddress, GuestMemoryBackend, Memory};
use crate::sys::segment::Segment;
use crate::testing::{Descriptor, Driver, HIGH, INDIRECT, NEXT, REGION, WRITE, memory};

const SIZE: u16 = 8;
/// Where indirect tables are put.
const ELSEWHERE: u64 = 0x4000;

fn driver() -> Driver {
    Driver::new(0, SIZE, memory(), false)
}

fn buffer(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { address, len, flags, next }
}

fn walk(driver: &Driver, head: u16, indirect: bool) -> Result<Chain, ChainError> {
    let table = Table { address: GuestAddress(driver.table()), size: SIZE, indirect, position: 0 };
    Chain::walk(driver.memory(), table, head, &mut Buffers::default())
}

/// Writes descriptors from 0 on and walks from 0, with `INDIRECT_DESC` negotiated.
fn chain(descriptors: &[Descriptor]) -> Result<Chain, ChainError> {
    let driver = driver();
    for (index, descriptor) in (0..).zip(descriptors) {
        driver.describe(index, *descriptor);
    }
    walk(&driver, 0, true)
}

/// A chain of one indirect descriptor of `len` bytes at [`ELSEWHERE`], where `table` stands.
fn through_table(table: &[Descriptor], len: u32, flags: u16) -> Result<Chain, ChainError> {
    let driver = driver();
    for (index, descriptor) in (0..).zip(table) {
        driver.describe_at(ELSEWHERE, index, *descriptor);
    }
    driver.describe(0, buffer(ELSEWHERE, len, INDIRECT | flags, 1));
    walk(&driver, 0, true)
}

fn error(result: Result<Chain, ChainError>) -> ChainError {
    result.expect_err("the chain was accepted")
}

#[test]
fn q_01_q_02_loops_end() {
    assert_eq!(error(chain(&[buffer(0x1000, 4, NEXT, 0)])), ChainError::TooLong);
    let two = [buffer(0x1000, 4, NEXT, 1), buffer(0x1000, 4, NEXT, 0)];
    assert_eq!(error(chain(&two)), ChainError::TooLong);
    let empty = [buffer(0, 0, NEXT, 1), buffer(0, 0, NEXT, 0)];
    assert_eq!(error(chain(&empty)), ChainError::TooLong, "a loop of nothing is a loop");
}

#[test]
fn q_03_a_link_past_the_table_is_no_end() {
    for next in [SIZE, SIZE + 1, 0x8000, 0xffff] {
        assert_eq!(error(chain(&[buffer(0x1000, 4, NEXT, next)])), ChainError::Index(next));
    }
    assert_eq!(error(walk(&driver(), SIZE, true)), ChainError::Index(SIZE));
}

#[test]
fn q_04_q_05_a_chain_of_the_whole_table_is_accepted_and_none_longer() {
    let mut all: Vec<_> = (1..=SIZE).map(|next| buffer(0x1000, 4, NEXT, next)).collect();
    all[7].flags = 0;
    assert_eq!(chain(&all).unwrap().reader().remaining(), 32);
    let entries: Vec<_> = (0..SIZE).map(|i| buffer(0x1000, 4, NEXT, i + 1)).collect();
    let driver = driver();
    for (index, descriptor) in (0..).zip(&entries) {
        driver.describe_at(ELSEWHERE, index, *descriptor);
    }
    driver.describe_at(ELSEWHERE, SIZE - 1, buffer(0x1000, 4, 0, 0));
    driver.describe(0, buffer(0x1000, 4, NEXT, 1));
    driver.describe(1, buffer(ELSEWHERE, 16 * u32::from(SIZE), INDIRECT, 0));
    assert_eq!(error(walk(&driver, 0, true)), ChainError::TooLong, "one and a full table");
}

#[test]
fn q_06_empty_buffers_say_nothing_wherever_they_stand() {
    for empty in 0..3 {
        let mut three =
            [buffer(0x1000, 4, NEXT, 1), buffer(0x2000, 4, NEXT | WRITE, 2), buffer(0x3000, 4, WRITE, 0)];
        three[empty].len = 0;
        three[empty].address = u64::MAX;
        let walked = chain(&three).unwrap();
        let expected = [(0, 8), (4, 4), (4, 4)][empty];
        assert_eq!((walked.reader().remaining(), walked.writer().remaining()), expected);
    }
    let nothing = chain(&[buffer(0, 0, 0, 0)]).unwrap();
    assert_eq!((nothing.reader().remaining(), nothing.writer().remaining()), (0, 0));
}

#[test]
fn q_07_q_09_q_10_buffers_that_are_not_wholly_memory_are_refused() {
    let bad = [
        (0x1000, u32::MAX),
        (0, u32::try_from(REGION).unwrap() + 1),
        (u64::MAX, 1),
        (u64::MAX - 3, 8),
        (REGION, 1),
        (REGION - 1, 2),
        (HIGH - 1, 1),
        (HIGH - 1, 2),
        (HIGH + REGION - 4, 5),
        (HIGH + REGION, 1),
        (1 << 63, 4),
    ];
    for (address, len) in bad {
        assert_eq!(error(chain(&[buffer(address, len, 0, 0)])), ChainError::Address { address, len });
    }
    for (address, len) in
        [(REGION - 1, 1), (HIGH, 1), (HIGH + REGION - 1, 1), (0, u32::try_from(REGION).unwrap())]
    {
        assert_eq!(chain(&[buffer(address, len, 0, 0)]).unwrap().reader().remaining(), len);
    }
}

#[test]
fn q_08_buffers_of_4_gib_in_all_are_refused() {
    // The same 8 MiB again and again: only the sum is wrong.
    let memory = memory();
    let size = 1024;
    let driver = Driver::new(0, size, memory, false);
    let len = u32::try_from(REGION).unwrap();
    for index in 0..512 {
        driver.describe(index, buffer(0, len, if index == 511 { 0 } else { NEXT }, index + 1));
    }
    let table = Table { address: GuestAddress(driver.table()), size, indirect: false, position: 0 };
    let walk = |head| Chain::walk(driver.memory(), table, head, &mut Buffers::default());
    assert_eq!(walk(0).unwrap_err(), ChainError::TooLarge, "512 * 8 MiB");
    assert_eq!(walk(1).unwrap().reader().remaining(), 511 * len);
}

#[test]
fn q_11_q_12_a_readable_buffer_after_a_writable_one_is_refused() {
    let backwards = [buffer(0x1000, 4, NEXT | WRITE, 1), buffer(0x2000, 4, 0, 0)];
    assert_eq!(error(chain(&backwards)), ChainError::Order);
    let mixed = [buffer(0x1000, 4, NEXT, 1), buffer(0x2000, 4, NEXT | WRITE, 2), buffer(0x3000, 4, 0, 0)];
    assert_eq!(error(chain(&mixed)), ChainError::Order);
}

#[test]
fn q_13_q_14_a_buffer_may_be_any_memory_and_the_same_twice() {
    let driver = driver();
    let table = driver.table();
    driver.describe(0, buffer(table, 128, NEXT, 1));
    driver.describe(1, buffer(driver.used_ring(), 8, NEXT | WRITE, 2));
    driver.describe(2, buffer(driver.used_ring(), 8, WRITE, 0));
    let walked = walk(&driver, 0, true).unwrap();
    assert_eq!((walked.reader().remaining(), walked.writer().remaining()), (128, 16));
}

#[test]
fn q_15_c_022_a_table_needs_the_feature() {
    let driver = driver();
    driver.describe_at(ELSEWHERE, 0, buffer(0x1000, 4, 0, 0));
    driver.describe(0, buffer(ELSEWHERE, 16, INDIRECT, 0));
    assert_eq!(error(walk(&driver, 0, false)), ChainError::Indirect);
    assert_eq!(walk(&driver, 0, true).unwrap().reader().remaining(), 4);
}

#[test]
fn q_16_q_17_c_022_tables_are_neither_nested_nor_followed() {
    let nested = [buffer(ELSEWHERE, 16, INDIRECT, 0)];
    assert_eq!(error(through_table(&nested, 16, 0)), ChainError::Indirect);
    let plain = [buffer(0x1000, 4, 0, 0)];
    assert_eq!(error(through_table(&plain, 16, NEXT)), ChainError::Indirect);
}

#[test]
fn c_020_the_write_flag_of_a_table_is_ignored() {
    let walked = through_table(&[buffer(0x1000, 4, 0, 0)], 16, WRITE).unwrap();
    assert_eq!((walked.reader().remaining(), walked.writer().remaining()), (4, 0));
}

#[test]
fn c_021_plain_buffers_may_come_before_a_table() {
    let driver = driver();
    driver.describe_at(ELSEWHERE, 0, buffer(0x2000, 8, NEXT, 1));
    driver.describe_at(ELSEWHERE, 1, buffer(0x3000, 16, WRITE, 0));
    driver.describe(0, buffer(0x1000, 4, NEXT, 5));
    driver.describe(5, buffer(ELSEWHERE, 32, INDIRECT, 0));
    let walked = walk(&driver, 0, true).unwrap();
    assert_eq!((walked.reader().remaining(), walked.writer().remaining()), (12, 16));
}

#[test]
fn q_18_the_length_of_a_table_is_a_count_of_descriptors() {
    let one = [buffer(0x1000, 4, 0, 0)];
    for len in [0, 8, 15, 17, 24, 0xffff_fff8] {
        assert_eq!(error(through_table(&one, len, 0)), ChainError::Indirect, "{len} bytes");
    }
    for len in [16 * 9, 16 * 0x1_0000, 0xffff_fff0] {
        assert_eq!(error(through_table(&one, len, 0)), ChainError::TooLong, "{len} bytes");
    }
}

#[test]
fn q_19_a_table_must_be_memory() {
    for address in [REGION, REGION - 16, HIGH - 16, HIGH + REGION - 16, u64::MAX - 15, 1 << 40] {
        let driver = driver();
        driver.describe(0, buffer(address, 32, INDIRECT, 0));
        assert_eq!(error(walk(&driver, 0, true)), ChainError::Address { address, len: 32 });
    }
}

#[test]
fn q_20_a_table_that_loops_or_leads_out_is_refused() {
    let looping = [buffer(0x1000, 4, NEXT, 1), buffer(0x1000, 4, NEXT, 0)];
    assert_eq!(error(through_table(&looping, 32, 0)), ChainError::TooLong);
    assert_eq!(error(through_table(&[buffer(0x1000, 4, NEXT, 2)], 32, 0)), ChainError::Index(2));
}

#[test]
fn a_cursor_goes_over_any_layout_as_one_run() {
    let driver = driver();
    let memory = driver.memory();
    for (index, (address, bytes)) in (0..).zip([(0x1000, "abc"), (0x2000, "d"), (HIGH, "efgh")]) {
        memory.write_slice(bytes.as_bytes(), GuestAddress(address)).unwrap();
        let flags = if index == 2 { 0 } else { NEXT };
        driver.describe(index, buffer(address, u32::try_from(bytes.len()).unwrap(), flags, index + 1));
    }
    let walked = walk(&driver, 0, false).unwrap();
    for cut in 0..=8 {
        let mut cursor = walked.reader();
        let mut front = cursor.split_to(cut).unwrap();
        let (mut a, mut b) = (vec![0; cut as usize], vec![0; 8 - cut as usize]);
        front.read(&mut a).unwrap();
        cursor.read(&mut b).unwrap();
        assert_eq!([a, b].concat(), b"abcdefgh");
        assert_eq!((cursor.passed(), cursor.remaining()), (8, 0));
        assert_eq!(cursor.skip(1), Err(ChainError::Short));
    }
    let mut cursor = walked.reader();
    assert_eq!(cursor.read(&mut [0; 9]), Err(ChainError::Short));
    assert_eq!(cursor.passed(), 0, "nothing moved");
    assert_eq!(cursor.slices(5).map(|slice| slice.len()).collect::<Vec<_>>(), [3, 1, 1]);
}

/// Guest memory of the reference: two plain vectors.
struct Ram([(u64, Vec<u8>); 2]);

impl Ram {
    fn get(&self, address: u64, len: u64) -> Option<&[u8]> {
        self.0.iter().find_map(|(base, bytes)| {
            let from = usize::try_from(address.checked_sub(*base)?).ok()?;
            bytes.get(from..from.checked_add(usize::try_from(len).ok()?)?)
        })
    }

    fn put(&mut self, address: u64, data: &[u8]) {
        for (base, bytes) in &mut self.0 {
            if address >= *base && address - *base + data.len() as u64 <= bytes.len() as u64 {
                let from = usize::try_from(address - *base).unwrap();
                bytes[from..from + data.len()].copy_from_slice(data);
            }
        }
    }
}

/// Readable and writable buffers, or `None` for a chain that breaks a rule of §2.7.
fn reference(ram: &Ram, table: u64, indirect: bool, head: u16) -> Option<[Vec<(u64, u32)>; 2]> {
    let (mut table, mut size, mut inside, mut index) = (table, u64::from(SIZE), false, u64::from(head));
    let (mut buffers, mut writing, mut seen) = ([Vec::new(), Vec::new()], false, 0);
    loop {
        if index >= size {
            return None;
        }
        let bytes = ram.get(table + 16 * index, 16)?;
        let address = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let len = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        let [flags, next] = [12, 14].map(|at| u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        if flags & INDIRECT != 0 {
            let fits = len > 0 && len % 16 == 0 && len / 16 <= SIZE.into();
            if !indirect || inside || flags & NEXT != 0 || !fits {
                return None;
            }
            ram.get(address, len.into())?;
            (table, size, inside, index) = (address, u64::from(len / 16), true, 0);
            continue;
        }
        seen += 1;
        let write = flags & WRITE != 0;
        if seen > SIZE || (writing && !write) {
            return None;
        }
        writing = write;
        if len > 0 {
            ram.get(address, len.into())?;
            buffers[usize::from(write)].push((address, len));
        }
        if flags & NEXT == 0 {
            let total: u64 = buffers.concat().iter().map(|(_, len)| u64::from(*len)).sum();
            return (total < 1 << 32).then_some(buffers);
        }
        index = next.into();
    }
}

const SMALL: u64 = 0x1_0000;
const TABLE: u64 = 0x1000;
const TABLES: [u64; 3] = [0x2000, SMALL - 48, 0x4_0000];

/// A guest of two small regions with a hole, and its copy.
fn small(entries: &[(u64, u16, Descriptor)]) -> (Arc<Memory>, Ram) {
    let ranges = [(GuestAddress(0), SMALL as usize), (GuestAddress(0x4_0000), SMALL as usize)];
    let memory = Arc::new(Memory::anonymous(&ranges).unwrap());
    let mut ram = Ram([(0, vec![0; SMALL as usize]), (0x4_0000, vec![0; SMALL as usize])]);
    for (table, index, d) in entries {
        let mut bytes = Vec::new();
        bytes.extend(d.address.to_le_bytes());
        bytes.extend(d.len.to_le_bytes());
        bytes.extend(d.flags.to_le_bytes());
        bytes.extend(d.next.to_le_bytes());
        let at = table + 16 * u64::from(*index);
        if ram.get(at, 16).is_some() {
            ram.put(at, &bytes);
            memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        }
    }
    (memory, ram)
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        6 => 0u64..SMALL,
        2 => 0x4_0000u64..0x5_0000,
        3 => proptest::sample::select(TABLES.to_vec()),
        1 => proptest::sample::select(vec![SMALL - 1, SMALL, 0x3_ffff, 0x4_ffff, 0x5_0000, u64::MAX, u64::MAX - 15]),
    ];
    let len = prop_oneof![
        6 => 1u32..64,
        3 => (1u32..10).prop_map(|entries| entries * 16),
        1 => proptest::sample::select(vec![0, 1, u32::MAX, 0x1_0000, 0xffff_fff0]),
    ];
    let flags = prop_oneof![
        4 => Just(NEXT), 2 => Just(0), 3 => Just(WRITE), 3 => Just(NEXT | WRITE), 2 => Just(INDIRECT),
        1 => Just(INDIRECT | WRITE), 1 => 0u16..16,
    ];
    let next = prop_oneof![8 => 0u16..SIZE, 1 => Just(SIZE), 1 => any::<u16>()];
    (address, len, flags, next).prop_map(|(address, len, flags, next)| Descriptor {
        address,
        len,
        flags,
        next,
    })
}

/// Most links lead on to the next descriptor, or chains would hardly ever be long.
fn onward(descriptor: Descriptor, index: u16) -> Descriptor {
    let next = if descriptor.len.is_multiple_of(8) { descriptor.next } else { index + 1 };
    Descriptor { next, ..descriptor }
}

/// Walks one table both ways; how many buffers were found, if the chain is one.
fn agree(entries: &[(u64, u16, Descriptor)], head: u16, indirect: bool) -> Option<usize> {
    let (memory, ram) = small(entries);
    let table = Table { address: GuestAddress(TABLE), size: SIZE, indirect, position: 0 };
    let walked = Chain::walk(&memory, table, head, &mut Buffers::default()).ok().map(|chain| {
        let plain =
            |segments: &[Segment]| segments.iter().map(|s| (s.address(), s.len())).collect::<Vec<_>>();
        [plain(&chain.segments[..chain.readable]), plain(&chain.segments[chain.readable..])]
    });
    let here = |(address, len)| (memory.get_host_address(GuestAddress(address)).unwrap().addr(), len);
    let expected = reference(&ram, TABLE, indirect, head);
    assert_eq!(walked, expected.map(|buffers| buffers.map(|side| side.into_iter().map(here).collect())));
    walked.map(|buffers| buffers.concat().len())
}

#[test]
fn p_01_the_walk_agrees_with_the_rules_for_any_table() {
    let own = proptest::collection::vec(descriptor(), usize::from(SIZE));
    let others = proptest::collection::vec((0usize..3, 0u16..SIZE, descriptor()), 0..16);
    let found = std::cell::RefCell::new([0; 2]);
    let mut runner = TestRunner::new(ProptestConfig::with_cases(4000));
    let result = runner.run(&(own, others, 0u16..=SIZE, any::<bool>()), |(own, others, head, indirect)| {
        let own = (0u16..).zip(own).map(|(index, d)| (TABLE, index, d));
        let others = others.into_iter().map(|(table, index, d)| (TABLES[table], index, d));
        let entries: Vec<_> = own.chain(others).map(|(table, i, d)| (table, i, onward(d, i))).collect();
        let buffers = agree(&entries, head, indirect).unwrap_or(0);
        found.borrow_mut()[0] += u32::from(buffers > 0);
        found.borrow_mut()[1] += u32::from(buffers > 2);
        Ok(())
    });
    assert!(result.is_ok(), "{result:?}");
    let [good, long] = found.into_inner();
    assert!(good > 400 && long > 15, "only {good} chains were accepted, {long} of more than two buffers");
}
