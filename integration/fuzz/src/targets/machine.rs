//! What a machine is made of and what it is saved as: kernels, configurations, requests, states, accesses of its CPUs.

use std::fs::File;
use std::io::{Seek, Write};

use mvm_devices::memory::{GuestAddress, Memory};
use mvm_devices::testing::hostile::Reach;
use mvm_devices::testing::load;
use mvm_devices::testing::pci::PciDriver;
use mvm_vmm::boot::{self, Entry, Images, Placed, Platform};
use mvm_vmm::config::{Image, MachineConfig, Protocol};
use mvm_vmm::control::{Answer, Reply, Request};
use mvm_vmm::fuzzing::{self, Access, snapshot};
use mvm_vmm::status::Event;

use super::{BOTH, target, texts, told};
use crate::Target;

pub(super) const TARGETS: &[Target] = &[
    Target { most_mib: 64, ..target("elf", elf, elf_seeds, &["placed", "refused", "pvh"]) },
    Target { most_mib: 64, ..target("bzimage", bzimage, bzimage_seeds, &["placed", "refused"]) },
    target("cmdline", cmdline, cmdline_seeds, &["placed", "refused"]),
    target("snapshot_state", state, state_seeds, BOTH),
    target("control", control, control_seeds, &["requests", "replies", "refused"]),
    target("machine_config", config, config_seeds, BOTH),
    target("status", status, status_seeds, BOTH),
    target("bus", bus, bus_seeds, &["claimed", "unclaimed", "exits"]),
];

/// RAM of a guest whose kernel is loaded.
const RAM: u64 = 16 << 20;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(bytes).and_then(|()| file.rewind()).expect("room for it");
    file
}

fn place(kernel: &[u8], cmdline: &str, protocol: Protocol, image: Image) -> Result<Placed, boot::Error> {
    let memory = Memory::anonymous(&[(GuestAddress(0), RAM as usize)]).expect("memory");
    let kernel = file(kernel);
    let images = Images { kernel: &kernel, initrd: None, cmdline, protocol, image };
    boot::load(&memory, RAM, &images, &Platform { cpus: 1, serial: false })
}

fn loaded(reach: &mut Reach, placed: Result<Placed, boot::Error>) {
    match placed {
        Ok(Placed { entry, images }) => {
            assert!(images.iter().all(|span| span.start <= span.end && span.end <= RAM), "{images:?}");
            reach.add(if matches!(entry, Entry::Protected { .. }) { "pvh" } else { "placed" }, 1);
        }
        Err(error) => {
            let _ = (error.to_string(), error.hint());
            reach.add("refused", 1);
        }
    }
}

fn elf(bytes: &[u8], reach: &mut Reach) {
    let bytes = [&b"\x7fELF"[..], bytes.get(4..).unwrap_or_default()].concat();
    for (protocol, image) in [(Protocol::Linux64, Image::Map), (Protocol::Pvh, Image::Copy)] {
        loaded(reach, place(&bytes, "", protocol, image));
    }
}

/// A kernel of one segment at 1 MiB and a note with its entry.
fn small_elf(flags: u32) -> Vec<u8> {
    let mut file = vec![0u8; 0x3000];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1]);
    put(24, &0x10_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 2, 0]);
    let mut header = |at: usize, kind: u32, offset: u64, address: u64, bytes: u64| {
        put(at, &kind.to_le_bytes());
        put(at + 4, &flags.to_le_bytes());
        for (i, field) in [offset, address, address, bytes, bytes, 0x1000].iter().enumerate() {
            put(at + 8 + 8 * i, &field.to_le_bytes());
        }
    };
    header(64, 1, 0x1000, 0x10_0000, 0x2000);
    header(120, 4, 0x200, 0, 20);
    put(0x200, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(0x20c, b"Xen\0\0\0\x10\0");
    file
}

