//! Meters by a clock of their own, and what is written as limits.

use std::fs::File;

use proptest::prelude::*;

use super::*;

const SECOND: u64 = 1_000_000_000;
/// Some time: CLOCK_MONOTONIC does not begin at 0 either.
const BEGIN: u64 = 7 * SECOND;

fn limit(text: &str) -> Limit {
    text.parse().unwrap()
}

fn meters(limits: &[&str]) -> Meters {
    let (meters, _file) = Meters::create().unwrap();
    limits.iter().for_each(|text| meters.set(&limit(text)));
    meters
}

#[test]
fn without_meters_or_without_a_rate_nobody_waits() {
    for meters in [Meters::default(), meters(&[])] {
        for what in What::ALL {
            meters.charge(what, u64::MAX);
            assert_eq!(meters.wait(what), None);
        }
        assert_eq!(meters.limits(), []);
    }
}

#[test]
fn a_burst_passes_at_once_and_then_the_rate() {
    let meters = meters(&["disk-read=10ops:5ops"]);
    let at = |nanos: u64| move || BEGIN + nanos;
    for n in 0..5 {
        assert_eq!(meters.wait_at(What::DiskRead, at(0)), None, "{n}");
        meters.charge_at(What::DiskRead, 1 << 20, at(0));
    }
    let wait = |nanos| meters.wait_at(What::DiskRead, at(nanos));
    assert_eq!(wait(0), Some(Duration::from_millis(100)));
    assert_eq!(wait(40_000_000), Some(Duration::from_millis(60)));
    assert_eq!(wait(100_000_000), None);
    meters.charge_at(What::DiskRead, 0, at(100_000_000));
    assert_eq!(wait(100_000_000), Some(Duration::from_millis(100)));
    assert_eq!(meters.wait_at(What::DiskWrite, at(0)), None, "others have meters of their own");
    // After a long time without any it is the burst again, not more.
    for _ in 0..5 {
        assert_eq!(wait(3600 * SECOND), None);
        meters.charge_at(What::DiskRead, 0, at(3600 * SECOND));
    }
    assert!(wait(3600 * SECOND).is_some());
}

#[test]
fn what_is_larger_than_the_burst_is_carried_out_whole_and_paid_for_by_the_next() {
    let meters = meters(&["net-send=64K:64K"]);
    meters.charge_at(What::NetSend, (10 * 64) << 10, || BEGIN);
    let wait = meters.wait_at(What::NetSend, || BEGIN).unwrap();
    assert!((Duration::from_secs(9)..Duration::from_millis(9001)).contains(&wait), "{wait:?}");
}

#[test]
fn bytes_and_operations_are_held_each_and_the_longer_wait_counts() {
    let meters = meters(&["disk-write=1M:1M", "disk-write=1ops:1ops"]);
    meters.charge_at(What::DiskWrite, 512, || BEGIN);
    assert_eq!(meters.wait_at(What::DiskWrite, || BEGIN), Some(Duration::from_secs(1)));
    meters.charge_at(What::DiskWrite, 8 << 20, || BEGIN);
    assert!(meters.wait_at(What::DiskWrite, || BEGIN).unwrap() > Duration::from_secs(6));
}

#[test]
fn a_limit_that_is_set_anew_or_lifted_forgets_what_is_owed() {
    let meters = meters(&["disk-read=64K", "disk-read=1ops"]);
    meters.charge(What::DiskRead, 1 << 30);
    assert!(meters.wait(What::DiskRead).is_some());
    meters.set(&limit("disk-read=128K"));
    let one = Duration::from_secs(1);
    assert!(meters.wait(What::DiskRead).is_none_or(|wait| wait <= one), "an operation is left");
    meters.set(&limit("disk-read=none"));
    assert_eq!(meters.wait(What::DiskRead), None);
    assert_eq!(meters.limits(), []);
}

#[test]
fn another_process_has_the_same_meters_by_their_file() {
    let (ours, file) = Meters::create().unwrap();
    let theirs = Meters::open(file).unwrap();
    ours.set(&limit("net-receive=1ops:1ops"));
    assert_eq!(theirs.limits(), [limit("net-receive=1ops:1ops")]);
    (0..1000).for_each(|_| theirs.charge(What::NetReceive, 0));
    assert!(ours.wait(What::NetReceive).is_some());
}

