//! Reading what recorders wrote.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::format::{CHECK_BYTES, Line, MAGIC};
use crate::history::{History, Initial, Op};
use crate::limits::MAX_LINE_BYTES;
use crate::op::NEVER;

/// What a file held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileSummary {
    /// The client whose history it is.
    pub client: u32,
    /// Its operations.
    pub operations: u64,
    /// Whether the client ended it; otherwise it was killed, and what it had under way counts as unanswered.
    pub ended: bool,
}

/// Why a file cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The file.
    #[error("{}: {source}", file.display())]
    Io {
        /// Its name.
        file: PathBuf,
        /// What is wrong with it.
        source: io::Error,
    },
    /// It begins with something else.
    #[error("{}: this is no history: its first line does not begin with `hyv-history`", file.display())]
    NotAHistory {
        /// Its name.
        file: PathBuf,
    },
    /// A line is not what a recorder wrote.
    #[error("{}, line {line} (byte {byte}): {what}; the file is damaged, record it again", file.display())]
    Damaged {
        /// Its name.
        file: PathBuf,
        /// Number of the line, from 1.
        line: u64,
        /// Where the line begins, from 0.
        byte: u64,
        /// What is wrong.
        what: &'static str,
    },
}

impl History {
    /// Reads a file and adds what it holds. After an error some of it may have been added: do not use the history.
    ///
    /// # Errors
    /// When the file cannot be read, is none, or is damaged: with the number of the line.
    pub fn read_file(&mut self, path: &Path) -> Result<FileSummary, ReadError> {
        let file = File::open(path).map_err(|source| ReadError::Io {
            file: path.to_owned(),
            source,
        })?;
        self.read(path, file)
    }

    /// Reads a history from anywhere; `name` is for errors. Otherwise as [`History::read_file`].
    ///
    /// # Errors
    /// As [`History::read_file`].
    pub fn read(&mut self, name: &Path, from: impl Read) -> Result<FileSummary, ReadError> {
        let mut from = BufReader::with_capacity(1 << 18, from);
        let mut reader = Reader {
            history: self,
            client: 0,
            operations: 0,
            time: 0,
            open: HashMap::new(),
            ended: false,
        };
        let (mut number, mut byte, mut crc) = (0u64, 0u64, 0u32);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = from
                .by_ref()
                .take(MAX_LINE_BYTES as u64 + 1)
                .read_until(b'\n', &mut line)
                .map_err(|source| ReadError::Io {
                    file: name.to_owned(),
                    source,
                })?;
            if read == 0 {
                break;
            }
            number += 1;
            let damaged = |what| ReadError::Damaged {
                file: name.to_owned(),
                line: number,
                byte,
                what,
            };
            if number == 1 && !line.starts_with(MAGIC.as_bytes()) {
                return Err(ReadError::NotAHistory {
                    file: name.to_owned(),
                });
            }
            if reader.ended {
                return Err(damaged("there is more after the end"));
            }
            if line.pop_if(|b| *b == b'\n').is_none() {
                if line.len() >= MAX_LINE_BYTES {
                    return Err(damaged("the line is too long"));
                }
                // The client was killed while it wrote this.
                if number == 1 {
                    return Err(ReadError::NotAHistory {
                        file: name.to_owned(),
                    });
                }
                break;
            }
            let text = checked(&line, &mut crc).map_err(damaged)?;
            reader.take(number, text).map_err(damaged)?;
            byte += read as u64;
        }
        if number == 0 {
            return Err(ReadError::NotAHistory {
                file: name.to_owned(),
            });
        }
        Ok(FileSummary {
            client: reader.client,
            operations: reader.operations,
            ended: reader.ended,
        })
    }
}

/// A line's text, if its checksum fits.
fn checked<'a>(line: &'a [u8], crc: &mut u32) -> Result<&'a str, &'static str> {
    let (text, check) = line
        .split_at_checked(line.len().wrapping_sub(CHECK_BYTES))
        .ok_or("the line has no checksum")?;
    let mut hasher = crc32fast::Hasher::new_with_initial(*crc);
    hasher.update(text);
    *crc = hasher.finalize();
    if check != format!(" {crc:08x}").as_bytes() {
        return Err("its checksum does not fit: it was changed, or lines are missing before it");
    }
    std::str::from_utf8(text).map_err(|_| "it is no text")
}

struct Reader<'a> {
    history: &'a mut History,
    client: u32,
    operations: u64,
    time: u64,
    /// Operations without an answer so far: number of the key, and of the operation in it.
    open: HashMap<u64, (usize, usize)>,
    ended: bool,
}

impl Reader<'_> {
    fn take(&mut self, number: u64, text: &str) -> Result<(), &'static str> {
        let line = Line::parse(text)?;
        if matches!(line, Line::Header { .. }) != (number == 1) {
            return Err("the first line is the only one with a header");
        }
        match line {
            Line::Header { client, slack } => {
                self.client = client;
                self.history.clock_slack = self.history.clock_slack.max(slack);
            }
            Line::Initial { key, initial } => {
                let held = &mut self.history.key(&key).initial;
                if *held != Initial::Fresh && *held != initial {
                    return Err("it contradicts what was said before of what this key held");
                }
                *held = initial;
            }
            Line::Invoke {
                number,
                time,
                key,
                operation,
                request,
            } => {
                if number != self.operations {
                    return Err("the operation's number is not the next one");
                }
                self.operations += 1;
                self.pass(time)?;
                let place = self.history.place(&key);
                let client = self.client;
                let ops = &mut self.history.at(place).ops;
                self.open.insert(number, (place, ops.len()));
                ops.push(Op {
                    client,
                    number,
                    invoked: time,
                    returned: NEVER,
                    operation,
                    outcome: None,
                    request,
                });
            }
            Line::Return {
                number,
                time,
                outcome,
            } => {
                self.pass(time)?;
                let op = self.close(number)?;
                op.returned = time;
                op.outcome = Some(outcome);
            }
            Line::Lost { number } => {
                self.close(number)?;
            }
            Line::End { operations } => {
                if operations != self.operations {
                    return Err("it ends after another number of operations than it says");
                }
                self.ended = true;
            }
        }
        Ok(())
    }

    fn pass(&mut self, time: u64) -> Result<(), &'static str> {
        if time < self.time {
            return Err("its time is before that of the line before");
        }
        self.time = time;
        Ok(())
    }

    fn close(&mut self, number: u64) -> Result<&mut Op, &'static str> {
        let (place, at) = self
            .open
            .remove(&number)
            .ok_or("no such operation is under way")?;
        Ok(&mut self.history.at(place).ops[at])
    }
}
