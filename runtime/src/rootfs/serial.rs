//! Names by which a guest finds a container's disks.

use sha2::{Digest as _, Sha256};

use crate::hex::hex;

/// Gives out virtio serials: at most 20 bytes (virtio 1.2 §5.2.6.1), made from the container's id so that those of
/// two containers differ.
pub(super) struct Serials {
    prefix: String,
    next: usize,
}

impl Serials {
    pub(super) fn of(container: &str) -> Self {
        let hash = Sha256::digest(container.as_bytes());
        Self { prefix: hex(hash.iter().take(7)), next: 0 }
    }

    pub(super) fn next(&mut self) -> String {
        self.next += 1;
        format!("{}-{}", self.prefix, self.next)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn serials_fit_and_differ() {
        let mut seen = HashSet::new();
        for container in ["a", "b", &"long".repeat(100)] {
            let mut serials = Serials::of(container);
            for _ in 0..130 {
                let serial = serials.next();
                assert!(serial.len() <= 20, "{serial}");
                assert!(seen.insert(serial));
            }
        }
    }
}
