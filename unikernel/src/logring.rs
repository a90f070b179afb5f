//! The log ring in the window: the guest's side of the `log` crate.

use core::fmt::{self, Write};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use hyv_abi::window::{LOG_LEN, LogRing};
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::{function, limits};

const WORDS: u64 = (LOG_LEN / 8) as u64;

/// Writes one record; counts it as dropped if the host has not made room. Longer text is cut.
pub(crate) fn write(level: Level, text: &[u8]) {
    if let Some(f) = function::get() {
        put(
            &f.window().log,
            level,
            &text[..cut(text, limits::MAX_LOG_RECORD)],
        );
    }
}

/// The largest length up to `max` at which `text` does not end inside a character.
fn cut(text: &[u8], max: usize) -> usize {
    if text.len() <= max {
        return text.len();
    }
    let mut n = max;
    while n > 0 && text[n] & 0xc0 == 0x80 {
        n -= 1;
    }
    n
}

fn put(ring: &LogRing, level: Level, text: &[u8]) {
    let head = ring.head.load(Relaxed);
    let need = (4 + text.len()).next_multiple_of(8) as u64;
    let used = head.wrapping_sub(ring.tail.load(Acquire));
    if used.saturating_add(need) > LOG_LEN as u64 {
        ring.dropped.store(ring.dropped.load(Relaxed) + 1, Relaxed);
        return;
    }
    let mut at = head / 8;
    let mut store = |word: u64| {
        ring.text[(at % WORDS) as usize].store(word, Relaxed);
        at += 1;
    };
    let (first, rest) = text.split_at(text.len().min(4));
    let mut word = [0; 8];
    word[..4].copy_from_slice(&(text.len() as u32 | (level as u32) << 24).to_le_bytes());
    word[4..4 + first.len()].copy_from_slice(first);
    store(u64::from_le_bytes(word));
    for chunk in rest.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        store(u64::from_le_bytes(word));
    }
    ring.head.store(head + need, Release);
}

struct Ring;

struct Text {
    bytes: [u8; limits::MAX_LOG_RECORD],
    len: usize,
}

impl Write for Text {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let n = cut(s.as_bytes(), self.bytes.len() - self.len);
        self.bytes[self.len..self.len + n].copy_from_slice(&s.as_bytes()[..n]);
        self.len += n;
        if n < s.len() { Err(fmt::Error) } else { Ok(()) }
    }
}

impl Log for Ring {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut text = Text {
            bytes: [0; limits::MAX_LOG_RECORD],
            len: 0,
        };
        // A message that does not fit is cut: an error here says no more than that.
        let _ = if record.level() >= Level::Debug {
            write!(text, "{}: {}", record.target(), record.args())
        } else {
            write!(text, "{}", record.args())
        };
        write(record.level(), &text.bytes[..text.len]);
    }

    fn flush(&self) {}
}

/// Makes the `log` crate write to the ring.
pub(crate) fn init(level: LevelFilter) {
    if log::set_logger(&Ring).is_ok() {
        log::set_max_level(level);
    }
}
