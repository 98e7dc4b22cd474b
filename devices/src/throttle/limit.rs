//! Limits as people write them: `disk-read=10M:40M`, `net-send=500ops`, `disk-write=none`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Least and most bytes per second: less would make one request of a disk take hours.
const BYTES: (u64, u64) = (64 << 10, 1 << 40);
/// Least and most operations per second.
const OPERATIONS: (u64, u64) = (1, 100_000_000);
/// What is written behind a number of operations.
const OPS: &str = "ops";

/// A kind of traffic. All disks of a machine are one, and all its cards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// From disks to the guest.
    DiskRead,
    /// From the guest to disks.
    DiskWrite,
    /// From the guest to the network.
    NetSend,
    /// From the network to the guest.
    NetReceive,
}

impl What {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::DiskRead, Self::DiskWrite, Self::NetSend, Self::NetReceive];

    /// Its name in limits.
    pub fn name(self) -> &'static str {
        match self {
            Self::DiskRead => "disk-read",
            Self::DiskWrite => "disk-write",
            Self::NetSend => "net-send",
            Self::NetReceive => "net-receive",
        }
    }
}

/// How much of something there may be per second, and at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    per_second: u64,
    burst: u64,
}

impl Rate {
    /// `None` if either is 0.
    pub fn new(per_second: u64, burst: u64) -> Option<Self> {
        (per_second > 0 && burst > 0).then_some(Self { per_second, burst })
    }

    /// Units per second in the long run.
    pub fn per_second(self) -> u64 {
        self.per_second
    }

    /// Units that may come at once after a time without any.
    pub fn burst(self) -> u64 {
        self.burst
    }
}

/// What a kind of traffic is held to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Nothing.
    None,
    /// Bytes.
    Bytes(Rate),
    /// Requests of a disk, frames of a card.
    Operations(Rate),
}

/// One limit. A kind of traffic may have one in bytes and one in operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Limit {
    /// Of what.
    pub what: What,
    /// To what.
    pub bound: Bound,
}

/// Text that is no limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotALimit {
    /// It has another form.
    #[error(
        "{0:?} is not a limit: WHAT=RATE[:BURST] with WHAT disk-read, disk-write, net-send or net-receive and RATE such as 10M \
         (bytes per second), 500ops or none"
    )]
    Form(String),
    /// The number is not one that can be kept.
    #[error("{0:?} is out of range: from 64K to 1T bytes, or from 1ops to 100000000ops")]
    Range(String),
}

impl FromStr for Limit {
    type Err = NotALimit;

    fn from_str(text: &str) -> Result<Self, NotALimit> {
        let wrong = || NotALimit::Form(text.to_owned());
        let (what, bound) = text.split_once('=').ok_or_else(wrong)?;
        let what = What::ALL.into_iter().find(|kind| kind.name() == what).ok_or_else(wrong)?;
        if bound == "none" {
            return Ok(Self { what, bound: Bound::None });
        }
        let (rate, burst) = match bound.split_once(':') {
            Some((rate, burst)) => (rate, burst),
            None => (bound, bound), // a second's worth
        };
        let operations = rate.ends_with(OPS);
        let amount = |text: &str| {
            let number = if operations { count(text) } else { bytes(text) };
            number.ok_or_else(wrong)
        };
        let (rate, burst) = (amount(rate)?, amount(burst)?);
        let (least, most) = if operations { OPERATIONS } else { BYTES };
        let kept = (least..=most).contains(&rate) && burst <= most;
        let rate =
            Rate::new(rate, burst).filter(|_| kept).ok_or_else(|| NotALimit::Range(bound.to_owned()))?;
        let bound = if operations { Bound::Operations(rate) } else { Bound::Bytes(rate) };
        Ok(Self { what, bound })
    }
}

/// `500ops`.
fn count(text: &str) -> Option<u64> {
    digits(text.strip_suffix(OPS)?)
}

/// `65536`, `64K`, `10M`, `2G`, `1T`.
fn bytes(text: &str) -> Option<u64> {
    let (number, shift) = match text.as_bytes().split_last()? {
        (b'K', _) => (text.strip_suffix('K')?, 10),
        (b'M', _) => (text.strip_suffix('M')?, 20),
        (b'G', _) => (text.strip_suffix('G')?, 30),
        (b'T', _) => (text.strip_suffix('T')?, 40),
        _ => (text, 0),
    };
    digits(number)?.checked_mul(1u64.checked_shl(shift)?)
}

/// A number without a sign.
fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = self.what.name();
        match self.bound {
            Bound::None => write!(f, "{what}=none"),
            Bound::Bytes(rate) => write!(f, "{what}={}:{}", Bytes(rate.per_second), Bytes(rate.burst)),
            Bound::Operations(rate) => write!(f, "{what}={}{OPS}:{}{OPS}", rate.per_second, rate.burst),
        }
    }
}

/// Bytes in the largest unit that divides them.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0.trailing_zeros() >= shift && self.0 > 0 {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl TryFrom<String> for Limit {
    type Error = NotALimit;

    fn try_from(text: String) -> Result<Self, NotALimit> {
        text.parse()
    }
}

impl From<Limit> for String {
    fn from(limit: Limit) -> Self {
        limit.to_string()
    }
}
