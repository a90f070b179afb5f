//! Measuring a server: slices of one operation after the other, each with the floor of its own time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hyv_host::sys::clock;
use hyv_host::sys::window::SharedWindow;
use hyv_lab::{Latencies, Slice, median};
use hyv_verbs::probe::{self, Lines};
use kvstore::client::{self, Client, ClientError};
use kvstore::proto::Reply;

use crate::pump::Pump;

/// Keys that a measurement uses: few enough to stay in the caches (the figures are for a warm store).
pub const KEYS: usize = 1_000;
/// Bytes of their values.
pub const VALUE: usize = 100;
/// Operations whose mean counts as one sample for ratios: at least 10 us, so that the clock's tick does not show.
const BATCH: usize = 64;
/// Rounds of the floor's ping-pong at either end of a slice, after as many to warm up.
const FLOOR_ROUNDS: u32 = 2_000;
/// Slices whose floors before and after differ by more are dropped: the machine changed in between.
const STEADY: f64 = 1.25;
/// Silence after which a probe has failed, ns.
const SILENCE_NS: u64 = 1_000_000_000;
/// How often the server is asked to take part before it counts as gone.
const FLOOR_TRIES: u32 = 5;

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// GET of a 100 B value.
    Get,
    /// PUT of a 100 B value over an older one.
    Put,
}

/// A server under measurement.
pub struct Target<'a> {
    /// The way to it.
    pub pump: Pump<'a>,
    /// Its window, where the probe line is.
    pub window: Arc<SharedWindow>,
    keys: Vec<Vec<u8>>,
    value: [u8; VALUE],
    next: u64,
    ticks: Vec<u32>,
    hz: f64,
}

/// One slice's result.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// For ratios: medians of batch means, and the floor.
    pub slice: Slice,
    /// Whether the floor was the same before and after.
    pub steady: bool,
    /// Operations.
    pub ops: u64,
    /// Time they took.
    pub elapsed: Duration,
}

impl<'a> Target<'a> {
    /// Puts the keys that the measurement uses.
    ///
    /// # Errors
    /// When the store refuses them.
    pub fn new(mut pump: Pump<'a>, window: Arc<SharedWindow>) -> Result<Self> {
        let keys: Vec<Vec<u8>> = (0..KEYS)
            .map(|i| format!("bench:{i:016}").into_bytes())
            .collect();
        let value = std::array::from_fn(|i| i as u8);
        let mut loader = crate::pump::Loader::new(&mut pump);
        for (i, key) in keys.iter().enumerate() {
            loader
                .put(key, &value, i as u64)
                .context("cannot store the keys to measure with")?;
        }
        loader
            .finish()
            .context("cannot store the keys to measure with")?;
        let hz = clock::tsc_hz() as f64;
        Ok(Self {
            pump,
            window,
            keys,
            value,
            next: 0,
            ticks: Vec::with_capacity(1 << 22),
            hz,
        })
    }

