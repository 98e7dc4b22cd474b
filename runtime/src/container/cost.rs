//! What a machine costs its host in memory.

use std::fs;
use std::io;

/// Host memory of one machine's process, in KiB. Pages of files (kernel image, agent, programs) are there once
/// for all machines and count by this one's share, as the kernel's proportional set size does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Guest memory that belongs to this machine: anonymous pages, and pages of files it has written to.
    pub guest_private_kib: u64,
    /// Its share of guest memory that is clean pages of files.
    pub guest_shared_kib: u64,
    /// Everything else of the process: the VMM.
    pub vmm_kib: u64,
}

impl Cost {
    /// Reads the costs of the machine with process `pid` and `memory_bytes` of RAM.
    ///
    /// # Errors
    /// The process is gone, or not ours to look at.
    pub fn of(pid: i32, memory_bytes: u64) -> io::Result<Self> {
        Ok(Self::sum(&fs::read_to_string(format!("/proc/{pid}/smaps"))?, memory_bytes))
    }

    /// All of it.
    pub fn total_kib(&self) -> u64 {
        self.guest_private_kib.saturating_add(self.guest_shared_kib).saturating_add(self.vmm_kib)
    }

    pub(crate) fn sum(smaps: &str, memory_bytes: u64) -> Self {
        let mappings = mappings(smaps);
        let guest = guest_range(&mappings, memory_bytes);
        let mut cost = Self::default();
        let add = |sum: &mut u64, kib| *sum = sum.saturating_add(kib);
        for mapping in &mappings {
            if guest.is_some_and(|(start, end)| start <= mapping.start && mapping.end <= end) {
                add(&mut cost.guest_private_kib, mapping.anonymous);
                add(&mut cost.guest_shared_kib, mapping.pss.saturating_sub(mapping.anonymous));
            } else {
                add(&mut cost.vmm_kib, mapping.pss);
            }
        }
        cost
    }
}

#[derive(Debug, Default)]
struct Mapping {
    start: u64,
    end: u64,
    pss: u64,
    anonymous: u64,
}

fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut all: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(first), second) = (words.next(), words.next()) else { continue };
        let kib = second.and_then(|word| word.parse::<u64>().ok());
        match (first, kib, all.last_mut()) {
            ("Pss:", Some(kib), Some(mapping)) => mapping.pss = kib,
            ("Anonymous:", Some(kib), Some(mapping)) => mapping.anonymous = kib,
            _ => {
                if let Some((start, end)) = first.split_once('-')
                    && let (Ok(start), Ok(end)) =
                        (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
                {
                    all.push(Mapping { start, end, ..Default::default() });
                }
            }
        }
    }
    all
}

/// Guest memory is the run of adjacent mappings that is as long as it: kernel and initial RAM disk are
/// mapped into the middle of it and split it.
fn guest_range(mappings: &[Mapping], memory_bytes: u64) -> Option<(u64, u64)> {
    let mut run: Option<(u64, u64)> = None;
    let mut best: Option<(u64, u64)> = None;
    for mapping in mappings {
        run = match run {
            Some((start, end)) if end == mapping.start => Some((start, mapping.end)),
            _ => Some((mapping.start, mapping.end)),
        };
        if let Some((start, end)) = run
            && end.saturating_sub(start) >= memory_bytes.min(1 << 30)
        {
            best = Some((start, end));
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
400000-500000 r-xp 00000000 00:00 1 /usr/bin/mvm-vmm
Pss:                 300 kB
Anonymous:             0 kB
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
Pss:                1000 kB
Anonymous:          1000 kB
7f0000100000-7f0000200000 rw-p 00000000 00:00 7 /share/vmlinux
Pss:                 600 kB
Anonymous:           200 kB
7f0000200000-7f0000400000 rw-p 00000000 00:00 0
Pss:                  50 kB
Anonymous:            50 kB
7fff00000000-7fff00010000 rw-p 00000000 00:00 0 [stack]
Pss:                  12 kB
Anonymous:            12 kB
";

    #[test]
    fn guest_memory_is_told_apart_from_the_vmm_and_shared_from_private() {
        let cost = Cost::sum(SMAPS, 4 << 20);
        assert_eq!(cost, Cost { guest_private_kib: 1250, guest_shared_kib: 400, vmm_kib: 312 });
        assert_eq!(cost.total_kib(), 1962);
    }

    #[test]
    fn numbers_that_cannot_be_are_as_much_as_there_can_be() {
        let text = "2000-1000 rw-p\nPss: 18446744073709551615 kB\n3000-2000 r--p\nPss: 9 kB\n";
        assert_eq!(Cost::sum(text, 4096), Cost { vmm_kib: u64::MAX, ..Cost::default() });
        let text =
            "1000-2000 rw-p\nPss: 9 kB\nAnonymous: 18446744073709551615 kB\n2000-3000 rw-p\nPss: 9 kB\n";
        assert_eq!(Cost::sum(text, 4096).total_kib(), u64::MAX);
    }
}
