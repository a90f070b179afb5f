//! Connections that block, with time limits.

use alloc::vec::Vec;
use core::fmt;
use core::time::Duration;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{RecvError, Socket, State};
use smoltcp::wire::{IpAddress, IpEndpoint};

use crate::error::Error;
use crate::limits::{BACKLOG, HANDSHAKE_TIMEOUT, LINGER};
use crate::stack::{Net, Stack};

/// Accepts connections at a port, on all of this guest's addresses. Dropped, it refuses them, those not yet accepted too.
pub struct TcpListener {
    net: Net,
    port: u16,
    waiting: Vec<SocketHandle>,
}

impl fmt::Debug for TcpListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpListener({})", self.port)
    }
}

impl TcpListener {
    /// Listens on `port`. Up to [`BACKLOG`] connections wait to be accepted.
    ///
    /// # Errors
    /// [`Error::PortInUse`].
    pub fn bind(net: &Net, port: u16) -> Result<Self, Error> {
        let waiting = net.with(|stack, _| {
            if port == 0 || !stack.claim(port) {
                return Err(Error::PortInUse(port));
            }
            Ok((0..BACKLOG).map(|_| listening(stack, port)).collect())
        })?;
        Ok(Self {
            net: net.clone(),
            port,
            waiting,
        })
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The next connection. `limit` none: waits for ever.
    ///
    /// # Errors
    /// [`Error::TimedOut`], [`Error::Ending`].
    pub fn accept(&mut self, limit: Option<Duration>) -> Result<TcpStream, Error> {
        let (port, waiting) = (self.port, &mut self.waiting);
        let socket = self
            .net
            .until(limit, true, |stack| next(stack, port, waiting).map(Ok))?;
        Ok(self.stream(socket))
    }

    /// The next connection if one is there; serves the network once.
    pub fn try_accept(&mut self) -> Option<TcpStream> {
        self.net.poll();
        let (port, waiting) = (self.port, &mut self.waiting);
        let socket = self.net.with(|stack, _| next(stack, port, waiting))?;
        Some(self.stream(socket))
    }

    fn stream(&self, socket: SocketHandle) -> TcpStream {
        TcpStream {
            net: self.net.clone(),
            socket,
            limit: None,
            finished: false,
        }
    }
}

impl Drop for TcpListener {
    fn drop(&mut self) {
        self.net.with(|stack, now| {
            stack.unclaim(self.port);
            for &socket in &self.waiting {
                if stack.tcp(socket).is_listening() {
                    stack.sockets.remove(socket);
                } else {
                    stack.tcp(socket).abort();
                    stack.leave(socket, now);
                }
            }
        });
        self.net.poll();
    }
}

fn listening(stack: &mut Stack, port: u16) -> SocketHandle {
    let socket = stack.add_tcp();
    listen(stack.tcp(socket), port);
    socket
}

fn listen(socket: &mut Socket<'_>, port: u16) {
    socket.set_timeout(Some(HANDSHAKE_TIMEOUT.into()));
    // Refuses port 0 and open sockets, which this is not.
    let _ = socket.listen(port);
}

/// Takes the first connection that is complete, with a new socket in its place.
fn next(stack: &mut Stack, port: u16, waiting: &mut [SocketHandle]) -> Option<SocketHandle> {
    for place in waiting {
        let socket = stack.tcp(*place);
        match socket.state() {
            State::Established | State::CloseWait => {
                socket.set_timeout(None);
                let new = listening(stack, port);
                return Some(core::mem::replace(place, new));
            }
            // Its peer gave up before it was accepted.
            State::Closed if socket.remote_endpoint().is_none() => listen(socket, port),
            _ => {}
        }
    }
    None
}

/// A connection. Dropped, it is closed in the background, as long as somebody serves the network: a guest that ends should call
/// [`TcpStream::close`], which waits.
pub struct TcpStream {
    net: Net,
    socket: SocketHandle,
    limit: Option<Duration>,
    /// Our side sends no more.
    finished: bool,
}

impl fmt::Debug for TcpStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpStream({:?})", self.peer())
    }
}

impl TcpStream {
    /// Connects to `port` at `address`. `limit` none: tries for ever.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::TimedOut`] after `limit`, [`Error::Unaddressable`], [`Error::NoPort`], [`Error::Ending`].
    pub fn connect(
        net: &Net,
        address: impl Into<IpAddress>,
        port: u16,
        limit: Option<Duration>,
    ) -> Result<Self, Error> {
        let to = IpEndpoint::new(address.into(), port);
        let socket = net.with(|stack, _| {
            let socket = stack.add_tcp();
            stack.connect(socket, to).map(|()| socket).inspect_err(|_| {
                stack.sockets.remove(socket);
            })
        })?;
        // Owned from here on, so that whatever ends this ends the connection.
        let mut stream = Self {
            net: net.clone(),
            socket,
            limit: None,
            finished: false,
        };
        let connected = net.until(limit, true, |stack| match stack.tcp(socket).state() {
            State::SynSent | State::SynReceived => None,
            State::Closed => Some(Err(Error::Refused)),
            _ => Some(Ok(())),
        });
        connected.inspect_err(|_| stream.abort())?;
        Ok(stream)
    }

