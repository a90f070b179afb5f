//! What a guest says: COM1 (early failures, panics) and the log ring in the window.
//!
//! None of it is trusted. Lines are cut, control characters are spelled out (they could drive the reader's terminal), and each turn
//! takes a bounded amount.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::Ordering;

use hyv_abi::window::{LOG_LEN, LogRing};
use tracing::Level;

use crate::limits::{MAX_CONSOLE_TAIL, MAX_LINE, MAX_RECORDS_PER_DRAIN, REMEMBERED_LINES};

/// Cuts a stream of bytes into lines.
#[derive(Debug, Default)]
pub struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    /// Takes bytes and gives each line that they end. A line longer than the limit comes in pieces.
    pub fn feed(&mut self, bytes: &[u8], mut line: impl FnMut(String)) {
        for b in bytes {
            match b {
                b'\n' => self.flush(&mut line),
                b'\r' => {}
                _ => {
                    self.partial.push(*b);
                    if self.partial.len() >= MAX_LINE {
                        self.flush(&mut line);
                    }
                }
            }
        }
    }

    /// Gives what is left without an end of line.
    pub fn finish(&mut self, mut line: impl FnMut(String)) {
        if !self.partial.is_empty() {
            self.flush(&mut line);
        }
    }

    fn flush(&mut self, line: &mut impl FnMut(String)) {
        let bytes = std::mem::take(&mut self.partial);
        line(printable(&bytes));
    }
}

/// Bytes as text that is safe to show: what is no UTF-8 is replaced, control characters are spelled out.
#[must_use]
pub fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c == '\t' || !c.is_control() {
            out.push(c);
        } else {
            out.extend(c.escape_default());
        }
    }
    out
}

/// The last lines of a stream, bounded in bytes.
#[derive(Debug, Default)]
pub struct Tail {
    lines: VecDeque<String>,
    bytes: usize,
}

impl Tail {
    /// Appends a line and forgets the oldest ones beyond the limit.
    pub fn push(&mut self, line: String) {
        self.bytes += line.len() + 1;
        self.lines.push_back(line);
        while self.bytes > MAX_CONSOLE_TAIL {
            let Some(gone) = self.lines.pop_front() else {
                break;
            };
            self.bytes -= gone.len() + 1;
        }
    }

    /// All that is kept, as lines.
    #[must_use]
    pub fn text(&self) -> String {
        self.lines.iter().flat_map(|l| [l.as_str(), "\n"]).collect()
    }
}

/// One record of the guest's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its level.
    pub level: Level,
    /// Its text, safe to show; may hold several lines.
    pub text: String,
}

/// Reads a log ring. Keeps its own position: what the ring says of it is only for the guest.
#[derive(Debug, Default)]
pub struct LogDrain {
    tail: u64,
    dropped: u64,
    /// The last position that made no sense: complained of once.
    bad_head: Option<u64>,
}

impl LogDrain {
    /// Gives the records written since the last call (a bounded number of them) and then how many the guest had to drop and whether
    /// some made no sense. Returns whether there is more.
    pub fn drain(&mut self, ring: &LogRing, mut record: impl FnMut(Record)) -> bool {
        let claimed = ring.head.load(Ordering::Acquire);
        let head = claimed / 8 * 8;
        let mut garbled = false;
        if head.wrapping_sub(self.tail) > LOG_LEN as u64 || claimed != head {
            // More than fits, backwards, or torn: no guest of ours writes that. Start over from what it claims.
            garbled = self.bad_head.replace(claimed) != Some(claimed);
            self.tail = head;
        }
        let mut taken = 0;
        while self.tail < head && taken < MAX_RECORDS_PER_DRAIN {
            let word = load(ring, self.tail);
            let (len, level) = ((word & 0x00ff_ffff) as u64, (word >> 24) & 0xff);
            let size = (4 + len).next_multiple_of(8);
            let Some(level) = level_of(level).filter(|_| size <= head - self.tail) else {
                garbled = true;
                self.tail = head;
                break;
            };
            let mut text = Vec::with_capacity(len as usize);
            let mut at = self.tail + 4;
            while text.len() < len as usize {
                let bytes = load(ring, at).to_le_bytes();
                let missing = len as usize - text.len();
                text.extend_from_slice(&bytes[..missing.min(4)]);
                at += 4;
            }
            text.truncate(MAX_LINE);
            record(Record {
                level,
                text: printable_lines(&text),
            });
            self.tail += size;
            taken += 1;
        }
        ring.tail.store(self.tail, Ordering::Release);
        if garbled {
            record(Record {
                level: Level::WARN,
                text: "the guest's log ring is garbled: some of it is lost".into(),
            });
        }
        let dropped = ring.dropped.load(Ordering::Relaxed);
        let more = dropped.wrapping_sub(self.dropped);
        if more > 0 && self.tail == head {
            self.dropped = dropped;
            let text = format!(
                "the guest dropped {more} lines of its log: they came faster than they were read"
            );
            record(Record {
                level: Level::WARN,
                text,
            });
        }
        self.tail < head
    }
}

