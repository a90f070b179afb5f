//! Lines of a history file: text that a person can search, each with a checksum that also covers all lines before it.
//!
//! | line | meaning |
//! | --- | --- |
//! | `hyv-history 1 CLIENT SLACK` | first line: format, the client's number, how far the store's clock may be off in ns |
//! | `k KEY INITIAL` | what a key held before: `?` anything, `-` nothing, `-@V` nothing with versions up to V, `=VALUE[@V][~TIME]` |
//! | `i N TIME KEY OPERATION [?RULES] [#CLIENT.SEQUENCE]` | operation N is asked for; numbers count from 0 |
//! | `o N TIME OUTCOME` | its answer |
//! | `l N` | its answer will not come |
//! | `e COUNT` | the end, after so many operations; without it the client was killed |
//!
//! A key's bytes other than letters, digits and `_-.:/` are written `%XX`. A value is `n` and a decimal integer if it has eight
//! bytes, else `dLENGTH.HASH`. Operations: `r`, `wVALUE[~TIME]`, `d`, `aINTEGER`, `fBITS`. Rules, with commas: `e`, `a`, `lVERSION`
//! (refuse up to it), `vVERSION` (refuse others). Outcomes: `=VALUE[@V]`, `-`, `w[@V]`, `d[@V]`, `aINTEGER[@V]`, `!e[@V]`, `!a`,
//! `!v[@V]`, `n` (no number), `x` (refused).
//! Each line ends with a blank and eight hexadecimal digits: the CRC-32 of its text up to that blank, continued from the line before.

use std::io::Write as _;

use crate::history::Initial;
use crate::op::{
    Addend, NEVER, Nanos, Operation, Outcome, Reason, RequestId, Rules, Value, Version,
};

/// What the first line of every file begins with.
pub(crate) const MAGIC: &str = "hyv-history";
/// The format that this crate writes and reads.
pub(crate) const FORMAT: u32 = 1;
/// Bytes of a line after its text: a blank, eight digits.
pub(crate) const CHECK_BYTES: usize = 9;

/// What a line says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Line {
    Header {
        client: u32,
        slack: Nanos,
    },
    Initial {
        key: Vec<u8>,
        initial: Initial,
    },
    Invoke {
        number: u64,
        time: Nanos,
        key: Vec<u8>,
        operation: Operation,
        request: RequestId,
    },
    Return {
        number: u64,
        time: Nanos,
        outcome: Outcome,
    },
    Lost {
        number: u64,
    },
    End {
        operations: u64,
    },
}

/// Writes the text of lines; writing to memory does not fail.
pub(crate) struct Text<'a>(pub &'a mut Vec<u8>);

