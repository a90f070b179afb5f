//! Multi-operations of any size: as many requests as it takes, many of them in flight.

use alloc::vec::Vec;

use super::{
    Client, ClientError, MAX_ELEMENTS_BYTES, MAX_ONCE_ELEMENTS, Operation, Ticket, WINDOW,
};
use crate::proto::{Element, ElementResult, MultiOp, Reply, Results, Status};
use crate::store::Increment;

/// Elements of at most so many bytes are sent with others; longer ones alone.
const LONGEST_ELEMENT: usize = 64 << 10;
/// Most elements of one request: so that the results of as many small objects fit beside the longest value.
const MOST_ELEMENTS: usize = 4096;
/// Times that an element is asked for again because the store is busy, with a pause in between.
const BUSY_ROUNDS: usize = 100;

/// The result of one element.
#[derive(Debug, Clone, PartialEq)]
pub enum MultiResult {
    /// An object that was read.
    Value {
        /// Its version.
        version: u64,
        /// Its value.
        value: Vec<u8>,
    },
    /// The version of the object that was written or removed.
    Version(u64),
    /// A number was incremented.
    Incremented {
        /// Version of the object.
        version: u64,
        /// The new number.
        value: Increment,
    },
}

/// An element that owns what it says.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct OwnedElement {
    /// Table.
    pub table: u32,
    /// Key.
    pub key: Vec<u8>,
    /// Value, of a write.
    pub value: Vec<u8>,
}

impl OwnedElement {
    /// As an element without conditions.
    #[must_use]
    pub fn element(&self) -> Element<'_> {
        Element {
            value: &self.value,
            ..Element::new(self.table, &self.key)
        }
    }
}

type Slots = Vec<Option<Result<MultiResult, ClientError>>>;

