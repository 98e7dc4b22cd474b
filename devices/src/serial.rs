//! A 16550A serial port without an interrupt: the driver polls it.
//!
//! For kernel messages and rescue shells; each character costs exits, so machines have it only on request.
//! Output never blocks and never grows: what the sink does not take, or exceeds the rate, is dropped and counted.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::counter::Counter;

/// Bytes that may be written in one burst.
pub const BURST: u32 = 64 * 1024;
/// Bytes per second beyond the burst.
pub const RATE: u32 = 64 * 1024;
/// Bytes of input that wait for the guest.
pub const INPUT_SIZE: usize = 64;

// Registers, as offsets; 0 and 1 are the divisor while LCR's DLAB is set.
const DATA: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
const INTERRUPT_ID: u8 = 2; // FIFO control when written
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u8 = 5;
const MODEM_STATUS: u8 = 6;
const SCRATCH: u8 = 7;

const IER_RECEIVED: u8 = 1 << 0;
const IER_EMPTY: u8 = 1 << 1;
const IIR_NONE: u8 = 1;
const IIR_EMPTY: u8 = 2;
const IIR_RECEIVED: u8 = 4;
const IIR_FIFO: u8 = 0xc0;
const LCR_DLAB: u8 = 1 << 7;
const MCR_LOOP: u8 = 1 << 4;
const LSR_RECEIVED: u8 = 1 << 0;
const LSR_IDLE: u8 = 0x60; // holding register and transmitter empty
const MSR_CONNECTED: u8 = 0xb0; // carrier, data set ready, clear to send

/// The port.
pub struct Serial {
    sink: Box<dyn Write + Send>,
    bucket: Bucket,
    dropped: Arc<Counter>,
    input: VecDeque<u8>,
    divisor: [u8; 2],
    interrupt_enable: u8,
    fifo: bool,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    empty_pending: bool,
}

/// Everything that its driver and its sink cannot tell again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Input that waits for the guest, at most [`INPUT_SIZE`] bytes.
    input: Vec<u8>,
    divisor: [u8; 2],
    interrupt_enable: u8,
    fifo: bool,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    empty_pending: bool,
}

impl Serial {
    /// A port that writes to `sink`, which should not block.
    pub fn new(sink: Box<dyn Write + Send>) -> Self {
        Self {
            sink,
            bucket: Bucket::full(Instant::now()),
            dropped: Counter::new("dropped"),
            input: VecDeque::with_capacity(INPUT_SIZE),
            divisor: [1, 0],
            interrupt_enable: 0,
            fifo: false,
            line_control: 3,
            modem_control: 0,
            scratch: 0,
            empty_pending: false,
        }
    }

    /// The port as it is now.
    pub fn state(&self) -> State {
        State {
            input: self.input.iter().copied().collect(),
            divisor: self.divisor,
            interrupt_enable: self.interrupt_enable,
            fifo: self.fifo,
            line_control: self.line_control,
            modem_control: self.modem_control,
            scratch: self.scratch,
            empty_pending: self.empty_pending,
        }
    }

    /// Takes over `state`, as if its driver had written it. Input that does not fit is lost.
    pub fn restore(&mut self, state: &State) {
        self.input.clear();
        self.push_input(&state.input);
        self.divisor = state.divisor;
        self.interrupt_enable = state.interrupt_enable & 0xf;
        self.fifo = state.fifo;
        self.line_control = state.line_control;
        self.modem_control = state.modem_control & 0x1f;
        self.scratch = state.scratch;
        self.empty_pending = state.empty_pending;
    }

    /// Bytes of output that were lost.
    pub fn dropped(&self) -> &Arc<Counter> {
        &self.dropped
    }

    /// Offers input. Returns how many bytes were taken.
    pub fn push_input(&mut self, bytes: &[u8]) -> usize {
        let room = INPUT_SIZE.saturating_sub(self.input.len());
        let taken = bytes.len().min(room);
        self.input.extend(bytes.iter().take(taken));
        taken
    }

