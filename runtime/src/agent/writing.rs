//! Writing to a guest that may read slowly, or not at all.

use std::io::{self, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Bytes of one write. The kernel applies a socket's timeout to each buffer it fills, and this is one.
const PIECE: usize = 16 * 1024;

/// Writes all of `bytes` within `time`: taking a few of them now and then gains a guest nothing.
///
/// # Errors
/// `TimedOut`, or the host's reason. What follows a frame that is not whole cannot be understood.
pub(super) fn write_within(mut stream: &UnixStream, bytes: &[u8], time: Duration) -> io::Result<()> {
    let deadline = Instant::now() + time;
    let mut rest = bytes;
    while !rest.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_write_timeout(Some(left))?;
        match stream.write(rest.get(..PIECE).unwrap_or(rest)) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::thread;

    use super::*;

    #[test]
    fn a_guest_that_reads_a_little_now_and_then_does_not_put_the_deadline_off() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let reader = thread::spawn(move || {
            let mut bytes = [0; 4096];
            // Slowness is what is played here: at this rate all of it would take a minute.
            while matches!(guest.read(&mut bytes), Ok(1..)) {
                thread::sleep(Duration::from_millis(60));
            }
        });
        let begun = Instant::now();
        let result = write_within(&host, &vec![0; 4 << 20], Duration::from_millis(200));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::TimedOut);
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        host.shutdown(std::net::Shutdown::Both).unwrap();
        drop(reader);
    }

    #[test]
    fn a_guest_that_reads_gets_everything() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let sent: Vec<u8> = (0..1u32 << 20).flat_map(|n| n.to_le_bytes().into_iter().take(1)).collect();
        let reader = thread::spawn(move || {
            let mut bytes = Vec::new();
            guest.read_to_end(&mut bytes).unwrap();
            bytes
        });
        write_within(&host, &sent, Duration::from_secs(60)).unwrap();
        drop(host);
        assert!(reader.join().unwrap() == sent);
    }
}
