//! TCP as server and as client. Peers speak a protocol of requests: a byte that says what, then two little-endian words.
//!
//! | request | words | then |
//! | --- | --- | --- |
//! | `p` (put) | length, seed | so many bytes of the sequence; the other side answers 1 byte: 1 if they are right |
//! | `g` (get) | length, seed | the other side sends so many bytes of the sequence |
//! | `e` (echo) | length, 0 | the other side sends back so many bytes as they come |
//! | `r` (reset) | 0, 0 | the other side breaks the connection off |
//! | `s` (silence) | 0, 0 | the other side says nothing more, and closes when its peer does |

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use core::time::Duration;

use hyv_unikernel::log::{info, warn};
use hyv_unikernel::net::{self, Error, IpAddress, Net, TcpListener, TcpStream};
use hyv_unikernel::{memory, rt};

use crate::Verdict;

const REQUEST: usize = 17;
const CHUNK: usize = 16 << 10;
const LIMIT: Duration = Duration::from_secs(20);

/// xorshift64*, a byte at a time: both sides make the same sequence.
struct Sequence(u64);

impl Sequence {
    fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    fn fill(&mut self, to: &mut [u8]) {
        for b in to {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            *b = (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8;
        }
    }
}

fn up() -> Result<Net, String> {
    let net = net::up().map_err(|e| e.to_string())?;
    for a in net.addresses() {
        info!("address {a}");
    }
    Ok(net)
}

fn number(key: &str) -> Option<u64> {
    rt::args().get(key).and_then(|v| v.parse().ok())
}

fn send(stream: &mut TcpStream, len: u64, seed: u64) -> Result<(), Error> {
    let mut sequence = Sequence::new(seed);
    let mut chunk = vec![0; CHUNK];
    let mut left = len;
    while left > 0 {
        let n = left.min(CHUNK as u64);
        let piece = &mut chunk[..n as usize];
        sequence.fill(piece);
        stream.write_all(piece)?;
        left -= n;
    }
    Ok(())
}

/// Whether what arrives is the sequence.
fn receive(stream: &mut TcpStream, len: u64, seed: u64) -> Result<bool, Error> {
    let mut sequence = Sequence::new(seed);
    let (mut chunk, mut wanted) = (vec![0; CHUNK], vec![0; CHUNK]);
    let (mut left, mut right) = (len, true);
    while left > 0 {
        let n = left.min(CHUNK as u64) as usize;
        stream.read_exact(&mut chunk[..n])?;
        sequence.fill(&mut wanted[..n]);
        right &= chunk[..n] == wanted[..n];
        left -= n as u64;
    }
    Ok(right)
}

fn request(what: u8, a: u64, b: u64) -> [u8; REQUEST] {
    let mut request = [what; REQUEST];
    request[1..9].copy_from_slice(&a.to_le_bytes());
    request[9..].copy_from_slice(&b.to_le_bytes());
    request
}

/// Serves one connection to its end.
fn answer(mut stream: TcpStream) -> Result<(), Error> {
    stream.set_timeout(Some(LIMIT));
    loop {
        let mut head = [0; REQUEST];
        if stream.read(&mut head[..1])? == 0 {
            return stream.close();
        }
        stream.read_exact(&mut head[1..])?;
        let word = |at: usize| {
            head[at..]
                .first_chunk()
                .map_or(0, |w| u64::from_le_bytes(*w))
        };
        let (a, b) = (word(1), word(9));
        match head[0] {
            b'p' => {
                let right = receive(&mut stream, a, b)?;
                stream.write_all(&[u8::from(right)])?;
            }
            b'g' => send(&mut stream, a, b)?,
            b'e' => {
                let mut chunk = vec![0; CHUNK];
                let mut left = a;
                while left > 0 {
                    let most = left.min(CHUNK as u64) as usize;
                    let n = stream.read(&mut chunk[..most])?;
                    if n == 0 {
                        return Err(Error::UnexpectedEnd);
                    }
                    stream.write_all(&chunk[..n])?;
                    left -= n as u64;
                }
            }
            b'r' => {
                stream.reset();
                return Ok(());
            }
            _ => while stream.read(&mut head)? != 0 {},
        }
    }
}

/// Takes `hog` MiB of RAM first, if asked to. Serves at `port`, one connection after the other, until the host asks it to end.
pub(crate) fn serve() -> Verdict {
    if let Some(mib) = number("hog") {
        memory::take((mib as usize) << 20).ok_or("hog: too little RAM")?;
    }
    let net = up()?;
    let port = number("port").unwrap_or(7000) as u16;
    let mut listener = TcpListener::bind(&net, port).map_err(|e| e.to_string())?;
    let again = TcpListener::bind(&net, port).map(|_| ());
    if again != Err(Error::PortInUse(port)) {
        return Err(format!("port {port} was given twice: {again:?}"));
    }
    rt::ready();
    let mut served = 0;
    loop {
        match listener.accept(None) {
            Ok(stream) => {
                info!("from {:?}", stream.peer());
                match answer(stream) {
                    Ok(()) => served += 1,
                    Err(e) => warn!("connection ended: {e}"),
                }
            }
            Err(Error::Ending) => break,
            Err(e) => return Err(e.to_string()),
        }
    }
    info!("served {served}");
    Ok(())
}

/// Calls `to` at `port` and makes each request of the protocol, `len` bytes for the long ones; then what must fail: nobody listens at
/// `closed`, and nobody answers at `silent`.
pub(crate) fn calls() -> Verdict {
    let net = up()?;
    let to = rt::args().get("to").ok_or("say to=ADDRESS")?;
    let to: IpAddress = to.parse().map_err(|()| "to: no address")?;
    let port = number("port").ok_or("say port=PORT")? as u16;
    let len = number("len").unwrap_or(8 << 20);
    rt::ready();
    let open = || {
        let mut stream = TcpStream::connect(&net, to, port, Some(LIMIT))?;
        stream.set_timeout(Some(LIMIT));
        Ok::<_, Error>(stream)
    };
    let transfers = || -> Result<bool, Error> {
        let mut stream = open()?;
        stream.write_all(&request(b'p', len, 11))?;
        send(&mut stream, len, 11)?;
        let mut right = [0];
        stream.read_exact(&mut right)?;
        stream.write_all(&request(b'g', len, 12))?;
        let got = receive(&mut stream, len, 12)?;
        let mut echoed = true;
        stream.write_all(&request(b'e', 100 * 512, 0))?;
        for i in 0..100_u8 {
            let mut back = [0; 512];
            stream.write_all(&[i; 512])?;
            stream.read_exact(&mut back)?;
            echoed &= back == [i; 512];
        }
        // A half-closed connection still reads.
        stream.write_all(&request(b'g', 1000, 13))?;
        stream.finish();
        let late = receive(&mut stream, 1000, 13)?;
        let end = stream.read(&mut [0; 8])?;
        let closed = stream.write(b"x") == Err(Error::Closed);
        stream.close()?;
        Ok(right == [1] && got && echoed && late && end == 0 && closed)
    };
    match transfers() {
        Ok(true) => info!("transfers are right"),
        Ok(false) => return Err("bytes were changed on their way".to_string()),
        Err(e) => return Err(format!("transfers: {e}")),
    }

    let must_fail = |what: &str, got: Result<(), Error>, wanted: Error| {
        if got == Err(wanted) {
            info!("{what}: {wanted}");
            Ok(())
        } else {
            Err(format!("{what}: {got:?} instead of {wanted:?}"))
        }
    };
    let asked = |what: u8, limit: Duration| {
        let mut stream = open()?;
        stream.write_all(&request(what, 0, 0))?;
        stream.set_timeout(Some(limit));
        stream.read(&mut [0; 8]).map(|_| ())
    };
    must_fail("reset", asked(b'r', LIMIT), Error::Reset)?;
    let short = Duration::from_millis(200);
    must_fail("silence", asked(b's', short), Error::TimedOut)?;
    if let Some(closed) = number("closed") {
        let got = TcpStream::connect(&net, to, closed as u16, Some(LIMIT)).map(|_| ());
        must_fail("closed port", got, Error::Refused)?;
    }
    if let Some(silent) = rt::args().get("silent") {
        let silent: IpAddress = silent.parse().map_err(|()| "silent: no address")?;
        let got = TcpStream::connect(&net, silent, port, Some(short)).map(|_| ());
        must_fail("silent host", got, Error::TimedOut)?;
    }
    let multicast: IpAddress = IpAddress::v4(0, 0, 0, 0);
    let got = TcpStream::connect(&net, multicast, port, Some(short)).map(|_| ());
    must_fail("no address", got, Error::Unaddressable)?;
    let mut listener = TcpListener::bind(&net, 1).map_err(|e| e.to_string())?;
    must_fail(
        "nobody calls",
        listener.accept(Some(short)).map(|_| ()),
        Error::TimedOut,
    )
}

/// There must be no network; logs why.
pub(crate) fn none() -> Verdict {
    match net::up() {
        Ok(_) => Err("there is a network".to_string()),
        Err(e) => {
            info!("as it should be: {e}");
            Ok(())
        }
    }
}
