//! One store whose log is filled to some share: reads beside a cleaner that never rests, and overwriting.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use hyv_host::sys::{clock, cpu};
use hyv_lab::limits::MIN_PAIRS;
use hyv_lab::{Interval, Slice, median, pair_slices, paired_ratio, values};
use kvstore::client::Client;
use kvstore::proto::StatsReply;
use kvstore::status::Status;
use kvstore::store::entry::entry_bytes;
use kvstore::store::{CleanerMode, RESULT_RECORD_BYTES};
use rustix::process::Pid;

use super::lanes::{LOADING, Lane, Plan, Store, Until, shuffle};
use super::{
    Args, Extras, Place, What, accel, crossings, finish, interrupted, once_line, out, plan, until,
};
use crate::bench::filled::{self, Fill, OverwriteAt, OverwriteLine, TailLine, TailSide};
use crate::bench::limits::{
    KEY_BYTES, MAX_PREPARED, MIN_PREPARED, SAME_FLOOR, SLICE, TURN_OVERS, WARM_UP,
};
use crate::bench::rpc::{self, Rpc};
use crate::bench::slice::{Runner, Tally, Wanted};
use crate::bench::workload::{Generator, Kind};
use crate::commands::appliance::Appliance;
use crate::commands::bench::{Server, check, collapse};
use crate::commands::client::Progress;

/// What is measured of such a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Instrument {
    /// Reads with the cleaner off, and with one that never rests.
    Tail,
    /// Overwriting at several shares.
    Overwrite,
}

/// Measures it in each place, one after the other.
pub(super) fn run<'a>(
    args: &'a Args,
    what: &'a What,
    instrument: Instrument,
    appliance: &'a Appliance,
    first: Client,
) -> Result<()> {
    let all = cpu::allowed().unwrap_or_default();
    cpu::pin_current(&appliance.roles.client).context("cannot run on the chosen CPU")?;
    if let Err(e) = appliance.guest.qemu().pin_others(&appliance.roles.client) {
        tracing::debug!("QEMU's other threads run anywhere: {e}");
    }
    let places = match &args.places[..] {
        [] => &[Place::Guest],
        places => places,
    };
    let mut extras = Extras {
        accel: places.contains(&Place::Guest).then(|| accel(appliance)),
        mode: Some(appliance.mode),
        cache_lines: crossings(what, appliance),
        ..Extras::default()
    };
    out(args, &format!("{}\n", once_line(what)));
    let (mut floors, mut records) = (Vec::new(), 0);
    let mut measure = |lane: &mut Lane<'a>, collapse: &dyn Fn()| -> Result<()> {
        let mut side = Side::new(args, what, appliance, lane)?;
        match instrument {
            Instrument::Tail => extras.cleaner_tail.push(side.tail(lane, collapse)?),
            Instrument::Overwrite => extras.overwrite.push(side.overwrite(lane, collapse)?),
        }
        floors.extend(lane.floors());
        records = records.max(side.records);
        Ok(())
    };
    let mut first = Some(first).filter(|_| what.exactly_once);
    let clients = rpc::connect(args.clients, || match first.take() {
        Some(client) => Ok(client),
        None => Ok(args
            .place
            .connect_by(&appliance.context, what.client_config())?),
    })?;
    let window = Arc::clone(appliance.guest.qemu().window());
    let pid =
        Pid::from_raw(appliance.guest.qemu().pid().cast_signed()).context("QEMU has no pid")?;
    let rpc = Rpc::new(clients, Some(window), what.value_size)?;
    let mut guest = Lane::new("guest", Some(pid), Store::Rpc(rpc));
    for place in places {
        match place {
            Place::Guest => measure(&mut guest, &|| collapse(appliance))?,
            Place::Native => {
                // Servers that poll would share a core. It goes on when the lane is dropped.
                guest.pause()?;
                native(args, what, appliance, &mut measure)?;
                guest.resume()?;
            }
        }
    }
    drop(guest);
    cpu::pin_current(&all).context("cannot run on all CPUs again")?;
    if !floors.is_empty() {
        extras.floor = Some(crate::bench::report::Floors {
            cache_line_rtt_ns: median(&mut floors),
            two_lines_rtt_ns: None,
            send_rtt_ns: None,
            send_bytes: rpc::message_bytes(what.value_size),
            read_rtt_ns: None,
            read_bytes: rpc::entry_read_bytes(what.value_size),
        });
    }
    finish(args, what, records, Vec::new(), extras)
}