    fn pick(&mut self) -> usize {
        // A full-period walk that is no neighbour of itself: nothing is predictable from the last key.
        self.next = self
            .next
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.next >> 33) as usize % KEYS
    }

    /// The floor now: median round trip of one cache line between this thread's core and the server's, ns.
    ///
    /// # Errors
    /// When the server does not take part.
    pub fn floor(&mut self) -> Result<f64> {
        let pump = &mut self.pump;
        let ticks = floor(Lines::one(&self.window), |rounds| {
            pump.client.submit(&client::Operation::Probe { rounds })?;
            let mut ready = false;
            while !ready {
                pump.step(|_, reply| ready = matches!(reply, Ok(Reply::Probe { .. })))?;
            }
            Ok(())
        })?;
        Ok(ticks * 1e9 / self.hz)
    }

    /// Measures one slice; single latencies go to `all`, if the slice was steady.
    ///
    /// # Errors
    /// When the server fails.
    pub fn slice(
        &mut self,
        operation: Operation,
        length: Duration,
        all: &mut Latencies,
    ) -> Result<Measured> {
        let before = self.floor()?;
        self.ticks.clear();
        // The first operations refill caches and predictors.
        for _ in 0..1_000 {
            self.one(operation)?;
        }
        let begin = clock::tsc();
        let end = begin + (length.as_secs_f64() * self.hz) as u64;
        let mut last = begin;
        while last < end {
            self.one(operation)?;
            let now = clock::tsc();
            self.ticks
                .push((now - last).min(u64::from(u32::MAX)) as u32);
            last = now;
        }
        let elapsed = Duration::from_secs_f64((last - begin) as f64 / self.hz);
        let after = self.floor()?;
        let ns = 1e9 / self.hz;
        let mut means: Vec<f64> = self
            .ticks
            .chunks_exact(BATCH)
            .map(|batch| batch.iter().map(|&t| f64::from(t)).sum::<f64>() * ns / BATCH as f64)
            .collect();
        if self.ticks.is_empty() {
            bail!("not one operation in {length:?}: nothing can be said about it");
        }
        // A slice in which the machine was elsewhere counts for no ratio.
        let starved = means.is_empty();
        if starved {
            let sum: f64 = self.ticks.iter().map(|&t| f64::from(t)).sum();
            means.push(sum * ns / self.ticks.len() as f64);
        }
        let steady = !starved && before / after < STEADY && after / before < STEADY;
        for &t in &self.ticks {
            all.record((f64::from(t) * ns) as u64);
        }
        let p50_ns = median(&mut means);
        // Of single operations: batches would hide the tail.
        let mut single: Vec<u32> = std::mem::take(&mut self.ticks);
        let at = (single.len() * 99).div_ceil(100) - 1;
        let p99_ns = f64::from(*single.select_nth_unstable(at).1) * ns;
        let ops = single.len() as u64;
        self.ticks = single;
        Ok(Measured {
            slice: Slice {
                p50_ns,
                p99_ns,
                floor_ns: f64::midpoint(before, after),
            },
            steady,
            ops,
            elapsed,
        })
    }

    #[inline]
    fn one(&mut self, operation: Operation) -> Result<(), ClientError> {
        let i = self.pick();
        match operation {
            Operation::Get => self.pump.client.start_get(&self.keys[i])?,
            Operation::Put => self.pump.client.start_put(&self.keys[i], &self.value)?,
        };
        let mut failed = None;
        let mut sum = 0u64;
        let one = |_, reply: Result<Reply<'_>, ClientError>| match reply {
            // The value is looked at, as a user would.
            Ok(Reply::Value { value, .. }) => {
                sum = value.iter().step_by(64).map(|&b| u64::from(b)).sum()
            }
            Ok(_) => {}
            Err(e) => failed = Some(e),
        };
        self.pump.step(one)?;
        SINK.store(sum, Ordering::Relaxed);
        failed.map_or(Ok(()), Err)
    }

    /// The client.
    pub fn client(&mut self) -> &mut Client {
        self.pump.client
    }
}

static SINK: AtomicU64 = AtomicU64::new(0);

/// Median round trip on `lines`, in ticks of the TSC. `ask` has the server answer so many rounds. It gives up early, and is asked
/// again, where this thread does not get the CPU for long.
fn floor(lines: Lines<'_>, mut ask: impl FnMut(u32) -> Result<()>) -> Result<f64> {
    const STEP: u32 = 32;
    let bounce = |from, rounds| probe::bounce(lines, from, rounds, SILENCE_NS, clock::monotonic_ns);
    for _ in 0..FLOOR_TRIES {
        lines.reset();
        ask(2 * FLOOR_ROUNDS)?;
        let mut samples = Vec::new();
        let mut answered = bounce(0, FLOOR_ROUNDS);
        for k in 0..FLOOR_ROUNDS / STEP {
            let start = clock::tsc();
            answered = answered && bounce(FLOOR_ROUNDS + k * STEP, STEP);
            samples.push((clock::tsc() - start) as f64 / f64::from(STEP));
        }
        // The rounds that do not fill a batch: the server counts them.
        let rest = FLOOR_ROUNDS % STEP;
        if answered && bounce(2 * FLOOR_ROUNDS - rest, rest) {
            return Ok(median(&mut samples));
        }
    }
    bail!("the server does not answer on the probe line");
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn a_server_that_gave_up_is_asked_again() {
        let (line, mut asked) = (AtomicU64::new(0), 0);
        let lines = Lines::new(&line, &line);
        std::thread::scope(|scope| {
            let ticks = floor(lines, |rounds| {
                asked += 1;
                let rounds = if asked < 3 { 100 * asked } else { rounds };
                scope.spawn(move || probe::respond(lines, rounds, SILENCE_NS, clock::monotonic_ns));
                Ok(())
            });
            assert!(ticks.unwrap() > 0.0);
        });
        assert_eq!(asked, 3);
    }
}
