//! One TSV line.

use std::io::{self, BufRead, Write};

use super::reader::Lines;
use super::{Reason, Record};
use crate::limits::{MAX_KEY_BYTES, MAX_VALUE_BYTES};

/// Reads the next line into `record`. `false` at the end of the stream.
pub(super) fn read<R: BufRead>(lines: &mut Lines<R>, record: &mut Record) -> Result<bool, Reason> {
    record.key.clear();
    record.value.clear();
    if !lines.start_line()? {
        return Ok(false);
    }
    let mut in_value = false;
    let mut escaped = false;
    loop {
        let chunk = lines.peek()?;
        if chunk.is_empty() {
            break;
        }
        if escaped {
            let (plain, passed) = match chunk[0] {
                b't' => (b'\t', 1),
                b'n' => (b'\n', 1),
                b'r' => (b'\r', 1),
                b'\\' => (b'\\', 1),
                // The end of the line or field is not part of the escape.
                b'\n' | b'\t' => return Err(Reason::BadEscape(None)),
                other => return Err(Reason::BadEscape(Some(other))),
            };
            lines.consume(passed);
            escaped = false;
            push(record, in_value, &[plain])?;
            continue;
        }
        let special = memchr::memchr3(b'\t', b'\n', b'\\', chunk);
        let plain = special.unwrap_or(chunk.len());
        push(record, in_value, &chunk[..plain])?;
        let Some(at) = special else {
            lines.consume(plain);
            continue;
        };
        let byte = chunk[at];
        lines.consume(at + 1);
        match byte {
            b'\\' => escaped = true,
            b'\t' if in_value => return Err(Reason::ExtraTab),
            b'\t' => in_value = true,
            _ => {
                lines.end_line();
                break;
            }
        }
    }
    if escaped {
        return Err(Reason::BadEscape(None));
    }
    if !in_value {
        return Err(Reason::NoTab);
    }
    Record::check(&record.key, &record.value)?;
    Ok(true)
}

/// Adds `bytes` to the field in hand, unless that breaks its limit: so nothing more is ever held.
fn push(record: &mut Record, in_value: bool, bytes: &[u8]) -> Result<(), Reason> {
    if in_value {
        if record.value.len() + bytes.len() > MAX_VALUE_BYTES {
            return Err(Reason::ValueTooLarge);
        }
        record.value.extend_from_slice(bytes);
    } else {
        if record.key.len() + bytes.len() > MAX_KEY_BYTES {
            return Err(Reason::KeyTooLong);
        }
        record.key.extend_from_slice(bytes);
    }
    Ok(())
}

/// Writes one line.
pub(super) fn write(out: &mut impl Write, key: &[u8], value: &[u8]) -> io::Result<()> {
    write_field(out, key)?;
    out.write_all(b"\t")?;
    write_field(out, value)?;
    out.write_all(b"\n")
}

fn write_field(out: &mut impl Write, field: &[u8]) -> io::Result<()> {
    let mut rest = field;
    while let Some(at) = rest
        .iter()
        .position(|b| matches!(b, b'\t' | b'\n' | b'\r' | b'\\'))
    {
        out.write_all(&rest[..at])?;
        out.write_all(match rest[at] {
            b'\t' => b"\\t",
            b'\n' => b"\\n",
            b'\r' => b"\\r",
            _ => b"\\\\",
        })?;
        rest = &rest[at + 1..];
    }
    out.write_all(rest)
}