    /// Reads register `register` (0 to 7).
    pub fn read(&mut self, register: u8) -> u8 {
        match register {
            DATA if self.divisor_latch() => self.divisor[0],
            DATA => self.input.pop_front().unwrap_or(0),
            INTERRUPT_ENABLE if self.divisor_latch() => self.divisor[1],
            INTERRUPT_ENABLE => self.interrupt_enable,
            INTERRUPT_ID => self.interrupt_id(),
            LINE_CONTROL => self.line_control,
            MODEM_CONTROL => self.modem_control,
            LINE_STATUS if self.input.is_empty() => LSR_IDLE,
            LINE_STATUS => LSR_IDLE | LSR_RECEIVED,
            MODEM_STATUS => self.modem_status(),
            SCRATCH => self.scratch,
            _ => 0xff,
        }
    }

    /// Writes register `register` (0 to 7).
    pub fn write(&mut self, register: u8, value: u8) {
        match register {
            DATA if self.divisor_latch() => self.divisor[0] = value,
            DATA => self.transmit(value),
            INTERRUPT_ENABLE if self.divisor_latch() => self.divisor[1] = value,
            INTERRUPT_ENABLE => {
                self.empty_pending |= value & !self.interrupt_enable & IER_EMPTY != 0;
                self.interrupt_enable = value & 0xf;
            }
            INTERRUPT_ID => self.fifo = value & 1 != 0,
            LINE_CONTROL => self.line_control = value,
            MODEM_CONTROL => self.modem_control = value & 0x1f,
            SCRATCH => self.scratch = value,
            _ => {}
        }
    }

    fn divisor_latch(&self) -> bool {
        self.line_control & LCR_DLAB != 0
    }

    fn interrupt_id(&mut self) -> u8 {
        let fifo = if self.fifo { IIR_FIFO } else { 0 };
        if self.interrupt_enable & IER_RECEIVED != 0 && !self.input.is_empty() {
            fifo | IIR_RECEIVED
        } else if self.interrupt_enable & IER_EMPTY != 0 && self.empty_pending {
            self.empty_pending = false;
            fifo | IIR_EMPTY
        } else {
            fifo | IIR_NONE
        }
    }

    /// In loopback the modem's inputs are its outputs: RTS, DTR, OUT1, OUT2 read as CTS, DSR, RI, DCD.
    fn modem_status(&self) -> u8 {
        if self.modem_control & MCR_LOOP == 0 {
            return MSR_CONNECTED;
        }
        let out = self.modem_control;
        (out & 0x02) << 3 | (out & 0x01) << 5 | (out & 0x0c) << 4
    }

    fn transmit(&mut self, byte: u8) {
        self.empty_pending = true;
        if self.modem_control & MCR_LOOP != 0 {
            self.push_input(&[byte]);
        } else if !(self.bucket.take(Instant::now) && matches!(self.sink.write(&[byte]), Ok(1))) {
            self.dropped.one();
        }
    }
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial").field("dropped", &self.dropped.get()).finish_non_exhaustive()
    }
}

/// Allows [`BURST`] bytes at once and [`RATE`] per second in the long run.
#[derive(Debug)]
struct Bucket {
    tokens: u32,
    refilled: Instant,
}

impl Bucket {
    fn full(now: Instant) -> Self {
        Self { tokens: BURST, refilled: now }
    }

