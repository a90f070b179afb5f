//! Copies between lists of pieces, a slice at a time.

use crate::limits::SLICE;
use crate::mem::Bytes;

/// Copies one slice of a message of `total` bytes, from byte `done` on; gives how much.
#[inline]
pub(super) fn copy(src: &[Bytes], dst: &[Bytes], done: u64, total: u64) -> u64 {
    let end = total.min(done + u64::from(SLICE));
    let (mut s, mut d) = (Cursor::new(src, done), Cursor::new(dst, done));
    let mut at = done;
    while at < end {
        let (Some(from), Some(to)) = (s.take(end - at), d.take(end - at)) else {
            break;
        };
        let n = from.len().min(to.len());
        from.copy_to(&to);
        s.skip(n);
        d.skip(n);
        at += n;
    }
    at - done
}

/// Copies the `total` bytes of an inline message.
#[inline]
pub(super) fn copy_inline(words: &[u64], dst: &[Bytes], total: u64) -> u64 {
    match dst {
        [one, ..] if one.len() >= total => one.store_words(words, total),
        _ => return copy(&[Bytes::words(words, total)], dst, 0, total),
    }
    total
}

/// A position in a list of pieces.
struct Cursor<'a> {
    pieces: &'a [Bytes],
    offset: u64,
}

impl<'a> Cursor<'a> {
    #[inline]
    fn new(pieces: &'a [Bytes], offset: u64) -> Self {
        let mut c = Self { pieces, offset };
        c.settle();
        c
    }

    #[inline]
    fn settle(&mut self) {
        while let Some((first, rest)) = self.pieces.split_first()
            && self.offset >= first.len()
        {
            self.offset -= first.len();
            self.pieces = rest;
        }
    }

    #[inline]
    fn take(&self, most: u64) -> Option<Bytes> {
        let first = self.pieces.first()?;
        first.sub(self.offset, most.min(first.len() - self.offset))
    }

    #[inline]
    fn skip(&mut self, n: u64) {
        self.offset += n;
        self.settle();
    }
}