/// What is done with a lane: told the lane, and what gives its store large pages.
type Measure<'a, 'm> = dyn FnMut(&mut Lane<'a>, &dyn Fn()) -> Result<()> + 'm;

/// Starts a native server, and has it measured.
fn native<'a>(
    args: &Args,
    what: &What,
    appliance: &'a Appliance,
    measure: &mut Measure<'a, '_>,
) -> Result<()> {
    let port = args.place.port().wrapping_add(1).max(1);
    let name = "native-1";
    let store_bytes = Status::read(&appliance.guest.qemu().window().user).store_bytes;
    let mut server = Server::start(appliance, port, name, store_bytes)?;
    let clients = rpc::connect(args.clients, || {
        server.connect_with(appliance, port, what.client_config())
    })?;
    let memory = appliance
        .instance
        .backend()
        .user_memory(name)
        .context("the native server is gone")?;
    let window = Some(Arc::clone(&memory.window));
    let rpc = Rpc::new(clients, window, what.value_size)?;
    let mut lane = Lane::new("native", Some(server.pid), Store::Rpc(rpc));
    measure(&mut lane, &|| {
        let status = Status::read(&memory.window.user);
        if let Err(e) = memory.ram.collapse(status.store_offset, status.store_bytes) {
            tracing::debug!("the native store stays on small pages: {e}");
        }
    })
}

/// What holds for all that is measured of one store.
struct Side<'a> {
    args: &'a Args,
    what: &'a What,
    appliance: &'a Appliance,
    plan: Plan<'a>,
    /// Records in the store.
    records: u32,
    log_bytes: u64,
    capacity: u64,
}

impl<'a> Side<'a> {
    fn new(
        args: &'a Args,
        what: &'a What,
        appliance: &'a Appliance,
        lane: &mut Lane<'a>,
    ) -> Result<Self> {
        let stats = lane.rpc()?.stats()?;
        let side = Self {
            args,
            what,
            appliance,
            plan: plan(args, what, 0, &appliance.stop),
            records: 0,
            log_bytes: stats.log_bytes,
            capacity: stats.capacity_bytes,
        };
        for &percent in &what.utilisations {
            side.records_for(percent)?;
        }
        Ok(side)
    }

    const fn entry_bytes(&self) -> u64 {
        entry_bytes(KEY_BYTES, self.what.value_size) as u64
    }

    /// Records that fill so many per cent of the log.
    fn records_for(&self, percent: u8) -> Result<u32> {
        let bytes = self.log_bytes * u64::from(percent) / 100;
        // Room for what is under way.
        let beside =
            u64::from(self.plan.in_flight) * (self.entry_bytes() + 2 * RESULT_RECORD_BYTES as u64);
        if bytes + beside > self.capacity {
            bail!(
                "--utilisation {percent}: of its log of {} this store accepts {} ({}%); give less, or more --memory",
                values::bytes(self.log_bytes),
                values::bytes(self.capacity),
                self.capacity * 100 / self.log_bytes.max(1)
            );
        }
        let records = bytes / self.entry_bytes();
        if records == 0 {
            bail!("--utilisation {percent}: not one record of this size; give more --memory");
        }
        u32::try_from(records).context("more records than there are numbers; give less --memory")
    }

    fn check(&self) -> Result<()> {
        interrupted(self.plan.stop)?;
        check(self.appliance)
    }

