//! The guest's first message: whole, in time, and of a version that is understood.

use std::{
    io::{self, Read},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use mvm_protocol::{Decoder, GuestMessage, Hello, VERSION, decode};

use super::{
    error::{Error, Result},
    listener::io_error,
};

/// The hello, which must be whole within the time.
pub(super) fn read_hello(
    mut control: &UnixStream,
    decoder: &mut Decoder,
    timeout: Duration,
) -> Result<Hello> {
    let deadline = Instant::now() + timeout;
    let mut chunk = [0; 4096];
    loop {
        if let Some(payload) = decoder.next_payload()? {
            let guest = Hello::version_in(payload).ok_or(Error::NotHello)?;
            if guest.major != VERSION.major {
                return Err(Error::Version { guest, host: VERSION });
            }
            return match decode(payload)? {
                GuestMessage::Hello(hello) => Ok(hello),
                _ => Err(Error::NotHello),
            };
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::Deadline { what: "say hello" });
        }
        control.set_read_timeout(Some(left)).map_err(io_error("cannot set a timeout"))?;
        match control.read(&mut chunk) {
            Ok(0) => return Err(Error::Lost { reason: "it was closed before the hello".to_owned() }),
            Ok(count) => decoder.push(chunk.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io_error("cannot read the agent's hello")(error)),
        }
    }
}
