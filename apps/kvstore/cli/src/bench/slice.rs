//! Running operations that were drawn, with some of them under way at once, and the time each took.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use hyv_host::sys::clock;
use hyv_lab::{Latencies, LatencySummary, Slice, median};

use super::limits::{BATCH, SILENCE, WARM_UP};
use super::random::{key, position};
use super::target::{Outcome, Request, Target};
use super::workload::{Drawn, Kind};

/// What has been seen of one kind of operation.
#[derive(Debug, Default)]
pub struct Seen {
    /// Their latencies.
    pub latencies: Latencies,
    /// Those that the store refused, or answered wrongly.
    pub errors: u64,
    /// Those that found no record.
    pub missing: u64,
}

/// What has been seen of one workload on one server.
#[derive(Debug, Default)]
pub struct Tally {
    /// By [`Kind::index`].
    pub kinds: [Seen; Kind::ALL.len()],
    /// Time in which this was measured.
    pub time: Duration,
    /// The first refusal.
    pub first_error: Option<String>,
}

impl Tally {
    /// All operations.
    #[must_use]
    pub fn ops(&self) -> u64 {
        self.kinds.iter().map(|k| k.latencies.ops()).sum()
    }

    /// The summary over all kinds.
    #[must_use]
    pub fn all(&self) -> LatencySummary {
        let mut all = Latencies::new();
        for kind in &self.kinds {
            all.add(&kind.latencies);
        }
        all.summary(self.time)
    }
}

/// One slice's result.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Operations.
    pub ops: u64,
    /// Of those that were drawn, how many were begun, warm-up included.
    pub begun: usize,
    /// Time they took.
    pub elapsed: Duration,
    /// Latencies for ratios; the floor is not filled in.
    pub slice: Slice,
    /// 99.9th percentile of reads, ns; not a number without any.
    pub reads_p999_ns: f64,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    drawn: Drawn,
    start: u64,
    /// The read of a read-modify-write is under way.
    reading: bool,
}

/// Runs operations.
#[derive(Debug)]
pub struct Runner {
    value: Vec<u8>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Those whose requests found no room, or that the store wants to be asked again.
    again: Vec<u32>,
    ticks: Vec<u32>,
    kinds: Vec<Kind>,
    hz: f64,
}

/// What came of one pass over drawn operations.
struct Pass {
    begun: usize,
    ticks: u64,
    errors: [u64; Kind::ALL.len()],
    missing: [u64; Kind::ALL.len()],
    first_error: Option<String>,
}

impl Runner {
    /// For `in_flight` operations under way at once, with values of `value_size` bytes.
    #[must_use]
    pub fn new(in_flight: u32, value_size: usize) -> Self {
        let drawn = Drawn {
            record: 0,
            length: 0,
            kind: Kind::Read,
        };
        let slot = Slot {
            drawn,
            start: 0,
            reading: false,
        };
        Self {
            value: (0..value_size).map(|i| i as u8).collect(),
            slots: vec![slot; in_flight as usize],
            free: (0..in_flight).rev().collect(),
            again: Vec::new(),
            ticks: Vec::new(),
            kinds: Vec::new(),
            hz: clock::tsc_hz() as f64,
        }
    }

    /// Requests under way at once.
    #[must_use]
    pub const fn in_flight(&self) -> usize {
        self.slots.len()
    }

