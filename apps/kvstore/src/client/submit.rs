//! Submitting what is more than a small request: keys and values by address, pages, multi-operations.

use super::error::{check_key, check_value};
use super::staging::{self, Staging};
use super::{
    Client, ClientError, FREE, MAX_ELEMENTS_BYTES, MAX_ONCE_ELEMENTS, Operation, Repeat,
    SMALL_RESULTS, Slot, Ticket,
};
use crate::limits::{EAGER_KEY_BYTES, EAGER_VALUE_BYTES, MAX_VALUE_BYTES};
use crate::proto::{
    Element, Elements, Key, MIN_PAGE_BUFFER_BYTES, MultiOp, ProtoError, Request, Value,
    emit_element,
};
use crate::store::{DEFAULT_TABLE, RejectRules};

impl Client {
    pub(super) fn submit_any(&mut self, operation: &Operation<'_>) -> Result<Ticket, ClientError> {
        let plain = |client: &mut Self, request| client.start(&request, FREE);
        match *operation {
            Operation::Read { key, .. }
            | Operation::Write { key, .. }
            | Operation::Remove { key, .. }
            | Operation::Increment { key, .. } => self.submit_keyed(operation, key),
            Operation::Enumerate {
                table,
                cursor,
                limit,
                values,
            } => {
                let staged = self.stage()?;
                let buffer = self.staging().value(staged, MIN_PAGE_BUFFER_BYTES);
                let request = Request::Enumerate {
                    table,
                    cursor,
                    limit,
                    values,
                    buffer: Some(buffer),
                };
                self.start(&request, staged_slot(staged))
            }
            Operation::Multi { op, elements } => self.submit_multi(op, elements),
            Operation::CreateTable { name } => plain(self, Request::CreateTable { name }),
            Operation::DropTable { table } => plain(self, Request::DropTable { table }),
            Operation::FindTable { name } => plain(self, Request::FindTable { name }),
            Operation::Tables { after } => plain(
                self,
                Request::Tables {
                    after,
                    buffer: None,
                },
            ),
            Operation::Stats => plain(self, Request::Stats),
            Operation::Ping => plain(self, Request::Ping),
            Operation::Cleaner { mode } => plain(self, Request::Cleaner { mode }),
            Operation::Probe { rounds } => {
                let slot = Slot {
                    repeat: Repeat::Never,
                    ..FREE
                };
                self.start(&Request::Probe { rounds }, slot)
            }
        }
    }

    /// Submits what has a key, some of it by address.
    fn submit_keyed(
        &mut self,
        operation: &Operation<'_>,
        key: &[u8],
    ) -> Result<Ticket, ClientError> {
        check_key(key)?;
        let large_value = match *operation {
            Operation::Write { value, .. } => {
                check_value(value.len())?;
                Some(value).filter(|value| value.len() > EAGER_VALUE_BYTES)
            }
            _ => None,
        };
        let remote_key = key.len() > EAGER_KEY_BYTES;
        let staged = if remote_key || large_value.is_some() {
            Some(self.stage()?)
        } else {
            None
        };
        let slot = Slot {
            staged,
            answer_at: Staging::VALUE_AT as u32,
            ..FREE
        };
        let key = match staged {
            Some(s) if remote_key => Key::Remote(self.staging().fill_key(s, key)),
            _ => Key::Inline(key),
        };
        let remote_value = match (staged, large_value) {
            (Some(s), Some(value)) => Some(self.staging().fill_value(s, value)),
            _ => None,
        };
        match *operation {
            Operation::Read { table, rules, .. } => {
                // With a staging buffer at hand there is room for any value.
                let buffer = staged.map(|s| self.staging().value(s, MAX_VALUE_BYTES));
                let request = Request::Read {
                    table,
                    key,
                    rules,
                    buffer,
                };
                self.start(&request, slot)
            }
            Operation::Write {
                table,
                value,
                rules,
                expires,
                ..
            } => self.start_numbered(slot, 1, |once| Request::Write {
                table,
                key,
                value: remote_value.map_or(Value::Inline(value), Value::Remote),
                rules,
                expires,
                once,
            }),
            Operation::Remove { table, rules, .. } => {
                self.start_numbered(slot, 1, |once| Request::Remove {
                    table,
                    key,
                    rules,
                    once,
                })
            }
            Operation::Increment {
                table, by, rules, ..
            } => self.start_numbered(slot, 1, |once| Request::Increment {
                table,
                key,
                by,
                rules,
                once,
            }),
            _ => Err(ClientError::Proto(ProtoError::Field("key"))),
        }
    }

