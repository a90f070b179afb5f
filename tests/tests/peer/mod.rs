//! The other end of the test image's protocol (`tests/images/src/net.rs`), on Linux.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use hyv_e2e::{PATIENCE, Random, seed};

const LEN: u64 = 8 << 20;

/// As the image's.
struct Sequence(u64);

impl Sequence {
    fn bytes(seed: u64, len: u64) -> Vec<u8> {
        let mut s = Self(seed | 1);
        (0..len).map(|_| s.next()).collect()
    }

    fn next(&mut self) -> u8 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
    }
}

fn request(what: u8, a: u64, b: u64) -> Vec<u8> {
    [&[what][..], &a.to_le_bytes(), &b.to_le_bytes()].concat()
}

fn connect(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap_or_else(|e| panic!("{to}: {e}"));
    stream
        .set_read_timeout(Some(PATIENCE))
        .expect("a socket takes a limit");
    stream
        .set_write_timeout(Some(PATIENCE))
        .expect("a socket takes a limit");
    stream
}

fn read(stream: &mut TcpStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).expect("the guest sends");
    bytes
}

/// Makes all requests of a guest's server at `to`. `resets`: the way there passes resets on.
pub fn check_server(to: SocketAddr, resets: bool) {
    let mut stream = connect(to);
    stream
        .write_all(&request(b'p', LEN, 5))
        .expect("the guest reads");
    stream
        .write_all(&Sequence::bytes(5, LEN))
        .expect("the guest reads");
    assert_eq!(read(&mut stream, 1), [1], "the guest received other bytes");
    stream
        .write_all(&request(b'g', LEN, 6))
        .expect("the guest reads");
    assert!(
        read(&mut stream, LEN as usize) == Sequence::bytes(6, LEN),
        "other bytes than the guest sent"
    );
    stream
        .write_all(&request(b'e', 100 * 300, 0))
        .expect("the guest reads");
    for i in 0..100 {
        stream.write_all(&[i; 300]).expect("the guest reads");
        assert_eq!(read(&mut stream, 300), [i; 300]);
    }
    // Half closed, the answer still comes, and then the end.
    stream
        .write_all(&request(b'g', 1000, 7))
        .expect("the guest reads");
    stream.shutdown(Shutdown::Write).expect("a connection ends");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).expect("the guest closes");
    assert!(rest == Sequence::bytes(7, 1000), "{} bytes", rest.len());

    let mut stream = connect(to);
    stream
        .write_all(&request(b'r', 0, 0))
        .expect("the guest reads");
    match stream.read(&mut [0; 8]) {
        Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset),
        // QEMU's user networking makes an ordinary end of it.
        Ok(n) => assert!(n == 0 && !resets, "{n} bytes instead of a reset"),
    }

    // A peer that breaks off in the middle does not disturb the next.
    let mut stream = connect(to);
    stream
        .write_all(&request(b'g', LEN, 8))
        .expect("the guest reads");
    read(&mut stream, 1000);
    reset(stream);
    // Several at once: they wait for their turn.
    let mut streams: Vec<_> = (0..4).map(|_| connect(to)).collect();
    for (i, stream) in (0..).zip(&mut streams) {
        stream
            .write_all(&request(b'g', 5000, i))
            .expect("the guest reads");
        stream.shutdown(Shutdown::Write).expect("a connection ends");
    }
    for (i, stream) in (0..).zip(&mut streams) {
        assert!(
            read(stream, 5000) == Sequence::bytes(i, 5000),
            "connection {i}"
        );
    }
}

/// `rounds` bytes there and back, each after a pause of random length.
pub fn pauses(to: SocketAddr, rounds: u64) {
    let mut random = Random::new(seed());
    let mut stream = connect(to);
    stream.set_nodelay(true).expect("a socket takes an option");
    stream
        .write_all(&request(b'e', rounds, 0))
        .expect("the guest reads");
    for round in 0..rounds {
        let us = random.below(if round % 8 == 0 { 20_000 } else { 600 }) as u64;
        std::thread::sleep(Duration::from_micros(us));
        stream.write_all(&[round as u8]).expect("the guest reads");
        assert_eq!(read(&mut stream, 1), [round as u8], "round {round}");
    }
}

/// Closes with a reset.
fn reset(stream: TcpStream) {
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO))
        .expect("a socket takes a limit");
}

/// A port of this host at which nobody listens.
pub fn closed_port() -> u16 {
    let listener = TcpListener::bind(("::", 0)).expect("there is a free port");
    listener.local_addr().expect("it has an address").port()
}

/// A server for a guest's calls. Its threads end with the test.
pub struct Peer {
    port: u16,
}

impl Peer {
    /// Listens at `at`.
    ///
    /// # Errors
    /// When this host does not have the address.
    pub fn start(at: SocketAddr) -> std::io::Result<Self> {
        let listener = TcpListener::bind(at)?;
        let port = listener.local_addr()?.port();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || serve(stream));
            }
        });
        Ok(Self { port })
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

/// What goes wrong here shows at the guest.
fn serve(mut stream: TcpStream) -> Option<()> {
    loop {
        let mut head = [0; 17];
        stream.read_exact(&mut head).ok()?;
        let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
        let (a, b) = (word(1), word(9));
        match head[0] {
            b'p' => {
                let mut bytes = vec![0; a as usize];
                stream.read_exact(&mut bytes).ok()?;
                let right = bytes == Sequence::bytes(b, a);
                stream.write_all(&[u8::from(right)]).ok()?;
            }
            b'g' => stream.write_all(&Sequence::bytes(b, a)).ok()?,
            b'e' => {
                let mut echo = (&stream).take(a);
                std::io::copy(&mut echo, &mut &stream).ok()?;
            }
            b'r' => {
                reset(stream);
                return None;
            }
            _ => while stream.read(&mut head).ok()? != 0 {},
        }
    }
}