    /// Does what was drawn for at most `length`, after a warm-up that does not count.
    ///
    /// # Errors
    /// When the connection ended or the store is silent. What the store refuses is counted.
    pub fn slice(
        &mut self,
        target: &mut impl Target,
        drawn: &[Drawn],
        length: Duration,
        tally: &mut Tally,
    ) -> Result<Measured> {
        target.prepare(self.slots.len() as u32);
        let warm = &drawn[..WARM_UP.min(drawn.len() / 4)];
        let ticks = (length.as_secs_f64() * self.hz) as u64;
        // Slow operations need no more of it than time.
        let first = self.pass(target, warm, ticks / 4)?;
        let pass = self.pass(target, &drawn[first.begun..], ticks)?;
        let begun = first.begun + pass.begun;
        if tally.first_error.is_none() {
            tally.first_error = first.first_error.or(pass.first_error);
        }
        let ns = 1e9 / self.hz;
        for (&t, kind) in self.ticks.iter().zip(&self.kinds) {
            tally.kinds[kind.index()]
                .latencies
                .record((f64::from(t) * ns) as u64);
        }
        for (i, kind) in tally.kinds.iter_mut().enumerate() {
            kind.errors += pass.errors[i];
            kind.missing += pass.missing[i];
        }
        let elapsed = Duration::from_secs_f64(pass.ticks as f64 / self.hz);
        tally.time += elapsed;
        if self.ticks.is_empty() {
            bail!("not one operation in {length:?}: nothing can be said about it");
        }
        let ops = self.ticks.len() as u64;
        // One at a time the clock's tick shows in single operations, not in means; several at a time they overlap.
        let mut means: Vec<f64> = if self.slots.len() == 1 && self.ticks.len() >= 4 * BATCH {
            let mean = |b: &[u32]| b.iter().map(|&t| f64::from(t)).sum::<f64>() / BATCH as f64;
            self.ticks.chunks_exact(BATCH).map(mean).collect()
        } else {
            self.ticks.iter().map(|&t| f64::from(t)).collect()
        };
        let reads_p999_ns = self.reads_quantile(0.999) * ns;
        let p50_ns = median(&mut means) * ns;
        let at = (self.ticks.len() * 99).div_ceil(100) - 1;
        let p99_ns = f64::from(*self.ticks.select_nth_unstable(at).1) * ns;
        Ok(Measured {
            ops,
            begun,
            elapsed,
            slice: Slice {
                p50_ns,
                p99_ns,
                floor_ns: f64::NAN,
            },
            reads_p999_ns,
        })
    }

    /// Ticks that a share of the last pass's reads did not exceed.
    fn reads_quantile(&self, share: f64) -> f64 {
        let pairs = self.ticks.iter().zip(&self.kinds);
        let reads = pairs.filter(|(_, kind)| **kind == Kind::Read);
        let mut reads: Vec<u32> = reads.map(|(ticks, _)| *ticks).collect();
        if reads.is_empty() {
            return f64::NAN;
        }
        let at = ((reads.len() as f64 * share).ceil() as usize).clamp(1, reads.len()) - 1;
        f64::from(*reads.select_nth_unstable(at).1)
    }

    /// Does all of `drawn` without measuring, and fails at the first that the store refuses; `each` hears how many are done.
    ///
    /// # Errors
    /// As [`Self::slice`], and what the store says.
    pub fn all(
        &mut self,
        target: &mut impl Target,
        mut requests: impl Iterator<Item = Wanted>,
        mut each: impl FnMut(u64) -> Result<()>,
    ) -> Result<u64> {
        target.prepare(self.slots.len() as u32);
        let mut open: Vec<Option<Wanted>> = vec![None; self.slots.len()];
        let mut free: Vec<u32> = (0..self.slots.len() as u32).rev().collect();
        let mut again: Vec<(u32, Wanted)> = Vec::new();
        let (mut done, mut failed) = (0u64, None::<String>);
        let mut busy_since: Option<Instant> = None;
        loop {
            while failed.is_none() {
                let (ticket, wanted) = match again.pop() {
                    Some(pair) => pair,
                    None => match free.last().copied().zip(if free.is_empty() {
                        None
                    } else {
                        requests.next()
                    }) {
                        Some(pair) => {
                            free.pop();
                            pair
                        }
                        None => break,
                    },
                };
                let name = key(wanted.record());
                let request = match wanted {
                    Wanted::Stored(_) => Request::Write(&name, &self.value),
                    Wanted::Removed(_) => Request::Remove(&name),
                };
                if !target.submit(ticket, request)? {
                    again.push((ticket, wanted));
                    break;
                }
                open[ticket as usize] = Some(wanted);
            }
            if open.iter().all(Option::is_none) {
                return match failed {
                    Some(why) => bail!("after {done} records: {why}"),
                    None if again.is_empty() => Ok(done),
                    None => bail!("the store takes no request although none is under way"),
                };
            }
            let mut busy = false;
            target.wait(&mut |ticket, outcome| {
                let wanted = open[ticket as usize].take();
                match outcome {
                    Outcome::Busy => {
                        busy = true;
                        again.extend(wanted.map(|w| (ticket, w)));
                        return;
                    }
                    Outcome::Refused(why) => {
                        failed.get_or_insert(why);
                    }
                    Outcome::Value(_) | Outcome::Done | Outcome::Missing => done += 1,
                }
                free.push(ticket);
            })?;
            check_busy(busy, &mut busy_since)?;
            each(done)?;
        }
    }

