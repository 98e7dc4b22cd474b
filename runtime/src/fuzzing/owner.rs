//! A way in for the fuzz targets: what is said between a container's owner and those who ask.

use mvm_protocol::Decoder;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::owner::wire::{Reply, Request};

fn read<T: DeserializeOwned + Serialize>(bytes: &[u8]) -> bool {
    let mut decoder = Decoder::new();
    decoder.push(bytes);
    let mut any = false;
    while let Ok(Some(message)) = decoder.next_message::<T>() {
        any |= mvm_protocol::encode(&message).is_ok();
    }
    any
}

/// Requests, and replies.
pub fn frames(bytes: &[u8]) -> (bool, bool) {
    (read::<Request>(bytes), read::<Reply>(bytes))
}
