//! The requirements of VIRTIO 1.2 §5.2 on a block device, by their numbers in the conformance list.

use super::*;
use std::fs::OpenOptions;

fn config_space(device: &dyn VirtioDevice) -> [u8; 64] {
    let mut bytes = [0xff; 64];
    device.config().unwrap().read(0, &mut bytes);
    bytes
}

#[test]
fn c101_a_write_to_a_read_only_disk_fails_and_writes_nothing() {
    let file = image(4);
    let before = contents(&file);
    let options = OpenOptions::new().read(true).to_owned();
    // Opened for writing, too: the device refuses by itself and does not leave it to the host.
    for fd in [reopen(&file, &options), file.try_clone().unwrap().into()] {
        let device = try_build(&Config { read_only: true, ..config() }, fd).unwrap();
        assert_ne!(device.features() & 1 << 5, 0, "RO is offered");
        let mut vm = Harness::new(device);
        assert_eq!(write(&mut vm, 0, &[9; 512]), IOERR);
        assert_eq!(ask(&mut vm, &[&header(DISCARD, 0), &segment(0, 1, 0)], &[1]).status, UNSUPP);
        assert_eq!(ask(&mut vm, &[&header(WRITE_ZEROES, 0), &segment(0, 1, 0)], &[1]).status, UNSUPP);
        assert_eq!(read(&mut vm, 1, 512).data, pattern(1));
        assert_eq!(flush(&mut vm), OK);
        assert_eq!(contents(&file), before);
    }
}

#[test]
fn c102_flush_is_offered_and_c103_no_write_cache_control_and_c109_no_lifetime() {
    let device = build(&config(), &image(1));
    assert_ne!(device.features() & 1 << 9, 0, "FLUSH");
    assert_eq!(device.features() & 1 << 11, 0, "CONFIG_WCE");
    assert_eq!(device.features() & 1 << 15, 0, "LIFETIME");
    assert_eq!(config_space(device.as_ref())[32], 0, "writeback is 0");
}

#[test]
fn c104_the_unused_bytes_of_the_configuration_are_zero() {
    let bytes = config_space(build(&config(), &image(1)).as_ref());
    assert_eq!(bytes[33], 0, "unused0");
    assert_eq!(bytes[57..60], [0; 3], "unused1");
    assert_eq!(bytes[60..], [0; 4], "past the end");
}

#[test]
fn the_configuration_says_what_the_device_keeps_to() {
    let bytes = config_space(build(&config(), &image(3)).as_ref());
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()), 3);
    assert_eq!((word(8), word(12), word(20)), (SIZE_MAX, SEG_MAX, 512));
    assert_eq!(bytes[24..32], [3, 0, 8, 0, 0, 0, 0, 0], "topology");
    assert_eq!((word(36), word(40), word(44)), (1 << 22, 16, 8));
    assert_eq!((word(48), word(52), bytes[56]), (1 << 16, 1, 1));
    assert_eq!(u32::from(QUEUE_SIZE), SEG_MAX + 2, "a request at the limit fits a queue");
}

#[test]
fn c105_an_unknown_flag_and_c106_a_discard_with_unmap_are_unsupported() {
    let file = image(8);
    let before = contents(&file);
    let mut vm = Harness::new(build(&config(), &file));
    for (kind, flags) in
        [(DISCARD, 1), (DISCARD, 2), (DISCARD, 1 << 31), (WRITE_ZEROES, 2), (WRITE_ZEROES, 3)]
    {
        let got = ask(&mut vm, &[&header(kind, 0), &segment(0, 1, flags)], &[1]);
        assert_eq!((got.status, got.len), (UNSUPP, 1), "type {kind} flags {flags:#x}");
    }
    let one_bad = ask(&mut vm, &[&header(DISCARD, 0), &segment(0, 8, 0), &segment(0, 1, 2)], &[1]);
    assert_eq!(one_bad.status, UNSUPP);
    assert_eq!(contents(&file), before, "one bad segment, and none is carried out");
}

#[test]
fn c107_zeroed_sectors_read_as_zeroes_with_or_without_unmap() {
    for directory in ["/tmp", "/dev/shm", "/root"] {
        let Ok(file) = tempfile::tempfile_in(directory) else { continue };
        for flags in [0, 1] {
            file.write_all_at(&[7; 512 * 32], 0).unwrap();
            let mut vm = Harness::new(build(&config(), &file));
            let got = ask(&mut vm, &[&header(WRITE_ZEROES, 0), &segment(3, 17, flags)], &[1]);
            assert_eq!(got.status, OK);
            let bytes = contents(&file);
            assert_eq!(bytes[..3 * 512], [7; 3 * 512]);
            assert_eq!(bytes[3 * 512..20 * 512], [0; 17 * 512], "{directory} flags {flags}");
            assert_eq!(bytes[20 * 512..], [7; 12 * 512]);
        }
    }
}

#[test]
fn c110_an_unknown_type_is_unsupported_and_the_status_is_written() {
    let mut vm = Harness::new(build(&config(), &image(1)));
    // Of these, 10 is GET_LIFETIME, 14 SECURE_ERASE, and 15 to 26 are about zones.
    for kind in [2, 3, 5, 6, 7, 9, 10, 12].into_iter().chain(14..=26).chain([1 << 31, 1 << 31 | 1, u32::MAX])
    {
        let got = ask(&mut vm, &[&header(kind, 0)], &[512, 1]);
        assert_eq!((got.status, got.len), (UNSUPP, 0), "type {kind:#x}");
        assert_eq!(got.data, [0xa5; 512], "no byte of the buffer changes");
    }
}

