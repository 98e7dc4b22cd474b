//! A way in for the fuzz targets: datagrams, message by message.

use super::message::{acknowledgement, split};
use super::{AddressEntry, LinkEntry, NeighbourEntry, RouteEntry, attributes, text};

/// How many entries of any kind the messages of a datagram can be read as.
pub(in crate::net) fn entries(mut bytes: &[u8]) -> usize {
    let mut found = 0;
    while let Some((header, payload, rest)) = split(bytes) {
        let entries = [
            LinkEntry::parse(payload).is_some(),
            AddressEntry::parse(payload).is_some(),
            NeighbourEntry::parse(payload).is_some(),
            RouteEntry::parse(payload).is_some(),
        ];
        found += entries.into_iter().filter(|is| *is).count();
        let _ = (acknowledgement(payload), header.kind, header.sequence);
        attributes(payload).for_each(|(_, value)| drop(text(value)));
        // Else it would have no end.
        assert!(rest.len() < bytes.len(), "a message takes room");
        bytes = rest;
    }
    found
}
