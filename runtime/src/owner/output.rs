//! What a process writes, read to its end: one that a child or a guest keeps a stream open for comes all the same.

use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long the guest may keep a reader waiting after the process's end, in all. What the process wrote was on its
/// way before: this is for a host that is slow.
const WAIT: Duration = Duration::from_secs(10);
/// Most bytes read after the process's end. The pipe, vsock and socket buffers on the way hold less than one MiB.
const BYTES: usize = 4 << 20;

/// The outputs of one process.
#[derive(Debug)]
pub struct Outputs {
    ended: Arc<PipeReader>,
    /// What waits for an output learns of the process's end when this is closed.
    _alive: PipeWriter,
    after: Left,
}

/// One output of a process. It ends with its stream, or soon after the process.
#[derive(Debug)]
pub struct Output {
    stream: UnixStream,
    ended: Arc<PipeReader>,
    after: Left,
    /// What may still come once the process has ended.
    left: Option<Left>,
}

#[derive(Clone, Copy, Debug)]
struct Left {
    wait: Duration,
    bytes: usize,
}

impl Outputs {
    /// Those of a process that runs.
    ///
    /// # Errors
    /// The host's reason.
    pub fn new() -> io::Result<Self> {
        Self::with(Left { wait: WAIT, bytes: BYTES })
    }

    fn with(after: Left) -> io::Result<Self> {
        let (ended, alive) = io::pipe()?;
        Ok(Self { ended: Arc::new(ended), _alive: alive, after })
    }

    /// The output that comes by `stream`.
    pub fn take(&self, stream: UnixStream) -> Output {
        Output { stream, ended: Arc::clone(&self.ended), after: self.after, left: None }
    }

    /// The process has ended: its outputs do so when what is on its way has come.
    pub fn process_ended(self) {}
}

impl Output {
    /// Waits until the stream has something, or the process has ended.
    fn wait(&mut self) -> io::Result<()> {
        let files = [self.stream.as_fd(), self.ended.as_fd()];
        let mut files = files.map(|file| PollFd::new(file, PollFlags::POLLIN));
        ready(&mut files, PollTimeout::NONE)?;
        if files[1].any() == Some(true) {
            self.left = Some(self.after);
        }
        Ok(())
    }
}

impl Read for Output {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.left.is_none() {
            self.wait()?;
        }
        let Some(left) = &mut self.left else { return self.stream.read(bytes) };
        let begun = Instant::now();
        let timeout = PollTimeout::try_from(left.wait).unwrap_or(PollTimeout::MAX);
        let there = ready(&mut [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)], timeout)?;
        left.wait = left.wait.saturating_sub(begun.elapsed());
        let most = bytes.len().min(left.bytes);
        match bytes.get_mut(..most) {
            Some(bytes) if there => {
                let count = self.stream.read(bytes)?;
                left.bytes = left.bytes.saturating_sub(count);
                Ok(count)
            }
            _ => Ok(0),
        }
    }
}

/// Whether one of `files` is ready.
///
/// # Errors
/// The host's reason; a signal is one, and readers try again.
fn ready(files: &mut [PollFd<'_>], timeout: PollTimeout) -> io::Result<bool> {
    Ok(poll(files, timeout).map(|count| count > 0)?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::thread;

    use super::*;

    const AT_ONCE: Left = Left { wait: Duration::from_millis(50), bytes: 1000 };

    fn output(after: Left) -> (Outputs, Output, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        let outputs = Outputs::with(after).unwrap();
        let output = outputs.take(near);
        (outputs, output, far)
    }

    #[test]
    fn what_a_process_wrote_is_read_whole_after_its_end() {
        let (outputs, mut output, mut far) = output(Left { wait: WAIT, bytes: BYTES });
        far.write_all(b"all of it").unwrap();
        outputs.process_ended();
        drop(far);
        assert_eq!(io::read_to_string(&mut output).unwrap(), "all of it");
    }

    #[test]
    fn a_stream_that_a_child_keeps_open_ends_soon_after_the_process() {
        let (outputs, mut output, mut far) = output(AT_ONCE);
        let reader = thread::spawn(move || io::read_to_string(&mut output));
        far.write_all(b"last words").unwrap();
        outputs.process_ended();
        assert_eq!(reader.join().unwrap().unwrap(), "last words");
        drop(far);
    }

    #[test]
    fn a_guest_that_never_stops_writing_is_not_read_for_ever() {
        let (outputs, mut output, mut far) = output(AT_ONCE);
        let writer = thread::spawn(move || while far.write_all(&[b'x'; 100]).is_ok() {});
        outputs.process_ended();
        let mut all = Vec::new();
        output.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), AT_ONCE.bytes);
        drop(output);
        writer.join().unwrap();
    }

    #[test]
    fn nobody_is_hurried_while_the_process_runs() {
        let (outputs, mut output, mut far) = output(Left { wait: Duration::ZERO, bytes: 0 });
        let writer = thread::spawn(move || far.write_all(b"x").map(|()| far).unwrap());
        assert_eq!(output.read(&mut [0; 8]).unwrap(), 1);
        outputs.process_ended();
        assert_eq!(output.read(&mut [0; 8]).unwrap(), 0);
        drop(writer.join());
    }
}
