//! The files that `kv load` reads and `kv dump` writes.
//!
//! **TSV**: one record a line, `key<TAB>value`. In both, `\t`, `\n`, `\r` and `\\` stand for tab,
//! newline, carriage return and backslash. All other bytes stand for themselves, whether or not
//! they are UTF-8. A line without a tab or with two, and an empty line, are errors.
//!
//! **JSON lines**: one object a line, `{"key":"…","value":"…"}`, in any order and with any blanks.
//! Bytes that are not UTF-8 are written in base64 (RFC 4648, standard alphabet; padding may be
//! missing when reading) under another name: `"key_b64"` in place of `"key"`, `"value_b64"` in
//! place of `"value"`. Blank lines are skipped. No other field is accepted: what is not stored
//! must not look as if it were.
//!
//! A line may be of any length: no more of it is held than the longest legal record needs.

mod error;
mod files;
mod json;
mod reader;
mod tsv;
mod writer;

#[cfg(test)]
mod tests;

use std::path::Path;

pub use error::{OpenError, ReadError, Reason, WriteError};
pub use files::{FileWriter, Input, Watch, create, open, open_watched};
pub use reader::{Reader, Record};
pub use writer::Writer;

/// The spelling of a file of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// `key<TAB>value`, one record a line, escapes `\t`, `\n`, `\r`, `\\`.
    Tsv,
    /// `{"key":…,"value":…}`, one object a line; `key_b64`, `value_b64` for bytes that are not UTF-8.
    #[value(alias = "ndjson", alias = "json")]
    Jsonl,
}

impl Format {
    /// What `path` is written in: `explicit` where given, else by the ending (`.tsv`, `.txt`; `.jsonl`,
    /// `.ndjson`, `.json`), else, for `-` (standard input or output), TSV.
    ///
    /// # Errors
    /// [`OpenError::UnknownEnding`] where the ending says nothing and nothing else does.
    pub fn choose(path: &Path, explicit: Option<Self>) -> Result<Self, OpenError> {
        if let Some(format) = explicit {
            return Ok(format);
        }
        if is_standard(path) {
            return Ok(Self::Tsv);
        }
        let ending = path
            .extension()
            .and_then(|e| e.to_str())
            .map(str::to_ascii_lowercase);
        match ending.as_deref() {
            Some("tsv" | "txt") => Ok(Self::Tsv),
            Some("jsonl" | "ndjson" | "json") => Ok(Self::Jsonl),
            _ => Err(OpenError::UnknownEnding {
                file: path.display().to_string(),
            }),
        }
    }
}

/// Whether `path` is `-`, that is, standard input or output.
#[must_use]
pub fn is_standard(path: &Path) -> bool {
    path.as_os_str() == "-"
}