#[test]
fn c111_a_request_that_passes_the_end_fails_as_a_whole() {
    let file = image(4);
    let before = contents(&file);
    let mut vm = Harness::new(build(&config(), &file));
    assert_eq!(write(&mut vm, 3, &[9; 1024]), IOERR);
    assert_eq!(contents(&file), before, "not even the part that would fit");
    let got = read(&mut vm, 3, 1024);
    assert_eq!((got.status, got.len), (IOERR, 0));
    assert_eq!(got.data, [0xa5; 1024]);
    assert_eq!(read(&mut vm, 3, 512), Answer { status: OK, len: 513, data: pattern(3).into() });
}

#[test]
fn c112_data_that_is_no_multiple_of_512_fails() {
    let file = image(4);
    let before = contents(&file);
    let mut vm = Harness::new(build(&config(), &file));
    for len in [1, 511, 513, 1023] {
        assert_eq!(write(&mut vm, 0, &vec![9; len]), IOERR);
        assert_eq!(read(&mut vm, 0, u32::try_from(len).unwrap()).status, IOERR);
    }
    assert_eq!(contents(&file), before);
}

#[test]
fn c113_more_segments_or_sectors_than_advertised_fail() {
    let file = image(0);
    file.set_len(8 << 30).unwrap();
    let mut vm = Harness::new(build(&config(), &file));
    let mut clear =
        |kind, segments: &[[u8; 16]]| ask(&mut vm, &[&header(kind, 0), segments.as_flattened()], &[1]).status;
    assert_eq!(clear(DISCARD, &[segment(0, 1, 0); 16]), OK);
    assert_eq!(clear(DISCARD, &[segment(0, 1, 0); 17]), IOERR);
    assert_eq!(clear(DISCARD, &[segment(0, 1 << 22, 0)]), OK);
    assert_eq!(clear(DISCARD, &[segment(0, (1 << 22) + 1, 0)]), IOERR);
    assert_eq!(clear(WRITE_ZEROES, &[segment(0, 1 << 16, 1)]), OK);
    assert_eq!(clear(WRITE_ZEROES, &[segment(0, (1 << 16) + 1, 1)]), IOERR);
    assert_eq!(clear(WRITE_ZEROES, &[segment(0, 1, 0); 2]), IOERR);
    assert_eq!(clear(DISCARD, &[]), IOERR);
}

#[test]
fn c114_the_serial_number_is_20_bytes_padded_with_zeroes() {
    let mut vm = Harness::new(build(&config(), &image(1)));
    let got = ask(&mut vm, &[&header(GET_ID, 0)], &[20, 1]);
    assert_eq!((got.status, got.len), (OK, 21));
    assert_eq!(got.data, b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");

    let long = Config { serial: "exactly-twenty-bytes".into(), ..config() };
    let mut vm = Harness::new(build(&long, &image(1)));
    assert_eq!(ask(&mut vm, &[&header(GET_ID, 0)], &[20, 1]).data, b"exactly-twenty-bytes");
}

#[test]
fn c115_the_capacity_is_rounded_down_to_whole_sectors() {
    let file = image(2);
    for (len, sectors) in [(0, 0), (511, 0), (512, 1), (1023, 1), (1024, 2)] {
        file.set_len(len).unwrap();
        let device = build(&config(), &file);
        assert_eq!(config_space(device.as_ref())[0], sectors, "{len} bytes");
        let mut vm = Harness::new(device);
        assert_eq!(write(&mut vm, u64::from(sectors), &[1; 512]), IOERR);
        assert_eq!(file.metadata().unwrap().len(), len, "the file never grows");
    }
}

#[test]
fn c015_a_header_may_be_split_anywhere_and_so_may_the_data() {
    let mut vm = Harness::new(build(&config(), &image(4)));
    let request = header(IN, 2);
    for cut in 1..16 {
        let (front, back) = request.split_at(cut);
        let got = ask(&mut vm, &[front, back], &[1, 510, 1, 1]);
        assert_eq!(got, Answer { status: OK, len: 513, data: pattern(2).into() }, "cut at {cut}");
    }
    let bytes: Vec<&[u8]> = request.chunks(1).collect();
    assert_eq!(ask(&mut vm, &bytes, &[512, 1]).data, pattern(2));
    // One buffer for header and data, another for data and status.
    let mut whole = header(OUT, 1).to_vec();
    whole.extend([8; 512]);
    assert_eq!(ask(&mut vm, &[&whole], &[1]).status, OK);
    assert_eq!(ask(&mut vm, &[&header(IN, 1)], &[513]).data, [8; 512]);
}

#[test]
fn a_read_at_depth_one_costs_one_interrupt() {
    let device = build(&config(), &image(8));
    let counts = counts(device.as_ref());
    let mut vm = Harness::new(device);
    let got = read(&mut vm, 0, 4096);
    assert_eq!((got.status, got.len), (OK, 4097));
    assert_eq!(vm.interrupts(0), 1);
    assert_eq!((counts["reads"].get(), counts["read_bytes"].get()), (1, 4096));
    assert_eq!(write(&mut vm, 0, &[1; 1024]), OK);
    assert_eq!((counts["writes"].get(), counts["written_bytes"].get()), (1, 1024));
    assert_eq!((flush(&mut vm), counts["flushes"].get(), counts["errors"].get()), (OK, 1, 0));
    assert_eq!((write(&mut vm, 8, &[1; 512]), counts["errors"].get()), (IOERR, 1));
}