impl Client {
    /// Executes many operations of one kind, and gives their results in order. Each element succeeds or fails alone. Small ones
    /// share requests: up to 4,096 elements and half a MiB in one round trip, or, if they are to execute once, [`MAX_ONCE_ELEMENTS`]
    /// with as many requests in flight as the store keeps results for.
    ///
    /// # Errors
    /// When a request as a whole cannot be made; elements that were executed before stay executed.
    pub fn multi(
        &mut self,
        op: MultiOp,
        elements: &[Element<'_>],
    ) -> Result<Vec<Result<MultiResult, ClientError>>, ClientError> {
        let mut results: Slots = Vec::new();
        results.resize_with(elements.len(), || None);
        // Those that are to be executed, by index.
        let mut left: Vec<usize> = (0..elements.len()).collect();
        for _ in 0..BUSY_ROUNDS {
            self.multi_round(op, elements, &left, &mut results)?;
            let busy = |index: &usize| {
                let failed = results[*index].as_ref().and_then(|r| r.as_ref().err());
                failed.and_then(ClientError::status) == Some(Status::Busy)
            };
            left.retain(busy);
            if left.is_empty() {
                break;
            }
            self.pause(super::blocking::BUSY_PAUSE)?;
        }
        for (index, element) in elements.iter().enumerate() {
            let alone = match &results[index] {
                Some(Err(error)) => error.status() == Some(Status::TooLargeForEager),
                Some(Ok(_)) => false,
                None => true,
            };
            if alone {
                results[index] = Some(self.execute_alone(op, element));
            }
        }
        let unknown = || Err(ClientError::OutcomeUnknown);
        Ok(results
            .into_iter()
            .map(|result| result.unwrap_or_else(unknown))
            .collect())
    }

    /// Sends the elements named by `left` once, in requests as large as may be; those that must travel alone are left out.
    fn multi_round(
        &mut self,
        op: MultiOp,
        elements: &[Element<'_>],
        left: &[usize],
        results: &mut Slots,
    ) -> Result<(), ClientError> {
        let once = self.config.exactly_once && op != MultiOp::Read;
        let most = if once {
            MAX_ONCE_ELEMENTS
        } else {
            MOST_ELEMENTS
        };
        let mut flight: [Option<Vec<usize>>; WINDOW] = Default::default();
        let mut todo = left
            .iter()
            .copied()
            .filter(|index| elements[*index].packed_bytes(op) <= LONGEST_ELEMENT)
            .peekable();
        loop {
            // A batch, and its request.
            let mut batch = Vec::new();
            let mut bytes = 0;
            while let Some(&index) = todo.peek()
                && batch.len() < most
                && bytes + elements[index].packed_bytes(op) <= MAX_ELEMENTS_BYTES
            {
                bytes += elements[index].packed_bytes(op);
                batch.push(index);
                todo.next();
            }
            if batch.is_empty() {
                break;
            }
            let packed: Vec<Element<'_>> = batch.iter().map(|index| elements[*index]).collect();
            let operation = Operation::Multi {
                op,
                elements: &packed,
            };
            let ticket = loop {
                match self.submit(&operation) {
                    Ok(ticket) => break ticket,
                    Err(ClientError::WindowFull) if self.outstanding() > 0 => {
                        self.take_results(op, elements, &mut flight, results)?;
                    }
                    Err(e) => return Err(e),
                }
            };
            flight[usize::from(ticket)] = Some(batch);
        }
        while flight.iter().any(Option::is_some) {
            self.take_results(op, elements, &mut flight, results)?;
        }
        Ok(())
    }

    /// Waits for results.
    fn take_results(
        &mut self,
        op: MultiOp,
        elements: &[Element<'_>],
        flight: &mut [Option<Vec<usize>>; WINDOW],
        results: &mut Slots,
    ) -> Result<(), ClientError> {
        self.wait(|ticket: Ticket, reply| {
            let Some(batch) = flight[usize::from(ticket)].take() else {
                return;
            };
            let parsed = reply.and_then(|reply| match reply {
                Reply::Results(bytes) => Ok(Results::parse(op, batch.len(), bytes)?),
                _ => Err(ClientError::Disconnected(
                    "its reply is of another kind than the request",
                )),
            });
            match parsed {
                Ok(parsed) => {
                    for (index, result) in batch.into_iter().zip(parsed.iter()) {
                        results[index] = Some(owned(result, elements[index].by));
                    }
                }
                Err(e) => {
                    for index in batch {
                        results[index] = Some(Err(e.clone()));
                    }
                }
            }
        })?;
        Ok(())
    }

    /// Executes an element as a request of its own.
    fn execute_alone(
        &mut self,
        op: MultiOp,
        element: &Element<'_>,
    ) -> Result<MultiResult, ClientError> {
        let &Element {
            table,
            key,
            rules,
            expires,
            value,
            by,
        } = element;
        let operation = match op {
            MultiOp::Read => Operation::Read { table, key, rules },
            MultiOp::Write => Operation::Write {
                table,
                key,
                value,
                rules,
                expires,
            },
            MultiOp::Remove => Operation::Remove { table, key, rules },
            MultiOp::Increment => Operation::Increment {
                table,
                key,
                by,
                rules,
            },
        };
        self.execute(&operation, |reply| match reply {
            Reply::Value { version, value, .. } => Some(MultiResult::Value {
                version,
                value: value.to_vec(),
            }),
            Reply::Version(version) => Some(MultiResult::Version(version)),
            Reply::Incremented { version, bits } => Some(MultiResult::Incremented {
                version,
                value: with_bits(by, bits),
            }),
            _ => None,
        })
    }
}

fn owned(result: ElementResult<'_>, by: Increment) -> Result<MultiResult, ClientError> {
    match result {
        ElementResult::Value { version, value } => Ok(MultiResult::Value {
            version,
            value: value.to_vec(),
        }),
        ElementResult::Version(version) => Ok(MultiResult::Version(version)),
        ElementResult::Incremented { version, bits } => Ok(MultiResult::Incremented {
            version,
            value: with_bits(by, bits),
        }),
        ElementResult::Failed { status, detail } => Err(ClientError::of(status, detail)),
    }
}

/// The number with these bits, of the kind of `like`.
pub(super) const fn with_bits(like: Increment, bits: u64) -> Increment {
    match like {
        Increment::I64(_) => Increment::I64(bits as i64),
        Increment::F64(_) => Increment::F64(f64::from_bits(bits)),
    }
}
