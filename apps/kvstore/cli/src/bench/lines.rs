//! Cache lines that go from the server's core to the client's, or back, for one operation: counted from where the protocol puts its bytes,
//! with the engine on the client's core (inline).
//!
//! Counted is each line that one core wrote and the other reads after that, once. A line that is looked at while it is being written may
//! go more than once, and its writer has to take it back from its reader before, which moves no data; neither is counted. What
//! stays on one core is none: the client's own rings and buffers, which the engine reads and writes there; on the server's side the
//! hash table, and the log where it writes. Words that a turn of either side looks at and nobody writes while
//! both are awake (`polled`, arm words, `need_wakeup`) stay in both caches.

use hyv_abi::queue::{CQE_DATA, SLOT_LEN, SendHead};
use hyv_verbs::ring::recv_stride;
use kvstore::limits::EAGER_VALUE_BYTES;
use kvstore::proto::REQUEST_HEADER_BYTES;
use kvstore::server::limits::FIRST_TIERS;
use kvstore::store::entry::{ENTRY_ALIGN, ENTRY_HEADER_BYTES, entry_bytes};
use serde::Serialize;

use super::limits::KEY_BYTES;

/// Bytes of a cache line.
const LINE: usize = 64;
/// Bytes of a request's id.
const ONCE_BYTES: usize = 9;
/// Bytes of a write's reply: the version.
const VERSION_BYTES: usize = 8;

/// Lines for one operation of each kind; null for what takes more than one message each way.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Crossings {
    /// A read by request.
    pub read: Option<Lines>,
    /// A read that is one READ of a place that is known.
    pub one_sided_read: Option<Lines>,
    /// A write.
    pub write: Option<Lines>,
}

/// Lines for one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Lines {
    /// To the server: the completion, and the receive buffer where the message does not fit the completion.
    pub request: f64,
    /// To the engine: the server's receive, of which several share a line.
    pub receive: f64,
    /// To the engine: the reply's work request.
    pub reply: f64,
    /// Either way, once for many operations: completions of sends, the queue's consumer index.
    pub rare: f64,
    /// To the engine: the object in the log, if it is not in the cache of the engine's core from before. The mean over all places where an
    /// entry may begin. They come from memory, not from the server's core, if that does not have them either.
    pub object: f64,
    /// All of them but the object: always.
    pub least: f64,
    /// All of them.
    pub most: f64,
}

impl Lines {
    fn summed(self) -> Self {
        let least = self.request + self.receive + self.reply + self.rare;
        Self {
            least,
            most: least + self.object,
            ..self
        }
    }
}

impl Crossings {
    /// For people.
    #[must_use]
    pub fn shown(&self) -> String {
        let kinds = [
            ("a read", self.read),
            ("a one-sided read", self.one_sided_read),
            ("a write", self.write),
        ];
        let known: Vec<_> = kinds
            .iter()
            .filter_map(|(name, lines)| Some((name, (*lines)?)))
            .map(|(name, l)| format!("{name} {:.1} to {:.1}", l.least, l.most))
            .collect();
        if known.is_empty() {
            return "cache lines between the cores: values of this size travel by address, not counted".to_owned();
        }
        format!(
            "cache lines between the cores for an operation, by construction: {}",
            known.join(", ")
        )
    }

    /// For values of so many bytes under this measurement's keys.
    #[must_use]
    pub fn of(value_size: usize, exactly_once: bool) -> Self {
        let eager = value_size <= EAGER_VALUE_BYTES;
        let once = if exactly_once { ONCE_BYTES } else { 0 };
        let write = REQUEST_HEADER_BYTES + once + KEY_BYTES + value_size;
        let read = REQUEST_HEADER_BYTES + KEY_BYTES;
        let sent = ENTRY_HEADER_BYTES + KEY_BYTES + value_size;
        Self {
            read: eager.then(|| {
                Lines {
                    object: lines_of(sent),
                    ..two_sided(read, SendHead::slots_for(1, 0, false))
                }
                .summed()
            }),
            one_sided_read: eager.then(|| {
                Lines {
                    object: lines_of(entry_bytes(KEY_BYTES, value_size)),
                    ..Lines::default()
                }
                .summed()
            }),
            write: eager
                .then(|| two_sided(write, SendHead::slots_for(0, VERSION_BYTES, false)).summed()),
        }
    }
}

/// A request of so many bytes, and a reply of so many slots.
fn two_sided(request: usize, reply_slots: usize) -> Lines {
    let tier = &FIRST_TIERS[0];
    let buffer = if request <= CQE_DATA {
        0
    } else {
        // Receive buffers begin at lines.
        request.div_ceil(LINE)
    };
    // A consumer index is told when a quarter of the queue was taken.
    let index = 4.0 / f64::from(tier.completions());
    Lines {
        request: (SLOT_LEN / LINE + buffer) as f64,
        receive: f64::from(recv_stride(1)) / LINE as f64,
        reply: (reply_slots * SLOT_LEN / LINE) as f64,
        rare: 1.0 / f64::from(tier.signal_every) + index,
        ..Lines::default()
    }
}

/// Lines that so many bytes touch, the mean over all places where an entry may begin.
fn lines_of(bytes: usize) -> f64 {
    let places = LINE / ENTRY_ALIGN;
    let touched = |place: usize| (place * ENTRY_ALIGN + bytes).div_ceil(LINE);
    (0..places).map(touched).sum::<usize>() as f64 / places as f64
}

#[cfg(test)]
mod tests {
    use kvstore::proto::{Key, MAX_REQUEST_BYTES, Once, Request, Value};
    use kvstore::store::{DEFAULT_TABLE, NEVER, RejectRules};

    use super::*;
    use crate::bench::random::key;

    #[test]
    fn messages_have_the_sizes_that_are_counted() {
        assert_eq!(MAX_REQUEST_BYTES % LINE, 0);
        let (name, value) = (key(1), [1; 100]);
        let once = Once {
            sequence: 5,
            first_incomplete: 4,
        };
        for once in [None, Some(once)] {
            let request = Request::Write {
                table: DEFAULT_TABLE,
                key: Key::Inline(&name),
                value: Value::Inline(&value),
                rules: RejectRules::NONE,
                expires: NEVER,
                once,
            };
            let bytes = request.emit(0, &mut [0; 512]).unwrap();
            let counted = Crossings::of(100, once.is_some()).write.unwrap();
            assert_eq!(counted.request, 1.0 + bytes.div_ceil(LINE) as f64);
        }
    }

    #[test]
    fn a_small_read_is_two_lines_and_a_half_and_the_object() {
        let read = Crossings::of(100, true).read.unwrap();
        assert_eq!((read.request, read.receive, read.reply), (1.0, 0.5, 1.0));
        assert!(read.rare < 0.1 && read.object == 3.25);
        assert!((read.most - read.least - read.object).abs() < 1e-9);
        // The last of a line, or one byte more.
        assert_eq!(lines_of(8), 1.0);
        assert_eq!(lines_of(64), 1.0 + 7.0 / 8.0);
        assert_eq!(lines_of(65), 2.0);
        let large = Crossings::of(4097, true);
        assert_eq!((large.read, large.write), (None, None));
        assert!(large.shown().contains("not counted"));
        let shown = Crossings::of(100, true).shown();
        assert!(
            shown.contains("a read 2.6 to 5.8") && shown.contains("a write"),
            "{shown}"
        );
    }
}
