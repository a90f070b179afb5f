//! The Redis protocol, version 2: requests out, replies in. Replies are views into the receive buffer.

use std::io::Write as _;

/// Longest line of a reply that is no payload: error messages are far shorter.
const MAX_LINE_BYTES: usize = 64 << 10;

/// Largest string or longest list that is taken: Redis's own limit of a string is 512 MiB, and nothing here asks for more
/// than a hundred values of 1 MiB, one by one.
const MAX_LENGTH: usize = 1 << 29;

/// Lists in lists in lists: SCAN has two levels.
const MAX_DEPTH: u32 = 4;

/// One reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply<'a> {
    /// `+OK` and the like.
    Simple(&'a [u8]),
    /// `-ERR …`.
    Error(&'a [u8]),
    /// A number.
    Integer(i64),
    /// A string of bytes; none for what does not exist.
    Bulk(Option<&'a [u8]>),
    /// A list of so many replies, which follow.
    Array(List<'a>),
}

/// The elements of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct List<'a> {
    count: usize,
    bytes: &'a [u8],
}

impl<'a> List<'a> {
    /// How many.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The elements.
    pub fn iter(&self) -> impl Iterator<Item = Reply<'a>> + use<'a> {
        let (mut left, mut rest) = (self.count, self.bytes);
        std::iter::from_fn(move || {
            left = left.checked_sub(1)?;
            let (reply, used) = parse(rest).ok()??;
            rest = &rest[used..];
            Some(reply)
        })
    }
}

/// Bytes that are no reply.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("what came is no reply of Redis: {0}")]
pub struct BadReply(pub &'static str);

/// The first reply in `bytes` and its length; none if it is not all there yet.
///
/// # Errors
/// [`BadReply`], and nothing that follows can be understood.
pub fn parse(bytes: &[u8]) -> Result<Option<(Reply<'_>, usize)>, BadReply> {
    nested(bytes, 0)
}

fn nested(bytes: &[u8], depth: u32) -> Result<Option<(Reply<'_>, usize)>, BadReply> {
    let Some(end) = memchr::memchr(b'\n', &bytes[..bytes.len().min(MAX_LINE_BYTES)]) else {
        return if bytes.len() >= MAX_LINE_BYTES {
            Err(BadReply("a line that does not end"))
        } else {
            Ok(None)
        };
    };
    let line = bytes[..end]
        .strip_suffix(b"\r")
        .ok_or(BadReply("a line that ends without CR"))?;
    let (&kind, line) = line.split_first().ok_or(BadReply("an empty line"))?;
    let at = end + 1;
    Ok(Some(match kind {
        b'+' => (Reply::Simple(line), at),
        b'-' => (Reply::Error(line), at),
        b':' => (Reply::Integer(number(line)?), at),
        b'$' => match length(line)? {
            None => (Reply::Bulk(None), at),
            Some(n) => {
                let Some(tail) = bytes.get(at..at + n + 2) else {
                    return Ok(None);
                };
                let data = tail
                    .strip_suffix(b"\r\n")
                    .ok_or(BadReply("a string without its end"))?;
                (Reply::Bulk(Some(data)), at + n + 2)
            }
        },
        b'*' => {
            let count = length(line)?.unwrap_or(0);
            if depth == MAX_DEPTH {
                return Err(BadReply("lists nested too deeply"));
            }
            let mut used = at;
            for _ in 0..count {
                match nested(&bytes[used..], depth + 1)? {
                    Some((_, more)) => used += more,
                    None => return Ok(None),
                }
            }
            let bytes = &bytes[at..used];
            (Reply::Array(List { count, bytes }), used)
        }
        _ => return Err(BadReply("an unknown kind of reply")),
    }))
}

fn number(line: &[u8]) -> Result<i64, BadReply> {
    std::str::from_utf8(line)
        .ok()
        .and_then(|t| t.parse().ok())
        .ok_or(BadReply("no number where one is due"))
}

fn length(line: &[u8]) -> Result<Option<usize>, BadReply> {
    match number(line)? {
        -1 => Ok(None),
        n => usize::try_from(n)
            .ok()
            .filter(|n| *n <= MAX_LENGTH)
            .map(Some)
            .ok_or(BadReply("a length that cannot be")),
    }
}

/// Adds a request of these words to `out`.
pub fn request(out: &mut Vec<u8>, words: &[&[u8]]) {
    begin(out, words.len());
    for w in words {
        word(out, w);
    }
}

/// Adds the head of a request of `count` words, which [`word`] adds.
pub fn begin(out: &mut Vec<u8>, count: usize) {
    head(out, b'*', count);
}

/// Adds one word of a request.
pub fn word(out: &mut Vec<u8>, word: &[u8]) {
    head(out, b'$', word.len());
    out.extend_from_slice(word);
    out.extend_from_slice(b"\r\n");
}

fn head(out: &mut Vec<u8>, kind: u8, n: usize) {
    out.push(kind);
    // Writing to memory does not fail.
    let _ = write!(out, "{n}\r\n");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_are_those_of_the_protocol() {
        let mut out = Vec::new();
        request(&mut out, &[b"SET", b"k\r\n", b""]);
        assert_eq!(out, b"*3\r\n$3\r\nSET\r\n$3\r\nk\r\n\r\n$0\r\n\r\n");
    }

    #[test]
    fn replies() {
        let whole: [(&[u8], Reply<'_>); 7] = [
            (b"+OK\r\n", Reply::Simple(b"OK")),
            (b"-ERR no\r\n", Reply::Error(b"ERR no")),
            (b":-7\r\n", Reply::Integer(-7)),
            (
                b"$3\r\na\r\n\r\n",
                Reply::Bulk(Some(b"a\r\n"[..].get(..3).unwrap())),
            ),
            (b"$0\r\n\r\n", Reply::Bulk(Some(b""))),
            (b"$-1\r\n", Reply::Bulk(None)),
            (
                b"*-1\r\n",
                Reply::Array(List {
                    count: 0,
                    bytes: b"",
                }),
            ),
        ];
        for (bytes, reply) in whole {
            assert_eq!(parse(bytes), Ok(Some((reply, bytes.len()))), "{bytes:?}");
            for cut in 0..bytes.len() {
                assert_eq!(parse(&bytes[..cut]), Ok(None), "{bytes:?} cut at {cut}");
            }
            let more = [bytes, b"+more\r\n"].concat();
            assert_eq!(parse(&more), Ok(Some((reply, bytes.len()))));
        }
    }

    #[test]
    fn what_scan_says() {
        let bytes = b"*2\r\n$2\r\n17\r\n*2\r\n$1\r\na\r\n$2\r\nbb\r\n";
        let Ok(Some((Reply::Array(outer), used))) = parse(bytes) else {
            panic!("a list")
        };
        assert_eq!((used, outer.len()), (bytes.len(), 2));
        let parts: Vec<_> = outer.iter().collect();
        assert_eq!(parts[0], Reply::Bulk(Some(b"17")));
        let Reply::Array(keys) = parts[1] else {
            panic!("a list of keys")
        };
        let keys: Vec<_> = keys.iter().collect();
        assert_eq!(keys, [Reply::Bulk(Some(b"a")), Reply::Bulk(Some(b"bb"))]);
        for cut in 0..bytes.len() {
            assert_eq!(parse(&bytes[..cut]), Ok(None));
        }
    }

    #[test]
    fn what_is_no_reply() {
        let deep = b"*1\r\n".repeat(6);
        for bytes in [
            &b"\r\n"[..],
            b"OK\r\n",
            b"+OK\n",
            b":x\r\n",
            b"$-2\r\n",
            b"$99999999999\r\n",
            b"$1\r\nabc",
            &deep,
            &b"+".repeat(MAX_LINE_BYTES),
        ] {
            assert!(parse(bytes).is_err(), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(proptest::sample::select(b"+-:$*0123\r\nab".as_slice()), 0..200)) {
            if let Ok(Some((reply, used))) = parse(&bytes) {
                prop_assert!(used <= bytes.len());
                if let Reply::Array(list) = reply {
                    prop_assert_eq!(list.iter().count(), list.len());
                }
            }
        }
    }
}