    /// Stores or removes records until so many are there.
    fn fill(&mut self, lane: &mut Lane<'a>, percent: u8) -> Result<()> {
        let wanted = self.records_for(percent)?;
        let (from, start) = (self.records, Instant::now());
        let (place, mut progress) = (lane.place, Progress::new());
        let mut runner = Runner::new(LOADING, self.what.value_size);
        let stored = (from..wanted).map(Wanted::Stored);
        let removed = (wanted..from).map(Wanted::Removed);
        let outcome = lane.all(&mut runner, stored.chain(removed), |n| {
            interrupted(self.plan.stop)?;
            progress.show(|| {
                let rate = n as f64 / start.elapsed().as_secs_f64();
                let all = wanted.abs_diff(from);
                format!("{place}: filling to {percent}%: {n} of {all} records, {rate:.0}/s")
            });
            Ok(())
        });
        progress.end();
        outcome.with_context(|| format!("{place}: cannot fill the store to {percent}%"))?;
        self.records = wanted;
        self.plan.records = wanted;
        check(self.appliance)
    }

    fn filled(&self, percent: u8, stats: &StatsReply) -> Fill {
        let live = stats.live_bytes as f64;
        Fill {
            utilisation: percent,
            of_log: live / self.log_bytes as f64,
            of_capacity: live / self.capacity as f64,
            records: self.records,
            log_bytes: self.log_bytes,
            segment_bytes: stats.segment_bytes,
        }
    }

    fn tail(&mut self, lane: &mut Lane<'a>, collapse: &dyn Fn()) -> Result<TailLine> {
        let percent = self.what.utilisations[0];
        lane.drive(self.appliance.inline());
        let outcome = self.fill(lane, percent);
        lane.drive(None);
        outcome?;
        collapse();
        lane.drive(self.appliance.inline());
        let outcome = self.alternate(lane);
        // Whatever came of it.
        let back = lane
            .rpc()
            .and_then(|rpc| rpc.set_cleaner(CleanerMode::Auto));
        lane.drive(None);
        let line = outcome?;
        back?;
        out(self.args, &filled::tail(&line));
        Ok(line)
    }

    /// Slices with the cleaner off, always, and off again, in another order each round.
    fn alternate(&self, lane: &mut Lane<'a>) -> Result<TailLine> {
        let workload = self.what.workloads[0];
        let plan = &self.plan;
        let reserve = if plan.in_flight > 1 {
            plan.in_flight
        } else {
            0
        };
        let mut generator =
            Generator::new(workload, plan.records, plan.read_share, reserve, plan.seed);
        let mut runner = Runner::new(plan.in_flight, plan.value_size);
        let mut arms = [CleanerMode::Off, CleanerMode::Always, CleanerMode::Off].map(Arm::new);
        let mut order: Vec<usize> = (0..arms.len()).collect();
        let (mut random, mut drawn, mut prepared) = (clock::tsc() | 1, Vec::new(), MIN_PREPARED);
        let mut progress = Progress::new();
        let (start, mut rounds) = (Instant::now(), 0);
        let stats = loop {
            let over = arms.iter().all(|arm| match until(self.args) {
                Until::Time(time) => arm.tally.time >= time,
                Until::Operations(n) => arm.tally.ops() >= n,
            });
            if over && rounds >= 2 * MIN_PAIRS {
                break lane.rpc()?.stats()?;
            }
            generator.draw(prepared, &mut drawn);
            shuffle(&mut order, &mut random);
            for &i in &order {
                let ops = arms[i].slice(lane, &mut runner, &drawn)?;
                prepared = (ops + ops / 3 + 2 * WARM_UP).clamp(prepared, MAX_PREPARED);
                self.check()?;
            }
            rounds += 1;
            progress.show(|| format!("cleaner off and on: {:.0} s", start.elapsed().as_secs_f64()));
        };
        progress.end();
        let [off, always, again] = &mut arms;
        let reads = |tally: &Tally| tally.kinds[Kind::Read.index()].latencies.clone();
        let ratio = |of: fn(&Arm) -> &Vec<Slice>, value: fn(&Slice) -> f64, a: &Arm, b: &Arm| {
            let pairs = pair_slices(of(a), of(b), SAME_FLOOR);
            let pairs: Vec<_> = pairs.iter().map(|(a, b)| (value(a), value(b))).collect();
            paired_ratio(&pairs).ok()
        };
        let p999 =
            |a: &Arm, b: &Arm| -> Option<Interval> { ratio(|x| &x.tails, |s| s.p99_ns, a, b) };
        let line = TailLine {
            place: lane.place,
            workload: workload.name(),
            fill: self.filled(self.what.utilisations[0], &stats),
            p999: p999(always, off),
            p99: ratio(|x| &x.slices, |s| s.p99_ns, always, off),
            p50: ratio(|x| &x.slices, |s| s.p50_ns, always, off),
            aa_p999: p999(again, off),
            off: {
                let mut all = reads(&off.tally);
                all.add(&reads(&again.tally));
                let time = off.tally.time + again.tally.time;
                let (moved, cleaned) = (off.moved + again.moved, off.cleaned + again.cleaned);
                TailSide::new(&all.summary(time), time.as_secs_f64(), moved, cleaned)
            },
            always: {
                let time = always.tally.time;
                let all = reads(&always.tally).summary(time);
                TailSide::new(&all, time.as_secs_f64(), always.moved, always.cleaned)
            },
            p999_of_all: 0.0,
        };
        if line.off.ops == 0 || line.always.ops == 0 {
            bail!("workload {workload} has no reads: there is nothing to compare");
        }
        if line.off.cleaner_moved_bytes > 0 || line.always.cleaner_moved_bytes == 0 {
            bail!(
                "the cleaner moved {} bytes while it should have been off and {} while it should have worked: somebody else \
                 has set it meanwhile, or the store is too small (give more --memory)",
                line.off.cleaner_moved_bytes,
                line.always.cleaner_moved_bytes
            );
        }
        let errors: u64 = arms
            .iter()
            .flat_map(|arm| &arm.tally.kinds)
            .map(|kind| kind.errors + kind.missing)
            .sum();
        if errors > 0 {
            let why = arms.iter().find_map(|arm| arm.tally.first_error.as_deref());
            bail!(
                "{errors} operations failed: {}",
                why.unwrap_or("records are missing")
            );
        }
        Ok(TailLine {
            p999_of_all: line.always.p999_ns as f64 / line.off.p999_ns.max(1) as f64,
            ..line
        })
    }

