//! Recording what one client does.

use std::io::{self, Write};

use crate::format::Text;
use crate::history::Initial;
use crate::limits::WRITE_BUFFER_BYTES;
use crate::op::{Nanos, Operation, Outcome, RequestId};

/// An operation under way, as its recorder numbers it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct OpId(u64);

/// Writes one client's history.
///
/// Times are arguments, of one clock for all clients ([`monotonic_ns`]), and do not go back within one recorder: take the time of an
/// invocation *before* the request is sent, and that of a return *after* the reply was seen. A client that may be killed calls
/// [`Recorder::flush`] between recording an invocation and sending it; otherwise the store may show what the history does not have.
///
/// An operation is some hundred bytes and half a microsecond. What goes wrong with the file is told by [`Recorder::flush`] and
/// [`Recorder::finish`], so that the loop in between needs no error handling.
#[derive(Debug)]
pub struct Recorder<W: Write> {
    to: W,
    buffer: Vec<u8>,
    /// Of all lines so far.
    crc: u32,
    operations: u64,
    failed: Option<io::Error>,
}

impl<W: Write> Recorder<W> {
    /// Begins the history of client number `client`, which no other recorder of the same history has. `clock_slack`: see
    /// [`crate::History::clock_slack`].
    pub fn new(to: W, client: u32, clock_slack: Nanos) -> Self {
        let mut this = Self {
            to,
            buffer: Vec::with_capacity(WRITE_BUFFER_BYTES + 1024),
            crc: 0,
            operations: 0,
            failed: None,
        };
        this.line(|t| t.header(client, clock_slack));
        this
    }

    /// What a key holds before the first operation; without this nothing, and never did. It is said once, whoever says it.
    pub fn initial(&mut self, key: &[u8], initial: &Initial) {
        self.line(|t| t.initial(key, initial));
    }

    /// An operation is about to be asked for.
    #[inline]
    pub fn invoke(&mut self, now: Nanos, key: &[u8], operation: &Operation) -> OpId {
        self.invoke_once(now, key, operation, RequestId::NONE)
    }

    /// An operation with a request id, or another attempt of it, is about to be asked for. Each attempt is recorded, with an id of its
    /// own and the same `request`.
    #[inline]
    pub fn invoke_once(
        &mut self,
        now: Nanos,
        key: &[u8],
        operation: &Operation,
        request: RequestId,
    ) -> OpId {
        let number = self.operations;
        self.operations += 1;
        self.line(|t| t.invoke(number, now, key, operation, request));
        OpId(number)
    }

    /// The answer has come.
    #[inline]
    pub fn respond(&mut self, now: Nanos, id: OpId, outcome: &Outcome) {
        self.line(|t| t.outcome(id.0, now, outcome));
    }

    /// The answer will not come, and nobody knows whether the operation took effect. Not needed for what was under way when a client was
    /// killed.
    pub fn lost(&mut self, id: OpId) {
        self.line(|t| t.lost(id.0));
    }

    /// Operations so far.
    #[must_use]
    pub const fn operations(&self) -> u64 {
        self.operations
    }

    /// Hands everything to the operating system, so that it outlives this process.
    ///
    /// # Errors
    /// When it cannot be written, now or since the last call.
    pub fn flush(&mut self) -> io::Result<()> {
        self.empty();
        match self.failed.take() {
            Some(e) => Err(e),
            None => self.to.flush(),
        }
    }

    /// Ends the history.
    ///
    /// # Errors
    /// As [`Recorder::flush`].
    pub fn finish(mut self) -> io::Result<W> {
        let operations = self.operations;
        self.line(|t| t.end(operations));
        self.flush()?;
        Ok(self.to)
    }

    #[inline]
    fn line(&mut self, write: impl FnOnce(&mut Text<'_>)) {
        let start = self.buffer.len();
        write(&mut Text(&mut self.buffer));
        let mut crc = crc32fast::Hasher::new_with_initial(self.crc);
        crc.update(&self.buffer[start..]);
        self.crc = crc.finalize();
        let _ = writeln!(self.buffer, " {:08x}", self.crc);
        if self.buffer.len() >= WRITE_BUFFER_BYTES {
            self.empty();
        }
    }

    fn empty(&mut self) {
        if let Err(e) = self.to.write_all(&self.buffer) {
            self.failed.get_or_insert(e);
        }
        self.buffer.clear();
    }
}

/// `CLOCK_MONOTONIC` in ns, which all processes of a machine share.
#[must_use]
#[inline]
pub fn monotonic_ns() -> Nanos {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}
