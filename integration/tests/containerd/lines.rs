//! The output of several runs side by side: whole lines, each with its run's name before it.

use std::io::{Result, Write};

/// Passes lines on to `to`; what has no end yet waits for it, and goes with the writer.
pub(crate) struct Lines<'a, W: Write> {
    name: &'a str,
    line: Vec<u8>,
    to: W,
}

impl<'a, W: Write> Lines<'a, W> {
    /// Lines of `name`.
    pub(crate) fn new(name: &'a str, to: W) -> Self {
        Self { name, line: Vec::new(), to }
    }

    fn pass(&mut self) -> Result<()> {
        // One write for each line: those of another run do not come in between.
        let mut line = self.name.as_bytes().to_vec();
        line.append(&mut self.line);
        self.to.write_all(&line)
    }
}

impl<W: Write> Write for Lines<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend(part);
            if part.ends_with(b"\n") {
                self.pass()?;
            }
        }
        self.to.flush()?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        self.to.flush()
    }
}

impl<W: Write> Drop for Lines<'_, W> {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            self.line.push(b'\n');
            // There is nobody to tell.
            let _ = self.pass();
        }
    }
}