#[test]
fn a_file_whose_size_may_change_or_is_too_small_is_refused() {
    let plain = memfd_create(c"plain", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    File::from(plain.try_clone().unwrap()).set_len(4096).unwrap();
    assert_eq!(Meters::open(plain).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    let short = memfd_create(c"short", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    fcntl(&short, FcntlArg::F_ADD_SEALS(SEALS)).unwrap();
    assert_eq!(Meters::open(short).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert!(Meters::open(File::open("/dev/null").unwrap().into()).is_err());
}

#[test]
fn numbers_in_the_file_that_nobody_would_set_end_in_waits_or_none() {
    let (meters, _file) = Meters::create().unwrap();
    let meter = meters.meter(What::DiskRead, Unit::Bytes).unwrap();
    for (rate, burst, paid) in [(1, u64::MAX, u64::MAX), (u64::MAX, 0, u64::MAX), (1, 0, 0), (u64::MAX, 1, 0)]
    {
        meter.rate.store(rate, Ordering::Release);
        meter.burst.store(burst, Ordering::Release);
        meter.paid.store(paid, Ordering::Release);
        meters.charge(What::DiskRead, u64::MAX);
        let _ = meters.wait(What::DiskRead);
        let _ = meters.limits();
    }
}

#[test]
fn a_limit_is_a_kind_of_traffic_and_a_rate() {
    let rate = |per_second, burst| Rate::new(per_second, burst).unwrap();
    for (text, what, bound) in [
        ("disk-read=10M:40M", What::DiskRead, Bound::Bytes(rate(10 << 20, 40 << 20))),
        ("disk-write=65536", What::DiskWrite, Bound::Bytes(rate(65536, 65536))),
        ("net-send=500ops", What::NetSend, Bound::Operations(rate(500, 500))),
        ("net-receive=1ops:1ops", What::NetReceive, Bound::Operations(rate(1, 1))),
        ("net-receive=1T:1", What::NetReceive, Bound::Bytes(rate(1 << 40, 1))),
        ("disk-read=none", What::DiskRead, Bound::None),
    ] {
        assert_eq!(limit(text), Limit { what, bound }, "{text}");
        assert_eq!(limit(&limit(text).to_string()), limit(text), "as it is printed");
    }
    assert_eq!(limit("disk-read=10M:40M").to_string(), "disk-read=10M:40M");
    assert_eq!(limit("net-send=500ops").to_string(), "net-send=500ops:500ops");
}

#[test]
fn the_least_and_the_most_are_taken_and_what_is_beyond_is_refused() {
    for text in
        ["disk-read=64K", "disk-read=1T", "disk-read=1ops", "disk-read=100000000ops", "disk-read=1T:1T"]
    {
        assert!(text.parse::<Limit>().is_ok(), "{text}");
    }
    let beyond = [
        "65535",
        "1099511627777",
        "0",
        "64K:0",
        "64K:1099511627777",
        "0ops",
        "100000001ops",
        "1ops:100000001ops",
    ];
    for text in beyond.map(|bound| format!("disk-read={bound}")) {
        assert!(matches!(text.parse::<Limit>(), Err(NotALimit::Range(_))), "{text}");
    }
    for text in [
        "",
        "disk-read",
        "disk=1M",
        "disk-read=",
        "disk-read=1X",
        "disk-read=-1M",
        "disk-read=+1M",
        "disk-read=1M:",
        "disk-read=1M:2ops",
        "disk-read=1ops:2M",
        "disk-read=ops",
        "disk-read=M",
        "disk-read=99999999999999999999",
        "disk-read=99999999999T",
        "disk-read=1M:2M:3M",
        "disk-read=none:1M",
        "disk-read=1é",
    ] {
        assert!(matches!(text.parse::<Limit>(), Err(NotALimit::Form(_))), "{text}");
    }
}

proptest! {
    #[test]
    fn never_more_passes_than_burst_rate_and_one_request(
        rate in 65_536u64..1 << 30,
        burst in 1u64..1 << 24,
        requests in prop::collection::vec((0u64..SECOND / 50, 0u64..1 << 22), 1..200),
    ) {
        let meters = meters(&[]);
        let rate = Rate::new(rate, burst).unwrap();
        meters.set(&Limit { what: What::DiskRead, bound: Bound::Bytes(rate) });
        let (mut now, mut passed, mut largest) = (BEGIN, 0u64, 0u64);
        for (later, bytes) in requests {
            now += later;
            if meters.wait_at(What::DiskRead, || now).is_none() {
                meters.charge_at(What::DiskRead, bytes, || now);
                passed += bytes;
                largest = largest.max(bytes);
            }
            let earned = u128::from(now - BEGIN) * u128::from(rate.per_second()) / u128::from(SECOND);
            let most = u128::from(burst) + earned + u128::from(largest) + 1;
            prop_assert!(u128::from(passed) <= most, "{passed} of at most {most}");
        }
        // Whoever waits as long as it was told may go on.
        if let Some(wait) = meters.wait_at(What::DiskRead, || now) {
            let then = now + u64::try_from(wait.as_nanos()).unwrap();
            prop_assert_eq!(meters.wait_at(What::DiskRead, || then), None);
        }
    }
}
