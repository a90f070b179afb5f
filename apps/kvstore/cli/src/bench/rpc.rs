//! The store of this project as a [`Target`], by requests over verbs or by one-sided reads: the one place that knows its client.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hyv_host::sys::clock;
use hyv_host::sys::window::SharedWindow;
use hyv_lab::median;
use hyv_rnic::cell::Inline;
use hyv_verbs::probe::{self, Lines};
use kvstore::client::{Client, ClientConfig, ClientError, OneSidedCounters, Operation, Ticket};
use kvstore::limits::EAGER_VALUE_BYTES;
use kvstore::proto::{REQUEST_HEADER_BYTES, Reply, StatsReply, Status};
use kvstore::store::entry::{ENTRY_HEADER_BYTES, entry_bytes};
use kvstore::store::{CleanerMode, DEFAULT_TABLE};

use super::limits::{FLOOR_ROUNDS, KEY_BYTES, LOCATIONS_PER_RECORD, MAX_LOCATIONS, SILENCE};
use super::slice::looked_at;
use super::target::{Outcome, Request, Target};

/// Silence after which a probe has failed, ns.
const PROBE_SILENCE_NS: u64 = 200_000_000;
/// Floors that may fail one after the other: a server gives a probe up when it is kept from running for a while.
const LOST_PROBES: u32 = 20;
/// How long the READ of a store's superblock may take.
const PREPARING: Duration = Duration::from_secs(2);
/// Turns without a reply between looks at the clock.
const PATIENCE: u32 = 1 << 14;

/// Who is asked about the reply to a request with this tag.
#[derive(Clone, Copy, Debug)]
enum Waiting {
    Nobody,
    /// A ticket's only request.
    Ticket(u32),
    /// A ticket's page of objects.
    Page(u32),
    /// A value of a ticket's scan that was left out of its page.
    Part(u32),
}

/// A scan under way.
#[derive(Clone, Copy, Debug, Default)]
struct Scan {
    /// Objects wanted that were on no page so far.
    wanted: u16,
    /// Values that were left out of pages: asked for, or about to be.
    open: u32,
}

/// One connection.
struct Lane {
    client: Client,
    /// By tag.
    waiting: Vec<Waiting>,
    /// Values left out of scans' pages that found no room yet.
    queue: VecDeque<(u32, Vec<u8>)>,
    /// Pages of scans to ask for: ticket and cursor.
    pages: VecDeque<(u32, u64)>,
}

/// How values are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// By requests; replies hold the values.
    Eager,
    /// By requests; values do not fit a reply.
    Large,
    /// By this side alone, as far as it can.
    OneSided,
}

/// Connections to one server.
pub struct Rpc<'a> {
    lanes: Vec<Lane>,
    scans: Vec<Scan>,
    /// With it, this thread drives the engine.
    pub inline: Option<Inline<'a>>,
    /// The server's window, where the probe line is; none in another process.
    window: Option<Arc<SharedWindow>>,
    way: Way,
    hz: f64,
    /// Floors that failed one after the other.
    lost_probes: u32,
}

impl<'a> Rpc<'a> {
    /// Over connections to one server, for values of `value_size` bytes.
    ///
    /// # Errors
    /// When buffers for large values cannot be had.
    pub fn new(
        clients: Vec<Client>,
        window: Option<Arc<SharedWindow>>,
        value_size: usize,
    ) -> Result<Self> {
        let lane = |mut client: Client| -> Result<Lane> {
            // Registering needs the engine, which whoever drives it cannot wait for later.
            client.prepare_large()?;
            // Nor for what a new connection takes.
            client.set_reconnect(None);
            Ok(Lane {
                waiting: vec![Waiting::Nobody; client.window()],
                client,
                queue: VecDeque::new(),
                pages: VecDeque::new(),
            })
        };
        Ok(Self {
            lanes: clients.into_iter().map(lane).collect::<Result<_>>()?,
            scans: Vec::new(),
            inline: None,
            window,
            way: if value_size > EAGER_VALUE_BYTES {
                Way::Large
            } else {
                Way::Eager
            },
            hz: clock::tsc_hz() as f64,
            lost_probes: 0,
        })
    }

    /// Has values read one-sidedly from now on. The engine must be driven by another thread, and the server run.
    ///
    /// # Errors
    /// When the server does not let its clients READ its memory.
    pub fn read_one_sided(mut self) -> Result<Self> {
        for lane in &mut self.lanes {
            // Takes a control verb, which whoever drives the engine cannot wait for later.
            lane.client.prepare_one_sided()?;
            let start = Instant::now();
            while !lane.client.is_one_sided() {
                lane.client.poll(|_, _| {})?;
                if start.elapsed() > PREPARING {
                    bail!("the server does not let its clients READ its memory");
                }
                std::thread::yield_now();
            }
        }
        self.way = Way::OneSided;
        Ok(self)
    }

