//! Records into a stream.

use std::io::Write;

use super::{Format, Record, WriteError, json, tsv};

/// Writes records that [`super::Reader`] reads back exactly.
pub struct Writer<W> {
    out: W,
    format: Format,
    name: String,
    written: u64,
}

impl<W: Write> Writer<W> {
    /// Writes to `out` (which should be buffered), which errors will call `name`.
    pub fn new(out: W, format: Format, name: impl Into<String>) -> Self {
        Self {
            out,
            format,
            name: name.into(),
            written: 0,
        }
    }

    /// Writes one record.
    ///
    /// # Errors
    /// [`WriteError::Refused`] for an empty key or sizes beyond the limits, and nothing is written;
    /// [`WriteError::Io`] from `out`.
    pub fn write(&mut self, key: &[u8], value: &[u8]) -> Result<(), WriteError> {
        Record::check(key, value).map_err(|reason| WriteError::Refused {
            file: self.name.clone(),
            record: self.written + 1,
            reason,
        })?;
        let written = match self.format {
            Format::Tsv => tsv::write(&mut self.out, key, value),
            Format::Jsonl => json::write(&mut self.out, key, value),
        };
        written.map_err(|error| WriteError::Io {
            file: self.name.clone(),
            error,
        })?;
        self.written += 1;
        Ok(())
    }

    /// How many records have been written.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Flushes, and gives `out` back.
    ///
    /// # Errors
    /// [`WriteError::Io`] where what was buffered cannot be written.
    pub fn finish(mut self) -> Result<W, WriteError> {
        match self.out.flush() {
            Ok(()) => Ok(self.out),
            Err(error) => Err(WriteError::Io {
                file: self.name,
                error,
            }),
        }
    }
}
