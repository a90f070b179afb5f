//! What can be wrong with a file of records.

use std::io;

use thiserror::Error;

use crate::limits::{MAX_JSON_LINE_BYTES, MAX_KEY_BYTES, MAX_VALUE_BYTES};

/// A file that could not be opened or created.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The ending names no format.
    #[error(
        "{file}: cannot tell the format from the ending (.tsv, .txt, .jsonl, .ndjson, .json): \
         say --format tsv or --format jsonl"
    )]
    UnknownEnding {
        /// The file as the user named it.
        file: String,
    },
    /// The operating system refused.
    #[error("{file}: {error}")]
    Io {
        /// The file as the user named it.
        file: String,
        /// The system's reason.
        #[source]
        error: io::Error,
    },
    /// The path is a directory.
    #[error("{file}: is a directory, not a file of records")]
    Directory {
        /// The file as the user named it.
        file: String,
    },
}

/// A record that could not be read: where, and why.
#[derive(Debug, Error)]
#[error("{file}, line {line}: {reason}")]
pub struct ReadError {
    /// The file as the user named it.
    pub file: String,
    /// The line, from 1.
    pub line: u64,
    /// What is wrong with it.
    #[source]
    pub reason: Reason,
}

/// What is wrong with a line, or with a record that is to become one.
#[derive(Debug, Error)]
pub enum Reason {
    /// TSV: there is no tab.
    #[error("malformed: no tab between key and value (a line is key<TAB>value)")]
    NoTab,
    /// TSV: there is a second tab.
    #[error("malformed: a second tab; inside a key or value a tab is written \\t")]
    ExtraTab,
    /// TSV: a backslash before something that is no escape. `None`: before the end of the field.
    #[error(
        "malformed: bad escape {}; the escapes are \\t, \\n, \\r and \\\\ (a backslash itself)",
        shown_escape(*.0)
    )]
    BadEscape(Option<u8>),
    /// The key is empty.
    #[error("the key is empty: keys have 1 to {MAX_KEY_BYTES} bytes")]
    EmptyKey,
    /// The key is longer than [`MAX_KEY_BYTES`].
    #[error("the key is longer than {MAX_KEY_BYTES} bytes, the limit")]
    KeyTooLong,
    /// The value is larger than [`MAX_VALUE_BYTES`].
    #[error("the value is larger than {MAX_VALUE_BYTES} bytes (1 MiB), the limit")]
    ValueTooLarge,
    /// JSON lines: the line is longer than any legal record.
    #[error(
        "the line is longer than {MAX_JSON_LINE_BYTES} bytes, so its key or value is larger than \
         the limits ({MAX_KEY_BYTES} bytes; {MAX_VALUE_BYTES} bytes, 1 MiB)"
    )]
    LineTooLong,
    /// JSON lines: not an object of strings.
    #[error("malformed: {message} (column {column}); a line is {{\"key\":\"…\",\"value\":\"…\"}}")]
    Json {
        /// What the JSON parser says.
        message: String,
        /// Where in the line, from 1, in bytes.
        column: usize,
    },
    /// JSON lines: a field is not there.
    #[error("malformed: there is no \"{0}\" (nor \"{0}_b64\")")]
    MissingField(&'static str),
    /// JSON lines: a field is there twice, counting its base64 form.
    #[error("malformed: \"{0}\" is given twice (\"{0}\" and \"{0}_b64\" are the same field)")]
    DuplicateField(&'static str),
    /// JSON lines: a field that means nothing here.
    #[error(
        "malformed: unknown field {0:?}; the fields are key, value, and key_b64, value_b64 for base64"
    )]
    UnknownField(String),
    /// JSON lines: a `_b64` field is not base64.
    #[error("malformed: \"{field}_b64\" is not base64: {error}")]
    BadBase64 {
        /// The field without `_b64`.
        field: &'static str,
        /// What the decoder says.
        error: base64::DecodeError,
    },
    /// The operating system could not read on.
    #[error("cannot read: {0}")]
    Io(#[from] io::Error),
}

/// A record that could not be written.
#[derive(Debug, Error)]
pub enum WriteError {
    /// No reader would take the record.
    #[error("{file}: record {record} cannot be written: {reason}")]
    Refused {
        /// The file as the user named it.
        file: String,
        /// The record, from 1.
        record: u64,
        /// The limit it breaks.
        #[source]
        reason: Reason,
    },
    /// The operating system refused.
    #[error("{file}: cannot write: {error}")]
    Io {
        /// The file as the user named it.
        file: String,
        /// The system's reason.
        #[source]
        error: io::Error,
    },
}

fn shown_escape(byte: Option<u8>) -> String {
    match byte {
        None => "at the end of a field".to_owned(),
        Some(b) => format!("\\{}", b.escape_ascii()),
    }
}
