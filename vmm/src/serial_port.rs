//! The machine's serial port: the device, and the files it writes to and is fed from.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use mvm_devices::counter::Counter;
use mvm_devices::serial::Serial;
use nix::sys::stat::{SFlag, fstat};

use crate::config::{self, MAX_SERIAL_BYTES};
use crate::error::{Error, Result};
use crate::fds::Slots;
use crate::machine::set_nonblocking;

/// The last that a full file gets.
const FULL: &[u8] = b"\n[mvm: the file is full; further serial output is dropped]\n";

/// A serial port on the machine's bus.
#[derive(Debug)]
pub(crate) struct SerialPort {
    /// The device. vCPUs hold it while they write to the file, which may be slow.
    pub port: Mutex<Serial>,
    /// Bytes of output that were lost.
    pub dropped: Arc<Counter>,
}

/// The port that `spec` describes, and what it is fed from.
pub(crate) fn build(spec: &config::Serial, slots: &mut Slots) -> Result<(SerialPort, Option<File>)> {
    let output = slots.take_for(spec.output, "serial output")?;
    let input = slots.take_optional(spec.input, "serial input")?;
    for fd in [Some(&output), input.as_ref()].into_iter().flatten() {
        set_nonblocking(fd)?;
    }
    let kind = fstat(output.as_fd()).map_err(Error::system("look at the serial output"))?.st_mode;
    let file = File::from(output);
    let sink: Box<dyn Write + Send> = if SFlag::from_bits_truncate(kind) & SFlag::S_IFMT == SFlag::S_IFREG {
        Box::new(Capped { file, left: MAX_SERIAL_BYTES })
    } else {
        Box::new(file)
    };
    let serial = Serial::new(sink);
    let dropped = Arc::clone(serial.dropped());
    Ok((SerialPort { port: Mutex::new(serial), dropped }, input.map(File::from)))
}

/// A regular file that a guest must not fill the host's disk with.
#[derive(Debug)]
struct Capped {
    file: File,
    /// Bytes it still takes.
    left: u64,
}

impl Write for Capped {
    /// Takes nothing once the file is full.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = usize::try_from(self.left).unwrap_or(usize::MAX);
        if room == 0 {
            return Ok(0);
        }
        let written = self.file.write(bytes.get(..room).unwrap_or(bytes))?;
        self.left = self.left.saturating_sub(written as u64);
        if self.left == 0 {
            log::warn!("serial output has reached {MAX_SERIAL_BYTES} bytes: the rest is dropped");
            // Best effort: the count of dropped bytes says it as well.
            let _ = self.file.write(FULL);
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn a_full_file_says_so_once_and_takes_no_more() {
        let mut read = tempfile::tempfile().unwrap();
        let mut capped = Capped { file: read.try_clone().unwrap(), left: 5 };
        assert_eq!(capped.write(b"abc").unwrap(), 3);
        assert_eq!(capped.write(b"defg").unwrap(), 2);
        assert_eq!(capped.write(b"h").unwrap(), 0);
        let mut text = Vec::new();
        read.rewind().unwrap();
        read.read_to_end(&mut text).unwrap();
        assert_eq!(text, [b"abcde", FULL].concat());
    }
}