impl Text<'_> {
    fn put(&mut self, text: std::fmt::Arguments<'_>) {
        let _ = self.0.write_fmt(text);
    }

    pub fn header(&mut self, client: u32, slack: Nanos) {
        self.put(format_args!("{MAGIC} {FORMAT} {client} {slack}"));
    }

    pub fn initial(&mut self, key: &[u8], initial: &Initial) {
        self.put(format_args!("k "));
        self.key(key);
        match *initial {
            Initial::Fresh => self.put(format_args!(" -")),
            Initial::Unknown => self.put(format_args!(" ?")),
            Initial::AbsentAbove(version) => {
                self.put(format_args!(" -"));
                self.version(version);
            }
            Initial::Present {
                value,
                version,
                expires,
            } => {
                self.put(format_args!(" ="));
                self.value(value);
                self.version(version);
                self.until(expires);
            }
        }
    }

    pub fn invoke(
        &mut self,
        number: u64,
        time: Nanos,
        key: &[u8],
        operation: &Operation,
        request: RequestId,
    ) {
        self.put(format_args!("i {number} {time} "));
        self.key(key);
        match operation {
            Operation::Read { .. } => self.put(format_args!(" r")),
            Operation::Write { value, expires, .. } => {
                self.put(format_args!(" w"));
                self.value(*value);
                self.until(*expires);
            }
            Operation::Remove { .. } => self.put(format_args!(" d")),
            Operation::Increment { by, .. } => match by {
                Addend::I64(by) => self.put(format_args!(" a{by}")),
                Addend::F64(bits) => self.put(format_args!(" f{bits:016x}")),
            },
        }
        self.rules(&operation.rules());
        if request.is_some() {
            self.put(format_args!(" #{}.{}", request.client, request.sequence));
        }
    }

    pub fn outcome(&mut self, number: u64, time: Nanos, outcome: &Outcome) {
        self.put(format_args!("o {number} {time} "));
        match *outcome {
            Outcome::Found { value, .. } => {
                self.put(format_args!("="));
                self.value(value);
            }
            Outcome::Absent => self.put(format_args!("-")),
            Outcome::Written { .. } => self.put(format_args!("w")),
            Outcome::Removed { .. } => self.put(format_args!("d")),
            Outcome::Added { value, .. } => self.put(format_args!("a{}", value as i64)),
            Outcome::Rejected { reason, .. } => self.put(format_args!(
                "!{}",
                match reason {
                    Reason::Exists => "e",
                    Reason::Absent => "a",
                    Reason::Version => "v",
                }
            )),
            Outcome::NotANumber => self.put(format_args!("n")),
            Outcome::Refused => self.put(format_args!("x")),
        }
        self.version(outcome.version());
    }

    pub fn lost(&mut self, number: u64) {
        self.put(format_args!("l {number}"));
    }

    pub fn end(&mut self, operations: u64) {
        self.put(format_args!("e {operations}"));
    }

    fn key(&mut self, key: &[u8]) {
        for &byte in key {
            if is_plain(byte) {
                self.0.push(byte);
            } else {
                self.put(format_args!("%{byte:02x}"));
            }
        }
    }

    fn value(&mut self, value: Value) {
        match value {
            Value::Number(n) => self.put(format_args!("n{}", n as i64)),
            Value::Digest { len, hash } => self.put(format_args!("d{len}.{hash:016x}")),
        }
    }

    fn version(&mut self, version: Version) {
        if version != 0 {
            self.put(format_args!("@{version}"));
        }
    }

    fn until(&mut self, expires: Nanos) {
        if expires != NEVER {
            self.put(format_args!("~{expires}"));
        }
    }

    fn rules(&mut self, rules: &Rules) {
        let mut before = " ?";
        let mut put = |this: &mut Self, text: std::fmt::Arguments<'_>| {
            this.put(format_args!("{before}{text}"));
            before = ",";
        };
        if rules.exists {
            put(self, format_args!("e"));
        }
        if rules.absent {
            put(self, format_args!("a"));
        }
        if let Some(version) = rules.at_most {
            put(self, format_args!("l{version}"));
        }
        if let Some(version) = rules.other_than {
            put(self, format_args!("v{version}"));
        }
    }
}

const fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.' | b':' | b'/')
}

impl Line {
    /// Reads a line's text. The error says which part is wrong.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let mut fields = Fields(text.split(' '));
        let line = match fields.next("a line's kind")? {
            MAGIC => {
                if fields.number("the format's number")? != u64::from(FORMAT) {
                    return Err("another format than 1: read it with the program that wrote it");
                }
                Self::Header {
                    client: u32::try_from(fields.number("the client's number")?)
                        .map_err(|_| "the client's number is too large")?,
                    slack: fields.number("the clock's slack")?,
                }
            }
            "k" => Self::Initial {
                key: parse_key(fields.next("the key")?)?,
                initial: parse_initial(fields.next("what the key held")?)?,
            },
            "i" => {
                let number = fields.number("the operation's number")?;
                let time = fields.number("the time")?;
                let key = parse_key(fields.next("the key")?)?;
                let operation = parse_operation(fields.next("the operation")?)?;
                let mut rules = Rules::NONE;
                let mut request = RequestId::NONE;
                for field in fields.0.by_ref() {
                    if let Some(text) = field.strip_prefix('?') {
                        rules = parse_rules(text)?;
                    } else {
                        request = field
                            .strip_prefix('#')
                            .and_then(|t| t.split_once('.'))
                            .and_then(|(client, sequence)| {
                                Some(RequestId {
                                    client: client.parse().ok()?,
                                    sequence: sequence.parse().ok()?,
                                })
                            })
                            .ok_or("the request's id is none")?;
                    }
                }
                Self::Invoke {
                    number,
                    time,
                    key,
                    operation: operation.unless(rules),
                    request,
                }
            }
            "o" => Self::Return {
                number: fields.number("the operation's number")?,
                time: fields.number("the time")?,
                outcome: parse_outcome(fields.next("the outcome")?)?,
            },
            "l" => Self::Lost {
                number: fields.number("the operation's number")?,
            },
            "e" => Self::End {
                operations: fields.number("the count of operations")?,
            },
            _ => return Err("no such kind of line"),
        };
        match fields.0.next() {
            None => Ok(line),
            Some(_) => Err("the line goes on after its end"),
        }
    }
}

struct Fields<'a>(std::str::Split<'a, char>);

impl<'a> Fields<'a> {
    fn next(&mut self, what: &'static str) -> Result<&'a str, &'static str> {
        self.0.next().filter(|f| !f.is_empty()).ok_or(what)
    }

