//! What drivers ask of each kind of device: the forms that requests have, with any numbers in them.

/// A chain to post.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// The queue it is for.
    pub queue: u16,
    /// What the device reads.
    pub readable: Vec<Vec<u8>>,
    /// How much it may write.
    pub writable: Vec<u32>,
}

impl Request {
    fn read(queue: u16, readable: impl Into<Vec<Vec<u8>>>, writable: impl Into<Vec<u32>>) -> Self {
        Self { queue, readable: readable.into(), writable: writable.into() }
    }
}

/// A request of `kind`: `variety` says which, `value` what varies in it.
pub fn request(kind: &str, variety: u8, value: u32) -> Request {
    match kind {
        "block" => block(variety, value),
        "console" => console(variety, value),
        "net" => net(variety, value),
        "rng" => Request::read(0, [], [[32, 0, 1, value % 70_000][usize::from(variety % 4)]]),
        "balloon" => balloon(variety, value),
        "mem" => mem(variety, value),
        "vsock" => vsock(variety, value),
        _ => {
            let bytes = vec![variety; (value % 5000) as usize];
            Request::read(u16::from(variety & 1), [bytes], [value >> 16 & 0xfff])
        }
    }
}

/// Sectors a tested disk has.
const SECTORS: u32 = 1024;

fn block(variety: u8, value: u32) -> Request {
    let header = |kind: u32, sector: u64| [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    let sector = u64::from(value % SECTORS);
    let count = value >> 16 & 7;
    let segment = [&sector.to_le_bytes()[..], &count.to_le_bytes(), &[0; 4]].concat();
    match variety % 10 {
        0 => Request::read(0, [header(1, sector), vec![variety; 512]], [1]),
        1 => Request::read(0, [header(0, sector)], [512 * (count + 1), 1]),
        2 => Request::read(0, [header(4, 0)], [1]),
        3 => Request::read(0, [header(8, 0)], [value % 40, 1]),
        4 => Request::read(0, [header(11, 0), segment], [1]),
        5 => Request::read(0, [header(13, 0), segment], [1]),
        6 => Request::read(0, [header(value, 0), segment], [512, 1]),
        7 => Request::read(0, [header(0, u64::from(value) << 24)], [512, 1]),
        8 => Request::read(0, [header(1, u64::from(SECTORS - 1)), vec![9; 512 * count as usize]], [1]),
        _ => Request::read(0, [header(1, sector), vec![1; (value % 1030) as usize]], [value % 3]),
    }
}

fn console(variety: u8, value: u32) -> Request {
    match variety % 3 {
        0 => Request::read(1, [vec![b'o'; (value % 9000) as usize]], []),
        1 => Request::read(0, [], [value % 5000]),
        _ => Request::read(0, [vec![1; (value % 5) as usize]], [64]),
    }
}

fn net(variety: u8, value: u32) -> Request {
    let [a, b, c, d] = value.to_le_bytes();
    let plain = [0; 12];
    match variety % 6 {
        0 => Request::read(1, [plain.to_vec(), vec![0xaa; 60]], []),
        1 => Request::read(0, [], [1526]),
        2 => Request::read(0, [], [value % 200, value >> 16 & 0xfff]),
        3 => Request::read(1, [plain.to_vec(), vec![0xbb; (value % 70_000) as usize]], []),
        // flags, type, header length, segment size, where the checksum begins and lies
        4 => {
            let header = vec![a & 3, b, c, 0, d, 4, a, 0, 16, 0, 0, 0];
            Request::read(1, [header, vec![0xcc; 3000]], [])
        }
        _ => Request::read(1, [vec![a; (value % 30) as usize]], [value % 3]),
    }
}

/// First of the pages that a balloon is given.
const PAGE: u32 = 0x40_0000 / 4096;

fn balloon(variety: u8, value: u32) -> Request {
    let page = if variety & 0x40 == 0 { PAGE + value % 512 } else { value };
    let count = u32::from(variety >> 3 & 7) + 1;
    let pages: Vec<u8> = (0..count).flat_map(|n| page.wrapping_add(n).to_le_bytes()).collect();
    match variety % 8 {
        0 | 1 => Request::read(0, [pages], []),
        2 => Request::read(1, [pages], []),
        3 | 4 => {
            let tag = |tag: u16| [&tag.to_le_bytes()[..], &u64::from(value).to_le_bytes()].concat();
            let tags: Vec<u8> = (0..value as u16 % 20).flat_map(tag).collect();
            Request::read(2, [tags], [])
        }
        5 => Request::read(3, [], [4096 * (1 + value % 4)]),
        6 => Request::read(3, [], [value % 10_000]),
        _ => Request::read(u16::from(variety >> 4 & 3), [vec![1; (value % 3000) as usize]], [value % 2]),
    }
}

fn mem(variety: u8, value: u32) -> Request {
    let block = u64::from(value % 512);
    let address = if variety & 0x40 == 0 { (1 << 32) + (block << 21) } else { u64::from(value) << 16 };
    let count = (value >> 16) as u16 % 8 + 1;
    let kind = u16::from(variety % 5);
    let request = [&kind.to_le_bytes()[..], &[0; 6], &address.to_le_bytes(), &count.to_le_bytes(), &[0; 6]];
    Request::read(0, [request.concat()], [if variety & 0x80 == 0 { 10 } else { value % 12 }])
}

fn vsock(variety: u8, value: u32) -> Request {
    match variety % 16 {
        12 | 13 => return Request::read(0, [], [4096]),
        14 => return Request::read(0, [], [value % 100]),
        15 => return Request::read(2, [], [8]),
        _ => {}
    }
    let op = u16::from(variety % 12);
    // Ports are few, so that packets meet connections.
    let (from, to) = (1000 + value % 4, 1024 + (value >> 2) % 2);
    let len = if op == 5 { value >> 4 & 0xfff } else { 0 };
    let (credit, forwarded) = (value | 1 << 12, value >> 20);
    let guest = if variety >> 4 & 3 == 2 { 4u64 } else { 3 };
    let lies = u32::from(variety >> 4 & 3 == 3);
    let header = [
        &guest.to_le_bytes()[..],
        &2u64.to_le_bytes(),
        &from.to_le_bytes(),
        &to.to_le_bytes(),
        &(len + lies * 7).to_le_bytes(),
        &(if variety >> 6 == 3 { 2u16 } else { 1 }).to_le_bytes(),
        &op.to_le_bytes(),
        &(value >> 8 & 3).to_le_bytes(),
        &credit.to_le_bytes(),
        &forwarded.to_le_bytes(),
    ];
    Request::read(1, [header.concat(), vec![0x77; len as usize]], [])
}
