//! A way in for the fuzz targets: what a guest says on its control connection, in any order.

use mvm_protocol::{Decoder, GuestMessage, Token};

use super::state::Shared;

/// Requests that were made, and processes that were begun, before the guest speaks: 1 to so many.
const ASKED: u64 = 4;

/// Takes what a guest says, in pieces of so many bytes; how many messages were taken until it broke the protocol.
pub fn replies(bytes: &[u8], piece: usize) -> usize {
    let shared = Shared::default();
    for id in 1..=ASKED {
        // A guest that has said nothing has broken nothing.
        let begun = shared.begin_call(id, id == ASKED).and_then(|()| shared.begin_process(id));
        assert!(begun.is_ok(), "nothing is in the way");
    }
    shared.expect_streams(&[Token(1), Token(2)]);
    let (mut decoder, mut taken) = (Decoder::new(), 0);
    for piece in bytes.chunks(piece.max(1)) {
        decoder.push(piece);
        loop {
            match decoder.next_message::<GuestMessage>() {
                Ok(Some(message)) => match shared.take(message) {
                    Ok(()) => taken += 1,
                    Err(_) => return taken,
                },
                Ok(None) => break,
                Err(_) => return taken,
            }
        }
    }
    taken
}
