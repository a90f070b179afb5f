//! The machine's Redis beside the store.

use std::fmt::Write as _;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use hyv_host::sys::clock;
use hyv_lab::median;

use super::lanes::{Driver, Lane, Plan, Store, shuffle};
use crate::bench::limits::{MAX_PREPARED, SLICE};
use crate::bench::report::{RedisLine, Speedup, Throughput, WorkloadLine};
use crate::bench::slice::Runner;
use crate::bench::workload::{Generator, Kind, Workload};
use crate::commands::client::Progress;
use crate::redis::benchmark::{self, Rates};
use crate::redis::client::Redis;
use crate::redis::server::Server;

/// Where Redis is reached by its unix socket.
pub(super) const UNIX: &str = "redis-unix";
/// Where Redis is reached by TCP.
pub(super) const TCP: &str = "redis-tcp";
/// Requests under way, this store and Redis by the same client.
const IN_FLIGHT: u32 = 16;
/// Rounds of throughput.
const ROUNDS: usize = 7;
/// Requests of one run of `redis-benchmark`, each of GET and SET: some tenths of a second.
const BENCHMARK_REQUESTS: u64 = 200_000;

/// Redis for one measurement.
pub(super) struct RedisSide {
    server: Server,
}

impl RedisSide {
    /// Starts a server on `cpus`.
    pub fn start(cpus: &[usize]) -> Result<Self> {
        let server = Server::start(cpus)?;
        eprintln!("redis-server {}: up", server.version);
        Ok(Self { server })
    }

    /// Both ways to it.
    pub fn connect(&self, clients: u16) -> Result<[(&'static str, Redis); 2]> {
        Ok([
            (UNIX, Redis::connect(&self.server.unix(), clients)?),
            (TCP, Redis::connect(&self.server.tcp(), clients)?),
        ])
    }

    /// Throughput with many requests under way, of `lane` and of Redis in alternating slices.
    pub fn throughput<'a>(
        &self,
        plan: &Plan<'_>,
        workload: Workload,
        lane: &mut Lane<'a>,
        inline: Driver<'_, 'a>,
        stop: &AtomicBool,
    ) -> Result<RedisLine> {
        let (first, share, second) = workload.mix(plan.read_share);
        let read_share = match first {
            Kind::Read => share,
            // Scans are reads too; redis-benchmark has no better.
            _ => {
                1.0 - if second == Kind::Insert {
                    1.0 - share
                } else {
                    0.0
                }
            }
        };
        let in_flight = plan.in_flight.max(IN_FLIGHT);
        let mut generator = Generator::new(
            workload,
            plan.records,
            plan.read_share,
            in_flight,
            plan.seed,
        );
        let mut runner = Runner::new(in_flight, plan.value_size);
        let mut redis = Lane::new(
            UNIX,
            None,
            Store::Redis(Redis::connect(&self.server.unix(), 1)?),
        );
        let (mut store, mut own, mut unix, mut tcp) = (vec![], vec![], vec![], vec![]);
        let mut drawn = Vec::new();
        let mut progress = Progress::new();
        let (mut order, mut random) = ([0, 1, 2, 3], clock::tsc() | 1);
        for round in 0..ROUNDS {
            generator.draw(MAX_PREPARED / 2, &mut drawn);
            shuffle(&mut order, &mut random);
            for side in order {
                progress.show(|| format!("throughput: round {} of {ROUNDS}", round + 1));
                super::interrupted(stop)?;
                match side {
                    0 => {
                        lane.resume()?;
                        lane.drive(inline());
                        let measured = lane.slice(&mut runner, &drawn, SLICE).and_then(|m| {
                            plan.undo(lane, &drawn[..m.begun])?;
                            Ok(m)
                        });
                        lane.drive(None);
                        lane.pause()?;
                        let m = measured?;
                        store.push(m.ops as f64 / m.elapsed.as_secs_f64());
                    }
                    1 => {
                        let m = redis.slice(&mut runner, &drawn, SLICE)?;
                        plan.undo(&mut redis, &drawn[..m.begun])?;
                        own.push(m.ops as f64 / m.elapsed.as_secs_f64());
                    }
                    _ => {
                        let address = if side == 2 {
                            self.server.unix()
                        } else {
                            self.server.tcp()
                        };
                        let rates: Rates = benchmark::run(
                            &address,
                            BENCHMARK_REQUESTS,
                            plan.records,
                            plan.value_size,
                            stop,
                        )?;
                        let list = if side == 2 { &mut unix } else { &mut tcp };
                        list.push(rates.mixed(read_share));
                    }
                }
            }
        }
        progress.end();
        Ok(RedisLine {
            version: self.server.version.clone(),
            throughput: Throughput {
                workload: workload.name(),
                read_share,
                in_flight,
                store: median(&mut store),
                redis_unix: median(&mut own),
                redis_benchmark_unix: median(&mut unix),
                redis_benchmark_tcp: median(&mut tcp),
            },
        })
    }
}

/// Redis ÷ this store by the first workload's reads, and this store ÷ Redis by throughput.
pub(super) fn speedup(results: &[WorkloadLine], redis: &RedisLine) -> Option<Speedup> {
    let first = results.first()?;
    let other = results
        .iter()
        .find(|l| l.workload == first.workload && l.place == UNIX)?;
    let t = &redis.throughput;
    Some(Speedup {
        rpc_p50: other.read_p50_ns() as f64 / first.read_p50_ns() as f64,
        one_sided_p50: None,
        throughput: t.store / t.redis_benchmark_unix.max(t.redis_benchmark_tcp),
    })
}

/// For people.
pub(super) fn shown(redis: &RedisLine, speedup: Option<Speedup>) -> String {
    let t = &redis.throughput;
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "throughput, workload {}, {} under way: {:.0}/s; Redis {}: {:.0}/s by the same client over its unix socket; \
         redis-benchmark -P {} -c {}: {:.0}/s unix, {:.0}/s TCP",
        t.workload,
        t.in_flight,
        t.store,
        redis.version,
        t.redis_unix,
        benchmark::PIPELINE,
        benchmark::CLIENTS,
        t.redis_benchmark_unix,
        t.redis_benchmark_tcp
    );
    if let Some(s) = speedup {
        let _ = writeln!(
            text,
            "faster than Redis: {:.1} times by the median of a read, {:.1} times by throughput",
            s.rpc_p50, s.throughput
        );
    }
    text
}