/// The 32-bit word at byte `at` (a multiple of 4) of the endless stream that the ring holds the end of.
fn load(ring: &LogRing, at: u64) -> u32 {
    let word = ring.text[(at / 8) as usize % (LOG_LEN / 8)].load(Ordering::Relaxed);
    if at.is_multiple_of(8) {
        word as u32
    } else {
        (word >> 32) as u32
    }
}

fn level_of(number: u32) -> Option<Level> {
    Some(match number {
        1 => Level::ERROR,
        2 => Level::WARN,
        3 => Level::INFO,
        4 => Level::DEBUG,
        5 => Level::TRACE,
        _ => return None,
    })
}

fn printable_lines(bytes: &[u8]) -> String {
    let lines: Vec<String> = bytes.split(|b| *b == b'\n').map(printable).collect();
    lines.join("\n").trim_end().to_owned()
}

/// Lines seen lately: a panic is written to the log ring and to COM1, and should be shown once.
#[derive(Debug, Default)]
pub struct Recent(VecDeque<u64>);

impl Recent {
    fn hash(line: &str) -> u64 {
        let mut h = DefaultHasher::new();
        line.trim().hash(&mut h);
        h.finish()
    }

    /// Remembers a line.
    pub fn add(&mut self, line: &str) {
        if self.0.len() == REMEMBERED_LINES {
            self.0.pop_front();
        }
        self.0.push_back(Self::hash(line));
    }

    /// Forgets one line like this and says whether there was one.
    pub fn take(&mut self, line: &str) -> bool {
        let wanted = Self::hash(line);
        self.0
            .iter()
            .position(|h| *h == wanted)
            .is_some_and(|i| self.0.remove(i).is_some())
    }
}

