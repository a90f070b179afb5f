//! What the stack runs on.

/// A network card that takes and gives Ethernet frames.
pub trait Nic {
    /// Its hardware address, which is unicast.
    fn mac(&self) -> [u8; 6];

    /// Largest IP packet, bytes.
    fn mtu(&self) -> u16;

    /// Copies the next frame that arrived to `into`, which has room for an MTU and an Ethernet header. Its length, or none.
    fn receive(&mut self, into: &mut [u8]) -> Option<usize>;

    /// Whether [`Nic::send`] has room for a frame.
    fn can_send(&mut self) -> bool;

    /// Sends `frame`, or drops it where there is no room.
    fn send(&mut self, frame: &[u8]);

    /// Tells the device what was given to it since the last time.
    fn flush(&mut self);

    /// Asks for a wake-up when a frame arrives, or, where there is no room to send, when there is some. True if that is so already: then
    /// do not sleep.
    fn arm(&mut self) -> bool;

    /// No wake-ups any more.
    fn disarm(&mut self);
}

/// Time, sleep and the host.
pub trait Surroundings {
    /// Nanoseconds since some fixed moment.
    fn now_ns(&self) -> u64;

    /// Wake-ups so far.
    fn wake_seen(&self) -> u64;

    /// Sleeps until a wake-up, at most to `deadline_ns` on the clock of [`Surroundings::now_ns`]; not at all if there was a wake-up since
    /// [`Surroundings::wake_seen`] was `seen`. May return early.
    fn wait(&self, seen: u64, deadline_ns: u64);

    /// How long to poll before a sleep, ns: a wake-up costs some tens of microseconds, a neighbour's core may cost more.
    fn spin_ns(&self) -> u64;

    /// The longest sleep, ns: so often the host's heartbeat and request to end are looked at even if no wake-up comes.
    fn max_sleep_ns(&self) -> u64;

    /// Whether the host asked this guest to end.
    fn ending(&self) -> bool;
}
