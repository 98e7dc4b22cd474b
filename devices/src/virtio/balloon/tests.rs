//! Honest and hostile drivers (HG-G10 to HG-G16, C-118 to C-123), on plain memory.

use std::collections::HashMap;

use super::*;
use crate::memory::Bytes;
use crate::testing::{Descriptor, HIGH, Harness, NEXT, REGION, WRITE};

/// A page that no ring and no buffer of the test driver uses.
const PAGE: u32 = 0x40_0000 / 4096;

fn build(config: &Config) -> Box<dyn VirtioDevice> {
    config.build(&mut HashMap::new()).unwrap()
}

/// A running balloon, and its counters by name.
fn start(config: &Config) -> (Harness, impl Fn(&str) -> u64 + use<>) {
    let device = build(config);
    let counters = device.counters();
    let count = move |name: &str| counters.iter().find(|c| c.name() == name).unwrap().get();
    (Harness::new(device), count)
}

fn page_list(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

fn fill(vm: &Harness, first: u32, count: u32) {
    for page in first..first + count {
        vm.memory().write_slice(&[0xaa; 4096], GuestAddress(u64::from(page) * PAGE_SIZE)).unwrap();
    }
}

/// Whether all bytes of a page are zero (`Some(true)`) or all are as filled (`Some(false)`).
fn dropped(vm: &Harness, page: u32) -> Option<bool> {
    let mut bytes = [0; 4096];
    vm.memory().read_slice(&mut bytes, GuestAddress(u64::from(page) * PAGE_SIZE)).unwrap();
    match bytes {
        _ if bytes == [0; 4096] => Some(true),
        _ if bytes == [0xaa; 4096] => Some(false),
        _ => None,
    }
}

/// Posts a request and has it served; it is given back with length 0.
fn request(vm: &mut Harness, queue: u16, bytes: &[u8]) {
    let posted = vm.driver(queue).post(&[bytes], &[]);
    vm.kick(queue);
    assert_eq!(vm.driver(queue).take(), Some((posted.head, 0)));
    assert!(!vm.asked_for_reset());
}

#[test]
fn c118_inflating_drops_exactly_the_named_pages() {
    let (mut vm, count) = start(&Config::default());
    fill(&vm, PAGE, 8);
    request(&mut vm, 0, &page_list(&[PAGE + 2, PAGE + 1, PAGE + 5]));
    let now: Vec<_> = (PAGE..PAGE + 8).map(|page| dropped(&vm, page).unwrap()).collect();
    assert_eq!(now, [false, true, true, false, false, true, false, false]);
    assert_eq!((count("inflated_pages"), count("refused_pages")), (3, 0));
    assert_eq!(vm.interrupts(0), 1);
    // Deflating only counts: the pages come back by being touched.
    request(&mut vm, 1, &page_list(&[PAGE + 1]));
    assert_eq!(count("deflated_pages"), 1);
    fill(&vm, PAGE + 1, 1);
    assert_eq!(dropped(&vm, PAGE + 1), Some(false));
}

#[test]
fn hg_g10_pages_that_are_no_memory_are_left_out() {
    let (mut vm, count) = start(&Config::default());
    let last = u32::try_from(REGION / PAGE_SIZE).unwrap() - 1;
    let high = u32::try_from(HIGH / PAGE_SIZE).unwrap();
    fill(&vm, last, 1);
    // The run crosses the end of memory; then the hole, its end, and the largest numbers there are.
    let pages = [last, last + 1, last + 2, high - 1, u32::MAX - 1, u32::MAX, 1 << 30];
    request(&mut vm, 0, &page_list(&pages));
    assert_eq!((count("inflated_pages"), count("refused_pages")), (1, 6));
    assert_eq!(dropped(&vm, last), Some(true));
}

#[test]
fn hg_g10_a_driver_that_drops_its_own_rings_breaks_only_itself() {
    let (mut vm, _) = start(&Config::default());
    let rings = u32::try_from(vm.driver(0).table() / PAGE_SIZE).unwrap();
    let all: Vec<u32> = (rings..rings + 32).collect();
    vm.driver(0).post(&[&page_list(&all)], &[]);
    vm.kick(0);
    // The available index reads as 0 now, or goes on from there: either way the device stands.
    vm.kick(0);
    let device = vm.reset();
    let mut vm = Harness::new(device);
    fill(&vm, PAGE, 1);
    request(&mut vm, 0, &page_list(&[PAGE]));
    assert_eq!(dropped(&vm, PAGE), Some(true));
}

#[test]
fn hg_g11_pages_may_be_named_twice_and_deflated_without_having_been_inflated() {
    let (mut vm, count) = start(&Config::default());
    fill(&vm, PAGE, 3);
    request(&mut vm, 0, &page_list(&[PAGE, PAGE, PAGE + 1, PAGE]));
    assert_eq!(count("inflated_pages"), 2);
    request(&mut vm, 0, &page_list(&[PAGE]));
    request(&mut vm, 1, &page_list(&[PAGE + 2, PAGE + 2, u32::MAX]));
    assert_eq!(dropped(&vm, PAGE + 2), Some(false));
}

#[test]
fn hg_g12_half_numbers_are_refused_and_long_lists_cut() {
    let (mut vm, count) = start(&Config::default());
    fill(&vm, PAGE, 300);
    for len in [1, 2, 3, 5, 1023] {
        request(&mut vm, 0, &page_list(&[PAGE; 256])[..len]);
    }
    assert_eq!((count("inflated_pages"), dropped(&vm, PAGE)), (0, Some(false)));
    let all: Vec<u32> = (PAGE..PAGE + 300).collect();
    request(&mut vm, 0, &page_list(&all));
    assert_eq!(count("inflated_pages"), 256);
    assert_eq!((dropped(&vm, PAGE + 255), dropped(&vm, PAGE + 256)), (Some(true), Some(false)));
    request(&mut vm, 0, &[]);
}

#[test]
fn hg_g13_c123_the_driver_sets_actual_and_nothing_else_and_is_not_believed() {
    let device = build(&Config { target_pages: 5, ..Config::default() });
    let config = device.config().unwrap();
    config.write(0, &[0xff; CONFIG_SIZE]);
    assert_eq!(actual(&config), u32::MAX);
    let mut bytes = [0; CONFIG_SIZE];
    config.read(0, &mut bytes);
    assert_eq!(bytes, [5, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0]);
    let generation = config.generation();
    set_target(&config, 77);
    assert_eq!((get(&config, NUM_PAGES), config.generation()), (77, generation + 1));

    let saved = device.state();
    assert_eq!(saved, DeviceState::Balloon(State { target_pages: 77, actual_pages: u32::MAX }));
    let mut other = build(&Config::default());
    other.restore(&saved).unwrap();
    assert_eq!(other.state(), saved);
    assert!(other.restore(&DeviceState::Rng(crate::virtio::rng::State {})).is_err());
}

fn entries(list: &[(u16, u64)]) -> Vec<u8> {
    list.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect()
}

#[test]
fn c119_c120_statistics_come_in_any_order_and_unknown_tags_are_passed_by() {
    let (mut vm, count) = start(&Config { stats_interval: 60, ..Config::default() });
    let bytes = entries(&[(5, 1 << 30), (0x7fff, 9), (4, 1 << 20), (16, 1), (0, 3)]);
    let first = vm.driver(2).post(&[&bytes[..13], &bytes[13..]], &[]);
    vm.kick(2);
    assert_eq!(vm.driver(2).take(), None, "the buffer stays until new figures are wanted");
    assert_eq!((count("guest_total_bytes"), count("guest_free_bytes")), (1 << 30, 1 << 20));
    vm.deliver(TIMER, EventSet::IN);
    assert_eq!(vm.driver(2).take(), Some((first.head, 0)));
    assert_eq!(vm.interrupts(2), 1);
    // New figures replace the old; a last half entry is nothing.
    let bytes = entries(&[(4, 5), (5, 6)]);
    vm.driver(2).post(&[&bytes[..19]], &[]);
    vm.kick(2);
    assert_eq!((count("guest_free_bytes"), count("guest_total_bytes")), (5, 1 << 30));
}

#[test]
fn hg_g14_too_many_entries_and_buffers_out_of_turn_do_no_harm() {
    let (mut vm, count) = start(&Config { stats_interval: 60, ..Config::default() });
    let mut many = vec![(0xffff, 1); 256];
    many.push((4, 99));
    let first = vm.driver(2).post(&[&entries(&many)], &[]);
    let second = vm.driver(2).post(&[&entries(&[(4, 1)])], &[]);
    vm.kick(2);
    assert_eq!(count("guest_free_bytes"), 0, "only 256 entries are looked at");
    vm.deliver(TIMER, EventSet::IN);
    assert_eq!(vm.driver(2).take(), Some((first.head, 0)));
    assert_eq!(count("guest_free_bytes"), 1, "the one that waited is read at once");
    vm.deliver(TIMER, EventSet::IN);
    assert_eq!(vm.driver(2).take(), Some((second.head, 0)));
    // Asking again while the driver has nothing posted.
    vm.deliver(TIMER, EventSet::IN);
    assert_eq!(vm.driver(2).take(), None);
    vm.pause_and_resume();
    let third = vm.driver(2).post(&[], &[64]);
    vm.kick(2);
    vm.deliver(TIMER, EventSet::IN);
    assert_eq!(vm.driver(2).take(), Some((third.head, 0)));
}

#[test]
fn statistics_are_asked_for_again_with_event_indices() {
    let device = build(&Config { stats_interval: 60, ..Config::default() });
    let features = device.features();
    let mut vm = Harness::with(device, features, true);
    for round in 0..5 {
        let posted = vm.driver(2).post(&[&entries(&[(4, 1)])], &[]);
        // `avail_event` names this buffer, so the driver kicks for it.
        let avail_event = vm.driver(2).used_ring() + 4 + 8 * 128;
        assert_eq!(vm.memory().read_obj::<u16>(GuestAddress(avail_event)).unwrap(), round);
        vm.kick(2);
        vm.deliver(TIMER, EventSet::IN);
        assert_eq!(vm.driver(2).take(), Some((posted.head, 0)));
    }
}

#[test]
fn the_timer_file_asks_by_itself() {
    let (mut vm, _) = start(&Config { stats_interval: 1, ..Config::default() });
    let posted = vm.driver(2).post(&[&entries(&[(4, 1)])], &[]);
    vm.kick(2);
    let start = std::time::Instant::now();
    while vm.poll() == 0 {
        assert!(start.elapsed().as_secs() < 60, "the timer never fires");
        std::thread::yield_now();
    }
    assert_eq!(vm.driver(2).take(), Some((posted.head, 0)));
    assert_eq!(vm.poll(), 0, "once per interval");
}

#[test]
fn reporting_drops_whole_pages_inside_what_is_named_and_nothing_around() {
    let (mut vm, count) = start(&Config::default());
    fill(&vm, PAGE, 16);
    let at = |page: u32, offset: u64| u64::from(PAGE + page) * PAGE_SIZE + offset;
    let next = |index: u16, address: u64, len: u32| {
        let flags = WRITE | if index < 2 { NEXT } else { 0 };
        Descriptor { address, len, flags, next: index + 1 }
    };
    let queue = 2;
    let driver = vm.driver(queue);
    driver.describe(0, next(0, at(1, 0), 2 * 4096));
    driver.describe(1, next(1, at(5, 100), 3 * 4096));
    driver.describe(2, next(2, at(12, 1), 4095));
    driver.offer(0);
    vm.kick(queue);
    assert_eq!(vm.driver(queue).take(), Some((0, 0)));
    let now: Vec<_> =
        (PAGE..PAGE + 16).filter(|page| dropped(&vm, *page).unwrap()).map(|p| p - PAGE).collect();
    assert_eq!(now, [1, 2, 6, 7]);
    assert_eq!(count("reported_bytes"), 4 * 4096);
}

#[test]
fn queues_are_where_drivers_and_the_specification_look_for_them() {
    let role = |features, index| {
        let config = Config { stats_interval: 60, ..Config::default() };
        let mut harness = Harness::with(build(&config), features, false);
        fill(&harness, PAGE, 1);
        let driver = harness.driver(index);
        let address = u64::from(PAGE) * PAGE_SIZE;
        driver.describe(0, Descriptor { address, len: 4096, flags: WRITE, next: 0 });
        driver.offer(0);
        harness.kick(index);
        dropped(&harness, PAGE).unwrap()
    };
    assert!(role(F_REPORTING, 2) && role(F_REPORTING, 4));
    assert!(role(F_REPORTING | F_STATS_VQ, 3) && role(F_REPORTING | F_STATS_VQ, 4));
    assert!(!role(F_REPORTING | F_STATS_VQ, 2) && !role(0, 2) && !role(0, 4));
    assert_eq!(build(&Config::default()).features(), F_DEFLATE_ON_OOM | F_REPORTING);
    let none = Config { deflate_on_oom: false, reporting: false, ..Config::default() };
    assert_eq!(build(&none).features(), 0);
}

#[test]
fn hg_g15_everything_can_be_inflated_and_touched_again() {
    let (mut vm, count) = start(&Config::default());
    let pages = u32::try_from(REGION / PAGE_SIZE).unwrap();
    // All of the lower region behind the rings.
    for first in (512..pages).step_by(256) {
        fill(&vm, first, 256);
        let list: Vec<u32> = (first..first + 256).collect();
        request(&mut vm, 0, &page_list(&list));
    }
    assert_eq!(count("inflated_pages"), u64::from(pages - 512));
    for first in (512..pages).step_by(256) {
        assert_eq!(dropped(&vm, first), Some(true));
        fill(&vm, first, 256);
    }
}

#[test]
fn hg_g16_pages_of_shared_memory_are_given_up_in_its_file() {
    use crate::memory::GuestRegionMmap;
    use vm_memory::mmap::MmapRegionBuilder;
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let region = MmapRegionBuilder::new(1 << 20)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_file_offset(vm_memory::FileOffset::new(file.try_clone().unwrap(), 0))
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    let memory = Memory::new(vec![region.into()]).unwrap();
    memory.write_slice(&[0xaa; 8192], GuestAddress(0)).unwrap();
    assert_eq!(discard_pages(&memory, 1, 1), 1);
    let mut bytes = [0; 8192];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
    assert_eq!((bytes[..4096] == [0xaa; 4096], bytes[4096..] == [0; 4096]), (true, true));
}
