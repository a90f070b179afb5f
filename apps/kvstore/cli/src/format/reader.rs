//! Records out of a stream, one at a time, in bounded memory.

use std::io::{self, BufRead};

use super::{Format, ReadError, Reason, json, tsv};
use crate::limits::{MAX_KEY_BYTES, MAX_VALUE_BYTES};

/// One record and the line it came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// 1 to 65,535 bytes.
    pub key: Vec<u8>,
    /// 0 to 1 MiB.
    pub value: Vec<u8>,
    /// The line, from 1.
    pub line: u64,
}

impl Record {
    /// Whether sizes are within the limits.
    pub(super) fn check(key: &[u8], value: &[u8]) -> Result<(), Reason> {
        if key.is_empty() {
            Err(Reason::EmptyKey)
        } else if key.len() > MAX_KEY_BYTES {
            Err(Reason::KeyTooLong)
        } else if value.len() > MAX_VALUE_BYTES {
            Err(Reason::ValueTooLarge)
        } else {
            Ok(())
        }
    }
}

/// Reads records from `R`. As an iterator it gives each record or what is wrong with its line; after
/// a bad line it goes on with the next one (whether to is the caller's choice), after an error of the
/// operating system it ends.
pub struct Reader<R> {
    input: Lines<R>,
    format: Format,
    name: String,
    pub(super) scratch: Vec<u8>,
    ended: bool,
}

impl<R: BufRead> Reader<R> {
    /// Reads `input`, which errors will call `name`.
    pub fn new(input: R, format: Format, name: impl Into<String>) -> Self {
        let input = Lines {
            input,
            line: 0,
            mid_line: false,
        };
        Self {
            input,
            format,
            name: name.into(),
            scratch: Vec::new(),
            ended: false,
        }
    }

    /// Reads the next record into `record`, whose buffers are used again. `false` at the end.
    ///
    /// # Errors
    /// [`ReadError`] with file, line and reason; `record` then holds nothing of use.
    pub fn read_into(&mut self, record: &mut Record) -> Result<bool, ReadError> {
        if self.ended {
            return Ok(false);
        }
        let read = match self.format {
            Format::Tsv => tsv::read(&mut self.input, record),
            Format::Jsonl => json::read(&mut self.input, &mut self.scratch, record),
        };
        record.line = self.input.line;
        match read {
            Ok(true) => Ok(true),
            Ok(false) => {
                self.ended = true;
                Ok(false)
            }
            Err(reason) => {
                self.ended = matches!(reason, Reason::Io(_));
                Err(ReadError {
                    file: self.name.clone(),
                    line: self.input.line,
                    reason,
                })
            }
        }
    }

    /// Passes lines so that `line` (from 1) is the next to be read; none of them is looked at. `false`: there are fewer.
    ///
    /// # Errors
    /// [`ReadError`] where the operating system cannot read on.
    pub fn skip_to(&mut self, line: u64) -> Result<bool, ReadError> {
        while self.input.line + 1 < line {
            match self.input.start_line() {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(error) => {
                    self.ended = true;
                    return Err(ReadError {
                        file: self.name.clone(),
                        line: self.input.line,
                        reason: Reason::Io(error),
                    });
                }
            }
        }
        Ok(true)
    }
}

impl<R: BufRead> Iterator for Reader<R> {
    type Item = Result<Record, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut record = Record::default();
        match self.read_into(&mut record) {
            Ok(true) => Some(Ok(record)),
            Ok(false) => None,
            Err(error) => Some(Err(error)),
        }
    }
}

/// A stream that knows its line.
pub(super) struct Lines<R> {
    input: R,
    /// The line in hand, from 1; 0 before the first.
    line: u64,
    /// Some of the line in hand is still unread.
    mid_line: bool,
}

impl<R: BufRead> Lines<R> {
    /// Goes to the start of the next line, past what is left of this one. `false` at the end.
    pub(super) fn start_line(&mut self) -> io::Result<bool> {
        while self.mid_line {
            let left = self.peek()?;
            let len = left.len();
            if len == 0 {
                self.mid_line = false;
                break;
            }
            match memchr::memchr(b'\n', left) {
                Some(at) => {
                    self.consume(at + 1);
                    self.end_line();
                }
                None => self.consume(len),
            }
        }
        // Counted before looking: should the look fail, this is the line that could not be read.
        self.line += 1;
        if self.peek()?.is_empty() {
            self.line -= 1;
            return Ok(false);
        }
        self.mid_line = true;
        Ok(true)
    }

    /// What is next in the stream; empty at its end.
    pub(super) fn peek(&mut self) -> io::Result<&[u8]> {
        let left = loop {
            match self.input.fill_buf() {
                Ok(left) => break left.len(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        // The buffer is asked for once more because the borrow of a look that failed would last for
        // the whole loop. It is not empty, so this reads nothing; and at the end nobody asks again.
        if left == 0 {
            Ok(&[])
        } else {
            self.input.fill_buf()
        }
    }

    /// Passes `count` bytes of what [`Self::peek`] showed.
    pub(super) fn consume(&mut self, count: usize) {
        self.input.consume(count);
    }

    /// Notes that the newline has been passed.
    pub(super) fn end_line(&mut self) {
        self.mid_line = false;
    }
}