/// Shows one line of guest `name` in the log of this process.
pub fn show(name: &str, level: Level, text: &str) {
    match level {
        Level::ERROR => tracing::error!(target: "guest", guest = name, "{text}"),
        Level::WARN => tracing::warn!(target: "guest", guest = name, "{text}"),
        Level::INFO => tracing::info!(target: "guest", guest = name, "{text}"),
        Level::DEBUG => tracing::debug!(target: "guest", guest = name, "{text}"),
        Level::TRACE => tracing::trace!(target: "guest", guest = name, "{text}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::window::SharedWindow;
    use proptest::prelude::*;

    /// The guest's side: appends a record, or counts it as dropped.
    fn write(ring: &LogRing, level: u32, text: &[u8]) {
        let head = ring.head.load(Ordering::Relaxed);
        let size = (4 + text.len() as u64).next_multiple_of(8);
        if head + size - ring.tail.load(Ordering::Acquire) > LOG_LEN as u64 {
            ring.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut bytes = (text.len() as u32 | level << 24).to_le_bytes().to_vec();
        bytes.extend_from_slice(text);
        bytes.resize(size as usize, 0);
        for (i, w) in bytes.chunks_exact(8).enumerate() {
            let slot = (head as usize / 8 + i) % (LOG_LEN / 8);
            ring.text[slot].store(u64::from_le_bytes(w.try_into().unwrap()), Ordering::Relaxed);
        }
        ring.head.store(head + size, Ordering::Release);
    }

    fn drain(d: &mut LogDrain, ring: &LogRing) -> Vec<String> {
        let mut got = Vec::new();
        while d.drain(ring, |r| got.push(format!("{} {}", r.level, r.text))) {}
        got
    }

    #[test]
    fn records_come_out_as_they_went_in() {
        let w = SharedWindow::create().unwrap();
        let mut d = LogDrain::default();
        for round in 0..5000 {
            write(&w.log, 3, format!("round {round}").as_bytes());
            write(&w.log, 1, &b"x".repeat(round % 200));
            let got = drain(&mut d, &w.log);
            let xs = "x".repeat(round % 200);
            assert_eq!(got, [format!("INFO round {round}"), format!("ERROR {xs}")]);
        }
        assert!(w.log.head.load(Ordering::Relaxed) > 4 * LOG_LEN as u64);
    }

    #[test]
    fn overflow_is_counted() {
        let w = SharedWindow::create().unwrap();
        let mut d = LogDrain::default();
        for _ in 0..1000 {
            write(&w.log, 4, &[b'a'; 100]);
        }
        let got = drain(&mut d, &w.log);
        let kept = LOG_LEN / 104;
        assert_eq!(got.len(), kept + 1);
        assert!(
            got[kept].contains(&format!("dropped {} lines", 1000 - kept)),
            "{}",
            got[kept]
        );
        write(&w.log, 4, b"again");
        assert_eq!(drain(&mut d, &w.log), ["DEBUG again"]);
    }

    #[test]
    fn one_turn_is_bounded() {
        let w = SharedWindow::create().unwrap();
        let mut d = LogDrain::default();
        for _ in 0..MAX_RECORDS_PER_DRAIN + 10 {
            write(&w.log, 3, b"a");
        }
        let mut n = 0;
        assert!(d.drain(&w.log, |_| n += 1));
        assert_eq!(n, MAX_RECORDS_PER_DRAIN);
        assert!(!d.drain(&w.log, |_| n += 1));
        assert_eq!(n, MAX_RECORDS_PER_DRAIN + 10);
    }

    #[test]
    fn terminal_escapes_are_spelled_out() {
        assert_eq!(
            printable(b"a\x1b[31mb\x07\tc\xff"),
            "a\\u{1b}[31mb\\u{7}\tc\u{fffd}"
        );
        let mut lines = Vec::new();
        let mut l = Lines::default();
        l.feed(b"one\r\ntw", |s| lines.push(s));
        l.feed(b"o\n\nrest", |s| lines.push(s));
        l.feed(&[b'y'; MAX_LINE + 1], |s| lines.push(s));
        l.finish(|s| lines.push(s));
        assert_eq!(lines[..3], ["one", "two", ""]);
        assert_eq!(lines[3].len(), MAX_LINE);
        assert_eq!(lines[4].len(), 5);
    }

    #[test]
    fn the_tail_is_bounded() {
        let mut t = Tail::default();
        for i in 0..100_000 {
            t.push(format!("line {i}"));
        }
        let text = t.text();
        assert!(text.len() <= MAX_CONSOLE_TAIL && text.len() > MAX_CONSOLE_TAIL - 100);
        assert!(text.ends_with("line 99999\n"));
    }

    #[test]
    fn a_line_seen_in_the_ring_is_shown_once() {
        let mut r = Recent::default();
        r.add("  at 0x1");
        assert!(r.take("  at 0x1\r"));
        assert!(!r.take("  at 0x1"));
    }

    proptest! {
        #[test]
        fn garbage_never_panics_and_is_caught_up_with(
            words in proptest::collection::vec(any::<u64>(), 1..200),
            heads in proptest::collection::vec(prop_oneof![any::<u64>(), 0..2 * LOG_LEN as u64], 1..20),
        ) {
            let w = SharedWindow::create().unwrap();
            for (i, v) in words.iter().enumerate() {
                w.log.text[i * 37 % (LOG_LEN / 8)].store(*v, Ordering::Relaxed);
            }
            let mut d = LogDrain::default();
            for h in heads {
                w.log.head.store(h, Ordering::Relaxed);
                w.log.dropped.store(h ^ words[0], Ordering::Relaxed);
                let mut turns = 0;
                while d.drain(&w.log, |_| {}) {
                    turns += 1;
                    prop_assert!(turns < 100);
                }
                prop_assert_eq!(d.tail, h / 8 * 8);
            }
        }
    }
}