    fn overwrite(&mut self, lane: &mut Lane<'a>, collapse: &dyn Fn()) -> Result<OverwriteLine> {
        let mut shares = self.what.utilisations.clone();
        shares.extend(self.what.utilisations.first());
        let mut at = Vec::new();
        for percent in shares {
            lane.drive(self.appliance.inline());
            let outcome = self.fill(lane, percent);
            lane.drive(None);
            outcome?;
            // What is written to for the first time now gets large pages later; the log's places come round soon.
            collapse();
            lane.drive(self.appliance.inline());
            let outcome = self.overwrite_at(lane, percent, collapse);
            lane.drive(None);
            at.push(outcome?);
        }
        let drift = filled::set_against_first(&mut at);
        let line = OverwriteLine {
            place: lane.place,
            at,
            drift,
        };
        out(self.args, &filled::overwrite(&line));
        Ok(line)
    }

    /// Overwrites until the log was written over, and then measures.
    fn overwrite_at(
        &self,
        lane: &mut Lane<'a>,
        percent: u8,
        collapse: &dyn Fn(),
    ) -> Result<OverwriteAt> {
        let plan = &self.plan;
        let workload = self.what.workloads[0];
        let mut generator = Generator::new(
            workload,
            plan.records,
            0.0,
            0,
            plan.seed ^ u64::from(percent),
        );
        let mut runner = Runner::new(plan.in_flight, plan.value_size);
        let mut drawn = Vec::new();
        // Drawn once: a pause between slices would be the cleaner's.
        generator.draw(MAX_PREPARED, &mut drawn);
        let mut from = 0;
        let mut slice = |lane: &mut Lane<'a>, runner: &mut Runner, tally: &mut Tally| {
            if drawn.len() - from < drawn.len() / 8 {
                from = 0;
            }
            let measured = runner.slice(lane.rpc()?, &drawn[from..], SLICE, tally)?;
            from += measured.begun;
            self.check()?;
            Ok::<_, anyhow::Error>(measured)
        };
        let record = if self.what.exactly_once {
            RESULT_RECORD_BYTES as u64
        } else {
            0
        };
        let each = self.entry_bytes() + record;
        let turned = |now: &StatsReply, then: &StatsReply| {
            ((now.puts - then.puts) * each) as f64 / self.log_bytes as f64
        };
        let mut progress = Progress::new();
        let place = lane.place;
        let begun = lane.rpc()?.stats()?;
        let mut before = begun;
        let mut unmeasured = Tally::default();
        while turned(&before, &begun) < TURN_OVERS {
            slice(lane, &mut runner, &mut unmeasured)?;
            before = lane.rpc()?.stats()?;
            progress.show(|| {
                let share = 100.0 * turned(&before, &begun) / TURN_OVERS;
                format!("{place}: overwriting at {percent}%: {share:.0}% of what is not measured")
            });
        }
        // All places of the log are in use by now.
        lane.drive(None);
        collapse();
        lane.drive(self.appliance.inline());
        let (mut tally, mut rates) = (Tally::default(), Vec::new());
        slice(lane, &mut runner, &mut unmeasured)?;
        before = lane.rpc()?.stats()?;
        loop {
            let over = match until(self.args) {
                Until::Time(time) => tally.time >= time,
                Until::Operations(n) => tally.ops() >= n,
            };
            if over {
                break;
            }
            let measured = slice(lane, &mut runner, &mut tally)?;
            rates.push(measured.ops as f64 / measured.elapsed.as_secs_f64());
            progress.show(|| {
                let done = tally.time.as_secs_f64();
                format!("{place}: overwriting at {percent}%: {done:.0} s measured")
            });
        }
        progress.end();
        let after = lane.rpc()?.stats()?;
        for seen in tally.kinds.iter().chain(&unmeasured.kinds) {
            if seen.errors > 0 {
                let why = tally.first_error.or(unmeasured.first_error);
                bail!(
                    "{} writes failed at {percent}%: {}",
                    seen.errors,
                    why.unwrap_or_default()
                );
            }
        }
        rates.sort_by(f64::total_cmp);
        let at = |share: f64| rates[((rates.len() - 1) as f64 * share) as usize];
        let all = tally.all();
        let written = ((after.puts - before.puts) * each).max(1) as f64;
        let moved = after.cleaner_moved_bytes - before.cleaner_moved_bytes;
        Ok(OverwriteAt {
            fill: self.filled(percent, &after),
            ops: all.ops,
            ops_per_s: at(0.5),
            ops_per_s_low: at(0.1),
            ops_per_s_high: at(0.9),
            p50_ns: all.p50_ns,
            p99_ns: all.p99_ns,
            p999_ns: all.p999_ns,
            of_first: f64::NAN,
            written_bytes_per_op: each as f64,
            moved_per_written: moved as f64 / written,
            turned_over: turned(&before, &begun),
        })
    }
}