    /// Takes a token if there is one. The clock is only asked when the bucket is empty.
    fn take(&mut self, clock: impl Fn() -> Instant) -> bool {
        if self.tokens == 0 {
            self.refill(clock());
        }
        let Some(left) = self.tokens.checked_sub(1) else { return false };
        self.tokens = left;
        true
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.refilled).min(Duration::from_secs(1));
        let earned = elapsed.as_micros().saturating_mul(RATE.into()) / 1_000_000;
        let earned = u32::try_from(earned).unwrap_or(BURST).min(BURST);
        if earned > 0 {
            self.tokens = earned;
            self.refilled = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Broken;

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn written_bytes_come_out() {
        let sink = Sink::default();
        let mut serial = Serial::new(Box::new(sink.clone()));
        b"hello".iter().for_each(|byte| serial.write(DATA, *byte));
        assert_eq!(*sink.0.lock().unwrap(), b"hello");
    }

    #[test]
    fn a_driver_finds_it_by_loopback() {
        let mut serial = Serial::new(Box::new(Broken));
        serial.write(MODEM_CONTROL, MCR_LOOP | 0x0a);
        assert_eq!(serial.read(MODEM_STATUS) & 0xf0, 0x90);
        serial.write(DATA, 0x5a);
        assert_eq!((serial.read(DATA), serial.dropped().get()), (0x5a, 0));
    }

    #[test]
    fn the_divisor_hides_data_and_is_kept() {
        let sink = Sink::default();
        let mut serial = Serial::new(Box::new(sink.clone()));
        serial.write(LINE_CONTROL, LCR_DLAB);
        serial.write(DATA, 12);
        serial.write(INTERRUPT_ENABLE, 3);
        assert_eq!((serial.read(DATA), serial.read(INTERRUPT_ENABLE)), (12, 3));
        assert!(sink.0.lock().unwrap().is_empty());
    }

    #[test]
    fn a_sink_that_takes_nothing_costs_the_bytes_and_nothing_else() {
        let mut serial = Serial::new(Box::new(Broken));
        (0..10).for_each(|byte| serial.write(DATA, byte));
        assert_eq!(serial.dropped().get(), 10);
        assert_eq!(serial.read(LINE_STATUS), LSR_IDLE);
    }

    #[test]
    fn input_beyond_the_buffer_is_not_taken() {
        let mut serial = Serial::new(Box::new(Broken));
        assert_eq!(serial.push_input(&[7; INPUT_SIZE + 1]), INPUT_SIZE);
        assert_eq!(serial.push_input(&[7]), 0);
        assert_eq!(serial.read(LINE_STATUS), LSR_IDLE | LSR_RECEIVED);
        assert_eq!(serial.read(DATA), 7);
    }

    #[test]
    fn the_empty_event_is_given_once_per_byte_and_when_asked_for() {
        let mut serial = Serial::new(Box::new(Sink::default()));
        assert_eq!(serial.read(INTERRUPT_ID), IIR_NONE);
        serial.write(INTERRUPT_ENABLE, IER_EMPTY);
        assert_eq!((serial.read(INTERRUPT_ID), serial.read(INTERRUPT_ID)), (IIR_EMPTY, IIR_NONE));
        serial.write(DATA, 1);
        assert_eq!((serial.read(INTERRUPT_ID), serial.read(INTERRUPT_ID)), (IIR_EMPTY, IIR_NONE));
    }

    #[test]
    fn a_restored_port_reads_as_the_saved_one() {
        let mut serial = Serial::new(Box::new(Sink::default()));
        serial.write(LINE_CONTROL, LCR_DLAB | 3);
        serial.write(DATA, 12);
        serial.write(LINE_CONTROL, 3);
        serial.write(INTERRUPT_ENABLE, IER_EMPTY | IER_RECEIVED);
        serial.write(INTERRUPT_ID, 1);
        serial.write(SCRATCH, 0x5a);
        serial.push_input(b"typed");
        let mut again = Serial::new(Box::new(Sink::default()));
        again.restore(&serial.state());
        assert_eq!(again.state(), serial.state());
        for register in (0..8).chain(std::iter::repeat_n(DATA, 5)) {
            assert_eq!(again.read(register), serial.read(register), "{register}");
        }
    }

    #[test]
    fn a_state_with_more_input_than_fits_is_cut() {
        let mut serial = Serial::new(Box::new(Broken));
        serial.restore(&State { input: vec![7; 1000], modem_control: 0xff, ..State::default() });
        assert_eq!(serial.state().input.len(), INPUT_SIZE);
        assert_eq!(serial.read(MODEM_CONTROL), 0x1f);
    }

    proptest! {
        #[test]
        fn the_bucket_never_allows_more_than_burst_and_rate(steps in proptest::collection::vec(0u64..200_000, 1..40)) {
            let start = Instant::now();
            let mut bucket = Bucket::full(start);
            let (mut micros, mut taken) = (0, 0u64);
            for step in steps {
                micros += step;
                let now = start + Duration::from_micros(micros);
                while bucket.take(|| now) {
                    taken += 1;
                }
                prop_assert!(taken <= u64::from(BURST) + micros * u64::from(RATE) / 1_000_000 + 1);
            }
        }

        #[test]
        fn any_sequence_of_registers_is_defined(accesses in proptest::collection::vec((any::<u8>(), any::<u8>(), any::<bool>()), 0..200)) {
            let mut serial = Serial::new(Box::new(Broken));
            for (register, value, write) in accesses {
                if write { serial.write(register, value) } else { serial.read(register); }
                prop_assert!(serial.input.len() <= INPUT_SIZE);
            }
        }
    }
}