    /// What one-sided reads of all connections came to so far; none where values are read by requests.
    #[must_use]
    pub fn one_sided_counters(&self) -> Option<OneSidedCounters> {
        (self.way == Way::OneSided).then(|| {
            let mut sum = OneSidedCounters::default();
            for c in self.lanes.iter().map(|l| l.client.one_sided_counters()) {
                sum.direct += c.direct;
                sum.by_table += c.by_table;
                sum.misses += c.misses;
                sum.doubts += c.doubts;
                sum.too_long += c.too_long;
            }
            sum
        })
    }

    /// Round trip of one cache line between this thread's core and the server's, median, ns; none where its window is
    /// out of reach, or one of the two was kept from running for too long.
    ///
    /// # Errors
    /// When the server does not take part at all.
    pub fn floor(&mut self) -> Result<Option<f64>> {
        let Some(window) = self.window.clone() else {
            return Ok(None);
        };
        let lines = Lines::one(&window);
        lines.reset();
        let rounds = 2 * FLOOR_ROUNDS;
        self.lanes[0].client.submit(&Operation::Probe { rounds })?;
        let start = Instant::now();
        let mut ready = false;
        while !ready {
            if let Some(inline) = &mut self.inline {
                inline.driver().poll();
            }
            self.lanes[0]
                .client
                .poll(|_, reply| ready = matches!(reply, Ok(Reply::Probe { .. })))?;
            if start.elapsed() > SILENCE {
                return Err(ClientError::Timeout(SILENCE).into());
            }
        }
        let bounce = |from, rounds| {
            probe::bounce(lines, from, rounds, PROBE_SILENCE_NS, clock::monotonic_ns)
        };
        let step = 32;
        let mut samples = Vec::new();
        let mut whole = bounce(0, FLOOR_ROUNDS);
        for k in 0..FLOOR_ROUNDS / step {
            let start = clock::tsc();
            whole = whole && bounce(FLOOR_ROUNDS + k * step, step);
            samples.push((clock::tsc() - start) as f64 / f64::from(step));
        }
        // The rounds that do not fill a batch: the server counts them.
        let filled = FLOOR_ROUNDS + FLOOR_ROUNDS / step * step;
        whole = whole && bounce(filled, FLOOR_ROUNDS % step);
        if !whole {
            self.lost_probes += 1;
            if self.lost_probes == LOST_PROBES {
                bail!("the server does not answer on the probe line");
            }
            return Ok(None);
        }
        self.lost_probes = 0;
        Ok(Some(median(&mut samples) * 1e9 / self.hz))
    }

    /// Asks the server for something that is not measured, while no request is under way; `take` keeps something of the reply, none: it
    /// is of another kind than was asked for.
    ///
    /// # Errors
    /// What the server says; when it is silent.
    pub fn ask<T>(
        &mut self,
        operation: &Operation<'_>,
        mut take: impl FnMut(Reply<'_>) -> Option<T>,
    ) -> Result<T> {
        let ticket = self.lanes[0].client.submit(operation)?;
        let (start, mut answer) = (Instant::now(), None);
        loop {
            if let Some(inline) = &mut self.inline {
                inline.driver().poll();
            }
            self.lanes[0].client.poll(|t, reply| {
                if t == ticket {
                    answer = Some(reply.map(&mut take));
                }
            })?;
            match answer.take() {
                Some(Ok(Some(found))) => return Ok(found),
                Some(Ok(None)) => bail!("the server's reply is of another kind than the request"),
                Some(Err(e)) => return Err(e.into()),
                None if start.elapsed() > SILENCE => {
                    return Err(ClientError::Timeout(SILENCE).into());
                }
                None if self.inline.is_none() => std::thread::yield_now(),
                None => {}
            }
        }
    }

    /// What the server counts.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn stats(&mut self) -> Result<StatsReply> {
        self.ask(&Operation::Stats, |reply| match reply {
            Reply::Stats(stats) => Some(stats.get()),
            _ => None,
        })
    }

    /// Says when the server's cleaner works, until the connection ends.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn set_cleaner(&mut self, mode: CleanerMode) -> Result<()> {
        self.ask(&Operation::Cleaner { mode }, |reply| {
            matches!(reply, Reply::Empty).then_some(())
        })
    }

    /// The first connection, for what is not measured.
    pub fn client(&mut self) -> &mut Client {
        &mut self.lanes[0].client
    }
}

