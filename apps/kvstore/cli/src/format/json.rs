//! One line of JSON lines.

use std::fmt;
use std::io::{self, BufRead, Write};

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::de::{DeserializeSeed, Deserializer, MapAccess, Visitor};

use super::reader::Lines;
use super::{Reason, Record};
use crate::limits::{MAX_JSON_LINE_BYTES, MAX_QUOTED_CHARS};

/// Writes padding, takes it or leaves it when reading.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Reads the next line that is not blank into `record`. `false` at the end of the stream.
pub(super) fn read<R: BufRead>(
    lines: &mut Lines<R>,
    scratch: &mut Vec<u8>,
    record: &mut Record,
) -> Result<bool, Reason> {
    loop {
        if !lines.start_line()? {
            return Ok(false);
        }
        read_line(lines, scratch)?;
        if !scratch.iter().all(|b| matches!(b, b' ' | b'\t' | b'\r')) {
            break;
        }
    }
    parse(scratch, record)?;
    Record::check(&record.key, &record.value)?;
    Ok(true)
}

/// Collects the rest of the line in `line`, without its newline.
fn read_line<R: BufRead>(lines: &mut Lines<R>, line: &mut Vec<u8>) -> Result<(), Reason> {
    line.clear();
    loop {
        let chunk = lines.peek()?;
        let newline = memchr::memchr(b'\n', chunk);
        let len = newline.unwrap_or(chunk.len());
        if line.len() + len > MAX_JSON_LINE_BYTES {
            return Err(Reason::LineTooLong);
        }
        line.extend_from_slice(&chunk[..len]);
        if newline.is_some() {
            lines.consume(len + 1);
            lines.end_line();
            return Ok(());
        }
        if len == 0 {
            return Ok(());
        }
        lines.consume(len);
    }
}

fn parse(line: &[u8], record: &mut Record) -> Result<(), Reason> {
    let mut fields = Fields {
        key: None,
        value: None,
        reason: None,
    };
    let mut json = serde_json::Deserializer::from_slice(line);
    let read = json.deserialize_map(&mut fields).and_then(|()| json.end());
    if let Err(error) = read {
        return Err(fields.reason.unwrap_or_else(|| Reason::Json {
            column: error.column(),
            message: message(&error),
        }));
    }
    record.key = fields.key.ok_or(Reason::MissingField("key"))?;
    record.value = fields.value.ok_or(Reason::MissingField("value"))?;
    Ok(())
}

/// The parser's message without its own idea of the line, which is always 1.
fn message(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

/// What the object held so far.
struct Fields {
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    /// Why the visit was broken off, where the parser's own message would say less.
    reason: Option<Reason>,
}

impl<'de> Visitor<'de> for &mut Fields {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key_seed(Text)? {
            let (field, base64) = match name.as_slice() {
                b"key" => ("key", false),
                b"key_b64" => ("key", true),
                b"value" => ("value", false),
                b"value_b64" => ("value", true),
                other => {
                    let shown = String::from_utf8_lossy(other);
                    let shown = shown.chars().take(MAX_QUOTED_CHARS).collect();
                    return Err(self.stop(Reason::UnknownField(shown)));
                }
            };
            let slot = if field == "key" {
                &mut self.key
            } else {
                &mut self.value
            };
            if slot.is_some() {
                return Err(self.stop(Reason::DuplicateField(field)));
            }
            let text = map.next_value_seed(Text)?;
            *slot = Some(match base64.then(|| BASE64.decode(&text)) {
                None => text,
                Some(Ok(bytes)) => bytes,
                Some(Err(error)) => return Err(self.stop(Reason::BadBase64 { field, error })),
            });
        }
        Ok(())
    }
}

impl Fields {
    fn stop<E: serde::de::Error>(&mut self, reason: Reason) -> E {
        let error = E::custom(&reason);
        self.reason = Some(reason);
        error
    }
}

/// A JSON string, as its bytes.
struct Text;

impl<'de> DeserializeSeed<'de> for Text {
    type Value = Vec<u8>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Vec<u8>, D::Error> {
        json.deserialize_str(self)
    }
}

impl Visitor<'_> for Text {
    type Value = Vec<u8>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Vec<u8>, E> {
        Ok(text.as_bytes().to_vec())
    }

    fn visit_bytes<E: serde::de::Error>(self, _: &[u8]) -> Result<Vec<u8>, E> {
        Err(E::custom("a string that is not UTF-8 (write it in base64)"))
    }
}

/// Writes one line.
pub(super) fn write(out: &mut impl Write, key: &[u8], value: &[u8]) -> io::Result<()> {
    out.write_all(b"{")?;
    write_field(out, "key", key)?;
    out.write_all(b",")?;
    write_field(out, "value", value)?;
    out.write_all(b"}\n")
}

fn write_field(out: &mut impl Write, name: &str, bytes: &[u8]) -> io::Result<()> {
    match std::str::from_utf8(bytes) {
        Ok(text) => {
            write!(out, "\"{name}\":")?;
            serde_json::to_writer(out, text).map_err(io::Error::from)
        }
        Err(_) => write!(out, "\"{name}_b64\":\"{}\"", BASE64.encode(bytes)),
    }
}