    /// How long each of the following calls may wait; none: for ever.
    pub fn set_timeout(&mut self, limit: Option<Duration>) {
        self.limit = limit;
    }

    /// The peer; none when the connection is over.
    #[must_use]
    pub fn peer(&self) -> Option<IpEndpoint> {
        self.net.with(|s, _| s.tcp(self.socket).remote_endpoint())
    }

    /// This side; none when the connection is over.
    #[must_use]
    pub fn local(&self) -> Option<IpEndpoint> {
        self.net.with(|s, _| s.tcp(self.socket).local_endpoint())
    }

    /// Reads at least one byte; 0 when the peer has closed its side, or `to` is empty.
    ///
    /// # Errors
    /// [`Error::Reset`], [`Error::TimedOut`], [`Error::Ending`].
    pub fn read(&mut self, to: &mut [u8]) -> Result<usize, Error> {
        if to.is_empty() {
            return Ok(0);
        }
        let socket = self.socket;
        self.net.until(self.limit, true, |stack| {
            match stack.tcp(socket).recv_slice(to) {
                Ok(0) => None,
                Ok(n) => Some(Ok(n)),
                Err(RecvError::Finished) => Some(Ok(0)),
                Err(RecvError::InvalidState) => Some(Err(Error::Reset)),
            }
        })
    }

    /// Fills `to`. The time limit is for each piece.
    ///
    /// # Errors
    /// [`Error::UnexpectedEnd`], and as [`TcpStream::read`].
    pub fn read_exact(&mut self, mut to: &mut [u8]) -> Result<(), Error> {
        while !to.is_empty() {
            match self.read(to)? {
                0 => return Err(Error::UnexpectedEnd),
                n => to = &mut to[n..],
            }
        }
        Ok(())
    }

    /// Takes at least one byte of `from` on its way, unless that is empty. How many.
    ///
    /// # Errors
    /// [`Error::Reset`], [`Error::Closed`], [`Error::TimedOut`], [`Error::Ending`].
    pub fn write(&mut self, from: &[u8]) -> Result<usize, Error> {
        if self.finished {
            return Err(Error::Closed);
        }
        if from.is_empty() {
            return Ok(0);
        }
        let socket = self.socket;
        self.net.until(self.limit, true, |stack| {
            match stack.tcp(socket).send_slice(from) {
                Ok(0) => None,
                Ok(n) => Some(Ok(n)),
                Err(_) => Some(Err(Error::Reset)),
            }
        })
    }

    /// Takes all of `from` on its way. The time limit is for each piece.
    ///
    /// # Errors
    /// As [`TcpStream::write`].
    pub fn write_all(&mut self, mut from: &[u8]) -> Result<(), Error> {
        while !from.is_empty() {
            let n = self.write(from)?;
            from = &from[n..];
        }
        Ok(())
    }

    /// Waits until the peer has confirmed all that was written.
    ///
    /// # Errors
    /// As [`TcpStream::write`].
    pub fn flush(&mut self) -> Result<(), Error> {
        let socket = self.socket;
        self.net
            .until(self.limit, true, |stack| confirmed(stack.tcp(socket)))
    }

    /// Ends this side: the peer reads to the end of what was written, then 0. Reading goes on.
    pub fn finish(&mut self) {
        self.finished = true;
        self.net.with(|stack, _| stack.tcp(self.socket).close());
        self.net.poll();
    }

    /// Ends this side, and waits until the peer has confirmed everything (the usual limit, or 10 s).
    ///
    /// # Errors
    /// [`Error::Reset`], [`Error::TimedOut`]: the peer may not have got it all.
    pub fn close(mut self) -> Result<(), Error> {
        self.finish();
        let (socket, limit) = (self.socket, self.limit.unwrap_or(LINGER));
        // Not ended by the host's request: this is how a guest that is asked to end does so in order.
        self.net.until(Some(limit), false, |stack| {
            let socket = stack.tcp(socket);
            match socket.state() {
                State::FinWait2 | State::TimeWait | State::Closed => confirmed(socket),
                _ => None,
            }
        })
    }

    /// Breaks the connection off: the peer sees a reset.
    pub fn reset(mut self) {
        self.abort();
    }

    fn abort(&mut self) {
        self.net.with(|stack, _| stack.tcp(self.socket).abort());
        self.net.poll();
    }
}

/// Everything written is confirmed, or never will be.
fn confirmed(socket: &Socket<'_>) -> Option<Result<(), Error>> {
    match (socket.send_queue(), socket.state()) {
        (0, _) => Some(Ok(())),
        (_, State::Closed) => Some(Err(Error::Reset)),
        _ => None,
    }
}

impl Drop for TcpStream {
    fn drop(&mut self) {
        self.net.with(|stack, now| stack.leave(self.socket, now));
        self.net.poll();
    }
}