/// Slices with the cleaner in one mode.
struct Arm {
    mode: CleanerMode,
    tally: Tally,
    slices: Vec<Slice>,
    /// The same with the 99.9th percentile of reads in place of the 99th.
    tails: Vec<Slice>,
    moved: u64,
    cleaned: u64,
}

impl Arm {
    fn new(mode: CleanerMode) -> Self {
        Self {
            mode,
            tally: Tally::default(),
            slices: Vec::new(),
            tails: Vec::new(),
            moved: 0,
            cleaned: 0,
        }
    }

    /// Measures one; gives its operations.
    fn slice(
        &mut self,
        lane: &mut Lane<'_>,
        runner: &mut Runner,
        drawn: &[crate::bench::workload::Drawn],
    ) -> Result<usize> {
        lane.rpc()?.set_cleaner(self.mode)?;
        let before = lane.rpc()?.stats()?;
        std::mem::swap(&mut lane.tally, &mut self.tally);
        let measured = lane.slice(runner, drawn, SLICE);
        std::mem::swap(&mut lane.tally, &mut self.tally);
        let measured = measured?;
        let after = lane.rpc()?.stats()?;
        self.moved += after.cleaner_moved_bytes - before.cleaner_moved_bytes;
        self.cleaned += after.cleaned_segments - before.cleaned_segments;
        let slice = lane.last().context("a slice was measured")?;
        self.slices.push(slice);
        self.tails.push(Slice {
            p99_ns: measured.reads_p999_ns,
            ..slice
        });
        Ok(measured.ops as usize)
    }
}