fn elf_seeds() -> Vec<Vec<u8>> {
    let change = |at: usize, bytes: &[u8]| {
        let mut file = small_elf(5);
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    vec![
        small_elf(5),
        small_elf(7),
        change(56, &0xffffu16.to_le_bytes()),
        change(64 + 24, &u64::MAX.to_le_bytes()),
        change(0x200, &[0xff; 8]),
        small_elf(5)[..100].to_vec(),
        vec![],
    ]
}

fn bzimage(bytes: &[u8], reach: &mut Reach) {
    loaded(reach, place(bytes, "", Protocol::Linux64, Image::Map));
}

fn bzimage_seeds() -> Vec<Vec<u8>> {
    let mut file = vec![0u8; 0x1400];
    file[0x1f1] = 4;
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    file[0x236] = 1;
    let mut far = file.clone();
    far[0x258..0x260].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut old = file.clone();
    old[0x206] = 0;
    let mut near = file.clone();
    near[0x258..0x260].copy_from_slice(&0x20_0000u64.to_le_bytes());
    vec![file, near, far, old, vec![0; 0x300]]
}

fn cmdline(bytes: &[u8], reach: &mut Reach) {
    let text = String::from_utf8_lossy(bytes);
    loaded(reach, place(&small_elf(7), &text, Protocol::Linux64, Image::Copy));
}

fn cmdline_seeds() -> Vec<Vec<u8>> {
    let mut all = texts(&["", "quiet pci=off 8250.nr_uarts=4", "a=\"b c\" d=", "\0", "=\u{a0}="]);
    all.extend([vec![b'x'; 2040], vec![b' '; 4096]]);
    all
}

fn state(bytes: &[u8], reach: &mut Reach) {
    told(reach, snapshot::sealed(bytes));
    let _ = snapshot::whole(bytes);
}

fn state_seeds() -> Vec<Vec<u8>> {
    let function = |name: &str| {
        let mut vm = PciDriver::new(load::named(name).device());
        vm.start(false);
        vm.function.pause().expect("there is a loop");
        vm.function.save().expect("it is at rest")
    };
    let whole = snapshot::state(vec![function("rng"), function("mem")]);
    let cut = whole[..whole.len() / 2].to_vec();
    vec![whole, snapshot::state(Vec::new()), cut, vec![]]
}

fn control(bytes: &[u8], reach: &mut Reach) {
    let request = serde_json::from_slice::<Request>(bytes);
    if let Ok(request) = &request {
        let text = serde_json::to_string(request).expect("a request can be written");
        assert_eq!(serde_json::from_str::<Request>(&text).ok().as_ref(), Some(request), "{text}");
        reach.add("requests", 1);
    }
    let reply = serde_json::from_slice::<Reply>(bytes);
    let answer = serde_json::from_slice::<Answer>(bytes);
    reach.add("replies", (reply.is_ok() || answer.is_ok()).into());
    reach.add("refused", (request.is_err() && reply.is_err() && answer.is_err()).into());
}

fn control_seeds() -> Vec<Vec<u8>> {
    texts(&[
        r#"{"command":"info"}"#,
        r#"{"command":"memory","size_mib":256}"#,
        r#"{"command":"balloon","target_mib":64}"#,
        r#"{"command":"attach","device":{"type":"block","disk":0,"read_only":true,"serial":"x"}}"#,
        r#"{"command":"attach","device":{"type":"net","tap":0,"mac":"52:54:00:00:00:01"}}"#,
        r#"{"command":"detach","device":"x","force":true}"#,
        r#"{"command":"snapshot","resume":false,"contents":"x","base":true}"#,
        r#"{"error":"no"}"#,
        r#"{"ok":{}}"#,
        r#"{"ok":{"device":3}}"#,
        r#"{"ok":{"target_mib":1,"actual_mib":2}}"#,
        "[[[[[[[[",
        "",
    ])
}

fn config(bytes: &[u8], reach: &mut Reach) {
    let config = serde_json::from_slice::<MachineConfig>(bytes);
    if let Ok(config) = &config {
        let text = serde_json::to_string(config).expect("a configuration can be written");
        assert_eq!(serde_json::from_str::<MachineConfig>(&text).ok().as_ref(), Some(config), "{text}");
        let _ = config.pluggable();
    }
    told(reach, config.is_ok());
}

fn config_seeds() -> Vec<Vec<u8>> {
    use mvm_vmm::config::{FdSlot, Restore, Start};
    let restore = Restore {
        state: FdSlot(5),
        memory: FdSlot(6),
        userfault: None,
        base: None,
        working_set: None,
        contents: "x".to_owned(),
    };
    let id = "one".parse().expect("an identifier");
    let mut config = MachineConfig::new(id, FdSlot(4), Start::Restore(restore));
    let mut all = vec![serde_json::to_vec(&config).expect("it can be written")];
    config.devices = [
        r#"{"type":"rng"}"#,
        r#"{"type":"mem","size_mib":128}"#,
        r#"{"type":"block","disk":9,"queues":2,"cache":"unsafe"}"#,
        r#"{"type":"vsock","guest_cid":3}"#,
        r#"{"type":"balloon","stats_interval":3}"#,
        r#"{"type":"console","output":4,"size":{"columns":80,"rows":25}}"#,
    ]
    .iter()
    .map(|text| serde_json::from_str(text).expect("a device"))
    .collect();
    all.push(serde_json::to_vec(&config).expect("it can be written"));
    all.extend(texts(&[r#"{"id":"../x","kvm":4}"#, r#"{"id":"a","kvm":4,"cpus":0,"start":{}}"#, "{}"]));
    all
}

fn status(bytes: &[u8], reach: &mut Reach) {
    for line in bytes.split(|byte| *byte == b'\n') {
        let event = serde_json::from_slice::<Event>(line);
        if let Ok(event) = &event {
            let text = serde_json::to_string(event).expect("an event can be written");
            assert!(serde_json::from_str::<Event>(&text).is_ok(), "{text}");
        }
        told(reach, event.is_ok());
    }
}

fn status_seeds() -> Vec<Vec<u8>> {
    let events = [Event::GuestFirstInstruction { ns: 7 }, Event::GuestMark { value: 3, ns: u64::MAX }];
    let lines: Vec<String> =
        events.iter().map(|event| serde_json::to_string(event).expect("an event")).collect();
    let mut all = texts(&[&lines.join("\n"), r#"{"event":"x"}"#, "", "null\n[]\n"]);
    all.extend(lines.into_iter().map(String::into_bytes));
    all
}

/// Twelve bytes each: how, how long, where, what.
fn bus(bytes: &[u8], reach: &mut Reach) {
    // Addresses are near what there is: ports, configuration space, the window for BARs.
    let base = |part: u8| {
        [0, 0xe800_0000, 0xe800_8000, 0xc000_0000, u64::MAX - 8, 0xffff_0000][usize::from(part % 6)]
    };
    let accesses = bytes.chunks_exact(12).take(400).map(|word| {
        let near = u16::from_le_bytes([word[2], word[3]]);
        let data = word[4..].try_into().expect("eight bytes");
        let len = usize::from(word[1] & 0xf);
        let port =
            [near, 0x3f8 + near % 8, 0x600 + near % 4, 0x505, 0x64, 0x3f0][usize::from(word[1] >> 4) % 6];
        let address = base(word[1] >> 4).wrapping_add(near.into());
        match word[0] % 4 {
            0 => Access::In(port, len),
            1 => Access::Out(port, data, len),
            2 => Access::Read(address, len),
            _ => Access::Write(address, data, len),
        }
    });
    let answered = fuzzing::accesses(accesses).expect("the only machine of this process");
    reach.add("claimed", answered.claimed);
    reach.add("unclaimed", answered.unclaimed);
    reach.add("exits", answered.exits);
}

fn bus_seeds() -> Vec<Vec<u8>> {
    let word = |how: u8, part_and_len: u8, near: u16, value: u64| {
        [&[how, part_and_len][..], &near.to_le_bytes(), &value.to_le_bytes()].concat()
    };
    let ends = [(0x64, 0xfe), (0x505, 1), (0x602, 1), (0x600, 0x34), (0x3f0, 1), (0x3f8, 65)];
    let mut all: Vec<Vec<u8>> = ends.iter().map(|(port, value)| word(1, 1, *port, *value)).collect();
    // The bus is looked through, a BAR is placed, its registers are read; then past every end.
    let walk = [
        word(2, 0x14, 0, 0),
        word(2, 0x24, 0, 0),
        word(3, 0x24, 0x10, 0xc000_0000),
        word(3, 0x22, 4, 6),
        word(2, 0x34, 0x14, 0),
        word(3, 0x31, 0x14, 1),
        word(2, 0x48, 9, 0),
        word(3, 0x58, 0xffff, 0),
        word(2, 0x1f, 0xffff, 0),
        word(0, 0x0f, 0xffff, 0),
    ];
    all.push(walk.concat());
    all
}