impl Lane {
    /// Remembers who waits for `tag`; false if there was no room for the request.
    #[inline]
    fn begun(&mut self, tag: Result<Ticket, ClientError>, who: Waiting) -> Result<bool> {
        match tag {
            Ok(tag) => {
                self.waiting[usize::from(tag)] = who;
                Ok(true)
            }
            Err(ClientError::WindowFull) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    #[inline]
    fn read(&mut self, key: &[u8], way: Way, who: Waiting) -> Result<bool> {
        let tag = match way {
            Way::Eager => self.client.start_get(key),
            Way::Large => self.client.start_get_large(key),
            Way::OneSided => self.client.submit_one_sided(DEFAULT_TABLE, key),
        };
        self.begun(tag, who)
    }

    /// Asks for what scans still need, as far as there is room.
    fn go_on(&mut self, scans: &[Scan], way: Way) -> Result<()> {
        while let Some(&(ticket, cursor)) = self.pages.front() {
            let page = Operation::Enumerate {
                table: DEFAULT_TABLE,
                cursor,
                limit: scans[ticket as usize].wanted,
                values: true,
            };
            let tag = self.client.submit(&page);
            if !self.begun(tag, Waiting::Page(ticket))? {
                return Ok(());
            }
            self.pages.pop_front();
        }
        while let Some((ticket, key)) = self.queue.pop_front() {
            if !self.read(&key, way, Waiting::Part(ticket))? {
                self.queue.push_front((ticket, key));
                return Ok(());
            }
        }
        Ok(())
    }

    /// Takes replies; gives how many requests came to their end.
    #[inline]
    fn poll(
        &mut self,
        scans: &mut [Scan],
        sleep: bool,
        each: &mut impl FnMut(u32, Outcome<'_>),
    ) -> Result<usize> {
        let mut ended = 0;
        let Self {
            client,
            waiting,
            queue,
            pages,
        } = self;
        let take = |tag: Ticket, reply: Result<Reply<'_>, ClientError>| {
            let who = std::mem::replace(&mut waiting[usize::from(tag)], Waiting::Nobody);
            let ticket = match (who, &reply) {
                (Waiting::Ticket(ticket), _) => {
                    ended += 1;
                    return each(ticket, outcome(reply));
                }
                (Waiting::Nobody, _) => return,
                (Waiting::Page(ticket), Ok(Reply::Page(page))) => {
                    let scan = &mut scans[ticket as usize];
                    for object in page.objects().take(usize::from(scan.wanted)) {
                        scan.wanted -= 1;
                        if let Some(value) = object.value {
                            looked_at(value);
                        } else {
                            scan.open += 1;
                            queue.push_back((ticket, object.key.to_vec()));
                        }
                    }
                    match page.next() {
                        Some(next) if scan.wanted > 0 => pages.push_back((ticket, next)),
                        _ => scan.wanted = 0,
                    }
                    ticket
                }
                (Waiting::Page(ticket), _) => {
                    scans[ticket as usize] = Scan::default();
                    ended += 1;
                    return each(ticket, outcome(reply));
                }
                // A record that was removed meanwhile, or is somebody else's and large, has been looked for all the same.
                (Waiting::Part(ticket), _) => {
                    scans[ticket as usize].open -= 1;
                    ticket
                }
            };
            let scan = scans[ticket as usize];
            if scan.wanted == 0 && scan.open == 0 {
                ended += 1;
                each(ticket, Outcome::Done);
            }
        };
        if sleep {
            client.wait(take)?;
        } else {
            client.poll(take)?;
        }
        Ok(ended)
    }
}

#[inline]
fn outcome(reply: Result<Reply<'_>, ClientError>) -> Outcome<'_> {
    match reply {
        Ok(Reply::Value { value, .. }) => Outcome::Value(value),
        Ok(_) => Outcome::Done,
        Err(ClientError::Status {
            status: Status::NotFound,
            ..
        }) => Outcome::Missing,
        Err(ClientError::Status {
            status: Status::Busy,
            ..
        }) => Outcome::Busy,
        Err(e) => Outcome::Refused(e.to_string()),
    }
}

impl Target for Rpc<'_> {
    #[inline]
    fn submit(&mut self, ticket: u32, request: Request<'_>) -> Result<bool> {
        let at = ticket as usize % self.lanes.len();
        let lane = &mut self.lanes[at];
        let who = Waiting::Ticket(ticket);
        match request {
            Request::Read(key) => lane.read(key, self.way, who),
            Request::Write(key, value) => {
                let tag = lane.client.start_put(key, value);
                lane.begun(tag, who)
            }
            Request::Remove(key) => {
                let tag = lane.client.submit(&Operation::remove(DEFAULT_TABLE, key));
                lane.begun(tag, who)
            }
            Request::Scan { position, length } => {
                self.scans[ticket as usize] = Scan {
                    wanted: u16::from(length),
                    open: 0,
                };
                lane.pages.push_back((ticket, position));
                lane.go_on(&self.scans, self.way)?;
                Ok(true)
            }
        }
    }

    #[inline]
    fn wait(&mut self, each: &mut impl FnMut(u32, Outcome<'_>)) -> Result<()> {
        // A look at the clock costs as much as some requests: only who has waited for long needs one.
        let mut start = None;
        let mut turns = 0u32;
        loop {
            if let Some(inline) = &mut self.inline {
                inline.driver().poll();
            }
            // One connection that another thread serves: sleeping is allowed.
            let sleep = self.inline.is_none() && self.lanes.len() == 1;
            let mut ended = 0;
            for lane in &mut self.lanes {
                ended += lane.poll(&mut self.scans, sleep, each)?;
                if !lane.queue.is_empty() || !lane.pages.is_empty() {
                    lane.go_on(&self.scans, self.way)?;
                }
            }
            if ended > 0 {
                return Ok(());
            }
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(PATIENCE)
                && start.get_or_insert_with(Instant::now).elapsed() > SILENCE
            {
                return Err(ClientError::Timeout(SILENCE).into());
            }
            // Whoever drives the engine may need this core; and if nothing has come for a millisecond or so, anybody may.
            let patience = if self.inline.is_none() { 64 } else { PATIENCE };
            if turns.is_multiple_of(patience) {
                std::thread::yield_now();
            }
        }
    }

    fn prepare(&mut self, tickets: u32) {
        self.scans.resize(tickets as usize, Scan::default());
    }
}

/// Bytes of the messages of a read: the request for one of this measurement's keys (of the default table, without rules), and the
/// reply with a value of `value_size`.
#[must_use]
pub fn message_bytes(value_size: usize) -> [u32; 2] {
    // A reply is the log's entry as it is, without the padding after it.
    let request = REQUEST_HEADER_BYTES + KEY_BYTES;
    let reply = ENTRY_HEADER_BYTES + KEY_BYTES + value_size;
    [request as u32, reply as u32]
}

/// Bytes that a one-sided read of one of this measurement's keys takes, its place being known.
#[must_use]
pub const fn entry_read_bytes(value_size: usize) -> u32 {
    entry_bytes(KEY_BYTES, value_size) as u32
}

/// How a client is to be that reads `records` records one-sidedly.
#[must_use]
pub fn one_sided_config(records: u32) -> ClientConfig {
    ClientConfig {
        // Objects share sets of places by chance: with more places than records most of them keep theirs.
        locations: (records as usize)
            .saturating_mul(LOCATIONS_PER_RECORD)
            .next_power_of_two()
            .min(MAX_LOCATIONS),
        ..ClientConfig::default()
    }
}

/// Connects `count` times.
///
/// # Errors
/// The first connection that fails.
pub fn connect(count: u16, mut one: impl FnMut() -> Result<Client>) -> Result<Vec<Client>> {
    (0..count)
        .map(|i| one().with_context(|| format!("connection {} of {count}", i + 1)))
        .collect()
}

#[cfg(test)]
mod tests {
    use kvstore::proto::{Key, Request};
    use kvstore::store::{Config, RejectRules, Store};

    use super::*;
    use crate::bench::random::key;

    #[test]
    fn messages_and_entries_have_the_sizes_that_floors_are_measured_with() {
        let name = key(7);
        let request = Request::Read {
            table: DEFAULT_TABLE,
            key: Key::Inline(&name),
            rules: RejectRules::NONE,
            buffer: None,
        };
        let sent = request.emit(0, &mut [0; 64]).unwrap();
        let mut store = Store::new(
            vec![0; 64 << 20],
            Config {
                seed: 1,
                segment_bytes: None,
                quarantine_ns: 0,
                incarnation: 1,
                clean_for_write: None,
            },
        )
        .unwrap();
        for value_size in [0, 1, 99, 100, 1_000, EAGER_VALUE_BYTES] {
            store
                .put(DEFAULT_TABLE, &name, &vec![1; value_size], 1)
                .unwrap();
            let found = store.get(DEFAULT_TABLE, &name, 1).unwrap();
            let messages = [sent, found.span().len()].map(|n| n as u32);
            assert_eq!(message_bytes(value_size), messages);
            assert_eq!(entry_read_bytes(value_size), found.total_bytes() as u32);
        }
    }

    #[test]
    fn places_are_bounded() {
        let locations = |records| one_sided_config(records).locations;
        assert_eq!((locations(1), locations(1_000)), (4, 4_096));
        assert_eq!(locations(u32::MAX), MAX_LOCATIONS);
    }
}