    /// Packs a multi-operation: into the message if it fits, otherwise into a staging buffer, where the results go too if they are
    /// values.
    fn submit_multi(
        &mut self,
        op: MultiOp,
        elements: &[Element<'_>],
    ) -> Result<Ticket, ClientError> {
        let bytes: usize = elements.iter().map(|e| e.packed_bytes(op)).sum();
        let once = self.config.exactly_once && op != MultiOp::Read;
        let most = if once {
            MAX_ONCE_ELEMENTS
        } else {
            usize::from(u16::MAX)
        };
        if elements.is_empty() || elements.len() > most || bytes > MAX_ELEMENTS_BYTES {
            return Err(ClientError::MultiTooLarge {
                elements: elements.len(),
                bytes,
            });
        }
        for element in elements {
            check_key(element.key)?;
            check_value(element.value.len())?;
        }
        let count = elements.len() as u16;
        let in_message = bytes <= EAGER_VALUE_BYTES;
        let in_reply = op != MultiOp::Read && elements.len() <= SMALL_RESULTS;
        let staged = if in_message && in_reply {
            None
        } else {
            Some(self.stage()?)
        };
        let slot = Slot {
            staged,
            answer_at: MAX_ELEMENTS_BYTES as u32,
            multi: Some((op, count)),
            ..FREE
        };
        let buffer = match staged {
            Some(s) if !in_reply => {
                let room = staging::ROOM - MAX_ELEMENTS_BYTES;
                Some(self.staging().remote(s, MAX_ELEMENTS_BYTES, room))
            }
            _ => None,
        };
        let pack = |out: &mut [u8]| {
            elements.iter().try_fold(0, |at, element| {
                emit_element(op, element, &mut out[at..]).map(|bytes| at + bytes)
            })
        };
        let mut small = [0; EAGER_VALUE_BYTES];
        let (elements, by_address) = match (staged, self.staging.as_mut()) {
            (Some(s), Some(staging)) if !in_message => {
                let packed = pack(staging.fill(s));
                let len = match packed {
                    Ok(len) => len,
                    Err(e) => {
                        staging.give_back(s);
                        return Err(e.into());
                    }
                };
                (&[][..], Some(staging.remote(s, 0, len)))
            }
            _ => {
                let len = pack(&mut small)?;
                (&small[..len], None)
            }
        };
        let request = |once| Request::Multi {
            op,
            count,
            elements: by_address.map_or(Elements::Inline(elements), Elements::Remote),
            once,
            buffer,
        };
        if op == MultiOp::Read {
            return self.start(&request(None), slot);
        }
        self.start_numbered(slot, usize::from(count), request)
    }

    #[cold]
    pub(super) fn stage(&mut self) -> Result<u32, ClientError> {
        self.prepare_large()?;
        self.staging
            .as_mut()
            .and_then(Staging::take)
            .ok_or(ClientError::WindowFull)
    }

    /// The staging buffers, of which one was taken.
    pub(super) fn staging(&self) -> &Staging {
        self.staging.as_ref().expect("a staging buffer was taken")
    }

    /// The same, with a buffer for a value of any size from the start: one round trip less for one over [`EAGER_VALUE_BYTES`].
    ///
    /// # Errors
    /// As [`Client::submit`].
    pub fn start_get_large(&mut self, key: &[u8]) -> Result<Ticket, ClientError> {
        self.submit_large_read(DEFAULT_TABLE, key)
    }

    /// The same of any table.
    ///
    /// # Errors
    /// As [`Client::submit`].
    pub fn submit_large_read(&mut self, table: u32, key: &[u8]) -> Result<Ticket, ClientError> {
        check_key(key)?;
        let staged = self.stage()?;
        let staging = self.staging();
        let remote = (key.len() > EAGER_KEY_BYTES).then(|| staging.fill_key(staged, key));
        let request = Request::Read {
            table,
            key: remote.map_or(Key::Inline(key), Key::Remote),
            rules: RejectRules::NONE,
            buffer: Some(staging.value(staged, MAX_VALUE_BYTES)),
        };
        self.start(&request, staged_slot(staged))
    }
}

/// A slot whose answer goes to its staging buffer's part for values.
fn staged_slot(staged: u32) -> Slot {
    Slot {
        staged: Some(staged),
        answer_at: Staging::VALUE_AT as u32,
        ..FREE
    }
}