    fn number(&mut self, what: &'static str) -> Result<u64, &'static str> {
        self.next(what)?.parse().map_err(|_| what)
    }
}

fn parse_key(text: &str) -> Result<Vec<u8>, &'static str> {
    let wrong = "the key is spelt wrong";
    let mut key = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let mut digit = || {
                bytes
                    .next()
                    .and_then(|b| (b as char).to_digit(16))
                    .ok_or(wrong)
            };
            key.push((digit()? * 16 + digit()?) as u8);
        } else if is_plain(byte) {
            key.push(byte);
        } else {
            return Err(wrong);
        }
    }
    Ok(key)
}

/// Cuts what follows the last `mark` off `text`, as a number; `otherwise` if there is no mark.
fn tail(text: &str, mark: char, otherwise: u64) -> Result<(&str, u64), &'static str> {
    match text.rsplit_once(mark) {
        None => Ok((text, otherwise)),
        Some((rest, number)) => Ok((rest, number.parse().map_err(|_| "a number is wrong")?)),
    }
}

fn parse_value(text: &str) -> Result<Value, &'static str> {
    let wrong = "the value is spelt wrong";
    if let Some(number) = text.strip_prefix('n') {
        return Ok(Value::Number(
            number.parse::<i64>().map_err(|_| wrong)? as u64
        ));
    }
    let (len, hash) = text
        .strip_prefix('d')
        .and_then(|t| t.split_once('.'))
        .ok_or(wrong)?;
    Ok(Value::Digest {
        len: len.parse().map_err(|_| wrong)?,
        hash: u64::from_str_radix(hash, 16).map_err(|_| wrong)?,
    })
}

fn parse_initial(text: &str) -> Result<Initial, &'static str> {
    let (text, expires) = tail(text, '~', NEVER)?;
    let (text, version) = tail(text, '@', 0)?;
    Ok(match text {
        "?" => Initial::Unknown,
        "-" if version == 0 => Initial::Fresh,
        "-" => Initial::AbsentAbove(version),
        _ => Initial::Present {
            value: parse_value(
                text.strip_prefix('=')
                    .ok_or("what the key held is spelt wrong")?,
            )?,
            version,
            expires,
        },
    })
}

fn parse_operation(text: &str) -> Result<Operation, &'static str> {
    let wrong = "no such operation";
    let add = |by| Operation::Increment { by, rules: None };
    match text.split_at_checked(1).ok_or(wrong)? {
        ("r", "") => Ok(Operation::READ),
        ("d", "") => Ok(Operation::REMOVE),
        ("w", text) => {
            let (text, expires) = tail(text, '~', NEVER)?;
            Ok(Operation::Write {
                value: parse_value(text)?,
                expires,
                rules: None,
            })
        }
        ("a", by) => Ok(add(Addend::I64(by.parse().map_err(|_| wrong)?))),
        ("f", bits) => Ok(add(Addend::F64(
            u64::from_str_radix(bits, 16).map_err(|_| wrong)?,
        ))),
        _ => Err(wrong),
    }
}

fn parse_rules(text: &str) -> Result<Rules, &'static str> {
    let wrong = "the rules are spelt wrong";
    let mut rules = Rules::NONE;
    for rule in text.split(',') {
        match rule.split_at_checked(1).ok_or(wrong)? {
            ("e", "") => rules.exists = true,
            ("a", "") => rules.absent = true,
            ("l", version) => rules.at_most = Some(version.parse().map_err(|_| wrong)?),
            ("v", version) => rules.other_than = Some(version.parse().map_err(|_| wrong)?),
            _ => return Err(wrong),
        }
    }
    Ok(rules)
}

fn parse_outcome(text: &str) -> Result<Outcome, &'static str> {
    let wrong = "no such outcome";
    let (text, version) = tail(text, '@', 0)?;
    let rejected = |reason| Outcome::Rejected { reason, version };
    Ok(match text {
        "-" => Outcome::Absent,
        "w" => Outcome::Written { version },
        "d" => Outcome::Removed { version },
        "!e" => rejected(Reason::Exists),
        "!a" => rejected(Reason::Absent),
        "!v" => rejected(Reason::Version),
        "n" => Outcome::NotANumber,
        "x" => Outcome::Refused,
        _ => match text.split_at_checked(1).ok_or(wrong)? {
            ("=", value) => Outcome::Found {
                value: parse_value(value)?,
                version,
            },
            ("a", value) => Outcome::Added {
                value: value.parse::<i64>().map_err(|_| wrong)? as u64,
                version,
            },
            _ => return Err(wrong),
        },
    })
}