    fn pass(&mut self, target: &mut impl Target, drawn: &[Drawn], ticks: u64) -> Result<Pass> {
        self.ticks.clear();
        self.kinds.clear();
        let Self {
            value,
            slots,
            free,
            again,
            ticks: times,
            kinds,
            ..
        } = self;
        let mut pass = Pass {
            begun: 0,
            ticks: 0,
            errors: [0; Kind::ALL.len()],
            missing: [0; Kind::ALL.len()],
            first_error: None,
        };
        let single = slots.len() == 1;
        let begin = clock::tsc();
        let end = begin.saturating_add(ticks);
        let mut now = begin;
        let mut open = 0usize;
        let mut busy_since: Option<Instant> = None;
        loop {
            // What was put off goes first.
            while let Some(ticket) = again.pop() {
                let slot = &slots[ticket as usize];
                if !submit(target, ticket, slot, value)? {
                    again.push(ticket);
                    break;
                }
                open += 1;
            }
            while again.is_empty() && pass.begun < drawn.len() && now < end {
                let Some(ticket) = free.pop() else { break };
                if !single {
                    now = clock::tsc();
                }
                let drawn = drawn[pass.begun];
                pass.begun += 1;
                let slot = &mut slots[ticket as usize];
                *slot = Slot {
                    drawn,
                    start: now,
                    reading: drawn.kind == Kind::ReadModifyWrite,
                };
                if !submit(target, ticket, slot, value)? {
                    again.push(ticket);
                    break;
                }
                open += 1;
            }
            if open == 0 {
                if again.is_empty() {
                    pass.ticks = now - begin;
                    return Ok(pass);
                }
                bail!("the store takes no request although none is under way");
            }
            let mut busy = false;
            target.wait(&mut |ticket, outcome| {
                open -= 1;
                let slot = &mut slots[ticket as usize];
                let kind = slot.drawn.kind.index();
                let bad = match outcome {
                    Outcome::Done => None,
                    Outcome::Value(v) if looked_at(v) == value.len() => None,
                    Outcome::Value(v) => Some(format!(
                        "a value of {} bytes came where one of {} was stored",
                        v.len(),
                        value.len()
                    )),
                    Outcome::Missing => {
                        pass.missing[kind] += 1;
                        None
                    }
                    Outcome::Busy => {
                        busy = true;
                        return again.push(ticket);
                    }
                    Outcome::Refused(why) => Some(why),
                };
                if let Some(why) = bad {
                    pass.errors[kind] += 1;
                    pass.first_error.get_or_insert(why);
                } else if slot.reading {
                    slot.reading = false;
                    return again.push(ticket);
                }
                now = clock::tsc();
                times.push(now.saturating_sub(slot.start).min(u64::from(u32::MAX)) as u32);
                kinds.push(slot.drawn.kind);
                free.push(ticket);
            })?;
            check_busy(busy, &mut busy_since)?;
        }
    }
}

/// Fails when a store has wanted to be asked again for too long.
fn check_busy(busy: bool, since: &mut Option<Instant>) -> Result<()> {
    if !busy {
        *since = None;
    } else if since.get_or_insert_with(Instant::now).elapsed() > SILENCE {
        bail!("the store has been busy for {SILENCE:?}");
    }
    Ok(())
}

/// A record that shall be there, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Store it.
    Stored(u32),
    /// Remove it.
    Removed(u32),
}

impl Wanted {
    const fn record(self) -> u32 {
        match self {
            Self::Stored(record) | Self::Removed(record) => record,
        }
    }
}

#[inline]
fn submit(target: &mut impl Target, ticket: u32, slot: &Slot, value: &[u8]) -> Result<bool> {
    let drawn = slot.drawn;
    if drawn.kind == Kind::Scan {
        let request = Request::Scan {
            position: position(drawn.record),
            length: drawn.length,
        };
        return target.submit(ticket, request);
    }
    let name = key(drawn.record);
    let read = drawn.kind == Kind::Read || slot.reading;
    target.submit(
        ticket,
        if read {
            Request::Read(&name)
        } else {
            Request::Write(&name, value)
        },
    )
}

/// Touches each cache line of a value, as whoever reads it would; gives its length.
#[inline]
pub(super) fn looked_at(value: &[u8]) -> usize {
    let sum: u64 = value.iter().step_by(64).map(|&b| u64::from(b)).sum();
    std::hint::black_box(sum);
    value.len()
}
